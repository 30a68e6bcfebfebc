"""Train and test an image captioner: a frozen encoder and an LSTM, with or without attention.

    # train on Flickr8k (see download_datasets.py), with the defaults of the original
    python flickr_image_caption_with_pytorch_resnet_lstm.py --dataset_type flickr8k --decoder lstm

    # attention, without a network: an encoder that pip has installed already
    python flickr_image_caption_with_pytorch_resnet_lstm.py --config configs/flickr8k_attention_cpu.yaml

    # train five epochs more, in a new run directory; then score the test images
    python flickr_image_caption_with_pytorch_resnet_lstm.py --model_path saved_models/flickr8k/... --epochs 5
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode test --model_path saved_models/flickr8k/...

    # start from that model's weights on your own photos with captions
    python flickr_image_caption_with_pytorch_resnet_lstm.py --init_from saved_models/flickr8k/... --data_dir my_photos

    # caption your own photos; the same on a page in the browser
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode caption --model_path saved_models/... --images *.jpg
    python flickr_image_caption_with_pytorch_resnet_lstm.py --mode serve --model_path saved_models/...

From flags to captions: images, captions and split -> vocabulary -> features, once per image -> batches -> decoder
-> loss -> checkpoint -> beam search -> captions -> scores and pictures. The flags are in captioning/config/flags.py.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.config.flags import LIGHT_MODES
from captioning.config.settings import Settings, answer_flags, parse_flags
from captioning.io import UserError, bars_off, duration, format_bytes, log, prepare_process, run_command, steady_streams
from captioning.modes import run_light_mode

STOPPED = (
    "Stopped. What is saved stays. Run the same command again; or, where a run directory is named above, continue "
    "with --resume."
)
if __name__ == "__main__":  # --help, a mistyped flag and captions do without PyTorch's seconds of importing
    prepare_process()
    SETTINGS = answer_flags(sys.argv[1:])
    if SETTINGS.mode in LIGHT_MODES:
        sys.exit(run_command(lambda: run_light_mode(SETTINGS), STOPPED))

import numpy as np
import torch
from tqdm import tqdm

from attention_visualization import epoch_figures, save_attention_pictures
from captioning import distributed
from captioning.data.batches import Collator
from captioning.data.splits import store_split
from captioning.decoders.base import count_parameters
from captioning.encoders.base import encoder_of
from captioning.encoders.features import Features
from captioning.runs import plots, report, tensorboard
from captioning.runs.checkpoints import CheckpointSaver, load_checkpoint, load_decoder_weights
from captioning.runs.directories import find_checkpoint, reproducing_command, start_command
from captioning.training.adaptation import add_replay
from captioning.training.building import (
    build_data,
    build_features,
    load_context,
    seeded_decoder,
    warn_of_small_data,
)
from captioning.training.calibrate import complete_checkpoint
from captioning.training.caption_set import DecodingContext, caption_texts, images_to_draw
from captioning.training.gain import report_gain
from captioning.training.schedules import cosine
from captioning.training.self_critical import SelfCritic
from captioning.training.source import Source
from experiment_utils import require_room, write_epoch_files, write_run_files, write_summary
from metrics_utils import score_captions
from training_utils import (
    BatchSampler,
    StepLoss,
    StepMonitor,
    Stopped,
    Stopwatch,
    TrainState,
    advise_on_memory,
    seed_step,
    set_rates,
    validation_loss,
    wrap_ddp,
)


@dataclass(frozen=True)
class Run:
    """What stays the same while a run trains. What changes is the TrainState."""

    settings: Settings
    context: DecodingContext  # data, vocabulary, device, the decoder with its validation features
    sampler: BatchSampler
    views: list[Features]
    step_loss: torch.nn.Module
    constants: dict[str, Any]  # what every checkpoint of the run has: vocabulary, split, encoder, flags
    saver: CheckpointSaver
    monitor: StepMonitor  # finds signals, saves that are due, and batches whose loss or gradient is not finite
    lock: Any  # on the run directory; None but in the first process
    clock: Stopwatch = field(default_factory=Stopwatch)

    @property
    def directory(self) -> Path:
        return self.saver.directory

    @property
    def first_epoch(self) -> int:
        """Epochs that were trained before this run."""
        return self.saver.first_epoch

    @property
    def last_epoch(self) -> int:
        return self.first_epoch + int(self.settings.epochs + self.settings.scst_epochs)

    def is_self_critical(self, state: TrainState) -> bool:
        """Return whether the current epoch is one of self-critical training, which come last."""
        return bool(state.epoch >= self.first_epoch + self.settings.epochs)

    def learning_rate(self, state: TrainState, step: int) -> float:
        """Return the rate of a step of the current epoch."""
        if self.is_self_critical(state):  # half a cosine to zero over all self-critical epochs
            done = state.epoch - self.first_epoch - self.settings.epochs + step / self.sampler.steps
            return cosine(self.settings.scst_learning_rate, 0.0, min(1.0, done / self.settings.scst_epochs))
        return state.schedule.rate(state.epoch, step) if state.schedule else float(self.settings.learning_rate)

    def stopped_early(self, state: TrainState) -> bool:
        since = state.epoch - max(state.best["epoch"], self.first_epoch)
        return bool(self.settings.early_stopping) and since >= self.settings.early_stopping


# --------------------------------------------------------------------------------------------------
# Building


def build_run(settings: Settings, argv: list[str]) -> tuple[Run, TrainState]:
    """Build a run from its data to its directory: a new one or, with `--resume`, one that was interrupted."""
    source = Source.open(settings)  # nothing, or the checkpoint of --model_path, --init_from or --resume
    settings = source.settle(settings)
    device = distributed.pick_device(settings.device)
    data = build_data(settings, source.split)
    source.require_same_data(data.names)
    images = np.unique(np.concatenate([*data.splits.values(), images_to_draw(settings, data, data.splits["test"])]))
    views, weights_hash = build_features(settings, data, images, source.weights_hash)
    source.keep_apart(data, views[0].versions)
    split = store_split(data.splits, data.names, views[0].versions, parent=source.seen)
    vocabulary = source.vocabulary(data, settings.freq_threshold)
    replay = add_replay(settings, data, views, split, weights_hash)
    collator = Collator(replay.data, vocabulary, settings.max_length)
    sampler = BatchSampler(
        collator, data.splits["train"], len(views), settings.batch_size, settings.seed, replay.images, replay.per_epoch
    )
    decoder = seeded_decoder(settings, vocabulary, pretrained=source.way == "new")
    source.fill(decoder, collator.word_counts(data.splits["train"]))
    decoder.to(device)
    size = count_parameters(decoder)
    log.info(f"Vocabulary: {len(vocabulary)} words. Decoder: {settings.decoder}, {size:,} parameters")
    if source.way == "new" and not settings.dry_run:
        warn_of_small_data(data, collator, sampler.steps, size)
    state = TrainState.begin(decoder, settings, device)
    source.restore(state, settings, sampler.steps)
    critic = SelfCritic(replay.data, vocabulary, settings) if settings.scst_epochs else None
    step_loss = wrap_ddp(StepLoss(decoder, replay.views, critic, state.precision, settings))
    spec = encoder_of(settings.values())
    constants = {
        "vocabulary": vocabulary.words, "split": split, "flags": source.flags(settings, state.schedule),
        "encoder": {"name": spec.name, "weights_hash": weights_hash, "transform": spec.transform},
        "decoding": None, "consensus": source.consensus(data, len(vocabulary)), "confidence": source.calibration(data),
    }  # fmt: skip
    directory, lock = source.open_directory(settings)
    run = Run(
        settings, DecodingContext(settings, device, data, vocabulary, [(decoder, views[0])]), sampler, views, step_loss,
        constants, CheckpointSaver(directory, settings.keep_checkpoints, state.first_epoch),
        StepMonitor(sampler, directory, settings, device), lock,
    )  # fmt: skip
    if source.way == "resume":
        log.info(f"Resuming {directory} after {state.epoch} epochs and {state.step} steps")
        if state.step == 0 and state.curve["epochs"]:  # a crash may have come between a checkpoint and what follows
            is_new = not run.saver.best.is_file() or load_checkpoint(run.saver.best)["epoch"] != state.epoch
            if distributed.is_first():
                run.saver.publish(state.epoch, is_best=state.best["epoch"] == state.epoch and is_new)  # it may be tuned
            write_outputs(state, run)
        return run, state
    state.best = source.carry_best(directory, settings, split) or state.best
    if distributed.is_first():
        explicit = settings.explicit.union(
            state.schedule.flags() if state.schedule and state.schedule.inherited else ()
        )
        write_run_files(directory, constants["flags"], explicit, reproducing_command(argv), data)
    save_last(state, run)  # from here on the run can be resumed
    return run, state


# --------------------------------------------------------------------------------------------------
# Training


def train_one_epoch(state: TrainState, run: Run) -> float:
    """Train the rest of the current epoch.

    Returns:
        the training loss per token.

    Raises:
        Stopped: a signal asked for it; `last.pt` is written.
        UserError: too many batches have a loss or gradient that is not finite.
    """
    settings, monitor, clock = run.settings, run.monitor, run.clock
    state.decoder.train()
    plan, self_critical = run.sampler.plan(state.epoch), run.is_self_critical(state)
    bar = tqdm(plan, f"Epoch {state.epoch + 1}", initial=state.step, unit="batch", disable=bars_off(), leave=False)
    monitor.begin_epoch()
    for captions in plan[state.step :]:
        seed_step(settings.seed, state.epoch, state.step)
        rate = run.learning_rate(state, state.step)
        set_rates(state.optimizer, rate, not state.curve["epochs"], settings)
        batch = run.sampler.rank_batch(captions, state.epoch, state.step)
        clock.lap("making batches")
        loss, token_loss, reward = run.step_loss(batch, self_critical)
        clock.lap("features and forward")
        state.precision.backward(loss, state.optimizer)
        norm = state.precision.clip_and_update(state.optimizer, settings.grad_clip)
        batch_loss = token_loss.to(state.loss_sum.dtype) * batch.tokens
        finite = batch_loss.isfinite() & (norm.isfinite() | state.precision.scaler.is_enabled())  # fp16 may overflow
        state.loss_sum += torch.where(finite, batch_loss, 0.0)
        state.reward_sum += reward
        state.tokens += batch.tokens
        state.step += 1
        if monitor.due(finite, last=state.step == len(plan)):
            asked, save = monitor.sync(state, plan)
            bar.set_postfix(
                loss=f"{float(state.loss_sum) / max(1, state.tokens):.3f}", rate=f"{rate:.1e}", refresh=False
            )
            if save or asked:
                save_last(state, run)
            if asked:
                raise Stopped(asked, run.directory)
        bar.update()
        clock.lap("backward and update")
    bar.close()
    (loss_sum,) = distributed.total(float(state.loss_sum))
    return loss_sum / max(1, state.tokens)


def evaluate(state: TrainState, run: Run) -> tuple[float, dict[str, Any]]:
    """Return the validation loss, and the scores of greedy captions of the validation images."""
    context, images = run.context, run.context.data.splits["val"]
    ((_, features),) = context.members
    loss = validation_loss(
        state.decoder, features, run.sampler.collator, images, run.settings.batch_size, context.device
    )
    run.clock.lap("validation loss")
    captions = caption_texts(context, images, beam=1)
    references = [context.data.references(image) for image in images]
    scores = distributed.from_first(lambda: score_captions(captions, references))
    run.clock.lap("validation captions and scores")
    return loss, {"split": "val", "beam_size": 1, "images": len(images), **scores}


def log_epoch(state: TrainState, run: Run, is_best: bool, seconds: float) -> None:
    """Print an epoch as the original does, and one line with the mean seconds of an epoch, which `--quiet` keeps."""
    training, validation, rate = (state.curve[key][-1] for key in list(state.curve)[1:])
    scores, last = state.history[-1], run.last_epoch
    found = f"validation {validation:.3f}, CIDEr {100 * scores['cider']:.1f}{' *' if is_best else ''}"
    if training is None:
        print(f"[0/{last}] as it comes, {found}", flush=True)
        return
    log.info(f"\nEpoch {state.epoch} completed ({state.epoch}/{last}):")
    log.info(f"  Training Loss: {training:.5f}")
    log.info(f"  Validation Loss: {validation:.5f}")
    log.info(f"  Learning Rate: {rate:.6f}" if rate >= 1e-4 else f"  Learning Rate: {rate:.3e}")
    if "reward" in scores:
        log.info(f"  Self-critical: mean reward of the samples {100 * scores['reward']:.1f} CIDEr-D")
    else:
        log.info(f"  Scheduler: {state.schedule.describe() if state.schedule else 'none'}")
    shown = (("cider", "CIDEr"), ("bleu4", "BLEU-4"), ("rouge", "ROUGE F1"), ("wer", "WER"))
    log.info("  Greedy captions: " + ", ".join(f"{name} {100 * scores[key]:.1f}" for key, name in shown))
    log.info(f"  Model checkpoint saved (best: {is_best})")
    log.debug(f"  Time: {run.clock.report()}")
    print(
        f"[{state.epoch}/{last}] loss {training:.3f}, {found}, {duration(seconds)} an epoch, "
        f"{duration(seconds * (last - state.epoch))} left", flush=True,
    )  # fmt: skip


def save_last(state: TrainState, run: Run) -> None:
    checkpoint = state.checkpoint(run.constants)
    if distributed.is_first():
        run.saver.save_last(checkpoint)


def save_epoch(state: TrainState, run: Run, is_best: bool) -> None:
    checkpoint = state.checkpoint(run.constants)
    if distributed.is_first():
        run.saver.save_epoch(checkpoint, state.epoch, is_best)
    run.clock.lap("saving")


def write_outputs(state: TrainState, run: Run) -> None:
    """Write what follows from an epoch's checkpoint: histories, curves, TensorBoard. Twice changes nothing."""
    figures = epoch_figures(run.context) if run.settings.tensorboard else {}
    if not distributed.is_first():
        return
    directory = run.directory
    rows = write_epoch_files(directory, state.curve, state.history)
    if run.clock.share("drawing") < 0.05:  # short epochs do not wait for pictures that the next one replaces
        plots.draw_curves(directory, state.curve, state.history, state.best["epoch"])
        run.clock.lap("drawing")
    if figures:
        tensorboard.write_tensorboard(directory, rows, figures)
        run.clock.lap("TensorBoard")


