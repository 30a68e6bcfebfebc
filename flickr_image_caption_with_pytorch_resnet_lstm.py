"""Train and test an image captioner: a frozen encoder and an LSTM, with or without attention.

    # train on Flickr8k (see download_datasets.py), with the defaults of the original
    python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k --decoder lstm

    # attention, without a network: an encoder that pip has installed already
    python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k --decoder attention \\
        --encoder efficientnet_lite0 --save_attention_viz

    # go on for five epochs, in a new run directory; then score the test images
    python flickr_image_caption_with_pytorch_resnet_lstm.py --model_path saved_models/flickr8k/... --epochs 5
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode test --model_path saved_models/flickr8k/...

    # caption your own photos; the same on a page in the browser
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode caption --model_path saved_models/... --images *.jpg
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode serve --model_path saved_models/...

The way of the data: flags -> images, captions, split -> vocabulary -> features, once per image -> batches
-> decoder -> loss -> checkpoint -> beam search -> captions -> scores and pictures.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from captioning.flags import ENCODER_NAMES, MODES_OF, RESUME_FLAGS, SCHEDULERS, check_flags, number
from captioning.io import (
    UserError,
    bars_off,
    format_bytes,
    log,
    make_directory,
    not_installed,
    publish_copy,
    read_json,
    require_free_space,
    run_command,
    write_atomic,
    write_json,
)
from captioning.runs import find_checkpoint, lock_run_directory, reproducing_command
from experiment_utils import config_flags, create_run_directory, write_run_config, write_summary, write_training_log

# --------------------------------------------------------------------------------------------------
# Flags


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help explains them all",  # a mistyped flag's message is not buried
        description="Train and test an image captioner on Flickr8k, Flickr30k or your own photos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, positive = number(int, 1), number(float, 0, above=True)
    add = parser.add_argument_group("what to do").add_argument
    add("--mode", choices=("train", "test", "tune", "caption", "serve", "export"), default="train",
        help="train a decoder; score a trained one; find its best beam size and length penalty on the validation images; "
        "caption images with it; open a page in the browser that does; or write it as a folder to share")  # fmt: skip
    add("--model_path", type=Path, nargs="+",
        help="checkpoint, run directory, folder of runs or exported folder: to test (several are an ensemble), or to go "
        "on training from")  # fmt: skip
    add("--predictions", type=Path, help="--mode test: score the captions in this file (COCO results or CSV) instead")
    add("--output", type=Path, help="--mode export: folder; --mode caption: a new .csv or .jsonl, instead of printing")
    add("--onnx", action="store_true", help="--mode export: encoder and decoder as ONNX too (requirements-export.txt)")
    add("--resume", type=Path, metavar="RUN_DIR", help="go on with an interrupted run in its own directory")
    add("--config", type=Path, help="YAML or JSON file of flags, e.g. a run's run_config.json; the command line wins")
    add("--dry_run", action="store_true", help="go through everything on a handful of images in seconds")

    add = parser.add_argument_group("basic").add_argument
    add("--dataset_type", choices=("flickr8k", "flickr30k", "coco", "custom", "demo"), default="flickr30k",
        help="custom is your own folder, demo the drawn set of download_datasets.py")  # fmt: skip
    add("--decoder", choices=("lstm", "attention"), default="lstm", help="attention is better and can be looked at")
    add("--epochs", type=number(int, 0), default=10, help="epochs to train; with --model_path, epochs more")
    add("--batch_size", type=count, default=128, help="captions in a batch (whole images; fewer if memory runs out)")
    add("--learning_rate", type=positive, default=0.0001,
        help="initial rate; the peak for one_cycle. 1e-3 suits Flickr8k")  # fmt: skip

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", type=Path, help="data set folder (default: data/<dataset_type>)")
    add("--image_dir", type=Path, help="folder of the images, where it is not found by itself")
    add("--captions_file", type=Path, help="captions file, where it is not found by itself")
    add("--freq_threshold", type=count, default=3, help="a word seen less often in training becomes <UNK>")
    add("--max_length", type=count, default=40, help="words at most in a caption, read or written")
    add("--num_workers", type=number(int, 0), default=16, help="threads that decode images; capped at the cores")
    add("--views", choices=("whole", "mirror", "all"), default="whole",
        help="of each image: one is drawn for each training step, all are averaged in testing; each is encoded once")  # fmt: skip
    add("--feature_cache", default="feature_cache", help="folder of encoded images; 'off' encodes them in every batch")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=ENCODER_NAMES, default="resnet50",
        help="frozen network that sees; efficientnet_lite0 needs no download; _stages: what its earlier stages see too, for a larger cache")  # fmt: skip
    add("--resnet_weights", help="file of the encoder's weights, or 'random'; by default looked for, then downloaded")
    add("--embed_size", type=count, default=512, help="size of word and image embeddings")
    add("--hidden_size", type=count, default=1024, help="LSTM size; 512 with one layer suits Flickr8k and a laptop")
    add("--num_layers", type=count, default=3, help="LSTM layers")
    add("--attention_dim", type=count, default=512, help="size of queries and keys (attention decoder)")
    add("--drop_prob", type=number(float, 0, 0.95), default=0.3, help="dropout; more for small data sets")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=number(int, 0), default=0, help="of the split that is drawn, weights, order and dropout")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where the networks run")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the products in training; auto is bf16 where the device is made for it, else fp32")  # fmt: skip
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="compile the encoder for its pass over the images; auto does where they are many enough to pay")  # fmt: skip
    add("--features_on_device", choices=("auto", "on", "off"), default="auto",
        help="keep all image features in the GPU's memory; auto does if they take at most half of what is free")  # fmt: skip
    add("--grad_clip", type=number(float, 0), default=5.0, help="largest gradient norm; 0 does not clip")
    add("--weight_decay", type=number(float, 0), default=0.01, help="of AdamW")
    add("--label_smoothing", type=number(float, 0, 0.9), default=0.0, help="of the training loss; 0.1 helps long runs")
    add("--attention_reg", type=number(float, 0), default=0.0,
        help="weight of Show-Attend-and-Tell's term that has every region looked at once (attention decoder)")  # fmt: skip
    add("--best_metric", choices=("cider", "bleu4", "val_loss"), default="cider",
        help="what picks best.pt: CIDEr goes on rising after the loss has turned")  # fmt: skip
    add("--early_stopping", type=number(int, 0), default=0,
        help="stop after so many epochs without a new best; 0 never")  # fmt: skip

    add = parser.add_argument_group("self-critical training").add_argument
    add("--scst_epochs", type=number(int, 0), default=0,
        help="epochs of it after the others: sampled captions, rewarded by CIDEr-D; --epochs 0 --model_path X adds only these")  # fmt: skip
    add("--scst_learning_rate", type=positive, default=2e-4,
        help="its learning rate at first; it falls to zero over its epochs, by half a cosine")  # fmt: skip
    add("--scst_samples", type=number(int, 2), default=5, help="captions drawn of each image")
    add("--scst_ce_weight", type=number(float, 0), default=0.05,
        help="weight of the cross-entropy of people's captions in its loss")  # fmt: skip

    add = parser.add_argument_group("learning rate scheduling").add_argument
    add("--use_scheduler", action="store_true", help="let the learning rate follow a schedule")
    add("--scheduler_type", choices=SCHEDULERS, default="reduce_lr_on_plateau", help="which one")
    add("--scheduler_patience", type=number(int, 0), default=3, help="reduce_lr_on_plateau: epochs without improvement")
    add("--scheduler_factor", type=number(float, 0, 0.999, above=True), default=0.5,
        help="reduce_lr_on_plateau: factor")  # fmt: skip
    add("--scheduler_step_size", type=count, default=7, help="step: epochs between two drops")
    add("--scheduler_gamma", type=number(float, 0, 1, above=True), default=0.1,
        help="step: factor of a drop; exponential: factor of an epoch (not typed: a tenth over the whole run)")  # fmt: skip
    add("--scheduler_t_max", type=count, default=10, help="cosine: epochs from the top to min_lr, where it stays")
    add("--min_lr", type=number(float, 0), default=1e-7, help="no schedule goes below it")
    add("--warmup_epochs", type=number(int, 0), default=0, help="one_cycle: epochs of its rising part")

    add = parser.add_argument_group("decoding").add_argument
    add("--beam_size", type=count, default=3,
        help="hypotheses kept in testing, beside greedy decoding (not typed: what --mode tune found, if it did)")  # fmt: skip
    add("--length_penalty", type=number(float, 0), default=0.7,
        help="exponent of the length; more makes captions longer")  # fmt: skip
    add("--consensus", choices=("off", "beam", "regression"), default="off",
        help="--mode test: choose among the beam's captions that which agrees best with them all, or also with what a "
        "regression on the training captions expects of the image; with a wide beam, 20 if not typed")  # fmt: skip
    add("--spice", action="store_true", help="SPICE too (Java; downloads CoreNLP; minutes)")
    add("--split", choices=("test", "val", "val+test"), default="test", help="which images --mode test scores")

    add = parser.add_argument_group("captioning and the page").add_argument
    add("--images", nargs="+", metavar="IMAGE", help="files, folders, patterns; - for a list of them on standard input")
    add("--num_captions", type=count, default=1, help="different captions of each image, best first")
    add("--top_p", type=number(float, 0, 1, above=True),
        help="draw them from the likeliest words of this probability together, e.g. 0.9: more varied than the beam's")  # fmt: skip
    add("--json", action="store_true", help="print JSON lines, which say more, instead of path<TAB>caption")
    add("--host", default="127.0.0.1", help="address that the page listens on; 0.0.0.0 lets the whole network in")
    add("--port", type=number(int, 1, 65535), help="and its port (default: the first free one from 7860 on)")

    add = parser.add_argument_group("attention visualization").add_argument
    add("--save_attention_viz", action="store_true", help="save attention pictures (attention decoder)")
    add("--attention_viz_samples", type=count, default=3, help="how many test images to draw")
    add("--attention_viz_images", nargs="+", metavar="NAME", help="draw these images of the data set, e.g. dog.jpg")
    add("--advanced_attention_viz", action="store_true", help="also the picture with several views")
    add("--attention_viz_format", choices=("png", "svg", "pdf"), default="png", help="svg and pdf are for papers")
    add("--attention_viz_dpi", type=number(int, 50, 600), default=120,
        help="dots per inch of a png, and of the photos in an svg or pdf")  # fmt: skip

    add = parser.add_argument_group("output").add_argument
    add("--checkpoint_minutes", type=positive, default=10, help="minutes between two saves of last.pt within an epoch")
    add("--model_save_dir", type=Path, default=Path("saved_models"), help="where run directories are made")
    add("--keep_checkpoints", type=number(int, 0), default=0, help="keep the newest N epochs (and best, last); 0 all")
    add("--tensorboard", action="store_true", help="log curves, captions and attention for TensorBoard, every epoch")
    add("--quiet", action="store_true", help="say only warnings and what came out in the end")
    add("--verbose", action="store_true", help="say also where the time of each epoch goes")
    return parser


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """Flags with their values, and the names of those that were typed on the command line."""
    parser = get_parser()
    typed_only = get_parser()
    for action in typed_only._actions:
        action.default = argparse.SUPPRESS
    typed = set(vars(typed_only.parse_args(argv)))
    args = parser.parse_args(argv)
    config = args.config
    if args.resume is not None:
        fixed = typed - set(RESUME_FLAGS)
        if fixed:
            parser.error(
                f"--{fixed.pop()} has no effect with --resume: an interrupted run goes on as it was begun. "
                f"To train longer or otherwise: --model_path {args.resume} --epochs N"
            )
        config = args.resume / "run_config.json"
        if not config.is_file():
            raise UserError(f"--resume {args.resume} is no run directory: give the one that the interrupted run named")
    if config is not None:
        parser.set_defaults(**config_flags(parser, config))
    args = parser.parse_args(argv)
    if args.quiet and args.verbose:  # what is typed wins over --config and the run that is resumed
        args.quiet, args.verbose = "quiet" in typed, "verbose" in typed
    check_flags(args, typed, parser)
    return args, typed


# --help and a mistyped flag are answered before torch's seconds of importing, under torchrun by a machine's first process.
if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") == "0":
    try:
        parse_flags(sys.argv[1:])
        if not importlib.util.find_spec("torch"):
            raise not_installed("torch")
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)

import numpy as np
import torch
from tqdm import tqdm

from captioning import demo_set as pointing_game
from captioning import distributed, plots
from captioning.batches import BatchMaker
from captioning.checkpoints import (
    apply_checkpoint,
    carry_best,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    require_trainable,
    save_checkpoint,
)
from captioning.consensus import BEAM_SIZE, Consensus, regression_images
from captioning.dataset import CaptionSet, Vocabulary, build_vocabulary, dump_split, load_caption_set, saved_split_of
from captioning.decoders import LSTMDecoder, build_decoder
from captioning.distributed import pick_device
from captioning.encoders import ENCODERS, build_encoder, find_weights
from captioning.evaluation import Task, caption, captions_of_images, images_to_draw
from captioning.features import Features, cache_folders, open_features
from captioning.images import VIEW_SETS
from captioning.modes.test import (
    print_scores,
    read_predictions,
    save_attention_pictures,
    save_gallery,
    save_references,
    save_test,
    score_test,
    ways_to_decode,
)
from captioning.modes.tune import tune
from captioning.reports import write_report
from captioning.scst import SelfCritic
from metrics_utils import score_captions
from training_utils import (
    Precision,
    Schedule,
    StepLoss,
    Stopped,
    StopRequest,
    Stopwatch,
    advise_on_memory,
    choose_schedule,
    cosine,
    report_bad_batch,
    require_tensorboard,
    seed_step,
    shared_out,
    take_share,
    validation_loss,
    write_tensorboard,
)


@dataclasses.dataclass
class Training(Task):
    """And what training has on top: everything that a checkpoint brings back."""

    decoder: LSTMDecoder
    views: list[Features]  # of the images
    batches: BatchMaker
    step_loss: torch.nn.Module  # a StepLoss, of several processes with their gradients meaned
    optimizer: torch.optim.Optimizer
    precision: Precision
    schedule: Schedule | None
    directory: Path
    weights_hash: str  # of the encoder
    flags: dict[str, Any]  # as run_config.json has them
    first_epoch: int  # epochs that were trained before this run
    epoch: int  # finished epochs
    step: int  # finished steps of the epoch in hand
    steps: int  # of an epoch
    loss_sum: torch.Tensor  # over this process's tokens of these steps, on the device, float64 where it has that
    reward_sum: float  # of self-critical training: the samples' mean CIDEr-D, summed over steps
    tokens: int
    curve: dict[str, list[Any]]
    history: list[dict[str, Any]]
    best: dict[str, Any]
    lock: Any = None  # on the run directory, held as long as this object lives
    clock: Stopwatch = dataclasses.field(default_factory=Stopwatch)

    def save(self, path: Path) -> None:
        """Write a checkpoint: whoever has it can go on from this very step, or caption. All processes come here."""
        (loss_sum,) = distributed.total(float(self.loss_sum))
        if not distributed.is_first():
            return
        save_checkpoint(
            path,
            {
                "epoch": self.epoch, "decoder_type": self.args.decoder, "decoder": self.decoder.state_dict(),
                "encoder": {"name": self.args.encoder, "weights_hash": self.weights_hash, "transform": ENCODERS[self.args.encoder].transform},
                "optimizer": self.optimizer.state_dict(), "scaler": self.precision.scaler.state_dict(),
                "schedule": self.schedule.state() if self.schedule else None,
                "vocabulary": self.vocabulary.words, "flags": self.flags, "split": saved_split_of(self.data),
                "progress": {"first_epoch": self.first_epoch, "step": self.step, "loss_sum": loss_sum,
                             "reward_sum": self.reward_sum, "tokens": self.tokens},
                "decoding": None,
                "loss_curve": self.curve, "metrics_history": self.history, "best": self.best,
            },
        )  # fmt: skip

    @property
    def last_epoch(self) -> int:
        return self.first_epoch + int(self.args.epochs + self.args.scst_epochs)

    @property
    def self_critical(self) -> bool:
        """Whether the epoch in hand is one of self-critical training, which come last."""
        return self.epoch >= self.first_epoch + int(self.args.epochs)

    def rate(self) -> float:
        """The learning rate of the step in hand."""
        if self.self_critical:  # down to nothing: its last steps settle what its first ones found
            done = self.epoch - self.first_epoch - self.args.epochs + self.step / self.steps
            return cosine(self.args.scst_learning_rate, 0.0, min(1.0, done / self.args.scst_epochs))
        return self.schedule.rate(self.epoch, self.step) if self.schedule else float(self.args.learning_rate)

    def stopped_early(self) -> bool:
        patience = self.args.early_stopping
        return bool(patience) and self.epoch - max(self.best["epoch"], self.first_epoch) >= patience


# --------------------------------------------------------------------------------------------------
# Building


def build_data(args: argparse.Namespace, saved_split: dict[str, Any] | None) -> CaptionSet:
    """Read images and captions, and say what was found."""
    data_dir = args.data_dir
    if data_dir is None and not (args.image_dir and args.captions_file):
        data_dir = Path("data") / args.dataset_type
    cache = next(iter(cache_folders(args.feature_cache)), None)
    data = load_caption_set(data_dir, args.image_dir, args.captions_file, args.seed, saved_split, cache)
    if args.dry_run:
        data.splits = {split: images[:n] for (split, images), n in zip(data.splits.items(), (8, 4, 4), strict=True)}
    sizes = ", ".join(f"{split} {len(images)}" for split, images in data.splits.items())
    log.info(f"Data: {len(data.names)} images and {data.first_caption[-1]} captions in {data.captions_file}")
    log.info(f"Split by image: {sizes} (from {data.split_source})")
    for note in data.notes:
        log.warning(f"Note: {note}")
    distributed.agree_on_data(data)
    return data


def build_features(
    args: argparse.Namespace,
    data: CaptionSet,
    needed: np.ndarray,
    means: bool,
    views: str,
    weights_hash: str | None = None,
) -> tuple[list[Features], str]:
    """Features of the images at the positions `needed`, in each of the views, and the hash of the encoder's weights.

    Args:
        means: of the whole image, which the `lstm` decoder sees, rather than of its regions.

    Raises:
        UserError: the weights are not those that a checkpoint was trained with.
    """
    weights, digest = find_weights(args.encoder, args.resnet_weights, weights_hash)
    distributed.agree_on_encoder(digest)
    found = [
        open_features(
            cache_folders(args.feature_cache), ENCODERS[args.encoder], digest,
            lambda: build_encoder(args.encoder, weights), data.paths(), data.image_dir, needed, pick_device(args.device),
            means, decoding_threads(args.num_workers), args.compile, args.features_on_device, view,
        )
        for view in VIEW_SETS[views]
    ]  # fmt: skip
    data.drop_images({image for view in found for image in view.unreadable})
    return found, digest


@functools.cache  # says it once
def decoding_threads(wanted: int) -> int:
    """How many threads decode images: no more than cores."""
    cores = distributed.local_cores()
    if wanted > cores:
        log.info(f"Image decoding threads: {cores} (--num_workers {wanted}, capped at the cores)")
    return min(wanted or 1, cores)


def build_model(args: argparse.Namespace, vocabulary: Vocabulary) -> LSTMDecoder:
    torch.manual_seed(args.seed)
    spec = ENCODERS[args.encoder]
    return build_decoder(vars(args), len(vocabulary), spec.channels, spec.regions)


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def train_one_epoch(run: Training, stop: StopRequest) -> float:
    """The rest of an epoch over the training images in an order of (seed, epoch); returns the loss per token.

    Raises:
        Stopped: a signal asked for it; `last.pt` is written.
        UserError: too many batches gave a loss or gradient that is not a finite number.
    """
    args, device = run.args, run.device
    run.decoder.train()
    order = np.random.default_rng([args.seed, run.epoch]).permutation(run.data.splits["train"])
    plan = run.batches.plan(order, args.batch_size)
    saved = looked = time.monotonic()
    interval = 100  # steps between two looks of a GPU's processes
    fine: list[torch.Tensor] = []  # for the steps since the last look, which makes the device wait
    bad = 0
    bar = tqdm(plan, f"Epoch {run.epoch + 1}", initial=run.step, unit="batch", disable=bars_off(), leave=False)
    for captions in plan[run.step :]:
        seed_step(args.seed, run.epoch, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = run.rate()
        share = take_share(run.batches, captions, len(run.views), [args.seed, run.epoch, run.step])
        run.clock.lap("making batches")
        loss, part, reward = run.step_loss(share, run.views, device, run.self_critical)
        run.clock.lap("features and forward")
        token_loss = part.to(run.loss_sum.dtype) * share.tokens
        norm = run.precision.step(loss, run.optimizer, args.grad_clip)
        finite = token_loss.isfinite() & (norm.isfinite() | run.precision.scaler.is_enabled())  # fp16 may overflow
        fine.append(finite)
        run.loss_sum += torch.where(finite, token_loss, 0.0)
        run.reward_sum += reward
        run.tokens += share.tokens
        run.step += 1
        bar.update()
        asked, due = float(stop.signal or 0), time.monotonic() - saved > 60 * args.checkpoint_minutes
        alone = distributed.size() == 1  # several processes look, and act on what they see, together
        if device.type == "cpu" or len(fine) >= interval or run.step == len(plan) or (alone and (asked or due)):
            pace, looked = (time.monotonic() - looked) / len(fine), time.monotonic()
            asked, due, pace, *wrong = distributed.largest(asked, due, pace, *(~torch.stack(fine)).tolist())
            interval = min(100, max(1, int(5 / pace)))  # torchrun kills half a minute after a signal
            looked_at = range(run.step - len(fine), run.step)
            for number in (n for n, failed in zip(looked_at, wrong, strict=True) if failed):
                bad += 1
                skipped = run.batches.make(plan[number])
                run.tokens -= len(skipped.targets)
                names = ", ".join(run.data.names[image] for image in skipped.images[:3])
                where = f"batch {number + 1} of epoch {run.epoch + 1} ({names}, ...)"
                report_bad_batch(where, bad, run.directory, args)
            fine.clear()
            if asked or due:
                run.save(run.directory / "last.pt")
                saved = time.monotonic()
            if asked:
                raise Stopped(signal.Signals(int(asked)), run.directory)
        run.clock.lap("backward and update")
    (loss_sum,) = distributed.total(float(run.loss_sum))
    return loss_sum / max(1, run.tokens)


def start_training(args: argparse.Namespace, typed: set[str], argv: list[str]) -> Training:
    """Build everything, from nothing, from `--model_path` (a new run) or from `--resume` (the same run)."""
    checkpoint, path = None, None
    if args.resume is not None:
        path = args.resume / "last.pt"
        lock = lock_run_directory(args.resume) if distributed.is_first() else None
        if not path.is_file():
            command = read_json(args.resume / "run_config.json").get("command", "its command")
            raise UserError(f"{path} is not there: nothing of this run was saved yet. Start it again: {command}")
        checkpoint = load_checkpoint(path)
    elif args.model_path is not None:
        path = find_checkpoint(args.model_path[0])
        checkpoint = load_checkpoint(path)
        require_trainable(checkpoint, path)
    if checkpoint and path:
        apply_checkpoint(args, typed, checkpoint, path)
    if args.dry_run:
        args.epochs, args.scst_epochs = min(args.epochs, 1), min(args.scst_epochs, 1)
        args.warmup_epochs = 0
    device = pick_device(args.device)
    precision = Precision(args.precision, device)
    args.precision = precision.name
    log.info(f"Device: {device}, matrix products of training in {precision.name}")
    distributed.agree_on_flags(vars(args), checkpoint)
    data = build_data(args, checkpoint["split"] if checkpoint else None)
    needed = np.unique(np.concatenate([*data.splits.values(), images_to_draw(args, data, data.splits["test"])]))
    known_hash = checkpoint["encoder"]["weights_hash"] if checkpoint else None
    views, weights_hash = build_features(args, data, needed, args.decoder == "lstm", args.views, known_hash)
    vocabulary = Vocabulary(checkpoint["vocabulary"]) if checkpoint else build_vocabulary(data, args.freq_threshold)
    batches = BatchMaker(data, vocabulary, args.max_length)
    decoder = build_model(args, vocabulary)
    if checkpoint and path:
        load_weights(decoder, checkpoint["decoder"], path)
    else:
        decoder.set_word_frequencies(batches.word_counts(data.splits["train"]))
    decoder.to(device)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    log.info(f"Vocabulary: {len(vocabulary)} words. Decoder: {args.decoder}, {parameters:,} parameters")
    critic = SelfCritic(data, vocabulary, args.scst_samples, args.max_length) if args.scst_epochs else None
    step_loss = shared_out(StepLoss(decoder, critic, args, precision))
    run = Training(
        args, device, data, vocabulary, [(decoder, views[0])], decoder, views, batches, step_loss, optimizer, precision, None,
        Path(), weights_hash, {}, 0, 0, 0, len(batches.plan(data.splits["train"], args.batch_size)),
        torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64), 0.0, 0,
        {"epochs": [], "training_losses": [], "validation_losses": [], "learning_rates": []}, [],
        {"score": -math.inf, "epoch": 0, "metric": args.best_metric},
    )  # fmt: skip
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = args.learning_rate, args.weight_decay
        if precision.scaler.is_enabled():
            precision.scaler.load_state_dict(checkpoint["scaler"])
        run.epoch = run.first_epoch = checkpoint["epoch"]
        run.curve, run.history = checkpoint["loss_curve"], checkpoint["metrics_history"]
    if args.resume is not None and checkpoint:
        progress = checkpoint["progress"]
        run.first_epoch, run.step, run.tokens = progress["first_epoch"], progress["step"], progress["tokens"]
        run.loss_sum += progress["loss_sum"] if distributed.is_first() else 0.0
        run.reward_sum = progress["reward_sum"]
        run.schedule = Schedule.from_state(checkpoint["schedule"]) if checkpoint["schedule"] else None
        run.best, run.flags, run.directory = checkpoint["best"], checkpoint["flags"], args.resume
        log.info(f"Resuming {run.directory} after {run.epoch} epochs and {run.step} steps")
    else:
        if args.epochs:
            run.schedule = choose_schedule(args, typed, checkpoint, run.steps)
        elif checkpoint and checkpoint["schedule"]:  # self-critical epochs alone: it is kept for who trains on
            run.schedule = Schedule.from_state(checkpoint["schedule"])
        family = ENCODERS[args.encoder].family
        run.directory = distributed.from_first(lambda: create_run_directory(args.model_save_dir, vars(args), family))
        lock = lock_run_directory(run.directory) if distributed.is_first() else None
        run.flags = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
            if "train" in MODES_OF.get(name, ("train",))
        }
        run.flags["model_path"] = str(path) if path else None
        if checkpoint and path and checkpoint["best"]["metric"] == args.best_metric:
            carried: dict[str, Any] | None = distributed.from_first(lambda: carry_best(checkpoint, path, run.directory))
            run.best = carried or run.best
        if distributed.is_first():
            write_run_config(run.directory, run.flags, reproducing_command(argv))
            write_atomic(run.directory / "split.json", lambda file: file.write(dump_split(data).encode()))
            distributed.remember_launch(run.directory)
    run.lock = lock
    left = run.last_epoch - run.epoch
    files = min(left, args.keep_checkpoints + 1) if args.keep_checkpoints else left
    space = (files + 2) * 3 * 4 * parameters + 20_000_000  # weights and Adam's two moments, last.pt twice; pictures
    free = distributed.from_first(lambda: require_free_space(run.directory, space, "this run"))
    log.info(f"Run directory: {run.directory} (will take up to {format_bytes(space)}; {format_bytes(free)} are free)")
    if args.resume is None:
        run.save(run.directory / "last.pt")  # from here on the run can be resumed
    distributed.agree_on_directory(run.directory, "last.pt")
    return run


def finish_epoch(run: Training, training: float) -> None:
    """Score the epoch, save its checkpoint and say how it went."""
    steps, run.step, self_critical = run.step, 0, run.self_critical
    rate = run.rate()
    images = run.data.splits["val"]
    validation = validation_loss(run.decoder, run.views[0], run.batches, images, run.args.batch_size, run.device)
    run.clock.lap("validation loss")
    captions = captions_of_images(run, images, 1)
    scores = distributed.from_first(lambda: score_captions(captions, [run.data.references(image) for image in images]))
    run.clock.lap("validation captions and scores")
    if self_critical:
        scores["reward"] = run.reward_sum / max(1, steps)
    elif run.schedule is not None:
        run.schedule.epoch_ended(validation)
    run.epoch, run.tokens, run.reward_sum = run.epoch + 1, 0, 0.0
    run.loss_sum.zero_()
    for key, value in zip(run.curve, (run.epoch, training, validation, rate), strict=True):
        run.curve[key].append(value)
    run.history.append({"epoch": run.epoch, "split": "val", "beam_size": 1, "images": len(images), **scores})
    metric = run.args.best_metric
    score = -validation if metric == "val_loss" else scores[metric]
    if score > run.best["score"]:
        run.best = {"score": score, "epoch": run.epoch, "metric": metric}
    run.save(run.directory / f"model_epoch_{run.epoch}.pt")
    run.clock.lap("saving")
    publish_epoch(run)
    log.info(f"\nEpoch {run.epoch} completed ({run.epoch}/{run.last_epoch}):")
    log.info(f"  Training Loss: {training:.5f}")
    log.info(f"  Validation Loss: {validation:.5f}")
    log.info(f"  Learning Rate: {rate:.6f}" if rate >= 1e-4 else f"  Learning Rate: {rate:.3e}")
    if self_critical:
        log.info(f"  Self-critical: mean reward of the samples {100 * scores['reward']:.1f} CIDEr-D")
    else:
        log.info(f"  Scheduler: {run.schedule.describe() if run.schedule else 'none'}")
    shown = (("cider", "CIDEr"), ("bleu4", "BLEU-4"), ("rouge", "ROUGE F1"), ("wer", "WER"))
    log.info("  Greedy captions: " + ", ".join(f"{name} {100 * scores[key]:.1f}" for key, name in shown))
    log.info(f"  Model checkpoint saved (best: {run.best['epoch'] == run.epoch})")
    log.debug(f"  Time: {run.clock.report()}")


def publish_epoch(run: Training) -> None:
    """What follows from a finished epoch's checkpoint; done again on resuming, if a crash came in between."""
    spoken = []
    if run.args.tensorboard:
        chosen = np.random.default_rng(run.args.seed).permutation(run.data.splits["val"])[:4]
        spoken = [(int(image), run.vocabulary.decode(found.ids), found.attention)
                  for image, found in zip(chosen, caption(run, chosen, 1, attention=True), strict=True)]  # fmt: skip
    if not distributed.is_first():
        return
    saved = run.directory / f"model_epoch_{run.epoch}.pt"
    if saved.is_file():
        if run.best["epoch"] == run.epoch:
            publish_copy(saved, run.directory / "best.pt")
        publish_copy(saved, run.directory / "last.pt")
    prune_checkpoints(run.directory, run.args.keep_checkpoints)
    write_json(run.directory / "loss_curve.json", run.curve)
    write_json(run.directory / "metrics_history.json", run.history)
    write_training_log(run.directory, run.curve, run.history)
    if run.clock.share("drawing") < 0.05:  # short epochs do not wait for pictures that the next one replaces
        plots.draw_curves(run.directory, run.curve, run.history, run.best["epoch"])
        run.clock.lap("drawing")
    if run.args.tensorboard:
        write_tensorboard(run.directory, run.curve, run.history, run.data, spoken)
        run.clock.lap("TensorBoard")


