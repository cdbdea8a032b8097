"""How far confidence is from correctness, before and after a temperature fitted on the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.options import CalibrationOptions
from ensemble_kd.analysis.plots_calibration import draw_reliability
from ensemble_kd.analysis.resampling import measured
from ensemble_kd.analysis.subjects import Subjects, chosen_options, subjects_of
from ensemble_kd.calibration import HIGHEST, LOWEST, fit_temperature
from ensemble_kd.console import progress
from ensemble_kd.metrics import (
    CALIBRATION_BINS,
    RESAMPLES,
    bootstrap_mean,
    calibration_terms,
    per_sample,
    within,
)
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.layout import check_finite

STAGES = ("before", "after")
_BLOCK = 100


@dataclass(frozen=True)
class CalibrationAnalysis:
    """Every model's calibration on the test split; `numbers` is what calibration.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """One row a model, then the student beside each control."""
        numbers = self.numbers
        title = (
            f"{numbers['data']}, test split, {numbers['n']:,} images, before → after the temperature fitted "
            f"on {numbers['validation']:,} validation images; 95 % intervals over images"
        )
        headers = ["", "ECE", "if perfect", "T", "ECE after", "adaptive ECE", "MCE", "Brier", "NLL"]
        rows = [
            [
                name,
                interval(row["before"]["ece"]),
                f"{row['before']['floor']['value']:.4f}",
                f"{row['temperature']:.2f}{'*' if row['remark'] else ''}",
                interval(row["after"]["ece"]),
                *(
                    f"{row['before'][key]['value']:.4f} → {row['after'][key]['value']:.4f}"
                    for key in ("adaptive_ece", "mce", "brier", "nll")
                ),
            ]
            for name, row in numbers["models"].items()
        ]
        parts = [text_table(headers, rows, title)]
        if numbers["differences"]:
            parts.append(_difference_table(numbers["differences"]))
        parts += [f"* {name}: {row['remark']}" for name, row in numbers["models"].items() if row["remark"]]
        return "\n\n".join(parts)


