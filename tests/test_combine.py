"""Pools of teachers against float64 scipy, and what must hold for every pool."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from torch import Tensor

from ensemble_kd.combine import POOLS, combine, overlap
from ensemble_kd.losses import reverse_kl

B, C = 5, 7
TEMPERATURES = torch.tensor([1.0, 4.0, 0.5, 2.0, 10.0], dtype=torch.float64)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape))


def logits_of(kind: str, count: int, batch: int = B, classes: int = C, seed: int = 0) -> Tensor:
    """(K, B, C) in float64: ordinary ones, and those at which naive formulas break."""
    rng = np.random.default_rng(seed)
    shape = (count, batch, classes)
    of_kind = {
        "random": lambda: rng.normal(scale=3, size=shape),
        "huge": lambda: rng.normal(scale=1e4, size=shape),
        "both ends": lambda: rng.choice([-1e4, 1e4], size=shape),
        "ties": lambda: rng.integers(0, 2, size=shape).astype(float),
        "one-hot": lambda: 1e4 * np.eye(classes)[rng.integers(0, classes, size=shape[:2])],
        "all equal": lambda: np.full(shape, 3.0),
    }
    return torch.from_numpy(of_kind[kind]())


KINDS = ("random", "huge", "both ends", "ties", "one-hot", "all equal")


def a_simplex_point(count: int, batch: int | None = None, seed: int = 0) -> Tensor:
    """Weights (K,), or (K, B) if a batch is given."""
    drawn = np.random.default_rng(seed).dirichlet(np.ones(count), size=batch)
    return torch.from_numpy(np.ascontiguousarray(drawn.T))


def spread(weights: Tensor, batch: int) -> np.ndarray:
    """Weights as (K, B, 1)."""
    w = weights.double().numpy()
    return np.broadcast_to(w[:, None] if w.ndim == 1 else w, (len(w), batch))[:, :, None]


def reference(
    logits: Tensor, weights: Tensor, temperatures: Tensor, pool: str, after: float = 1.0
) -> np.ndarray:
    """log-probabilities, by scipy in float64."""
    z, t = logits.double().numpy(), temperatures.double().numpy()[:, None, None]
    w = spread(weights, z.shape[1])
    if pool == "prob":
        pooled = logsumexp(log_softmax(z / t, axis=2), axis=0, b=w)
    elif pool == "logit":
        pooled = (w * z / t).sum(axis=0)
    else:
        pooled = logsumexp(log_softmax(z, axis=2), axis=0, b=w) / (w * t).sum(axis=0)
    return log_softmax(log_softmax(pooled, axis=1) / after, axis=1)


def assert_log_probabilities(log_p: Tensor, tolerance: float = 1e-6) -> None:
    assert log_p.isfinite().all()
    assert float(log_p.double().logsumexp(dim=1).abs().max()) < tolerance


every_pool = pytest.mark.parametrize("pool", POOLS)
every_count = pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
every_kind = pytest.mark.parametrize("kind", KINDS)
for_all_or_by_sample = pytest.mark.parametrize("batch", [None, B], ids=["(K,)", "(K,B)"])


def test_the_pools_are_these() -> None:
    assert list(POOLS) == ["prob", "logit", "pool-then-temper"]


@every_pool
@every_count
@every_kind
def test_the_target_equals_the_reference(pool: str, count: int, kind: str) -> None:
    for batch, dtype in itertools.product(
        (None, B), (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ):
        logits = logits_of(kind, count).to(dtype)
        weights, temperatures = a_simplex_point(count, batch), TEMPERATURES[:count]
        # Rounding grows with the size of the tempered logits.
        size = 10 + float((logits.double().abs().amax(dim=(1, 2)) / temperatures).max())
        for after in (1.0, 2.5):
            target = combine(logits, weights, temperatures, pool, after=after)
            assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            atol = size * (1e-14 if dtype == torch.float64 else 4e-7)
            expected = reference(logits, weights, temperatures, pool, after)
            np.testing.assert_allclose(target, expected, rtol=0, atol=atol)
            assert_log_probabilities(target)


@every_pool
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_are_finite_where_their_probabilities_underflow(pool: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4]], [[1e4, -1e4, 0.0]]], dtype=dtype)
    target = combine(logits, torch.tensor([0.5, 0.5]), torch.full((2,), 0.05), pool)
    assert target.isfinite().all()
    # The two teachers change places between the second class and the third.
    np.testing.assert_allclose(target[0, 1], target[0, 2], rtol=1e-6)
    assert float(target[0, 1]) < -1e5
    assert target.exp().tolist() == [[1.0, 0.0, 0.0]]


@every_pool
@every_kind
def test_identical_teachers_are_one_teacher(pool: str, kind: str) -> None:
    for count, batch in itertools.product(range(1, 6), (None, B)):
        one = logits_of(kind, 1)
        weights = a_simplex_point(count, batch)
        target = combine(one.expand(count, B, C), weights, torch.full((count,), 4.0), pool)
        np.testing.assert_allclose(target, log_softmax(one[0] / 4, axis=1), rtol=1e-12, atol=1e-9)


@every_pool
@every_kind
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_all_the_weight_on_one_teacher_gives_that_teacher(pool: str, kind: str, chosen: int) -> None:
    logits, temperatures = logits_of(kind, 3), torch.tensor([1.0, 4.0, 2.0])
    expected = log_softmax(logits[chosen] / float(temperatures[chosen]), axis=1)
    for weights in (torch.eye(3)[chosen], torch.eye(3)[chosen][:, None].expand(3, B)):
        target = combine(logits, weights, temperatures, pool)
        np.testing.assert_allclose(target, expected, rtol=1e-12, atol=1e-10)


@every_pool
@for_all_or_by_sample
def test_the_order_of_the_teachers_does_not_matter(pool: str, batch: int | None) -> None:
    logits, temperatures = numbers(4, B, C), torch.tensor([1.0, 4.0, 2.0, 3.0])
    weights, turn = a_simplex_point(4, batch), torch.tensor([2, 0, 3, 1])
    before = combine(logits, weights, temperatures, pool)
    after = combine(logits[turn], weights[turn], temperatures[turn], pool)
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert not np.allclose(combine(logits, weights[turn], temperatures, pool), before, atol=1e-3)


@every_pool
def test_each_sample_is_pooled_by_its_own_weights(pool: str) -> None:
    logits, weights, temperatures = numbers(3, B, C), a_simplex_point(3, B), torch.tensor([1.0, 4.0, 2.0])
    together = combine(logits, weights, temperatures, pool)
    for b in range(B):
        alone = combine(logits[:, b : b + 1], weights[:, b], temperatures, pool)
        np.testing.assert_allclose(together[b], alone[0], atol=1e-12)


@every_count
def test_uniform_weights_average(count: int) -> None:
    logits, ones = numbers(count, B, C), torch.ones(count)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    mean_of_p = softmax(logits, axis=2).mean(axis=0)
    np.testing.assert_allclose(combine(logits, weights, ones).exp(), mean_of_p, atol=1e-12)
    np.testing.assert_allclose(
        combine(logits, weights, ones, "logit"), log_softmax(logits.mean(dim=0), axis=1), atol=1e-12
    )


@every_pool
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_added_to_one_teachers_logits_changes_nothing(pool: str, dtype: torch.dtype) -> None:
    # Multiples of 1/64, and a temperature that is a power of 2, so that nothing is rounded but by the pool.
    logits = ((numbers(3, B, C) * 64).round() / 64).to(dtype)
    shifted = logits.clone()
    shifted[1] += torch.tensor([1.0, -3.0, 100.0, 0.5, 1e4], dtype=dtype)[:, None]
    weights, temperatures = a_simplex_point(3), torch.tensor([1.0, 4.0, 2.0])
    before, after = (combine(z, weights, temperatures, pool) for z in (logits, shifted))
    np.testing.assert_allclose(after, before, atol=1e-12 if dtype == torch.float64 else 1e-5)


@every_pool
def test_a_large_constant_does_not_cost_digits_in_float32(pool: str) -> None:
    logits = torch.tensor([[[0.0, 1.0, -2.0]]])
    before, after = (combine(z, torch.ones(1), torch.tensor([3.0]), pool) for z in (logits, logits + 2.0**13))
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@for_all_or_by_sample
def test_the_mixture_stands_for_the_sum_of_the_teachers_divergences(
    temperature: float, batch: int | None
) -> None:
    # sum_k w_k KL(p_k ‖ q) − KL(mixture ‖ q) is the same whatever q is.
    logits, weights = numbers(3, B, C), a_simplex_point(3, batch)
    mixture = combine(logits, weights, torch.full((3,), temperature)).exp().numpy()
    p, w = softmax(logits.numpy() / temperature, axis=2), spread(weights, B)[:, :, 0]
    rest = []
    for seed in range(1, 6):
        q = softmax(numbers(B, C, seed=seed).numpy(), axis=1)
        apart = sum(w[k] * rel_entr(p[k], q).sum(axis=1) for k in range(3))
        rest.append(apart - rel_entr(mixture, q).sum(axis=1))
    np.testing.assert_allclose(rest, np.broadcast_to(rest[0], (5, B)), atol=1e-12)
    assert min(rest[0]) > 0.001


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_pooled_logits_stand_for_the_sum_of_the_reverse_divergences(temperature: float) -> None:
    # sum_k w_k KL(q ‖ p_k) − KL(q ‖ log-pool) is the same whatever q is; with the mixture it is not.
    logits, weights, t = numbers(3, 1, C), a_simplex_point(3), torch.full((3,), temperature)
    targets = {pool: combine(logits, weights, t, pool) for pool in ("logit", "prob")}
    rest: dict[str, list[float]] = {"logit": [], "prob": []}
    for seed in range(1, 6):
        student = numbers(1, C, seed=seed)
        apart = sum(
            float(
                weights[k] * reverse_kl(student, torch.log_softmax(logits[k] / temperature, 1), temperature)
            )
            for k in range(3)
        )
        for pool, target in targets.items():
            rest[pool].append(apart - float(reverse_kl(student, target, temperature)))
    assert np.ptp(rest["logit"]) < 1e-10 < 0.01 < np.ptp(rest["prob"])


def test_pooled_logits_are_the_normalised_geometric_mean() -> None:
    logits, weights, temperatures = numbers(3, B, C), a_simplex_point(3, B), torch.tensor([1.0, 4.0, 2.0])
    p = softmax(logits.numpy() / temperatures.numpy()[:, None, None], axis=2)
    geometric = np.prod(p ** weights.numpy()[:, :, None], axis=0)
    expected = geometric / geometric.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(combine(logits, weights, temperatures, "logit").exp(), expected, atol=1e-12)


@pytest.mark.parametrize(("pool", "commute"), [("prob", False), ("logit", True)])
def test_pooling_and_tempering_commute_for_logits_only(pool: str, commute: bool) -> None:
    logits, weights = numbers(3, B, C), a_simplex_point(3)
    temper_first = combine(logits, weights, torch.full((3,), 4.0), pool)
    pool_first = combine(logits, weights, torch.ones(3), pool, after=4.0)
    assert np.allclose(temper_first, pool_first, atol=1e-10) == commute
    if not commute:
        assert float((temper_first.exp() - pool_first.exp()).abs().max()) > 0.01
        then = combine(logits, weights, torch.full((3,), 4.0), "pool-then-temper")
        np.testing.assert_allclose(then, pool_first, atol=1e-12)


def test_weights_in_another_precision_are_converted() -> None:
    logits, temperatures = numbers(2, B, C).float(), torch.tensor([1.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    target = combine(logits, weights, temperatures)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target, reference(logits, weights, temperatures, "prob"), atol=1e-5)


# Teachers that know some classes only.

KNOWN = {
    "a full and a partial one": ["1111111", "0111000"],
    "two full and a partial one": ["1111111", "0011110", "1111111"],
    "a full one, two apart": ["1111111", "1100000", "0000111"],
    "nested": ["1111111", "0111110", "0011100", "0001000"],
    "a chain": ["1110000", "0011100", "0000111"],
    "a ring": ["1110000", "0011100", "0000110", "1000011"],
    "twins, and the rest": ["1111000", "1111000", "0001111"],
    "through one class": ["1111000", "0001111"],
    "five": ["1111100", "0011111", "1100011", "1111111", "0000001"],
}
every_pattern = pytest.mark.parametrize("rows", KNOWN.values(), ids=KNOWN)


def mask(rows: list[str]) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def within(logits: Tensor, temperatures: Tensor, known: Tensor) -> np.ndarray:
    """Each teacher's probabilities over the classes that it knows, 0 elsewhere: (K, B, C)."""
    p = np.zeros(logits.shape)
    for k, classes in enumerate(known.numpy()):
        p[k][:, classes] = softmax(logits[k].double().numpy()[:, classes] / float(temperatures[k]), axis=1)
    return p


