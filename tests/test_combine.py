"""Combining teachers against numpy, and what must hold for every pool."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import Tensor

from ensemble_kd.combine import POOLS, combine, uniform_weights

B, C = 5, 7


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=scale, size=shape))


def a_simplex_point(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(count)))


def reference(logits: Tensor, weights: Tensor, temperatures: Tensor, pool: str) -> np.ndarray:
    z, w, t = logits.double().numpy(), weights.double().numpy(), temperatures.double().numpy()
    if pool == "prob":
        return sum(w[k] * softmax(z[k] / t[k], axis=1) for k in range(len(z)))
    return softmax(sum(w[k] * z[k] / t[k] for k in range(len(z))), axis=1)


every_pool = pytest.mark.parametrize("pool", POOLS)
every_count = pytest.mark.parametrize("count", [1, 2, 3, 4, 5])


@every_pool
@every_count
@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_target_equals_the_reference(pool: str, count: int, scale: float, dtype: torch.dtype) -> None:
    logits, weights = numbers(count, B, C, scale=scale).to(dtype), a_simplex_point(count)
    temperatures = torch.tensor([1.0, 4.0, 0.5, 2.0, 10.0])[:count]
    target = combine(logits, weights, temperatures, pool)
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # In float32, logits near 1e4 keep about three places behind the point.
    single = 1e-6 if scale < 10 or pool == "prob" else 1e-2
    atol = 1e-12 if dtype == torch.float64 else single
    np.testing.assert_allclose(target, reference(logits, weights, temperatures, pool), atol=atol)
    np.testing.assert_allclose(target.sum(dim=1), np.ones(B), atol=1e-6)
    assert target.min() >= 0


@every_pool
@every_count
def test_identical_teachers_are_one_teacher(pool: str, count: int) -> None:
    one = numbers(1, B, C)
    target = combine(one.expand(count, B, C), a_simplex_point(count), torch.full((count,), 4.0), pool)
    np.testing.assert_allclose(target, softmax(one[0] / 4, axis=1), atol=1e-7)


@every_pool
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_all_the_weight_on_one_teacher_gives_that_teacher(pool: str, chosen: int) -> None:
    logits, temperatures = numbers(3, B, C), torch.tensor([1.0, 4.0, 2.0])
    target = combine(logits, torch.eye(3)[chosen], temperatures, pool)
    np.testing.assert_allclose(
        target, softmax(logits[chosen] / float(temperatures[chosen]), axis=1), atol=1e-12
    )


@every_pool
def test_the_order_of_the_teachers_does_not_matter(pool: str) -> None:
    logits, weights, temperatures = numbers(4, B, C), a_simplex_point(4), torch.tensor([1.0, 4.0, 2.0, 3.0])
    turn = torch.tensor([2, 0, 3, 1])
    before = combine(logits, weights, temperatures, pool)
    after = combine(logits[turn], weights[turn], temperatures[turn], pool)
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert not np.allclose(combine(logits, weights[turn], temperatures, pool), before, atol=1e-3)


@every_count
def test_uniform_weights_average(count: int) -> None:
    logits, ones = numbers(count, B, C), torch.ones(count)
    weights = uniform_weights(count)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(
        combine(logits, weights, ones), softmax(logits, axis=2).mean(axis=0), atol=1e-7
    )
    np.testing.assert_allclose(
        combine(logits, weights, ones, "logit"), softmax(logits.mean(dim=0), axis=1), atol=1e-6
    )


@every_pool
def test_a_constant_added_to_one_teachers_logits_changes_nothing(pool: str) -> None:
    logits, weights, temperatures = numbers(3, B, C), a_simplex_point(3), torch.tensor([1.0, 4.0, 2.0])
    shifted = logits.clone()
    shifted[1] += torch.tensor([1.0, -3.0, 100.0, 0.5, 1000.0], dtype=torch.float64)[:, None]
    before, after = (combine(z, weights, temperatures, pool) for z in (logits, shifted))
    np.testing.assert_allclose(after, before, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mixture_stands_for_the_sum_of_the_teachers_divergences(temperature: float) -> None:
    # sum_k w_k KL(p_k ‖ q) − KL(mixture ‖ q) is the same whatever q is.
    logits, weights = numbers(3, B, C), a_simplex_point(3)
    mixture = combine(logits, weights, torch.full((3,), temperature)).numpy()
    p, w = softmax(logits.numpy() / temperature, axis=2), weights.numpy()
    rest = []
    for seed in range(1, 6):
        q = softmax(numbers(B, C, seed=seed).numpy(), axis=1)
        apart = sum(w[k] * rel_entr(p[k], q).sum(axis=1) for k in range(3))
        rest.append(apart - rel_entr(mixture, q).sum(axis=1))
    np.testing.assert_allclose(rest, np.broadcast_to(rest[0], (5, B)), atol=1e-12)
    assert min(rest[0]) > 0.01


def test_pooled_logits_are_the_normalised_geometric_mean() -> None:
    logits, weights, temperatures = numbers(3, B, C), a_simplex_point(3), torch.tensor([1.0, 4.0, 2.0])
    p = softmax(logits.numpy() / temperatures.numpy()[:, None, None], axis=2)
    geometric = np.prod(p ** weights.numpy()[:, None, None], axis=0)
    expected = geometric / geometric.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(combine(logits, weights, temperatures, "logit"), expected, atol=1e-12)


@pytest.mark.parametrize(("pool", "commute"), [("prob", False), ("logit", True)])
def test_pooling_and_tempering_commute_for_logits_only(pool: str, commute: bool) -> None:
    logits, weights = numbers(3, B, C), a_simplex_point(3)
    temper_first = combine(logits, weights, torch.full((3,), 4.0), pool)
    pool_first = torch.softmax(combine(logits, weights, torch.ones(3), pool).log() / 4, dim=1)
    assert np.allclose(temper_first, pool_first, atol=1e-10) == commute
    if not commute:
        assert float((temper_first - pool_first).abs().max()) > 0.01


def test_weights_in_another_precision_are_converted() -> None:
    logits, temperatures = numbers(2, B, C).float(), torch.tensor([1.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    target = combine(logits, weights, temperatures)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target, reference(logits, weights, temperatures, "prob"), atol=1e-6)


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    count, batch, classes = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6)))
    any_size = st.floats(-(2.0**100), 2.0**100, width=32)
    logits = draw(hnp.arrays(np.float32, (count, batch, classes), elements=any_size))
    raw = np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    weights = raw / raw.sum() if raw.sum() > 1e-3 else np.eye(count)[0]
    temperatures = draw(st.lists(st.floats(0.05, 100), min_size=count, max_size=count))
    return torch.from_numpy(logits), torch.from_numpy(weights), torch.tensor(temperatures)


@every_pool
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(ensemble=ensembles())
def test_any_finite_logits_give_a_probability_vector(pool: str, ensemble: tuple[Tensor, ...]) -> None:
    target = combine(*ensemble, pool)
    assert target.isfinite().all()
    assert target.min() >= 0
    assert float((target.sum(dim=1) - 1).abs().max()) < 1e-5
