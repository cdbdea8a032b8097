"""The pictures of `analyze-agreement`: numbers in, PNG files out; nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.analysis.pairs import matrix
from ensemble_kd.analysis.plots import draw_heat_maps, heat_map, picture, shorten
from ensemble_kd.analysis.plots_classes import draw_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEAT_MAPS = {"agreement": "agreement", "kappa": "Cohen's kappa", "error_consistency": "error consistency"}
_PALETTE = "colorblind"
_LABELLED = 10  # pairs that can have their names beside them


def draw_agreement(numbers: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All pictures into `folder`; the file of each, its title, and words for those who do not see it."""
    drawn = {
        "heat_maps": _heat_maps(numbers, folder / "agreement-pairs.png"),
        "cells": _cells(numbers, folder / "agreement-cells.png"),
        "diversity": _diversity(numbers, folder / "agreement-diversity.png"),
    }
    if "left_out" not in numbers["corruption"]:
        drawn["corruption"] = _corruption(numbers, folder / "agreement-corruption.png")
    if any(row["n"] for row in numbers["by_class"]) and numbers["by_class"][0]["agreement"]:
        drawn["classes"] = draw_classes(numbers, folder / "agreement-classes.png")
    if numbers["dark"]["words"]:
        drawn["dark"] = _dark(numbers, folder / "agreement-dark.png")
    return drawn


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shorten, names))


def _about(path: Path, title: str, alt: str) -> dict[str, str]:
    return {"file": path.name, "title": title, "alt": alt}


