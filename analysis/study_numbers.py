"""What a study found: rows of runs in, means, paired differences and sentences out. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_kd.analysis import sections
from ensemble_kd.analysis.intervals import interval, t_interval

Row = Mapping[str, Any]

MEASURES: dict[str, tuple[str, float, int, str]] = {
    name: (title, scale, digits, " points" if unit else "")
    for name, (title, scale, digits, unit) in sections.MEASURES.items()
} | {
    "val_accuracy": ("validation accuracy", 100, 2, " points"),
    "early_accuracy": ("validation accuracy over the first third of the epochs", 100, 2, " points"),
    "plateau_epoch": ("first epoch within a point of the best validation accuracy", 1, 1, " epochs"),
}
"""Title, scale, digits and unit of what is measured of each run; all but the last three on the test split."""
_GAINS = {
    "agreement": ("agreement with the ensemble", 100, 2, " points"),
    "planes": ("reproducibility of the ensemble's decision planes", 100, 2, " points"),
    "cka": ("CKA with the teachers (penultimate)", 1, 4, ""),
}
_CONTROLS = {
    "labels": "a student on labels",
    "independent": "a student of independent teachers",
    "best-teacher": "a student of the best teacher",
}
GAINS = {
    f"{name}_over_{control}": (f"{title} gained over {whom}", *rest)
    for name, (title, *rest) in _GAINS.items()
    for control, whom in _CONTROLS.items()
}
"""How much nearer to its teachers a student is than a control of the same run."""
MEASURES |= GAINS  # type: ignore[arg-type]
LOWER_IS_BETTER = ("nll", "ece", "teacher_student_cross_entropy", "teacher_student_kl", "plateau_epoch")


def early_and_plateau(accuracies: Sequence[float]) -> tuple[float, int]:
    """Of validation accuracies by epoch: their mean over the first third, and the epoch where they level off.

    That is the first (from 1) that is within 0.01 of the highest.
    """
    first = accuracies[: max(1, len(accuracies) // 3)]
    near = max(accuracies) - 0.01
    return sum(first) / len(first), next(n for n, value in enumerate(accuracies, 1) if value >= near)


def summarise_points(
    rows: Sequence[Row], baselines: Mapping[str, str | None], measures: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Each point's means over seeds, and its differences to its baseline.

    Args:
        rows: of runs: `point`, `seed` and the measures.
        baselines: the point that each is compared with.

    Returns:
        By point: `seeds`, `means` and `differences` by measure. A difference is paired by seed; beside the 95 %
        intervals there are `all_low` and `all_high`, which hold for all points of the study together.
    """
    found = {name: {row["seed"]: row for row in rows if row["point"] == name} for name in baselines}
    compared = sum(1 for name, other in baselines.items() if other is not None and found[name])
    points: dict[str, dict[str, Any]] = {}
    for name, by_seed in found.items():
        if not by_seed:
            continue
        own = {m: _together([row[m] for row in by_seed.values()], len(found)) for m in measures}
        points[name] = {"seeds": sorted(by_seed), "means": own, "differences": {}}
        other = found.get(baselines[name] or "", {})
        both = sorted(by_seed.keys() & other.keys())
        if both:
            points[name]["differences"] = {
                measure: _together([by_seed[s][measure] - other[s][measure] for s in both], compared)
                for measure in measures
            }
    return points


def _together(values: Sequence[float], comparisons: int) -> dict[str, Any]:
    together = t_interval(values, comparisons)
    return {**t_interval(values), "all_low": together["low"], "all_high": together["high"]}


def best_on_validation(points: Mapping[str, Row]) -> str | None:
    """The point of the highest mean validation accuracy, of those that have all seeds; of equal ones the first."""
    most = max((len(point["seeds"]) for point in points.values()), default=0)
    own = [name for name, point in points.items() if len(point["seeds"]) == most]
    return max(own, key=lambda name: points[name]["means"]["val_accuracy"]["value"], default=None)


