"""The measures against scikit-learn, scipy and plain loops, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor

from ensemble_kd import metrics
from ensemble_kd.metrics import (
    CALIBRATION_BINS,
    bootstrap_mean,
    calibration_terms,
    correct,
    expected_calibration_error,
    mean_and_spread,
    measure,
    per_sample,
)


def judged(n: int = 300, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels that they know something of, and an ensemble's probabilities."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    logits = generator.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    target = softmax(generator.normal(size=(n, classes)) + 2 * np.eye(classes)[labels], axis=1)
    return torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(target)


def means(logits: Tensor, labels: Tensor, target: Tensor | None = None) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in per_sample(logits, labels, target).items()}


def reference_ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """One bin after another, (lo, hi], in plain Python."""
    p = torch.softmax(logits.double(), dim=1)
    samples = [
        (float(row.max()), int(row.argmax()) == int(label)) for row, label in zip(p, labels, strict=True)
    ]
    total = 0.0
    for number in range(bins):
        inside = [(c, right) for c, right in samples if number / bins < c <= (number + 1) / bins]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(samples) * abs(accuracy - confidence)
    return total


def overconfident(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes, confidence 0.9 everywhere, right in about 60 of 100."""
    right = torch.from_numpy(np.random.default_rng(seed).random(n) < 0.6)
    return torch.tensor([[math.log(0.9), math.log(0.1)]]).repeat(n, 1), (~right).long()


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
def test_accuracy_top5_and_nll_equal_scikit_learn(classes: int) -> None:
    logits, labels, _ = judged(classes=classes)
    found, p, names = means(logits, labels), softmax(logits.numpy(), axis=1), list(range(classes))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(dim=1)))
    assert found["nll"] == pytest.approx(log_loss(labels, p, labels=names), rel=1e-12)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, p, k=5, labels=names))


def test_without_a_target_there_are_no_teacher_student_measures() -> None:
    logits, labels, target = judged()
    assert list(per_sample(logits, labels)) == ["accuracy", "top5", "nll"]
    both = {"teacher_student_cross_entropy", "teacher_student_kl", "agreement"}
    assert set(per_sample(logits, labels, target)) - set(per_sample(logits, labels)) == both


@pytest.mark.parametrize("classes", [6, 10, 100])
def test_the_most_likely_class_is_among_the_top_five_even_in_a_tie(classes: int) -> None:
    logits = torch.zeros(classes, classes)
    found = per_sample(logits, torch.arange(classes))
    assert found["accuracy"].sum() == 1
    assert bool((found["accuracy"] <= found["top5"]).all())


def test_teacher_student_measures_equal_scipy() -> None:
    logits, labels, target = judged()
    found, p, q = per_sample(logits, labels, target), target.numpy(), softmax(logits.numpy(), axis=1)
    np.testing.assert_allclose(found["teacher_student_kl"], entropy(p, q, axis=1), atol=1e-12)
    cross_entropy = -(p * log_softmax(logits.numpy(), axis=1)).sum(axis=1)
    np.testing.assert_allclose(found["teacher_student_cross_entropy"], cross_entropy, atol=1e-12)
    np.testing.assert_array_equal(found["agreement"], p.argmax(axis=1) == q.argmax(axis=1))


def test_a_target_with_zeros_gives_finite_measures() -> None:
    logits, labels, _ = judged()
    certain = torch.nn.functional.one_hot(labels, 10).double()
    found = per_sample(logits * 1e4, labels, certain)
    assert all(bool(values.isfinite().all()) for values in found.values())
    np.testing.assert_allclose(found["teacher_student_kl"], found["nll"], rtol=1e-12)


def test_a_model_agrees_with_itself() -> None:
    logits, labels, _ = judged()
    found = per_sample(logits, labels, torch.softmax(logits, dim=1))
    assert float(found["agreement"].min()) == 1
    np.testing.assert_allclose(found["teacher_student_kl"], np.zeros(len(labels)), atol=1e-12)


def test_a_shift_of_a_samples_logits_changes_nothing() -> None:
    logits, labels, target = judged()
    shifted = logits + torch.linspace(-100, 100, len(labels), dtype=torch.float64)[:, None]
    before, after = (means(z, labels, target) for z in (logits, shifted))
    assert after == pytest.approx(before, abs=1e-10)
    eces = (expected_calibration_error(z, labels) for z in (logits, shifted))
    assert next(eces) == pytest.approx(next(eces), abs=1e-10)


def test_the_scale_of_logits_changes_calibration_and_not_accuracy() -> None:
    logits, labels, target = judged()
    before, after = (means(z, labels, target) for z in (logits, 5 * logits))
    for name in ("accuracy", "top5", "agreement"):
        assert after[name] == before[name]
    for name in ("nll", "teacher_student_kl", "teacher_student_cross_entropy"):
        assert abs(after[name] - before[name]) > 0.1
    eces = [expected_calibration_error(z, labels) for z in (logits, 5 * logits)]
    assert abs(eces[0] - eces[1]) > 0.05


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 100.0])
def test_ece_equals_the_plain_loop(classes: int, scale: float) -> None:
    logits, labels, _ = judged(classes=classes)
    ours = expected_calibration_error(scale * logits, labels)
    assert ours == pytest.approx(reference_ece(scale * logits, labels), abs=1e-12)