def train(args: argparse.Namespace, typed: set[str], argv: list[str]) -> Path:
    """Train from nothing or from a checkpoint; returns the run directory."""
    started = time.time()
    if args.tensorboard:
        require_tensorboard()
    run = start_training(args, typed, argv)
    log.debug(f"Reading data, encoding images and building the model: {time.time() - started:.1f} s")
    if args.resume is not None and run.step == 0 and run.curve["epochs"]:
        publish_epoch(run)
    with StopRequest() as stop:
        while run.epoch < run.last_epoch and not run.stopped_early():
            try:
                finish_epoch(run, train_one_epoch(run, stop))
            except torch.OutOfMemoryError as error:
                raise UserError(advise_on_memory(run.device, args, run.directory, run.views)) from error
            (asked,) = distributed.largest(stop.signal or 0)
            if asked:
                raise Stopped(signal.Signals(int(asked)), run.directory)
    if run.stopped_early():
        log.info(f"Stopped early: no better {args.best_metric} in {args.early_stopping} epochs")
    distributed.wait_for_all()  # until the first has written all
    best_path = run.directory / "best.pt"
    load_weights(run.decoder, load_checkpoint(best_path)["decoder"], best_path)
    if args.save_attention_viz:
        save_attention_pictures(run, images_to_draw(args, run.data, run.data.splits["test"]), run.directory)
    if distributed.is_first():
        sum_up(run, argv, (time.time() - started) / 60)
    return run.directory


