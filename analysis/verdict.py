"""What a run shows, in plain words: numbers in, sentences out, and no claim beyond an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_kd.analysis import intervals
from ensemble_kd.results import ENSEMBLE, verdict

Numbers = Mapping[str, Any]
CONTROLS = {
    "labels": "trained on labels alone",
    "best-teacher": "taught by the best teacher alone",
    "independent": "taught by independent teachers",
}
"""What each control is: a student of the same kind, …"""
_UNKNOWN = {
    "labels": "what distilling gained over training on labels",
    "best-teacher": "what several teachers gained over the best of them",
    "independent": "how much of this any good teachers would have brought",
}
"""What cannot be said without it."""
FEWEST_PLANES = 6
"""Of fewer, all differ to one side by chance more often than one time in twenty: 2^(1 − n) > 0.05."""


def findings(numbers: Numbers) -> list[dict[str, Any]]:
    """The answers of one run to the questions that it was made for.

    Args:
        numbers: `metrics`, and `agreement`, `features`, `surface` and `calibration` as their files have
            them, or with `left_out` and the reason alone.

    Returns:
        Each with `key`, `question` and `sentences`: `gain`, `fidelity`, `inside` and `confidence`.
    """
    answers = {
        "gain": ("Did distilling help?", gain),
        "fidelity": ("Does the student answer like its teachers?", fidelity),
        "inside": ("Is it alike inside?", inside),
        "confidence": ("Can its confidence be trusted?", confidence),
    }
    return [
        {"key": key, "question": question, "sentences": answer(numbers)}
        for key, (question, answer) in answers.items()
    ]


def judge(measure: Numbers, more: str, less: str) -> str:
    """`more` or `less` where the interval lies on one side of 0, else that there is no clear difference."""
    value, low, high = (_number(measure[key]) for key in ("value", "low", "high"))
    if math.isnan(value + low + high):
        return "it cannot be told"
    if low > 0:
        return more
    if high < 0:
        return less
    return "no difference at all" if low == high == 0 else "no clear difference"


def gain(numbers: Numbers) -> list[str]:
    """Accuracy against the controls, then size and accuracy beside the ensemble."""
    metrics, teachers = numbers["metrics"], _teachers(numbers)
    differences = metrics["differences"]
    said = [verdict(differences)]
    said += _twins(numbers)
    if len(teachers) == 1:
        said.append("There was one teacher, so nothing can be said of what several would gain.")
    elif "best-teacher" in differences:
        accuracy = differences["best-teacher"]["accuracy"]
        judged = judge(accuracy, "more accurate", "less accurate")
        said.append(f"Against a student {CONTROLS['best-teacher']}: {points(accuracy)}, {judged}.")
    else:
        said.append(missing("best-teacher"))
    count = f"{metrics['models']['student']['parameters']:,} parameters"
    whose = "its teacher" if len(teachers) == 1 else "the teachers together"
    size = f"The student has {count}, {ratio(metrics['times_smaller'])} {whose}"
    pair = _pair(numbers["agreement"], "student", ENSEMBLE)
    if pair is None:
        return [*said, f"{size}."]
    accuracy = pair["accuracy_difference"]
    judged = judge(accuracy, "more accurate", "less accurate")
    return [*said, f"{size}; its accuracy beside the ensemble's: {points(accuracy)}, {judged}."]


def _twins(numbers: Numbers) -> list[str]:
    """Of each control that is the student bit for bit, that it is, and why: all their differences are 0."""
    hashes = {name: row["sha256"] for name, row in numbers["manifest"]["networks"].items()}
    same = [name for name in hashes if name != "student" and hashes[name] == hashes["student"]]
    one = "there is one teacher" if len(_teachers(numbers)) == 1 else "all weight is with the best teacher"
    reasons = {"best-teacher": one, "labels": "the teachers have no part in the student's loss"}
    return [
        f"The student {CONTROLS[name]} is this student bit for bit, as "
        f"{reasons.get(name, 'both were taught the same')}, so nothing can differ between them."
        for name in same
    ]


def ratio(times: float) -> str:
    """How many times fewer than, or more than."""
    if 0.95 < times < 1.05:
        return "about as many as"
    times, word = (times, "fewer") if times > 1 else (1 / times, "more")
    return f"{times:.0f} times {word} than" if times >= 10 else f"{times:.1f} times {word} than"


def fidelity(numbers: Numbers) -> list[str]:
    """Agreement with the ensemble beside that of a control: clean, under corruption and on planes."""
    agreement, surface = numbers["agreement"], numbers["surface"]
    said = []
    if "left_out" in agreement:
        said.append(left_out("agreement", agreement))
    else:
        reference, worse = agreement["reference"], agreement["corruption"]
        rows = agreement["fidelity"]["targets"][reference]
        gains = {name: row["agreement_gain"] for name, row in rows.items() if "agreement_gain" in row}
        said.append(_like("of the clean test images", rows["student"]["agreement"], gains))
        if "left_out" in worse:
            said.append(left_out("agreement under corruption", worse))
        else:
            overall = worse["overall"]
            own, gains = overall["agreement"][reference]["student"], overall["gain"][reference]
            said.append(_like("of corrupted images", own, gains))
    if "left_out" in surface:
        said.append(left_out("agreement on planes between images", surface))
    elif pair := _pair(surface, "student", ENSEMBLE):
        count = surface["settings"]["triplets"]
        gains = {row["control"]: row["gain"] for row in surface["gains"] if row["target"] == ENSEMBLE}
        where = f"of the points of {count:,} planes between images"
        said.append(_like(where, pair["reproducibility"], gains, few=count < FEWEST_PLANES))
    return [*said, *_unsaid(numbers)]


def _like(where: str, own: Numbers, gains: Mapping[str, Numbers], few: bool = False) -> str:
    said = f"It gives the ensemble's answer on {interval(own, 100, 1, ' %')} {where}"
    name = _reference(gains)
    if name is None:
        return f"{said}."
    judged = "too few to judge" if few else judge(gains[name], "more alike", "less alike")
    return f"{said}; against a student {CONTROLS[name]}: {points(gains[name])}, {judged}."


def inside(numbers: Numbers) -> list[str]:
    """CKA of layers with their best match in each teacher, beside that of a control."""
    features = numbers["features"]
    if "left_out" in features:
        return [left_out("likeness of layers", features)]
    teachers, idle = _teachers(numbers), features.get("idle", [])
    alike = {name: _pair(features, "student", name) for name in teachers}
    parts = [f"{interval(pair['matches'], 1, 3)} in {name}" for name, pair in alike.items() if pair]
    said = [f"CKA of its layers with their best matches (the best of many, so optimistic): {listed(parts)}."]
    name = _reference(features["gains"])
    if name is not None:
        over = ", mean over the teachers" if len(teachers) > 1 else ""
        over += f" but {listed(idle)}, without weight in the ensemble" if idle else ""
        gained = features["gains"][name]["mean"]
        said.append(f"CKA against a student {CONTROLS[name]}{over}: {_gained(gained)}.")
    return [*said, *_unsaid(numbers)]


def _gained(gained: Mapping[str, Numbers]) -> str:
    measures = {"matches": "best matches", "penultimate": "last layer but one", "logits": "logits"}
    return "; ".join(
        f"{what} {interval(gained[key], 1, 3, sign='+')}, {judge(gained[key], 'more alike', 'less alike')}"
        for key, what in measures.items()
        if key in gained
    )


def confidence(numbers: Numbers) -> list[str]:
    """The calibration error beside what chance makes of a perfect model, and beside a control."""
    calibration = numbers["calibration"]
    if "left_out" in calibration:
        return [left_out("calibration", calibration)]
    row = calibration["models"]["student"]["before"]
    ece, floor = row["ece"], row["floor"]
    beyond = "more than" if ece["value"] > floor["high"] else "no more than"
    said = [
        f"Its calibration error (ECE) is {interval(ece, 1, 3)}, {beyond} what a perfectly calibrated model of the same "
        f"confidences gets by chance on {calibration['n']:,} images, {interval(floor, 1, 3)}."
    ]
    found = calibration["differences"]
    name = _reference(found, ("labels", "best-teacher", "independent"))
    if name is not None:
        parts = [
            f"{title} {interval(found[name]['before'][key], 1, 4, sign='+')}, "
            f"{judge(found[name]['before'][key], 'worse', 'better')}"
            for key, title in (("ece", "ECE"), ("nll", "NLL"))
        ]
        said.append(f"Against a student {CONTROLS[name]}: {'; '.join(parts)}.")
    return said


def over_seeds(group: Numbers) -> list[str]:
    """Whether distilling helped, and what it did to likeness, over runs that differ in their seed only.

    Args:
        group: `seeds`; `differences` by control and measure, and `likeness` (see `seeds.groups`), with t
            intervals over seeds.
    """
    count, alike = len(group["seeds"]), group["likeness"]
    if "labels" in group["differences"]:
        accuracy = group["differences"]["labels"]["accuracy"]
        judged = judge(accuracy, "distilling helped", "distilling hurt")
        gain = f"{judged}, {points(accuracy)} of accuracy against labels alone (95 % t interval over seeds)."
    else:
        gain = missing("labels")
    wheres = {"corruption": "of corrupted images", "planes": "of the points of planes between images"}
    said = [
        _like(where, alike[key]["models"]["student"], alike[key]["differences"])
        for key, where in wheres.items()
        if "left_out" not in alike[key]
    ]
    inner = {
        key: alike[key]["differences"]
        for key in ("matches", "penultimate", "logits")
        if "left_out" not in alike[key]
    }
    name = _reference(next(iter(inner.values()), {}))
    if name is not None:
        gained = _gained({key: found[name] for key, found in inner.items()})
        said.append(f"CKA against a student {CONTROLS[name]}, mean over the teachers: {gained}.")
    return [f"Over {count} seeds: {line}" for line in (gain, *said)]


def missing(control: str) -> str:
    """That a control was not trained, and what cannot be said without it."""
    return f"No student {CONTROLS[control]} was trained (--controls {control}), so it is not known {_UNKNOWN[control]}."


def left_out(what: str, part: Numbers) -> str:
    """That a part of the analyses is missing, and why."""
    return f"Not measured: {what} ({part['left_out']})."


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def interval(measure: Numbers, scale: float = 1, digits: int = 4, unit: str = "", sign: str = "") -> str:
    """A number with its interval, or why there is none."""
    unknown = f"(unknown: {measure.get('reason') or 'it is not defined'})"
    return intervals.interval(measure, scale, digits, unit, sign, unknown)


def points(measure: Numbers) -> str:
    """A difference of shares in percentage points, with its interval."""
    return interval(measure, 100, 2, " points", "+")


def _number(value: float | None) -> float:
    """As read from JSON, where NaN is None."""
    return math.nan if value is None else float(value)


def _teachers(numbers: Numbers) -> list[str]:
    return [name for name, row in numbers["metrics"]["models"].items() if row["role"] == "teacher"]


def _unsaid(numbers: Numbers) -> list[str]:
    """What is not to be known of likeness without the control of independent teachers."""
    return [] if "independent" in numbers["metrics"]["models"] else [missing("independent")]


def _reference(
    found: Mapping[str, Any], order: Sequence[str] = ("independent", "labels", "best-teacher")
) -> str | None:
    """The control that says most, of those there are."""
    return next((name for name in order if name in found), None)


def _pair(part: Numbers, first: str, second: str) -> Numbers | None:
    """The row of a pair, the student first; None where the part is left out."""
    pairs = part.get("pairs", [])
    return next((row for row in pairs if (row["first"], row["second"]) == (first, second)), None)