def train(settings: Settings, argv: list[str]) -> Path:
    """Train from nothing, from a checkpoint or from an interrupted run; return the run directory."""
    started = time.time()
    if settings.tensorboard:
        tensorboard.require_tensorboard()
    run, state = build_run(settings, argv)
    settings, context, directory = run.settings, run.context, run.directory
    distributed.from_first(lambda: require_room(directory, state, context, run.last_epoch - state.epoch))
    distributed.check_file(directory / "last.pt")
    log.debug(f"Reading data, encoding images and building the model: {time.time() - started:.1f} s")
    with contextlib.ExitStack() as held:
        if run.lock is not None:
            held.callback(run.lock.release)  # also after an error
        training_started, first = time.time(), state.epoch
        with run.monitor.stop:
            while (start := state.is_start(settings)) or (
                state.epoch < run.last_epoch and not run.stopped_early(state)
            ):
                rate = None if start else run.learning_rate(state, 0)
                self_critical = not start and run.is_self_critical(state)
                try:
                    training = None if start else train_one_epoch(state, run)
                    validation, scores = evaluate(state, run)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        advise_on_memory(context.device, settings.batch_size, directory, run.views)
                    ) from error
                is_best = state.end_epoch(training, validation, rate, scores, settings.best_metric, self_critical)
                save_epoch(state, run, is_best)
                write_outputs(state, run)
                log_epoch(state, run, is_best, (time.time() - training_started) / max(1, state.epoch - first))
                if start:
                    training_started = time.time()
                run.monitor.stop.check(directory)
        if run.stopped_early(state):
            log.info(f"Stopped early: no better {settings.best_metric} in {settings.early_stopping} epochs")
        distributed.wait_for_all()  # until the first has written all
        load_decoder_weights(state.decoder, load_checkpoint(run.saver.best)["decoder"], run.saver.best)
        complete_checkpoint(run.saver.best, context, run.views, run.constants["consensus"])
        gain = report_gain(context, directory) if settings.init_from else []
        if settings.save_attention_viz:
            images = images_to_draw(settings, context.data, context.data.splits["test"])
            save_attention_pictures(context, images, directory)
        if distributed.is_first():
            finish(state, run, (time.time() - started) / 60, gain)
    return directory


