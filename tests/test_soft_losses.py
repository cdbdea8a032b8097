"""Every loss of LOSSES against float64 numpy and scipy, on ordinary and extreme logits, and its identities."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
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
each_variant = pytest.mark.parametrize(("name", "numbers"), VARIANTS)
each_loss = pytest.mark.parametrize("name", LOSSES)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


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
    pytest.param(name, numbers, case, id=f"{name}-{'-'.join(map(str, numbers.values()))}-{case}")
    for name, numbers in VARIANTS
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
    """Pearson's, fading to 0 where a side varies less than 1e-8: its correlation is that of rounding."""
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
    # A product of a probability 0 and a log −∞ is never used, and no loss here may be NaN.
    value = REFERENCES[name](s, t, temperature, **more, **numbers)
    assert not math.isnan(value)
    return value


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == set(LOSSES)


@each_temperature
@each_defined
def test_losses_equal_the_reference(
    name: str, numbers: dict[str, float], case: str, temperature: float
) -> None:
    for dtype in (torch.float64, torch.float32):
        logits, log_target = (values.to(dtype) for values in CASES[case])
        expected = reference(name, logits, log_target, temperature, numbers)
        loss = compute(name, logits, log_target, temperature, numbers)
        # Log-probabilities of size n are known to n · eps; z-scores are divided by the deviation + 1e-7.
        size = 1 + float(2 * logits.abs().max() / temperature + log_target[log_target.isfinite()].abs().max())
        if name != "dist":
            size *= max(1.0, temperature**2)
        size *= sum((LOSSES[name].numbers | numbers).values()) or 1.0
        eps = torch.finfo(dtype).eps
        near = {"rel": max(1e-6 if name == "logit-std" else 1e-10, 100 * eps), "abs": 10 * eps * size}
        assert loss.dtype == dtype
        assert float(loss) == pytest.approx(expected, **near), dtype


