"""Teachers judged before anything is distilled: numbers against references, and no claim beyond them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import KFold
from support import refused
from torch import Tensor, nn
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd.analysis.diversity import mutual_information, pair_diversity
from ensemble_kd.analysis.teachers import advice, analyze_teachers
from ensemble_kd.calibration import fit_temperature
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.cli import app
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import ConfigError
from ensemble_kd.metrics import expected_calibration_error
from ensemble_kd.teachers.class_map import ClassMap
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.weighting import COMBINERS, greedy_weights, learned_weights

OPTIONS = {"limit_train": 200, "resamples": 200}


class Noisy(nn.Module):
    """Answers from a fixed table of logits by the image's first pixels, so that quality is set by hand."""

    def __init__(self, data: Dataset, noise: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        images = torch.cat([data.train.pixels, data.val.pixels, data.test.pixels])
        labels = torch.cat([data.train.known_labels, data.val.known_labels, data.test.known_labels])
        clean = 4 * torch.nn.functional.one_hot(labels, 10).float()
        self.keys = {p.numpy().tobytes(): k for k, p in enumerate(images)}
        self.register_buffer("table", clean + noise * torch.randn(len(labels), 10, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x * 255).round().to(torch.uint8)
        return self.table[[self.keys[p.numpy().tobytes()] for p in pixels]]


def made(data: Dataset, label: str, noise: float, seed: int) -> Teacher:
    card = Card("lenet", "small", Preprocess(1, (8, 8), (0.0,), (1.0,)), data.classes)
    return Teacher.of(label, Classifier(Noisy(data, noise, seed), card), "made here")


@pytest.fixture(scope="module")
def three(few_digits: Dataset) -> list[Teacher]:
    return [
        made(few_digits, "good", 1.5, 1), made(few_digits, "other", 1.5, 2), made(few_digits, "bad", 8.0, 3),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def analysis(three, tmp_path_factory):
    return analyze_teachers(three, out=tmp_path_factory.mktemp("teachers"), **OPTIONS)


def logits_of(teachers, data) -> np.ndarray:
    return torch.stack([teacher.all_logits(data.val) for teacher in teachers]).double().numpy()


def test_each_teacher_alone_equals_the_reference(analysis, three, few_digits):
    z, y = logits_of(three, few_digits), few_digits.val.known_labels
    for teacher, own in zip(three, z, strict=True):
        row = analysis.numbers["teachers"][teacher.label]
        log_p = log_softmax(own, axis=1)
        assert row["accuracy"]["value"] == pytest.approx((own.argmax(1) == y.numpy()).mean())
        assert row["nll"]["value"] == pytest.approx(-log_p[np.arange(len(y)), y].mean(), rel=1e-6)
        temperature = fit_temperature(torch.from_numpy(own), y)
        assert row["temperature"] == pytest.approx(temperature, rel=1e-4)
        fitted = torch.from_numpy(own / temperature)
        assert row["calibrated_ece"]["value"] == pytest.approx(
            expected_calibration_error(fitted, y), abs=1e-3
        )
        assert row["calibrated_nll"]["value"] <= row["nll"]["value"] + 1e-9
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]


def test_the_oracle_and_the_diversity_equal_the_reference(analysis, three, few_digits):
    z, y = logits_of(three, few_digits), few_digits.val.known_labels.numpy()
    right = z.argmax(2) == y
    assert analysis.numbers["oracle_accuracy"]["value"] == pytest.approx(right.any(0).mean())
    p = softmax(z, axis=2)
    expected = entropy(p.mean(0), axis=1).mean() - entropy(p, axis=2).mean()
    assert analysis.numbers["mutual_information"] == pytest.approx(expected, abs=1e-6)
    assert [(pair["first"], pair["second"]) for pair in analysis.numbers["pairs"]] == [
        ("good", "other"), ("good", "bad"), ("other", "bad"),
    ]  # fmt: skip
    pair = analysis.numbers["pairs"][1]
    assert pair["disagreement"] == pytest.approx((right[0] != right[2]).mean())
    assert pair["double_fault"] == pytest.approx((~right[0] & ~right[2]).mean())
    assert pair["error_consistency"] == pytest.approx(cohen_kappa_score(right[0], right[2]))


def test_fitted_weights_are_judged_on_images_they_were_not_fitted_on(analysis, three, few_digits):
    z, y = torch.from_numpy(logits_of(three, few_digits)), few_digits.val.known_labels
    for name, weigh in (("learned", learned_weights), ("greedy", greedy_weights)):
        nll = np.zeros(len(y))
        for fit, ask in KFold(5, shuffle=True, random_state=0).split(nll):
            weights = weigh(z[:, fit], y[fit]).double().numpy()
            p = np.einsum("k,knc->nc", weights, softmax(z[:, ask].numpy(), axis=2))
            nll[ask] = -np.log(p[np.arange(len(ask)), y[ask]])
        row = analysis.numbers["combiners"][name]
        assert row["nll"]["value"] == pytest.approx(nll.mean(), abs=1e-5)
        in_sample = learned_weights(z, y).double().numpy()
        p = np.einsum("k,knc->nc", in_sample, softmax(z.numpy(), axis=2))
        assert row["nll"]["value"] > -np.log(p[np.arange(len(y)), y]).mean()


def test_gains_are_over_the_best_teacher_and_paired(analysis, three, few_digits):
    z, y = logits_of(three, few_digits), few_digits.val.known_labels.numpy()
    numbers = analysis.numbers
    best = int((z.argmax(2) == y).mean(1).argmax())
    assert numbers["best"] == three[best].label
    mean = softmax(z, axis=2).mean(0)
    gain = (mean.argmax(1) == y).mean() - (z[best].argmax(1) == y).mean()
    assert numbers["combiners"]["mean"]["accuracy_gain"]["value"] == pytest.approx(gain, abs=1e-9)
    nll = (
        -log_softmax(z[best], axis=1)[np.arange(len(y)), y].mean() + np.log(mean[np.arange(len(y)), y]).mean()
    )
    assert numbers["combiners"]["mean"]["nll_gain"]["value"] == pytest.approx(nll, abs=1e-5)


def test_calibration_is_no_gain_of_combining(three, tmp_path):
    options = {**OPTIONS, "calibrate": "teachers"}
    (row,) = (
        analyze_teachers(three[:1], out=tmp_path / "x", **options).numbers["combiners"][name]
        for name in ("learned",)
    )
    assert row["nll_gain"]["value"] == pytest.approx(0, abs=1e-9)


def test_a_combiner_of_the_table_need_not_be_named(three, tmp_path):
    with refused(
        ConfigError,
        "combine: learned is judged in any case",
        "all combiners of the table are",
        "leave it out, or name a function of yours: py:FILE.py:function",
    ):
        analyze_teachers(three, combine="learned", out=tmp_path / "x", **OPTIONS)


def test_what_cannot_be_judged_beforehand_says_why(analysis):
    left_out = {k: row["left_out"] for k, row in analysis.numbers["combiners"].items() if "left_out" in row}
    assert left_out == {
        "fixed": "no weights are given",
        "confidence": "it sees the labels by which it would be judged",
        "agree": "it depends on a student in training",
        "drop": "it depends on a student in training",
    }
    assert set(analysis.numbers["combiners"]) == set(COMBINERS)
    for name in COMBINERS:
        assert name in analysis.table()


def test_the_bad_teacher_is_to_be_dropped_and_no_good_one(analysis, three, few_digits):
    assert analysis.numbers["advice"].startswith("Drop bad: without it the mean of the others")
    z, y = logits_of(three, few_digits), few_digits.val.known_labels.numpy()
    p, rows = softmax(z, axis=2), np.arange(len(y))
    lost = -np.log(p[:2].mean(0)[rows, y]).mean() + np.log(p.mean(0)[rows, y]).mean()
    without = analysis.numbers["teachers"]["bad"]["without"]["nll"]
    assert without["value"] == pytest.approx(lost, abs=1e-5)
    assert without["low"] <= without["value"] <= without["high"] < 0
    two = analyze_teachers(three[:2], out=analysis.folder / "two", **OPTIONS)
    assert two.numbers["advice"].startswith("Keep all: ")


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"a": (-0.2, -0.3, -0.1), "b": (0.1, 0.0, 0.2)}, "Drop a: without it"),
        ({"a": (-0.2, -0.5, 0.1), "b": (0.1, 0.0, 0.2)}, "Keep all: leaving out none"),
        ({"a": (-0.5, -1.1, 0.1), "b": (-0.3, -0.4, -0.2)}, "Drop b: without it"),
        ({"a": (0.2, 0.1, 0.3), "b": (0.1, 0.05, 0.2)}, "Keep all: leaving out none"),
        ({}, "There is nothing to leave out."),
    ],
)
def test_the_advice_claims_no_more_than_its_interval(losses, words):
    measured = {
        name: {"nll": dict(zip(("value", "low", "high"), numbers, strict=True))}
        for name, numbers in losses.items()
    }
    assert advice(measured).startswith(words)


