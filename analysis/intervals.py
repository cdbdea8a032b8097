"""A mean with its interval by Student's t, and how a number with an interval is written everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ensemble_kd.metrics import Measure


def t_interval(values: Sequence[float] | np.ndarray, comparisons: int = 1) -> Measure:
    """The mean of values with its 95 % interval by Student's t, which one value does not have: NaN.

    Args:
        comparisons: how many such intervals are to hold together with 95 % (Bonferroni).

    Examples:
        >>> {end: round(float(x), 2) for end, x in t_interval([97.0, 98.0, 99.0]).items()}
        {'value': 98.0, 'low': 95.52, 'high': 100.48}
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Measure(value=mean, low=math.nan, high=math.nan)
    quantile = float(stats.t.ppf(1 - 0.025 / comparisons, len(array) - 1))
    half = float(quantile * array.std(ddof=1) / len(array) ** 0.5)
    return Measure(value=mean, low=mean - half, high=mean + half)


def written(
    measure: Mapping[str, Any], scale: float = 1, digits: int = 4, unit: str = "", sign: str = ""
) -> tuple[str, str] | None:
    """The value with its unit, and `[low, high]`; None where there is no value. An end that is unknown is `?`.

    Args:
        measure: `value`, `low` and `high`; as computed, or as read from JSON, where NaN is None.
        scale: by which it is shown larger.
        digits: after the point; a zero has no sign of its own.
        unit: written after the value.
        sign: `+` to show the sign of all numbers.
    """
    value, *ends = (_number(measure[key], scale, digits, sign) for key in ("value", "low", "high"))
    return None if value == "?" else (f"{value}{unit}", f"[{', '.join(ends)}]")


def interval(
    measure: Mapping[str, Any],
    scale: float = 1,
    digits: int = 4,
    unit: str = "",
    sign: str = "",
    unknown: str = "–",
) -> str:
    """`written` as one text, `unknown` where there is no value.

    Examples:
        >>> interval({"value": 0.0123, "low": -0.004, "high": 0.0286}, scale=100, digits=2, unit=" points", sign="+")
        '+1.23 points [-0.40, +2.86]'
    """
    found = written(measure, scale, digits, unit, sign)
    return unknown if found is None else " ".join(found)


def _number(value: float | None, scale: float, digits: int, sign: str) -> str:
    if value is None or not math.isfinite(value):
        return "?"
    return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"