def effects_of(
    rows: Sequence[Row], dimensions: Sequence[str], measure: str
) -> dict[str, dict[str, Any] | None]:
    """`effect` by dimension; what is called clear of them holds for all pairs of values of all dimensions together."""
    counts = [len({row[d] for row in rows if row.get(d) is not None}) for d in dimensions]
    pairs = sum(count * (count - 1) // 2 for count in counts)
    return {dimension: effect(rows, dimension, measure, pairs) for dimension in dimensions}


def effect(rows: Sequence[Row], dimension: str, measure: str, comparisons: int = 1) -> dict[str, Any] | None:
    """What a dimension does to a measure, averaged over the others and paired by seed.

    Args:
        comparisons: how many differences are to hold together (`all_low`, `all_high`).

    Returns:
        `means` by value; `best` and `worst`, the values with the highest and lowest mean validation
        accuracy, of equal ones the first; `difference`, of the measure between these two; and `pairs`, the
        comparisons. None where there is one value, all are equally good, or seeds or other settings lack some.
    """
    table: dict[str, dict[int, list[float]]] = {}
    chosen: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(dimension)
        if value is None:
            continue
        table.setdefault(value, {}).setdefault(row["seed"], []).append(row[measure])
        chosen.setdefault(value, []).append(row["val_accuracy"])
    shapes = {
        tuple(sorted((seed, len(found)) for seed, found in by_seed.items())) for by_seed in table.values()
    }
    if len(table) < 2 or len(shapes) != 1:
        return None
    by_value = {value: {s: sum(v) / len(v) for s, v in by_seed.items()} for value, by_seed in table.items()}
    validated = {value: sum(own) / len(own) for value, own in chosen.items()}
    best, worst = (pick(validated, key=lambda value: validated[value]) for pick in (max, min))
    if validated[best] - validated[worst] < 1e-9:
        return None
    apart = [by_value[best][seed] - by_value[worst][seed] for seed in sorted(by_value[best])]
    means = {value: t_interval(list(by_seed.values())) for value, by_seed in by_value.items()}
    difference = _together(apart, comparisons)
    return {"means": means, "best": best, "worst": worst, "difference": difference, "pairs": comparisons}


def told(measure: str, difference: Row, whole: bool = True) -> str:
    """A difference with its interval in words, `+0.31 points [-0.20, +0.82]`."""
    _, scale, digits, unit = MEASURES[measure]
    return interval(difference, scale, digits, unit if whole else "", "+")


def sentences(
    points: Mapping[str, Row],
    baselines: Mapping[str, str | None],
    effects: Mapping[str, Mapping[str, Row | None]],
    against: str,
    measures: Sequence[str],
) -> list[str]:
    """What may be said, and no more: differences count as clear where their interval leaves 0 out."""
    seeds = max((len(point["seeds"]) for point in points.values()), default=0)
    if seeds < 2:
        return ["One seed a point: its differences may be those of the seed, so nothing is said of them."]
    said = []
    for measure in measures:
        if measure in GAINS:
            said.append(_count(measure, {n: p["means"][measure] for n, p in points.items()}, "0", seeds))
            continue
        differences = {name: p["differences"][measure] for name, p in points.items() if p["differences"]}
        if differences:
            said.append(_count(measure, differences, against, seeds))
    said += _chosen(points, baselines, against, [m for m in measures if m not in GAINS])
    for dimension, by_measure in effects.items():
        for measure, found in by_measure.items():
            if found is not None:
                said.append(_effect(dimension, measure, found, seeds))
    return said


def _chosen(
    points: Mapping[str, Row], baselines: Mapping[str, str | None], against: str, measures: Sequence[str]
) -> list[str]:
    """Which point validation chooses; where that is a baseline, the best of the others too."""
    best, lead = best_on_validation(points), "Chosen on the validation split: "
    if best is None or not any(point["differences"] for point in points.values()):
        return []
    if baselines[best] is None:
        lead += f"{best}, a baseline; of the others "
        best = best_on_validation({name: point for name, point in points.items() if point["differences"]})
        assert best is not None
    parts = [f"{MEASURES[m][0]} {told(m, points[best]['differences'][m])}" for m in measures]
    on_test = f" On the test split, against {against}, by itself: {'; '.join(parts)}." if parts else ""
    return [f"{lead}{best}.{on_test}"]


def _count(measure: str, differences: Mapping[str, Row], against: str, seeds: int) -> str:
    lower = measure in LOWER_IS_BETTER
    more = [name for name, d in differences.items() if _clear(d["all_low"], d["all_high"]) > 0]
    less = [name for name, d in differences.items() if _clear(d["all_low"], d["all_high"]) < 0]
    title, total = MEASURES[measure][0], len(differences)
    points = "1 point" if total == 1 else f"{total} points"
    if not more and not less:
        return f"{title}: none of {points} differs clearly from {against} (intervals over {seeds} seeds that hold together)."
    up, down = ("higher", "lower") if not lower else ("higher (worse)", "lower (better)")
    parts = [f"{len(names)} {word} ({_few(names)})" for names, word in ((more, up), (less, down)) if names]
    rest = (
        f" of {points}; the others show no clear difference"
        if len(more) + len(less) < total
        else f" of {points}"
    )
    return f"{title} against {against}: {' and '.join(parts)}{rest} (intervals over {seeds} seeds that hold together)."


def _clear(low: float, high: float) -> int:
    """The sign of what an interval says, or 0; nothing where it has no width.

    Few seeds on few test images often differ by the same number, and their spread of 0 says nothing.
    """
    if high - low <= 1e-9:
        return 0
    return (low > 0) - (high < 0)


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f"; … {len(names) - 3} more" if len(names) > 3 else "")


def _effect(dimension: str, measure: str, found: Row, seeds: int) -> str:
    difference = found["difference"]
    clear = _clear(difference["all_low"], difference["all_high"])
    verdict = "a clear difference" if clear else "no clear difference"
    together = f", {found['pairs']} pairs of values together" if found["pairs"] > 1 else ""
    return (
        f"{dimension}: {found['best']} has the highest validation accuracy and {found['worst']} the lowest; between "
        f"these, {MEASURES[measure][0]} differs by {told(measure, difference)}: {verdict} ({seeds} seeds{together})."
    )
