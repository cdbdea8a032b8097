"""The largest logits of a sample: against float64, with the bounds that methods.md gives (invariant 8)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, softmax
from support import refused

from ensemble_kd.errors import ConfigError
from ensemble_kd.topk import TopK, below_largest, compress, expand


def logits(count: int, classes: int, spread: float = 4.0, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).normal(0, spread, (count, classes)).astype(np.float32)
    )


def on_disk(kept: TopK) -> TopK:
    """As it comes back from a store: the logits in half precision."""
    return kept._replace(values=kept.values.half().float())


def kl(p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each row, in nats."""
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - log_q), 0).sum(axis=1)


SHAPES = [(10, 1), (10, 3), (10, 9), (10, 10), (1000, 10), (1000, 100)]


@pytest.mark.parametrize(("classes", "k"), SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kept_classes_have_their_probabilities_and_the_rest_is_spread_evenly(classes, k, temperature):
    z = logits(50, classes)
    kept = compress(z, k, (0.5, 1.0, 4.0))
    p = softmax(z.numpy().astype(np.float64) / temperature, axis=1)
    q = softmax(expand(kept, temperature, classes).numpy().astype(np.float64) / temperature, axis=1)
    likeliest = np.sort(np.argsort(-p, axis=1)[:, :k], axis=1)
    assert (np.sort(kept.classes.numpy(), axis=1) == likeliest).all()
    np.testing.assert_allclose(
        np.take_along_axis(q, likeliest, 1), np.take_along_axis(p, likeliest, 1), rtol=5e-6
    )
    if k < classes:
        rest = np.ones_like(p, dtype=bool)
        np.put_along_axis(rest, likeliest, False, axis=1)
        missing = p[rest].reshape(50, -1).sum(axis=1)
        tail = q[rest].reshape(50, -1)
        # What is missing is a difference from 1 of float32 numbers, so its error is absolute.
        np.testing.assert_allclose(tail * (classes - k), missing[:, None] + 0 * tail, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("classes", "k"), [(10, 1), (10, 3), (1000, 10), (1000, 100)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_uniform_tail_is_nearer_than_renormalising(classes, k, temperature):
    """Renormalising errs by TV = m exactly; with the tail KL ≤ m · log(C − k), and no probability is 0."""
    z = logits(200, classes, spread=2.0)
    p = softmax(z.numpy().astype(np.float64) / temperature, axis=1)
    top = np.argsort(-p, axis=1)[:, :k]
    missing = 1 - np.take_along_axis(p, top, axis=1).sum(axis=1)
    scaled = np.zeros_like(p)
    np.put_along_axis(scaled, top, np.take_along_axis(p, top, 1) / (1 - missing)[:, None], axis=1)
    np.testing.assert_allclose(np.abs(p - scaled).sum(axis=1) / 2, missing, rtol=1e-9, atol=1e-12)

    kept = compress(z, k, (temperature,))
    for ours in (kept, on_disk(kept)):
        log_q = log_softmax(
            expand(ours, temperature, classes).numpy().astype(np.float64) / temperature, axis=1
        )
        slack = 1e-6 if ours is kept else 1e-4
        assert (kl(p, log_q) <= missing * np.log(classes - k) + slack).all()
        assert (np.abs(p - np.exp(log_q)).sum(axis=1) / 2 <= missing + slack).all()


def test_the_logsumexp_is_that_of_all_logits_in_float64():
    z = logits(100, 1000, spread=6.0)
    kept = compress(z, 5, (1.0, 2.5))
    below = (z - z.amax(dim=1, keepdim=True)).numpy().astype(np.float64)
    for number, temperature in enumerate((1.0, 2.5)):
        wanted = logsumexp(below / temperature, axis=1)
        np.testing.assert_allclose(kept.logsumexp[:, number].numpy(), wanted, rtol=2e-7)
    assert kept.logsumexp.dtype == torch.float32
    assert kept.temperatures == (1.0, 2.5)


EXTREME = {
    "one class has it all": torch.tensor([[1e4, 0.0, -1e4, 3.0, 2.0, 1.0]]),
    "a tie of all": torch.full((1, 6), 7.0),
    "a tie of two, far above": torch.tensor([[500.0, 500.0, 0.0, 0.0, 0.0, -500.0]]),
    "beyond half precision": torch.tensor([[3e5, 2.999e5, -3e5, 0.0, 1.0, 2.0]]),
    "all but equal, so that rounding adds up": 1000 + torch.linspace(0, 1e-2, 6)[None],
}


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits_stay_finite_and_sum_to_one(case, k):
    z = EXTREME[case]
    for temperature in (1.0, 4.0):
        kept = compress(z, k, (1.0, 4.0))
        for ours in (kept, kept._replace(values=kept.values.clamp(min=-65504).half().float())):
            u = expand(ours, temperature, 6)
            assert u.dtype == torch.float32
            assert u.isfinite().all()
            p = softmax(z.numpy().astype(np.float64) / temperature, axis=1)
            q = softmax(u.numpy().astype(np.float64) / temperature, axis=1)
            at = ours.classes.numpy()
            np.testing.assert_allclose(np.take_along_axis(q, at, 1), np.take_along_axis(p, at, 1), atol=1e-3)


def test_rounding_that_leaves_nothing_for_the_rest_leaves_a_trace():
    """Kept logits that were rounded up may sum to more than 1."""
    z = torch.tensor([[0.0, -1.0001, -1.0001, -30.0, -30.0]])
    kept = compress(z, 3, (1.0,))
    rounded = on_disk(kept)
    assert float((rounded.values - rounded.logsumexp).exp().sum()) > 1
    q = (expand(rounded, 1.0, 5)).softmax(dim=1)
    assert q.isfinite().all()
    assert 0 < float(q[0, 3]) == float(q[0, 4]) < 1e-7


def test_a_constant_added_to_all_logits_changes_nothing():
    z = logits(20, 50)
    first, second = compress(z, 5, (2.0,)), compress((z.double() + 1024).float(), 5, (2.0,))
    assert torch.equal(first.classes, second.classes)
    torch.testing.assert_close(expand(first, 2.0, 50), expand(second, 2.0, 50), atol=1e-3, rtol=0)
    assert torch.equal(below_largest(z).amax(dim=1), torch.zeros(20))
    assert torch.equal(first.values[:, 0], torch.zeros(20))


def test_half_precision_logits_are_taken_as_they_are():
    z = logits(20, 50)
    ours = expand(compress(z.half(), 5, (1.0,)), 1.0, 50)
    torch.testing.assert_close(ours, expand(compress(z.half().float(), 5, (1.0,)), 1.0, 50))


def test_another_temperature_is_refused():
    kept = compress(logits(3, 10), 2, (1.0, 4.0))
    with refused(
        ConfigError,
        "top-k targets kept for temperature 1, 4 cannot be used at 2.5",
        "how much probability lies outside the k largest logits is known only there",
        "keep them for this temperature as well, or keep all logits: leave top_k out",
    ):
        expand(kept, 2.5, 10)
