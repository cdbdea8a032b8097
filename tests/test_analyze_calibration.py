"""Calibration against torchmetrics, netcal, scikit-learn and plain loops, and the analysis of a run."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from netcal.metrics import ECE, MCE
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss
from support import refused
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error
from typer.testing import CliRunner

from ensemble_kd.analysis.calibration import (
    STAGES,
    CalibrationAnalysis,
    Judged,
    analyze_calibration,
    calibration,
    paired_differences,
)
from ensemble_kd.analysis.plots_calibration import draw_reliability
from ensemble_kd.calibration import HIGHEST, LOWEST, fit_temperature
from ensemble_kd.cli import app
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import ConfigError, RunError
from ensemble_kd.metrics import measure

ERRORS = ("ece", "adaptive_ece", "mce")


def judged_split(n: int = 400, classes: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from their softmax at temperature `scale` / 2: calibrated where it is 2."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
    return logits * scale / 2, labels


def values(model: Judged) -> dict[str, float]:
    return {name: row["value"] for name, row in model.measures().items() if name != "bins"}


def plain_errors(p: np.ndarray, y: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Expected and maximum calibration error over (lo, hi], by a loop."""
    confidence, hit = p.max(axis=1), p.argmax(axis=1) == y
    expected, largest = 0.0, 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(hit[inside].mean() - confidence[inside].mean())
            expected, largest = expected + inside.mean() * gap, max(largest, gap)
    return expected, largest


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize(("n", "classes", "scale"), [(1, 2, 2), (37, 3, 4), (400, 5, 2), (2000, 10, 1)])
def test_errors_equal_those_of_other_libraries(n: int, classes: int, scale: float, bins: int) -> None:
    logits, labels = judged_split(n, classes, scale)
    p, y = logits.softmax(dim=1), labels
    found = values(Judged.of(logits, labels, bins=bins))
    for name, norm in (("ece", "l1"), ("mce", "max")):
        # Its bins are [lo, hi), in float32, which a random confidence does not tell from (lo, hi].
        assert found[name] == pytest.approx(
            float(multiclass_calibration_error(p, y, classes, bins, norm)), abs=1e-6
        )
    expected = plain_errors(p.numpy(), y.numpy(), np.linspace(0, 1, bins + 1))
    assert (found["ece"], found["mce"]) == pytest.approx(expected, abs=1e-12)
    if classes > 2 and n > 1:
        assert found["ece"] == pytest.approx(ECE(bins).measure(p.numpy(), y.numpy()), abs=1e-12)
        assert found["mce"] == pytest.approx(MCE(bins).measure(p.numpy(), y.numpy()), abs=1e-12)
    eye = np.eye(classes)[y]
    assert found["brier"] == pytest.approx(float(((p.numpy() - eye) ** 2).sum(axis=1).mean()), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(y.numpy(), p.numpy(), labels=np.arange(classes)), abs=1e-12)


@pytest.mark.parametrize(("n", "bins"), [(402, 15), (398, 15), (98, 10)])
def test_bins_of_equal_mass_are_those_of_netcal(n: int, bins: int) -> None:
    logits, labels = judged_split(n)
    model = Judged.of(logits, labels, bins=bins)
    p = logits.softmax(dim=1).numpy()
    assert math.gcd(n - 1, bins) == 1, "an edge that is a confidence belongs to the bin above it there"
    theirs = ECE(bins, equal_intervals=False).measure(p, labels.numpy())
    assert values(model)["adaptive_ece"] == pytest.approx(theirs, abs=1e-12)
    sizes = np.bincount(model.mass, minlength=bins)
    assert sizes.max() - sizes.min() <= 1


def test_brier_of_two_classes_is_twice_that_of_scikit_learn() -> None:
    logits, labels = judged_split(classes=2)
    p = logits.softmax(dim=1).numpy()
    found = values(Judged.of(logits, labels))["brier"]
    assert found == pytest.approx(2 * brier_score_loss(labels.numpy(), p[:, 1]), abs=1e-12)


