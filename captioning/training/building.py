"""From settings to data, features and decoders: what training, test and tune build alike."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning import distributed
from captioning.config.settings import Settings, cache_folder
from captioning.data.batches import Collator
from captioning.data.dataset import EOS, UNK, CaptionSet, Vocabulary, load_caption_set
from captioning.data.images import VIEW_SETS
from captioning.data.layouts import default_folder
from captioning.data.splits import StoredSplit, refuse_trained_images, same_split
from captioning.decoders.base import Decoder, build_decoder, find_decoder
from captioning.decoding.consensus import NgramHead
from captioning.encoders.base import encoder_of
from captioning.encoders.features import FeatureRequest, Features, open_features
from captioning.io import DATA_SCRIPT, UserError, log, program
from captioning.runs.checkpoints import load_checkpoint, load_decoder_weights
from captioning.runs.directories import command_to_tune, find_checkpoint
from captioning.training.caption_set import DecodingContext, images_to_draw

# Where a data set is small. The recipe for own photos has 9,000 weights a caption on fifty photos, the original's defaults 300,000.
MOST_WEIGHTS, FEWEST_STEPS, MOST_UNKNOWN = 50_000, 3, 0.2


def build_data(settings: Settings, stored: StoredSplit | None) -> CaptionSet:
    """Read images and captions, and print what was found.

    Args:
        stored: the split of the checkpoint that is tested or trained on from, or None.

    Raises:
        UserError: there is no usable data set.
    """
    data_dir = default_folder(settings.data_dir, settings.image_dir, settings.captions_file, settings.dataset_type)
    cache = cache_folder(settings.feature_cache)
    data = load_caption_set(
        data_dir, settings.image_dir, settings.captions_file, settings.seed, stored, cache, settings.split == "all",
        settings.generated_captions,
    )  # fmt: skip
    if settings.dry_run:
        data.splits = {split: images[:n] for (split, images), n in zip(data.splits.items(), (8, 4, 4), strict=False)}
    sizes = ", ".join(f"{split} {len(images)}" for split, images in data.splits.items())
    log.info(f"Data: {len(data.names)} images and {data.first_caption[-1]} captions in {data.captions_file}")
    log.info(f"Split by image: {sizes} (from {data.split_source})")
    for note in data.notes:
        log.warning(f"Note: {note}")
    distributed.check_agreement(data.facts(), distributed.SAME_FILES)
    return data


def build_features(
    settings: Settings, data: CaptionSet, images: np.ndarray, weights_hash: str | None = None
) -> tuple[list[Features], str]:
    """Encode images once, or read what was encoded before. Images that cannot be read leave every split.

    Args:
        images: positions (n,) of the images.
        weights_hash: of the encoder that a checkpoint was trained with.

    Returns:
        the features in each view, and the hash of the encoder's weights.

    Raises:
        UserError: the weights are not those of the checkpoint, or the cache cannot be written.
    """
    spec = encoder_of(settings.values())
    weights, digest = spec.find_weights(settings.resnet_weights, weights_hash)
    distributed.check_agreement({"the hash of the encoder's weights": digest}, distributed.SAME_FILES)
    reads_means = not (find_decoder(settings.decoder).uses_grid or spec.trainable_stages)
    request = FeatureRequest(
        cache=cache_folder(settings.feature_cache), spec=spec, weights_hash=digest,
        build_encoder=lambda: spec.build(weights), paths=data.paths(), folder=data.image_dir, images=images,
        device=distributed.pick_device(settings.device), means=reads_means, workers=decoding_threads(settings.num_workers),
        keep_on_device=settings.features_on_device, views=VIEW_SETS[settings.views],
    )  # fmt: skip
    found = open_features(request)
    check_unreadable(found[0].unreadable, len(images))
    data.drop_images({*found[0].unreadable})
    return found, digest


def check_unreadable(unreadable: dict[int, str], total: int) -> None:
    """Name the images that are left out; too many of them mean that something is wrong with the data.

    Raises:
        UserError: more than 1 % cannot be read.
    """
    if not unreadable:
        return
    for problem in list(unreadable.values())[:10]:
        log.warning(f"Cannot read {problem}")
    if len(unreadable) > 0.01 * total:
        raise UserError(
            f"{len(unreadable)} of {total} images cannot be read (more than 1 %): download the data set again "
            f"(`{program(DATA_SCRIPT)} --force`), or remove these images' rows from the captions file"
        )
    log.warning(f"{len(unreadable)} unreadable image(s) left out.")


@functools.cache  # prints it once
def decoding_threads(workers: int) -> int:
    """Return how many threads decode images: no more than cores."""
    cores = distributed.local_cores()
    if workers > cores:
        log.info(f"Image decoding threads: {cores} (--num_workers {workers}, capped at the cores)")
    return min(workers or 1, cores)


def seeded_decoder(settings: Settings, vocabulary: Vocabulary, pretrained: bool = False) -> Decoder:
    """Build the decoder that the settings describe; its initial weights depend on the seed alone.

    Args:
        pretrained: stages of the encoder that are trained start from the encoder's weights, rather than at random.
    """
    spec = encoder_of(settings.values())
    weights = spec.find_weights(settings.resnet_weights)[0] if pretrained and spec.trainable_stages else None
    torch.manual_seed(settings.seed)
    return build_decoder(settings.values(), len(vocabulary), spec, weights)


def warn_of_small_data(data: CaptionSet, collator: Collator, steps: int, parameters: int) -> None:
    """Warn, with figures and the flags that help, where a decoder has too few captions to learn from.

    Args:
        steps: of an epoch.
        parameters: of the decoder.
    """
    counts = collator.word_counts(data.splits["train"])
    captions = int(counts[EOS])
    unknown = float(counts[UNK]) / max(1.0, float(counts.sum() - counts[EOS]))
    problems = (
        [f"{captions} training captions for {parameters:,} weights"] if parameters > MOST_WEIGHTS * captions else []
    )
    problems += [f"{steps} step(s) an epoch"] if steps < FEWEST_STEPS else []
    problems += [f"{100 * unknown:.0f} % of the training words are <UNK>"] if unknown > MOST_UNKNOWN else []
    if problems:
        log.warning(
            f"Warning: {', '.join(problems)}: the captions will be poor. A trained captioner that learns these photos "
            "too (--init_from) gives better ones; without any, --config own_photos_from_nothing suits small data "
            "sets. See docs/data.md, in the repository"
        )


def note_unused_gpu(device: torch.device) -> None:
    """Tell that the machine has a GPU that this PyTorch cannot use."""
    if device.type == "cpu" and shutil.which("nvidia-smi") and not torch.cuda.is_available():
        log.warning(
            "Note: nvidia-smi is here, but this PyTorch sees no GPU and trains on the CPU. The repository's "
            "docs/troubleshooting.md says which PyTorch to install"
        )


def check_settings(settings: Settings, checkpoint: dict[str, Any] | None = None) -> None:
    """Make sure that every process has the same settings and checkpoint.

    Raises:
        UserError: they differ.
    """
    facts = {"PyTorch": torch.__version__, **{f"--{name}": str(value) for name, value in settings.values().items()}}
    if checkpoint:
        facts["the checkpoint's epoch and step"] = f"{checkpoint['epoch']}, {checkpoint['progress']['step']}"
    distributed.check_agreement(facts, distributed.SAME_COMMAND)


def load_context(settings: Settings, splits: list[str]) -> tuple[DecodingContext, np.ndarray, dict[Path, Any]]:
    """Load the checkpoints that `--model_path` names, and the features of the images to caption.

    Args:
        splits: whose images are captioned.

    Returns:
        the context, the positions of the splits' images, and the checkpoints by their paths.

    Raises:
        UserError: the checkpoints do not belong together, or their data set is not there.
    """
    device = distributed.pick_device(settings.device)
    check_settings(settings)
    checkpoints = {path: load_checkpoint(path) for path in map(find_checkpoint, settings.model_path)}
    if any(first.samefile(second) for first, second in itertools.combinations(checkpoints, 2)) or len(
        checkpoints
    ) < len(settings.model_path):
        raise UserError("--model_path names the same checkpoint twice: an ensemble is of different ones")
    (first_path, first), *others = checkpoints.items()
    for path, checkpoint in others:
        same = {
            "vocabulary": checkpoint["vocabulary"] == first["vocabulary"],
            "split": same_split(checkpoint["split"], first["split"]),
        }
        if not all(same.values()):
            what = next(name for name, equal in same.items() if not equal)
            raise UserError(f"{path} has another {what} than {first_path}: an ensemble is trained on the same data set")
    lacking = [path for path, checkpoint in checkpoints.items() if not checkpoint["consensus"]]
    if lacking and settings.consensus == "on":
        if "consensus" in settings.explicit:
            raise UserError(f"{lacking[0]} has nothing for --consensus: {command_to_tune(lacking[0])} adds it")
        settings = settings.with_values(consensus="off")
    each = {path: settings.with_checkpoint(checkpoint, path) for path, checkpoint in checkpoints.items()}
    settings.require_effect(list(each.values()), "with these models")
    resolved = each[first_path]
    data = build_data(resolved, first["split"])
    context = DecodingContext(resolved, device, data, Vocabulary(first["vocabulary"]), [])
    images = images_of(data, splits)
    if not len(images):
        raise UserError(
            f"no image of {settings.data_dir or data.image_dir} is in {' or '.join(splits)} ({data.split_source}): choose "
            "other images with --split, or --data_dir"
        )
    needed = np.union1d(images, images_to_draw(resolved, data, images))
    if settings.mode == "tune":  # consensus learns from these
        needed = np.union1d(needed, data.splits["train"])
    for path, checkpoint in checkpoints.items():
        own = each[path]
        log.info(f"Model: {path} (epoch {checkpoint['epoch']}, {own.decoder} on {own.encoder}, {own.dataset_type})")
        views, _ = build_features(own, data, needed, checkpoint["encoder"]["weights_hash"])
        decoder = seeded_decoder(own, context.vocabulary)
        load_decoder_weights(decoder, checkpoint["decoder"], path)
        context.members += [(decoder.to(device), view) for view in views]
        if resolved.by_consensus:
            context.heads += [NgramHead(len(context.vocabulary), checkpoint["consensus"])]
        refuse_trained_images(checkpoint["split"], images_of(data, splits), data.names, views[0].versions, path)
    context.calibration = None if others else first["confidence"]
    return context, images_of(data, splits), checkpoints  # without those that cannot be read


def images_of(data: CaptionSet, splits: list[str]) -> np.ndarray:
    return np.concatenate([data.splits[split] for split in splits])
