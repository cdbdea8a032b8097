"""Two models' answers and probabilities for the same samples: pure functions, with bootstrap intervals.

Shapes: `N` samples, `C` classes, `R` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.stats import binomtest
from torch import Tensor

from ensemble_kd.analysis.diversity import UNDEFINED, from_counts
from ensemble_kd.analysis.resampling import measured
from ensemble_kd.metrics import RESAMPLES
from ensemble_kd.teachers.class_map import NO_VOTE

CELLS = ("both_right", "only_first", "only_second", "both_wrong", "same_wrong")
_ROWS = 4096  # samples at once, as probabilities in float64 are large


def compare_pair(
    first: np.ndarray | Tensor, second: np.ndarray | Tensor, labels: np.ndarray | Tensor, seed: int = 0
) -> dict[str, Any]:
    """All measures of two models that depend on their answers (N,) alone, with bootstrap intervals.

    Returns:
        `agreement`, and `bound`, the least that the two accuracies allow: max(0, p₁ + p₂ − 1); `kappa`
        (Cohen 1960, from the table of both answers); `cells`, shares of all samples, of which
        `same_wrong` is the part of `both_wrong` where both name the same wrong class; the measures of
        `diversity.from_counts`; `accuracy_difference` (first − second) and `mcnemar`, its exact test.
        What is 0/0 is NaN and has a `reason`.
    """
    a, b, y = (np.asarray(values) for values in (first, second, labels))
    # A bootstrap over samples is a multinomial draw over the distinct (a, b, y) triples.
    triples, counts = np.unique(np.stack([a, b, y], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    draws = np.vstack([counts, generator.multinomial(len(y), counts / len(y), size=RESAMPLES)])
    a, b, y = triples.T
    masks = (
        (a == y) & (b == y),
        (a == y) & (b != y),
        (a != y) & (b == y),
        (a != y) & (b != y),
        (a == b) & (a != y),
    )
    cells = {name: draws @ mask for name, mask in zip(CELLS, masks, strict=True)}
    total = draws.sum(axis=1)
    right, only_first, only_second, wrong, same_wrong = cells.values()
    diversity = from_counts(right, only_first, only_second, wrong)
    accuracies = (2 * right + only_first + only_second)[0] / total[0]
    return {
        "agreement": measured((right + same_wrong) / total),
        "bound": max(0.0, float(accuracies) - 1),
        "kappa": measured(cohen_kappa(draws, a, b), "both always name one and the same class"),
        **{name: measured(values, UNDEFINED.get(name, "")) for name, values in diversity.items()},
        "cells": {name: measured(values / total) for name, values in cells.items()},
        "accuracy_difference": measured((only_first - only_second) / total),
        "mcnemar": mcnemar(int(only_first[0]), int(only_second[0])),
    }


def cohen_kappa(draws: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cohen's kappa of each row of counts (R, U) over U pairs of answers; NaN where chance is certain."""
    total = draws.sum(axis=1)
    observed = draws @ (first == second) / total
    classes = 1 + int(max(first.max(), second.max()))
    one, other = (_margins(draws, answers, classes) / total[:, None] for answers in (first, second))
    chance = (one * other).sum(axis=1)
    certain = np.isclose(chance, 1)
    return np.where(certain, np.nan, (observed - chance) / np.where(certain, 1, 1 - chance))


def _margins(draws: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """How often each class is named (R, C) in each row of counts over U answers."""
    count = len(answers)
    named = csr_array((np.ones(count), answers, np.arange(count + 1)), shape=(count, classes))
    return (named.T @ draws.T).T


def mcnemar(only_first: int, only_second: int) -> dict[str, float]:
    """Whether two accuracies differ by more than chance (McNemar 1947), by the exact binomial test.

    Args:
        only_first, only_second: how many samples only one of the models gets right.

    Returns:
        `p`, two-sided, not corrected for the number of pairs that are compared; and both counts.
    """
    both = only_first + only_second
    p = float(binomtest(only_first, both).pvalue) if both else 1.0
    return {"p": p, "only_first": only_first, "only_second": only_second}


def divergences(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """Divergences of two models' outputs for each sample, from logits (N, C), at temperature 1, in nats.

    Returns:
        `first_second` KL(p₁‖p₂), `second_first` KL(p₂‖p₁), and `jsd`, ½ KL(p₁‖m) + ½ KL(p₂‖m) with
        m = ½ (p₁ + p₂) (Lin 1991), which is between 0 and ln 2; each (N,), float64.
    """
    blocks = [_divergences(*rows) for rows in zip(first.split(_ROWS), second.split(_ROWS), strict=True)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _divergences(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    p, q = (torch.log_softmax(logits.double(), dim=1) for logits in (first, second))
    middle = torch.logaddexp(p, q) - math.log(2)
    to = {"first_second": (p, q), "second_first": (q, p)}
    found = {name: (a.exp() * (a - b)).sum(dim=1) for name, (a, b) in to.items()}
    halves = [(a.exp() * (a - middle)).sum(dim=1) for a in (p, q)]
    found["jsd"] = (halves[0] + halves[1]) / 2
    return {name: values.clamp_min(0).cpu().numpy() for name, values in found.items()}


def known(logits: Tensor) -> Tensor:
    """Which classes (C,) a model knows at all, from its logits (N, C): a teacher may know a part of them."""
    return (logits > NO_VOTE / 2).any(dim=0)


def knows_as_much(second: Tensor, first: Tensor) -> bool:
    """Whether the second model (N, C) knows all classes of the first: else KL(p₁‖p₂) has no meaning."""
    return bool((known(second) | ~known(first)).all())


def matrix(pairs: Sequence[Mapping[str, Any]], names: Sequence[str], measure: str) -> np.ndarray:
    """A symmetric matrix of one measure over all pairs, 1 on the diagonal."""
    square = np.eye(len(names))
    for pair in pairs:
        i, j = names.index(pair["first"]), names.index(pair["second"])
        square[i, j] = square[j, i] = pair[measure]["value"]
    return square
