"""The losses against float64 numpy and scipy, and the identities that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax, xlogy
from torch import Tensor

from ensemble_kd.losses import distillation_loss, hard_cross_entropy, kl_to_target, soft_cross_entropy

B, C = 6, 10


def reference_soft(logits: Tensor, target: Tensor, temperature: float) -> float:
    z, p = logits.double().numpy(), target.double().numpy()
    return temperature**2 * -(p * log_softmax(z / temperature, axis=1)).sum(axis=1).mean()


def reference_kl(logits: Tensor, target: Tensor, temperature: float) -> float:
    p = target.double().numpy()
    return reference_soft(logits, target, temperature) + temperature**2 * xlogy(p, p).sum(axis=1).mean()


def reference_hard(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> float:
    log_q = log_softmax(logits.double().numpy(), axis=1)
    smooth = (1 - smoothing) * np.eye(logits.shape[1])[labels.numpy()] + smoothing / logits.shape[1]
    return -(smooth * log_q).sum(axis=1).mean()


def a_target(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=1)


def one_hot(labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.functional.one_hot(labels, C).to(dtype)


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and target of each kind, in float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, C, generator=generator, dtype=torch.float64) * 3
    other = torch.randn(B, C, generator=generator, dtype=torch.float64) * 3
    huge = 1e4 * torch.where(other > 0, 1.0, -1.0).double()
    zeros = a_target(other)
    zeros[:, :4] = 0
    ties = torch.zeros_like(z)
    ties[:, :2] = 1e4
    return {
        "random": (z, a_target(other)),
        "huge logits": (huge, a_target(z)),
        "huge logits on both sides": (huge, a_target(huge.flip(1))),
        "all equal": (torch.zeros_like(z), a_target(other)),
        "ties": (ties, a_target(ties.roll(1, 1))),
        "one-hot target": (z, one_hot(torch.arange(B))),
        "one-hot target, huge logits": (huge, one_hot(torch.arange(B))),
        "zeros in the target": (z, zeros / zeros.sum(dim=1, keepdim=True)),
    }


CASES = cases()
LABELS = torch.tensor([0, 3, 9, 3, 1, 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("case", CASES)
def test_soft_losses_equal_the_reference(case: str, temperature: float, dtype: torch.dtype) -> None:
    logits, target = (values.to(dtype) for values in CASES[case])
    near = {"rel": 1e-5, "abs": 1e-5 * temperature**2} if dtype == torch.float32 else {"rel": 1e-12}
    kl = kl_to_target(logits, target, temperature)
    cross_entropy = soft_cross_entropy(logits, target, temperature)
    assert kl.dtype == cross_entropy.dtype == dtype
    assert float(kl) == pytest.approx(reference_kl(logits, target, temperature), **near)
    assert float(cross_entropy) == pytest.approx(reference_soft(logits, target, temperature), **near)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_hard_cross_entropy_equals_the_reference(case: str, smoothing: float) -> None:
    logits = CASES[case][0]
    expected = reference_hard(logits, LABELS, smoothing)
    assert float(hard_cross_entropy(logits, LABELS, smoothing)) == pytest.approx(expected, rel=1e-12)
    assert float(hard_cross_entropy(logits.float(), LABELS, smoothing)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("soft_weight", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_distillation_loss_is_the_weighted_sum(case: str, soft_weight: float) -> None:
    logits, target = CASES[case]
    loss = distillation_loss(
        logits, LABELS, target, soft_weight=soft_weight, temperature=4.0, label_smoothing=0.1
    )
    hard, soft = reference_hard(logits, LABELS, 0.1), reference_kl(logits, target, 4.0)
    assert float(loss) == pytest.approx((1 - soft_weight) * hard + soft_weight * soft, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_formula(case: str, temperature: float) -> None:
    logits, target = CASES[case][0].clone().requires_grad_(), CASES[case][1]
    (of_kl,) = torch.autograd.grad(kl_to_target(logits, target, temperature), logits)
    (of_ce,) = torch.autograd.grad(soft_cross_entropy(logits, target, temperature), logits)
    q = softmax(logits.detach().numpy() / temperature, axis=1)
    np.testing.assert_allclose(of_kl, temperature * (q - target.numpy()) / B, atol=1e-14)
    np.testing.assert_allclose(of_kl.sum(dim=1), np.zeros(B), atol=1e-14)
    assert torch.equal(of_kl, of_ce)


def test_the_gradients_size_hardly_depends_on_a_high_temperature() -> None:
    student, teacher = (values.double() for values in torch.randn(2, B, C))
    sizes = []
    for temperature in (20.0, 40.0):
        logits = student.clone().requires_grad_()
        loss = kl_to_target(logits, torch.softmax(teacher / temperature, dim=1), temperature)
        sizes.append(float(torch.autograd.grad(loss, logits)[0].norm()))
    assert sizes[0] != sizes[1]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("case", CASES)
def test_kl_is_not_negative_and_differs_from_cross_entropy_by_the_entropy(
    case: str, temperature: float
) -> None:
    logits, target = CASES[case]
    kl = float(kl_to_target(logits, target, temperature))
    cross_entropy = float(soft_cross_entropy(logits, target, temperature))
    p = target.numpy()
    assert kl >= -1e-12
    assert kl - cross_entropy == pytest.approx(temperature**2 * xlogy(p, p).sum(axis=1).mean(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_zero_only_for_equal_distributions(temperature: float) -> None:
    logits = CASES["random"][0]
    same = torch.softmax(logits / temperature, dim=1)
    assert float(kl_to_target(logits, same, temperature)) == pytest.approx(0, abs=1e-12)
    nudged = logits.clone()
    nudged[0, same[0].argmax()] += 0.01
    assert float(kl_to_target(nudged, same, temperature)) > 1e-9


@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 1.0])
def test_a_duplicated_batch_has_the_same_loss(soft_weight: float) -> None:
    logits, target = CASES["random"]
    once = distillation_loss(logits, LABELS, target, soft_weight=soft_weight, temperature=4.0)
    twice = distillation_loss(
        logits.repeat(2, 1), LABELS.repeat(2), target.repeat(2, 1), soft_weight=soft_weight, temperature=4.0
    )
    assert float(once) == pytest.approx(float(twice), rel=1e-12)


@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 1.0])
def test_a_constant_added_to_a_samples_logits_changes_nothing(soft_weight: float) -> None:
    logits, target = CASES["random"]
    shifts = torch.tensor([0.0, 1.0, -50.0, 1000.0, 3.0, 7.0], dtype=torch.float64)[:, None]
    options = {"soft_weight": soft_weight, "temperature": 4.0}
    before = distillation_loss(logits, LABELS, target, **options)
    after = distillation_loss(logits + shifts, LABELS, target, **options)
    assert float(after) == pytest.approx(float(before), rel=1e-11)


@pytest.mark.parametrize("soft_weight", [0.1, 0.5, 0.9])
def test_at_temperature_one_both_targets_are_one_mixed_target(soft_weight: float) -> None:
    logits, target = CASES["random"]
    mixed = soft_weight * target + (1 - soft_weight) * one_hot(LABELS)
    entropy = -torch.xlogy(target, target).sum(dim=1).mean()
    loss = distillation_loss(logits, LABELS, target, soft_weight=soft_weight)
    expected = float(soft_cross_entropy(logits, mixed) - soft_weight * entropy)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_a_side_without_weight_is_not_needed() -> None:
    logits, target = CASES["random"]
    soft = distillation_loss(logits, None, target, soft_weight=1.0, temperature=4.0)
    hard = distillation_loss(logits, LABELS, None, soft_weight=0.0, temperature=4.0)
    assert float(soft) == pytest.approx(reference_kl(logits, target, 4.0), rel=1e-12)
    assert float(hard) == pytest.approx(reference_hard(logits, LABELS), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("soft_weight", [1.0, 0.999999999])
def test_the_loss_of_a_uniform_student_by_hand(soft_weight: float, temperature: float) -> None:
    # A uniform student is log C nats from a one-hot target. Dividing by B·C instead of B, or leaving T²
    # out where the labels have no weight, are the two ways in which published code went wrong here.
    logits = torch.zeros(B, C, dtype=torch.float64)
    loss = distillation_loss(
        logits, LABELS, one_hot(LABELS), soft_weight=soft_weight, temperature=temperature
    )
    assert float(loss) == pytest.approx(temperature**2 * math.log(C), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, target = (values.to(dtype) for values in CASES["random"])
    leaf = logits.clone().requires_grad_()
    loss = distillation_loss(leaf, LABELS, target, soft_weight=0.5, temperature=4.0)
    wide = distillation_loss(logits.float(), LABELS, target.float(), soft_weight=0.5, temperature=4.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0
    assert soft_cross_entropy(logits, target).dtype == torch.float32
    assert hard_cross_entropy(logits, LABELS).dtype == torch.float32