def one_step(u: np.ndarray, p: np.ndarray, w: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Σ_k w_k (u(S_k) p_k on S_k, u elsewhere), of one sample."""
    return sum(w[k] * np.where(known[k], u[known[k]].sum() * p[k], u) for k in range(len(w)))


def iterated(p: np.ndarray, w: np.ndarray, known: np.ndarray) -> np.ndarray:
    u, before = np.full(p.shape[1], 1 / p.shape[1]), np.zeros(p.shape[1])
    while np.abs(u - before).max() > 1e-14:
        u, before = one_step(u, p, w, known), u
    return u


def stationary(p: np.ndarray, w: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mass at c is spread by p_k where teacher k knows c, and stays where it does not: a Markov chain."""
    classes = p.shape[1]
    chain = np.zeros((classes, classes))
    for c in range(classes):
        for k in range(len(w)):
            chain[:, c] += w[k] * (p[k] if known[k, c] else np.eye(classes)[c])
    values, vectors = np.linalg.eig(chain)
    u = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return u / u.sum()


@every_kind
@pytest.mark.parametrize("pool", ["prob", "pool-then-temper"])
def test_teachers_that_know_all_are_mixed_as_ever(kind: str, pool: str) -> None:
    for count, batch in itertools.product(range(1, 6), (None, B)):
        logits, weights, temperatures = (
            logits_of(kind, count),
            a_simplex_point(count, batch),
            TEMPERATURES[:count],
        )
        known = torch.ones(count, C, dtype=torch.bool)
        for after in (1.0, 2.5):
            target = combine(logits, weights, temperatures, pool, known=known, after=after)
            expected = reference(logits, weights, temperatures, pool, after)
            np.testing.assert_allclose(target.exp(), np.exp(expected), atol=1e-9)
            seen = expected > -25  # far below, a bound may stand for them
            np.testing.assert_allclose(target.numpy()[seen], expected[seen], rtol=1e-9, atol=1e-9)
            assert_log_probabilities(target)


@every_pattern
@for_all_or_by_sample
def test_partial_teachers_agree_with_the_fixed_point(rows: list[str], batch: int | None) -> None:
    known, count = mask(rows), len(rows)
    logits, temperatures = numbers(count, B, C), TEMPERATURES[:count].clamp_min(3)
    weights = (
        0.8 * a_simplex_point(count, batch) + 0.2 / count
    )  # no small ones: the iteration gets there soon
    target = combine(logits, weights, temperatures, known=known)
    assert_log_probabilities(target)
    p, w = within(logits, temperatures, known), spread(weights, B)[:, :, 0]
    for b in range(B):
        by_iteration = iterated(p[:, b], w[:, b], known.numpy())
        np.testing.assert_allclose(target[b].exp(), by_iteration, atol=1e-7)
        np.testing.assert_allclose(target[b].exp(), stationary(p[:, b], w[:, b], known.numpy()), atol=1e-7)


def test_a_partial_teacher_beside_a_full_one_only_divides_the_mass_of_its_classes() -> None:
    # Outside S, u(c) = w₀ r(c) + w₁ u(c), so u = r. Inside, u = w₀ r + w₁ r(S) p.
    full, partial = numbers(2, B, C).numpy()
    inside = np.array([False, True, True, True, False, False, False])
    known = torch.from_numpy(np.stack([np.ones(C, dtype=bool), inside]))
    weights = a_simplex_point(2, B)
    logits = torch.from_numpy(np.stack([full, partial]))
    target = combine(logits, weights, torch.ones(2), known=known).exp().numpy()
    r, p, (w0, w1) = softmax(full, axis=1), softmax(partial[:, inside], axis=1), weights.numpy()[:, :, None]
    np.testing.assert_allclose(target[:, ~inside], r[:, ~inside], atol=1e-9)
    mass = r[:, inside].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(target[:, inside], w0 * r[:, inside] + w1 * mass * p, atol=1e-9)


@every_kind
def test_partial_teachers_with_no_class_in_common_beside_a_full_one(kind: str) -> None:
    # On S_k: (w₀ + w_k) u = w₀ r + w_k r(S_k) p_k. Where only the full one knows: u = r.
    known, logits, weights = mask(KNOWN["a full one, two apart"]), logits_of(kind, 3), a_simplex_point(3)
    p, w = within(logits, torch.ones(3), known), weights.numpy()
    expected = p[0].copy()
    for k in (1, 2):
        s = known[k].numpy()
        mass = p[0][:, s].sum(axis=1, keepdims=True)
        expected[:, s] = (w[0] * p[0][:, s] + w[k] * mass * p[k][:, s]) / (w[0] + w[k])
    target = combine(logits, weights, torch.ones(3), known=known)
    np.testing.assert_allclose(target.exp(), expected, atol=1e-8)
    assert_log_probabilities(target)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1), (1e-3, 0.999)])
