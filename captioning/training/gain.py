"""What a run with `--init_from` gained: the captions of the model as it came against those of the best epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from captioning import distributed
from captioning.config.flags import CONSENSUS_BEAM, DEFAULTS
from captioning.decoding.consensus import NgramHead
from captioning.runs.checkpoints import load_checkpoint, load_decoder_weights
from captioning.scoring.cider import cider_of_each
from captioning.scoring.scores import FEW_IMAGES, interval, resampled_sums
from captioning.training.caption_set import DecodingContext, caption_texts

MOST_IMAGES = 200  # of a split that are captioned, twice, which takes some tenths of a second each
SAMPLES = 10_000  # of the images, with replacement
LEAST_FALL = 0.01  # of the validation loss: a smaller one says nothing


def report_gain(context: DecodingContext, directory: Path) -> list[str]:
    """Return lines to print: the scores before and after, and what to do where nothing was gained.

    Test images decide, or else validation images, where there are FEW_IMAGES of them; if not, the validation loss does.

    Args:
        context: whose decoder ends with the best epoch's weights.
        directory: of the run.
    """
    if context.settings.dry_run:
        return []
    distributed.wait_for_all()  # until the first has written all
    start, best = directory / "model_epoch_0.pt", directory / "best.pt"
    checkpoint = load_checkpoint(best)
    replay = "" if context.settings.replay else ", --replay 0.9"
    advice = f"What helps: more captions of each photo, more photos{replay} (docs/data.md, in the repository)"
    if checkpoint["epoch"] == 0:
        return ["Nothing was gained: no epoch is better than the model as it came, and best.pt has its weights", advice]
    if not start.is_file():
        return [f"Not compared with the model as it came: {start} is gone"]
    losses, decided = checkpoint["loss_curve"]["validation_losses"], "the validation loss"
    lines = [f"Validation loss: {losses[0]:.3f} as it came, {losses[-1]:.3f} now"]
    verdict = int(losses[-1] < (1 - LEAST_FALL) * losses[0])  # 1: better, -1: worse, 0: it cannot be told
    for split, name in (("val", "Validation"), ("test", "Test")):
        images = np.random.default_rng(0).permutation(context.data.splits[split])[:MOST_IMAGES]
        if not len(images):
            continue
        before, after = (100 * cider_of(context, path, images) for path in (start, best))
        line = f"{name}, {len(images)} images: CIDEr {before.mean():.1f} as it came, {after.mean():.1f} now"
        if len(images) < FEW_IMAGES:
            lines.append(f"{line} (too few images to tell)")
            continue
        gained = after - before
        low, high = interval(resampled_sums(gained[:, None], SAMPLES, seed=0)[:, 0] / len(gained))  # paired bootstrap
        lines.append(f"{line} ({gained.mean():+.1f}, 95 % interval {low:+.1f} to {high:+.1f})")
        verdict, decided = int(low > 0) - int(high < 0), f"the {name.lower()} images"
    if verdict < 0:
        lines.append(f"The model as it came is better here: --model_path {context.settings.init_from}")
    elif not verdict:
        lines.append(f"By {decided} no gain can be told")
    else:
        return [*lines, f"By {decided} it got better"]
    return [*lines, advice]


def cider_of(context: DecodingContext, path: Path, images: np.ndarray) -> np.ndarray:
    """Load a checkpoint into the context's decoder; return the CIDEr (n,) of its captions, by consensus if it has that."""
    (decoder, _), *_ = context.members
    checkpoint = load_checkpoint(path)
    load_decoder_weights(decoder, checkpoint["decoder"], path)
    head = checkpoint["consensus"]
    own = replace(context, heads=[NgramHead(len(context.vocabulary), head)] if head else [])
    captions = caption_texts(own, images, CONSENSUS_BEAM if head else DEFAULTS["beam_size"])
    return distributed.from_first(lambda: cider_of_each(captions, list(map(context.data.references, images))))
