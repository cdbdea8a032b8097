"""How often models say the same, whether they are right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.analysis.options import AgreementOptions
from ensemble_kd.analysis.plots import draw_heat_maps
from ensemble_kd.analysis.subjects import chosen_options
from ensemble_kd.data import load_data
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError
from ensemble_kd.evaluation import load_any
from ensemble_kd.inference import predict
from ensemble_kd.metrics import RESAMPLES, Measure
from ensemble_kd.runs import RUNS, Run
from ensemble_kd.tables import text_table

CELLS = ("both_right", "only_first", "only_second", "both_wrong", "same_wrong")


@dataclass(frozen=True)
class Agreement:
    """Every pair of models on one split; `numbers` is what agreement.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """One row a pair."""
        headers = [
            "",
            "agreement",
            "kappa",
            "both right",
            "only first",
            "only second",
            "both wrong",
            "same wrong class",
        ]
        rows = [
            [
                f"{pair['first']} – {pair['second']}",
                _interval(pair["agreement"], 100, " %"),
                _interval(pair["kappa"], 1, ""),
                *(f"{100 * pair['cells'][cell]['value']:.1f} %" for cell in CELLS),
            ]
            for pair in self.numbers["pairs"]
        ]
        title = (
            f"{self.numbers['data']}, test split, {self.numbers['n']:,} images; 95 % intervals over images"
        )
        return text_table(headers, rows, title)


def analyze_agreement(
    run: str | Path | None = None,
    *,
    models: str | Sequence[str] | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Agreement:
    """Agreement, Cohen's kappa and the confusion cells of every pair of models, with intervals.

    Args:
        run: a run folder; the newest finished one where neither a run nor models are named.
        models: instead of a run, models by name, run folder or file, judged on `data`.
        config_file: YAML with any of the options.
        sets: assignments such as `"seed=1"`.
        options: the other fields of `schema.AgreementOptions`.

    Returns:
        The numbers; agreement.json and agreement.png are written to the run's `analysis/` folder, or
        to `out`.

    Raises:
        RunError: the run is missing or did not finish.
        ConfigError: both a run and models are named, or fewer than two models.
    """
    chosen = chosen_options(AgreementOptions, run, models, options, config_file, sets)
    if chosen.models:
        predictions, labels, source, data = _predict_all(chosen)
        folder = chosen.out or RUNS / f"agreement-{datetime.now():%Y%m%d-%H%M%S}"
    else:
        opened = Run.open(chosen.run) if chosen.run else Run.newest()
        logits, true = opened.predictions()
        order = [name for name in opened.metrics()["models"] if name in logits]
        predictions = {name: logits[name].argmax(dim=1).numpy() for name in order}
        labels, source, data = true.numpy(), str(opened.folder), opened.metrics()["data"]
        folder = chosen.out or opened.folder / "analysis"
    pairs = [
        {
            "first": first,
            "second": second,
            **compare_pair(predictions[first], predictions[second], labels, chosen.seed),
        }
        for first, second in combinations(predictions, 2)
    ]
    numbers = {"source": source, "data": data, "n": len(labels), "models": list(predictions), "pairs": pairs}
    files.write_json(folder / "agreement.json", numbers)
    matrices = {name: matrix(pairs, list(predictions), name) for name in ("agreement", "kappa")}
    titles = {"agreement": "share of images with the same answer", "kappa": "Cohen's kappa"}
    draw_heat_maps({titles[k]: v for k, v in matrices.items()}, list(predictions), folder / "agreement.png")
    return Agreement(folder, numbers)


def _predict_all(chosen: AgreementOptions) -> tuple[dict[str, np.ndarray], np.ndarray, str, str]:
    if chosen.run is not None or len(set(chosen.models)) < max(2, len(chosen.models)):
        raise ConfigError(
            "models: name two or more, each once, and no run beside them",
            "pairs of models are compared",
            "say --models a,b --data NAME, or a run folder alone",
        )
    data, device = load_data(**chosen.load_arguments()), choose_device(chosen.device)
    test = data.test.to(device)
    predictions = {}
    for name in chosen.models:
        classifier = load_any(name, data, device)
        predictions[name] = predict(classifier, test).argmax(dim=1).cpu().numpy()
    return predictions, data.test.known_labels.numpy(), ",".join(chosen.models), data.name


def compare_pair(
    first: np.ndarray | Tensor, second: np.ndarray | Tensor, labels: np.ndarray | Tensor, seed: int = 0
) -> dict[str, Any]:
    """Agreement, kappa and confusion cells of two models' answers (N,), with bootstrap intervals.

    Kappa is Cohen's (1960), from the table of both answers. Cells are shares of all samples;
    `same_wrong` is the part of `both_wrong` in which both name the same wrong class.

    Returns:
        `agreement` and `kappa` with value, low, high; `cells` with the same by cell. Kappa is NaN where
        both models always give one and the same class.
    """
    a, b, y = (np.asarray(values) for values in (first, second, labels))
    # A bootstrap over samples is a multinomial draw over the distinct (a, b, y) triples.
    triples, counts = np.unique(np.stack([a, b, y], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    draws = np.vstack([counts, generator.multinomial(len(y), counts / len(y), size=RESAMPLES)])
    a, b, y = triples.T
    shares = {
        "agreement": a == b,
        "both_right": (a == y) & (b == y),
        "only_first": (a == y) & (b != y),
        "only_second": (a != y) & (b == y),
        "both_wrong": (a != y) & (b != y),
        "same_wrong": (a == b) & (a != y),
    }
    measured = {name: _measure(draws @ mask / draws.sum(axis=1)) for name, mask in shares.items()}
    return {
        "agreement": measured.pop("agreement"),
        "kappa": _measure(cohen_kappa(draws, a, b)),
        "cells": measured,
    }


def cohen_kappa(draws: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cohen's kappa of each row of counts (R, U) over U pairs of answers; NaN where chance is certain."""
    total = draws.sum(axis=1)
    observed = draws @ (first == second) / total
    chance = np.zeros(len(draws))
    for label in np.union1d(first, second):
        chance += (draws @ (first == label)) * (draws @ (second == label)) / total.astype(float) ** 2
    certain = np.isclose(chance, 1)
    return np.where(certain, np.nan, (observed - chance) / np.where(certain, 1, 1 - chance))


def _measure(values: np.ndarray) -> Measure:
    """The first value, with the percentiles of the others."""
    resampled = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return Measure(value=float(values[0]), low=float(low), high=float(high))


def matrix(pairs: Sequence[Mapping[str, Any]], names: Sequence[str], measure: str) -> np.ndarray:
    """A symmetric matrix of one measure over all pairs, 1 on the diagonal."""
    square = np.eye(len(names))
    for pair in pairs:
        i, j = names.index(pair["first"]), names.index(pair["second"])
        square[i, j] = square[j, i] = pair[measure]["value"]
    return square


def _interval(measure: Mapping[str, float], scale: float, unit: str) -> str:
    value, low, high = (scale * measure[key] for key in ("value", "low", "high"))
    digits = 1 if scale == 100 else 3
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
