"""What a training run begins with: nothing, or a checkpoint. The four ways to begin differ here and nowhere else.

| way      | flag           | settings                     | split               | vocabulary, weights | the rest          |
|----------|----------------|------------------------------|---------------------|---------------------|-------------------|
| new      |                | the flags                    | found               | new                 | new               |
| continue | `--model_path` | the checkpoint's, then flags | the checkpoint's    | the checkpoint's    | the checkpoint's  |
| adapt    | `--init_from`  | its architecture, then flags | found, without leaks| its own, and new words | new            |
| resume   | `--resume`     | the run's                    | the checkpoint's    | the checkpoint's    | the checkpoint's, within the epoch |

The rest are optimizer, loss scaler, schedule, histories and the best score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning import distributed
from captioning.config.settings import Settings
from captioning.data.dataset import CaptionSet, Vocabulary, build_vocabulary
from captioning.data.splits import SAME_SET, StoredSplit, few, refuse_trained_images, same_split
from captioning.decoders.base import Decoder
from captioning.decoding.confidence import FEWEST
from captioning.decoding.consensus import grow_head
from captioning.encoders.base import encoder_of
from captioning.io import UserError, log
from captioning.runs.checkpoints import carry_best, load_checkpoint, load_decoder_weights, require_trainable
from captioning.runs.directories import find_checkpoint, lock_run_directory, start_command
from captioning.training.adaptation import grow_vocabulary, grow_weights, settle_adaptation, train_on_seen_images
from captioning.training.building import check_settings, note_unused_gpu
from captioning.training.calibrate import keeps_head
from captioning.training.schedules import Schedule, choose_schedule
from experiment_utils import create_run_directory
from training_utils import Precision, TrainState


@dataclass(frozen=True)
class Source:
    """What a run begins with."""

    way: str  # new, continue, adapt or resume
    path: Path | None = None  # of the checkpoint
    checkpoint: dict[str, Any] | None = None
    lock: Any = None  # on the directory of a run that is resumed, in the first process

    @classmethod
    def open(cls, settings: Settings) -> Source:
        """Read the checkpoint that the flags name, if any.

        Raises:
            UserError: it is not there, cannot be trained on, or another process trains in the run's directory.
        """
        if settings.resume is not None:
            lock = lock_run_directory(settings.resume) if distributed.is_first() else None
            path = settings.resume / "last.pt"
            if not path.is_file():
                again = start_command(settings.resume)
                raise UserError(f"{path} is not there: nothing was saved yet. Start again: {again}")
            # Without what was tuned for weights that training moves on from.
            return cls("resume", path, load_checkpoint(path) | {"decoding": None}, lock)
        if settings.init_from is not None:
            path = find_checkpoint(settings.init_from)
            return cls("adapt", path, load_checkpoint(path))
        if settings.model_path is not None:
            path = find_checkpoint(settings.model_path[0])
            checkpoint = load_checkpoint(path)
            require_trainable(checkpoint, path)
            return cls("continue", path, checkpoint)
        return cls("new")

    def settle(self, settings: Settings) -> Settings:
        """Settle every flag: the checkpoint's values, a dry run's sizes, the matmul dtype. Nothing changes them later.

        Raises:
            UserError: an explicit flag contradicts the checkpoint, or cannot be had on this machine.
        """
        if self.checkpoint and self.path:
            settings = settings.with_checkpoint(self.checkpoint, self.path)
            if self.way == "adapt":
                settings = settle_adaptation(settings, self.checkpoint["flags"], self.path)
        if settings.dry_run:
            short = {name: min(getattr(settings, name), 1) for name in ("epochs", "scst_epochs")}
            settings = settings.with_values(**short, warmup_epochs=0)
        device = distributed.pick_device(settings.device)
        settings = settings.with_values(precision=Precision(settings.precision, device).name)
        log.info(f"Device: {device}, matmul dtype in training: {settings.precision}")
        note_unused_gpu(device)
        encoder_of(settings.values())  # refuses --fine_tune where it cannot be, before anything is read
        check_settings(settings, self.checkpoint)
        return settings

    # ----------------------------------------------------------------------------------------------
    # Data

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on with the checkpoint's data set, optimizer and histories."""
        return self.way in ("continue", "resume")

    @property
    def seen(self) -> StoredSplit | None:
        """The split that says which images the checkpoint was trained on."""
        return self.checkpoint["split"] if self.checkpoint else None

    @property
    def split(self) -> StoredSplit | None:
        """The split that rules over the data set's own lists."""
        return self.seen if self.goes_on else None

    @property
    def weights_hash(self) -> str | None:
        """The hash of the encoder's weights that the checkpoint was trained on."""
        return self.checkpoint["encoder"]["weights_hash"] if self.checkpoint else None

    def require_same_data(self, names: Sequence[str]) -> None:
        """Make sure that a run is resumed on its own data set, whose folder may have moved.

        Args:
            names: of all images of the data set that was found.

        Raises:
            UserError: fewer than nine tenths of the run's training and validation images are among them.
        """
        if self.way != "resume" or self.split is None:
            return
        known = {name for part in ("train", "val") for name in self.split[part]["names"]}
        lost = known.difference(names)
        if len(lost) > (1 - SAME_SET) * len(known):
            raise UserError(
                f"the data set lacks {len(lost)} of the {len(known)} training and validation images that {self.path} was "
                f"trained with ({few(lost)}): give the run's own data with --data_dir. To train on other data, start a new "
                f"run: --init_from {self.path}"
            )

    def keep_apart(self, data: CaptionSet, versions: np.ndarray) -> None:
        """Make sure that no image which the checkpoint was trained on validates or tests.

        Args:
            versions: int64 (images, 2), as `Features.versions`.

        Raises:
            UserError: some do, or none is left that may.
        """
        if self.seen is None or self.path is None:
            return
        if self.way == "adapt":
            train_on_seen_images(self.seen, data, versions, self.path)
        held_out = np.concatenate([data.splits["val"], data.splits["test"]])
        refuse_trained_images(self.seen, held_out, data.names, versions, self.path)

    # ----------------------------------------------------------------------------------------------
    # Model and training state

    def vocabulary(self, data: CaptionSet, threshold: int) -> Vocabulary:
        """Return the checkpoint's words, with new ones where it adapts, or those of the training captions."""
        if self.checkpoint is None:
            return build_vocabulary(data, threshold)
        known = Vocabulary(self.checkpoint["vocabulary"])
        return grow_vocabulary(known, data, threshold) if self.way == "adapt" else known

    def fill(self, decoder: Decoder, word_counts: torch.Tensor) -> None:
        """Give a fresh decoder the checkpoint's weights.

        Args:
            word_counts: (V,) of the training captions, whose log frequencies are the biases of words that are new.
        """
        if not self.goes_on:
            decoder.set_word_frequencies(word_counts)
        if self.checkpoint and self.path:
            load_decoder_weights(decoder, grow_weights(self.checkpoint["decoder"], decoder), self.path)

    def restore(self, state: TrainState, settings: Settings, steps: int) -> None:
        """Take over optimizer, histories and schedule, as far as the way to begin does. Args: steps: of an epoch."""
        if self.checkpoint and self.goes_on:
            state.restore(self.checkpoint)
        if self.checkpoint and self.way == "resume":
            state.restore_progress(self.checkpoint)
            return
        saved = self.checkpoint["schedule"] if self.checkpoint and self.goes_on else None
        state.schedule = choose_schedule(settings, Schedule.from_state(saved) if saved else None, state.epoch, steps)

    def consensus(self, data: CaptionSet, words: int) -> dict[str, Any] | None:
        """Return the consensus that a run keeps until it learns its own, for a vocabulary of so many words."""
        if self.checkpoint is None or not (stored := self.checkpoint["consensus"]):
            return None
        train, val = (len(data.splits[name]) for name in ("train", "val"))
        kept = self.way != "continue" or keeps_head(stored, train, val)
        return grow_head(stored, len(self.checkpoint["vocabulary"]), words) if kept else None

    def calibration(self, data: CaptionSet) -> Any:
        """Return the confidence that a run keeps: the checkpoint's where there are too few images for another."""
        kept = self.way == "resume" or len(data.splits["val"]) < FEWEST
        return self.checkpoint["confidence"] if self.checkpoint and kept else None

    # ----------------------------------------------------------------------------------------------
    # Run directory

    def open_directory(self, settings: Settings) -> tuple[Path, Any]:
        """Return the run's directory, a new one unless it is resumed, and the first process's lock on it."""
        if self.way == "resume":
            return settings.resume, self.lock
        base, family = settings.model_save_dir, encoder_of(settings.values()).family
        directory = distributed.from_first(lambda: create_run_directory(base, settings.values(), family))
        return directory, lock_run_directory(directory) if distributed.is_first() else None

    def flags(self, settings: Settings, schedule: Schedule | None) -> dict[str, Any]:
        """Return the flags that checkpoints and run_config.json record: those that the run trains with."""
        if self.checkpoint and self.way == "resume":
            recorded: dict[str, Any] = self.checkpoint["flags"]
            return recorded
        given = "init_from" if self.way == "adapt" else "model_path"  # which may be a folder that was searched
        goes_on = schedule.flags() if schedule and schedule.inherited else {}
        return settings.stored() | {given: str(self.path) if self.path else None} | goes_on

    def carry_best(self, directory: Path, settings: Settings, split: StoredSplit) -> dict[str, Any] | None:
        """Put the best checkpoint so far into a new run's directory, where its score can be compared with the run's.

        Args:
            split: of the new run.

        Returns:
            its score, epoch and metric, or None.
        """
        if self.checkpoint is None or self.path is None or self.way != "continue":
            return None
        same_metric = self.checkpoint["best"]["metric"] == settings.best_metric or not settings.epochs
        if not same_metric or not same_split(self.checkpoint["split"], split):
            return None
        checkpoint, path = self.checkpoint, self.path
        carried: dict[str, Any] | None = distributed.from_first(lambda: carry_best(checkpoint, path, directory))
        return carried
