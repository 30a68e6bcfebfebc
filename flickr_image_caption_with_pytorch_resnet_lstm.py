"""Train and test an image captioner: a frozen encoder and an LSTM, with or without attention.

    # train on Flickr8k (see download_datasets.py), with the defaults of the original
    python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k --decoder lstm

    # attention, without a network: an encoder that pip has installed already
    python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k --decoder attention \\
        --encoder efficientnet_lite0 --save_attention_viz

    # go on for five epochs, in a new run directory; then score the test images
    python flickr_image_caption_with_pytorch_resnet_lstm.py --model_path saved_models/flickr8k/... --epochs 5
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode test --model_path saved_models/flickr8k/...

The way of the data: flags -> images, captions, split -> vocabulary -> features, once per image -> batches
-> decoder -> loss -> checkpoint -> beam search -> captions -> scores and pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from safe_io import UserError, format_bytes, publish_copy, read_json, require_free_space, write_atomic, write_json

SCHEDULERS = ("reduce_lr_on_plateau", "step", "cosine", "exponential", "one_cycle")
SCHEDULER_FLAGS = (
    "scheduler_type", "scheduler_patience", "scheduler_factor", "scheduler_step_size", "scheduler_gamma",
    "scheduler_t_max", "min_lr", "warmup_epochs",
)  # fmt: skip
# What a checkpoint decides; typing one of these with another value beside --model_path is an error.
ARCHITECTURE_FLAGS = (
    "decoder", "encoder", "dataset_type", "embed_size", "hidden_size", "num_layers", "attention_dim",
    "freq_threshold", "max_length",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Flags


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """An argparse type: a finite number within [low, high], or above `low` where `above` is set."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not math.isfinite(value) or value > high or (value <= low if above else value < low):
            bounds = f"{'above' if above else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]; --help explains them all",  # a mistyped flag's message is not buried
        description="Train and test an image captioner on Flickr8k, Flickr30k or your own photos.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, positive = number(int, 1), number(float, 0, above=True)
    add = parser.add_argument_group("what to do").add_argument
    add("--mode", choices=("train", "test"), default="train", help="train a decoder, or score a trained one")
    add(
        "--model_path",
        type=Path,
        help="checkpoint, run directory or folder of runs: to test, or to go on training from",
    )
    add("--config", type=Path, help="YAML or JSON file of flags, e.g. a run's run_config.json; the command line wins")
    add("--dry_run", action="store_true", help="go through everything on a handful of images in seconds")

    add = parser.add_argument_group("basic").add_argument
    add("--dataset_type", choices=("flickr8k", "flickr30k", "custom", "demo"), default="flickr30k",
        help="custom is your own folder, demo the drawn set of download_datasets.py")  # fmt: skip
    add("--decoder", choices=("lstm", "attention"), default="lstm", help="attention is better and can be looked at")
    add("--epochs", type=count, default=10, help="epochs to train; with --model_path, epochs more")
    add("--batch_size", type=count, default=128, help="captions in a batch (whole images; fewer if memory runs out)")
    add(
        "--learning_rate",
        type=positive,
        default=0.0001,
        help="initial rate; the peak for one_cycle. 1e-3 suits Flickr8k",
    )

    add = parser.add_argument_group("data").add_argument
    add("--data_dir", type=Path, help="data set folder (default: data/<dataset_type>)")
    add("--image_dir", type=Path, help="folder of the images, where it is not found by itself")
    add("--captions_file", type=Path, help="captions file, where it is not found by itself")
    add("--freq_threshold", type=count, default=3, help="a word seen less often in training becomes <UNK>")
    add("--max_length", type=count, default=40, help="words at most in a caption, read or written")
    add("--num_workers", type=number(int, 0), default=16, help="threads that decode images; capped at the cores")
    add("--feature_cache", default="feature_cache", help="folder of encoded images; 'off' encodes them in every batch")

    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=("resnet50", "efficientnet_lite0"), default="resnet50",
        help="efficientnet_lite0 needs no download")  # fmt: skip
    add("--resnet_weights", help="file of ResNet50 weights, or 'random'; by default looked for, then downloaded")
    add("--embed_size", type=count, default=512, help="size of word and image embeddings")
    add("--hidden_size", type=count, default=1024, help="LSTM size; 512 with one layer suits Flickr8k and a laptop")
    add("--num_layers", type=count, default=3, help="LSTM layers")
    add("--attention_dim", type=count, default=512, help="size of queries and keys (attention decoder)")
    add("--drop_prob", type=number(float, 0, 0.95), default=0.3, help="dropout; more for small data sets")

    add = parser.add_argument_group("training").add_argument
    add("--seed", type=number(int, 0), default=0, help="of the split that is drawn, weights, order and dropout")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where the networks run")
    add("--grad_clip", type=number(float, 0), default=5.0, help="largest gradient norm; 0 does not clip")
    add("--label_smoothing", type=number(float, 0, 0.9), default=0.0, help="of the training loss; 0.1 helps long runs")
    add("--attention_reg", type=number(float, 0), default=0.0,
        help="weight of Show-Attend-and-Tell's term that has every region looked at once (attention decoder)")  # fmt: skip
    add("--best_metric", choices=("cider", "bleu4", "val_loss"), default="cider",
        help="what picks best.pt: CIDEr goes on rising after the loss has turned")  # fmt: skip
    add(
        "--early_stopping", type=number(int, 0), default=0, help="stop after so many epochs without a new best; 0 never"
    )

    add = parser.add_argument_group("learning rate scheduling").add_argument
    add("--use_scheduler", action="store_true", help="let the learning rate follow a schedule")
    add("--scheduler_type", choices=SCHEDULERS, default="reduce_lr_on_plateau", help="which one")
    add("--scheduler_patience", type=number(int, 0), default=3, help="reduce_lr_on_plateau: epochs without improvement")
    add(
        "--scheduler_factor", type=number(float, 0, 0.999, above=True), default=0.5, help="reduce_lr_on_plateau: factor"
    )
    add("--scheduler_step_size", type=count, default=7, help="step: epochs between two drops")
    add("--scheduler_gamma", type=number(float, 0, 1, above=True), default=0.1,
        help="step: factor of a drop; exponential: factor of an epoch (not typed: a tenth over the whole run)")  # fmt: skip
    add("--scheduler_t_max", type=count, default=10, help="cosine: epochs from the top to min_lr, where it stays")
    add("--min_lr", type=number(float, 0), default=1e-7, help="no schedule goes below it")
    add("--warmup_epochs", type=number(int, 0), default=0, help="one_cycle: epochs of its rising part")

    add = parser.add_argument_group("decoding").add_argument
    add("--beam_size", type=count, default=3, help="hypotheses kept in testing, beside greedy decoding")
    add(
        "--length_penalty",
        type=number(float, 0),
        default=0.7,
        help="exponent of the length; more makes captions longer",
    )
    add("--split", choices=("test", "val", "val+test"), default="test", help="which images --mode test scores")

    add = parser.add_argument_group("attention visualization").add_argument
    add("--save_attention_viz", action="store_true", help="save attention pictures (attention decoder)")
    add("--attention_viz_samples", type=count, default=3, help="how many test images to draw")
    add("--advanced_attention_viz", action="store_true", help="also the picture with several views")

    add = parser.add_argument_group("output").add_argument
    add("--model_save_dir", type=Path, default=Path("saved_models"), help="where run directories are made")
    add("--keep_checkpoints", type=number(int, 0), default=0, help="keep the newest N epochs (and best, last); 0 all")
    return parser


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """Flags with their values, and the names of those that were typed on the command line."""
    parser = get_parser()
    actions = {action.dest: action for action in parser._actions}
    typed_only = get_parser()
    for action in typed_only._actions:
        action.default = argparse.SUPPRESS
    typed = set(vars(typed_only.parse_args(argv)))
    config = parser.parse_args(argv).config
    if config is not None:
        values = {}
        for name, value in read_config(config).items():
            name = {"decoder_type": "decoder"}.get(name, name)
            if name in ("timestamp", "mode", "model_path", "config") or value is None:
                continue
            if name not in actions:
                parser.error(f"{config}: unknown flag {name!r}")
            action = actions[name]
            try:
                values[name] = bool(value) if action.nargs == 0 else action.type(str(value)) if action.type else value  # type: ignore[operator]
            except argparse.ArgumentTypeError as error:
                parser.error(f"{config}: {name}: {error}")
            if action.choices and values[name] not in action.choices:
                parser.error(f"{config}: {name}: {value!r} is none of {', '.join(action.choices)}")
        parser.set_defaults(**values)
    args = parser.parse_args(argv)
    check_flags(args, typed, parser)
    return args, typed


