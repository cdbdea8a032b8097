"""Runs that differ in their seed only: means over seeds with t intervals. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ensemble_kd.files import sha256_json
from ensemble_kd.metrics import Measure

_FREE = ("seed", "out", "overwrite", "device", "profile", "compile", "cuda_graph")
"""Options in which runs of a group may differ: the seed, and what is no part of the experiment."""


def t_interval(values: Sequence[float]) -> Measure:
    """The mean of n ≥ 2 values with its 95 % interval by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
    return Measure(value=mean, low=mean - half, high=mean + half)


def groups(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sets of two or more runs that differ in their seed only.

    Args:
        runs: `name`, `config` and `metrics` of each; where a seed comes twice, its first run counts.

    Returns:
        Each with `runs` (names), `seeds`, `models`: mean over seeds of each measure of student and
        controls, and `differences`: of student minus control, paired by seed.
    """
    alike: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        key = sha256_json({name: value for name, value in run["config"].items() if name not in _FREE})
        alike.setdefault(key, {}).setdefault(run["config"]["seed"], run)
    return [_group(by_seed) for by_seed in alike.values() if len(by_seed) > 1]


def _group(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [run["metrics"]["models"] for run in by_seed.values()]
    first = rows[0]
    networks = [name for name, row in first.items() if row["role"] in ("student", "control")]
    values = {
        name: {measure: [row[name][measure]["value"] for row in rows] for measure in _measures(first[name])}
        for name in networks
    }
    return {
        "runs": [run["name"] for run in by_seed.values()],
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
    }


def _measures(row: Mapping[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, Mapping)]
