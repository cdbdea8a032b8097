"""Weights of the teachers against numpy and scipy, and what must hold for every combiner and pool."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import entr, log_softmax, logsumexp, rel_entr, softmax
from torch import Tensor

from ensemble_kd.combine import POOLS, combine
from ensemble_kd.losses import kl_to_target
from ensemble_kd.weighting import (
    COMBINERS,
    EACH_BATCH,
    ONCE,
    agree_weights,
    best_weights,
    call,
    confidence_weights,
    drop_weights,
    entropy_weights,
    given_weights,
    greedy_weights,
    inputs_of,
    learned_weights,
    optimality_gap,
    uniform_weights,
)

B, C, N = 4, 6, 40
Inputs = dict[str, Any]

every_combiner = pytest.mark.parametrize("name", COMBINERS)
every_count = pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
fitted_pool = pytest.mark.parametrize("pool", ["prob", "logit"])

KINDS = ("random", "small", "huge", "both ends", "ties", "one-hot", "all equal")
UNTIED = ("random", "small", "sharp")


def logits_of(kind: str, *shape: int, rng: np.random.Generator) -> np.ndarray:
    return {
        "random": lambda: rng.normal(scale=3, size=shape),
        "small": lambda: rng.normal(scale=1e-3, size=shape),
        "sharp": lambda: rng.normal(scale=20, size=shape),
        "huge": lambda: rng.normal(scale=1e4, size=shape),
        "both ends": lambda: rng.choice([-1e4, 1e4], size=shape),
        "ties": lambda: rng.integers(0, 2, size=shape).astype(float),
        "one-hot": lambda: 1e4 * np.eye(shape[-1])[rng.integers(0, shape[-1], size=shape[:-1])],
        "all equal": lambda: np.full(shape, 3.0),
    }[kind]()


def all_inputs(
    count: int, kind: str = "random", seed: int = 0, pool: str = "prob", batch: int = B, rows: int = N
) -> Inputs:
    """Whatever a combiner may ask for, in float64."""
    rng = np.random.default_rng(seed)
    temperatures = rng.uniform(1, 5, size=count)
    arrays = {
        "given": rng.dirichlet(np.ones(count)),
        "val_logits": logits_of(kind, count, rows, C, rng=rng),
        "val_labels": rng.integers(0, C, size=rows),
        "logits": logits_of(kind, count, batch, C, rng=rng),
        "labels": rng.integers(0, C, size=batch),
        "student_logits": logits_of(kind, batch, C, rng=rng),
        "temperatures": temperatures,
        "draws": rng.random((count, batch)),
    }
    return {"count": count, "pool": pool, **{name: torch.from_numpy(a) for name, a in arrays.items()}}


BY_TEACHER = ("given", "val_logits", "logits", "temperatures", "draws")


def in_order(inputs: Inputs, order: list[int]) -> Inputs:
    return {name: value[order] if name in BY_TEACHER else value for name, value in inputs.items()}


FEWER_ROUNDS = partial(greedy_weights, rounds=10)
"""The same, sooner."""


def weights_of(name: str, inputs: Inputs) -> Tensor:
    return call(FEWER_ROUNDS if name == "greedy" else COMBINERS[name], inputs)


def target_of(inputs: Inputs, weights: Tensor, pool: str) -> Tensor:
    return combine(inputs["logits"], weights, inputs["temperatures"], pool)


def assert_simplex(weights: Tensor, count: int, batch: int = B) -> None:
    assert weights.shape in ((count,), (count, batch))
    assert weights.isfinite().all()
    assert float(weights.min()) >= 0
    assert float((weights.double().sum(dim=0) - 1).abs().max()) < 1e-6


# What a combiner is given.


def test_the_combiners_name_these_inputs() -> None:
    assert {name: set(inputs_of(weigh)) for name, weigh in COMBINERS.items()} == {
        "mean": {"count"},
        "fixed": {"given"},
        "learned": {"val_logits", "val_labels", "pool"},
        "greedy": {"val_logits", "val_labels", "pool"},
        "entropy": {"logits", "known"},
        "confidence": {"logits", "labels"},
        "agree": {"logits", "student_logits", "temperatures"},
        "drop": {"logits", "student_logits", "temperatures", "draws"},
        "best": {"val_logits", "val_labels"},
    }
    assert set(ONCE) | set(EACH_BATCH) == set(all_inputs(2)) | {"known"}
    assert not set(ONCE) & set(EACH_BATCH)


def test_a_function_of_the_user_is_given_what_it_names_and_keeps_its_defaults() -> None:
    def mine(logits: Tensor, labels: Tensor, power: float = 2.0) -> Tensor:
        right = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0].exp() ** power
        return right / right.sum(dim=0)

    inputs = all_inputs(3)
    assert inputs_of(mine) == {"logits", "labels"}
    picked = inputs["logits"].numpy()[:, np.arange(B), inputs["labels"].numpy()]
    np.testing.assert_allclose(call(mine, inputs), softmax(2 * picked, axis=0), atol=1e-12)


def test_a_function_that_wants_something_else_is_refused() -> None:
    def mine(logits: Tensor, teacher_names: list[str]) -> Tensor:
        raise AssertionError

    for use in (inputs_of, lambda weigh: call(weigh, all_inputs(2))):
        with pytest.raises(TypeError, match="'teacher_names', which is not offered"):
            use(mine)


# Weights that need no fitting.


@every_count
def test_uniform_weights(count: int) -> None:
    assert_simplex(uniform_weights(count), count)
    np.testing.assert_allclose(uniform_weights(count), np.full(count, 1 / count), rtol=1e-7)


def test_given_weights_are_as_given() -> None:
    weights = torch.tensor([0.1, 0.7, 0.2])
    assert torch.equal(given_weights(weights), weights)


def reference_entropy(logits: np.ndarray) -> np.ndarray:
    count = len(logits)
    entropy = entr(softmax(logits, axis=2)).sum(axis=2)
    total = entropy.sum(axis=0)
    share = np.where(total > 0, entropy / np.where(total > 0, total, 1), 1 / count)
    return (1 - share) / (count - 1)


def reference_confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    cross_entropy = -log_softmax(logits, axis=2)[:, np.arange(len(labels)), labels]
    return (1 - softmax(cross_entropy, axis=0)) / (len(logits) - 1)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_and_confidence_equal_their_formulas(count: int, kind: str) -> None:
    inputs = all_inputs(count, kind, batch=50)
    z, y = inputs["logits"].numpy(), inputs["labels"].numpy()
    np.testing.assert_allclose(entropy_weights(inputs["logits"]), reference_entropy(z), atol=1e-9)
    found = confidence_weights(inputs["logits"], inputs["labels"])
    np.testing.assert_allclose(found, reference_confidence(z, y), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entropy_and_confidence_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    inputs = all_inputs(3, batch=50)
    logits = inputs["logits"].to(dtype)
    z, y = logits.double().numpy(), inputs["labels"].numpy()
    entropy, confidence = entropy_weights(logits), confidence_weights(logits, inputs["labels"])
    assert entropy.dtype == confidence.dtype == torch.float32
    np.testing.assert_allclose(entropy, reference_entropy(z), atol=1e-6)
    np.testing.assert_allclose(confidence, reference_confidence(z, y), atol=1e-6)


def test_surer_teachers_count_more() -> None:
    # Entropies 0 and log 2: all the weight. Entropies 0, log 2 and log 2: 1/2, 1/4 and 1/4.
    sure, torn = [0.0, 1e4], [0.0, 0.0]
    assert entropy_weights(torch.tensor([[sure], [torn]])).tolist() == [[1.0], [0.0]]
    three = entropy_weights(torch.tensor([[torn], [sure], [torn]]))
    np.testing.assert_allclose(three, [[0.25], [0.5], [0.25]], atol=1e-7)


def test_teachers_that_are_all_certain_count_alike() -> None:
    certain = torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]], [[-1e4, 1e4]]])
    np.testing.assert_allclose(entropy_weights(certain), np.full((3, 1), 1 / 3), atol=1e-7)


def test_teachers_nearer_to_the_label_count_more() -> None:
    inputs = all_inputs(4, batch=100)
    weights = confidence_weights(inputs["logits"], inputs["labels"]).numpy()
    loss = -log_softmax(inputs["logits"], axis=2)[:, np.arange(100), inputs["labels"]]
    assert (np.argsort(-weights, axis=0) == np.argsort(loss, axis=0)).all()
    assert weights.max() <= 1 / 3 + 1e-12  # a share of at most 1 / (K − 1): the bad are dropped, none rules


@every_count
def test_ebkd_as_published_sums_to_less_than_one_and_this_does_not(count: int) -> None:
    # Published: w_k = (1 − H_k/ΣH)/K, which sums to (K − 1)/K, and to 0 for a single teacher.
    logits = all_inputs(count)["logits"]
    entropy = entr(softmax(logits, axis=2)).sum(axis=2)
    published = (1 - entropy / entropy.sum(axis=0)) / count
    np.testing.assert_allclose(published.sum(axis=0), (count - 1) / count, atol=1e-12)
    np.testing.assert_allclose(entropy_weights(logits).sum(dim=0), np.ones(B), atol=1e-6)


@every_count
def test_ca_mkd_as_published_divides_by_k_twice_and_this_does_not(count: int) -> None:
    # Published: w_k = (1 − softmax_k(CE))/(K − 1), and then a mean over the teachers: in all 1/K of the
    # loss; 0/0 for a single teacher.
    inputs = all_inputs(count)
    weights = confidence_weights(inputs["logits"], inputs["labels"])
    assert weights.isfinite().all()
    np.testing.assert_allclose(weights.sum(dim=0), np.ones(B), atol=1e-6)
    if count > 1:
        published = reference_confidence(inputs["logits"].numpy(), inputs["labels"].numpy()) / count
        np.testing.assert_allclose(published.sum(axis=0), 1 / count, atol=1e-12)
        np.testing.assert_allclose(weights, published * count, atol=1e-9)


# Dropping.


def reference_drop(inputs: Inputs, drop: float) -> np.ndarray:
    z, s, t, draws = (inputs[n].numpy() for n in ("logits", "student_logits", "temperatures", "draws"))
    weights = np.zeros(draws.shape)
    for b in range(len(s)):
        loss = [
            t[k] ** 2 * rel_entr(softmax(z[k, b] / t[k]), softmax(s[b] / t[k])).sum() for k in range(len(z))
        ]
        kept = [k for k in range(len(z)) if k == np.argmax(loss) or draws[k, b] >= drop]
        weights[kept, b] = 1 / len(kept)
    return weights


@every_count
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.5, 1.0])
def test_drop_equals_its_definition(count: int, drop: float) -> None:
    inputs = all_inputs(count, batch=50)
    weights = drop_weights(*(inputs[n] for n in ("logits", "student_logits", "temperatures", "draws")), drop)
    np.testing.assert_allclose(weights, reference_drop(inputs, drop), atol=1e-12)


def test_nothing_is_dropped_at_0_and_only_the_farthest_teacher_kept_at_1() -> None:
    inputs = all_inputs(3, batch=50)
    args = [inputs[n] for n in ("logits", "student_logits", "temperatures")]
    never, none = drop_weights(*args, torch.zeros(3, 50), 0.0), drop_weights(*args, inputs["draws"], 1.0)
    np.testing.assert_allclose(never, np.full((3, 50), 1 / 3), atol=1e-12)
    np.testing.assert_array_equal(none.amax(dim=0), np.ones(50))
    assert len(set(none.argmax(dim=0).tolist())) == 3


def test_a_teacher_that_is_not_the_farthest_is_kept_as_often_as_asked() -> None:
    inputs = all_inputs(2, batch=4000)
    args = [inputs[n] for n in ("logits", "student_logits", "temperatures", "draws")]
    alone = drop_weights(*args, 0.3).amax(dim=0) == 1
    assert float(alone.double().mean()) == pytest.approx(0.3, abs=0.03)


# Agreement of gradients.


def combined_gradients(inputs: Inputs) -> np.ndarray:
    """(K, C): by autograd, of the mean loss over the batch, summed over the batch to one logit vector."""
    rows = []
    for z, t in zip(inputs["logits"], inputs["temperatures"].tolist(), strict=True):
        student = inputs["student_logits"].clone().requires_grad_()
        kl_to_target(student, torch.log_softmax(z / t, dim=1), t).backward()
        assert student.grad is not None
        rows.append(student.grad.sum(dim=0).numpy())
    return np.array(rows)


def lowest_of_all_faces(gram: np.ndarray, cap: float) -> float:
    """min wᵀGw over the capped simplex, exactly: each weight is 0, the cap, or free."""
    count, lowest = len(gram), np.inf
    for states in itertools.product((0, 1, 2), repeat=count):
        state = np.array(states)
        w, free = np.where(state == 1, cap, 0.0), np.flatnonzero(state == 2)
        if len(free):
            n = len(free)
            system = np.block(
                [[gram[np.ix_(free, free)], np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]]
            )
            right = np.append(-gram[free] @ w, 1 - w.sum())
            w[free] = np.linalg.lstsq(system, right, rcond=None)[0][:n]
        if abs(w.sum() - 1) < 1e-9 and w.min() > -1e-12 and w.max() < cap + 1e-12:
            lowest = min(lowest, float(w @ gram @ w))
    return lowest


def by_slsqp(gram: np.ndarray, cap: float) -> np.ndarray:
    count = len(gram)
    return minimize(
        lambda w: w @ gram @ w,
        np.full(count, 1 / count),
        jac=lambda w: 2 * gram @ w,
        method="SLSQP",
        bounds=[(0, cap)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 1000},
    ).x


def agree(inputs: Inputs, cap: float) -> Tensor:
    return agree_weights(inputs["logits"], inputs["student_logits"], inputs["temperatures"], cap)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("cap", [0.3, 0.6, 1.0])
def test_agree_finds_the_shortest_combined_gradient(count: int, cap: float) -> None:
    for seed in range(25):
        inputs = all_inputs(count, UNTIED[seed % 3], seed)
        weights = agree(inputs, cap).numpy()
        highest = max(cap, 1 / count)
        assert weights.min() >= 0
        assert weights.max() <= highest + 1e-6
        gradients = combined_gradients(inputs)
        gram = gradients @ gradients.T
        gram /= gram.max()
        length = weights @ gram @ weights
        assert length == pytest.approx(lowest_of_all_faces(gram, highest), abs=1e-8)
        assert length <= (found := by_slsqp(gram, highest)) @ gram @ found + 1e-8


@pytest.mark.parametrize(
    ("cap", "count", "seed"), [(0.3, 4, 164), (0.3, 4, 2061), (0.6, 4, 1282), (0.6, 5, 233), (0.6, 5, 2789)]
)
def test_agree_goes_on_until_it_is_done(cap: float, count: int, seed: int) -> None:
    # These need more than K steps, after which scipy's bounded least squares stops if it is not told.
    inputs = all_inputs(count, "random", seed, rows=1)
    weights, gradients = agree(inputs, cap).numpy(), combined_gradients(inputs)
    gram = gradients @ gradients.T
    gram /= gram.max()
    assert weights @ gram @ weights == pytest.approx(lowest_of_all_faces(gram, cap), abs=1e-8)


@every_count
def test_agree_is_uniform_where_the_cap_leaves_nothing_else(count: int) -> None:
    np.testing.assert_allclose(agree(all_inputs(count), 1 / count), np.full(count, 1 / count), atol=1e-12)


@pytest.mark.parametrize("cap", [1.0, 5.0])
def test_agree_of_two_teachers_has_a_closed_form(cap: float) -> None:
    inner = 0
    for seed in range(100):
        inputs = all_inputs(2, seed=seed)
        g1, g2 = combined_gradients(inputs)
        expected = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0, 1)
        np.testing.assert_allclose(agree(inputs, cap), [expected, 1 - expected], atol=1e-7)
        inner += 0 < expected < 1
    assert 20 < inner < 100


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1.0])
def test_agree_does_not_depend_on_the_size_of_the_gradients(size: float) -> None:
    # At equal temperatures and small differences, g_k is J (s − z_k), with J the Jacobian of softmax.
    rng = np.random.default_rng(3)
    student, apart = rng.normal(size=(1, C)), rng.normal(size=(3, 1, C))
    q = softmax(student[0])
    gradients = size * apart[:, 0] @ (np.diag(q) - np.outer(q, q))
    if size == 1.0:
        gradients = softmax(student + apart, axis=2)[:, 0] - q
    gram = gradients @ gradients.T
    weights = agree_weights(
        torch.from_numpy(student + size * apart), torch.from_numpy(student), torch.ones(3), 0.6
    )
    expected = by_slsqp(gram / gram.max(), 0.6)
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_agree_of_teachers_that_are_the_student_is_uniform() -> None:
    inputs = all_inputs(3)
    same = inputs["student_logits"].expand(3, B, C)
    np.testing.assert_allclose(agree_weights(same, same[0], torch.ones(3)), np.full(3, 1 / 3), atol=1e-12)


def test_agree_follows_the_teachers_and_not_the_list_order() -> None:
    # Regression: AE-KD's published solver gave [0.6, 0.4, 0], in list order, whatever the teachers were.
    inputs = all_inputs(3, seed=1)
    weights = agree(inputs, 0.6)
    for order in itertools.permutations(range(3)):
        turned = agree(in_order(inputs, list(order)), 0.6)
        np.testing.assert_allclose(turned, weights[list(order)], atol=1e-7)
    of_all = np.array([agree(all_inputs(3, seed=seed), 0.6).numpy() for seed in range(30)])
    assert np.isclose(of_all, [0.6, 0.4, 0.0], atol=1e-3).all(axis=1).mean() < 0.2
    # The same share of first places for each teacher, but for chance.
    assert np.bincount(of_all.argmax(axis=1), minlength=3).min() >= 5


# Weights fitted on the validation split.


def label_log_p(inputs: Inputs) -> np.ndarray:
    """log p_k(y): (N, K)."""
    log_p = log_softmax(inputs["val_logits"].double().numpy(), axis=2)
    return log_p[:, np.arange(log_p.shape[1]), inputs["val_labels"].numpy()].T


def reference_nll(weights: np.ndarray, inputs: Inputs, pool: str) -> float:
    if pool == "prob":
        return float(-logsumexp(label_log_p(inputs), b=weights, axis=1).mean())
    mixed = np.tensordot(weights, inputs["val_logits"].double().numpy(), axes=1)
    return float(-log_softmax(mixed, axis=1)[np.arange(len(mixed)), inputs["val_labels"].numpy()].mean())


def derivatives(weights: np.ndarray, inputs: Inputs, pool: str) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of the NLL."""
    if pool == "prob":
        log_p = label_log_p(inputs)
        far = log_p - logsumexp(log_p, b=weights, axis=1)[:, None]
        ratio = np.exp(np.minimum(far, 300))  # where the only teacher that is right has no weight
        return -ratio.mean(axis=0), ratio.T @ ratio / len(ratio)
    z = inputs["val_logits"].double().numpy()
    z = z - z.max(axis=2, keepdims=True)
    p = softmax(np.tensordot(weights, z, axes=1), axis=1)
    expected = np.einsum("nc,knc->nk", p, z)
    at_label = z[:, np.arange(len(p)), inputs["val_labels"].numpy()].T
    second = np.einsum("nc,inc,jnc->ij", p, z, z) - expected.T @ expected
    return (expected - at_label).mean(axis=0), second / len(p)


