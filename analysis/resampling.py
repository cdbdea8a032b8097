"""A bootstrap over samples of many means at once, on the same resamples, so that differences are paired."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from ensemble_kd.metrics import RESAMPLES

Key = TypeVar("Key", bound=Hashable)
_BLOCK = 2_000_000
"""Drawn samples that are counted at once: what a resample costs in memory."""


def resampled(columns: Mapping[Key, np.ndarray], seed: int = 0) -> dict[Key, np.ndarray]:
    """The mean of each column (N,) by key: of the samples as they are, then of `RESAMPLES` resamples (1 + R,).

    All columns are drawn alike: the difference of two is paired by sample, and any function of several
    means has its interval in `measured`.
    """
    if not columns:
        return {}
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns.values()], axis=1)
    count, generator = len(values), np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    means = [values.mean(axis=0, keepdims=True)]
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        # A resample is a vector of counts; one product gives all means of a block of resamples.
        counts = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means.append(counts.astype(np.float64) @ values / count)
    return dict(zip(columns, np.concatenate(means).T, strict=True))


def measured(values: np.ndarray, reason: str = "") -> dict[str, Any]:
    """The first of `values` (1 + R,) with the 2.5 and 97.5 percentiles of the others that are numbers.

    Returns:
        `value`, `low`, `high`; where the value is NaN, all three are, and `reason` says why.
    """
    value, rest = float(values[0]), values[1:][np.isfinite(values[1:])]
    if np.isnan(value):
        return {"value": value, "low": value, "high": value, "reason": reason}
    low, high = np.percentile(rest, [2.5, 97.5]) if len(rest) else (value, value)
    return {"value": value, "low": float(low), "high": float(high)}


def unknown(reason: str) -> dict[str, Any]:
    """What stands in the place of a measure that cannot be had."""
    return measured(np.array([np.nan]), reason)
