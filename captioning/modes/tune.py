"""`--mode tune`: find the beam size and length penalty with the best validation CIDEr."""

from __future__ import annotations

from typing import Any

from captioning import distributed
from captioning.evaluation import Task, captions_of_images
from metrics_utils import (
    cider_of_each,
)

BEAMS, LENGTH_PENALTIES = (1, 2, 3, 4, 5, 8), (0.0, 0.4, 0.7, 1.0, 1.3)  # what `--mode tune` tries


def tune(task: Task) -> dict[str, Any]:
    """Try beam sizes and length penalties on the validation images; returns what gave the best CIDEr."""
    images = task.data.splits["val"]
    references = [task.data.references(image) for image in images]
    found: list[tuple[float, int, float]] = []
    print(f"CIDEr on {len(images)} validation images, by beam size and length penalty:")
    print("      " + "".join(f"{penalty:>8}" for penalty in LENGTH_PENALTIES))
    for beam in BEAMS:
        line = f"{beam:>6}"
        for penalty in LENGTH_PENALTIES if beam > 1 else LENGTH_PENALTIES[:1]:  # greedy decoding compares no lengths
            captions = captions_of_images(task, images, beam, penalty)
            cider = distributed.from_first(lambda: float(cider_of_each(captions, references).mean()))  # noqa: B023
            found.append((cider, beam, penalty))
            line += f"{100 * cider:8.2f}"
        print(line, flush=True)
    cider, beam, penalty = max(found, key=lambda entry: (entry[0], -entry[1]))
    return {"beam_size": beam, "length_penalty": penalty, "cider": cider, "images": len(images)}