def read_config(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping of flags."""
    if path.suffix == ".json":
        values = read_json(path)
    else:
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read --config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} is no mapping of flags: expected lines such as `epochs: 15`")
    return values


def check_flags(args: argparse.Namespace, typed: set[str], parser: argparse.ArgumentParser) -> None:
    """Refuse typed flags that would have no effect."""
    from_checkpoint = args.model_path is not None
    idle = [name for name in SCHEDULER_FLAGS if name in typed and not args.use_scheduler]
    if idle and not from_checkpoint:
        parser.error(f"--{idle[0]} has no effect without --use_scheduler")
    for name in ("save_attention_viz", "attention_reg", "attention_dim"):
        if name in typed and args.decoder == "lstm" and ("decoder" in typed or not from_checkpoint):
            parser.error(f"--{name} has no effect with --decoder lstm: add --decoder attention")
    for name in ("attention_viz_samples", "advanced_attention_viz"):
        if name in typed and not args.save_attention_viz:
            parser.error(f"--{name} has no effect without --save_attention_viz")
    if args.use_scheduler and args.scheduler_type == "one_cycle" and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs} leaves nothing of the {args.epochs} epochs to come down in")
    if args.mode == "test" and args.model_path is None:
        parser.error("--mode test needs --model_path: a checkpoint, a run directory or a folder of runs")
    if args.mode == "train" and "split" in typed:
        parser.error("--split has no effect in training: it says which images --mode test scores")
    if args.resnet_weights and args.encoder != "resnet50" and "resnet_weights" in typed:
        parser.error(f"--resnet_weights has no effect with --encoder {args.encoder}")


if __name__ == "__main__":  # --help and a mistyped flag are answered before torch's seconds of importing
    try:
        parse_flags(sys.argv[1:])
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import attention_visualization
import plots
from caption_data import (
    PAD,
    SOS,
    BatchMaker,
    CaptionSet,
    UnreadableImage,
    Vocabulary,
    build_vocabulary,
    dump_split,
    load_caption_set,
    open_image,
    saved_split_of,
)
from caption_models import (
    ENCODERS,
    Hypothesis,
    LSTMDecoder,
    beam_search,
    build_decoder,
    build_encoder,
    find_weights,
)
from experiment_utils import (
    create_run_directory,
    find_checkpoint,
    reproducing_command,
    write_run_config,
    write_run_summary,
)
from feature_cache import Features, open_features
from metrics_utils import METRIC_NAMES, has_java, score_captions
from training_utils import (
    Schedule,
    ScheduleSettings,
    load_checkpoint,
    load_weights,
    pick_device,
    save_checkpoint,
    seed_step,
)

# --------------------------------------------------------------------------------------------------
# Building


def apply_checkpoint(args: argparse.Namespace, typed: set[str], checkpoint: dict[str, Any], path: Path) -> None:
    """Take from a checkpoint what it decides; only a flag that was typed can contradict it.

    Raises:
        UserError: a typed flag says otherwise.
    """
    saved = checkpoint["flags"]
    for name in ARCHITECTURE_FLAGS:
        if name in typed and getattr(args, name) != saved[name]:
            raise UserError(
                f"--{name} {getattr(args, name)} contradicts {path}, which was trained with {saved[name]}: "
                f"leave the flag out, or train a new model without --model_path"
            )
        setattr(args, name, saved[name])
    if args.decoder == "lstm" and args.save_attention_viz:
        raise UserError(f"--save_attention_viz has no effect: {path} is an lstm decoder, which has no attention")
    follow = ["data_dir", "image_dir", "captions_file", "resnet_weights", "feature_cache", "seed"]
    if args.mode == "train":
        follow += ["batch_size", "drop_prob", "grad_clip", "label_smoothing", "attention_reg", "best_metric"]
        if not args.use_scheduler and "learning_rate" not in typed:
            follow.append("learning_rate")
    for name in follow:
        if name not in typed:
            value = saved[name]
            setattr(args, name, Path(value) if value and name in ("data_dir", "image_dir", "captions_file") else value)


def build_data(args: argparse.Namespace, saved_split: dict[str, Any] | None) -> CaptionSet:
    """Read images and captions, and say what was found."""
    data_dir = args.data_dir
    if data_dir is None and not (args.image_dir and args.captions_file):
        data_dir = Path("data") / args.dataset_type
    cache = None if args.feature_cache == "off" else Path(args.feature_cache)
    data = load_caption_set(data_dir, args.image_dir, args.captions_file, args.seed, saved_split, cache)
    if args.dry_run:
        data.splits = {split: images[:n] for (split, images), n in zip(data.splits.items(), (8, 4, 4), strict=True)}
    sizes = ", ".join(f"{split} {len(images)}" for split, images in data.splits.items())
    print(f"Data: {len(data.names)} images and {data.first_caption[-1]} captions in {data.captions_file}")
    print(f"Split by image: {sizes} (from {data.split_source})")
    for note in data.notes:
        print(f"Note: {note}")
    return data


def build_features(
    args: argparse.Namespace, data: CaptionSet, needed: np.ndarray, weights_hash: str | None = None
) -> tuple[Features, str]:
    """Features of the images at the positions `needed`, and the hash of the encoder's weights.

    Raises:
        UserError: the weights are not those that a checkpoint was trained with.
    """
    weights, digest = find_weights(args.encoder, args.resnet_weights)
    if weights_hash not in (None, digest):
        raise UserError(
            f"the checkpoint was trained on {args.encoder} weights {weights_hash[:8]}, but {weights or 'random ones'} "  # type: ignore[index]
            f"are {digest[:8]}: name the right file with --resnet_weights"
        )
    cores = os.cpu_count() or 1
    workers = min(args.num_workers or 1, cores)
    if args.num_workers > cores:
        print(f"Image decoding threads: {workers} (--num_workers {args.num_workers}, capped at the cores)")
    features = open_features(
        None if args.feature_cache == "off" else Path(args.feature_cache), ENCODERS[args.encoder], digest,
        lambda: build_encoder(args.encoder, weights), data.paths(), needed, pick_device(args.device),
        means=args.decoder == "lstm", workers=workers,
    )  # fmt: skip
    data.drop_images(set(features.unreadable))
    return features, digest


def build_schedule(
    args: argparse.Namespace, typed: set[str], checkpoint: dict[str, Any] | None, steps: int
) -> Schedule | None:
    """The learning-rate schedule of this run, by the table under 'Resume' in the README."""
    first = checkpoint["epoch"] if checkpoint else 0
    saved = Schedule.from_state(checkpoint["schedule"]) if checkpoint and checkpoint["schedule"] else None
    names = {
        "learning_rate": "learning_rate", "min_lr": "min_lr", "scheduler_patience": "patience",
        "scheduler_factor": "factor", "scheduler_step_size": "step_size", "scheduler_gamma": "gamma",
        "scheduler_t_max": "t_max", "warmup_epochs": "warmup_epochs",
    }  # fmt: skip
    if not args.use_scheduler and saved is None:
        idle = [name for name in SCHEDULER_FLAGS if name in typed]
        if idle:
            raise UserError(f"--{idle[0]} has no effect: the checkpoint has no schedule; add --use_scheduler")
        return None
    if saved is not None and (not args.use_scheduler or args.scheduler_type == saved.settings.type):
        kind = saved.settings.type
        new_cycle = saved.finished(first) and (kind == "one_cycle" or "scheduler_t_max" in typed)
        for flag, name in names.items():
            if flag in typed:
                setattr(saved.settings, name, getattr(args, flag))
        if "learning_rate" in typed:
            saved.plateau["rate"] = args.learning_rate
            print(f"The new base learning rate is {args.learning_rate:g}")
        if new_cycle:
            saved.settings.first_epoch, saved.settings.epochs = first, args.epochs
            print(f"The checkpoint's {kind} cycle is finished: a new one begins")
        elif saved.finished(first):
            print(
                f"Warning: cosine has reached its T_max and stays at min_lr {saved.settings.min_lr:g}; "
                f"add --use_scheduler --scheduler_type cosine --scheduler_t_max {args.epochs} to start a new cycle"
            )
        else:
            print(f"The checkpoint's schedule goes on: {saved.describe()}")
        saved.settings.steps_per_epoch = steps
        return saved
    gamma = args.scheduler_gamma
    if args.scheduler_type == "exponential" and "scheduler_gamma" not in typed and not args.config:
        args.scheduler_gamma = gamma = args.scheduler_gamma ** (1 / args.epochs)
    if checkpoint:
        before = saved.settings.type if saved else "no schedule"
        print(f"The checkpoint has {before}: a fresh {args.scheduler_type} over {args.epochs} epochs begins")
    return Schedule(
        ScheduleSettings(
            args.scheduler_type, args.learning_rate, args.min_lr, args.scheduler_patience, args.scheduler_factor,
            args.scheduler_step_size, gamma, args.scheduler_t_max, args.warmup_epochs, first, args.epochs, steps,
        )
    )  # fmt: skip


def build_model(args: argparse.Namespace, vocabulary: Vocabulary) -> LSTMDecoder:
    torch.manual_seed(args.seed)
    return build_decoder(
        args.decoder, len(vocabulary), ENCODERS[args.encoder].channels, args.embed_size, args.hidden_size,
        args.num_layers, args.drop_prob, args.attention_dim,
    )  # fmt: skip


def word_counts(batches: BatchMaker, data: CaptionSet, size: int) -> torch.Tensor:
    """How often each word (and `<EOS>`) is a target in training: (V,)."""
    counts = torch.zeros(size)
    for captions in batches.plan(data.splits["train"], 4096):
        counts += torch.bincount(batches.make(captions).targets, minlength=size)
    counts[[PAD, SOS]] = 0
    return counts


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def train_one_epoch(
    decoder: LSTMDecoder, optimizer: torch.optim.Optimizer, batches: BatchMaker, features: Features,
    images: np.ndarray, schedule: Schedule | None, epoch: int, args: argparse.Namespace, device: torch.device,
) -> float:  # fmt: skip
    """One pass over the training images in an order of (seed, epoch); returns the loss per token.

    Raises:
        UserError: the loss is not a finite number.
    """
    decoder.train()
    order = np.random.default_rng([args.seed, epoch]).permutation(images)
    plan = batches.plan(order, args.batch_size)
    total = torch.zeros((), device=device)
    tokens = 0
    bar = tqdm(plan, desc=f"Epoch {epoch + 1}", unit="batch", disable=None, leave=False)
    for step, captions in enumerate(bar):
        seed_step(args.seed, epoch, step)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(epoch, step)
        batch = batches.make(captions)
        image_features = features.gather(batch.images).to(device)  # (I, 49, C) or (I, C)
        batch = batch.to(device)
        output = decoder(image_features, batch)
        loss = F.cross_entropy(output.logits, batch.targets, label_smoothing=args.label_smoothing)
        total += loss.detach() * len(batch.targets)
        tokens += len(batch.targets)
        if args.attention_reg and output.attention is not None:
            # Doubly stochastic attention (Xu et al., 2015, section 4.2.1): every region is looked at once in all.
            looked = output.attention.new_zeros(len(batch.row_image), output.attention.shape[1])
            looked = looked.index_add(0, batch.token_row, output.attention)  # (R, 49)
            loss = loss + args.attention_reg * ((1 - looked) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), args.grad_clip)
        optimizer.step()
    mean = float(total) / tokens
    if not math.isfinite(mean):
        raise UserError(
            f"the training loss of epoch {epoch + 1} is not a finite number: lower --learning_rate "
            f"(now {args.learning_rate:g}) or --grad_clip, and go on from the last checkpoint with --model_path"
        )
    return mean


@torch.inference_mode()
def validation_loss(
    decoder: LSTMDecoder,
    batches: BatchMaker,
    features: Features,
    images: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> float:
    """Plain cross-entropy per token, whatever the training loss adds."""
    decoder.eval()
    total, tokens = 0.0, 0
    for captions in batches.plan(images, max(batch_size, 64)):
        batch = batches.make(captions)
        output = decoder(features.gather(batch.images).to(device), batch.to(device))
        total += float(F.cross_entropy(output.logits, batch.targets.to(device), reduction="sum"))
        tokens += len(batch.targets)
    return total / tokens


def generate(
    decoder: LSTMDecoder, features: Features, images: np.ndarray, beam: int, args: argparse.Namespace,
    device: torch.device, attention: bool = False,
) -> list[Hypothesis]:  # fmt: skip
    """The best caption of each image, decoded freely, many images at a time."""
    best: list[Hypothesis] = []
    chunk = max(1, 384 // beam)
    for start in tqdm(range(0, len(images), chunk), desc="Captioning", unit="batch", disable=None, leave=False):
        some = features.gather(images[start : start + chunk]).to(device)
        best += [
            found[0] for found in beam_search(decoder, some, beam, args.max_length, args.length_penalty, attention)
        ]
    return best


def evaluate(
    decoder: LSTMDecoder, features: Features, data: CaptionSet, vocabulary: Vocabulary, images: np.ndarray, beam: int,
    args: argparse.Namespace, device: torch.device, meteor: bool = False,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Caption the images and score them against all their references."""
    found = generate(decoder, features, images, beam, args, device)
    captions = [" ".join(vocabulary.decode(hypothesis.ids)) for hypothesis in found]
    return score_captions(captions, [data.references(image) for image in images], meteor), captions


def save_attention_pictures(
    decoder: LSTMDecoder, features: Features, data: CaptionSet, vocabulary: Vocabulary, directory: Path,
    args: argparse.Namespace, device: torch.device,
) -> None:  # fmt: skip
    """`attention_viz_sample_N.png` (and the advanced ones) for a seeded choice of test images."""
    test = data.splits["test"]
    chosen = np.random.default_rng(args.seed).permutation(test)[: args.attention_viz_samples]
    for n, (image, found) in enumerate(
        zip(chosen, generate(decoder, features, chosen, args.beam_size, args, device, attention=True), strict=True), 1
    ):
        words = vocabulary.decode(found.ids)
        if not words or found.attention is None:
            print(f"No attention picture of {data.names[image]}: the model said nothing")
            continue
        picture = open_image(data.image_dir / data.names[image], at_least=900)
        attention_visualization.draw_attention(
            picture, words, found.attention, directory / f"attention_viz_sample_{n}.png", data.names[image]
        )
        if args.advanced_attention_viz:
            attention_visualization.draw_attention_advanced(
                picture, words, found.attention, directory / f"advanced_attention_viz_sample_{n}.png", data.names[image]
            )
    print(f"Attention pictures of {len(chosen)} test images: {directory / 'attention_viz_sample_*.png'}")


def train(args: argparse.Namespace, typed: set[str], argv: list[str]) -> Path:
    """Train from nothing or from a checkpoint; returns the run directory."""
    started = time.time()
    checkpoint, path = None, None
    if args.model_path is not None:
        path = find_checkpoint(args.model_path)
        checkpoint = load_checkpoint(path)
        apply_checkpoint(args, typed, checkpoint, path)
    if args.dry_run:
        args.epochs = 1
        args.warmup_epochs = 0
    device = pick_device(args.device)
    print(f"Device: {device}")
    data = build_data(args, checkpoint["split"] if checkpoint else None)
    needed = np.concatenate(list(data.splits.values()))
    features, weights_hash = build_features(
        args, data, needed, checkpoint["encoder"]["weights_hash"] if checkpoint else None
    )
    vocabulary = Vocabulary(checkpoint["vocabulary"]) if checkpoint else build_vocabulary(data, args.freq_threshold)
    batches = BatchMaker(data, vocabulary, args.max_length)
    decoder = build_model(args, vocabulary)
    if checkpoint and path:
        load_weights(decoder, checkpoint["decoder"], path)
    else:
        decoder.set_word_frequencies(word_counts(batches, data, len(vocabulary)))
    decoder.to(device)
    steps = len(batches.plan(data.splits["train"], args.batch_size))
    schedule = build_schedule(args, typed, checkpoint, steps)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.learning_rate, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate
    first = checkpoint["epoch"] if checkpoint else 0
    last = first + args.epochs
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"Vocabulary: {len(vocabulary)} words. Decoder: {args.decoder}, {parameters:,} parameters")

    directory = create_run_directory(args.model_save_dir, vars(args), ENCODERS[args.encoder].family)
    kept = args.epochs if not args.keep_checkpoints else min(args.epochs, args.keep_checkpoints + 2)
    space = kept * 3 * 4 * parameters + 20_000_000  # weights and Adam's two moments; pictures
    free = require_free_space(directory, space, "this run")
    print(f"Run directory: {directory} (will take up to {format_bytes(space)}; {format_bytes(free)} are free)")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    command = reproducing_command(argv)
    write_run_config(directory, flags)
    write_atomic(directory / "split.json", lambda file: file.write(dump_split(data).encode()))

    curve = checkpoint["loss_curve"] if checkpoint else {
        "epochs": [], "training_losses": [], "validation_losses": [], "learning_rates": []
    }  # fmt: skip
    history = checkpoint["metrics_history"] if checkpoint else []
    best = {"score": -math.inf, "epoch": 0, "metric": args.best_metric}
    if checkpoint and path and checkpoint["best"]["metric"] == args.best_metric:
        best = carry_best(checkpoint, path, directory) or best
    for epoch in range(first, last):
        rate = schedule.rate(epoch) if schedule else args.learning_rate
        training = train_one_epoch(
            decoder, optimizer, batches, features, data.splits["train"], schedule, epoch, args, device
        )
        validation = validation_loss(decoder, batches, features, data.splits["val"], args.batch_size, device)
        scores, captions = evaluate(decoder, features, data, vocabulary, data.splits["val"], 1, args, device)
        if schedule is not None:
            schedule.epoch_ended(validation)
        for key, value in zip(curve, (epoch + 1, training, validation, rate), strict=True):
            curve[key].append(value)
        history.append({"epoch": epoch + 1, "split": "val", "beam_size": 1, "images": len(captions), **scores})
        score = -validation if args.best_metric == "val_loss" else scores[args.best_metric]
        is_best = score > best["score"]
        if is_best:
            best = {"score": score, "epoch": epoch + 1, "metric": args.best_metric}
        saved = directory / f"model_epoch_{epoch + 1}.pt"
        save_checkpoint(
            saved,
            {
                "epoch": epoch + 1, "decoder_type": args.decoder, "decoder": decoder.state_dict(),
                "encoder": {"name": args.encoder, "weights_hash": weights_hash, "transform": "squash224"},
                "optimizer": optimizer.state_dict(), "schedule": schedule.state() if schedule else None,
                "vocabulary": vocabulary.words, "flags": flags | {"learning_rate": args.learning_rate},
                "split": saved_split_of(data), "loss_curve": curve, "metrics_history": history, "best": best,
            },
        )  # fmt: skip
        publish_copy(saved, directory / "last.pt")
        if is_best:
            publish_copy(saved, directory / "best.pt")
        prune_checkpoints(directory, args.keep_checkpoints)
        write_json(directory / "loss_curve.json", curve)
        write_json(directory / "metrics_history.json", history)
        plots.plot_losses(curve, directory / "training_losses.png", best["epoch"])
        plots.plot_learning_rate(curve, directory / "learning_rate.png")
        print(f"\nEpoch {epoch + 1} completed ({epoch + 1}/{last}):")
        print(f"  Training Loss: {training:.5f}")
        print(f"  Validation Loss: {validation:.5f}")
        print(f"  Learning Rate: {rate:.6f}" if rate >= 1e-4 else f"  Learning Rate: {rate:.3e}")
        print(f"  Scheduler: {schedule.describe() if schedule else 'none'}")
        shown = (("cider", "CIDEr"), ("bleu4", "BLEU-4"), ("rouge", "ROUGE F1"), ("wer", "WER"))
        print("  Greedy captions: " + ", ".join(f"{name} {100 * scores[key]:.1f}" for key, name in shown))
        print(f"  Model checkpoint saved (best: {is_best})", flush=True)
        if args.early_stopping and epoch + 1 - best["epoch"] >= args.early_stopping:
            print(f"Stopped early: no better {args.best_metric} in {args.early_stopping} epochs")
            break

    best_path = directory / "best.pt"
    load_weights(decoder, load_checkpoint(best_path)["decoder"], best_path)
    if args.save_attention_viz:
        save_attention_pictures(decoder, features, data, vocabulary, directory, args, device)
    facts = {
        "Images": ", ".join(f"{split} {len(images)}" for split, images in data.splits.items()),
        "Split": data.split_source,
        "Vocabulary": len(vocabulary),
        "Best Epoch": f"{best['epoch']} (validation {args.best_metric} {abs(best['score']):.4f})",
        "Minutes": f"{(time.time() - started) / 60:.1f}",
        **({"Resumed From": path} if path else {}),
    }
    write_run_summary(directory, flags, command, facts)
    print(f"\nBest epoch: {best['epoch']} by {args.best_metric}. Everything is in {directory}")
    print(f"Score it on the test images: {reproducing_command(['--mode', 'test', '--model_path', str(directory)])}")
    return directory


