"""Each loss of LOSSES against float64 numpy and scipy, on ordinary and extreme logits; its identities."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, logsumexp, rel_entr, softmax, xlogy
from scipy.stats import pearsonr, zscore
from torch import Tensor
from torch.nn import functional as F

from ensemble_kd.losses import LOSSES

B, C = 6, 10
LABELS = torch.tensor([0, 3, 9, 3, 1, 7])
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]

VARIANTS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in LOSSES),
    *(("dkd", {"alpha": a, "beta": b}) for a, b in [(1.0, 0.0), (0.0, 1.0), (0.3, 2.5)]),
    *(("dist", {"beta": b, "gamma": g}) for b, g in [(1.0, 0.0), (0.0, 1.0), (2.0, 0.5)]),
]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in more.items())]) for name, more in VARIANTS]
each_variant = pytest.mark.parametrize(("name", "numbers"), VARIANTS, ids=IDS)
each_loss = pytest.mark.parametrize("name", LOSSES)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Waking more for a softmax of sixty numbers costs far more than the softmax."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compute(
    name: str,
    logits: Tensor,
    log_target: Tensor,
    temperature: float,
    numbers: Mapping[str, float] | None = None,
    labels: Tensor = LABELS,
) -> Tensor:
    more = {"labels": labels[: len(logits)]} if LOSSES[name].needs_labels else {}
    return LOSSES[name].compute(logits, log_target, temperature, **more, **(numbers or {}))


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def draw(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, C).double()


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and log-target of each kind, in float64."""
    z, other = draw(2, B, C)
    huge = 1e4 * torch.where(other > 0, 1.0, -1.0).double()
    ties = torch.zeros_like(z)
    ties[:, :2] = 1e4
    some = other.clone()
    some[:, :4] = -torch.inf
    targets = {
        "random": (z, other),
        "huge logits": (huge, z),
        "huge logits on both sides": (huge, huge.flip(1)),
        "all equal": (torch.zeros_like(z), other),
        "ties": (ties, ties.roll(1, 1)),
        "ties in the target": (z, ties),
        "sure target": (z, 15 * one_hot(LABELS) + z / 3),
        "target near one-hot": (z, 60 * one_hot(LABELS) + z / 3),
        "both sides near one-hot": (1e4 * one_hot(LABELS), 1e4 * one_hot(LABELS)),
        "one-hot target": (z, one_hot(LABELS).log()),
        "one-hot target, huge logits": (huge, one_hot(LABELS).log()),
        "zeros in the target": (z, some),
    }
    return {name: (s, torch.log_softmax(t, dim=1)) for name, (s, t) in targets.items()}


CASES = cases()
WITH_ZEROS = [case for case, (_, log_target) in CASES.items() if log_target.isneginf().any()]
UNDEFINED = ("reverse-kl", "mse", "logit-std")
"""Losses that have no finite value where the target has a zero."""

DEFINED = [
    pytest.param(name, numbers, case, id=f"{variant}-{case}")
    for variant, (name, numbers) in zip(IDS, VARIANTS, strict=True)
    for case in CASES
    if not (name in UNDEFINED and case in WITH_ZEROS)
]
each_defined = pytest.mark.parametrize(("name", "numbers", "case"), DEFINED)


# The references: float64 arrays in, s the student's logits, t the log-target, y the labels.


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL of each row. In logs where q underflows, for scipy's rel_entr is infinite there."""
    p, q = np.exp(log_p), np.exp(log_q)
    in_logs = p * (np.where(p > 0, log_p, 0) - np.where(p > 0, log_q, 0))
    return np.where(q > 1e-300, rel_entr(p, q), in_logs).sum(axis=1)


