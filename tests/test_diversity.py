"""Diversity of pairs and groups against statsmodels, scikit-learn and plain counts; the shared bootstrap."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score, matthews_corrcoef
from statsmodels.stats.inter_rater import fleiss_kappa

from ensemble_kd.analysis import resampling
from ensemble_kd.analysis.diversity import (
    UNDEFINED,
    from_counts,
    group_diversity,
    information,
    mutual_information,
    pair_diversity,
)
from ensemble_kd.analysis.resampling import measured, resampled, unknown


def correctness(models: int, n: int = 300, seed: int = 0) -> np.ndarray:
    """Models of different skill (L, N), that find the same samples hard."""
    generator = np.random.default_rng(seed)
    hard = generator.random(n)
    return np.stack([hard * generator.random(n) < 0.2 + 0.08 * k for k in range(models)])


@pytest.mark.parametrize("seed", range(5))
def test_pairs_equal_scikit_learn_and_plain_counts(seed: int) -> None:
    first, second = correctness(2, seed=seed)
    counts = {key: 0 for key in ((True, True), (True, False), (False, True), (False, False))}
    for one, other in zip(first, second, strict=True):
        counts[bool(one), bool(other)] += 1
    a, b, c, d = counts.values()
    found = pair_diversity(first, second)
    assert found["disagreement"] == pytest.approx((b + c) / 300, abs=1e-12)
    assert found["double_fault"] == pytest.approx(d / 300, abs=1e-12)
    assert found["q"] == pytest.approx((a * d - b * c) / (a * d + b * c), abs=1e-12)
    assert found["correlation"] == pytest.approx(matthews_corrcoef(first, second), abs=1e-12)
    assert found["error_consistency"] == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert abs(found["correlation"]) <= abs(found["q"])  # Kuncheva and Whitaker 2003


def test_counts_are_taken_as_arrays() -> None:
    cells = np.array([[4, 0, 3], [1, 0, 0], [2, 5, 0], [3, 5, 0]])
    found = from_counts(*cells)
    for column in range(3):
        alone = from_counts(*cells[:, column])
        for name, values in found.items():
            assert values[column] == pytest.approx(float(alone[name]), nan_ok=True), name


@pytest.mark.parametrize(
    ("cells", "undefined"),
    [
        ((5, 0, 0, 0), {"q", "correlation", "error_consistency"}),
        ((0, 0, 0, 5), {"q", "correlation", "error_consistency"}),
        ((5, 3, 0, 0), {"q", "correlation"}),
        ((0, 3, 2, 0), set()),
        ((5, 0, 0, 3), set()),
        ((0, 5, 0, 3), {"q", "correlation"}),
    ],
)
def test_what_is_0_by_0_is_nan_and_has_a_reason(cells: tuple[int, ...], undefined: set[str]) -> None:
    found = from_counts(*cells)
    assert {name for name, value in found.items() if np.isnan(value)} == undefined
    assert undefined <= set(UNDEFINED)


@pytest.mark.parametrize("models", [2, 3, 7])
def test_groups_equal_statsmodels_and_the_mean_over_pairs(models: int) -> None:
    right = correctness(models)
    found = group_diversity(right)
    table = np.stack([right.sum(axis=0), models - right.sum(axis=0)], axis=1)
    assert found["interrater_kappa"]["value"] == pytest.approx(fleiss_kappa(table), abs=1e-12)
    variance = np.mean([np.var(column) for column in right.T])
    assert found["kohavi_wolpert"]["value"] == pytest.approx(variance, abs=1e-12)
    pairs = [pair_diversity(a, b)["disagreement"] for a, b in combinations(right, 2)]
    assert found["disagreement"]["value"] == pytest.approx(np.mean(pairs), abs=1e-12)
    for measure in found.values():
        assert measure["low"] < measure["value"] < measure["high"]


def test_a_group_that_is_always_right_has_no_kappa() -> None:
    found = group_diversity(np.ones((3, 20), dtype=bool))
    assert found["kohavi_wolpert"]["value"] == found["disagreement"]["value"] == 0
    assert np.isnan(found["interrater_kappa"]["value"])
    assert found["interrater_kappa"]["reason"] == "all are right on all images, or wrong on all"


def test_models_that_are_the_same_have_no_diversity() -> None:
    found = group_diversity(np.repeat(correctness(1), 4, axis=0))
    assert found["disagreement"] == {"value": 0, "low": 0, "high": 0}
    assert found["interrater_kappa"]["value"] == pytest.approx(1)


def test_information_is_the_mean_of_the_divergences_from_the_mixture() -> None:
    z = np.random.default_rng(0).normal(size=(4, 2500, 6)) * 3
    p = np.exp(z) / np.exp(z).sum(axis=2, keepdims=True)
    mixture = p.mean(axis=0)
    expected = np.mean([stats.entropy(own, mixture, axis=1) for own in p], axis=0)
    found = information(list(z))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.min() >= 0
    assert mutual_information(z) == pytest.approx(found.mean())
    shifted = z + np.arange(4)[:, None, None]
    np.testing.assert_allclose(information(list(shifted)), expected, atol=1e-12)


# The bootstrap that all of them share


def test_the_first_row_is_the_mean_and_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).gamma(2, size=200)
    draws = resampled({"a": values, "b": values > 1})
    assert draws["a"].shape == (1 + resampling.RESAMPLES,)
    assert draws["a"][0] == pytest.approx(values.mean(), abs=1e-12)
    assert draws["b"][0] == pytest.approx((values > 1).mean(), abs=1e-12)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1)
    found = measured(draws["a"])
    interval = theirs.confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_all_columns_are_drawn_alike_also_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    monkeypatch.setattr(resampling, "_BLOCK", 50 * 7)
    draws = resampled({"a": values, "b": values + 1, 3: 2 * values}, seed=4)
    np.testing.assert_allclose(draws["b"] - draws["a"], 1, atol=1e-12)
    np.testing.assert_allclose(draws[3], 2 * draws["a"], atol=1e-12)
    assert len(np.unique(draws["a"])) > 990
    np.testing.assert_allclose(resampled({"a": values}, seed=4)["a"], draws["a"], atol=1e-12)
    assert not np.allclose(resampled({"a": values}, seed=5)["a"], draws["a"])
    assert resampled({}) == {}


def test_nan_has_a_reason_and_resamples_without_a_number_are_passed_over() -> None:
    assert measured(np.array([0.5, np.nan, 0.4, 0.6, np.nan])) == pytest.approx(
        {"value": 0.5, "low": 0.405, "high": 0.595}
    )
    assert measured(np.array([0.5, np.nan])) == {"value": 0.5, "low": 0.5, "high": 0.5}
    found = unknown("nobody knows")
    assert found["reason"] == "nobody knows"
    assert all(np.isnan(found[key]) for key in ("value", "low", "high"))
