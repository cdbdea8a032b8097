"""Reliability diagrams: how often a model is right where it is that sure, over how often it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.plots import picture, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4  # at most
_COLOURS = {"before": "#c44e52", "after": "#4c72b0"}


def draw_reliability(models: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """One panel a model, before and after its temperature; returns `file`, `title` and `alt`.

    Args:
        models: as `calibration` gives them.
        folder: where calibration-reliability.png is written.
    """
    file = "calibration-reliability.png"
    rows = -(-len(models) // _COLUMNS)
    columns = -(-len(models) // rows)
    with picture(folder / file, 2.7 * columns + 0.6, 3.9 * rows, "whitegrid") as figure:
        heights = [height for _ in range(rows) for height in (3, 1)]
        axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=heights)
        for number in range(rows * columns):
            row, column = divmod(number, columns)
            pair = axes[2 * row, column], axes[2 * row + 1, column]
            if number < len(models):
                name = list(models)[number]
                _panel(*pair, name, models[name], first=column == 0)
            else:
                for axis in pair:
                    axis.set_visible(False)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    title = "Reliability: how often an answer is right, by how sure it is"
    return {"file": file, "title": title, "alt": _alt(models)}


def _panel(above: Axes, below: Axes, name: str, row: Mapping[str, Any], first: bool) -> None:
    """A point a bin, its area by the images in it; below, how many these are."""
    above.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", zorder=1)
    most = max(part["count"] for stage in _COLOURS for part in row[stage]["bins"])
    for stage, colour in _COLOURS.items():
        parts = row[stage]["bins"]
        x, y, low, high, counts = (
            np.array([part[key] for part in parts])
            for key in ("confidence", "accuracy", "low", "high", "count")
        )
        above.plot(x, y, color=colour, linewidth=0.8, alpha=0.5, zorder=2)
        area = 12 + 90 * np.sqrt(counts / most)
        above.scatter(x, y, area, color=colour, alpha=0.75, linewidth=0, label=stage, zorder=3)
        below.bar(low, counts, width=high - low, align="edge", color=colour, alpha=0.5, linewidth=0)
    before, after = row["before"]["ece"]["value"], row["after"]["ece"]["value"]
    above.set_title(
        f"{shorten(name, 26)}\nECE {before:.3f} → {after:.3f} at T = {row['temperature']:.2f}", fontsize=9
    )
    above.set(xlim=(0, 1.02), ylim=(-0.04, 1.06), ylabel="share that is right" if first else "")
    below.set(xlim=(0, 1.02), yscale="log", ylim=(0.8, 2 * most), xlabel="confidence")
    below.set_ylabel("images" if first else "")
    below.yaxis.set_major_formatter("{x:g}")
    below.minorticks_off()


def _alt(models: Mapping[str, Mapping[str, Any]]) -> str:
    name, row = next(iter(models.items()))
    before, after = row["before"]["ece"]["value"], row["after"]["ece"]["value"]
    return (
        f"One diagram a model: the share of right answers against confidence, with the number of images in "
        f"each bin below, before and after temperature scaling. ECE of {name}: {before:.3f} before, "
        f"{after:.3f} after."
    )
