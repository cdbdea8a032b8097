"""How unlike classifiers are in their errors: pure functions of answers, correctness and probabilities.

Shapes: `N` samples, `L` models, `C` classes. Kuncheva and Whitaker 2003 name the measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.special import log_softmax

from ensemble_kd.analysis.resampling import measured, resampled

Counts = np.ndarray | np.integer | int
UNDEFINED = {
    "q": "0/0: it needs images that both get right and that both get wrong, or that each alone gets right",
    "correlation": "one of both is right on all images, or on none",
    "error_consistency": "both are right on all images, or wrong on all",
    "interrater_kappa": "all are right on all images, or wrong on all",
}
"""Why a measure is NaN, where it is."""
_ROWS = 1024  # samples at once, as probabilities of all models in float64 are large


def from_counts(
    both_right: Counts, only_first: Counts, only_second: Counts, both_wrong: Counts
) -> dict[str, np.ndarray]:
    """Measures of two models from how many samples each or both get right: numbers, or arrays of one shape.

    Returns:
        `disagreement` (one right, one wrong), `double_fault` (both wrong), `q` (Yule's Q), `correlation`
        (ρ of correctness) and `error_consistency` (kappa of correctness, Geirhos et al. 2020, with
        c_exp = p₁p₂ + (1−p₁)(1−p₂)); NaN where 0/0, see `UNDEFINED`.
    """
    a, b, c, d = (
        np.asarray(cell, dtype=np.float64) for cell in (both_right, only_first, only_second, both_wrong)
    )
    surplus = a * d - b * c
    return {
        "disagreement": ratio(b + c, a + b + c + d),
        "double_fault": ratio(d, a + b + c + d),
        "q": ratio(surplus, a * d + b * c),
        "correlation": ratio(surplus, np.sqrt((a + b) * (c + d)) * np.sqrt((a + c) * (b + d))),
        "error_consistency": ratio(2 * surplus, (a + b) * (b + d) + (a + c) * (c + d)),
    }


def pair_diversity(first: Bool[np.ndarray, " N"], second: Bool[np.ndarray, " N"]) -> dict[str, float]:
    """`from_counts` of two models, from the correctness of their answers."""
    cells = (first & second, first & ~second, ~first & second, ~first & ~second)
    return {name: float(value) for name, value in from_counts(*(cell.sum() for cell in cells)).items()}


def group_diversity(right: Bool[np.ndarray, "L N"], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Measures of L ≥ 2 models together, from the correctness of their answers, with bootstrap intervals.

    With l of L models right on a sample and p̄ their mean accuracy (Kuncheva and Whitaker 2003, section 3.2):
    `kohavi_wolpert` = mean l (L − l) / L²; `disagreement` = 2L / (L − 1) · KW, the mean over all pairs;
    `interrater_kappa` = 1 − L / (L − 1) · KW / (p̄ (1 − p̄)), which is Fleiss' kappa of correctness.
    """
    count, level = len(right), right.sum(axis=0)
    columns = {"variance": level * (count - level) / count**2, "accuracy": level / count}
    draws = resampled(columns, seed)
    variance, accuracy = draws["variance"], draws["accuracy"]
    kappa = 1 - count / (count - 1) * ratio(variance, accuracy * (1 - accuracy))
    return {
        "kohavi_wolpert": measured(variance),
        "disagreement": measured(2 * count / (count - 1) * variance),
        "interrater_kappa": measured(kappa, UNDEFINED["interrater_kappa"]),
    }


def information(logits: Sequence[Shaped[np.ndarray, "N C"]]) -> Float[np.ndarray, " N"]:
    """H(mean p) − mean H(p) of L models' outputs for each sample, in nats: how much they differ."""
    starts = range(0, len(logits[0]), _ROWS)
    return np.concatenate([_information(np.stack([z[i : i + _ROWS] for z in logits])) for i in starts])


def mutual_information(logits: Shaped[np.ndarray, "L N C"]) -> float:
    """The mean of `information` over samples."""
    return float(information(list(logits)).mean())


def _information(logits: np.ndarray) -> np.ndarray:
    log_p = log_softmax(logits.astype(np.float64), axis=2)
    p = np.exp(log_p)
    mixture = p.mean(axis=0)
    entropy = -np.where(mixture > 0, mixture * np.log(np.where(mixture > 0, mixture, 1)), 0).sum(axis=1)
    return entropy + (p * log_p).sum(axis=2).mean(axis=0)


def ratio(top: np.ndarray | np.floating, bottom: np.ndarray | np.floating) -> np.ndarray:
    """top / bottom, NaN where the bottom is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(top, dtype=np.float64), bottom)
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