def carry_best(checkpoint: dict[str, Any], path: Path, directory: Path) -> dict[str, Any] | None:
    """Take the old run's best checkpoint along, so that the new run has a best.pt even if it gets no better."""
    best = checkpoint["best"]
    candidates = [path.parent / f"model_epoch_{best['epoch']}.pt", path.parent / "best.pt"]
    if best["epoch"] == checkpoint["epoch"]:
        candidates.insert(0, path)
    for candidate in candidates:
        if candidate.is_file() and load_checkpoint(candidate)["epoch"] == best["epoch"]:
            publish_copy(candidate, directory / "best.pt")
            return dict(best)
    print(f"The old run's best checkpoint (epoch {best['epoch']}) is gone: this run finds its own best")
    return None


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` epoch files; best.pt and last.pt are files of their own."""
    if keep:
        epochs = sorted(directory.glob("model_epoch_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        for old in epochs[:-keep]:
            old.unlink()


def test(args: argparse.Namespace, typed: set[str]) -> None:
    """Score a checkpoint on the test images, greedily and with a beam, and draw what it looked at."""
    path = find_checkpoint(args.model_path)
    checkpoint = load_checkpoint(path)
    apply_checkpoint(args, typed, checkpoint, path)
    device = pick_device(args.device)
    print(
        f"Model: {path} (epoch {checkpoint['epoch']}, {args.decoder} on {args.encoder}, {args.dataset_type}). Device: {device}"
    )
    data = build_data(args, checkpoint["split"])
    needed = np.concatenate([data.splits[split] for split in args.split.split("+")])
    features, _ = build_features(args, data, needed, checkpoint["encoder"]["weights_hash"])
    images = np.concatenate([data.splits[split] for split in args.split.split("+")])
    vocabulary = Vocabulary(checkpoint["vocabulary"])
    decoder = build_model(args, vocabulary)
    load_weights(decoder, checkpoint["decoder"], path)
    decoder.to(device)
    directory = path.parent
    metrics_path = directory / "test_metrics.json"
    results = read_json(metrics_path) if metrics_path.is_file() else []
    rows: list[tuple[str, dict[str, float]]] = []
    captions: list[str] = []
    for beam in dict.fromkeys((1, args.beam_size)):
        scores, captions = evaluate(decoder, features, data, vocabulary, images, beam, args, device, meteor=True)
        header = {
            "checkpoint": path.name, "epoch": checkpoint["epoch"], "dataset": args.dataset_type, "split": args.split,
            "images": len(images), "beam_size": beam, "length_penalty": args.length_penalty if beam > 1 else None,
            "tokenizer": "spacy.blank('en'), lower case, without punctuation",
        }  # fmt: skip
        content = [{"image_id": data.names[i], "caption": c} for i, c in zip(images, captions, strict=True)]
        file = save_test_captions(directory, content)
        entry = {**header, "captions_file": file, **scores}
        results = [old for old in results if {key: old.get(key) for key in header} != header] + [entry]
        rows.append((("greedy" if beam == 1 else f"beam {beam}"), scores))
    write_json(metrics_path, results)
    print(
        f"\nScores on {len(images)} {args.split} images (x100; lower case, no punctuation; CIDEr's word weights from these images):"
    )
    print(" " * 28 + "".join(f"{name:>10}" for name, _ in rows))
    for key, name in METRIC_NAMES.items():
        if key in rows[0][1]:
            print(f"  {name:<26}" + "".join(f"{100 * scores[key]:10.2f}" for _, scores in rows))
    if not has_java():
        print("  METEOR is left out: it needs Java")
    save_gallery(data, images, captions, directory, args)
    if args.save_attention_viz:
        data.splits["test"] = images
        save_attention_pictures(decoder, features, data, vocabulary, directory, args, device)
    print(f"Scores: {metrics_path}. Captions: {directory / results[-1]['captions_file']}")


def save_test_captions(directory: Path, content: list[dict[str, str]]) -> str:
    """Write captions under the first free `test_captions[_N].json`; a file that already says the same serves again."""
    number = 1
    while True:
        path = directory / ("test_captions.json" if number == 1 else f"test_captions_{number}.json")
        if not path.exists():
            write_json(path, content)
        if json.loads(path.read_text(encoding="utf-8")) == content:
            return path.name
        number += 1


def save_gallery(
    data: CaptionSet, images: np.ndarray, captions: list[str], directory: Path, args: argparse.Namespace
) -> None:
    """`sample_captions.png`: a seeded dozen of test images, what the model said and what people said."""
    samples = []
    for place in np.random.default_rng(args.seed).permutation(len(images))[:12]:
        name = data.names[images[place]]
        try:
            picture = open_image(data.image_dir / name, at_least=400)
        except UnreadableImage:
            continue
        references = data.references(int(images[place]))
        samples.append({"image": picture, "name": name, "caption": captions[place], "references": references})
    plots.plot_captions(samples, directory / "sample_captions.png")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code (2 for a user's mistake, 130 for Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, typed = parse_flags(argv)
        if args.mode == "test":
            test(args, typed)
        else:
            directory = train(args, typed, argv)
            if args.dry_run:
                print("\nDry run: testing what was trained")
                test(parse_flags(["--mode", "test", "--dry_run", "--model_path", str(directory)])[0], set())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Finished epochs are kept; go on from the newest with --model_path.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