def analyze_calibration(
    run: str | Path | None = None,
    *,
    models: str | Sequence[str] | None = None,
    teachers: Sequence[Teacher] = (),
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> CalibrationAnalysis:
    """Calibration errors, Brier score and NLL of every model, as it is and at its fitted temperature.

    The temperature is fitted on the validation split; everything is measured on the test split.

    Args:
        run: a run folder; the newest finished one where neither a run nor models are named.
        models: instead of a run, models by name, run folder or file, judged on `data`.
        teachers: of a run that was given them as objects, the same objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"bins=10"`.
        options: the other fields of `CalibrationOptions`.

    Returns:
        The numbers: `models` (see `calibration`) and `differences` (student minus each control, paired
        by image). calibration.json and calibration-reliability.png are written to the run's `analysis/`
        folder, or to `out`.

    Raises:
        EkdError: run, models or data cannot be used.
    """
    chosen = chosen_options(CalibrationOptions, run, models, options, config_file, sets)
    return calibration_of(subjects_of(chosen, teachers), chosen)


def calibration_of(subjects: Subjects, options: CalibrationOptions) -> CalibrationAnalysis:
    """`analyze_calibration` of models that are loaded already."""
    images, val = subjects.some(options.most_images, options.seed), subjects.data.val
    settings = {"quick": options.quick, "images": options.most_images, "seed": options.seed}
    tested, validated = subjects.logits(images), subjects.logits(val)
    for name in tested:
        check_finite(name, tested[name], validated[name])
    numbers = {
        **subjects.head(images, **settings, bins=options.bins),
        "validation": len(val),
        **calibration(
            {name: z.cpu() for name, z in tested.items()},
            images.known_labels.cpu(),
            {name: z.cpu() for name, z in validated.items()},
            val.known_labels.cpu(),
            roles=subjects.roles,
            known=_known(subjects),
            bins=options.bins,
            seed=options.seed,
        ),
    }
    numbers["pictures"] = {"reliability": draw_reliability(numbers["models"], subjects.folder)}
    files.write_json(subjects.folder / "calibration.json", numbers)
    return CalibrationAnalysis(subjects.folder, numbers)


def _known(subjects: Subjects) -> dict[str, Tensor]:
    """The classes (C,) that a teacher knows, of those that do not know all."""
    if subjects.ensemble is None or subjects.ensemble.known is None:
        return {}
    masks = zip(subjects.teachers, subjects.ensemble.known.cpu(), strict=True)
    return {teacher.label: mask for teacher, mask in masks if not bool(mask.all())}


def calibration(
    logits: Mapping[str, Tensor],
    labels: Tensor,
    val_logits: Mapping[str, Tensor],
    val_labels: Tensor,
    *,
    roles: Mapping[str, str],
    known: Mapping[str, Tensor] | None = None,
    bins: int = CALIBRATION_BINS,
    seed: int = 0,
) -> dict[str, Any]:
    """Every model by name, from its logits (N, C) on the test and on the validation split.

    Args:
        logits: on the test split, which is measured.
        labels: its classes (N,).
        val_logits: on the validation split, where temperatures are fitted.
        val_labels: its classes.
        roles: `student`, `control`, … by name.
        known: the classes (C,) that a model knows, where it does not know all: it is judged among these,
            on their images, and rows have `classes` and `images`.
        bins: of the calibration errors.
        seed: of the bootstrap and of the simulated floors.

    Returns:
        `models`: by name `temperature`, a `remark` on it, which may be empty, and the measures of `Judged.measures`
        `before` and `after`. `differences`: student minus each control in `ece`, `nll` and `brier`,
        with paired intervals, `before` and `after`.
    """
    rows: dict[str, dict[str, Any]] = {}
    judged: dict[str, dict[str, Judged]] = {}
    with progress("calibration", len(logits)) as advance:
        for name in logits:
            test, val = (logits[name], labels), (val_logits[name], val_labels)
            rows[name] = {}
            if known and name in known:
                test, val = within(known[name], *test), within(known[name], *val)
                rows[name] = {"classes": int(known[name].sum()), "images": len(test[1])}
            temperature = fit_temperature(*val)
            rows[name] |= {"temperature": temperature, "remark": _remark(temperature, len(val[1]))}
            judged[name] = {
                "before": Judged.of(*test, bins=bins, seed=seed),
                "after": Judged.of(test[0].double() / temperature, test[1], bins=bins, seed=seed),
            }
            rows[name] |= {stage: model.measures() for stage, model in judged[name].items()}
            advance()
    controls = [name for name, role in roles.items() if role == "control"]
    differences = {
        control: {
            stage: paired_differences(judged["student"][stage], judged[control][stage]) for stage in STAGES
        }
        for control in controls
    }
    return {"models": rows, "differences": differences}


def _remark(temperature: float, images: int) -> str:
    """What makes a fitted temperature doubtful, if anything does."""
    if LOWEST * 1.001 < temperature < HIGHEST / 1.001:
        return ""
    edge = "lower" if temperature < 1 else "upper"
    return (
        f"its temperature stands at the {edge} bound of the search, {temperature:g}: the {images:,} "
        f"validation images do not tell how sure it should be"
    )


@dataclass(frozen=True)
class Judged:
    """One model's answers to N images, as far as calibration depends on them, in float64."""

    confidence: np.ndarray
    """The highest probability (N,)."""
    hit: np.ndarray
    """Whether that class is the true one (N,)."""
    width: np.ndarray
    """Bin (N,) among (lo, hi] of equal width."""
    mass: np.ndarray
    """Bin (N,) among (lo, hi] with equally many images each; equal confidences share one."""
    nll: Tensor
    brier: Tensor
    """Per image (N,), summed over classes."""
    bins: int
    seed: int

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, *, bins: int = CALIBRATION_BINS, seed: int = 0) -> Judged:
        """From logits (N, C) and classes (N,)."""
        width, gap = calibration_terms(logits, labels, bins)
        p = torch.softmax(logits.double(), dim=1)
        confidence = p.amax(dim=1)
        edges = np.quantile(confidence.numpy(), np.linspace(0, 1, bins + 1)[1:-1])
        return cls(
            confidence=confidence.numpy(),
            hit=(gap + confidence).round().numpy(),
            width=width.numpy(),
            mass=np.searchsorted(edges, confidence.numpy(), side="left"),
            nll=per_sample(logits, labels)["nll"],
            brier=(p - torch.nn.functional.one_hot(labels, p.shape[1])).square().sum(dim=1),
            bins=bins,
            seed=seed,
        )

    def measures(self) -> dict[str, Any]:
        """All that is told of a model.

        Returns:
            `ece` (Guo et al. 2017, equation 3), `adaptive_ece` (the same over bins of equal mass, Nguyen
            and O'Connor 2015) and `mce` (the largest gap, Guo et al., equation 4), `brier` and `nll`
            (per image, summed over classes), each with a bootstrap interval; `floor`, the ECE that a
            perfectly calibrated model of the same confidences has by chance, with the range of 95 % of
            the draws; `bins` of equal width that hold an image: `low`, `high`, `count`, `confidence`
            and `accuracy`. Resampling adds to the upward bias of the errors, so an interval can lie
            above its value.
        """
        means = {name: bootstrap_mean(values, seed=self.seed) for name, values in self.means.items()}
        errors = {name: measured(values) for name, values in self.resampled.items()}
        floor = self._floor()
        return {**errors, **means, "floor": measured(np.r_[floor.mean(), floor]), "bins": self._histogram()}

    @property
    def means(self) -> dict[str, Tensor]:
        """What is a mean over images."""
        return {"brier": self.brier, "nll": self.nll}

    @cached_property
    def resampled(self) -> dict[str, np.ndarray]:
        """The errors (1 + R,) on the images themselves, then on each resample; the same ones for all models."""
        n = len(self.hit)
        generator = np.random.default_rng(self.seed)
        blocks = [self.errors(np.ones((1, n)))]
        for _ in range(RESAMPLES // _BLOCK):
            blocks.append(self.errors(generator.multinomial(n, np.full(n, 1 / n), size=_BLOCK)))
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def errors(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """`ece`, `adaptive_ece` and `mce` (R,), each image counted as often as a row of counts (R, N) says."""
        gap = (self.hit - self.confidence)[:, None]
        width, mass = np.eye(self.bins)[self.width], np.eye(self.bins)[self.mass]
        gaps, sizes = np.abs(counts @ (width * gap)), counts @ width
        total = counts.sum(axis=1)
        return {
            "ece": gaps.sum(axis=1) / total,
            "adaptive_ece": np.abs(counts @ (mass * gap)).sum(axis=1) / total,
            "mce": (gaps / np.where(sizes > 0, sizes, 1)).max(axis=1),
        }

    def _floor(self) -> np.ndarray:
        """The ECE (R,) where each answer is right with the probability that the model gives it."""
        width = np.eye(self.bins)[self.width]
        generator = np.random.default_rng(self.seed)
        blocks = []
        for _ in range(RESAMPLES // _BLOCK):
            hits = generator.random((_BLOCK, len(self.hit))) < self.confidence
            blocks.append(np.abs((hits - self.confidence) @ width).sum(axis=1) / len(self.hit))
        return np.concatenate(blocks)

    def _histogram(self) -> list[dict[str, float]]:
        rows = []
        for number in np.unique(self.width):
            inside = self.width == number
            rows.append(
                {
                    "low": number / self.bins,
                    "high": (number + 1) / self.bins,
                    "count": int(inside.sum()),
                    "confidence": float(self.confidence[inside].mean()),
                    "accuracy": float(self.hit[inside].mean()),
                }
            )
        return rows


def paired_differences(first: Judged, second: Judged) -> dict[str, Any]:
    """First minus second in `ece`, `nll` and `brier`, on the same images and the same resamples."""
    means = {
        name: bootstrap_mean(first.means[name] - second.means[name], seed=first.seed)
        for name in ("nll", "brier")
    }
    return {"ece": measured(first.resampled["ece"] - second.resampled["ece"]), **means}


def _difference_table(differences: Mapping[str, Any]) -> str:
    titles = {"ece": "ECE", "nll": "NLL", "brier": "Brier"}
    headers = ["student minus", *(f"{titles[key]} {stage}" for stage in STAGES for key in titles)]
    rows = [
        [name, *(interval(stages[stage][key], sign="+") for stage in STAGES for key in titles)]
        for name, stages in differences.items()
    ]
    return text_table(headers, rows, "Lower is better calibrated")
