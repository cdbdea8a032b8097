"""The picture of accuracy and agreement class by class: numbers in, a PNG file out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.plots import picture, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IN_ORDER = 30
"""Classes that are shown in the order of the data; more are sorted."""
MOST = 100
"""Classes in a picture."""
_CONTROLS = ("independent", "labels", "best-teacher")
Rows = Sequence[Mapping[str, Any]]


def draw_classes(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The student beside one control, or the first two models; returns `file`, `title` and `alt`.

    Up to `IN_ORDER` classes stand in their order; of more, those with the lowest agreement of the first
    network come first, and the first `MOST` are shown. Classes without images are left out.

    Args:
        numbers: what agreement.json holds, some class of which has images.
        path: of the PNG file.
    """
    networks = _shown(list(numbers["by_class"][0]["agreement"]))
    every = [row for row in numbers["by_class"] if row["n"]]
    rows = every
    if len(every) > IN_ORDER:
        rows = sorted(every, key=lambda row: float(row["agreement"][networks[0]]["value"]))[:MOST]
    reference = shorten(numbers["reference"], 20)
    step = 0.34 if len(rows) <= IN_ORDER else 0.2
    with picture(path, 9, 1.2 + step * len(rows), "whitegrid") as figure:
        axes = figure.subplots(1, 2, sharey=True)
        _dots(axes[0], rows, networks, "accuracy")
        _dots(axes[1], rows, networks, "agreement")
        axes[0].set_yticks(range(len(rows)), [f"{shorten(row['class'], 24)} ({row['n']:,})" for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        axes[0].set_xlabel("accuracy, % of the images of each class")
        axes[1].set_xlabel(f"same answer as {reference}, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    first = shorten(networks[0])
    order = f", those first on which {first} agrees least" if len(every) > IN_ORDER else ""
    cut = f": {len(rows)} of {len(every)} classes" if len(rows) < len(every) else ""
    return {
        "file": path.name,
        "title": f"Class by class, with Wilson's intervals of 95 %{order}{cut}",
        "alt": _alt(rows, networks, reference),
    }


def _shown(networks: Sequence[str]) -> list[str]:
    """The first network, and the control that says most, or the next model."""
    first, *others = networks
    control = next((name for name in _CONTROLS if name in others), None)
    return [first, control] if control else [first, *others[:1]]


def _dots(axis: Axes, rows: Rows, networks: Sequence[str], measure: str) -> None:
    import seaborn as sns

    colours = sns.color_palette("colorblind", len(networks))
    for place, (name, colour) in enumerate(zip(networks, colours, strict=True)):
        found = [row[measure][name] for row in rows]
        value, low, high = (100 * np.array([one[key] for one in found]) for key in ("value", "low", "high"))
        y = np.arange(len(rows)) + 0.3 * (place - (len(networks) - 1) / 2)
        axis.hlines(y, low, high, color=colour, linewidth=1.5, alpha=0.6)
        axis.plot(value, y, "os"[place], color=colour, markersize=4, label=shorten(name))
    axis.set_xlim(_least(rows, networks) - 2, 102)
    axis.tick_params(labelsize=8)


def _least(rows: Rows, networks: Sequence[str]) -> float:
    """The tens below the lowest end of an interval, so that models that are good can be told apart."""
    lows = [row[key][name]["low"] for row in rows for key in ("accuracy", "agreement") for name in networks]
    return 10 * math.floor(10 * min(lows))


def _alt(rows: Rows, networks: Sequence[str], reference: str) -> str:
    first = networks[0]
    least = {
        measure: min(rows, key=lambda row: float(row[measure][first]["value"]))
        for measure in ("accuracy", "agreement")
    }
    said = " and ".join(
        f"lowest {measure} is {100 * row[measure][first]['value']:.0f} %, on {shorten(row['class'])}"
        for measure, row in least.items()
    )
    who = " and ".join(shorten(name) for name in networks)
    return (
        f"A row for each of {len(rows)} classes, with the number of its images: dots with intervals for the accuracy "
        f"of {who}, and for how often each gives the answer of {reference}. Of {shorten(first)} the {said}."
    )
