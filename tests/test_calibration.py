"""The fitted temperature against scipy, and on logits whose right temperature is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from torch import Tensor

from ensemble_kd.calibration import HIGHEST, LOWEST, fit_temperature

C = 5


def a_split(kind: str, rows: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, size=rows)
    hit = np.eye(C)[labels]
    noise = rng.normal(size=(rows, C))
    other = (labels + rng.integers(1, C, size=rows)) % C
    logits = {
        "ordinary": 2 * hit + 2 * noise,
        "too sure": 8 * hit + 8 * noise,
        "too shy": 0.2 * hit + 0.2 * noise,
        "wrong": 2 * np.eye(C)[other] + noise,
        "no error": 9 * hit + np.clip(noise, -2, 2),
        "one error": 9 * hit
        + np.clip(noise, -2, 2)
        + 30 * np.eye(C)[other] * (np.arange(rows) == 0)[:, None],
        "ties": np.round(hit + noise),
        "all equal": np.full((rows, C), 3.0),
        "one-hot": 1e4 * np.eye(C)[np.where(rng.random(rows) < 0.9, labels, other)],
        "huge": 1e4 * noise,
        "far from 0": 1e4 + 2 * hit + 2 * noise,
    }[kind]
    return torch.from_numpy(logits), torch.from_numpy(labels)


KINDS = (
    "ordinary",
    "too sure",
    "too shy",
    "wrong",
    "no error",
    "one error",
    "ties",
    "all equal",
    "one-hot",
    "huge",
    "far from 0",
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def nll(temperature: float, logits: Tensor, labels: Tensor) -> float:
    z = logits.double().numpy()
    log_p = log_softmax((z - z.max(axis=1, keepdims=True)) / temperature, axis=1)
    return float(-log_p[np.arange(len(z)), labels.numpy()].mean())


def slope(temperature: float, logits: Tensor, labels: Tensor) -> float:
    """Derivative of the NLL to 1 / τ: the mean of E[z] − z(y)."""
    z = logits.double().numpy()
    expected = (softmax(z / temperature, axis=1) * z).sum(axis=1)
    return float((expected - z[np.arange(len(z)), labels.numpy()]).mean())


@every_kind
@pytest.mark.parametrize("rows", [1, 10, 300])
def test_no_temperature_is_better(kind: str, rows: int) -> None:
    for seed in range(3):
        logits, labels = a_split(kind, rows, seed)
        found = nll(fit_temperature(logits, labels), logits, labels)
        grid = np.geomspace(LOWEST, HIGHEST, 500)
        lowest = min(nll(t, logits, labels) for t in (*grid, 1.0))
        assert found <= lowest + 1e-9 * max(1.0, lowest)


@pytest.mark.parametrize("kind", ["ordinary", "too sure", "too shy", "one error", "ties", "far from 0"])
def test_the_slope_of_the_nll_is_zero_there(kind: str) -> None:
    for seed in range(5):
        logits, labels = a_split(kind, seed=seed)
        by_root = brentq(slope, LOWEST, HIGHEST, args=(logits, labels), xtol=1e-12)
        assert fit_temperature(logits, labels) == pytest.approx(by_root, rel=1e-5)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 3.0, 10.0])
def test_the_scale_of_calibrated_logits_is_recovered(scale: float) -> None:
    # Labels drawn from softmax(z) make z calibrated; what is then multiplied by s has to be divided by s.
    rng = np.random.default_rng(0)
    z = rng.normal(scale=2, size=(40_000, C))
    drawn = (softmax(z, axis=1).cumsum(axis=1) < rng.random((len(z), 1))).sum(axis=1)
    labels = torch.from_numpy(np.minimum(drawn, C - 1))
    assert fit_temperature(torch.from_numpy(scale * z), labels) == pytest.approx(scale, rel=0.02)


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
def test_scaled_logits_have_a_scaled_temperature(scale: float) -> None:
    logits, labels = a_split("ordinary")
    once, scaled = fit_temperature(logits, labels), fit_temperature(scale * logits, labels)
    assert scaled == pytest.approx(scale * once, rel=1e-5)
    assert once != pytest.approx(1, abs=0.1)


@every_kind
def test_it_is_never_worse_than_no_calibration(kind: str) -> None:
    for seed in range(10):
        logits, labels = a_split(kind, rows=20, seed=seed)
        assert nll(fit_temperature(logits, labels), logits, labels) <= nll(1.0, logits, labels)


@every_kind
def test_it_is_bounded(kind: str) -> None:
    for rows in (1, 300):
        temperature = fit_temperature(*a_split(kind, rows))
        assert LOWEST * (1 - 1e-12) <= temperature <= HIGHEST * (1 + 1e-12)


@pytest.mark.parametrize(
    ("kind", "temperature"), [("no error", LOWEST), ("wrong", HIGHEST), ("huge", HIGHEST), ("all equal", 1.0)]
)
def test_without_a_best_temperature_it_is_a_bound_or_1(kind: str, temperature: float) -> None:
    assert fit_temperature(*a_split(kind)) == pytest.approx(temperature, rel=1e-6)


def test_a_constant_added_to_a_samples_logits_changes_nothing() -> None:
    logits, labels = a_split("ordinary")
    shift = torch.from_numpy(np.random.default_rng(1).integers(-1000, 1000, size=(len(logits), 1)))
    assert fit_temperature(logits + shift, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_computed_in_float64(dtype: torch.dtype) -> None:
    logits, labels = a_split("ordinary")
    narrow = logits.to(dtype)
    assert fit_temperature(narrow, labels) == fit_temperature(narrow.double(), labels)