@each_temperature
@each_defined
def test_gradients_are_finite_and_the_same_in_float32(
    name: str, numbers: dict[str, float], case: str, temperature: float
) -> None:
    wide, narrow = (
        gradient(
            partial(compute, name, log_target=log_target.to(dtype), temperature=temperature, numbers=numbers),
            logits.to(dtype),
        )
        for logits, log_target in [CASES[case]]
        for dtype in (torch.float64, torch.float32)
    )
    assert wide.isfinite().all()
    assert narrow.isfinite().all()
    # z-scores and correlations of equal values have no derivative.
    if not (name in ("dist", "logit-std") and case in ("all equal", "ties")):
        unit = float(wide.abs().max()) + 1e-6
        np.testing.assert_allclose(narrow / unit, wide / unit, atol=1e-2 if "huge" in case else 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@each_variant
def test_the_gradient_is_that_of_the_reference(
    name: str, numbers: dict[str, float], temperature: float
) -> None:
    logits, log_target = (values[:3] for values in CASES["random"])
    found = gradient(
        lambda z: compute(name, z, log_target, temperature, numbers),
        logits,
    )
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
        assert float(loss) == float(expected)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 0


@each_loss
def test_float16_does_not_overflow(name: str) -> None:
    # 4 · 20000 is more than float16 holds; the logits' square and difference are too.
    logits = (1e4 * torch.eye(B, C)).half()
    log_target = torch.full((B, C), -2e4).masked_fill(one_hot(LABELS).bool(), 0).half()
    leaf = logits.requires_grad_()
    loss = compute(name, leaf, log_target, 4.0)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


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
        logits, other = draw(2, B, C, scale=10.0 ** (seed % 4 - 1), seed=seed)
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


# Each loss's own identities.


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_kl_and_of_ce_is_the_formula(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    of_kl, of_ce = (
        gradient(partial(compute, name, log_target=log_target, temperature=temperature), logits)
        for name in ("kl", "ce")
    )
    q = softmax(logits.numpy() / temperature, axis=1)
    np.testing.assert_allclose(of_kl, temperature * (q - np.exp(log_target.numpy())) / B, atol=1e-13)
    np.testing.assert_allclose(of_kl.sum(dim=1), np.zeros(B), atol=1e-13)
    assert torch.equal(of_kl, of_ce)


def test_the_gradients_size_hardly_depends_on_a_high_temperature() -> None:
    student, teacher = draw(2, B, C, scale=1.0)
    found = {
        temperature: gradient(
            lambda z, t=temperature: compute("kl", z, torch.log_softmax(teacher / t, dim=1), t), student
        )
        for temperature in (20.0, 40.0, 1e5)
    }
    assert not torch.equal(found[20.0], found[40.0])
    assert float(found[20.0].norm()) == pytest.approx(float(found[40.0].norm()), rel=0.1)
    # What it tends to: that of matching centred logits.
    apart = student - teacher
    np.testing.assert_allclose(
        found[1e5], (apart - apart.mean(dim=1, keepdim=True)) / (B * C), rtol=1e-3, atol=1e-6
    )


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_kl_is_not_negative_and_differs_from_ce_by_the_entropy(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    kl, ce = (float(compute(name, logits, log_target, temperature)) for name in ("kl", "ce"))
    p = np.exp(log_target.numpy())
    assert kl >= -1e-12 * temperature**2
    assert kl - ce == pytest.approx(temperature**2 * xlogy(p, p).sum(axis=1).mean(), rel=1e-10, abs=1e-6)


def test_t_squared_stays_and_classes_are_summed() -> None:
    # A uniform student is log C nats from a one-hot target. Published code drops T² where the labels have
    # no weight, or takes torch's mean over B · C.
    uniform = torch.zeros(B, C, dtype=torch.float64)
    logits, log_target = CASES["random"]
    for temperature in TEMPERATURES:
        loss = compute("kl", uniform, one_hot(LABELS).log(), temperature)
        assert float(loss) == pytest.approx(temperature**2 * math.log(C), rel=1e-12)
        mean = F.kl_div(
            torch.log_softmax(logits / temperature, dim=1), log_target, reduction="none", log_target=True
        ).mean()
        loss = compute("kl", logits, log_target, temperature)
        assert float(loss) == pytest.approx(temperature**2 * C * float(mean), rel=1e-12)


@each_temperature
def test_js_is_symmetric_and_at_most_log_2(temperature: float) -> None:
    for seed in range(20):
        a, b = draw(2, B, C, scale=10.0 ** (seed % 6 - 1), seed=seed)
        one, other = (
            float(compute("js", student, torch.log_softmax(teacher / temperature, dim=1), temperature))
            for student, teacher in ((a, b), (b, a))
        )
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
        assert -1e-12 <= one / temperature**2 <= math.log(2) + 1e-12
    disjoint = compute("js", 1e4 * one_hot(LABELS), one_hot((LABELS + 1) % C).log(), temperature)
    assert float(disjoint) == pytest.approx(temperature**2 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_reverse_kl_is_kl_with_the_sides_exchanged(temperature: float) -> None:
    a, b = draw(2, B, C)
    log_a, log_b = (torch.log_softmax(z / temperature, dim=1) for z in (a, b))
    reverse, forward = compute("reverse-kl", a, log_b, temperature), compute("kl", b, log_a, temperature)
    assert float(reverse) == pytest.approx(float(forward), rel=1e-12)
    assert float(reverse) != pytest.approx(float(compute("kl", a, log_b, temperature)), rel=1e-2)


@each_temperature
def test_mse_of_one_teacher_is_of_its_centred_logits_whatever_the_temperature(temperature: float) -> None:
    student, teacher = draw(2, B, C)
    a, b = (z - z.mean(dim=1, keepdim=True) for z in (student, teacher + 5))
    log_target = torch.log_softmax(teacher / temperature, dim=1)
    loss = compute("mse", student, log_target, temperature)
    assert float(loss) == pytest.approx(float((a - b).square().mean()), rel=1e-10)


def confident(size: float) -> Tensor:
    """Log-target that gives the label all but about C · exp(−size)."""
    return torch.log_softmax(size * one_hot(LABELS) + CASES["random"][1] / 3, dim=1)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [0.0, 5.0, 15.0, 40.0, 100.0, 1e4])
@each_temperature
def test_kl_is_the_sum_of_dkds_parts(
    temperature: float, size: float, dtype: torch.dtype, near: float
) -> None:
    wide = confident(size)
    logits, log_target = CASES["random"][0].to(dtype), wide.to(dtype)
    others = wide.masked_fill(one_hot(LABELS).bool(), -torch.inf).logsumexp(dim=1).exp()  # 1 − p_y
    for i in range(B):
        rows = {"logits": logits[[i]], "log_target": log_target[[i]], "temperature": temperature}
        kl = compute("kl", **rows)
        tckd, nckd = (
            compute("dkd", **rows, labels=LABELS[[i]], numbers={"alpha": a, "beta": 1 - a})
            for a in (1.0, 0.0)
        )
        assert float(tckd + others[i] * nckd) == pytest.approx(float(kl), rel=near, abs=near * temperature**2)
        both = compute("dkd", **rows, labels=LABELS[[i]], numbers={"alpha": 0.7, "beta": 3.0})
        assert float(both) == pytest.approx(float(0.7 * tckd + 3 * nckd), rel=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_hears_the_other_classes_of_a_target_sure_of_the_label(
    temperature: float, dtype: torch.dtype
) -> None:
    # p_y is 1 in float32 and in float64, but what the teacher says of the others is as before.
    logits = CASES["random"][0].to(dtype)
    parts = {"alpha": 0.0, "beta": 1.0}
    loss, found = (
        [read(partial(compute, "dkd", log_target=confident(size).to(dtype), temperature=temperature,
                      numbers=parts)) for size in (0.0, 60.0)]
        for read in (lambda f: float(f(logits)), lambda f: gradient(f, logits))
    )  # fmt: skip
    assert loss[1] == pytest.approx(loss[0], rel=1e-4)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert found[1].abs().max() > 1e-2


def test_dkd_of_a_one_hot_target_is_the_labels_cross_entropy() -> None:
    logits = CASES["random"][0]
    loss = compute("dkd", logits, one_hot(LABELS).log(), 1.0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, LABELS)), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_invariant_as_correlations_are(temperature: float) -> None:
    # Each sample may be mixed with uniform in its own measure: a positive affine map of its probabilities.
    # Each class is one over the batch if all samples are mixed with one distribution in equal measure.
    logits, log_target = CASES["random"]
    p = log_target.exp()
    own = torch.linspace(0.2, 0.9, B, dtype=torch.float64)[:, None]
    of_each = (own * p + (1 - own) / C).log()
    of_all = (0.4 * p + 0.6 * torch.softmax(draw(C, seed=3), dim=0)).log()

    def loss(target: Tensor, beta: float, gamma: float) -> float:
        return float(compute("dist", logits, target, temperature, {"beta": beta, "gamma": gamma}))

    classes, batch = loss(log_target, 1.0, 0.0), loss(log_target, 0.0, 1.0)
    assert loss(of_each, 1.0, 0.0) == pytest.approx(classes, rel=1e-10)
    assert loss(of_all, 0.0, 1.0) == pytest.approx(batch, rel=1e-10)
    assert loss(of_each, 0.0, 1.0) != pytest.approx(batch, rel=1e-3)
    assert loss(of_all, 1.0, 0.0) != pytest.approx(classes, rel=1e-3)
    assert loss(log_target, 2.0, 0.5) == pytest.approx(2 * classes + 0.5 * batch, rel=1e-12)


def test_dist_lies_between_0_and_twice_its_numbers() -> None:
    a = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for student, expected in [(a, 0.0), (-a, 2 * (2.0 + 0.5))]:
        loss = compute("dist", student, torch.log_softmax(a, dim=1), 1.0, {"beta": 2.0, "gamma": 0.5})
        assert float(loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.01, 3.0, 1e3])
def test_logit_std_ignores_the_size_of_either_sides_logits(scale: float) -> None:
    student, teacher = draw(2, B, C)
    scales = scale * torch.arange(1, B + 1)[:, None]

    def loss(s: Tensor, z: Tensor) -> float:
        return float(compute("logit-std", s, torch.log_softmax(z / 2, dim=1), 2.0))

    before = loss(student, teacher)
    assert loss(student * scales, teacher) == pytest.approx(before, rel=1e-4)
    assert loss(student, teacher * scales) == pytest.approx(before, rel=1e-4)
    assert loss(-student, teacher) != pytest.approx(before, rel=1e-2)


@each_temperature
@pytest.mark.parametrize("case", CASES)
def test_hard_is_the_cross_entropy_with_the_likeliest_class(case: str, temperature: float) -> None:
    logits, log_target = CASES[case]
    expected = F.cross_entropy(logits, log_target.argmax(dim=1))
    assert float(compute("hard", logits, log_target, temperature)) == float(expected)