def test_the_numbers_are_written_and_repeat(analysis, three, tmp_path):
    again = analyze_teachers(three, out=tmp_path / "again", **OPTIONS)
    first, second = (
        json.loads((folder / "teachers.json").read_text()) for folder in (analysis.folder, again.folder)
    )
    assert first == second
    assert (analysis.folder / "teachers.png").stat().st_size > 10_000


def test_a_combiner_of_yours_is_judged_beside_the_others(three, tmp_path):
    def first(count):
        return torch.eye(count)[0]

    numbers = analyze_teachers(three, combine=first, out=tmp_path / "x", **OPTIONS).numbers
    alone = numbers["teachers"]["good"]
    assert numbers["combiners"]["python:first"]["nll"]["value"] == pytest.approx(
        alone["nll"]["value"], rel=1e-5
    )
    given = analyze_teachers(three, weights=[1, 0, 0], out=tmp_path / "y", **OPTIONS).numbers
    assert given["combiners"]["fixed"]["nll"]["value"] == pytest.approx(alone["nll"]["value"], rel=1e-5)


def test_a_teacher_that_knows_some_classes_is_judged_among_them(three, few_digits, tmp_path):
    groups = tuple((c,) if c < 6 else () for c in range(10))
    partial = Teacher.of("partial", three[1].classifier, "made here", class_map=ClassMap(groups))
    numbers = analyze_teachers([three[0], partial], out=tmp_path / "x", **OPTIONS).numbers
    row, y = numbers["teachers"]["partial"], few_digits.val.known_labels
    assert (row["classes"], row["images"]) == (6, int((y < 6).sum()))
    z = three[1].all_logits(few_digits.val)[y < 6][:, :6]
    assert row["accuracy"]["value"] == pytest.approx(float((z.argmax(1) == y[y < 6]).float().mean()))
    assert numbers["combiners"]["learned"]["left_out"].startswith("they know some of the classes only")
    assert numbers["teachers"]["good"]["without"] is None  # the other alone does not know all classes
    assert "nll" in numbers["combiners"]["mean"]
    with refused(
        ConfigError,
        "no teacher knows all classes, so none can be the best one",
        "a teacher alone must know all classes",
        "add one that does, such as one trained on this data, or leave best-teacher out of --controls",
    ):
        analyze_teachers([partial], out=tmp_path / "y", **OPTIONS)


