"""CKA, neighbours and Procrustes against dcor, rsatoolbox, scipy and scikit-learn, and what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from ensemble_kd.analysis.cka import (
    GROUPS,
    MinibatchCKA,
    Moments,
    centred_gram,
    debiased_cka,
    hsic0,
    hsic1,
    linear_cka,
    u_centred,
)
from ensemble_kd.analysis.resampling import measured
from ensemble_kd.analysis.similarity import nearest, procrustes, shared_neighbours


def pair(n: int = 100, p: int = 10, q: int = 10, seed: int = 1337) -> tuple[Tensor, Tensor]:
    """Gaussian features, the second partly the first; the default is the pair of the published numbers."""
    generator = np.random.RandomState(seed)
    x = generator.randn(n, p)
    y = generator.randn(n, q)
    y[:, : min(p, q)] += x[:, : min(p, q)]
    return torch.from_numpy(x), torch.from_numpy(y)


def streamed(layers: list[Tensor], batch: int) -> Moments:
    """The layers (N, …), taken in batch by batch."""
    sums = MinibatchCKA(len(layers[0]))
    for start in range(0, len(layers[0]), batch):
        sums.add([centred_gram(layer[start : start + batch]) for layer in layers])
    return sums.finish()


def plain_hsic1(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 3 of Nguyen et al. 2021, written out; no centring is needed."""
    n, one = len(x), np.ones(len(x))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def squared_distances(x: np.ndarray) -> np.ndarray:
    return np.square(x[:, None] - x[None]).sum(axis=2)


