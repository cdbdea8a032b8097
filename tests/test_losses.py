"""What defines each soft loss, the loss that training uses, its labels, features and schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import zscore
from torch import Tensor
from torch.nn import functional as F

from ensemble_kd.losses import (
    LOSSES,
    UNLABELLED,
    decoupled_kl,
    distillation_loss,
    feature_loss,
    hard_cross_entropy,
    jensen_shannon,
    kl_to_target,
    logit_mse,
    relations,
    reverse_kl,
    soft_cross_entropy,
    soft_weight_at,
    standardised_kl,
)

B, C, D = 6, 10, 16
LABELS = torch.tensor([0, 3, 9, 3, 1, 7])
SOME_LABELS = torch.tensor([0, UNLABELLED, 9, UNLABELLED, 1, 7])
NO_LABELS = torch.full((B,), UNLABELLED)
each_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
each_loss = pytest.mark.parametrize("name", LOSSES)
each_weight = pytest.mark.parametrize("soft_weight", [0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Waking more for a softmax of sixty numbers costs far more than the softmax."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def tempered(teacher: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(teacher / temperature, dim=1)


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, C).double()


def gradient(loss: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


STUDENT, TEACHER = draw(2, B, C)
HUGE = 1e4 * TEACHER.sign()


def soft(name: str, logits: Tensor, log_target: Tensor, temperature: float) -> Tensor:
    more = {"labels": LABELS} if LOSSES[name].needs_labels else {}
    return LOSSES[name].compute(logits, log_target, temperature, **more)


def reference_hard(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> float:
    log_q = log_softmax(logits.double().numpy(), axis=1)
    smooth = (1 - smoothing) * np.eye(C + 1)[labels.numpy()][:, :C] + smoothing / C
    return -(smooth * log_q)[labels.numpy() != UNLABELLED].sum() / len(logits)


# T² and sums over classes.


def test_the_gradients_size_hardly_depends_on_a_high_temperature() -> None:
    student, teacher = draw(2, B, C, scale=1.0)
    found = {
        t: gradient(lambda z, t=t: kl_to_target(z, tempered(teacher, t), t), student)
        for t in (20.0, 40.0, 1e5)
    }
    assert not torch.equal(found[20.0], found[40.0])
    assert float(found[20.0].norm()) == pytest.approx(float(found[40.0].norm()), rel=0.1)
    # It tends to that of matching centred logits.
    limit = (student - teacher - (student - teacher).mean(dim=1, keepdim=True)) / (B * C)
    np.testing.assert_allclose(found[1e5], limit, rtol=1e-3, atol=1e-6)


@each_temperature
@pytest.mark.parametrize("soft_weight", [1.0, 0.999999999])
def test_the_loss_of_a_uniform_student_by_hand(soft_weight: float, temperature: float) -> None:
    # A uniform student is log C nats from a one-hot target. Dividing by B · C instead of B, or leaving T²
    # out where the labels have no weight, are the two ways in which published code went wrong here.
    logits, target = torch.zeros(B, C, dtype=torch.float64), one_hot(LABELS).log()
    loss = distillation_loss(logits, LABELS, target, soft_weight=soft_weight, temperature=temperature)
    assert float(loss) == pytest.approx(temperature**2 * math.log(C), rel=1e-7)


@each_temperature
def test_kl_is_summed_over_classes(temperature: float) -> None:
    target = tempered(TEACHER, temperature)
    by_element = F.kl_div(tempered(STUDENT, temperature), target, reduction="none", log_target=True)
    loss = distillation_loss(STUDENT, None, target, soft_weight=1.0, temperature=temperature)
    assert float(loss) == pytest.approx(temperature**2 * C * float(by_element.mean()), rel=1e-10)


# One loss each.


@each_temperature
def test_js_is_symmetric_and_at_most_log_2(temperature: float) -> None:
    for seed in range(20):
        a, b = draw(2, B, C, scale=10.0 ** (seed % 6 - 1), seed=seed)
        one = float(jensen_shannon(a, tempered(b, temperature), temperature))
        other = float(jensen_shannon(b, tempered(a, temperature), temperature))
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
        assert -1e-12 <= one / temperature**2 <= math.log(2) + 1e-12
    disjoint = jensen_shannon(1e4 * one_hot(LABELS), one_hot((LABELS + 1) % C).log(), temperature)
    assert float(disjoint) == pytest.approx(temperature**2 * math.log(2), rel=1e-12)


@each_temperature
def test_reverse_kl_is_kl_with_the_sides_exchanged(temperature: float) -> None:
    forward = float(kl_to_target(STUDENT, tempered(TEACHER, temperature), temperature))
    exchanged = float(kl_to_target(TEACHER, tempered(STUDENT, temperature), temperature))
    reverse = float(reverse_kl(STUDENT, tempered(TEACHER, temperature), temperature))
    assert reverse == pytest.approx(exchanged, rel=1e-9)
    assert reverse != pytest.approx(forward, rel=1e-4)


@each_temperature
def test_mse_of_one_teacher_is_of_its_centred_logits_whatever_the_temperature(temperature: float) -> None:
    a, b = (z - z.mean(dim=1, keepdim=True) for z in (STUDENT, TEACHER + 5))
    loss = logit_mse(STUDENT, tempered(TEACHER, temperature), temperature)
    assert float(loss) == pytest.approx(float((a - b).square().mean()), rel=1e-10)


def sure(size: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-target that gives the label all but about exp(−size), and shares the rest as TEACHER does."""
    return torch.log_softmax(size * one_hot(LABELS) + TEACHER / 3, dim=1).to(dtype)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [0.0, 5.0, 15.0, 40.0, 100.0, 1e4])
