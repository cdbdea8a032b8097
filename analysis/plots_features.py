"""Pictures of layers beside layers: numbers in, PNG files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.plots import picture, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_ROWS = 8
"""Most in a picture."""
_WRITTEN = 9
"""Most layers of the models in a picture for numbers to be written into the squares."""
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_MEASURES = {
    "penultimate": "penultimate",
    "logits": "logits",
    "matches": "best matches",
    "mutual_knn": "neighbours",
}


@dataclass(frozen=True)
class Panel:
    """CKA of the layers of `y` (rows) and of `x` (columns)."""

    y: str
    x: str
    y_layers: Sequence[str]
    x_layers: Sequence[str]
    values: np.ndarray

    @classmethod
    def of(cls, numbers: Mapping[str, Any], y: str, x: str) -> Panel:
        """Two models, or one and itself, from what features.json holds."""
        layers = numbers["layers"]
        if y == x:
            values = np.array(numbers["self"][y])
        else:
            pair = next(p for p in numbers["pairs"] if {p["first"], p["second"]} == {y, x})
            values = np.array(pair["cka"]) if pair["first"] == y else np.array(pair["cka"]).T
        return cls(y, x, layers[y], layers[x], values)


def draw_features(numbers: Mapping[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """All pictures of the analysis, as the file, title and alternative text of each by key.

    Args:
        numbers: what features.json holds.
        folder: where they are written.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in ("control", "teacher", "model")}
    for name, role in numbers["roles"].items():
        kinds.setdefault(role, []).append(name)
    teachers = kinds["teacher"]
    student = [[("student", teacher) for teacher in teachers]]
    controls = [[(control, teacher) for teacher in teachers] for control in kinds["control"]]
    grids = {
        "teachers": ("Layers of the student beside those of each teacher", student),
        "controls": ("Layers of the controls beside those of each teacher", controls),
        "self": ("Layers of the student beside themselves", [[("student", "student")]] if teachers else []),
        "between": ("Layers of the teachers beside each other", [list(combinations(teachers, 2))]),
        "models": ("Layers of each pair of models", [list(combinations(kinds["model"], 2))]),
    }
    pictures = {}
    for key, (title, grid) in grids.items():
        rows = [row[k : k + _COLUMNS] for row in grid for k in range(0, len(row), _COLUMNS)]
        if rows:
            cut = f" (the first {_ROWS} of {len(rows)} rows)" if len(rows) > _ROWS else ""
            panels = [[Panel.of(numbers, *pair) for pair in row] for row in rows[:_ROWS]]
            draw_panels(panels, folder / f"features-{key}.png")
            pictures[key] = {
                "file": f"features-{key}.png",
                "title": f"{title}{cut}; bold or a dot: the most similar in each row",
                "alt": _alt(panels),
            }
    if numbers["gains"]:
        pictures["gains"] = _draw_gains(numbers["gains"], folder)
    return pictures


def draw_panels(grid: Sequence[Sequence[Panel]], path: Path) -> None:
    """A heat map a panel, origin below, colours fixed to 0–1; the best match of each row is bold, or a dot."""
    import matplotlib as mpl

    shapes = [panel.values.shape for row in grid for panel in row]
    written = max(map(max, shapes)) <= _WRITTEN
    cell = 0.42 if written else 0.24
    widths = [max(len(row[k].x_layers) for row in grid if k < len(row)) for k in range(len(grid[0]))]
    heights = [max(len(panel.y_layers) for panel in row) for row in grid]
    beside, below = (0.085 * _longest(grid, axis) + 0.5 for axis in ("y_layers", "x_layers"))
    width, height = cell * sum(widths) + beside * len(widths) + 1, cell * sum(heights) + below * len(heights)
    colours = mpl.colormaps["magma"].with_extremes(bad="0.7")
    with picture(path, width, height) as figure:
        axes = figure.subplots(
            len(heights), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights
        )
        for axis in axes.flat:
            axis.set_visible(False)
        for places, row in zip(axes, grid, strict=True):
            for axis, panel in zip(places, row, strict=False):
                axis.set_visible(True)
                image = axis.imshow(panel.values, colours, vmin=0, vmax=1, origin="lower")
                _label(axis, panel)
                _mark(axis, panel.values, written)
        figure.colorbar(image, ax=axes, label="CKA", shrink=min(1, 3 / height))