def distance_covariances(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of squared Euclidean distances, biased and unbiased, number by number.

    Székely, Rizzo and Bakirov 2007, definition 4, and Székely and Rizzo 2014, equations 2.1 and 2.7.
    """
    n, sides = len(x), [squared_distances(x), squared_distances(y)]
    biased, unbiased = [], []
    for d in sides:
        rows, total = d.sum(axis=1), d.sum()
        biased.append(d - rows[:, None] / n - rows / n + total / n**2)
        centred = d - rows[:, None] / (n - 2) - rows / (n - 2) + total / ((n - 1) * (n - 2))
        unbiased.append(np.where(np.eye(n), 0, centred))
    return float(np.mean(biased[0] * biased[1])), float(np.sum(unbiased[0] * unbiased[1]) / (n * (n - 3)))


DCOR = {
    (100, 10, 10): (0.5576132566117595, 0.5134564895055297),
    (20, 50, 3): (0.39771194433707263, 0.15384332738234638),
    (5, 2, 2): (0.6519721893248844, 0.4524009716633436),
    (64, 1, 200): (0.15684280233453313, 0.09775623122787917),
}
"""By n, p and q what dcor 0.7 gives for `x, y = pair(n, p, q)` as arrays: `distance_correlation_sqr(x, y, exponent=2)` and
`u_distance_correlation_sqr(x, y, exponent=2)`. Kept, as it compiles for half a minute before it computes."""


# Independent references


def test_published_numbers() -> None:
    x, y = pair()
    assert linear_cka(x, y) == pytest.approx(0.5576132566, abs=1e-9)
    assert debiased_cka(x, y) == pytest.approx(0.5134564895, abs=1e-9)
    assert hsic0(x, y) == pytest.approx(11.8783572692, abs=1e-9)
    assert hsic1(x, y) == pytest.approx(9.8959557870, abs=1e-9)


@pytest.mark.parametrize(("n", "p", "q"), DCOR)
def test_both_estimators_are_distance_correlations_and_those_of_dcor(n: int, p: int, q: int) -> None:
    x, y = pair(n, p, q)
    pairs = ((x, y), (x, x), (y, y))
    both, first, second = (np.array(distance_covariances(a.numpy(), b.numpy())) for a, b in pairs)
    biased, debiased = both / np.sqrt(first * second)
    assert (biased, debiased) == pytest.approx(DCOR[n, p, q], abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(biased, abs=1e-9)
    assert debiased_cka(x, y) == pytest.approx(debiased, abs=1e-9)


def test_the_biased_one_is_the_whitened_cosine_of_rsatoolbox() -> None:
    rdm, data = pytest.importorskip("rsatoolbox.rdm"), pytest.importorskip("rsatoolbox.data")
    x, y = pair(40, 12, 7)
    first, second = (rdm.calc_rdm(data.Dataset(side.numpy()), method="euclidean") for side in (x, y))
    assert linear_cka(x, y) == pytest.approx(rdm.compare(first, second, "cosine_cov").item(), abs=1e-9)


@pytest.mark.parametrize("batch", [20, 64, 85])
def test_batches_give_a_ratio_of_sums_also_with_an_uneven_last_one(batch: int) -> None:
    layers = [*pair(150, 30, 20), pair(150, 5, 40, seed=1)[1]]
    arrays = [layer.numpy() for layer in layers]
    expected = np.zeros((3, 3))
    for start in range(0, 150, batch):
        parts = [array[start : start + batch] for array in arrays]
        expected += len(parts[0]) / 150 * np.array([[plain_hsic1(a, b) for a in parts] for b in parts])
    found = streamed(layers, batch)
    np.testing.assert_allclose(found.hsic, expected, atol=1e-9)
    root = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(found.cka(), expected / np.outer(root, root), atol=1e-12)


def test_one_batch_is_the_whole() -> None:
    x, y = pair()
    assert streamed([x, y], 100).cka()[0, 1] == pytest.approx(debiased_cka(x, y), abs=1e-12)


@pytest.mark.parametrize(("n", "p", "q"), [(100, 10, 10), (100, 10, 25), (30, 50, 80), (30, 80, 4)])
def test_procrustes_is_that_of_scipy(n: int, p: int, q: int) -> None:
    x, y = pair(n, p, q)
    found = procrustes(x, y)
    width = max(p, q)
    a, b = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (x.numpy(), y.numpy()))
    a, b = (side - side.mean(axis=0) for side in (a, b))
    _, scale = scipy.linalg.orthogonal_procrustes(a / np.linalg.norm(a), b / np.linalg.norm(b))
    assert found == pytest.approx(scale, abs=1e-9)
    assert found == pytest.approx((1 - scipy.spatial.procrustes(a, b)[2]) ** 0.5, abs=1e-9)


@pytest.mark.parametrize("n", [40, 700])  # 700: more than a block of rows
def test_neighbours_are_those_of_scikit_learn(n: int) -> None:
    x, y = (side + 30 for side in pair(n, 12, 20))
    found = [nearest(side, 10) for side in (x, y)]
    expected = [
        NearestNeighbors(n_neighbors=10, algorithm="brute").fit(side).kneighbors(return_distance=False)
        for side in (x.numpy(), y.numpy())
    ]
    for own, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own.numpy(), theirs)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(*expected, strict=True)]
    np.testing.assert_allclose(shared_neighbours(*found).numpy(), shares, atol=1e-15)


# What must hold

MEASURES = {
    "debiased": debiased_cka,
    "biased": linear_cka,
    "procrustes": procrustes,
    "neighbours": lambda x, y: float(shared_neighbours(nearest(x, 5), nearest(y, 5)).mean()),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_alike_and_symmetric(measure: str) -> None:
    similarity = MEASURES[measure]
    x, y = pair(60, 20, 30)
    assert similarity(x, x) == pytest.approx(1, abs=1e-12)
    assert similarity(x, y) == pytest.approx(similarity(y, x), abs=1e-12)


@pytest.mark.parametrize("change", ["rotation", "permutation", "shift", "scale"])
@pytest.mark.parametrize("measure", MEASURES)
def test_blind_to(measure: str, change: str) -> None:
    similarity, (x, y) = MEASURES[measure], pair(60, 20, 30)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    moved = {
        "rotation": x @ rotation,
        "permutation": x[:, torch.randperm(20)],
        "shift": x + 5 * torch.randn(20, dtype=torch.float64),
        "scale": -3e4 * x,
    }[change]
    assert similarity(moved, y) == pytest.approx(similarity(x, y), abs=1e-9)
    assert similarity(moved, x) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_not_blind_to_a_general_linear_map(measure: str) -> None:
    x, _ = pair(60, 20)
    assert MEASURES[measure](x @ torch.diag(torch.logspace(-2, 2, 20, dtype=torch.float64)), x) < 0.9


@pytest.mark.parametrize("measure", MEASURES)
def test_the_order_of_the_samples_matters_on_one_side_only(measure: str) -> None:
    similarity, (x, y) = MEASURES[measure], pair(200, 20, 20)
    order = torch.randperm(200)
    assert similarity(x[order], y[order]) == pytest.approx(similarity(x, y), abs=1e-9)
    shuffled = similarity(x[order], y)
    assert shuffled < similarity(x, y) - (0.1 if measure == "neighbours" else 0.2)
    if measure == "debiased":
        assert abs(shuffled) < 0.03
    if measure == "neighbours":
        assert shuffled == pytest.approx(5 / 199, abs=0.02)


def test_unrelated_features_score_zero_where_the_biased_one_scores_high() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 32, 64, generator=generator, dtype=torch.float64) for _ in range(200)]
    debiased = np.array([debiased_cka(x, y) for x, y in draws])
    assert abs(debiased.mean()) < 0.008  # three standard errors
    assert debiased.std() == pytest.approx(0.04, abs=0.01)
    assert (debiased < 0).any()  # nothing is clamped
    biased = np.mean([linear_cka(x, y) for x, y in draws])
    assert biased == pytest.approx(64 / (32 + 64), abs=0.02)


def test_float32_features_are_good_enough() -> None:
    x, y = (side + 8 for side in pair(500, 300, 200))
    exact = streamed([x, y], 128).cka()
    assert np.abs(streamed([x.float(), y.float()], 128).cka() - exact).max() < 1e-5


def test_maps_are_taken_whole() -> None:
    maps = torch.randn(20, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(centred_gram(maps), centred_gram(maps.flatten(1)))


def test_rows_of_u_centred_matrices_sum_to_zero() -> None:
    centred = u_centred(torch.stack([side @ side.T for side in pair(30)]))
    assert centred.sum(dim=1).abs().max() < 1e-12
    assert centred.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert (centred - centred.mT).abs().max() < 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6])
def test_a_layer_that_does_not_vary_has_no_number(value: float) -> None:
    x, y = (side.float() for side in pair(40))
    constant = torch.full((40, 7), value)
    found = streamed([x, constant, y], 20).cka()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[np.ix_([0, 2], [0, 2])]).all()
    assert np.isnan(debiased_cka(x, constant))
    assert np.isnan(linear_cka(x, constant))
    assert np.isnan(procrustes(x, torch.zeros(40, 7)))


def test_what_is_not_finite_spoils_only_itself() -> None:
    x, y = pair(40)
    broken = x.clone()
    broken[3, 2] = torch.inf
    found = streamed([x, broken, y], 20)
    assert np.isnan(found.cka()[1]).all()
    assert np.isfinite(found.cka()[np.ix_([0, 2], [0, 2])]).all()
    assert np.isnan(procrustes(broken, y))
    assert np.isnan(procrustes(x, torch.full((40, 90), torch.nan)))


def test_tiny_and_huge_features_count_alike() -> None:
    x, y = (side.float() for side in pair())
    assert streamed([1e-10 * x, 1e10 * y], 50).cka()[0, 1] == pytest.approx(
        streamed([x, y], 50).cka()[0, 1], abs=1e-6
    )


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples, and HSIC₁ takes at least 4"):
        streamed(list(pair(3)), 3)
    with pytest.raises(ValueError, match="5 neighbours among 5 images"):
        nearest(pair(5)[0], 5)


# Intervals


def test_the_sums_are_kept_for_some_hundred_groups_whatever_the_number_of_samples() -> None:
    for n in (64, 300, 3000):
        assert min(n, GROUPS) / 2 <= len(streamed(list(pair(n)), 64).sizes) <= GROUPS * 1.25


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    noise = (0.5, 2.0)
    # Linear CKA of all there is: ‖Σxy‖² / (‖Σxx‖ ‖Σyy‖).
    true = [
        float((m.T @ m).trace() / (12**0.5 * (m.T @ m + s**2 * torch.eye(12)).norm()))
        for m, s in zip(maps, noise, strict=True)
    ]
    held, widths, values = np.zeros(3), np.zeros(3), []
    for repeat in range(100):
        z, *noises = torch.randn(3, 100, 12, generator=generator, dtype=torch.float64)
        layers = [z, *(z @ m + s * e for m, s, e in zip(maps, noise, noises, strict=True))]
        draws = streamed(layers, 64).resampled([1, 2], [0, 0], seed=repeat, resamples=400)
        draws = np.column_stack([draws, draws[:, 0] - draws[:, 1]])
        found = [measured(column) for column in draws.T]
        values.append([row["value"] for row in found])
        widths += [row["high"] - row["low"] for row in found]
        held += [
            row["low"] <= t <= row["high"] for row, t in zip(found, [*true, true[0] - true[1]], strict=True)
        ]
    assert ((held / 100 > 0.9) & (held / 100 < 1)).all()
    spread = np.std(values, axis=0)
    ratio = widths / 100 / 3.92 / spread
    assert (ratio > 0.9).all()
    assert (ratio < 1.5).all()


def test_draws_are_paired_and_depend_on_the_seed_alone() -> None:
    x, y = pair(200)
    sums = streamed([x, y, -y], 64)
    one, again, other = (sums.resampled([0, 0], [1, 2], seed, 50) for seed in (1, 1, 2))
    assert one.shape == (51, 2)
    np.testing.assert_array_equal(one, again)
    np.testing.assert_allclose(one[:, 0], one[:, 1], atol=1e-12)
    np.testing.assert_array_equal(one[0], other[0])
    assert one[0, 0] == pytest.approx(sums.cka()[0, 1], abs=1e-12)
    assert not np.allclose(one[1:], other[1:])
    np.testing.assert_allclose(sums.resampled([1], [1], 0, 50), 1, atol=1e-12)
