"""How near a student came to its teachers, beside students that had others or none: pure functions.

Shapes: `N` samples, `C` classes. Any two good models agree a lot, so likeness to a teacher says something
only beside that of controls: of the same network trained on labels, and of one that other teachers taught
(Stanton et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.pairs import divergences
from ensemble_kd.analysis.resampling import measured, resampled, unknown

Answers = Mapping[str, np.ndarray]
INDEPENDENT = "independent"
NO_IMAGE = "no image of this class"


@dataclass(frozen=True)
class Compared:
    """Who is held against whom: `networks` against each of `targets`, the first of both before all."""

    targets: Sequence[str]
    """Whom networks may be like: the ensemble and its teachers, or the first of several models."""
    networks: Sequence[str]
    """The student and its controls, or the other models."""
    controls: Sequence[str] = ()
    """Those of the networks that the first one is compared with."""
    with_student: bool = True

    @property
    def reference(self) -> str:
        """The ensemble, or the first model."""
        return self.targets[0]

    @classmethod
    def of(cls, roles: Mapping[str, str]) -> Compared:
        """From the role of each model by name."""
        by = {role: [name for name, own in roles.items() if own == role] for role in set(roles.values())}
        if "student" not in by:
            first, *others = roles
            return cls([first], others, with_student=False)
        controls = by.get("control", [])
        return cls([*by["ensemble"], *by["teacher"]], [*by["student"], *controls], controls)


def fidelity(logits: Mapping[str, Tensor], compared: Compared, seed: int = 0) -> dict[str, Any]:
    """Agreement with each target and KL(target ‖ network) of student and controls, and the student's gains.

    Args:
        logits: (N, C) by model.
        compared: the student is the first of its networks.

    Returns:
        `targets`: by target and network `agreement` and `kl` (temperature 1, nats); for a control also
        `agreement_gain` = A(target, student) − A(target, control) and `kl_gain` = KL(target ‖ control) −
        KL(target ‖ student), paired by image: above 0, the student is nearer. `verdict`: one sentence.
    """
    columns: dict[tuple[str, str, str], np.ndarray] = {}
    for target in compared.targets:
        for name in compared.networks:
            same = logits[target].argmax(dim=1) == logits[name].argmax(dim=1)
            columns["agreement", target, name] = same.cpu().numpy()
            columns["kl", target, name] = divergences(logits[target], logits[name])["first_second"]
    draws = resampled(columns, seed)
    found = {
        target: {name: _nearness(draws, target, name, compared) for name in compared.networks}
        for target in compared.targets
    }
    rows = found[compared.reference]
    gains = {name: rows[name]["agreement_gain"] for name in compared.controls}
    said = _verdict("The student gives its ensemble's answer", rows[compared.networks[0]]["agreement"], gains)
    return {"targets": found, "verdict": said}


def _nearness(
    draws: Mapping[tuple[str, str, str], np.ndarray], target: str, name: str, compared: Compared
) -> dict[str, Any]:
    row = {}
    for measure, sign in (("agreement", 1), ("kl", -1)):
        own = draws[measure, target, name]
        row[measure] = measured(own)
        if name in compared.controls:
            row[f"{measure}_gain"] = measured(sign * (draws[measure, target, compared.networks[0]] - own))
    return row


def corrupted_verdict(row: Mapping[str, Any], compared: Compared) -> str:
    """The verdict on a row of `agreement_row`, that of corrupted images; none where models are compared."""
    if not compared.with_student:
        return ""
    agreement, gains = (row[key][compared.reference] for key in ("agreement", "gain"))
    return _verdict("Under corruption it does so", agreement[compared.networks[0]], gains)


def _verdict(said: str, agreement: Mapping[str, float], gains: Mapping[str, Mapping[str, float]]) -> str:
    """In one sentence, whether the student is nearer to its ensemble than a student of other teachers."""
    said = f"{said} on {interval(agreement, 100, 1, ' %')} of the images"
    if INDEPENDENT not in gains:
        return f"{said}; how often by chance, a control of independent teachers would show (--controls independent)."
    gain = gains[INDEPENDENT]
    judged = (
        "more often" if gain["low"] > 0 else "less often" if gain["high"] < 0 else "not clearly more often"
    )
    points = interval(gain, 100, 1, " points", "+")
    return f"{said}, {judged} than a student of independent teachers ({points})."


def columns_of(answers: Answers, labels: np.ndarray, compared: Compared) -> dict[tuple[str, ...], np.ndarray]:
    """For each sample whether each model is right, and whether each network agrees with each target."""
    columns: dict[tuple[str, ...], np.ndarray] = {
        ("accuracy", name): given == labels for name, given in answers.items()
    }
    for target in compared.targets:
        for name in compared.networks:
            columns["agreement", target, name] = answers[target] == answers[name]
    return columns


def agreement_row(
    columns: Mapping[tuple[str, ...], np.ndarray], compared: Compared, seed: int = 0
) -> dict[str, Any]:
    """The means of `columns_of`, or of what several such make together, with bootstrap intervals.

    Returns:
        `accuracy` by model; `agreement` by target and network; `gain` by target and control,
        A(target, student) − A(target, control), paired by image.
    """
    draws = resampled(columns, seed)
    student = compared.networks[0]
    return {
        "accuracy": {key[1]: measured(values) for key, values in draws.items() if key[0] == "accuracy"},
        "agreement": {
            target: {name: measured(draws["agreement", target, name]) for name in compared.networks}
            for target in compared.targets
        },
        "gain": {
            target: {
                name: measured(draws["agreement", target, student] - draws["agreement", target, name])
                for name in compared.controls
            }
            for target in compared.targets
        },
    }


def by_class(
    answers: Answers, labels: np.ndarray, classes: Sequence[str], compared: Compared
) -> list[dict[str, Any]]:
    """One row a true class: `n` images, `accuracy` of each model, each network's `agreement` with the reference.

    Intervals are Wilson's (1927), as a class may have few images; a class without any has no shares.
    """
    rows = []
    for number, name in enumerate(classes):
        mask = labels == number
        own, count = {model: given[mask] for model, given in answers.items()}, int(mask.sum())
        reference = own[compared.reference]
        rows.append(
            {
                "class": name,
                "n": count,
                "accuracy": {model: wilson((given == number).sum(), count) for model, given in own.items()},
                "agreement": {
                    model: wilson((own[model] == reference).sum(), count) for model in compared.networks
                },
            }
        )
    return rows


def wilson(hits: int, count: int) -> dict[str, Any]:
    """A share of `count` with Wilson's interval of 95 %."""
    if not count:
        return unknown(NO_IMAGE)
    found = binomtest(int(hits), count)
    low, high = found.proportion_ci(confidence_level=0.95, method="wilson")
    return {"value": float(found.statistic), "low": float(low), "high": float(high)}