def finish(state: TrainState, run: Run, minutes: float, gain: list[str]) -> None:
    """Write the files that a finished run ends with, and print the next command. Args: gain: lines to print."""
    directory, data, flags = run.directory, run.context.data, run.constants["flags"]
    plots.draw_curves(directory, state.curve, state.history, state.best["epoch"])
    facts = {
        "Images": ", ".join(f"{split} {len(images)}" for split, images in data.splits.items()),
        "Split": data.split_source,
        "Vocabulary": len(run.context.vocabulary),
        "Best Epoch": f"{state.best['epoch']} (validation {state.best['metric']} {abs(state.best['score']):.4f})",
        "Minutes": f"{minutes:.1f}" + (" since it was resumed" if run.settings.resume else ""),
        "Processes": distributed.size(),
        "Device": distributed.device_name(run.context.device),
    }
    facts |= {"Gain": "; ".join(gain)} if gain else {}
    if run.context.device.type == "cuda":
        facts["Peak GPU Memory"] = format_bytes(torch.cuda.max_memory_allocated())
    write_summary(directory, flags, start_command(directory), facts)
    print(f"\nBest epoch: {state.best['epoch']} by {state.best['metric']}. Everything is in {directory}")
    print("\n".join([*gain, f"Report: {report.write_report(directory, data).name}"]))
    if not run.settings.dry_run and len(data.splits["test"]):
        print(f"Score it on the test images: {reproducing_command(['--mode', 'test', '--model_path', str(directory)])}")