def sum_up(run: Training, argv: list[str], minutes: float) -> None:
    """The files that a finished run ends with, and where to go from here."""
    plots.draw_curves(run.directory, run.curve, run.history, run.best["epoch"])
    facts = {
        "Images": ", ".join(f"{split} {len(images)}" for split, images in run.data.splits.items()),
        "Split": run.data.split_source,
        "Vocabulary": len(run.vocabulary),
        "Best Epoch": f"{run.best['epoch']} (validation {run.args.best_metric} {abs(run.best['score']):.4f})",
        "Minutes": f"{minutes:.1f}" + (" since it was resumed" if run.args.resume else ""),
        **({"Processes": distributed.size()} if distributed.size() > 1 else {}),
        **({"Peak GPU Memory": format_bytes(torch.cuda.max_memory_allocated())} if run.device.type == "cuda" else {}),
        **({"Resumed From": run.flags["model_path"]} if run.flags.get("model_path") else {}),
    }
    command = read_json(run.directory / "run_config.json").get("command", reproducing_command(argv))
    write_summary(run.directory, run.flags, command, facts)
    print(f"\nBest epoch: {run.best['epoch']} by {run.args.best_metric}. Everything is in {run.directory}")
    print(f"Report: {write_report(run.directory, run.data)}")
    test_command = reproducing_command(["--mode", "test", "--model_path", str(run.directory)])
    print(f"Score it on the test images: {test_command}")