def test_two_partial_teachers_meet_in_the_classes_that_both_know(weights: tuple[float, float]) -> None:
    # m₁ p₁(both) = m₂ p₂(both), m₁ + m₂ − u(both) = 1; outside, u = m_k p_k; in it, their weighted mean.
    known, logits, w = mask(["1111000", "0011111"]), numbers(2, B, C), np.array(weights)
    p = within(logits, torch.ones(2), known)
    both = known.all(dim=0).numpy()
    shared = p[:, :, both].sum(axis=2)
    m1, m2 = shared[1], shared[0]
    scale = m1 + m2 - shared[0] * shared[1]
    mp = np.stack([m1, m2])[:, :, None] * p / scale[:, None]
    expected = np.where(both, w[0] * mp[0] + w[1] * mp[1], mp[0] + mp[1])
    target = combine(logits, torch.from_numpy(w), torch.ones(2), known=known)
    np.testing.assert_allclose(target.exp(), expected, atol=1e-7)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-9, 1e-12])
def test_sure_partial_teachers_that_hardly_meet_are_still_divided_exactly(small: float) -> None:
    # One gives `small` to the class that both know, the other a tenth of it: so u(0) : u(2) is 1 : 10.
    p = torch.tensor([[[1 - small, small, 1.0]], [[1.0, small / 10, 1 - small / 10]]], dtype=torch.float64)
    target = combine(p.log(), torch.tensor([0.5, 0.5]), torch.ones(2), known=mask(["110", "011"])).exp()[0]
    odds = (1 - small) / small * (small / 10) / (1 - small / 10)
    assert float(target[0] / target[2]) == pytest.approx(odds, rel=1e-6)


