"""A new run that starts on other data from a trained model's weights (`--init_from`), and what it repeats of the old.

The settings that suit few images are `flags.ADAPTATION`. Everything here is done once, when a run is built; only the
images that are repeated are looked for again when it is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from captioning import distributed
from captioning.config.flags import ADAPTATION
from captioning.config.settings import Settings, cache_folder, default_text
from captioning.data.dataset import SPECIAL_TOKENS, CaptionSet, Vocabulary, frequent_words, join_sets, load_caption_set
from captioning.data.layouts import find_captions_file
from captioning.data.splits import StoredSplit, few, keys, require_splits, same_names, seen_in_training, trained_on
from captioning.decoders.base import Decoder
from captioning.encoders.features import CPU, Features, gather_views
from captioning.io import UserError, log
from captioning.training.building import build_features


def settle_adaptation(settings: Settings, flags: Mapping[str, Any], source: Path) -> Settings:
    """Say what a new run starts from, and find the data that it repeats; where they are not there it does without.

    Args:
        flags: of the checkpoint that it starts from.
    """
    unless_given = [
        f"{name} {default_text(getattr(settings, name))}" for name in ADAPTATION if name not in settings.explicit
    ]
    stages = f", whose last {settings.fine_tune} stage(s) learn too" if settings.fine_tune else ""
    log.info(f"Starting from {source}: {settings.decoder} on {settings.encoder}{stages}")
    if unless_given:
        log.info(f"Settings for small data sets, unless given: {', '.join(unless_given)}")
    if settings.replay:
        given = settings.replay_data_dir
        place = given or Path(flags["data_dir"] or Path("data") / flags["dataset_type"])
        try:
            find_captions_file(place)
        except (UserError, OSError) as error:
            if given is not None:
                raise UserError(
                    f"--replay_data_dir {given} is no data set that can be read: give the folder of the data that {source} "
                    "was trained on, or --replay 0"
                ) from error
            log.warning(
                f"Warning: --replay is 0: the data that {source} was trained on are not in {place}; --replay_data_dir "
                "says where they are"
            )
            return settings.with_values(replay=0.0)
        return settings.with_values(replay_data_dir=place)
    return settings


# --------------------------------------------------------------------------------------------------
# Images that the model knows already


def train_on_seen_images(stored: StoredSplit, data: CaptionSet, versions: np.ndarray, source: Path) -> None:
    """Move images that a model was trained on from the held-out parts of a new split to its training images.

    Args:
        stored: the split that the model was trained with.
        versions: int64 (images, 2), as `Features.versions`.

    Raises:
        UserError: no validation or no test image is left.
    """
    held_out = np.concatenate([data.splits["val"], data.splits["test"]])
    seen = np.concatenate(seen_in_training(stored, held_out, data.names, versions)).astype(np.int64)
    trained = {name for name, *_ in trained_on(stored)}
    alike = [data.names[i] for i in np.setdiff1d(held_out, seen) if data.names[i] in trained]
    if alike:
        log.warning(
            f"Warning: {len(alike)} image(s) that validate or test have names of images that {source} was trained on, and "
            f"other contents ({few(alike)}): if they are the same photos in another size, the scores say nothing"
        )
    if len(seen) == 0:
        return
    log.warning(
        f"Note: {len(seen)} image(s) that should validate or test are training images instead, since {source} was trained "
        f"on them: {few(data.names[i] for i in seen)}"
    )
    data.splits = {name: np.setdiff1d(images, seen) for name, images in data.splits.items()}
    data.splits["train"] = np.union1d(data.splits["train"], seen)
    require_splits(data.splits, f"without {len(seen)} images that {source} was trained on")


# --------------------------------------------------------------------------------------------------
# New words


def grow_vocabulary(known: Vocabulary, data: CaptionSet, threshold: int) -> Vocabulary:
    """Return a model's words, in their order, and after them those that are frequent in new training captions.

    Args:
        threshold: how often a new word is there at least.
    """
    new = [word for word in frequent_words(data, threshold).words if word not in known.id_of]
    shown_words = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "") or "none"
    log.info(f"New words, seen at least {threshold} time(s): {len(new)} ({shown_words})")
    return Vocabulary(known.words + new)


def grow_weights(weights: Mapping[str, torch.Tensor], decoder: Decoder) -> dict[str, torch.Tensor]:
    """Return a model's weights with rows for new words, which come last.

    The embedding of a new word is drawn with the mean and the standard deviation of the known ones (Hewitt, 2021), so
    that its logit is an average word's; its bias is the fresh decoder's.

    Args:
        weights: of the same architecture with fewer words.
        decoder: with all words, fresh, its output bias at their log frequency.
    """
    grown = {}
    for name, fresh in decoder.state_dict().items():
        rows = weights[name]
        if rows.shape != fresh.shape:
            new = fresh[len(rows) :]
            if rows.dim() > 1:
                words = rows[len(SPECIAL_TOKENS) :]
                new = words.mean(0) + words.std(0) * torch.randn(new.shape)
            rows = torch.cat([rows, new])
        grown[name] = rows
    return grown


# --------------------------------------------------------------------------------------------------
# Replay


class Replay(NamedTuple):
    """A data set with images that the model was trained on before."""

    data: CaptionSet  # whose training images are the new ones and then the old ones
    views: list[Features]  # of `data`
    images: np.ndarray  # int64 (n,) positions of the old ones
    per_epoch: int  # how many of them an epoch has


def add_replay(
    settings: Settings, data: CaptionSet, views: list[Features], split: StoredSplit, weights_hash: str
) -> Replay:
    """Join images that the model was trained on before to a data set, for training alone.

    They are those of `--replay_data_dir` that the split inherits by name, size and CRC-32, or by name alone where
    nearly all names are the same, as of photos in another size: never held-out ones. No more are encoded than the run's
    epochs take.

    Args:
        views: the features of the data set in each view.
        split: of the new run.

    Raises:
        UserError: no such image is there.
    """
    if not settings.replay:
        return Replay(data, views, np.zeros(0, dtype=np.int64), 0)
    cache = cache_folder(settings.feature_cache)
    remedy = "give the folder of these with --replay_data_dir" + ("" if settings.resume else ", or --replay 0")
    try:
        old = load_caption_set(settings.replay_data_dir, seed=settings.seed, token_cache=cache)
    except UserError as error:
        raise UserError(f"the images that --replay {settings.replay:g} repeats: {error}; {remedy}") from error
    distributed.check_agreement(old.facts(), distributed.SAME_FILES)
    known, paths = set(keys(split["inherited"])), old.paths()
    held_out = np.concatenate([data.splits["val"], data.splits["test"]])
    if same_names({name for name, *_ in known}, old.names):  # in another size: known by name alone
        known = {(name, -1, -1) for name, *_ in known} - {(data.names[i], -1, -1) for i in held_out}
    named, sized = {name for name, *_ in known}, {(name, size) for name, size, _ in known}
    found = [
        i for i, name in enumerate(old.names) if name in named and {(name, -1), (name, paths[i].stat().st_size)} & sized
    ]
    nothing = UserError(
        f"--replay {settings.replay:g}: none of the {len(known)} images that the model was trained on is in "
        f"{settings.replay_data_dir}: {remedy}"
    )
    if not found:
        raise nothing
    captions = settings.replay / (1 - settings.replay) * data.caption_counts(data.splits["train"]).sum()
    per_epoch = max(1, round(captions / old.caption_counts(np.array(found)).mean()))
    drawn = np.random.default_rng(settings.seed).permutation(found)[
        : per_epoch * (settings.epochs + settings.scst_epochs)
    ]
    old_views, _ = build_features(settings, old, drawn, weights_hash)
    first, versions = old_views[0], old_views[0].versions
    refused = {tuple(version) for version in views[0].versions[held_out].tolist()}

    def is_known(image: int) -> bool:
        name, version = old.names[image], tuple(versions[image].tolist())
        return version not in refused and bool({(name, *version), (name, -1, -1)} & known)

    drawn = np.array([i for i in drawn.tolist() if i not in first.unreadable and is_known(i)], dtype=np.int64)
    if not len(drawn):
        raise nothing
    per_epoch = min(per_epoch, len(drawn))
    log.info(f"Replay: {per_epoch} images an epoch of {len(found)} that the model was trained on, from {old.image_dir}")
    joined = [JoinedFeatures(new, before) for new, before in zip(views, old_views, strict=True)]
    images = drawn + len(data.names)
    both = join_sets(data, old)
    both.splits = data.splits | {"train": np.concatenate([data.splits["train"], images])}
    return Replay(both, [*joined], images, per_epoch)


class JoinedFeatures:
    """The features of two data sets as those of one, where the second's images come after the first's.

    Implements `Features`; see `dataset.join_sets`.
    """

    def __init__(self, first: Features, second: Features):
        self.parts, self.size = (first, second), len(first.versions)
        self.unreadable = first.unreadable | {i + self.size: problem for i, problem in second.unreadable.items()}
        self.versions = np.concatenate([first.versions, second.versions])

    def gather(self, images: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        second = (images >= self.size).astype(np.int64)
        return gather_views(self.parts, images - self.size * second, second, device)