def load_task(args: argparse.Namespace, typed: set[str], splits: list[str]) -> tuple[Task, np.ndarray, dict[Path, Any]]:
    """Load the checkpoints that `--model_path` names, with what they look at.

    Returns:
        the task, the positions of the splits' images, and the checkpoints by their paths.

    Raises:
        UserError: they do not belong together, or their data set is not there.
    """
    as_typed, device = copy.copy(args), pick_device(args.device)
    regression = args.mode == "test" and args.consensus == "regression"
    distributed.agree_on_flags(vars(args))
    checkpoints: dict[Path, dict[str, Any]] = {}
    for path in map(find_checkpoint, args.model_path):
        checkpoint = load_checkpoint(path)
        own = copy.copy(as_typed)
        apply_checkpoint(own, typed, checkpoint, path)
        if not checkpoints:
            first, first_path = checkpoint, path
            vars(args).update(vars(own))
            task = Task(args, device, build_data(args, first["split"]), Vocabulary(first["vocabulary"]), [])
        for what in ("vocabulary", "split"):
            if checkpoint[what] != first[what]:
                raise UserError(
                    f"{path} has another {what} than {first_path}: an ensemble is trained on the same data set"
                )
        log.info(f"Model: {path} (epoch {checkpoint['epoch']}, {own.decoder} on {own.encoder}, {own.dataset_type})")
        images = np.concatenate([task.data.splits[split] for split in splits])
        needed = np.union1d(images, images_to_draw(args, task.data, images))
        if regression:  # whose weight is settled on these
            needed = np.union1d(needed, task.data.splits["val"])
        means, weights_hash = own.decoder == "lstm", checkpoint["encoder"]["weights_hash"]
        views, _ = build_features(own, task.data, needed, means, own.views, weights_hash)
        decoder = build_model(own, task.vocabulary)
        load_weights(decoder, checkpoint["decoder"], path)
        task.members += [(decoder.to(device), view) for view in views]
        checkpoints[path] = checkpoint
    if args.mode == "test" and args.consensus != "off":
        args.beam_size = args.beam_size if "beam_size" in typed else BEAM_SIZE
        looks: list[Features] = []
        if regression:
            shown = np.union1d(regression_images(task.data.splits["train"]), needed)
            looks, _ = build_features(args, task.data, shown, True, args.views, first["encoder"]["weights_hash"])
        task.consensus = Consensus(task.data, task.vocabulary, looks)
    return task, np.concatenate([task.data.splits[split] for split in splits]), checkpoints


