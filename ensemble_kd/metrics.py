"""What the tables show: pure functions of logits, in float64, with bootstrap intervals.

Shapes: `N` samples, `C` classes. Every mean is taken over samples, never over batch means.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

CALIBRATION_BINS = 15
RESAMPLES = 1000
_KEPT = 20_000_000
"""Counts of resamples that are kept, two bytes each."""


class Measure(TypedDict):
    """A number with its 95 % bootstrap interval over samples."""

    value: float
    low: float
    high: float


def per_sample(
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    target: Float[Tensor, "N C"] | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Each measure's contribution of each sample; the mean over samples is the measure.

    Args:
        logits: of the model that is judged.
        labels: the true classes.
        target: the ensemble's probabilities at temperature 1, for the teacher–student measures.

    Returns:
        `accuracy`, `top5` (where C > 5) and `nll` (nats); with a target also
        `teacher_student_cross_entropy`, `teacher_student_kl` (nats) and `agreement`.
    """
    log_q = torch.log_softmax(logits.double(), dim=1)
    values = {"accuracy": correct(logits, labels).double()}
    if logits.shape[1] > 5:
        # Stable, so that in a tie the class that argmax names is among the five.
        top5 = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        values["top5"] = (top5 == labels[:, None]).any(dim=1).double()
    values["nll"] = -log_q.gather(1, labels[:, None]).squeeze(1)
    if target is not None:
        p = target.double()
        cross_entropy = -(p * log_q).sum(dim=1)
        values["teacher_student_cross_entropy"] = cross_entropy
        values["teacher_student_kl"] = cross_entropy + torch.xlogy(p, p).sum(dim=1)
        values["agreement"] = (logits.argmax(dim=1) == target.argmax(dim=1)).double()
    return values


def correct(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether the most likely class is the true one."""
    return logits.argmax(dim=1) == labels


def within(
    mask: Bool[Tensor, " C"], logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "M D"], Int[Tensor, " M"]]:
    """Logits and labels among the classes in `mask`, of the samples of these classes."""
    rows, places = mask[labels], mask.cumsum(0) - 1
    return logits[rows][:, mask], places[labels[rows]]


def calibration_terms(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = CALIBRATION_BINS
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """The confidence bin of each sample, (lo, hi] of equal width, and its correctness − confidence."""
    confidence = torch.softmax(logits.double(), dim=1).amax(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1].to(logits.device)
    return torch.bucketize(confidence, edges), correct(logits, labels).double() - confidence


def expected_calibration_error(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = CALIBRATION_BINS
) -> float:
    """Σ_bins (n_bin / N) · |accuracy − confidence| (Guo et al. 2017, equation 3).

    It is biased upwards: a perfectly calibrated model scores about 0.02 at N = 2000.

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0]]).repeat(4, 1)  # 95.3 % sure of class 0 each time, right in three of four
        >>> round(expected_calibration_error(logits, torch.tensor([0, 0, 0, 1])), 4)
        0.2026
    """
    index, gap = calibration_terms(logits, labels, bins)
    per_bin = torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add_(0, index, gap)
    return float(per_bin.abs().sum() / len(labels))


def measure(
    logits: Float[Tensor, "N C"],
    labels: Int[Tensor, " N"],
    target: Float[Tensor, "N C"] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Measure]:
    """All measures of `per_sample` and `ece`, each with a percentile bootstrap interval.

    Resampling adds to the upward bias of the ECE, so its interval can lie above its value.
    """
    samples = per_sample(logits, labels, target)
    measures = {
        name: bootstrap_mean(values, resamples=resamples, seed=seed) for name, values in samples.items()
    }
    low, high = _bootstrap_ece(*calibration_terms(logits, labels), resamples=resamples, seed=seed)
    value = expected_calibration_error(logits, labels)
    return {**measures, "ece": Measure(value=value, low=low, high=high)}


def bootstrap_mean(
    values: Float[Tensor, " N"], *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> Measure:
    """The mean of `values` with its percentile bootstrap interval, of 95 % unless `confidence` differs.

    Examples:
        >>> {end: round(float(x), 2) for end, x in bootstrap_mean(torch.tensor([1.0] * 90 + [0.0] * 10)).items()}
        {'value': 0.9, 'low': 0.84, 'high': 0.96}
    """
    array = values.detach().cpu().numpy().astype(np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Measure(value=mean, low=mean, high=mean)
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Measure(value=mean, low=float(interval.low), high=float(interval.high))


def _bootstrap_ece(index: Tensor, gap: Tensor, *, resamples: int, seed: int) -> tuple[float, float]:
    signed = np.zeros((len(gap), CALIBRATION_BINS))
    signed[np.arange(len(gap)), index.cpu().numpy()] = gap.cpu().numpy()
    n = len(gap)
    blocks = (_kept_counts if n * resamples <= _KEPT else _counts)(n, resamples, seed)
    draws = [np.abs(counts @ signed).sum(axis=1) / n for counts in blocks]  # one product gives all bins
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return float(low), float(high)


def _counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples as how often each of n samples is in them, in blocks (100, n)."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 100):
        yield generator.multinomial(n, np.full(n, 1 / n), size=min(100, resamples - start))


@lru_cache(maxsize=1)
def _kept_counts(n: int, resamples: int, seed: int) -> list[np.ndarray]:
    """The same, drawn once for all models that are measured on one split: drawing takes most of the time."""
    return [block.astype(np.uint16) for block in _counts(n, resamples, seed)]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) over runs; the deviation of one run is NaN.

    Examples:
        >>> mean_and_spread([97.0, 98.0, 99.0])
        (98.0, 1.0)
    """
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
    return float(array.mean()), spread
