"""TensorBoard's files: losses, learning rate, scores and pictures of each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.io import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_tensorboard() -> None:
    """Make sure, before hours of training, that its files can be written.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs a package that is not installed ({error}): python -m pip install tensorboard==2.21.0"
        ) from None


def write_tensorboard(directory: Path, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Figure]) -> None:
    """Add the last epoch to `directory/tensorboard`.

    Each epoch is a file of its own that voids what was written of it or of later ones before, so that an epoch may be
    written twice. Where there is no such folder yet, the curves of earlier epochs are written too.

    Args:
        rows: a row per epoch, as `directories.training_rows` makes them.
        figures: pictures of the last epoch by name.

    Raises:
        UserError: the files cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder, epoch = directory / "tensorboard", rows[-1]["epoch"]
    try:
        first_time = not folder.is_dir()
        with SummaryWriter(str(folder), purge_step=epoch) as writer:  # type: ignore[no-untyped-call]
            for row in rows if first_time else rows[-1:]:
                for name, value in row.items():
                    if name != "epoch" and value is not None:
                        group = "loss/" if name.endswith("_loss") else "" if name == "learning_rate" else "validation/"
                        writer.add_scalar(group + name.removesuffix("_loss"), value, row["epoch"])  # type: ignore[no-untyped-call]
            for name, figure in figures.items():
                writer.add_figure(name, figure, epoch, close=False)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}. Free some space, or continue without --tensorboard"
        ) from error