@each_temperature
def test_kl_is_the_sum_of_dkds_parts(
    temperature: float, size: float, dtype: torch.dtype, near: float
) -> None:
    left = sure(size).masked_fill(one_hot(LABELS).bool(), -torch.inf).exp().sum(dim=1)  # 1 − p_y
    for i in range(B):
        sample = (STUDENT[[i]].to(dtype), sure(size, dtype)[[i]], temperature)
        tckd, nckd, both = (
            float(decoupled_kl(*sample, LABELS[[i]], alpha, beta))
            for alpha, beta in [(1.0, 0.0), (0.0, 1.0), (0.7, 3.0)]
        )
        kl = float(kl_to_target(*sample))
        assert tckd + float(left[i]) * nckd == pytest.approx(kl, rel=near, abs=near * temperature**2)
        assert both == pytest.approx(0.7 * tckd + 3 * nckd, rel=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("size", [20.0, 60.0, 300.0])
def test_dkd_hears_what_a_teacher_sure_of_the_label_says_of_the_others(
    size: float, temperature: float, dtype: torch.dtype
) -> None:
    # The label's probability rounds to 1, so that 1 − p_y cannot be taken.
    logits = STUDENT.to(dtype)
    unsure, found = (
        (decoupled_kl(logits, target, temperature, LABELS, 0.0, 1.0),
         gradient(lambda z, p=target: decoupled_kl(z, p, temperature, LABELS, 0.0, 1.0), logits))
        for target in (sure(0.0, dtype), sure(size, dtype))
    )  # fmt: skip
    assert float(found[0]) == pytest.approx(float(unsure[0]), rel=1e-4)
    np.testing.assert_allclose(found[1], unsure[1], atol=1e-4)
    assert found[1].abs().max() > 1e-2


def test_dkd_of_a_one_hot_target_is_the_labels_cross_entropy() -> None:
    loss = decoupled_kl(STUDENT, one_hot(LABELS).log(), 1.0, LABELS)
    assert float(loss) == pytest.approx(reference_hard(STUDENT, LABELS), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_invariant_as_correlations_are(temperature: float) -> None:
    # Each sample may be mixed with uniform in its own measure: a positive affine map of its probabilities.
    # Mixing all samples with one distribution in equal measure is one of each class over the batch.
    log_target = tempered(TEACHER, 1.0)
    own = torch.linspace(0.2, 0.9, B, dtype=torch.float64)[:, None]
    of_each = (own * log_target.exp() + (1 - own) / C).log()
    of_all = (0.4 * log_target.exp() + 0.6 * torch.softmax(draw(C, seed=3), dim=0)).log()
    classes, batch = (relations(STUDENT, log_target, temperature, *n) for n in [(1.0, 0.0), (0.0, 1.0)])
    for target, same_classes, same_batch in [(of_each, True, False), (of_all, False, True)]:
        between = relations(STUDENT, target, temperature, 1.0, 0.0)
        within = relations(STUDENT, target, temperature, 0.0, 1.0)
        assert (float(between) == pytest.approx(float(classes), rel=1e-9)) == same_classes
        assert (float(within) == pytest.approx(float(batch), rel=1e-9)) == same_batch


def test_dist_is_0_at_the_target_and_twice_its_numbers_at_the_opposite() -> None:
    a = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for student, expected in [(a, 0.0), (-a, 2 * (2.0 + 0.5))]:
        loss = relations(student, tempered(a, 1.0), 1.0, beta=2.0, gamma=0.5)
        assert float(loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.01, 3.0, 1e3])
def test_logit_std_ignores_the_size_of_either_sides_logits(scale: float) -> None:
    scales = scale * torch.arange(1, B + 1)[:, None]
    before = float(standardised_kl(STUDENT, tempered(TEACHER, 2.0), 2.0))
    student = float(standardised_kl(STUDENT * scales, tempered(TEACHER, 2.0), 2.0))
    teacher = float(standardised_kl(STUDENT, tempered(TEACHER * scales, 2.0), 2.0))
    assert student == pytest.approx(before, rel=1e-4)
    assert teacher == pytest.approx(before, rel=1e-4)
    assert before != pytest.approx(float(kl_to_target(STUDENT, tempered(TEACHER, 2.0), 2.0)), rel=1e-2)


# The loss of a batch: labels and soft target together.


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("labels", [LABELS, SOME_LABELS, NO_LABELS], ids=["all", "some", "none"])
@pytest.mark.parametrize("logits", [STUDENT, HUGE, 0 * STUDENT], ids=["random", "huge", "equal"])
def test_hard_cross_entropy_equals_the_reference(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    expected = reference_hard(logits, labels, smoothing)
    assert float(hard_cross_entropy(logits, labels, smoothing)) == pytest.approx(expected, rel=1e-12)
    assert float(hard_cross_entropy(logits.float(), labels, smoothing)) == pytest.approx(expected, rel=1e-5)


@each_loss
@each_weight
def test_the_loss_is_the_weighted_sum(soft_weight: float, name: str) -> None:
    for smoothing, logits in itertools.product((0.0, 0.1), (STUDENT, HUGE)):
        target = tempered(TEACHER, 4.0)
        options = {"soft_weight": soft_weight, "temperature": 4.0, "label_smoothing": smoothing, "loss": name}
        loss = distillation_loss(logits, LABELS, target, **options)
        hard = reference_hard(logits, LABELS, smoothing)
        expected = (1 - soft_weight) * hard + soft_weight * float(soft(name, logits, target, 4.0))
        assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_a_losss_name_and_own_numbers_reach_it() -> None:
    target, options = tempered(TEACHER, 4.0), {"soft_weight": 1.0, "temperature": 4.0}
    dkd = distillation_loss(STUDENT, LABELS, target, loss="dkd", numbers={"beta": 2.0}, **options)
    assert float(dkd) == float(decoupled_kl(STUDENT, target, 4.0, LABELS, alpha=1.0, beta=2.0))
    dist = distillation_loss(STUDENT, None, target, loss="dist", numbers={"gamma": 3.0}, **options)
    assert float(dist) == float(relations(STUDENT, target, 4.0, beta=1.0, gamma=3.0))
    default = distillation_loss(STUDENT, None, target, soft_weight=1.0)
    assert float(default) == float(kl_to_target(STUDENT, target, 1.0))
    with pytest.raises(TypeError, match="beta"):
        distillation_loss(STUDENT, LABELS, target, loss="kl", numbers={"beta": 2.0}, **options)


@each_loss
def test_labels_are_needed_at_weight_1_by_dkd_alone(name: str) -> None:
    target, options = tempered(TEACHER, 4.0), {"soft_weight": 1.0, "temperature": 4.0, "loss": name}
    assert LOSSES[name].needs_labels == (name == "dkd")
    if LOSSES[name].needs_labels:
        with pytest.raises(AssertionError):
            distillation_loss(STUDENT, None, target, **options)
    else:
        loss = distillation_loss(STUDENT, None, target, **options)
        assert float(loss) == float(soft(name, STUDENT, target, 4.0))


@each_loss
def test_a_side_without_weight_is_not_computed(name: str) -> None:
    expected = pytest.approx(reference_hard(STUDENT, LABELS, 0.1), rel=1e-12)
    for target in (None, one_hot(LABELS).log(), torch.full_like(STUDENT, torch.nan)):
        loss = distillation_loss(STUDENT, LABELS, target, soft_weight=0.0, loss=name, label_smoothing=0.1)
        assert float(loss) == expected


@pytest.mark.parametrize("soft_weight", [0.1, 0.5, 0.9])
def test_at_temperature_one_both_targets_are_one_mixed_target(soft_weight: float) -> None:
    target = tempered(TEACHER, 1.0)
    mixed = (soft_weight * target.exp() + (1 - soft_weight) * one_hot(LABELS)).log()
    loss = distillation_loss(STUDENT, LABELS, target, soft_weight=soft_weight, loss="ce")
    assert float(loss) == pytest.approx(float(soft_cross_entropy(STUDENT, mixed)), rel=1e-12)


@each_loss
@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 1.0])
def test_the_sum_is_invariant_too(soft_weight: float, name: str) -> None:
    target = tempered(TEACHER, 4.0)
    options = {"soft_weight": soft_weight, "temperature": 4.0, "loss": name, "label_smoothing": 0.1}
    before = pytest.approx(float(distillation_loss(STUDENT, LABELS, target, **options)), rel=1e-10)
    shifts = torch.tensor([0.0, 1.0, -50.0, 1000.0, 3.0, 7.0], dtype=torch.float64)[:, None]
    assert float(distillation_loss(STUDENT + shifts, LABELS, target, **options)) == before
    doubled = (STUDENT.repeat(2, 1), LABELS.repeat(2), target.repeat(2, 1))
    assert float(distillation_loss(*doubled, **options)) == before