def test_the_command_line_prints_the_table_and_reads_stored_outputs(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_teacher("lenet", few_digits, training={"epochs": 1})
    command = [
        "analyze-teachers", "--teachers", "lenet,resnet8", "--teacher-epochs", "1", "--limit-train", "200",
        "--out", "out", "--set", "resamples=100",
    ]  # fmt: skip
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    for text in ("digits, validation split", "combiner", "Diversity", "At least one teacher is right on"):
        assert text in first.stdout
    (following,) = [line for line in first.stderr.splitlines() if "ekd distill" in line]
    assert following.split() == [
        "ekd", "distill", "--teachers", "lenet,resnet8", "--limit-train", "200", "--teacher-epochs", "1",
    ]  # fmt: skip
    monkeypatch.setattr(Teacher, "_compute", lambda *_, **__: pytest.fail("ran a teacher again"))
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["n"] == len(few_digits.val)
    assert set(os.listdir("out")) == {"teachers.json", "teachers.png"}


def test_wrong_options_are_told_together(tmp_path):
    result = CliRunner().invoke(
        app, ["analyze-teachers", "--teachers", "lenett", "--combine", "lerned", "--out", str(tmp_path / "x")]
    )
    assert result.exit_code == 2
    assert "error: no model is called 'lenett'" in result.stderr
    assert "error: combine: there is no 'lerned'" in result.stderr
    assert not (tmp_path / "x").exists()


def test_it_is_a_public_function():
    assert ensemble_kd.analyze_teachers is analyze_teachers


# Diversity


def test_pair_measures_equal_those_by_hand():
    first = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1], dtype=bool)
    second = np.array([1, 1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=bool)
    measures = pair_diversity(first, second)  # 4 both, 1 only first, 2 only second, 3 neither
    assert measures["disagreement"] == pytest.approx(0.3)
    assert measures["double_fault"] == pytest.approx(0.3)
    assert measures["q"] == pytest.approx((4 * 3 - 1 * 2) / (4 * 3 + 1 * 2))
    assert measures["error_consistency"] == pytest.approx(cohen_kappa_score(first, second))


@pytest.mark.parametrize(("first", "second"), [((1, 1, 1), (1, 1, 1)), ((0, 0), (0, 0))])
def test_pairs_without_a_difference_have_no_correlation(first, second):
    measures = pair_diversity(np.array(first, dtype=bool), np.array(second, dtype=bool))
    assert measures["disagreement"] == 0
    assert np.isnan(measures["q"])
    assert np.isnan(measures["error_consistency"])


def test_mutual_information_is_zero_for_equal_models_and_at_most_log_k():
    one = np.random.default_rng(0).normal(size=(1, 20, 5)) * 3
    assert mutual_information(np.repeat(one, 3, axis=0)) == pytest.approx(0, abs=1e-12)
    certain = np.zeros((3, 4, 5))
    for k in range(3):
        certain[k, :, k] = 1e4
    assert mutual_information(certain) == pytest.approx(np.log(3))
