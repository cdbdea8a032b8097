"""The loss of training steps in one piece: its value and its gradient against float64 numpy, and its limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax, xlogy
from torch import Tensor
from torch.nn import functional as F

from ensemble_kd.fused import fused_kd, truth_of
from ensemble_kd.losses import UNLABELLED, Mixed, distillation_loss, hard_cross_entropy
from ensemble_kd.objective import Objective

B, C = 6, 10
LABELS = torch.tensor([0, 3, 9, 3, 1, 7])
OTHERS = torch.tensor([4, 3, 0, 2, 1, 8])
SHARE = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.375, 1 / 256])

LABELLED: dict[str, tuple[Tensor, Mixed | None]] = {
    "all": (LABELS, None),
    "some": (torch.tensor([0, UNLABELLED, 9, UNLABELLED, 1, 7]), None),
    "none": (torch.full((B,), UNLABELLED), None),
    "mixed": (LABELS, Mixed(OTHERS, SHARE)),
    "mixed all first": (LABELS, Mixed(OTHERS, torch.ones(B))),
    "mixed all second": (LABELS, Mixed(OTHERS, torch.zeros(B))),
    "mixed with itself": (LABELS, Mixed(LABELS, SHARE)),
    "mixed, some unlabelled": (
        torch.tensor([0, UNLABELLED, 9, UNLABELLED, 1, 7]),
        Mixed(torch.tensor([UNLABELLED, 3, 0, UNLABELLED, 1, 8]), SHARE),
    ),
}
each_case = pytest.mark.parametrize("case", LABELLED)
WEIGHTS, SMOOTHINGS = (0.3, 0.9, 1.0), (0.0, 0.1, 1.0)
each_weight = pytest.mark.parametrize("soft_weight", WEIGHTS)


def draw(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def log_p(teacher: Tensor, temperature: float = 4.0) -> Tensor:
    return torch.log_softmax(teacher / temperature, dim=1)


STUDENT, TEACHER = draw(2, B, C)
PAIRS: dict[str, tuple[Tensor, Tensor]] = {
    "random": (STUDENT, log_p(TEACHER)),
    "the same": (STUDENT, log_p(STUDENT)),
    "huge": (1e4 * STUDENT.sign(), log_p(1e4 * TEACHER.sign())),
    "huge student": (1e4 * STUDENT.sign(), log_p(TEACHER)),
    "huge teacher": (STUDENT, log_p(1e4 * TEACHER.sign())),
    "opposite": (1e4 * F.one_hot(OTHERS, C).double(), log_p(1e4 * F.one_hot(LABELS, C).double())),
    "one-hot": (STUDENT, F.one_hot(OTHERS, C).double().log()),
    "half of the classes": (STUDENT, log_p(TEACHER.masked_fill(torch.arange(C) % 2 == 0, -torch.inf))),
    "ties": (torch.zeros(B, C, dtype=torch.float64), torch.full((B, C), 1 / C, dtype=torch.float64).log()),
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def truth(case: str, smoothing: float) -> np.ndarray:
    """The labels as distributions in float64, built class by class."""
    labels, mixed = LABELLED[case]
    parts = [(labels, np.ones(B))] if mixed is None else [
        (labels, mixed.share.double().numpy()),
        (mixed.labels, 1 - mixed.share.double().numpy()),
    ]  # fmt: skip
    y = np.zeros((B, C))
    for part, share in parts:
        for sample, label in enumerate(part.tolist()):
            if label != UNLABELLED:
                y[sample] += share[sample] * smoothing / C
                y[sample, label] += share[sample] * (1 - smoothing)
    return y


def reference(
    logits: Tensor, target: Tensor, y: np.ndarray, soft_weight: float, temperature: float
) -> tuple[float, np.ndarray]:
    """Value and gradient by the formulas, in float64."""
    s, p = logits.double().numpy(), np.exp(target.double().numpy())
    cross_entropy = -(y * log_softmax(s, axis=1)).sum()
    kl = (xlogy(p, p) - p * log_softmax(s / temperature, axis=1)).sum()
    value = ((1 - soft_weight) * cross_entropy + soft_weight * temperature**2 * kl) / len(s)
    hard = softmax(s, axis=1) * y.sum(axis=1, keepdims=True) - y
    soft = temperature * (softmax(s / temperature, axis=1) - p)
    return float(value), ((1 - soft_weight) * hard + soft_weight * soft) / len(s)


def fused(
    logits: Tensor,
    target: Tensor,
    case: str = "all",
    soft_weight: float = 0.9,
    temperature: float = 4.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Value, and gradient by autograd."""
    labels, mixed = LABELLED[case]
    leaf = logits.clone().requires_grad_()
    loss = fused_kd(
        leaf,
        None if soft_weight == 1 else labels,
        target,
        soft_weight=soft_weight,
        temperature=temperature,
        label_smoothing=smoothing,
        mixed=mixed,
    )
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# Against the formulas