def ref_kl(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    return temperature**2 * divergence(t, log_softmax(s / temperature, axis=1)).mean()


def ref_ce(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    return -(temperature**2) * (np.exp(t) * log_softmax(s / temperature, axis=1)).sum(axis=1).mean()


def ref_reverse_kl(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    return temperature**2 * divergence(log_softmax(s / temperature, axis=1), t).mean()


def ref_js(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    return temperature**2 * (jensenshannon(np.exp(t), softmax(s / temperature, axis=1), axis=1) ** 2).mean()


def ref_mse(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    apart = s - temperature * t
    return np.var(apart, axis=1).mean()  # the variance is the mean square of what is centred


def ref_dkd(
    s: np.ndarray, t: np.ndarray, temperature: float, y: np.ndarray, alpha: float = 1.0, beta: float = 8.0
) -> float:
    total = 0.0
    for row, log_p, label in zip(s / temperature, t, y, strict=True):
        log_q = log_softmax(row)
        others_p, others_q = np.delete(log_p, label), np.delete(log_q, label)
        binary_p, binary_q = (
            np.array([[values[label], logsumexp(others)]])
            for values, others in ((log_p, others_p), (log_q, others_q))
        )
        total += alpha * divergence(binary_p, binary_q)[0]
        if np.isfinite(others_p).any():
            conditional_p, conditional_q = log_softmax(others_p), log_softmax(np.delete(row, label))
            total += beta * divergence(conditional_p[None], conditional_q[None])[0]
    return temperature**2 * total / len(s)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, fading to 0 where a side varies by less than 1e-8 and it is that of rounding errors."""
    spread = [float(np.linalg.norm(values - values.mean())) for values in (a, b)]
    if min(spread) < 1e-15:
        return 0.0
    return pearsonr(a, b).statistic * math.prod(min(1.0, width / 1e-8) for width in spread)


def ref_dist(
    s: np.ndarray, t: np.ndarray, temperature: float, beta: float = 1.0, gamma: float = 1.0
) -> float:
    p, q = np.exp(t), softmax(s / temperature, axis=1)
    between, within = (
        np.mean([correlation(*rows) for rows in zip(a, b, strict=True)]) for a, b in ((p, q), (p.T, q.T))
    )
    return beta * (1 - between) + gamma * (1 - within)


def ref_logit_std(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    flat = np.ptp(s, axis=1, keepdims=True) == 0  # z-scores of a constant are 0 / 0: no class above another
    student = zscore(np.where(flat, np.eye(C)[:1], s), axis=1, ddof=1) * ~flat
    teacher = zscore(t, axis=1, ddof=1)
    return ref_kl(student, log_softmax(teacher / temperature, axis=1), temperature)


def ref_hard(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    return -log_softmax(s, axis=1)[np.arange(len(s)), t.argmax(axis=1)].mean()


REFERENCES: dict[str, Callable[..., float]] = {
    "kl": ref_kl,
    "kl-unscaled": lambda s, t, temperature: ref_kl(s, t, temperature) / temperature**2,
    "ce": ref_ce,
    "reverse-kl": ref_reverse_kl,
    "js": ref_js,
    "mse": ref_mse,
    "dkd": ref_dkd,
    "dist": ref_dist,
    "logit-std": ref_logit_std,
    "hard": ref_hard,
}


def reference(
    name: str, logits: Tensor, log_target: Tensor, temperature: float, numbers: Mapping[str, float]
) -> float:
    more = {"y": LABELS[: len(logits)].numpy()} if name == "dkd" else {}
    s, t = logits.double().numpy(), log_target.double().numpy()
    value = REFERENCES[name](s, t, temperature, **more, **numbers)
    assert not math.isnan(value)
    return value


def rounding(
    name: str, logits: Tensor, log_target: Tensor, temperature: float, numbers: Mapping[str, float]
) -> float:
    """How well a gradient is known: log-probabilities of size n are to n · eps."""
    size = 1 + float(2 * logits.abs().max() / temperature + log_target[log_target.isfinite()].abs().max())
    scale = sum((LOSSES[name].numbers | numbers).values()) or 1.0
    return 10 * torch.finfo(logits.dtype).eps * size * scale * max(1.0, temperature)


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == set(LOSSES)


@each_defined
def test_losses_equal_the_reference(name: str, numbers: dict[str, float], case: str) -> None:
    for temperature in TEMPERATURES:
        for dtype in (torch.float64, torch.float32):
            logits, log_target = (values.to(dtype) for values in CASES[case])
            expected = reference(name, logits, log_target, temperature, numbers)
            loss = compute(name, logits, log_target, temperature, numbers)
            near = {"rel": max(1e-6 if name == "logit-std" else 1e-10, 100 * torch.finfo(dtype).eps)}
            near["abs"] = rounding(name, logits, log_target, temperature, numbers) * max(1.0, temperature)
            assert loss.dtype == dtype
            assert float(loss) == pytest.approx(expected, **near), dtype


@each_defined
def test_gradients_are_finite_and_the_same_in_float32(
    name: str, numbers: dict[str, float], case: str
) -> None:
    for temperature in TEMPERATURES:
        logits, log_target = CASES[case]
        loss = partial(compute, name, temperature=temperature, numbers=numbers)
        wide, narrow = (
            gradient(partial(loss, log_target=log_target.to(dtype)), logits.to(dtype))
            for dtype in (torch.float64, torch.float32)
        )
        assert wide.isfinite().all()
        assert narrow.isfinite().all()
        # z-scores and correlations of equal values have no derivative.
        if not (name in ("dist", "logit-std") and case in ("all equal", "ties")):
            near = rounding(name, logits.float(), log_target, temperature, numbers)
            np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-5 * float(wide.abs().max()) + near)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@each_variant
def test_the_gradient_is_that_of_the_reference(
    name: str, numbers: dict[str, float], temperature: float
) -> None:
    logits, log_target = (values[:3] for values in CASES["random"])
    found = gradient(lambda z: compute(name, z, log_target, temperature, numbers), logits)
    step = 1e-5
    expected = torch.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        change = torch.zeros_like(logits)
        change[place] = step
        up, down = (
            reference(name, z, log_target, temperature, numbers) for z in (logits + change, logits - change)
        )
        expected[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", WITH_ZEROS)
def test_no_finite_value_is_made_up_where_the_target_has_a_zero(case: str, dtype: torch.dtype) -> None:
    logits, log_target = (values.to(dtype) for values in CASES[case])
    assert float(compute("reverse-kl", logits, log_target, 4.0)) == math.inf
    for name in ("mse", "logit-std"):
        assert not compute(name, logits, log_target, 4.0).isfinite()


@pytest.mark.parametrize("temperature", [3.0, 4.0])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_loss
def test_half_precision_is_computed_in_float32(name: str, half: torch.dtype, temperature: float) -> None:
    logits, log_target = (values.to(half) for values in CASES["random"])
    expected = compute(name, logits.float(), log_target.float(), temperature)
    for student, target in [(logits, log_target), (logits, log_target.float()), (logits.float(), log_target)]:
        leaf = student.clone().requires_grad_()
        loss = compute(name, leaf, target, temperature)
        loss.backward()
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 0


@each_loss
def test_float16_does_not_overflow(name: str) -> None:
    # 4 · 20000, the size of these target's logits, is more than float16 holds.
    logits = (1e4 * torch.eye(B, C)).half()
    log_target = torch.full((B, C), -2e4).masked_fill(one_hot(LABELS).bool(), 0).half()
    assert compute(name, logits, log_target, 4.0).isfinite()
    assert gradient(lambda z: compute(name, z, log_target, 4.0), logits).isfinite().all()


# What holds for every loss.


@each_variant
def test_every_loss_has_a_gradient(name: str, numbers: dict[str, float]) -> None:
    # Losses averaged through torch.tensor(list) trained nothing in published code.
    logits, log_target = CASES["random"]
    found = gradient(lambda z: compute(name, z, log_target, LOSSES[name].temperature, numbers), logits)
    assert (found.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@each_variant
def test_a_duplicated_batch_has_the_same_loss(
    name: str, numbers: dict[str, float], temperature: float
) -> None:
    logits, log_target = CASES["random"]
    once = compute(name, logits, log_target, temperature, numbers)
    twice = compute(
        name, logits.repeat(2, 1), log_target.repeat(2, 1), temperature, numbers, labels=LABELS.repeat(2)
    )
    assert float(twice) == pytest.approx(float(once), rel=1e-12)


@each_variant
def test_a_batch_costs_the_mean_of_its_samples_but_for_dists_batch_term(
    name: str, numbers: dict[str, float]
) -> None:
    logits, log_target = CASES["random"]
    numbers = dict(LOSSES[name].numbers | numbers)
    gamma = numbers.pop("gamma", 0.0)
    more = {"gamma": 0.0} if name == "dist" else {}
    together = compute(name, logits, log_target, 4.0, numbers | more)
    alone = [
        compute(name, logits[[i]], log_target[[i]], 4.0, numbers | more, labels=LABELS[[i]]) for i in range(B)
    ]
    assert float(together) == pytest.approx(float(sum(alone)) / B, rel=1e-12)
    if gamma:
        # One sample correlates with nothing, so its batch term is γ; several have more to say.
        batch_term = {"beta": 0.0, "gamma": gamma}
        assert float(compute(name, logits[:1], log_target[:1], 4.0, batch_term)) == gamma
        assert float(compute(name, logits, log_target, 4.0, batch_term)) != pytest.approx(gamma, rel=0.01)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@each_variant
def test_a_constant_added_to_a_samples_logits_changes_nothing(
    name: str, numbers: dict[str, float], temperature: float
) -> None:
    logits, teacher = draw(2, B, C)
    shifts = torch.tensor([0.0, 1.0, -50.0, 1000.0, 3.0, 7.0], dtype=torch.float64)[:, None]

    def loss(student: Tensor, target_logits: Tensor) -> float:
        log_target = torch.log_softmax(target_logits / temperature, dim=1)
        return float(compute(name, student, log_target, temperature, numbers))

    before = loss(logits, teacher)
    assert loss(logits + shifts, teacher) == pytest.approx(before, rel=1e-10)
    assert loss(logits, teacher + shifts) == pytest.approx(before, rel=1e-10)
    assert loss(logits + draw(B, C, seed=1), teacher) != pytest.approx(before, rel=1e-3)
    # These read the target's logits, and take them with any constant.
    if name in ("mse", "logit-std", "hard"):
        constant = float(compute(name, logits, (teacher + shifts) / temperature, temperature))
        assert constant == pytest.approx(before, rel=1e-10)


@each_variant
def test_permuted_classes_have_the_same_loss(name: str, numbers: dict[str, float]) -> None:
    logits, log_target = CASES["random"]
    order = torch.randperm(C)
    before = compute(name, logits, log_target, 4.0, numbers)
    after = compute(
        name, logits[:, order], log_target[:, order], 4.0, numbers, labels=order.argsort()[LABELS]
    )
    assert float(after) == pytest.approx(float(before), rel=1e-12)


@each_temperature
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("ce", "hard")])
def test_losses_are_positive_and_zero_only_at_the_target(name: str, temperature: float) -> None:
    for seed in range(20):
        sharp = 0 if name == "dist" else seed % 4 - 1  # one that nobody sees correlates with nothing
        logits, other = draw(2, B, C, scale=10.0**sharp, seed=seed)
        log_target = torch.log_softmax(other / temperature, dim=1)
        assert float(compute(name, other, log_target, temperature)) == pytest.approx(0, abs=1e-9)
        assert float(compute(name, logits, log_target, temperature)) > 1e-6


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "js", "mse", "dkd", "dist", "logit-std"])
def test_a_nudge_from_the_target_costs(name: str) -> None:
    logits = CASES["random"][0]
    log_target = torch.log_softmax(logits / 4, dim=1)
    nudged = logits.clone()
    nudged[0, 2] += 0.01
    assert float(compute(name, nudged, log_target, 4.0)) > 1e-9


def test_the_table_holds_each_functions_own_numbers_and_needs() -> None:
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss.compute).parameters
        defaults = {key: value.default for key, value in parameters.items()}
        assert loss.needs_labels == ("labels" in parameters), name
        own = set(parameters) - {"logits", "log_target", "temperature", "labels"}
        assert dict(loss.numbers) == {key: defaults[key] for key in own}, name


# What holds for one loss on every case.


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_kl_and_of_ce_is_the_formula(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    of_kl, of_ce = (
        gradient(lambda z, loss=loss: compute(loss, z, log_target, temperature), logits)
        for loss in ("kl", "ce")
    )
    q = softmax(logits.numpy() / temperature, axis=1)
    np.testing.assert_allclose(of_kl, temperature * (q - np.exp(log_target.numpy())) / B, atol=1e-13)
    np.testing.assert_allclose(of_kl.sum(dim=1), np.zeros(B), atol=1e-13)
    assert torch.equal(of_kl, of_ce)


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_kl_is_not_negative_and_differs_from_ce_by_the_entropy(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    kl, ce = (float(compute(name, logits, log_target, temperature)) for name in ("kl", "ce"))
    p = np.exp(log_target.numpy())
    assert kl >= -1e-12 * temperature**2
    assert kl - ce == pytest.approx(temperature**2 * xlogy(p, p).sum(axis=1).mean(), rel=1e-10, abs=1e-6)


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_hard_is_the_cross_entropy_with_the_likeliest_class(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    expected = F.cross_entropy(logits, log_target.argmax(dim=1))
    assert float(compute("hard", logits, log_target, temperature)) == float(expected)