# --------------------------------------------------------------------------------------------------
# Command line


@distributed.one_error
def dispatch(settings: Settings, argv: list[str]) -> int:
    """Do what the flags ask for; return the exit code."""
    if settings.mode in LIGHT_MODES:
        return run_light_mode(settings)
    settings.set_log_level()
    if settings.mode == "export":
        from captioning.modes.export import export

        path = find_checkpoint(settings.model_path[0])
        export(load_checkpoint(path), path, settings.output, settings.resnet_weights)
        return 0
    from captioning.modes import test, tune

    with steady_streams():  # training goes on where its messages cannot be printed
        distributed.join()
        if settings.mode == "train":
            directory = train(settings, argv)
            if settings.dry_run:
                test_dry_run(directory, settings)
        elif settings.mode == "tune":
            context, _, checkpoints = load_context(settings, ["val"])
            ((path, checkpoint),) = checkpoints.items()
            tune.run(context, path, checkpoint)
        elif settings.predictions is not None:
            test.score_predictions(build_data(settings, None), settings)
        else:
            test.run(*load_context(settings, settings.split.split("+")))
        distributed.leave()
    return 0


def test_dry_run(directory: Path, settings: Settings) -> None:
    """Test what a dry run trained, then delete it."""
    from captioning.modes import test

    testing = Settings(parse_flags(["--mode", "test", "--dry_run", "--model_path", str(directory)]).values())
    same = {name: getattr(settings, name) for name in ("device", "resnet_weights", "quiet", "verbose")}
    try:
        test.run(*load_context(testing.with_values(**same), ["test"]))
        distributed.wait_for_all()
    finally:
        if distributed.is_first() and settings.resume is None:
            shutil.rmtree(directory)
            log.info(f"\nThe files of the dry run are deleted: {directory}")


def main(argv: list[str] | None = None, settings: Settings | None = None) -> int:
    """Run the program; return the exit code (2 for a user's mistake, 130 or 143 after SIGINT or SIGTERM)."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: dispatch(settings or parse_flags(argv), argv), STOPPED)


if __name__ == "__main__":
    distributed.end(main(settings=SETTINGS))