@each_loss
@pytest.mark.parametrize("soft_weight", [0.5, 1.0])
def test_every_sample_has_a_gradient(soft_weight: float, name: str) -> None:
    target, options = tempered(TEACHER, 4.0), {"soft_weight": soft_weight, "temperature": 4.0, "loss": name}
    found = gradient(lambda z: distillation_loss(z, LABELS, target, **options), STUDENT.float())
    assert found.isfinite().all()
    assert (found.abs().amax(dim=1) > 1e-5).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half: torch.dtype) -> None:
    logits, target = STUDENT.to(half), tempered(TEACHER, 4.0).to(half)
    options = {"soft_weight": 0.5, "temperature": 4.0, "label_smoothing": 0.1}
    loss = distillation_loss(logits, LABELS, target, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(logits.float(), LABELS, target.float(), **options))
    assert torch.equal(hard_cross_entropy(logits, LABELS), hard_cross_entropy(logits.float(), LABELS))


# Samples without a label.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labelled_samples_count_as_in_a_full_batch(smoothing: float) -> None:
    labelled = SOME_LABELS != UNLABELLED
    full, some, none = (
        gradient(lambda z, y=y: hard_cross_entropy(z, y, smoothing), STUDENT)
        for y in (LABELS, SOME_LABELS, NO_LABELS)
    )
    assert torch.equal(some[labelled], full[labelled])
    assert some[labelled].abs().max() > 1e-3
    assert (some[~labelled] == 0).all()
    assert (none == 0).all()
    assert float(hard_cross_entropy(STUDENT, NO_LABELS, smoothing)) == 0