def test_equal_confidences_share_a_bin_whatever_their_order() -> None:
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]).repeat(20, 1)
    labels = torch.arange(60).remainder(2)
    order = torch.randperm(60)
    one, other = Judged.of(logits, labels), Judged.of(logits[order], labels[order])
    assert values(one)["adaptive_ece"] == pytest.approx(values(other)["adaptive_ece"], abs=1e-12)
    assert len(np.unique(one.mass)) == 3


def test_shift_and_order_change_nothing_and_scale_does() -> None:
    logits, labels = judged_split()
    order = torch.randperm(len(labels))
    plain = values(Judged.of(logits, labels))
    for other in (Judged.of(logits + 7, labels), Judged.of(logits[order], labels[order])):
        for name in (*ERRORS, "brier", "nll"):
            assert values(other)[name] == pytest.approx(plain[name], abs=1e-9), name
    assert values(Judged.of(3 * logits, labels))["ece"] > plain["ece"] + 0.05


def test_a_sure_and_right_model_has_no_error() -> None:
    labels = torch.arange(40).remainder(4)
    model = Judged.of(1000 * torch.nn.functional.one_hot(labels).float(), labels)
    found = model.measures()
    assert found["bins"] == [{"low": 14 / 15, "high": 1, "count": 40, "confidence": 1, "accuracy": 1}]
    assert {name: found[name]["value"] for name in (*ERRORS, "brier", "nll", "floor")} == dict.fromkeys(
        (*ERRORS, "brier", "nll", "floor"), 0
    )


def test_the_bins_hold_all_images() -> None:
    logits, labels = judged_split()
    rows = Judged.of(logits, labels).measures()["bins"]
    assert sum(row["count"] for row in rows) == len(labels)
    assert all(row["low"] < row["confidence"] <= row["high"] for row in rows)
    right = sum(row["accuracy"] * row["count"] for row in rows)
    assert right == pytest.approx(int((logits.argmax(dim=1) == labels).sum()))


def test_the_floor_is_what_a_calibrated_model_scores() -> None:
    scores = [values(Judged.of(*judged_split(2000, 10, seed=seed)))["ece"] for seed in range(5)]
    logits, labels = judged_split(2000, 10)
    floor = Judged.of(logits, labels).measures()["floor"]
    assert floor["value"] == pytest.approx(np.mean(scores), abs=0.003)
    assert 0.012 < floor["value"] < 0.03
    assert floor["low"] < floor["value"] < floor["high"]
    # Its expectation, where the errors of the bins are normal: Σ √(2/π · Σ p(1 − p)) / N.
    p, _ = logits.softmax(dim=1).max(dim=1)
    index = torch.bucketize(p, torch.linspace(0, 1, 16, dtype=torch.float64)[1:-1])
    variances = torch.zeros(15, dtype=torch.float64).index_add_(0, index, p * (1 - p))
    assert floor["value"] == pytest.approx(float((2 / math.pi * variances).sqrt().sum()) / 2000, rel=0.03)
    surer = Judged.of(3 * logits, labels).measures()
    assert surer["ece"]["value"] > surer["floor"]["high"]


def test_the_floor_falls_with_more_images() -> None:
    floors = [Judged.of(*judged_split(n)).measures()["floor"]["value"] for n in (200, 800, 3200)]
    assert floors[0] / floors[1] == pytest.approx(2, rel=0.15)
    assert floors[1] / floors[2] == pytest.approx(2, rel=0.15)


