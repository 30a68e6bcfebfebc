"""Draw the charts of docs/benchmarks.md from a result of run.py.

python benchmarks/charts.py benchmark_results/DATE.json
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Picture

OURS, OTHER = "#1f6fb4", "#b8b8b8"


def short(value: float) -> str:
    """Three digits, without an exponent: 1439.2 -> '1,439', 48.44 -> '48.4'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bars(figures: list[dict[str, Any]], title: str, unit: str) -> Picture:
    """A pair of horizontal bars per figure, ours and its baseline, with the ratio; the longer bar may be either."""
    picture, axes = plt.subplots(figsize=(8, 0.8 + 0.62 * len(figures)))
    for place, figure in enumerate(reversed(figures)):
        for value, step, color, text in (
            (figure["value"], 0.18, OURS, f" ({figure['ratio']:.3g} times)"),
            (figure["baseline"], -0.18, OTHER, f": {figure['against']}"),
        ):
            axes.barh(place + step, value, 0.34, color=color)
            axes.text(value, place + step, f" {short(value)}{text}", va="center", fontsize=8)
    axes.set_yticks(range(len(figures)), [figure["name"] for figure in reversed(figures)], fontsize=8)
    axes.set_xlim(0, 1.6 * max(max(figure["value"], figure["baseline"]) for figure in figures))
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def rates(part: str, title: str, result: dict[str, Any]) -> Picture | None:
    """Images/s that are encoded or captioned."""
    figures = [f for f in result["figures"] if f["part"] == part and f["unit"] in ("images/s", "views/s")]
    return bars(figures, title, "per second") if figures else None


def epochs(result: dict[str, Any]) -> Picture | None:
    """Epoch times on a logarithmic axis: original, cached, ours."""
    groups: dict[str, dict[str, float]] = {}
    for figure in result["figures"]:
        if figure["part"] == "epoch" and ": epoch / " in figure["name"]:
            name, _, way = figure["name"].partition(": epoch / ")
            groups.setdefault(name, {})[way] = figure["baseline"]
            groups[name]["ours"] = figure["value"]
    if not groups:
        return None
    picture, axes = plt.subplots(figsize=(8, 1 + 0.75 * len(groups)))
    shades = {"the original's way": OTHER, "cached features": "#85b4d9", "ours": OURS}
    for place, group in enumerate(reversed(list(groups.values()))):
        for step, (way, color) in enumerate(shades.items()):
            axes.barh(place + 0.25 * (1 - step), group[way], 0.23, color=color, label=way if place == 0 else None)
            axes.text(group[way], place + 0.25 * (1 - step), f" {short(group[way])} s", va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), list(reversed(groups)), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of an epoch (logarithmic)")
    axes.set_title("An epoch after the first, batches of 128 captions", fontsize=10, loc="left", x=-0.2)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0 - 0.15 / len(groups)), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def memory(result: dict[str, Any]) -> Picture | None:
    """Peak memory and time per image over the number of images."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for figure in result["figures"]:
        if figure["part"] == "memory" and " images, " in figure["name"]:
            size, _, what = figure["name"].partition(" images, ")
            lines.setdefault(f"{what} ({figure['unit']})", []).append((int(size.replace(",", "")), figure["value"]))
    if not lines:
        return None
    kinds = ("peak anonymous memory", "building the data", "training")
    picture, panels = plt.subplots(1, len(kinds), figsize=(10, 3))
    for panel, kind in zip(panels, kinds, strict=True):
        for name, points in lines.items():
            if kind in name:
                panel.plot(*zip(*points, strict=True), marker="o", label=name.partition(" run")[0] + " run")
                panel.set_title(f"{kind} {name[name.rindex('(') :]}", fontsize=9, loc="left")
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_xlabel("images")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    return picture


CHARTS: dict[str, Callable[[dict[str, Any]], Picture | None]] = {
    "encoding": partial(rates, "encoding", "Encoding: ours (blue) and the baseline"),
    "epochs": epochs,
    "decoding": partial(rates, "decoding", "Captioning: many images at once (blue) and one at a time"),
    "memory": memory,
}


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw what the result has figures of; returns the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON written by run.py")
    parser.add_argument("--directory", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text(encoding="utf-8"))
    facts = result["machine"]
    where = f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, {result['date'][:10]}"
    drawn = []
    for name, draw in CHARTS.items():
        if picture := draw(result):
            picture.text(0.99, 0.005, where, ha="right", va="bottom", fontsize=6, color="gray")
            drawn.append(args.directory / f"benchmark_{name}.png")
            save(picture, drawn[-1])
    return drawn


def save(picture: Picture, path: Path) -> None:
    """A PNG of few colours, which keeps the repository small."""
    from PIL import Image

    buffer = io.BytesIO()
    picture.savefig(buffer, dpi=110, bbox_inches="tight")
    plt.close(picture)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
