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
-> loss -> checkpoint -> beam search -> captions -> scores and pictures. The flags are in captioning/flags.py.
"""

from __future__ import annotations

import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.io import UserError, bars_off, duration, format_bytes, log, prepare_process, run_command, steady_streams
from captioning.settings import Settings, answer_flags, parse_flags

if __name__ == "__main__":  # --help and a mistyped flag are answered before PyTorch's seconds of importing
    prepare_process()
    SETTINGS = answer_flags(sys.argv[1:])

import numpy as np
import torch
from tqdm import tqdm

from attention_visualization import epoch_figures, save_attention_pictures
from captioning import adaptation, distributed, plots, reports, tensorboard
from captioning.batches import BatchMaker
from captioning.building import (
    build_data,
    build_decoder,
    build_features,
    check_settings,
    load_context,
    note_unused_gpu,
    warn_of_small_data,
)
from captioning.checkpoints import CheckpointSaver, carry_best, load_checkpoint, load_weights, require_trainable
from captioning.confidence import FEWEST
from captioning.dataset import Vocabulary, build_vocabulary
from captioning.decoders import count_parameters
from captioning.encoders import encoder_of
from captioning.evaluation import EvalContext, caption_texts, images_to_draw
from captioning.features import Features
from captioning.runs import find_checkpoint, lock_run_directory, reproducing_command, start_command
from captioning.schedules import choose_schedule
from captioning.scst import SelfCritic
from captioning.splits import refuse_trained_images, same_split, store_split
from captioning.validation import complete_checkpoint
from experiment_utils import create_run_directory, require_room, write_epoch_files, write_run_files, write_summary
from metrics_utils import score_captions
from training_utils import (
    Precision,
    StepLoss,
    StepMonitor,
    Stopped,
    StopRequest,
    Stopwatch,
    TrainLoader,
    TrainState,
    advise_on_memory,
    seed_step,
    set_rates,
    validation_loss,
    wrap_ddp,
)


@dataclass
class Run:
    """What stays the same while a run trains. What changes is the TrainState."""

    settings: Settings
    context: EvalContext  # data, vocabulary, device, the decoder with its validation features
    loader: TrainLoader
    views: list[Features]
    step_loss: torch.nn.Module
    constants: dict[str, Any]  # what every checkpoint of the run has: vocabulary, split, encoder, flags
    saver: CheckpointSaver = field(init=False)
    lock: Any = field(init=False)  # on the run directory, held until the run is finished, or this object is gone
    clock: Stopwatch = field(default_factory=Stopwatch)


# --------------------------------------------------------------------------------------------------
# Building


def resolve(settings: Settings, checkpoint: dict[str, Any] | None, source: Path | None) -> Settings:
    """Resolve what the flags leave open: a checkpoint's values, a dry run's sizes, the matmul dtype."""
    if checkpoint and source:
        settings = settings.with_checkpoint(checkpoint, source)
        if settings.adapts:
            settings = adaptation.settle(settings, checkpoint, source)
    if settings.dry_run:
        few = {name: min(getattr(settings, name), 1) for name in ("epochs", "scst_epochs")}
        settings = settings.with_values(**few, warmup_epochs=0)
    device = distributed.pick_device(settings.device)
    settings = settings.with_values(precision=Precision(settings.precision, device).name)
    log.info(f"Device: {device}, matmul dtype in training: {settings.precision}")
    note_unused_gpu(device)
    encoder_of(settings.values())  # refuses --fine_tune where it cannot be, before anything is read
    check_settings(settings, checkpoint)
    return settings


def build_run(
    settings: Settings, checkpoint: dict[str, Any] | None = None, source: Path | None = None
) -> tuple[Run, TrainState]:
    """Build data, features, vocabulary, batches, decoder and optimizer, from nothing or from a checkpoint."""
    settings = resolve(settings, checkpoint, source)
    device = distributed.pick_device(settings.device)
    stored = checkpoint["split"] if checkpoint else None
    data = build_data(settings, None if settings.adapts else stored)
    images = np.unique(np.concatenate([*data.splits.values(), images_to_draw(settings, data, data.splits["test"])]))
    known_hash = checkpoint["encoder"]["weights_hash"] if checkpoint else None
    views, weights_hash = build_features(settings, data, images, known_hash)
    if stored and source:
        if settings.adapts:
            adaptation.train_on_seen_images(stored, data, views[0].versions, source)
        held_out = np.concatenate([data.splits["val"], data.splits["test"]])
        refuse_trained_images(stored, held_out, data.names, views[0].versions, source)
    split = store_split(data.splits, data.names, views[0].versions, parent=stored)
    vocabulary = Vocabulary(checkpoint["vocabulary"]) if checkpoint else build_vocabulary(data, settings.freq_threshold)
    if settings.adapts:
        vocabulary = adaptation.grow_vocabulary(vocabulary, data, settings.freq_threshold)
    replay = adaptation.add_replay(settings, data, views, split, weights_hash)
    batches = BatchMaker(replay.data, vocabulary, settings.max_length)
    decoder = build_decoder(settings, vocabulary, pretrained=checkpoint is None)
    if not checkpoint or settings.adapts:
        decoder.set_word_frequencies(batches.word_counts(data.splits["train"]))
    if checkpoint and source:
        load_weights(decoder, adaptation.grow_weights(checkpoint["decoder"], decoder), source)
    decoder.to(device)
    size = count_parameters(decoder)
    log.info(f"Vocabulary: {len(vocabulary)} words. Decoder: {settings.decoder}, {size:,} parameters")
    state = TrainState.begin(decoder, settings, device)
    if checkpoint:
        state.restore(checkpoint)
    critic = SelfCritic(replay.data, vocabulary, settings) if settings.scst_epochs else None
    step_loss = wrap_ddp(StepLoss(decoder, replay.views, critic, state.precision, settings))
    loader = TrainLoader(
        batches, data.splits["train"], len(views), settings.batch_size, settings.seed, replay.images, replay.per_epoch
    )
    if not checkpoint and not settings.dry_run:
        warn_of_small_data(data, batches, loader.steps, size)
    spec = encoder_of(settings.values())
    constants = {
        "vocabulary": vocabulary.words, "split": split,
        "encoder": {"name": spec.name, "weights_hash": weights_hash, "transform": spec.transform},
        "decoding": None, "consensus": None,
        "confidence": checkpoint["confidence"] if checkpoint and len(data.splits["val"]) < FEWEST else None,
    }  # fmt: skip
    context = EvalContext(settings, device, data, vocabulary, [(decoder, views[0])])
    return Run(settings, context, loader, views, step_loss, constants), state


def new_run(settings: Settings, argv: list[str]) -> tuple[Run, TrainState]:
    """Start a run in a directory of its own, from nothing, from `--model_path` or from `--init_from`."""
    checkpoint, source = None, None
    if settings.init_from is not None:
        checkpoint, source = adaptation.load_source(settings.init_from)
    elif settings.model_path is not None:
        source = find_checkpoint(settings.model_path[0])
        checkpoint = load_checkpoint(source)
        require_trainable(checkpoint, source)
    run, state = build_run(settings, checkpoint, source)
    settings = run.settings
    state.schedule = choose_schedule(settings, checkpoint, run.loader.steps)
    family = encoder_of(settings.values()).family
    directory = distributed.from_first(lambda: create_run_directory(settings.model_save_dir, settings.values(), family))
    run.saver = CheckpointSaver(directory, settings.keep_checkpoints, state.first_epoch)
    given = "init_from" if settings.adapts else "model_path"  # which may be a folder that was searched
    run.constants["flags"] = settings.stored() | {given: str(source) if source else None}
    if state.schedule and not settings.use_scheduler:  # the checkpoint's, which goes on
        run.constants["flags"] |= state.schedule.flags()
    same_bar = checkpoint and checkpoint["best"]["metric"] == settings.best_metric
    if checkpoint and source and same_bar and same_split(checkpoint["split"], run.constants["split"]):
        carried: dict[str, Any] | None = distributed.from_first(lambda: carry_best(checkpoint, source, directory))
        state.best = carried or state.best
    if distributed.is_first():
        run.lock = lock_run_directory(directory)
        write_run_files(
            directory, run.constants["flags"], settings.explicit, reproducing_command(argv), run.context.data
        )
    save_last(run, state)  # from here on the run can be resumed
    return run, state


def resume_run(settings: Settings) -> tuple[Run, TrainState]:
    """Continue an interrupted run in its own directory, at the step where `last.pt` stands."""
    directory, source = settings.resume, settings.resume / "last.pt"
    lock = lock_run_directory(directory) if distributed.is_first() else None
    if not source.is_file():
        raise UserError(f"{source} is not there: nothing was saved yet. Start again: {start_command(directory)}")
    checkpoint = load_checkpoint(source) | {"decoding": None}  # what was tuned for weights that training moves on from
    run, state = build_run(settings, checkpoint, source)
    run.lock = lock
    run.constants |= {name: checkpoint[name] for name in ("flags", "confidence")}
    state.restore_progress(checkpoint)
    run.saver = CheckpointSaver(directory, run.settings.keep_checkpoints, state.first_epoch)
    log.info(f"Resuming {directory} after {state.epoch} epochs and {state.step} steps")
    if state.step == 0 and state.curve["epochs"]:
        if distributed.is_first():
            is_new = not run.saver.best.is_file() or load_checkpoint(run.saver.best)["epoch"] != state.epoch
            run.saver.publish(state.epoch, is_best=state.best["epoch"] == state.epoch and is_new)  # it may be tuned
        write_outputs(run, state)  # a crash may have come between the checkpoint and these
    return run, state


# --------------------------------------------------------------------------------------------------
# Training


def train_one_epoch(
    state: TrainState, loader: TrainLoader, step_loss: torch.nn.Module, settings: Settings, monitor: StepMonitor,
    save_last: Callable[[], None], clock: Stopwatch,
) -> float:  # fmt: skip
    """Train the rest of the current epoch.

    Args:
        monitor: finds signals, saves that are due, and batches whose loss or gradient is not finite.
        save_last: writes `last.pt`.
        clock: adds up where the time goes.

    Returns:
        the training loss per token.

    Raises:
        Stopped: a signal asked for it; `last.pt` is written.
        UserError: too many batches have a loss or gradient that is not finite.
    """
    state.decoder.train()
    plan, self_critical = loader.plan(state.epoch), state.is_self_critical(settings)
    bar = tqdm(plan, f"Epoch {state.epoch + 1}", initial=state.step, unit="batch", disable=bars_off(), leave=False)
    for captions in plan[state.step :]:
        seed_step(settings.seed, state.epoch, state.step)
        rate = state.learning_rate(settings, state.step, loader.steps)
        set_rates(state.optimizer, rate, state.epoch, settings)
        batch = loader.rank_batch(captions, state.epoch, state.step)
        clock.lap("making batches")
        loss, token_loss, reward = step_loss(batch, self_critical)
        clock.lap("features and forward")
        norm = state.precision.step(loss, state.optimizer, settings.grad_clip)
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
                save_last()
            if asked:
                raise Stopped(asked, monitor.directory)
        bar.update()
        clock.lap("backward and update")
    bar.close()
    (loss_sum,) = distributed.total(float(state.loss_sum))
    return loss_sum / max(1, state.tokens)


def evaluate(state: TrainState, run: Run) -> tuple[float, dict[str, Any]]:
    """Return the validation loss, and the scores of greedy captions of the validation images."""
    context, images = run.context, run.context.data.splits["val"]
    ((_, features),) = context.members
    loss = validation_loss(state.decoder, features, run.loader.batches, images, run.settings.batch_size, context.device)
    run.clock.lap("validation loss")
    captions = caption_texts(context, images, beam=1)
    references = [context.data.references(image) for image in images]
    scores = distributed.from_first(lambda: score_captions(captions, references))
    run.clock.lap("validation captions and scores")
    return loss, {"split": "val", "beam_size": 1, "images": len(images), **scores}


def log_epoch(state: TrainState, run: Run, is_best: bool, seconds: float) -> None:
    """Print an epoch as the original does, and one line with the mean seconds of an epoch, which `--quiet` keeps."""
    training, validation, rate = (state.curve[key][-1] for key in list(state.curve)[1:])
    scores, last = state.history[-1], state.last_epoch(run.settings)
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
    star = " *" if is_best else ""
    print(
        f"[{state.epoch}/{last}] loss {training:.3f}, validation {validation:.3f}, CIDEr {100 * scores['cider']:.1f}{star}, "
        f"{duration(seconds)} an epoch, {duration(seconds * (last - state.epoch))} left", flush=True,
    )  # fmt: skip


def save_last(run: Run, state: TrainState) -> None:
    checkpoint = state.checkpoint(run.constants)
    if distributed.is_first():
        run.saver.save_last(checkpoint)


def save_epoch(run: Run, state: TrainState, is_best: bool) -> None:
    checkpoint = state.checkpoint(run.constants)
    if distributed.is_first():
        run.saver.save_epoch(checkpoint, state.epoch, is_best)
    run.clock.lap("saving")


def write_outputs(run: Run, state: TrainState) -> None:
    """Write what follows from an epoch's checkpoint: histories, curves, TensorBoard. Twice changes nothing."""
    figures = epoch_figures(run.context) if run.settings.tensorboard else {}
    if not distributed.is_first():
        return
    directory = run.saver.directory
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
    run, state = resume_run(settings) if settings.resume is not None else new_run(settings, argv)
    settings, context, directory = run.settings, run.context, run.saver.directory
    size, epochs_left = count_parameters(state.decoder), state.last_epoch(settings) - state.epoch
    distributed.from_first(lambda: require_room(directory, size, epochs_left, settings.keep_checkpoints))
    distributed.check_file(directory / "last.pt")
    log.debug(f"Reading data, encoding images and building the model: {time.time() - started:.1f} s")
    training_started, first, save = time.time(), state.epoch, functools.partial(save_last, run, state)
    with StopRequest() as stop:
        monitor = StepMonitor(run.loader, directory, settings, stop, context.device)
        while state.epoch < state.last_epoch(settings) and not state.stopped_early(settings):
            rate = state.learning_rate(settings, 0, run.loader.steps)
            monitor.begin_epoch()
            try:
                training = train_one_epoch(state, run.loader, run.step_loss, settings, monitor, save, run.clock)
                validation, scores = evaluate(state, run)
            except torch.OutOfMemoryError as error:
                raise UserError(advise_on_memory(context.device, settings.batch_size, directory, run.views)) from error
            is_best = state.end_epoch(settings, training, validation, rate, scores)
            save_epoch(run, state, is_best)
            write_outputs(run, state)
            log_epoch(state, run, is_best, (time.time() - training_started) / (state.epoch - first))
            stop.check(directory)
    if state.stopped_early(settings):
        log.info(f"Stopped early: no better {settings.best_metric} in {settings.early_stopping} epochs")
    distributed.wait_for_all()  # until the first has written all
    load_weights(state.decoder, load_checkpoint(run.saver.best)["decoder"], run.saver.best)
    complete_checkpoint(run.saver.best, context, run.views)
    if settings.save_attention_viz:
        images = images_to_draw(settings, context.data, context.data.splits["test"])
        save_attention_pictures(context, images, directory)
    if distributed.is_first():
        finish(run, state, (time.time() - started) / 60)
    return directory