def _label(axis: Axes, panel: Panel) -> None:
    x, y = ([shorten(name, 24) for name in names] for names in (panel.x_layers, panel.y_layers))
    axis.set_xticks(range(len(x)), x, rotation=90, fontsize=8)
    axis.set_yticks(range(len(y)), y, fontsize=8)
    axis.set_xlabel(shorten(panel.x, 28))
    axis.set_ylabel(shorten(panel.y, 28))


def _mark(axis: Axes, values: np.ndarray, written: bool) -> None:
    for row, cells in enumerate(values):
        if np.isnan(cells).all():
            continue
        best = int(np.nanargmax(cells))
        if not written:
            ink = "black" if cells[best] > 0.6 else "white"
            axis.plot(best, row, "o", color=ink, markersize=3)
            continue
        for column in map(int, np.flatnonzero(np.isfinite(cells))):
            ink = "black" if cells[column] > 0.6 else "white"
            weight = "bold" if column == best else "normal"
            text = f"{cells[column] + 0.0:.2f}".replace("-0.00", "0.00")
            axis.text(column, row, text, color=ink, weight=weight, size=7, ha="center", va="center")


def _alt(grid: Sequence[Sequence[Panel]]) -> str:
    panel = grid[0][0]
    text = (
        "Heat maps of CKA between layers, each axis in the order of execution, dark for 0 and light for 1; "
        "the most similar layer of each row is in bold, or has a dot."
    )
    if panel.y == panel.x:
        return text
    value = panel.values[list(panel.y_layers).index("penultimate"), list(panel.x_layers).index("penultimate")]
    shown = "unknown" if np.isnan(value) else f"{value:.2f}"
    return f"{text} Between the penultimate layers of {panel.y} and {panel.x} CKA is {shown}."


def _draw_gains(gains: Mapping[str, Any], folder: Path) -> dict[str, str]:
    file = "features-gains.png"
    with picture(folder / file, 7.5, 0.9 + 0.55 * len(_MEASURES) + 0.22 * len(gains), "whitegrid") as figure:
        _points(figure, gains)
    control, found = next(iter(gains.items()))
    first = found["mean"]["penultimate"]
    shown = interval(first, 1, 3, sign="+", unknown=f"unknown ({first.get('reason')})")
    return {
        "file": file,
        "title": "Similarity to the teachers that was gained by distilling, on average over them",
        "alt": (
            "Student minus each control, in similarity to the teachers, with 95 % intervals over images. CKA of "
            f"the penultimate layers: {shown} over {control}."
        ),
    }


def _points(figure: Figure, gains: Mapping[str, Any]) -> None:
    axis = figure.subplots()
    step = 0.7 / len(gains)
    for k, (control, found) in enumerate(gains.items()):
        rows = [found["mean"][key] for key in _MEASURES]
        value, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
        places = np.arange(len(rows)) + (k - (len(gains) - 1) / 2) * step
        colour = _COLOURS[k % len(_COLOURS)]
        axis.hlines(places, low, high, color=colour, linewidth=2)
        axis.plot(value, places, "o", color=colour, markersize=6, label=f"over {shorten(control)}")
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(_MEASURES)), list(_MEASURES.values()))
    axis.invert_yaxis()
    axis.set_xlabel("student minus control: CKA, and share of neighbours")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _longest(grid: Sequence[Sequence[Panel]], side: str) -> int:
    return max(len(shorten(name, 24)) for row in grid for panel in row for name in getattr(panel, side))