def logits_at(confidence: float) -> Tensor | None:
    """Logits of two or three classes whose float64 softmax has exactly this maximum, if there are any."""
    others = 1 if confidence >= 0.5 else 2
    guess = math.log(confidence * others / (1 - confidence)) if confidence < 1 else 1e3
    for step in range(-40, 41):
        first = guess + step * math.ulp(max(abs(guess), 0.1)) / 4
        row = torch.tensor([[first] + [0.0] * others], dtype=torch.float64)
        if float(torch.softmax(row, dim=1).amax()) == confidence:
            return row
    return None


@pytest.mark.parametrize("number", range(5, CALIBRATION_BINS))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(number: int) -> None:
    # Bin k holds (k / 15, (k + 1) / 15]; three classes cannot be less confident than 5 / 15.
    row = logits_at((number + 1) / CALIBRATION_BINS)
    if row is None:
        pytest.skip("no float64 logits have this confidence exactly")
    index, _ = calibration_terms(row, torch.tensor([0]))
    assert int(index) == number


@pytest.mark.parametrize(("classes", "number"), [(3, 4), (5, 2), (15, 0)])
def test_equal_logits_lie_on_an_edge(classes: int, number: int) -> None:
    index, gap = calibration_terms(torch.zeros(1, classes), torch.tensor([0]))
    assert int(index) == number
    assert float(gap) == pytest.approx(1 - 1 / classes)


def test_calibrated_confidences_have_no_error() -> None:
    rows, labels = [], []
    for confidence in (0.55, 0.7, 0.85, 0.95):
        for number in range(20):
            rows.append([math.log(confidence), math.log(1 - confidence)])
            labels.append(0 if number < round(20 * confidence) else 1)
    logits, truth = torch.tensor(rows, dtype=torch.float64), torch.tensor(labels)
    assert expected_calibration_error(logits, truth) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(2 * logits, truth) > 0.05


def test_ece_of_overconfidence_by_hand() -> None:
    logits, labels = overconfident(1000)
    accuracy = float(correct(logits, labels).double().mean())
    assert expected_calibration_error(logits, labels) == pytest.approx(0.9 - accuracy, abs=1e-7)


def test_measure_gives_each_measure_with_its_interval() -> None:
    logits, labels, target = judged()
    found = measure(logits, labels, target, resamples=200)
    assert set(found) == {*per_sample(logits, labels, target), "ece"}
    for name, value in means(logits, labels, target).items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-12)
        assert found[name]["low"] < value < found[name]["high"]
    assert found["ece"]["value"] == expected_calibration_error(logits, labels)


@pytest.mark.parametrize(("n", "share"), [(1000, 0.8), (400, 0.5)])
def test_the_interval_of_a_share_is_near_the_normal_one(n: int, share: float) -> None:
    values = torch.zeros(n, dtype=torch.float64)
    values[: round(n * share)] = 1
    found = bootstrap_mean(values, resamples=2000)
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert found["value"] == pytest.approx(share)
    assert found["low"] == pytest.approx(share - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(share + half, abs=0.1 * half)


def test_intervals_depend_on_the_seed_alone() -> None:
    logits, labels, target = judged()
    first, again = (measure(logits, labels, target, resamples=200, seed=1) for _ in range(2))
    other = measure(logits, labels, target, resamples=200, seed=2)
    assert first == again
    assert other["nll"]["value"] == first["nll"]["value"]
    assert other["nll"]["low"] != first["nll"]["low"]
    assert other["ece"]["low"] != first["ece"]["low"]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.25], 0.25), ([0.75] * 50, 0.75), ([0.0] * 2, 0.0), ([1.0] * 360, 1.0)]
)
def test_values_without_spread_have_an_interval_of_no_width(values: list[float], expected: float) -> None:
    found = bootstrap_mean(torch.tensor(values))
    assert found == {"value": expected, "low": expected, "high": expected}


def test_one_sample_can_be_measured() -> None:
    logits, labels, target = judged(n=1)
    for interval in measure(logits, labels, target, resamples=20).values():
        assert interval["low"] == pytest.approx(interval["value"])
        assert interval["high"] == pytest.approx(interval["value"])


def test_the_interval_of_ece_holds_a_large_error() -> None:
    found = measure(*overconfident(2000), resamples=2000)["ece"]
    half = 1.96 * math.sqrt(0.6 * 0.4 / 2000)
    assert found["low"] < 0.3 < found["high"]
    assert found["low"] == pytest.approx(found["value"] - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(found["value"] + half, abs=0.1 * half)


def test_the_interval_of_ece_is_narrow_and_low_for_a_calibrated_model() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 10, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
    found = measure(logits, labels, resamples=300)["ece"]
    assert 0 < found["low"] < found["high"] < 0.08


def test_mean_and_spread_over_runs() -> None:
    assert mean_and_spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
    mean, spread = mean_and_spread([0.5])
    assert mean == 0.5
    assert math.isnan(spread)


def test_resamples_that_are_kept_are_those_that_are_drawn_again(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(250, 4, generator=generator),
        torch.randint(0, 4, (250,), generator=generator),
    )
    kept = [measure(logits, labels, resamples=230)["ece"] for _ in range(2)]
    monkeypatch.setattr(metrics, "_KEPT", 0)
    assert kept == [measure(logits, labels, resamples=230)["ece"]] * 2