def finish(run: Run, state: TrainState, minutes: float) -> None:
    """Write the files that a finished run ends with, and print the next command."""
    directory, data, flags = run.saver.directory, run.context.data, run.constants["flags"]
    plots.draw_curves(directory, state.curve, state.history, state.best["epoch"])
    facts = {
        "Images": ", ".join(f"{split} {len(images)}" for split, images in data.splits.items()),
        "Split": data.split_source,
        "Vocabulary": len(run.context.vocabulary),
        "Best Epoch": f"{state.best['epoch']} (validation {run.settings.best_metric} {abs(state.best['score']):.4f})",
        "Minutes": f"{minutes:.1f}" + (" since it was resumed" if run.settings.resume else ""),
        "Processes": distributed.size(),
        "Device": distributed.device_name(run.context.device),
    }
    if run.context.device.type == "cuda":
        facts["Peak GPU Memory"] = format_bytes(torch.cuda.max_memory_allocated())
    write_summary(directory, flags, start_command(directory), facts)
    print(f"\nBest epoch: {state.best['epoch']} by {run.settings.best_metric}. Everything is in {directory}")
    print(f"Report: {reports.write_report(directory, data).name}")
    if not run.settings.dry_run:
        print(f"Score it on the test images: {reproducing_command(['--mode', 'test', '--model_path', str(directory)])}")
    run.lock.release()


# --------------------------------------------------------------------------------------------------
# Command line


@distributed.one_error
def dispatch(settings: Settings, argv: list[str]) -> int:
    """Do what the flags ask for; return the exit code."""
    log.setLevel(logging.WARNING if settings.quiet else logging.DEBUG if settings.verbose else logging.INFO)
    if settings.mode == "caption":
        from captioning.modes.caption import caption_images

        return caption_images(settings)
    if settings.mode == "serve":
        from captioning.modes.serve import serve_page

        return serve_page(settings)
    if settings.mode == "export":
        from captioning.modes.export import export

        path = find_checkpoint(settings.model_path[0])
        export(load_checkpoint(path), path, settings.output, settings.onnx, settings.resnet_weights)
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
    stopped = (
        "Stopped. What is saved stays. Run the same command again; or, where a run directory is named above, continue "
        "with --resume."
    )
    return run_command(lambda: dispatch(settings or parse_flags(argv), argv), stopped)


if __name__ == "__main__":
    distributed.end(main(settings=SETTINGS))