def test(args: argparse.Namespace, typed: set[str]) -> None:
    """Score checkpoints on the test images, greedily and with a beam, and draw what they looked at."""
    task, images, checkpoints = load_task(args, typed, args.split.split("+"))
    data, (path, *others) = task.data, checkpoints
    directory = make_directory(path.parent, "what the test finds")
    pointing = args.dataset_type == "demo" and args.decoder == "attention"  # there we know where things are
    columns: list[tuple[str, dict[str, Any]]] = []
    for way, about, found in ways_to_decode(task, images, attention=pointing):
        if not distributed.is_first():
            continue
        captions = [task.text(each) for each in found]
        scores, each = score_test(data, images, captions, args.spice)
        if pointing:
            names, words = [data.names[image] for image in images], [text.split() for text in captions]
            scores |= pointing_game.play(data.captions_file, names, words, [one.attention for one in found])
        header = {
            "checkpoint": " + ".join([path.name, *map(str, others)]), "epoch": checkpoints[path]["epoch"],
            "dataset": args.dataset_type, "split": args.split, "views": args.views, "images": len(images),
            **about, "tokenizer": "spacy.blank('en'), lower case, without punctuation",
        }  # fmt: skip
        captions_file = save_test(directory, header, data, images, captions, scores, each)
        columns.append((way, scores))
    if args.save_attention_viz:
        save_attention_pictures(task, images_to_draw(args, data, images), directory)
    if not distributed.is_first():
        return
    print_scores(columns, [data.references(image) for image in images], args.split)
    if "pointing_game" in scores:
        print(f"  {pointing_game.describe(scores)}")
    save_references(directory, data, images, args.split)
    save_gallery(data, images, captions, each.cider, directory / "sample_captions.png")
    if (directory / "run_config.json").is_file():  # an exported folder and a lone checkpoint have no run to report
        print(f"Report: {write_report(directory, data)}")
    print(f"Scores: {directory / 'test_metrics.json'}. Captions: {directory / captions_file}")


