"""Pictures of planes through three images: numbers in, PNG files out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.pairs import matrix
from ensemble_kd.analysis.plots import draw_heat_maps, picture, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 4
"""Planes in a picture."""
_MARKERS = ("o", "^", "s")
_NAMED = 40  # classes in a legend
_SIDE = 1.75  # of a plane, in inches

# To linear sRGB as a deuteranope sees it (Machado, Oliveira and Fernandes 2009, severity 1).
_DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


@dataclass(frozen=True)
class Shown:
    """One plane of P×P points as it is drawn."""

    thumbnails: np.ndarray
    """The three images (3, H, W, 3), in [0, 1]."""
    classes: Sequence[str]
    """Theirs."""
    corners: np.ndarray
    """Their coordinates (3, 2)."""
    box: tuple[float, float, float, float]
    """Left, right, bottom and top."""
    answers: Mapping[str, np.ndarray]
    """Classes (P, P) by model."""
    confidence: Mapping[str, np.ndarray]
    """Probabilities of these (P, P) by model."""


@dataclass(frozen=True)
class Palette:
    """One colour for each class in all pictures of an analysis."""

    classes: Sequence[str]
    colours: Mapping[int, np.ndarray]
    """RGB in [0, 1] by class, of those that are shown."""

    @classmethod
    def of(cls, planes: Sequence[Shown], classes: Sequence[str]) -> Palette:
        """For all classes where there are up to ten, so that they look alike in all runs; else for those that occur."""
        few = range(len(classes)) if len(classes) <= 10 else sorted(_areas(planes))
        return cls(classes, dict(zip(few, distinct_colours(len(few)), strict=True)))

    def paint(self, answers: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """RGB (P, P, 3): the colour of each point's class on white, as opaque as the model is sure."""
        labels, index = np.unique(answers, return_inverse=True)
        solid = np.stack([self.colours[int(label)] for label in labels])[index.reshape(answers.shape)]
        return 1 - confidence[..., None] * (1 - solid)


def distinct_colours(count: int) -> np.ndarray:
    """RGB (count, 3) in [0, 1]: seaborn's colour-blind palette, and where ten are not enough, more.

    Each further one is the candidate that is farthest in CIELAB from all before it, to those who see all
    colours and to deuteranopes, whichever distance is less.
    """
    import seaborn as sns

    first = np.array(sns.color_palette("colorblind", 10))
    steps = np.linspace(0, 1, 12)
    candidates = np.stack(np.meshgrid(steps, steps, steps), axis=3).reshape(-1, 3)
    # Neither too dark for a black marker, nor too light to be told from an unsure colour.
    lightness = _lab(candidates, np.eye(3))[:, 0]
    candidates = candidates[(lightness > 25) & (lightness < 85)]
    eyes = (np.eye(3), _DEUTERANOPIA)
    colours = list(first[:count])
    nearest = np.full(len(candidates), np.inf)
    for number in range(count):
        if number == len(colours):
            colours.append(candidates[nearest.argmax()])
        for eye in eyes:
            apart = np.linalg.norm(_lab(candidates, eye) - _lab(colours[number][None], eye), axis=1)
            nearest = np.minimum(nearest, apart)
    return np.array(colours)