@every_pattern
@pytest.mark.parametrize("pool", ["prob", "pool-then-temper"])
def test_what_stands_at_unknown_classes_is_not_read(rows: list[str], pool: str) -> None:
    known, count = mask(rows), len(rows)
    logits, weights = numbers(count, B, C), a_simplex_point(count)
    targets = []
    for garbage in (0.0, -1e4, 1e30, torch.inf):
        dirty = logits.masked_fill(~known[:, None], garbage)
        targets.append(combine(dirty, weights, TEMPERATURES[:count], pool, known=known))
    assert all(torch.equal(target, targets[0]) for target in targets)


@pytest.mark.parametrize("after", [1.0, 2.5])
def test_partial_teachers_are_tempered_before_or_after_the_pool(after: float) -> None:
    known, logits, weights = mask(KNOWN["a chain"]), numbers(3, B, C), a_simplex_point(3, B)
    temperatures, ones = torch.tensor([1.0, 4.0, 2.0]), torch.ones(3)
    before = combine(logits / temperatures[:, None, None], weights, ones, known=known).numpy()
    target = combine(logits, weights, temperatures, known=known, after=after)
    np.testing.assert_allclose(target, log_softmax(before / after, axis=1), atol=1e-9)
    pooled = combine(logits, weights, ones, known=known).numpy()
    mean = (weights.numpy() * temperatures.numpy()[:, None]).sum(axis=0)[:, None]
    target = combine(logits, weights, temperatures, "pool-then-temper", known=known, after=after)
    np.testing.assert_allclose(target, log_softmax(pooled / mean / after, axis=1), atol=1e-9)


