"""How alike to the ensemble or its teachers each network of a run is, from the numbers of its analyses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ensemble_kd.results import ENSEMBLE

Numbers = Mapping[str, Any]
MEASURES: dict[str, tuple[str, str, float, int, str]] = {
    "corruption": ("agreement", "the ensemble's answer on corrupted images", 100, 2, " %"),
    "planes": ("surface", "the ensemble's answer on planes between images", 100, 2, " %"),
    "matches": ("features", "CKA, best matches", 1, 3, ""),
    "penultimate": ("features", "CKA, last layer but one", 1, 3, ""),
    "logits": ("features", "CKA, logits", 1, 3, ""),
    "mutual_knn": ("features", "neighbours in common", 1, 3, ""),
}
"""The analysis, title, scale, digits and unit of each measure; those of features are means over the teachers."""


def why_missing(run: Numbers, measure: str) -> str:
    """Why a run has no numbers of a measure; empty where it has."""
    part = run.get(MEASURES[measure][0], {"left_out": "it is missing"})
    if measure == "corruption" and "left_out" not in part:
        part = part["corruption"]
    return str(part.get("left_out", ""))


def values(run: Numbers, measure: str) -> dict[str, float]:
    """Of the student and each control, NaN where it is not defined; the run has that measure."""
    networks = [
        name for name, row in run["metrics"]["models"].items() if row["role"] in ("student", "control")
    ]
    if measure == "corruption":
        agreement = run["agreement"]
        found = agreement["corruption"]["overall"]["agreement"][agreement["reference"]]
        return {name: _number(found[name]["value"]) for name in networks}
    part = run[MEASURES[measure][0]]
    pairs = {(pair["first"], pair["second"]): pair for pair in part["pairs"]}
    if measure == "planes":
        return {name: _number(pairs[name, ENSEMBLE]["reproducibility"]["value"]) for name in networks}
    teachers = weighty(run)
    return {
        name: float(np.mean([_number(pairs[name, teacher][measure]["value"]) for teacher in teachers]))
        for name in networks
    }


def gains(run: Numbers, measure: str) -> dict[str, Any]:
    """How much more of it the student has than each control, with intervals over images or planes."""
    if measure == "corruption":
        agreement = run["agreement"]
        found: dict[str, Any] = agreement["corruption"]["overall"]["gain"][agreement["reference"]]
        return found
    if measure == "planes":
        return {row["control"]: row["gain"] for row in run["surface"]["gains"] if row["target"] == ENSEMBLE}
    return {control: found["mean"][measure] for control, found in run["features"]["gains"].items()}


def weighty(run: Numbers) -> list[str]:
    """The teachers that have weight in the ensemble."""
    models, idle = run["metrics"]["models"], run["features"].get("idle", ())
    return [name for name, row in models.items() if row["role"] == "teacher" and name not in idle]


def settings(run: Numbers, measure: str) -> dict[str, Any]:
    """What shaped the analysis; runs are comparable where these are the same."""
    found: dict[str, Any] = run[MEASURES[measure][0]]["settings"]
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