def score_predictions(args: argparse.Namespace) -> None:
    """Score captions that any other program made of this data set's images."""
    data = build_data(args, None)
    images = np.concatenate([data.splits[split] for split in args.split.split("+")])
    scores, _ = score_test(data, images, read_predictions(args.predictions, data, images), args.spice)
    print_scores([(args.predictions.stem[:9], scores)], [data.references(image) for image in images], args.split)


def tune_decoding(args: argparse.Namespace, typed: set[str]) -> None:
    """Find the beam size and length penalty that suit a checkpoint, and keep them in it."""
    task, _, checkpoints = load_task(args, typed, ["val"])
    ((path, checkpoint),) = checkpoints.items()
    require_trainable(checkpoint, path)
    best = tune(task)
    if distributed.is_first():
        save_checkpoint(path, checkpoint | {"decoding": best})
    print(f"Best: --beam_size {best['beam_size']} --length_penalty {best['length_penalty']}, "
          f"CIDEr {100 * best['cider']:.2f}. Kept in {path}, which --mode test uses from now on")  # fmt: skip


def run(argv: list[str]) -> int:
    """What the flags ask for; returns the exit code."""
    args, typed = parse_flags(argv)
    log.setLevel(logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO)
    if args.mode == "caption":
        from captioning.modes.caption import caption_images

        return caption_images(args, typed)
    if args.mode == "serve":
        from captioning.modes.serve import serve_page

        return serve_page(args, typed)
    distributed.join()
    fresh_run = args.mode == "train" and args.resume is None
    interrupted = distributed.interrupted_run(args.model_save_dir) if fresh_run else None
    if interrupted is not None:  # torchrun has started everybody anew after one was lost
        log.warning(f"Going on with {interrupted}, which this torchrun began")
        argv = ["--resume", str(interrupted)]
        args, typed = parse_flags(argv)
    if args.predictions is not None:
        score_predictions(args)
    elif args.mode == "test":
        test(args, typed)
    elif args.mode == "tune":
        tune_decoding(args, typed)
    elif args.mode == "export":
        from captioning.modes import export as export_model

        path = find_checkpoint(args.model_path[0])
        export_model.export(load_checkpoint(path), path, args.output, args.onnx, args.resnet_weights)
    else:
        directory = train(args, typed, argv)
        if args.dry_run:
            log.info("\nDry run: testing what was trained")
            test(parse_flags(["--mode", "test", "--dry_run", "--model_path", str(directory)])[0], set())
    distributed.leave()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code (2 for a user's mistake, 130 or 143 after SIGINT or SIGTERM)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run_command(
            lambda: distributed.with_one_voice(lambda: run(argv)),
            "Stopped. What is saved stays: go on with --resume and the run directory named above, or, where none is, "
            "with the same command.",
        )
    except Stopped as stopped:
        command = reproducing_command(["--resume", str(stopped.directory)])
        if distributed.is_first():
            print(f"\nStopped. Go on where it stands: {command}", file=sys.stderr)
        return 128 + stopped.signal


if __name__ == "__main__":
    distributed.end(main())