def _heat_maps(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    names, pairs = numbers["models"], numbers["pairs"]
    draw_heat_maps({title: matrix(pairs, names, key) for key, title in _HEAT_MAPS.items()}, names, path)
    closest = max(pairs, key=lambda pair: _or(pair["error_consistency"]["value"], -2))
    return _about(
        path,
        "Every pair of models: same answers, and same errors",
        f"Three square heat maps, colours from 0 to 1: agreement, Cohen's kappa and error consistency. Most alike in "
        f"their errors are {shorten(closest['first'])} and {shorten(closest['second'])}, with an error consistency of "
        f"{_known(closest['error_consistency'])}.",
    )


def _cells(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    import seaborn as sns

    targets, networks = _targets(numbers), _networks(numbers)
    titles = [
        "only this one right",
        "only the other right",
        "both wrong, same class",
        "both wrong, not the same",
    ]
    wide = min(3, len(targets))
    deep = -(-len(targets) // wide)
    with picture(path, 2.2 + 2.9 * wide, 0.9 + deep * (0.6 + 0.3 * len(networks)), "whitegrid") as figure:
        axes = figure.subplots(deep, wide, sharex=True, sharey=True, squeeze=False).flatten()
        for axis, target in zip(axes, targets, strict=False):
            start = np.zeros(len(networks))
            shares = np.array([_parts(numbers["pairs"], name, target) for name in networks])
            for title, width, colour in zip(
                titles, 100 * shares.T, sns.color_palette(_PALETTE), strict=False
            ):
                axis.barh(range(len(networks)), width, left=start, color=colour, label=title)
                start += width
            axis.set_title(f"beside {shorten(target)}", fontsize=10)
            axis.set_yticks(range(len(networks)), [shorten(name, 24) for name in networks])
            axis.set_xlabel("% of images", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(False, axis="y")
            axis.set_axisbelow(True)
        axes[0].invert_yaxis()
        for axis in axes[len(targets) :]:
            axis.set_axis_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    first = _parts(numbers["pairs"], networks[0], targets[0])
    return _about(
        path,
        "Who is right where they are not both right",
        f"Stacked bars, one for each of {_listed(networks)}, beside {_listed(targets)}: the share of images that "
        f"only one gets right, and that both get wrong alike or in two ways. {shorten(networks[0])} makes the error "
        f"of {shorten(targets[0])} on {100 * first[2]:.1f} % of the images.",
    )


def _parts(pairs: Sequence[Mapping[str, Any]], name: str, other: str) -> list[float]:
    """Only `name` right, only `other` right, both wrong in the same way, and in two ways."""
    pair = next(pair for pair in pairs if {pair["first"], pair["second"]} == {name, other})
    cells = {cell: measure["value"] for cell, measure in pair["cells"].items()}
    alone = [cells["only_first"], cells["only_second"]]
    if pair["first"] != name:
        alone.reverse()
    return [*alone, cells["same_wrong"], cells["both_wrong"] - cells["same_wrong"]]


def _targets(numbers: Mapping[str, Any]) -> list[str]:
    teachers = [name for name, role in numbers["roles"].items() if role == "teacher"]
    return [numbers["reference"], *teachers]


def _networks(numbers: Mapping[str, Any]) -> list[str]:
    roles = {name: role for name, role in numbers["roles"].items() if name != numbers["reference"]}
    return [name for name, role in roles.items() if role in ("student", "control", "model")]


def _corruption(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    found, reference, networks = numbers["corruption"], numbers["reference"], _networks(numbers)
    kinds = found["kinds"]
    with picture(path, 1.2 + 2.6 * len(kinds), 5.6, "whitegrid") as figure:
        axes = figure.subplots(2, len(kinds), sharex="col", sharey="row", squeeze=False)
        for (upper, lower), (kind, own) in zip(axes.T, kinds.items(), strict=True):
            rows = [{"strength": 0, **found["clean"]}, *own["rows"]]
            _curves(
                upper, {name: [row["agreement"][reference][name] for row in rows] for name in networks}, rows
            )
            accuracy = {name: [row["accuracy"][name] for row in rows] for name in (*networks, reference)}
            _curves(lower, accuracy, rows)
            upper.set_title(kind, fontsize=10)
            lower.set_xlabel(own["unit"].replace(", ", ",\n"), fontsize=8)
            lower.set_xticks([row["strength"] for row in rows])
        axes[0, 0].set_ylabel(f"% with the answer of {shorten(reference)}", fontsize=8)
        axes[1, 0].set_ylabel("accuracy, %", fontsize=8)
        handles, labels = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    mean = found["overall"]["agreement"][reference]
    said = ", ".join(f"{shorten(name)} {100 * mean[name]['value']:.1f} %" for name in networks)
    return _about(
        path,
        f"Agreement with {shorten(reference)}, and accuracy, as images get worse",
        f"Curves with bands of 95 % over noise, blur, contrast and brightness of growing strength. Agreement with "
        f"{shorten(reference)}, mean over all: {said}.",
    )


def _curves(axis: Axes, shares: Mapping[str, Sequence[Mapping[str, float]]], rows: Sequence[Any]) -> None:
    import seaborn as sns

    x = [row["strength"] for row in rows]
    colours = sns.color_palette(_PALETTE, len(shares))
    for place, ((name, values), colour) in enumerate(zip(shares.items(), colours, strict=True)):
        value, low, high = (
            np.array([100 * measure[key] for measure in values]) for key in ("value", "low", "high")
        )
        style, layer = ("--", 2) if place else ("-", 3)
        axis.plot(x, value, style, marker="o", ms=3, color=colour, label=shorten(name), zorder=layer)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.tick_params(labelsize=8)


def _dark(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    from matplotlib.colors import PowerNorm

    dark, student = numbers["dark"], _networks(numbers)[0]
    names = [shorten(name, 14) for name in dark["classes"]]
    means = {name: _wrong(dark["mean"][name]) for name in (numbers["reference"], student)}
    difference = _wrong(dark["difference"])
    most = max(np.nanmax(values) for values in means.values()) or 1.0
    widest = np.nanmax(np.abs(difference)) or 1.0
    side, margin = 0.5 + len(names) * (0.28 if len(names) <= 12 else 0.2), 0.08 * max(map(len, names)) + 0.3
    with picture(path, 3 * (side + 0.7) + margin, side + margin + 0.5) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (name, values) in zip(axes, means.items(), strict=False):
            # The square root, as a few classes would leave all others black.
            heat_map(axis, values, names, norm=PowerNorm(0.5, 0, most), cmap="magma")
            axis.set_title(shorten(name), fontsize=10)
        heat_map(axes[2], difference, names, vmin=-widest, vmax=widest, cmap="vlag")
        axes[2].set_title(f"{shorten(student, 14)} − {shorten(numbers['reference'], 14)}", fontsize=10)
        axes[0].set_ylabel("true class", fontsize=8)
        axes[1].set_xlabel("wrong class", fontsize=8)
        _bars(figure, axes)
    return _about(
        path,
        "Dark knowledge: mean probability of each wrong class, by true class",
        f"Heat maps of true class against wrong class for {_listed(means)} and their difference, {len(names)} "
        f"of {dark['of']} classes. The rank correlation of both is {_known(dark['correlation'][student])}.",
    )


def _wrong(mean: Sequence[Sequence[float]]) -> np.ndarray:
    values = np.array(mean, dtype=np.float64)
    np.fill_diagonal(values, np.nan)
    return values


def _bars(figure: Figure, axes: np.ndarray) -> None:
    for group, axis in ((axes[:2], axes[1]), (axes[2:], axes[2])):
        bar = figure.colorbar(axis.collections[0], ax=list(group), fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=7)


def _diversity(numbers: Mapping[str, Any], path: Path) -> dict[str, str]:
    import seaborn as sns

    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for pair in numbers["pairs"]:
        roles = sorted(_side(numbers["roles"][pair[side]]) for side in ("first", "second"))
        kinds.setdefault(" and ".join(dict.fromkeys(roles)), []).append(pair)
    with picture(path, 8, 4.2, "whitegrid") as figure:
        axis = figure.subplots()
        axis.margins(0.1)
        for (kind, pairs), colour, marker in zip(
            kinds.items(), sns.color_palette(_PALETTE), "oDs^vP", strict=False
        ):
            x, y = ([100 * value for value in values] for values in zip(*map(_point, pairs), strict=True))
            # Hollow, as several pairs are often at the same place.
            axis.scatter(x, y, facecolors="none", edgecolors=[colour], marker=marker, label=kind, s=60)
            for pair, a, b in zip(pairs, x, y, strict=True) if len(numbers["pairs"]) <= _LABELLED else ():
                text = f"{shorten(pair['first'], 16)} – {shorten(pair['second'], 16)}"
                axis.annotate(text, (a, b), (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel("one right, one wrong: % of images")
        axis.set_ylabel("mean accuracy of the two, %")
        figure.legend(loc="outside right upper", fontsize=8, title="pairs of", title_fontsize=8)
    most = max(numbers["pairs"], key=lambda pair: pair["disagreement"]["value"])
    unlike = f"{shorten(most['first'])} and {shorten(most['second'])}"
    return _about(
        path,
        "Diversity and accuracy of pairs",
        f"One point a pair: how often one is right where the other is wrong, against their mean accuracy. Most "
        f"unlike are {unlike}, on {100 * most['disagreement']['value']:.1f} % of the images.",
    )


def _side(role: str) -> str:
    return {"ensemble": "teachers", "teacher": "teachers", "control": "controls", "model": "models"}.get(
        role, role
    )


def _point(pair: Mapping[str, Any]) -> tuple[float, float]:
    cells = {name: measure["value"] for name, measure in pair["cells"].items()}
    return pair["disagreement"]["value"], cells["both_right"] + pair["disagreement"]["value"] / 2


def _or(value: float, other: float) -> float:
    return other if np.isnan(value) else value


def _known(measure: Mapping[str, Any]) -> str:
    """A number in a text, or why there is none."""
    value = measure["value"]
    return f"unknown ({measure['reason']})" if np.isnan(value) else f"{value:.2f}"
