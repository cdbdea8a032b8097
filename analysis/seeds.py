"""Runs that differ in their seed only: means over seeds with t intervals. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemble_kd.analysis import likeness
from ensemble_kd.analysis.intervals import t_interval
from ensemble_kd.files import sha256_json

_FREE = ("seed", "out", "overwrite", "device", "profile", "compile", "cuda_graph")
"""Options in which runs of a group may differ: the seed, and what is no part of the experiment."""


def groups(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sets of two or more runs that differ in their seed only.

    Args:
        runs: `name`, `config` and `metrics` of each; where a seed comes twice, its first run counts.

    Returns:
        Each with `runs` (names), `seeds`, `models`: mean over seeds of each measure of student and
        controls, and `differences`: of student minus control, paired by seed; `likeness`: both for each
        of `likeness.MEASURES`, or `left_out` with the reason.
    """
    alike: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        key = sha256_json({name: value for name, value in run["config"].items() if name not in _FREE})
        alike.setdefault(key, {}).setdefault(run["config"]["seed"], run)
    return [_group(by_seed) for by_seed in alike.values() if len(by_seed) > 1]


def _group(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    runs = list(by_seed.values())
    rows = [run["metrics"]["models"] for run in runs]
    first = rows[0]
    networks = [name for name, row in first.items() if row["role"] in ("student", "control")]
    values = {
        name: {measure: [row[name][measure]["value"] for row in rows] for measure in _measures(first[name])}
        for name in networks
    }
    return {
        "runs": [run["name"] for run in runs],
        "seeds": list(by_seed),
        "models": {
            name: {measure: t_interval(own) for measure, own in measures.items()}
            for name, measures in values.items()
        },
        "differences": {
            name: {
                measure: t_interval(np.subtract(values["student"][measure], own).tolist())
                for measure, own in measures.items()
            }
            for name, measures in values.items()
            if name != "student"
        },
        "likeness": {measure: _likeness(runs, measure) for measure in likeness.MEASURES},
    }


def _likeness(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """Of student and controls, and student minus each control paired by seed; or why there are no numbers."""
    for run in runs:
        if reason := likeness.why_missing(run, measure):
            return {"left_out": f"{run['name']}: {reason}"}
    first, *others = (likeness.settings(run, measure) for run in runs)
    if any(other != first for other in others):
        return {"left_out": "the runs were analysed with other settings"}
    rows = [likeness.values(run, measure) for run in runs]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    unknown = [name for name, own in values.items() if not np.isfinite(own).all()]
    if unknown:
        return {"left_out": f"it is not defined for {', '.join(unknown)} in every run"}
    gains = {name: np.subtract(values["student"], own) for name, own in values.items() if name != "student"}
    return {
        "models": {name: t_interval(own) for name, own in values.items()},
        "differences": {name: t_interval(gain) for name, gain in gains.items()},
    }


def _measures(row: Mapping[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, Mapping)]
