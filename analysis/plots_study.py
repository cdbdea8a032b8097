"""Pictures of a study: curves with bands over seeds, heat maps and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.intervals import interval, t_interval
from ensemble_kd.analysis.plots import picture, shorten
from ensemble_kd.analysis.study_numbers import GAINS, MEASURES, told

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = {
    "accuracy": "validation accuracy, %",
    "loss": "validation loss, % of its maximum",
    "teacher_student_cross_entropy": "teacher–student CE, % of its maximum",
}
_MOST_LINES = 9
Numbers = Mapping[str, Any]


def draw_curves(path: Path, curves: Sequence[Mapping[str, Any]], numbers: Numbers) -> dict[str, str]:
    """Accuracy, loss and teacher–student cross-entropy against iterations, with t intervals over seeds."""
    import pandas as pd
    import seaborn as sns

    table = pd.DataFrame(curves)
    hue = _hue(numbers)
    seeds = int(table["seed"].nunique())
    panels = [name for name in _PANELS if (table["measure"] == name).any()]
    with picture(path, 5 * len(panels), 4.6, "whitegrid") as figure:
        for axis, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            part = table[(table["measure"] == name) & table[hue].notna()]
            # Runs of other settings are no further seeds: first their mean by seed.
            part = part.groupby([hue, "seed", "step"], sort=False, as_index=False)[["percent"]].mean()
            band = _band if seeds > 1 else None
            sns.lineplot(part, x="step", y="percent", hue=hue, errorbar=band, palette="viridis", ax=axis)
            axis.set(title=_PANELS[name], xlabel="iterations", ylabel="")
            axis.set_ylim(max(0, axis.get_ylim()[0]), min(100, axis.get_ylim()[1]))
            if axis.get_legend() and name != panels[0]:
                axis.get_legend().remove()  # one legend serves all panels
    shown = "by point" if hue == "point" else f"by {hue}, averaged over the other settings"
    bands = f" with 95 % t intervals over {seeds} seeds" if seeds > 1 else ""
    alt = f"Validation curves {shown}{bands}, of {table[hue].nunique()} lines; the losses as percentages of their maximum."
    return {"file": path.name, "title": "Curves", "alt": alt}


def _hue(numbers: Numbers) -> str:
    """What the lines of the curves stand for: points, or where these are too many, values of a dimension."""
    if len(numbers["points"]) <= _MOST_LINES:
        return "point"
    counts = {d: len({s[d] for s in numbers["settings"].values() if d in s}) for d in numbers["dimensions"]}
    several = [d for d, count in counts.items() if 1 < count <= _MOST_LINES]
    return several[0] if several else "point"


def _band(values: Any) -> tuple[float, float]:
    found = t_interval(list(values))
    return found["low"], found["high"]


def draw_measure(path: Path, measure: str, numbers: Numbers) -> dict[str, str]:
    """Differences to the baseline, or means where there is none: heat maps, or points with intervals."""
    kind = "differences" if numbers["against"] and measure not in GAINS else "means"
    if not any(point[kind] for point in numbers["points"].values()):
        kind = "means"  # no baseline could be finished
    found = {name: point[kind][measure] for name, point in numbers["points"].items() if point[kind]}
    title = MEASURES[measure][0] + (f" − {numbers['against']}" if kind == "differences" else "")
    grid = _grid(list(found), numbers)
    if grid is None:
        _draw_points(path, measure, found, title)
    else:
        _draw_maps(path, measure, found, title, grid, numbers)
    highest = max(found, key=lambda name: found[name]["value"])
    lowest = min(found, key=lambda name: found[name]["value"])
    alt = (
        f"{title} of {len(found)} points. Highest: {highest}, {told(measure, found[highest])}; "
        f"lowest: {lowest}, {told(measure, found[lowest])}."
    )
    return {"file": path.name, "title": title, "alt": alt}


def _grid(names: Sequence[str], numbers: Numbers) -> list[list[str]] | None:
    """Rows, columns and panels (dimensions) of heat maps; None where points are no such grid."""
    settings = [numbers["settings"][name] for name in names]
    values = {d: list(dict.fromkeys(s[d] for s in settings if d in s)) for d in numbers["dimensions"]}
    several = [d for d, own in values.items() if len(own) > 1]
    full = len(names) == np.prod([len(values[d]) for d in several], dtype=int)
    if len(several) not in (2, 3) or not full or not all(d in s for s in settings for d in several):
        return None
    *panel, row, column = sorted(several, key=lambda d: len(values[d]))
    panels = [*panel, ""][:1]
    return [panels, [row], [column], *(values.get(d, [""]) for d in (panels[0], row, column))]


def _draw_maps(
    path: Path,
    measure: str,
    found: Mapping[str, Mapping[str, float]],
    title: str,
    grid: Sequence[list[str]],
    numbers: Numbers,
) -> None:
    (panel,), (row,), (column,), panels, rows, columns = grid
    scale = MEASURES[measure][1]
    width, height = 1.3 * len(columns) + 2.2, 0.75 * len(rows) + 1.8
    reach = max(abs(scale * value["value"]) for value in found.values()) or 1.0
    span: dict[str, Any] = {"cmap": "vlag", "vmin": -reach, "vmax": reach}
    if not numbers["against"] and measure not in GAINS:
        span = {"cmap": "viridis"}
    with picture(path, width * len(panels), height) as figure:
        for axis, own in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            at = {
                (numbers["settings"][name][row], numbers["settings"][name][column]): value
                for name, value in found.items()
                if not panel or numbers["settings"][name][panel] == own
            }
            cells = [[at[r, c] for c in columns] for r in rows]
            _heat_map(axis, measure, cells, span)
            axis.set_xticklabels([shorten(c, 20) for c in columns])
            axis.set_yticklabels([shorten(r, 20) for r in rows], rotation=0)
            axis.set(xlabel=column, ylabel=row, title=f"{panel} = {shorten(own, 30)}" if panel else "")
        _title(figure, measure, title)


def _heat_map(
    axis: Axes, measure: str, cells: Sequence[Sequence[Mapping[str, float]]], span: Mapping[str, Any]
) -> None:
    import seaborn as sns

    _, scale, digits, _ = MEASURES[measure]
    values = np.array([[scale * cell["value"] for cell in line] for line in cells])
    notes = [
        [interval(cell, scale, digits, sign="+").replace(" ", "\n", 1) for cell in line] for line in cells
    ]
    sns.heatmap(values, annot=np.array(notes), fmt="", annot_kws={"size": 7}, ax=axis, **span)


def _draw_points(path: Path, measure: str, found: Mapping[str, Mapping[str, float]], title: str) -> None:
    scale = MEASURES[measure][1]
    names = list(found)
    at = np.arange(len(names))
    values, low, high = (
        np.array([scale * found[name][key] for name in names]) for key in ("value", "low", "high")
    )
    with picture(path, 8, 0.3 * len(names) + 1.4, "whitegrid") as figure:
        axis = figure.subplots()
        bars = np.nan_to_num(np.stack([values - low, high - values]))
        axis.errorbar(values, at, xerr=bars, fmt="o", capsize=3, color="#0969da")
        if title != MEASURES[measure][0] or measure in GAINS:
            axis.axvline(0, color="#57606a", linewidth=1)
        axis.set_yticks(at, [shorten(name, 60) for name in names])
        axis.invert_yaxis()
        _title(figure, measure, title)


def _title(figure: Figure, measure: str, title: str) -> None:
    unit = MEASURES[measure][3].strip()
    figure.suptitle(f"{title}{f' ({unit})' if unit else ''}: mean over seeds, 95 % t interval", fontsize=10)