@every_pattern
def test_the_order_of_partial_teachers_does_not_matter(rows: list[str]) -> None:
    known, count = mask(rows), len(rows)
    logits, weights, temperatures = numbers(count, B, C), a_simplex_point(count, B), TEMPERATURES[:count]
    turn = torch.from_numpy(np.random.default_rng(1).permutation(count))
    before = combine(logits, weights, temperatures, known=known)
    after = combine(logits[turn], weights[turn], temperatures[turn], known=known[turn])
    np.testing.assert_allclose(after.exp(), before.exp(), atol=1e-8)


def test_a_constant_added_to_a_partial_teachers_logits_changes_nothing() -> None:
    known, logits, weights = mask(KNOWN["a ring"]), numbers(4, B, C), a_simplex_point(4)
    shifted = logits + numbers(4, B, 1, seed=1, scale=1e3)
    before, after = (combine(z, weights, torch.ones(4), known=known) for z in (logits, shifted))
    np.testing.assert_allclose(after.exp(), before.exp(), atol=1e-8)


def test_identical_partial_teachers_count_as_one_of_their_weight() -> None:
    logits, known = numbers(2, B, C), mask(KNOWN["through one class"])
    ones = torch.ones(3)
    three = combine(
        logits[[0, 0, 1]], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), ones, known=known[[0, 0, 1]]
    )
    two = combine(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), ones[:2], known=known)
    np.testing.assert_allclose(three.exp(), two.exp(), atol=1e-8)


