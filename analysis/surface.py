"""How models divide the space of images: planes through test images, and who says the same on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.analysis.intervals import interval, t_interval
from ensemble_kd.analysis.options import SurfaceOptions
from ensemble_kd.analysis.planes import (
    BORDER,
    Plane,
    components,
    draw_planes,
    grid,
    margin,
    reproducibility,
)
from ensemble_kd.analysis.plots import label
from ensemble_kd.analysis.plots_surface import SHOWN, Shown, draw_surfaces
from ensemble_kd.analysis.subjects import Subjects, chosen_options, subjects_of
from ensemble_kd.console import progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import DataError, ModelError
from ensemble_kd.metrics import RESAMPLES
from ensemble_kd.results import ENSEMBLE
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Teacher

_HELD = 1 << 23
"""Pixel values of a plane that are held at once, in float64: 64 MiB."""
_ONE = "one plane has no spread"


@dataclass(frozen=True)
class SurfaceAnalysis:
    """Every pair of models on the planes; `numbers` is what surface.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """Reproducibility, what distilling gained of it, and the shape of each model's regions."""
        gains = [_gain_table(self.numbers)] if self.numbers["gains"] else []
        return "\n\n".join([_pair_table(self.numbers), *gains, _shape_table(self.numbers)])


@dataclass(frozen=True)
class Sight:
    """What M models say on one plane of P×P points."""

    answers: np.ndarray
    """Classes (M, P, P)."""
    confidence: np.ndarray
    """Probabilities of these classes, float32 (M, P, P)."""
    margins: np.ndarray
    """Distances from the three images to the boundary (M, 3); infinite where the box holds none."""
    outside: float
    """The share of pixel values beyond [0, 1]."""