@each_weight
@each_case
def test_value_and_gradient_are_those_of_the_formulas(case: str, soft_weight: float) -> None:
    for temperature, smoothing in itertools.product((0.5, 1.0, 4.0), SMOOTHINGS):
        target = log_p(TEACHER, temperature)
        value, gradient = fused(STUDENT, target, case, soft_weight, temperature, smoothing)
        expected, slope = reference(STUDENT, target, truth(case, smoothing), soft_weight, temperature)
        assert float(value) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-14)
        assert value.dtype == gradient.dtype == torch.float64


@each_pair
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_extreme_logits_and_zeros_in_the_target(pair: str, dtype: torch.dtype, error: float) -> None:
    logits, target = (values.to(dtype) for values in PAIRS[pair])  # what they are in this precision
    for case, soft_weight in itertools.product(("all", "mixed, some unlabelled"), WEIGHTS):
        value, gradient = fused(logits, target, case, soft_weight, smoothing=0.1)
        expected, slope = reference(logits, target, truth(case, 0.1), soft_weight, 4.0)
        assert float(value) == pytest.approx(expected, rel=error, abs=10 * error)
        np.testing.assert_allclose(gradient, slope, rtol=10 * error, atol=error)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@each_case
def test_half_precision_is_computed_in_float32(half: torch.dtype, case: str) -> None:
    logits, target = STUDENT.to(half), log_p(TEACHER).float()
    for soft_weight in WEIGHTS:
        value, gradient = fused(logits, target, case, soft_weight)
        wide, slope = fused(logits.float(), target, case, soft_weight)
        assert value.dtype == torch.float32
        assert torch.equal(value, wide)
        assert gradient.dtype == half
        assert torch.equal(gradient, slope.to(half))


@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64])
def test_a_target_of_another_precision_is_brought_to_that_of_the_logits(given: torch.dtype) -> None:
    target = log_p(TEACHER).to(given)
    value, gradient = fused(STUDENT.float(), target)
    expected, slope = reference(STUDENT.float(), target.float(), truth("all", 0.0), 0.9, 4.0)
    assert value.dtype == gradient.dtype == torch.float32
    assert float(value) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


@each_pair
def test_the_soft_gradient_sums_to_nothing_over_the_classes(pair: str) -> None:
    _, gradient = fused(*PAIRS[pair], soft_weight=1.0)
    np.testing.assert_allclose(gradient.sum(dim=1), np.zeros(B), atol=1e-14)


def test_the_loss_is_nothing_at_the_target_and_more_elsewhere() -> None:
    at, gradient = fused(STUDENT, log_p(STUDENT), soft_weight=1.0)
    assert float(at) == pytest.approx(0, abs=1e-14)
    np.testing.assert_allclose(gradient, np.zeros((B, C)), atol=1e-15)
    assert float(fused(STUDENT, log_p(TEACHER), soft_weight=1.0)[0]) > 0.1


def test_a_batch_taken_twice_has_the_same_loss_and_half_the_gradient() -> None:
    once, slope = fused(STUDENT, log_p(TEACHER))
    leaf = STUDENT.repeat(2, 1).requires_grad_()
    twice = fused_kd(leaf, LABELS.repeat(2), log_p(TEACHER).repeat(2, 1), soft_weight=0.9, temperature=4.0)
    twice.backward()
    torch.testing.assert_close(twice.detach(), once)
    torch.testing.assert_close(leaf.grad, slope.repeat(2, 1) / 2)


