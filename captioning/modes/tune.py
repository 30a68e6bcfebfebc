"""`--mode tune`: find the beam size and length penalty with the best validation CIDEr, and learn consensus and confidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from captioning import distributed
from captioning.config.flags import CONSENSUS_BEAM
from captioning.runs.checkpoints import require_trainable, save_checkpoint
from captioning.scoring.cider import cider_of_each
from captioning.training.calibrate import learn_from_validation
from captioning.training.caption_set import DecodingContext, caption_texts

BEAMS, LENGTH_PENALTIES = (1, 2, 3, 4, 5, 8), (0.0, 0.4, 0.7, 1.0, 1.3)


def run(context: DecodingContext, path: Path, checkpoint: dict[str, Any]) -> None:
    """Tune decoding and keep the result in the checkpoint.

    Raises:
        UserError: `path` is an exported folder, or cannot be written.
    """
    require_trainable(checkpoint, path)
    best = tune(context)
    tuned = context.settings.with_values(length_penalty=best["length_penalty"])
    learned = learn_from_validation(replace(context, settings=tuned), checkpoint)
    if distributed.is_first():
        save_checkpoint(path, checkpoint | {"decoding": best} | learned)
    beam = f", by consensus of a beam of {CONSENSUS_BEAM} instead" if learned["consensus"] else ""
    print(f"Best: --beam_size {best['beam_size']} --length_penalty {best['length_penalty']}, CIDEr "
          f"{100 * best['cider']:.2f}. Kept in {path}, which --mode test uses from now on{beam}")  # fmt: skip


def tune(context: DecodingContext) -> dict[str, Any]:
    """Try beam sizes and length penalties on the validation images; return the pair with the best CIDEr."""
    images = context.data.splits["val"]
    references = [context.data.references(image) for image in images]
    found: list[tuple[float, int, float]] = []
    print(f"CIDEr on {len(images)} validation images, by beam size and length penalty:")
    print("      " + "".join(f"{penalty:>8}" for penalty in LENGTH_PENALTIES))
    for beam in BEAMS:
        line = f"{beam:>6}"
        for penalty in LENGTH_PENALTIES if beam > 1 else LENGTH_PENALTIES[:1]:  # greedy decoding compares no lengths
            captions = caption_texts(context, images, beam, penalty)
            cider = distributed.from_first(lambda: float(cider_of_each(captions, references).mean()))  # noqa: B023
            found.append((cider, beam, penalty))
            line += f"{100 * cider:8.2f}"
        print(line, flush=True)
    cider, beam, penalty = max(found, key=lambda entry: (entry[0], -entry[1]))
    return {"beam_size": beam, "length_penalty": penalty, "cider": cider, "images": len(images)}