def analyze_surface(
    run: str | Path | None = None,
    *,
    models: str | Sequence[str] | None = None,
    teachers: Sequence[Teacher] = (),
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> SurfaceAnalysis:
    """How alike models divide planes through three test images, and what distilling did to it.

    After Somepalli et al. 2022, "Can Neural Nets Learn the Same Model Twice?"; see `analysis.planes`.

    Args:
        run: a run folder; the newest finished one where neither a run nor models are named.
        models: instead of a run, models by name, run folder or file, judged on `data`.
        teachers: the teachers of a run that was given them as objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"points=100"`.
        options: the other fields of `options.SurfaceOptions`; `images` has no part in it.

    Returns:
        The numbers, each a mean over planes with its interval: `pairs` (reproducibility, the share of the
        points where both say the same, and its `sd` over planes), `gains` (how much more of it the student
        has than each control, with the ensemble and with each teacher, plane by plane), `fragmentation`
        (connected regions a plane, and of each class that occurs), `margins` (distance from the images to
        the boundary, in units of pixels in [0, 1]), `planes` (their images) and `outside` (the share of
        pixel values beyond [0, 1]). surface.json and pictures are written to the run's `analysis/` folder,
        or to `out`.

    Raises:
        RunError: the run is missing or did not finish.
        ConfigError: both a run and models are named, or fewer than two models.
        DataError: the test images are of fewer than three classes, or no three of them span a plane.
        ModelError: a model gives NaN or infinite outputs, or a teacher is no longer there.
    """
    chosen = chosen_options(SurfaceOptions, run, models, options, config_file, sets)
    return surface_of(subjects_of(chosen, teachers), chosen)


def surface_of(subjects: Subjects, options: SurfaceOptions) -> SurfaceAnalysis:
    """`analyze_surface` of models that are loaded already."""
    count = options.triplets or (3 if options.quick else 20)
    points = options.points or (20 if options.quick else 50)
    settings = {"quick": options.quick, "seed": options.seed, "triplets": count, "points": points}
    numbers = subjects.head(subjects.data.test, **settings, border=BORDER, clipped=False)
    planes, sights = [], []
    shown: list[Shown] = []
    with progress("planes", count) as advance:
        for samples, plane in _planes(subjects, count, options.seed):
            sight = look(subjects, plane, points)
            planes.append(_row(samples, subjects.data.classes))
            if len(shown) < SHOWN:
                shown.append(_shown(samples, plane, sight, list(subjects.roles), planes[-1]["classes"]))
            sights.append((sight.answers, sight.margins, sight.outside))
            advance()
    answers, margins, outside = (np.stack(values) for values in zip(*sights, strict=True))
    numbers |= {"planes": planes, "outside": float(outside.mean())}
    numbers |= summarise(subjects.roles, answers, margins, options.seed)
    numbers["pictures"] = draw_surfaces(numbers, shown, subjects.folder)
    files.write_json(subjects.folder / "surface.json", numbers)
    return SurfaceAnalysis(subjects.folder, numbers)


def _planes(subjects: Subjects, count: int, seed: int) -> Iterator[tuple[Images, Plane]]:
    """Planes through test images, with these three."""
    test = subjects.data.test
    labels = test.known_labels.cpu().numpy()
    found = len(np.unique(labels))
    if found < 3:
        raise DataError(
            f"the test images of {subjects.data.name} are of {found} class{'es' if found > 1 else ''}",
            "a plane goes through three images of three different classes",
            "look at data with three classes or more",
        )

    def chosen(triplet: np.ndarray) -> Images:
        return test[torch.from_numpy(triplet).to(test.ids.device)]

    for triplet, plane in draw_planes(labels, lambda triplet: _unit(chosen(triplet).decoded), count, seed):
        yield chosen(triplet), plane


def _unit(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1]."""
    return pixels.double() / 255 if pixels.dtype == torch.uint8 else pixels.double()


def look(subjects: Subjects, plane: Plane, points: int) -> Sight:
    """What all models say on a grid of a plane, and at its three images.

    Raises:
        ModelError: a model gives NaN or infinite outputs.
    """
    xs, ys = plane.axes(points)
    logits, outside = _logits(subjects, plane, grid(xs, ys).reshape(-1, 2))
    at_images, _ = _logits(subjects, plane, plane.corners)
    answers, confidence, margins = [], [], []
    for name, scores in logits.items():
        if not bool(scores.isfinite().all()):
            raise ModelError(
                f"{name!r} gives NaN or infinite outputs between test images",
                "its weights are damaged, or it cannot take pixels a little below 0 or above 1",
                "check it with `ekd evaluate`, or leave it out",
            )
        on_grid, own = scores.view(points, points, -1), at_images[name].argmax(dim=1).tolist()
        confidence.append(on_grid.softmax(dim=2).amax(dim=2).numpy())
        answers.append(on_grid.argmax(dim=2).int().numpy())
        corners = zip(plane.corners, own, strict=True)
        margins.append([margin(on_grid.numpy(), xs, ys, place, label) for place, label in corners])
    return Sight(np.stack(answers), np.stack(confidence), np.array(margins), outside)


def _logits(subjects: Subjects, plane: Plane, places: np.ndarray) -> tuple[dict[str, Tensor], float]:
    """Logits (N, C) of all models at coordinates (N, 2), on the CPU; the share of pixels beyond [0, 1]."""
    chunks, outside = [], 0.0
    for part in np.array_split(places, ceil(len(places) * plane.origin.numel() / _HELD)):
        pixels = plane.images(part)
        outside += float(((pixels < 0) | (pixels > 1)).double().mean()) * len(part) / len(places)
        batch = Images(pixels, None, torch.arange(len(part), device=pixels.device))
        chunks.append({name: logits.cpu() for name, logits in subjects.logits(batch).items()})
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}, outside


def summarise(
    roles: Mapping[str, str], answers: np.ndarray, margins: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Means over planes, with Student's t intervals over planes; a bootstrap of a few would be too narrow.

    Args:
        roles: of M models by name, `student`, `control`, `teacher` and `ensemble` among them or not.
        answers: classes (T, M, P, P) on T planes.
        margins: distances from the three images of each plane to the boundary (T, M, 3).
        seed: of the bootstrap of margins.

    Returns:
        `pairs`, `gains`, `fragmentation` and `margins` of `analyze_surface`.
    """
    names = list(roles)
    alike = np.stack([reproducibility(plane) for plane in answers])
    pairs = [
        {
            "first": names[i],
            "second": names[j],
            "reproducibility": {
                **_share(alike[:, i, j]),
                "sd": float(alike[:, i, j].std(ddof=1)) if len(alike) > 1 else float("nan"),
            },
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    return {
        "pairs": pairs,
        "gains": _gains(roles, alike),
        "fragmentation": {name: _fragmentation(answers[:, k]) for k, name in enumerate(names)},
        "margins": {name: _margins(margins[:, k], seed) for k, name in enumerate(names)},
    }


def _mean(values: np.ndarray) -> dict[str, Any]:
    """The mean over planes with its interval."""
    if len(values) > 1:
        return {**t_interval(values)}
    return {"value": float(values.mean()), "low": float("nan"), "high": float("nan"), "reason": _ONE}


def _share(values: np.ndarray) -> dict[str, Any]:
    """`_mean` of shares, whose interval ends where shares do."""
    found = _mean(values)
    return (
        {**found, "low": max(found["low"], 0.0), "high": min(found["high"], 1.0)}
        if len(values) > 1
        else found
    )


def _gains(roles: Mapping[str, str], alike: np.ndarray) -> list[dict[str, Any]]:
    """How much more often than each control the student says what ensemble and teachers say."""
    at = {name: k for k, name in enumerate(roles)}
    named = {role: [name for name in roles if roles[name] == role] for role in set(roles.values())}
    return [
        {
            "control": control,
            "target": target,
            "gain": _mean(alike[:, at[student], at[target]] - alike[:, at[control], at[target]]),
        }
        for student in named.get("student", [])
        for control in named.get("control", [])
        for target in [*named.get("ensemble", []), *named.get("teacher", [])]
    ]


def _fragmentation(answers: np.ndarray) -> dict[str, Any]:
    """Connected regions on each of T planes (T, P, P): of all classes, and of each that occurs."""
    counts = [list(components(plane).values()) for plane in answers]
    return {
        "regions": _mean(np.array([sum(plane) for plane in counts])),
        "per_class": _mean(np.array([np.mean(plane) for plane in counts])),
    }


def _margins(distances: np.ndarray, seed: int) -> dict[str, Any]:
    """Median and mean of distances (T, 3), with intervals from drawing planes with their three images.

    Images without a boundary in their box count as infinitely far in the median, and not in the mean.
    """
    count = len(distances)
    size = (RESAMPLES if count > 1 else 0, count)
    draws = np.random.default_rng(seed).integers(count, size=size)
    rows = np.concatenate([distances.reshape(1, -1), distances[draws].reshape(size[0], distances.size)])
    known = np.isfinite(rows)
    weight = known.sum(axis=1)
    means = np.where(known, rows, 0).sum(axis=1) / np.where(weight, weight, np.nan)
    without = int((~known[0]).sum())
    why = f"{without} of {distances.size} images have no boundary in their box" if without else _ONE
    found = {"median": _interval(np.median(rows, axis=1), why), "mean": _interval(means, why)}
    return {**found, "images": distances.size, "without_boundary": without}


def _interval(draws: np.ndarray, why: str) -> dict[str, Any]:
    """The first value with the percentiles of the others, some of which may be infinite or missing."""
    resampled = draws[1:][~np.isnan(draws[1:])]
    # No percentile between two values: there is none between a number and infinity.
    ends = np.percentile(resampled, [2.5, 97.5], method="nearest") if len(resampled) else (np.nan, np.nan)
    found: dict[str, Any] = dict(zip(("value", "low", "high"), map(float, (draws[0], *ends)), strict=True))
    return found if np.isfinite(list(found.values())).all() else {**found, "reason": why}


def _row(samples: Images, classes: Sequence[str]) -> dict[str, Any]:
    """Which images a plane goes through."""
    return {"images": samples.ids.tolist(), "classes": [classes[k] for k in samples.known_labels.tolist()]}


def _shown(
    samples: Images, plane: Plane, sight: Sight, names: Sequence[str], classes: Sequence[str]
) -> Shown:
    """A plane as it is drawn."""
    pixels = _unit(samples.decoded).permute(0, 2, 3, 1)
    return Shown(
        thumbnails=pixels.expand(-1, -1, -1, 3).cpu().numpy(),
        classes=classes,
        corners=plane.corners,
        box=plane.box,
        answers=dict(zip(names, sight.answers, strict=True)),
        confidence=dict(zip(names, sight.confidence, strict=True)),
    )


def _pair_table(numbers: Mapping[str, Any]) -> str:
    """Who says the same on the planes: all models by ensemble and teachers, or by each other."""
    roles, settings = numbers["roles"], numbers["settings"]
    taught = [name for name, role in roles.items() if role in ("teacher", "ensemble")]
    columns = [name for name in taught if name == ENSEMBLE] + [name for name in taught if name != ENSEMBLE]
    columns = columns or list(roles)
    cells = {}
    for pair in numbers["pairs"]:
        alike = pair["reproducibility"]
        text = interval(alike, 100, 1, " %") + (
            f" ± {100 * alike['sd']:.1f}" if alike["sd"] == alike["sd"] else ""
        )
        cells[pair["first"], pair["second"]] = cells[pair["second"], pair["first"]] = text
    rows = [[label(name, roles), *(cells.get((name, other), "–") for other in columns)] for name in roles]
    title = (
        f"{numbers['data']}, {settings['triplets']:,} planes through three test images, "
        f"{settings['points']}×{settings['points']} points each: how often two models say the same\n"
        "mean with its 95 % interval over planes ± standard deviation over planes"
    )
    return text_table(["", *columns], rows, title)


def _gain_table(numbers: Mapping[str, Any]) -> str:
    """What the student has of reproducibility more than each control."""
    gains = numbers["gains"]
    controls, targets = (list(dict.fromkeys(gain[key] for gain in gains)) for key in ("control", "target"))
    cells = {(g["control"], g["target"]): interval(g["gain"], 100, 1, sign="+") for g in gains}
    rows = [[f"over control {c}", *(cells[c, target] for target in targets)] for c in controls]
    title = "percentage points by which the student agrees more often than a control, plane by plane"
    return text_table(["gain by distilling", *targets], rows, title)


def _shape_table(numbers: Mapping[str, Any]) -> str:
    """How each model divides the planes."""
    headers = ["", "regions a plane", "a class", "median distance to boundary", "mean", "no boundary"]
    rows = []
    for name, regions in numbers["fragmentation"].items():
        margins = numbers["margins"][name]
        rows.append(
            [
                label(name, numbers["roles"]),
                interval(regions["regions"], 1, 2),
                interval(regions["per_class"], 1, 2),
                interval(margins["median"], 1, 3, unknown="none"),
                interval(margins["mean"], 1, 3, unknown="none"),
                f"{margins['without_boundary']} of {margins['images']}",
            ]
        )
    return text_table(
        headers, rows, "connected regions, and distances from the images in units of pixels in [0, 1]"
    )