def newton(inputs: Inputs, pool: str, face: list[int]) -> np.ndarray:
    """The lowest NLL with weight on these teachers only, by damped Newton steps that stay inside."""
    count, n = inputs["count"], len(face)
    weights, value = np.zeros(count), np.inf
    weights[face] = 1 / n
    for _ in range(60):
        gradient, hessian = derivatives(weights, inputs, pool)
        system = np.block(
            [[hessian[np.ix_(face, face)], np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]]
        )
        step = np.zeros(count)
        step[face] = np.linalg.lstsq(system, np.append(-gradient[face], 0), rcond=1e-14)[0][:n]
        for size in 0.5 ** np.arange(30):
            tried = weights + size * step
            if tried[face].min() > 0 and (found := reference_nll(tried, inputs, pool)) < value:
                break
        else:
            break
        weights, value = tried, found
    return weights


def by_faces(inputs: Inputs, pool: str) -> np.ndarray:
    """The best weights, from all sets of teachers that might share them."""
    count = inputs["count"]
    faces = [face for n in range(1, count + 1) for face in itertools.combinations(range(count), n)]
    every = [newton(inputs, pool, list(face)) for face in faces]
    return min(every, key=lambda weights: reference_nll(weights, inputs, pool))


def frank_wolfe_gap(weights: np.ndarray, inputs: Inputs, pool: str) -> float:
    gradient = derivatives(weights, inputs, pool)[0]
    return float(gradient @ weights - gradient.min())


