"""How unlike classifiers are in their errors: pure functions of answers, correctness and probabilities.

Shapes: `N` samples, `K` models, `C` classes. Kuncheva and Whitaker 2003 name the pair measures.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax


def pair_diversity(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Measures of two models from the correctness of their answers, both (N,) of bool.

    Returns:
        `disagreement` (one right, one wrong), `double_fault` (both wrong), `q` (Yule's Q; NaN where
        0/0) and `error_consistency` (kappa of correctness, Geirhos et al. 2020; NaN where chance is
        certain), all from shares of the samples.
    """
    right, only_first, only_second, wrong = (
        float(np.mean(cell)) for cell in (first & second, first & ~second, ~first & second, ~first & ~second)
    )
    a, b = float(np.mean(first)), float(np.mean(second))
    chance = a * b + (1 - a) * (1 - b)
    top, bottom = right * wrong - only_first * only_second, right * wrong + only_first * only_second
    return {
        "disagreement": only_first + only_second,
        "double_fault": wrong,
        "q": top / bottom if bottom > 0 else float("nan"),
        "error_consistency": (right + wrong - chance) / (1 - chance) if chance < 1 else float("nan"),
    }


def mutual_information(logits: np.ndarray) -> float:
    """H(mean p) − mean H(p) of K models' logits (K, N, C), in nats: how much their outputs differ."""
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=2)
    p = np.exp(log_p)
    mixture = p.mean(axis=0)
    entropy = -np.where(mixture > 0, mixture * np.log(np.where(mixture > 0, mixture, 1)), 0).sum(axis=1)
    return float((entropy + (p * log_p).sum(axis=2).mean(axis=0)).mean())