# Against the plain losses


@each_case
def test_it_is_the_plain_loss(case: str) -> None:
    labels, mixed = LABELLED[case]
    options = itertools.product(WEIGHTS, SMOOTHINGS, ("random", "huge", "opposite", "one-hot"))
    for soft_weight, smoothing, pair in options:
        logits, target = PAIRS[pair]
        leaf = logits.clone().requires_grad_()
        plain = distillation_loss(
            leaf,
            labels,
            target,
            soft_weight=soft_weight,
            temperature=4.0,
            label_smoothing=smoothing,
            mixed=mixed,
        )
        plain.backward()
        value, gradient = fused(logits, target, case, soft_weight, smoothing=smoothing)
        torch.testing.assert_close(value, plain.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-13)


@each_case
def test_cross_entropy_with_mixed_labels_is_that_of_their_distributions(case: str) -> None:
    labels, mixed = LABELLED[case]
    for smoothing in SMOOTHINGS:
        loss = hard_cross_entropy(STUDENT, labels, smoothing, mixed)
        expected = -(truth(case, smoothing) * log_softmax(STUDENT.numpy(), axis=1)).sum() / B
        assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@each_case
def test_labels_as_distributions(case: str) -> None:
    labels, mixed = LABELLED[case]
    for smoothing, (dtype, error) in itertools.product(
        SMOOTHINGS, ((torch.float32, 1e-7), (torch.float64, 1e-15))
    ):
        found = truth_of(labels, STUDENT.to(dtype), smoothing, mixed)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, truth(case, smoothing), atol=error)


def test_the_objective_takes_the_fused_loss_for_kl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("fused_kd", "distillation_loss"):
        monkeypatch.setattr(
            f"ensemble_kd.objective.{name}", lambda *_, name=name, **__: taken.append(name) or STUDENT.sum()
        )
    for loss, target, weight in itertools.product(("kl", "ce"), (None, log_p(TEACHER)), (0.0, 0.5)):
        if target is not None or weight == 0:
            Objective(0.5, 4.0, loss=loss)(STUDENT, LABELS, target, weight, 0.0)
            assert taken.pop() == ("fused_kd" if loss == "kl" and weight else "distillation_loss")


# Autograd


@pytest.mark.parametrize("case", ["all", "some", "mixed"])
@each_weight
def test_autograd_agrees_with_differences(case: str, soft_weight: float) -> None:
    labels, mixed = LABELLED[case]

    def loss(logits: Tensor) -> Tensor:
        return fused_kd(
            logits,
            labels,
            log_p(TEACHER),
            soft_weight=soft_weight,
            temperature=4.0,
            label_smoothing=0.1,
            mixed=mixed,
        )

    assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


def test_the_gradient_is_scaled_by_what_follows() -> None:
    _, slope = fused(STUDENT, log_p(TEACHER))
    leaf = STUDENT.clone().requires_grad_()
    loss = fused_kd(leaf, LABELS, log_p(TEACHER), soft_weight=0.9, temperature=4.0)
    (3 * loss + leaf.sum()).backward()
    torch.testing.assert_close(leaf.grad, 3 * slope + 1)


def test_its_gradient_cannot_be_differentiated_again() -> None:
    leaf, factor = STUDENT.clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = factor * fused_kd(leaf, LABELS, log_p(TEACHER), soft_weight=0.9, temperature=4.0)
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        slope.square().sum().backward()


def test_the_target_gets_no_gradient_and_nothing_is_changed() -> None:
    logits, target = STUDENT.clone(), log_p(TEACHER).requires_grad_()
    before = target.detach().clone()
    fused(logits, target)
    assert target.grad is None
    assert torch.equal(target.detach(), before)
    assert torch.equal(logits, STUDENT)


def test_labels_are_needed_below_soft_weight_one() -> None:
    with pytest.raises(AssertionError):
        fused_kd(STUDENT, None, log_p(TEACHER), soft_weight=0.99, temperature=4.0)