@every_pattern
def test_all_the_weight_on_one_partial_teacher_gives_that_teacher(rows: list[str]) -> None:
    known, count = mask(rows), len(rows)
    logits, temperatures = numbers(count, B, C), TEMPERATURES[:count]
    p = within(logits, temperatures, known)
    for chosen in range(count):
        target = combine(logits, torch.eye(count)[chosen], temperatures, known=known)
        np.testing.assert_allclose(target.exp(), p[chosen], atol=1e-9)


@every_pattern
@every_kind
def test_partial_teachers_give_finite_log_probabilities(rows: list[str], kind: str) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        known, count = mask(rows), len(rows)
        for seed in range(3):
            logits = logits_of(kind, count, seed=seed).to(dtype)
            target = combine(logits, a_simplex_point(count, B, seed), TEMPERATURES[:count], known=known)
            assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_log_probabilities(target)


def test_logits_of_partial_teachers_cannot_be_pooled() -> None:
    with pytest.raises(ValueError, match="no common scale"):
        combine(
            numbers(2, B, C), a_simplex_point(2), torch.ones(2), "logit", known=mask(["1" * 7, "0" * 6 + "1"])
        )


@pytest.mark.parametrize(
    ("rows", "nobody", "joined"),
    [
        (["111"], [], True),
        (["110"], [2], True),
        (["100", "001"], [1], False),
        (["110", "011"], [], True),
        (["110", "001"], [], False),
        (["1100", "0011", "0110"], [], True),
        (["1100", "0011", "1100"], [], False),
        (["1000", "0100", "0010", "1111"], [], True),
        (["11000", "00011", "11000", "00011"], [2], False),
        (["110000", "011000", "001100", "000110"], [5], True),
        (["001100", "110000", "011000", "000011"], [], False),
        (["001100", "110000", "011000", "000111"], [], True),
    ],
)
def test_overlap(rows: list[str], nobody: list[int], joined: bool) -> None:
    assert overlap(mask(rows)) == (nobody, joined)
    assert overlap(mask(rows[::-1])) == (nobody, joined)


