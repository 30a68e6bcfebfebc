"""What shows how training goes: where the time of an epoch goes, and TensorBoard's files."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment_utils import training_rows
from safe_io import UserError

if TYPE_CHECKING:
    from caption_data import CaptionSet


class Stopwatch:
    """Adds up the seconds that each part of the program takes; the time since the lap before is the part's.

    A GPU works on while the program goes on: its time shows in whatever part waits for it.
    """

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.reported: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def share(self, part: str) -> float:
        """How much of all time so far went into this part, from 0 to 1."""
        return self.seconds.get(part, 0.0) / max(sum(self.seconds.values()), 1e-9)

    def report(self) -> str:
        """The parts and their seconds since the report before, e.g. `steps 12.1 s, drawing 0.4 s`."""
        spent = {part: seconds - self.reported.get(part, 0.0) for part, seconds in self.seconds.items()}
        self.reported = dict(self.seconds)
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in spent.items() if seconds >= 0.05)


def require_tensorboard() -> None:
    """Make sure before hours of training that its files can be written.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs a package that is not installed ({error}): python -m pip install tensorboard==2.21.0"
        ) from None


def write_tensorboard(
    directory: Path,
    curve: Mapping[str, Sequence[Any]],
    history: Sequence[Mapping[str, Any]],
    data: CaptionSet,
    spoken: Sequence[tuple[int, Sequence[str], np.ndarray | None]],
) -> None:
    """Add the last epoch to `directory/tensorboard`: losses, learning rate, scores, captions, attention.

    Each epoch is a file of its own that voids what was written of it or of later ones before, so that an epoch
    may be written twice. Where there is no such folder yet, the curves of earlier epochs are written too.

    Args:
        curve, history: the content of `loss_curve.json` and `metrics_history.json`.
        spoken: an image's position in `data`, its caption's words, and where each word looked ((words, 49) or None).

    Raises:
        UserError: the files cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    import plots
    from attention_visualization import attention_figure
    from caption_data import UnreadableImage, open_image

    folder = directory / "tensorboard"
    rows = training_rows(curve, history)
    epoch = rows[-1]["epoch"]
    samples, looked = [], None
    for image, words, attention in spoken:
        name = data.names[image]
        try:
            picture = open_image(data.image_dir / name, at_least=400)
        except UnreadableImage:
            continue
        references = data.references(image)
        samples.append({"image": picture, "name": name, "caption": " ".join(words), "references": references})
        if looked is None and attention is not None and words:
            looked = attention_figure(picture, words, attention, name)
    pictures = {"captions": plots.captions_figure(samples)} if samples else {}
    if looked is not None:
        pictures["attention"] = looked
    try:
        first_time = not folder.is_dir()
        with SummaryWriter(str(folder), purge_step=epoch) as writer:  # type: ignore[no-untyped-call]
            for row in rows if first_time else rows[-1:]:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        group = "loss/" if name.endswith("_loss") else "" if name == "learning_rate" else "validation/"
                        writer.add_scalar(group + name.removesuffix("_loss"), value, row["epoch"])  # type: ignore[no-untyped-call]
            for name, figure in pictures.items():
                writer.add_image(name, plots.pixels_of(figure), epoch, dataformats="HWC")  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}. Free some space, or go on without --tensorboard") from error