def test_intervals_are_those_of_a_plain_bootstrap_and_of_metrics_json() -> None:
    logits, labels = judged_split()
    found = Judged.of(logits, labels).measures()
    theirs = measure(logits, labels)
    assert found["ece"] == pytest.approx(theirs["ece"], abs=1e-12)
    assert found["nll"] == pytest.approx(theirs["nll"], abs=1e-12)
    generator, p, y = np.random.default_rng(1), logits.softmax(dim=1).numpy(), labels.numpy()
    draws = []
    for _ in range(400):
        taken = generator.integers(len(y), size=len(y))
        draws.append(plain_errors(p[taken], y[taken], np.linspace(0, 1, 16)))
    for name, column in zip(("ece", "mce"), np.array(draws).T, strict=True):
        edges = (found[name]["low"], found[name]["high"])
        assert edges == pytest.approx(tuple(np.percentile(column, [2.5, 97.5])), abs=0.04), name


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    logits, labels = judged_split(1000)
    other = logits + 0.1 * torch.randn(logits.shape, dtype=torch.float64)
    first, second = Judged.of(logits, labels), Judged.of(other, labels)
    found = paired_differences(first, second)
    for name in ("ece", "nll", "brier"):
        alone, there = first.measures()[name], second.measures()[name]
        assert found[name]["value"] == pytest.approx(alone["value"] - there["value"], abs=1e-12)
        assert found[name]["high"] - found[name]["low"] < alone["high"] - alone["low"]
    t = stats.ttest_rel(first.nll.numpy(), second.nll.numpy()).confidence_interval()
    assert (found["nll"]["low"], found["nll"]["high"]) == pytest.approx((t.low, t.high), abs=5e-4)
    zero = {"value": 0, "low": 0, "high": 0}
    assert paired_differences(first, first) == dict.fromkeys(("ece", "nll", "brier"), zero)


def test_the_temperature_is_fitted_on_validation_and_undoes_the_scale() -> None:
    test, val = judged_split(1000, scale=6, seed=1), judged_split(1000, scale=6, seed=2)
    logits = {"student": test[0], "labels": test[0] / 3}
    held = {"student": val[0], "labels": val[0] / 3}
    roles = {"student": "student", "labels": "control"}
    found = calibration(logits, test[1], held, val[1], roles=roles)
    student, labels = found["models"]["student"], found["models"]["labels"]
    assert student["temperature"] == fit_temperature(*val) == pytest.approx(3, rel=0.1)
    assert student["before"]["ece"]["value"] > 0.15
    assert student["after"]["ece"]["value"] < student["after"]["floor"]["high"] + 0.01
    assert student["after"]["nll"] == pytest.approx(labels["after"]["nll"], abs=1e-6)
    assert found["differences"]["labels"]["before"]["nll"]["low"] > 0
    assert found["differences"]["labels"]["after"]["nll"]["value"] == pytest.approx(0, abs=1e-6)
    changed = calibration(logits, test[1].roll(1), held, val[1], roles=roles)
    assert changed["models"]["student"]["temperature"] == student["temperature"]


def test_a_temperature_at_its_bound_is_remarked() -> None:
    labels = torch.arange(60).remainder(3)
    sure, wrong = (
        2.0 * torch.nn.functional.one_hot(labels),
        2.0 * torch.nn.functional.one_hot(labels.roll(1), 3),
    )
    logits, roles = {"a": sure, "b": wrong}, {"a": "model", "b": "model"}
    rows = calibration(logits, labels, logits, labels, roles=roles)["models"]
    assert (rows["a"]["temperature"], rows["b"]["temperature"]) == pytest.approx((LOWEST, HIGHEST))
    assert rows["a"]["remark"] == (
        "its temperature stands at the lower bound of the search, 0.05: the 60 validation images do not tell "
        "how sure it should be"
    )
    assert rows["b"]["remark"] == rows["a"]["remark"].replace("lower", "upper").replace("0.05", "20")


def test_a_teacher_that_does_not_know_all_classes_is_judged_among_its_own() -> None:
    logits, labels = judged_split()
    known = torch.tensor([True, True, False, True, False])
    part = logits.masked_fill(~known, -torch.inf)
    given = {"a": part}
    found = calibration(given, labels, given, labels, roles={"a": "teacher"}, known={"a": known})
    row, rows = found["models"]["a"], known[labels]
    assert (row["classes"], row["images"]) == (3, int(rows.sum()))
    alone = Judged.of(logits[rows][:, known], (known.cumsum(0) - 1)[labels[rows]])
    assert row["before"] == alone.measures()