def validation_split(kind: str, count: int, rows: int = 200, seed: int = 0) -> Inputs:
    """Teachers that know something of the labels, each in its own way."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, size=rows)
    skill = rng.uniform(0.5, 4, size=(count, 1, 1))
    z = skill * np.eye(C)[labels] + rng.normal(scale=2, size=(count, rows, C))
    if kind == "near-identical":
        z = z[:1] + rng.normal(scale=1e-4, size=z.shape)
    elif kind == "a bad one":
        z[-1] = -3 * z[-1]
    elif kind == "−1e4 at the label":
        z[-1, np.arange(rows), labels] = -1e4
    elif kind == "−1e4 at one label":
        z[0, 0, labels[0]] = -1e4
    return {"count": count, "val_logits": torch.from_numpy(z), "val_labels": torch.from_numpy(labels)}


SPLITS = ("unlike", "near-identical", "a bad one", "−1e4 at the label", "−1e4 at one label")
every_split = pytest.mark.parametrize("kind", SPLITS)


def fit(inputs: Inputs, pool: str) -> np.ndarray:
    return learned_weights(inputs["val_logits"], inputs["val_labels"], pool).double().numpy()


@fitted_pool
@every_count
@every_split
def test_learned_weights_reach_the_lowest_nll(kind: str, count: int, pool: str) -> None:
    inputs = validation_split(kind, count)
    weights, other = fit(inputs, pool), by_faces(inputs, pool)
    assert frank_wolfe_gap(other, inputs, pool) < 1e-7  # so that the reference is the optimum
    assert_simplex(torch.from_numpy(weights), count)
    nll = reference_nll(weights, inputs, pool)
    assert nll == pytest.approx(reference_nll(other, inputs, pool), abs=1e-6)
    for plain in (np.full(count, 1 / count), *np.eye(count)):
        assert nll <= reference_nll(plain, inputs, pool) + 1e-6


@fitted_pool
@every_count
@pytest.mark.parametrize("kind", ["unlike", "near-identical", "a bad one"])
def test_learned_weights_are_certified_by_their_gap(kind: str, count: int, pool: str) -> None:
    for seed in range(5):
        inputs = validation_split(kind, count, seed=seed)
        weights = learned_weights(inputs["val_logits"], inputs["val_labels"], pool)
        assert optimality_gap(weights, inputs["val_logits"], inputs["val_labels"], pool) < 1e-6
        assert frank_wolfe_gap(weights.double().numpy(), inputs, pool) < 1e-6


@fitted_pool
@every_split
def test_the_gap_bounds_what_is_left_to_gain(kind: str, pool: str) -> None:
    inputs = validation_split(kind, 3)
    lowest = reference_nll(fit(inputs, pool), inputs, pool)
    rng = np.random.default_rng(0)
    for weights in (*rng.dirichlet(np.ones(3), size=20), np.full(3, 1 / 3)):
        gap = optimality_gap(torch.from_numpy(weights), inputs["val_logits"], inputs["val_labels"], pool)
        assert gap >= reference_nll(weights, inputs, pool) - lowest - 1e-9
        assert gap == pytest.approx(frank_wolfe_gap(weights, inputs, pool), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["unlike", "a bad one", "−1e4 at the label"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_em_never_increases_the_nll_and_ends_where_learned_does(kind: str, count: int) -> None:
    inputs = validation_split(kind, count)
    p = np.exp(label_log_p(inputs))
    weights, before = np.full(count, 1 / count), np.inf
    for _ in range(20_000):
        mixed = p @ weights
        nll = -np.log(mixed).mean()
        assert nll <= before + 1e-14
        weights, before = weights * (p / mixed[:, None]).mean(axis=0), nll
    assert reference_nll(fit(inputs, "prob"), inputs, "prob") == pytest.approx(before, abs=1e-6)


def test_learned_weights_are_all_on_a_teacher_that_is_better_everywhere() -> None:
    inputs = validation_split("−1e4 at the label", 2)
    for pool in ("prob", "logit"):
        np.testing.assert_allclose(fit(inputs, pool), [1.0, 0.0], atol=1e-6)


@fitted_pool
@every_count
@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_are_no_worse_than_plain_ones_at_extreme_logits(
    kind: str, count: int, pool: str
) -> None:
    inputs = all_inputs(count, kind)
    weights = fit(inputs, pool)
    assert_simplex(torch.from_numpy(weights), count)
    nll = reference_nll(weights, inputs, pool)
    for plain in (np.full(count, 1 / count), *np.eye(count)):
        # Weights are float32: their rounding counts where a NLL is in the thousands.
        assert nll <= reference_nll(plain, inputs, pool) + 1e-6 + 1e-6 * nll * (nll > 100)


def naive_greedy(inputs: Inputs, pool: str, rounds: int) -> np.ndarray:
    chosen: list[int] = []
    for _ in range(rounds):
        trials = []
        for k in range(inputs["count"]):
            tried = np.bincount([*chosen, k], minlength=inputs["count"]) / (len(chosen) + 1)
            trials.append(reference_nll(tried, inputs, pool))
        chosen.append(int(np.argmin(trials)))
    return np.bincount(chosen, minlength=inputs["count"]) / rounds


@fitted_pool
@every_count
@pytest.mark.parametrize("kind", ["unlike", "a bad one", "−1e4 at one label"])
@pytest.mark.parametrize("rounds", [1, 7, 50])
def test_greedy_equals_a_naive_loop(kind: str, count: int, pool: str, rounds: int) -> None:
    inputs = validation_split(kind, count, rows=60)
    weights = greedy_weights(inputs["val_logits"], inputs["val_labels"], pool, rounds)
    np.testing.assert_allclose(weights, naive_greedy(inputs, pool, rounds), atol=1e-6)


def test_greedy_begins_with_the_best_single_teacher_also_where_others_are_certainly_wrong() -> None:
    # NLL 1000 and 100: a log-probability of −1e4 is worth its size, not what is left when it underflows.
    rows = 10
    first, second = np.zeros((rows, 2)), np.tile([-100.0, 0.0], (rows, 1))
    first[:, 0], first[0, 0] = 50, -1e4
    logits, labels = torch.from_numpy(np.stack([first, second])), torch.zeros(rows, dtype=torch.long)
    assert greedy_weights(logits, labels, "prob", rounds=1).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("right", "margins", "best"),
    [
        ([3, 2, 1], [1.0, 1.0, 1.0], 0),
        ([1, 3, 2], [1.0, 1.0, 1.0], 1),
        ([1, 2, 3], [0.1, 0.1, 10.0], 2),  # accuracy comes first, though its one error costs it the NLL
        ([2, 2, 1], [1.0, 0.5, 1.0], 1),  # a tie: here, less sure of what is wrong
        ([2, 1, 2], [0.5, 1.0, 1.0], 0),
        ([2, 2, 2], [1.0, 1.0, 1.0], 0),  # the same in all: the first
    ],
)
def test_best_is_the_most_accurate_and_in_a_tie_the_one_of_lowest_nll(
    right: list[int], margins: list[float], best: int
) -> None:
    rows, labels = 4, torch.tensor([0, 1, 0, 1])
    logits = torch.zeros(3, rows, 2)
    for k, (hits, margin) in enumerate(zip(right, margins, strict=True)):
        for n in range(rows):
            logits[k, n, labels[n] if n < hits else 1 - labels[n]] = margin
    weights = best_weights(logits, labels)
    assert weights.tolist() == [float(k == best) for k in range(3)]


# All combiners.


@every_combiner
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_and_sum_to_1_whatever_the_logits(name: str, kind: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for count, pool in itertools.product((1, 2, 5), ("prob", "logit")):
            inputs = all_inputs(count, kind, seed=count, pool=pool)
            half = {n: inputs[n].to(dtype) for n in ("val_logits", "logits", "student_logits")}
            assert_simplex(weights_of(name, inputs | half), count)


@every_combiner
def test_a_single_teacher_has_all_the_weight(name: str) -> None:
    for kind in KINDS:
        weights = weights_of(name, all_inputs(1, kind))
        np.testing.assert_allclose(weights, np.ones(weights.shape), rtol=1e-12)


@every_combiner
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_size_of_the_loss_does_not_depend_on_the_combiner_or_the_number_of_teachers(
    name: str, pool: str, temperature: float
) -> None:
    one = all_inputs(1)
    student = one["student_logits"]
    alone = torch.log_softmax(one["logits"][0] / temperature, dim=1)
    expected = float(kl_to_target(student, alone, temperature))
    assert expected > 0.1
    for count in range(1, 6):
        inputs = all_inputs(count) | {n: one[n].expand(count, -1, -1) for n in ("logits", "val_logits")}
        inputs["temperatures"] = torch.full((count,), temperature, dtype=torch.float64)
        target = target_of(inputs, weights_of(name, inputs), pool)
        assert float(kl_to_target(student, target, temperature)) == pytest.approx(expected, rel=1e-5)


@every_combiner
@pytest.mark.parametrize("count", [2, 3, 5])
def test_weights_follow_their_teachers(name: str, count: int) -> None:
    inputs = all_inputs(count, rows=400) | validation_split("unlike", count, rows=400)
    weights = weights_of(name, inputs)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(count).tolist()
        turned = weights_of(name, in_order(inputs, order))
        np.testing.assert_allclose(turned, weights[order], atol=1e-3 if name == "learned" else 1e-6)
    if name not in ("mean", "drop"):
        assert not np.allclose(weights, weights.roll(1, dims=0), atol=0.01)  # so that it could fail


# Properties: 5 × 9 combiners × 12 examples; those of the pools add 7 × 150 (test_combine.py).
EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, smallest: int = 1) -> Inputs:
    count, kind, seed, pool = draw(
        st.tuples(
            st.integers(smallest, 5),
            st.sampled_from(kinds),
            st.integers(0, 2**32 - 1),
            st.sampled_from(["prob", "logit"]),
        )
    )
    return all_inputs(count, kind, seed, pool)


@every_combiner
@EXAMPLES
@given(inputs=cases())
def test_weights_lie_on_the_simplex(name: str, inputs: Inputs) -> None:
    weights = weights_of(name, inputs)
    assert_simplex(weights, inputs["count"])
    for pool in POOLS:
        assert target_of(inputs, weights, pool).isfinite().all()


def in_units_of_a_nat(name: str, weights: Tensor, inputs: Inputs) -> np.ndarray:
    """What of the weights is unique: where some are not (fewer teachers serve as well), what they achieve."""
    if name == "learned":
        return np.array(reference_nll(weights.double().numpy(), inputs, inputs["pool"]))
    return weights.numpy()


@every_combiner
@EXAMPLES
@given(inputs=cases(UNTIED, smallest=2), seed=st.integers(0, 2**32 - 1))
def test_permuting_the_teachers_permutes_the_weights(name: str, inputs: Inputs, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(inputs["count"])
    weights, turned = weights_of(name, inputs), weights_of(name, in_order(inputs, order.tolist()))
    back = turned[np.argsort(order)]
    expected, found = (in_units_of_a_nat(name, w, inputs) for w in (weights, back))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if name != "learned":
        for pool in POOLS:
            before = target_of(inputs, weights, pool)
            after = target_of(in_order(inputs, order.tolist()), turned, pool)
            np.testing.assert_allclose(after.exp(), before.exp(), atol=1e-4)


@every_combiner
@EXAMPLES
@given(inputs=cases(smallest=2))
def test_identical_teachers_give_the_target_of_one(name: str, inputs: Inputs) -> None:
    same = in_order(inputs, [0] * inputs["count"]) | {n: inputs[n] for n in ("given", "draws")}
    weights = weights_of(name, same)
    z = inputs["logits"][0].numpy() / float(inputs["temperatures"][0])
    for pool in POOLS:
        target = target_of(same, weights, pool)
        np.testing.assert_allclose(target, log_softmax(z, axis=1), rtol=1e-6, atol=1e-5)


@every_combiner
@EXAMPLES
@given(inputs=cases(UNTIED), seed=st.integers(0, 2**32 - 1))
def test_a_constant_added_to_a_samples_logits_changes_no_weight(name: str, inputs: Inputs, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shifted = dict(inputs)
    for n in ("logits", "val_logits", "student_logits"):
        shifted[n] = inputs[n] + torch.from_numpy(rng.integers(-1000, 1000, size=(*inputs[n].shape[:-1], 1)))
    expected, found = (in_units_of_a_nat(name, weights_of(name, i), inputs) for i in (inputs, shifted))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@every_combiner
@EXAMPLES
@given(inputs=cases(smallest=1), which=st.integers(0, 4))
def test_any_single_teacher_is_the_target(name: str, inputs: Inputs, which: int) -> None:
    one = in_order(inputs, [which % inputs["count"]])
    one |= {"count": 1, "given": torch.ones(1, dtype=torch.float64)}
    weights = weights_of(name, one)
    np.testing.assert_allclose(weights, np.ones(weights.shape), rtol=1e-12)
    z = one["logits"][0].numpy() / float(one["temperatures"][0])
    for pool in POOLS:
        np.testing.assert_allclose(
            target_of(one, weights, pool), log_softmax(z, axis=1), rtol=1e-9, atol=1e-9
        )