@pytest.mark.parametrize("soft_weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("labels", [SOME_LABELS, NO_LABELS], ids=["some", "none"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_labels])
def test_unlabelled_samples_learn_from_the_soft_side_alone(
    name: str, labels: Tensor, soft_weight: float
) -> None:
    target, unlabelled = tempered(TEACHER, 4.0), labels == UNLABELLED
    options = {"soft_weight": soft_weight, "temperature": 4.0, "label_smoothing": 0.1, "loss": name}
    found, full = (
        gradient(lambda z, y=y: distillation_loss(z, y, target, **options), STUDENT) for y in (labels, LABELS)
    )
    of_soft = soft_weight * gradient(lambda z: soft(name, z, target, 4.0), STUDENT)
    assert torch.allclose(found[unlabelled], of_soft[unlabelled], rtol=1e-12, atol=1e-15)
    assert torch.allclose(found[~unlabelled], full[~unlabelled], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(found[unlabelled], full[unlabelled], rtol=1e-3)


# Features.


def reference_feature(projected: Tensor, features: Tensor, weights: Tensor) -> float:
    ours, wanted = projected.double().numpy(), zscore(features.double().numpy(), axis=1)
    cosine = (ours * wanted).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(wanted, axis=1)
    apart = np.abs(ours - wanted)
    smooth = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean(axis=1)
    return (weights.double().numpy() * (1 - cosine + smooth)).mean()


WEIGHTS = torch.tensor([0.1, 0.0, 0.5, 1.0, 0.25, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 16, 513])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_feature_loss_equals_the_reference(scale: float, width: int) -> None:
    projected, features = draw(B, width, scale=scale), draw(B, width, scale=50.0, seed=1)
    expected = reference_feature(projected, features, WEIGHTS)
    for dtype, near in [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.float16, 1e-2)]:
        loss = feature_loss(projected.to(dtype), features.to(dtype), WEIGHTS.to(dtype))
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(loss) == pytest.approx(expected, rel=near)


def test_the_feature_loss_by_hand() -> None:
    features, weight = torch.tensor([[3.0, 5.0, 3.0, 5.0]]), torch.ones(1)
    same = torch.tensor([[-1.0, 1.0, -1.0, 1.0]])  # the features standardised
    for projected, expected in [(same, 0.0), (-same, 2 + 1.5), (same / 2, 0.5**2 / 2), (3 * same, 1.5)]:
        assert float(feature_loss(projected, features, weight)) == pytest.approx(expected, abs=1e-4)


def test_features_of_any_scale_and_shift_count_alike() -> None:
    projected, features = draw(B, D, scale=1.0), draw(B, D, seed=1)
    before = float(feature_loss(projected, features, WEIGHTS))
    scales = torch.tensor([0.5, 1.0, 3.0, 100.0, 7.0, 20.0], dtype=torch.float64)[:, None]
    after = float(feature_loss(projected, features * scales + 10 * scales, WEIGHTS))
    assert after == pytest.approx(before, rel=1e-5)
    assert float(feature_loss(projected * scales, features, WEIGHTS)) != pytest.approx(before, rel=1e-2)


def test_weights_scale_each_samples_feature_loss() -> None:
    projected, features = draw(B, D, scale=1.0), draw(B, D, seed=1)
    one = torch.ones(1, dtype=torch.float64)
    alone = torch.stack([feature_loss(projected[[i]], features[[i]], one) for i in range(B)])
    loss = feature_loss(projected, features, WEIGHTS)
    assert float(loss) == pytest.approx(float((WEIGHTS * alone).mean()), rel=1e-12)


def test_the_feature_loss_has_the_gradient_of_its_formula() -> None:
    projected, features = draw(B, D, scale=1.0), draw(B, D, scale=50.0, seed=1)
    found = gradient(lambda ours: feature_loss(ours, features, WEIGHTS), projected)
    assert ((found.abs().amax(dim=1) > 1e-4) == (WEIGHTS > 0)).all()
    step = 1e-5
    for place in [(0, 0), (2, 3), (3, 15), (1, 4), (5, 7)]:
        change = torch.zeros_like(projected)
        change[place] = step
        up, down = (
            reference_feature(ours, features, WEIGHTS) for ours in (projected + change, projected - change)
        )
        assert float(found[place]) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_all_equal_stay_finite(dtype: torch.dtype) -> None:
    equal, some = torch.full((B, D), 3.0, dtype=dtype), draw(B, D).to(dtype)
    for projected, features in [
        (some, equal),
        (equal, some),
        (equal, equal),
        (0 * equal, some),
        (0 * equal, equal),
    ]:
        assert feature_loss(projected, features, WEIGHTS.to(dtype)).isfinite()
        found = gradient(lambda ours, f=features: feature_loss(ours, f, WEIGHTS.to(dtype)), projected)
        assert found.isfinite().all()


# Schedules of the soft weight.

FACTORS: list[tuple[str, int | None, list[float]]] = [
    ("constant", None, [1, 1, 1, 1]),
    ("constant", 2, [1, 1, 1, 1]),
    ("constant", None, [1]),
    ("linear", None, [1, 1, 1 / 2, 0]),
    ("linear", None, [1, 1, 4 / 5, 2 / 5, 0]),
    ("linear", None, [1, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]),
    ("linear", None, [1, 0]),
    ("linear", None, [1]),
    ("linear", 1, [1, 1, 1 / 2, 0]),
    ("cutoff", None, [1, 1, 0, 0]),
    ("cutoff", None, [1, 1, 1, 0, 0]),
    ("cutoff", None, [1]),
    ("cutoff", 0, [0, 0, 0]),
    ("cutoff", 1, [1, 0, 0, 0]),
    ("cutoff", 3, [1, 1, 1, 0]),
    ("cutoff", 9, [1, 1, 1, 1]),
    ("warmup", None, [1 / 2, 1, 1, 1]),
    ("warmup", None, [2 / 5, 4 / 5, 1, 1, 1]),
    ("warmup", None, [1]),
    ("warmup", 0, [1, 1, 1]),
    ("warmup", 1, [1, 1, 1]),
    ("warmup", 3, [1 / 3, 2 / 3, 1, 1]),
    ("warmup", 8, [1 / 8, 2 / 8, 3 / 8, 4 / 8]),
    ("warmup", 5, [1 / 5]),
]


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("schedule", "span", "factors"), FACTORS)
def test_soft_weights_by_epoch(schedule: str, span: int | None, factors: list[float], weight: float) -> None:
    epochs = len(factors)
    found = [soft_weight_at(schedule, weight, epoch, epochs, span) for epoch in range(epochs)]
    assert found == pytest.approx([weight * factor for factor in factors], rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cutoff", "warmup"])
def test_soft_weights_lie_within_the_weight_and_move_one_way(schedule: str) -> None:
    for epochs in range(1, 13):
        for span in (None, *range(15)):
            for weight in (0.0, 0.3, 1.0):
                found = [soft_weight_at(schedule, weight, epoch, epochs, span) for epoch in range(epochs)]
                assert all(0 <= value <= weight for value in found)
                assert found == sorted(found, reverse=schedule != "warmup")


def test_an_unknown_schedule_is_not_taken_for_another() -> None:
    with pytest.raises(KeyError):
        soft_weight_at("cosine", 0.9, 0, 10)