@pytest.fixture(scope="module")
def analysed(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> CalibrationAnalysis:
    return analyze_calibration(finished.folder, quick=True, out=tmp_path_factory.mktemp("calibration"))


def test_a_run_is_analysed_as_its_metrics_say(finished: DistillResult, analysed: CalibrationAnalysis) -> None:
    numbers = json.loads((analysed.folder / "calibration.json").read_text())
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    assert numbers == json.loads(json.dumps(analysed.numbers))
    assert numbers["settings"] == {"quick": True, "images": 500, "seed": 0, "bins": 15}
    assert (numbers["n"], numbers["validation"]) == (360, 144)
    assert list(numbers["models"]) == list(numbers["roles"]) == list(metrics["models"])
    for name, row in numbers["models"].items():
        for key in ("ece", "nll"):
            assert row["before"][key] == pytest.approx(metrics["models"][name][key], abs=2e-5), name
    assert list(numbers["differences"]) == ["labels", "best-teacher", "independent"]
    for control, stages in numbers["differences"].items():
        nll = metrics["differences"][control]["nll"]
        assert stages["before"]["nll"] == pytest.approx(nll, abs=2e-5)
        assert list(stages) == list(STAGES)
    made = numbers["pictures"]["reliability"]
    assert (analysed.folder / made["file"]).read_bytes().startswith(b"\x89PNG")
    ece = numbers["models"]["student"]
    assert made["alt"].endswith(
        f"ECE of student: {ece['before']['ece']['value']:.3f} before, {ece['after']['ece']['value']:.3f} after."
    )


def test_the_table_shows_every_model_and_control(analysed: CalibrationAnalysis) -> None:
    lines = analysed.table().splitlines()
    assert lines[0] == (
        "digits, test split, 360 images, before → after the temperature fitted on 144 validation images; "
        "95 % intervals over images"
    )
    ece = analysed.numbers["models"]["student"]["before"]["ece"]
    shown = f"{ece['value']:.4f} [{ece['low']:.4f}, {ece['high']:.4f}]"
    assert any(line.startswith(" student ") and shown in line for line in lines)
    assert "Lower is better calibrated" in lines
    for name in analysed.numbers["models"]:
        assert any(line.startswith(f" {name} ") for line in lines), name


def test_the_command_line_and_models_by_name(finished: DistillResult, tmp_path: Path) -> None:
    paths = ",".join(
        str(finished.folder / file) for file in ("student.safetensors", "controls/labels.safetensors")
    )
    arguments = ["--models", paths, "--data", "digits", "--images", "50", "--bins", "5", "--seed", "3"]
    command = ["analyze-calibration", *arguments, "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert (numbers["n"], numbers["differences"], numbers["folder"]) == (50, {}, str(tmp_path))
    assert numbers["settings"] == {"quick": False, "images": 50, "seed": 3, "bins": 5}
    assert set(numbers["roles"].values()) == {"model"}
    assert str(tmp_path / "calibration-reliability.png") in result.stderr


def test_errors_are_told(tmp_path: Path) -> None:
    with refused(
        RunError,
        f"{tmp_path} is no run folder",
        "it has no config.yaml and status.json",
        "name a folder made by `ekd distill`",
    ):
        analyze_calibration(tmp_path)
    with refused(
        ConfigError,
        "bins: 0 cannot be used",
        "it should be greater than or equal to 1",
        "give bins a number in that range",
    ):
        analyze_calibration(tmp_path, bins=0)


def test_hostile_names_can_be_drawn(tmp_path: Path) -> None:
    row = Judged.of(*judged_split(50)).measures()
    names = ["<script>", "[/b]", "x$\\frac$", "数字", "a" * 200, "line\nbreak"]
    models = {name: {"temperature": 1.0, "before": row, "after": row} for name in names}
    draw_reliability(models, tmp_path)
    assert (tmp_path / "calibration-reliability.png").stat().st_size > 10_000