# Properties: 7 × 150 examples, all pools in each; those of the weights add 5 × 9 × 25 (test_weighting.py).
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def ensembles(draw: st.DrawFn, smallest: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of any kind, weights for all or by sample, some of them 0, and temperatures."""
    count, batch, classes = draw(st.tuples(st.integers(smallest, 5), st.integers(1, 3), st.integers(2, 6)))
    kind, seed, by_sample = draw(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.booleans()))
    rng = np.random.default_rng(seed)
    logits = logits_of(kind, count, batch, classes, seed) * rng.choice([0.01, 1.0])
    raw = rng.dirichlet(np.full(count, rng.choice([0.1, 1.0])), size=batch if by_sample else None).T
    weights = np.where(raw > 1e-6, raw, 0)
    temperatures = np.exp(rng.uniform(np.log(0.05), np.log(100), size=count))
    return logits, torch.from_numpy(weights / weights.sum(axis=0)), torch.from_numpy(temperatures)


def tolerance(logits: Tensor, temperatures: Tensor) -> float:
    """What rounding may do to log-probabilities in float64."""
    return 1e-13 * (10 + float((logits.abs().amax(dim=(1, 2)) / temperatures).max()))


any_size = st.floats(-(2.0**100), 2.0**100, width=32)


@EXAMPLES
@given(data=st.data(), ensemble=ensembles())
def test_any_finite_logits_give_log_probabilities(
    data: st.DataObject, ensemble: tuple[Tensor, Tensor, Tensor]
) -> None:
    like, weights, temperatures = ensemble
    logits = torch.from_numpy(data.draw(hnp.arrays(np.float32, tuple(like.shape), elements=any_size)))
    for pool in POOLS:
        assert_log_probabilities(combine(logits, weights, temperatures, pool), 1e-5)


@EXAMPLES
@given(ensemble=ensembles(), seed=st.integers(0, 2**32 - 1))
def test_any_order_of_the_teachers_gives_the_same_target(
    ensemble: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    logits, weights, temperatures = ensemble
    turn = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    for pool in POOLS:
        before = combine(logits, weights, temperatures, pool)
        after = combine(logits[turn], weights[turn], temperatures[turn], pool)
        np.testing.assert_allclose(after, before, rtol=0, atol=tolerance(logits, temperatures))


@EXAMPLES
@given(ensemble=ensembles(smallest=2))
def test_any_number_of_identical_teachers_is_one(ensemble: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, weights, temperatures = ensemble
    logits, temperatures = logits[:1].expand_as(logits), temperatures[:1].expand_as(temperatures)
    expected = log_softmax(logits[0].numpy() / float(temperatures[0]), axis=1)
    for pool in POOLS:
        target = combine(logits, weights, temperatures, pool)
        np.testing.assert_allclose(target, expected, rtol=0, atol=tolerance(logits, temperatures))


@EXAMPLES
@given(ensemble=ensembles(), shift=st.integers(-(2**16), 2**16), which=st.integers(0, 4))
def test_any_constant_added_to_a_teacher_changes_nothing(
    ensemble: tuple[Tensor, Tensor, Tensor], shift: int, which: int
) -> None:
    logits, weights, temperatures = ensemble
    shifted = logits.clone()
    shifted[which % len(logits)] += shift
    atol = tolerance(logits.abs() + abs(shift), temperatures)
    for pool in POOLS:
        before, after = (combine(z, weights, temperatures, pool) for z in (logits, shifted))
        np.testing.assert_allclose(after, before, rtol=0, atol=atol)


@EXAMPLES
@given(ensemble=ensembles(), chosen=st.integers(0, 4))
def test_one_hot_weights_choose_a_teacher(ensemble: tuple[Tensor, Tensor, Tensor], chosen: int) -> None:
    logits, weights, temperatures = ensemble
    chosen %= len(logits)
    one_hot = torch.zeros_like(weights)
    one_hot[chosen] = 1
    expected = log_softmax(logits[chosen].numpy() / float(temperatures[chosen]), axis=1)
    for pool in POOLS:
        target = combine(logits, one_hot, temperatures, pool)
        np.testing.assert_allclose(target, expected, rtol=0, atol=tolerance(logits, temperatures))


@EXAMPLES
@given(ensemble=ensembles())
def test_a_single_teacher_is_itself_whatever_the_pool(ensemble: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, temperatures = (values[:1] for values in ensemble)
    expected = log_softmax(logits[0].numpy() / float(temperatures[0]), axis=1)
    for pool in POOLS:
        for weights in (torch.ones(1), torch.ones(1, logits.shape[1])):
            target = combine(logits, weights, temperatures, pool)
            np.testing.assert_allclose(target, expected, rtol=0, atol=tolerance(logits, temperatures))


@EXAMPLES
@given(
    rows=st.lists(st.integers(1, 2**6 - 1), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    full=st.booleans(),
)
def test_partial_teachers_leave_their_target_in_peace(rows: list[int], seed: int, full: bool) -> None:
    known = np.array([[row >> c & 1 for c in range(6)] for row in rows + [63] * full], dtype=bool)
    known = known[:, known.any(axis=0)]  # only the classes that some teacher knows
    nobody, joined = overlap(torch.from_numpy(known))
    assert not nobody
    if not joined:
        known[0] = True
    count, classes = known.shape
    logits = logits_of("random", count, 2, classes, seed) / 2
    weights = a_simplex_point(count, 2, seed) * 0.9 + 0.1 / count
    u = combine(logits, weights, torch.ones(count), known=torch.from_numpy(known)).exp().numpy()
    p = within(logits, torch.ones(count), torch.from_numpy(known))
    for b in range(2):
        np.testing.assert_allclose(one_step(u[b], p[:, b], weights.numpy()[:, b], known), u[b], atol=1e-8)