def _lab(colours: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """CIELAB (N, 3) of sRGB colours, as they are seen by an eye given as a matrix on linear RGB."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ eye.T, 0, 1) @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def _areas(planes: Sequence[Shown]) -> Counter[int]:
    """On how many points of all models each class occurs."""
    found: Counter[int] = Counter()
    for plane in planes:
        for answers in plane.answers.values():
            labels, counts = np.unique(answers, return_counts=True)
            found.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
    return found


def draw_planes(
    planes: Sequence[Shown],
    titles: Mapping[str, str],
    masks: Sequence[tuple[str, str]],
    palette: Palette,
    path: Path,
) -> None:
    """One row a plane: its three images, what each model says on it, and where pairs of models differ.

    Args:
        planes: the rows.
        titles: of the models to show, by name.
        masks: pairs of them, for the columns of differences.
        palette: of all classes that they say.
        path: of the PNG file.
    """
    columns = len(titles) + len(masks)
    apart = [f"{shorten(first, 22)}\n≠ {shorten(second, 20)}" for first, second in masks]
    width, legend = 0.8 + _SIDE * columns, _legend_entries(palette, planes)
    across = max(1, int(12 * width / (6 + max(len(text) for text, _ in legend))))
    height = _SIDE * len(planes) + 1 + 0.17 * ceil(len(legend) / across)
    with picture(path, width, height) as figure:
        grid = figure.add_gridspec(len(planes), 1 + columns, width_ratios=[0.35] + [1] * columns)
        for number, plane in enumerate(planes):
            _thumbnails(figure.add_subplot(grid[number, 0]), plane)
            axes = [figure.add_subplot(grid[number, 1 + column]) for column in range(columns)]
            for axis, name in zip(axes, titles, strict=False):
                _panel(axis, plane, palette.paint(plane.answers[name], plane.confidence[name]))
            for axis, (first, second) in zip(axes[len(titles) :], masks, strict=True):
                differ = plane.answers[first] != plane.answers[second]
                _panel(axis, plane, np.where(differ[..., None], (0.75, 0.1, 0.1), (0.93, 0.93, 0.93)))
                axis.set_xlabel(f"differ on {100 * differ.mean():.1f} %", fontsize=8)
            if number == 0:
                for axis, title in zip(axes, [*titles.values(), *apart], strict=True):
                    axis.set_title(title, fontsize=9)
        _legend(figure, legend, across)


def _thumbnails(axis: Axes, plane: Shown) -> None:
    """The three images of a plane below each other, each with its class and its marker."""
    _, height, width, _ = plane.thumbnails.shape
    tall, room = height / width, 0.4
    for which, (pixels, marker) in enumerate(zip(plane.thumbnails, _MARKERS, strict=True)):
        bottom = (2 - which) * (tall + room)
        axis.imshow(pixels, extent=(0, 1, bottom, bottom + tall), interpolation="nearest")
        axis.text(0.5, bottom + tall, shorten(plane.classes[which], 14), fontsize=7, ha="center", va="bottom")
        _mark(axis, marker, -0.25, bottom + tall / 2)
    axis.set(xlim=(-0.5, 1), ylim=(0, 3 * (tall + room)))
    axis.axis("off")


def _panel(axis: Axes, plane: Shown, colours: np.ndarray) -> None:
    left, right, bottom, top = plane.box
    # Half a step more on each side: the outer points of the grid are on the sides of the box.
    x, y = (size / (2 * (len(colours) - 1)) for size in (right - left, top - bottom))
    extent = (left - x, right + x, bottom - y, top + y)
    axis.imshow(colours, origin="lower", extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    for marker, (x, y) in zip(_MARKERS, plane.corners, strict=True):
        _mark(axis, marker, x, y)


def _mark(axis: Axes, marker: str, x: float, y: float) -> None:
    axis.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=6)


def _legend_entries(palette: Palette, planes: Sequence[Shown]) -> list[tuple[str, Any]]:
    """Name and colour of the classes that occur, those on most points where they are many."""
    areas = _areas(planes)
    named = sorted(label for label, _ in areas.most_common(_NAMED))
    entries = [(shorten(palette.classes[label], 20), palette.colours[label]) for label in named]
    more = [(f"… and {len(areas) - len(named)} more", "none")] if len(areas) > len(named) else []
    return entries + more


def _legend(figure: Figure, entries: Sequence[tuple[str, Any]], across: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour) for _, colour in entries]
    numbers = [str(number) for number in range(len(entries))]
    legend = figure.legend(
        handles, numbers, loc="outside lower center", ncols=across, frameon=False, fontsize=8
    )
    # Set afterwards: a legend leaves out a class whose name begins with an underscore.
    for shown, (text, _) in zip(legend.get_texts(), entries, strict=True):
        shown.set_text(text)


def draw_surfaces(
    numbers: Mapping[str, Any], planes: Sequence[Shown], folder: Path
) -> dict[str, dict[str, str]]:
    """All pictures of an analysis of planes; what `pictures` of surface.json holds.

    Args:
        numbers: those of surface.json.
        planes: a few of the planes.
        folder: where the pictures go.
    """
    roles = numbers["roles"]
    palette = Palette.of(planes, numbers["classes"])
    of = {role: [name for name in roles if roles[name] == role] for role in set(roles.values())}
    found = {}
    for key, columns, masks in _pictures(of):
        draw_planes(planes, _titles(columns, roles), masks, palette, folder / f"surface-{key}.png")
        found[key] = _described(key, numbers, masks)
    alike = {
        "share of the points with the same answer": matrix(numbers["pairs"], list(roles), "reproducibility")
    }
    draw_heat_maps(alike, list(roles), folder / "surface-reproducibility.png")
    return found | {"reproducibility": _described("reproducibility", numbers, [])}


def _pictures(of: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
    """Key, columns and compared pairs of each picture of planes, from the models by role."""
    if "student" not in of:
        models = list(of["model"])
        yield "planes", models, [(models[0], models[1])]
        return
    (student,), (ensemble,), controls = of["student"], of["ensemble"], of.get("control", ())
    yield "planes", [student, *of["teacher"], ensemble], [(student, ensemble)]
    if controls:
        networks = [student, *controls]
        yield "controls", [*networks, ensemble], [(name, ensemble) for name in networks]


def _titles(names: Sequence[str], roles: Mapping[str, str]) -> dict[str, str]:
    """What stands over each column."""
    return {
        name: f"{roles[name]}\n{shorten(name, 22)}"
        if roles[name] in ("teacher", "control")
        else shorten(name, 22)
        for name in names
    }


def _described(key: str, numbers: Mapping[str, Any], masks: Sequence[tuple[str, str]]) -> dict[str, str]:
    """File, title and alternative text of a picture."""
    values = {
        frozenset((pair["first"], pair["second"])): pair["reproducibility"]["value"]
        for pair in numbers["pairs"]
    }
    count = f"{numbers['settings']['triplets']:,}"
    if key == "reproducibility":
        title = "How often two models say the same on planes"
        (low, least), (high, most) = (
            (" and ".join(sorted(pair)), value)
            for pair, value in (choose(values.items(), key=lambda item: item[1]) for choose in (min, max))
        )
        alt = (
            f"Heat map of all pairs of models: the share of the points of {count} planes where both say "
            f"the same, from {100 * least:.1f} % ({low}) to {100 * most:.1f} % ({high})."
        )
    else:
        title = "Planes through three test images"
        same = (f"{a} and {b} on {100 * values[frozenset((a, b))]:.1f} %" for a, b in masks)
        alt = (
            "Planes through three test images each, coloured by the class that each model says, with the "
            f"points where models differ. Over {count} planes the same is said by {', by '.join(same)} of the points."
        )
        title += " with the controls" if key == "controls" else ""
    return {"file": f"surface-{key}.png", "title": title, "alt": alt}
