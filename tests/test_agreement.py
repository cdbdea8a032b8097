"""Agreement of models against scikit-learn, statsmodels, scipy and plain counts, and the analysis of a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.inter_rater import fleiss_kappa
from support import logged, refused
from torch import Tensor
from typer.testing import CliRunner

from ensemble_kd import files
from ensemble_kd.analysis import agreement as module
from ensemble_kd.analysis.agreement import (
    Agreement,
    agreement_of,
    all_groups,
    all_pairs,
    analyze_agreement,
)
from ensemble_kd.analysis.corruptions import STRENGTHS, corrupted
from ensemble_kd.analysis.diversity import pair_diversity
from ensemble_kd.analysis.fidelity import Compared, by_class, fidelity
from ensemble_kd.analysis.options import AgreementOptions
from ensemble_kd.analysis.pairs import CELLS, compare_pair, divergences, matrix, mcnemar
from ensemble_kd.analysis.plots import draw_heat_maps
from ensemble_kd.analysis.plots_agreement import draw_agreement
from ensemble_kd.analysis.plots_classes import draw_classes
from ensemble_kd.analysis.subjects import Subjects, subjects_of
from ensemble_kd.cli import app
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import ConfigError, ModelError, RunError
from ensemble_kd.runs import OBJECTS
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.class_map import NO_VOTE

PICTURES = ["heat_maps", "cells", "diversity", "corruption", "classes", "dark"]
Answers = tuple[np.ndarray, np.ndarray, np.ndarray]


def answers(
    n: int = 500, classes: int = 10, seed: int = 0, skill: tuple[float, float] = (0.8, 0.6)
) -> Answers:
    """Two models' answers and the labels; each model knows its share of them and guesses the rest."""
    generator = np.random.default_rng(seed)
    labels, *guesses = generator.integers(classes, size=(3, n))
    first, second = (
        np.where(generator.random(n) < share, labels, guess)
        for share, guess in zip(skill, guesses, strict=True)
    )
    return first, second, labels


def plain_counts(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    cells = dict.fromkeys(CELLS, 0)
    for a, b, y in zip(first, second, labels, strict=True):
        if a == y and b == y:
            cells["both_right"] += 1
        elif a == y:
            cells["only_first"] += 1
        elif b == y:
            cells["only_second"] += 1
        else:
            cells["both_wrong"] += 1
            cells["same_wrong"] += int(a == b)
    return {name: count / len(labels) for name, count in cells.items()}


def values(found: dict) -> dict[str, float]:
    """All values of a pair in one dictionary, without the intervals."""
    flat = {"agreement": found["agreement"], "kappa": found["kappa"], **found["cells"]}
    return {name: measured["value"] for name, measured in flat.items()}


def intervals(found: dict) -> dict[str, dict[str, float]]:
    return {"agreement": found["agreement"], "kappa": found["kappa"], **found["cells"]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (20, 3), (500, 10), (2000, 100)])
@pytest.mark.parametrize("skill", [(0.9, 0.8), (0.5, 0.0), (0.0, 0.0)])
def test_a_pair_equals_scikit_learn_and_plain_counts(
    n: int, classes: int, skill: tuple[float, float], seed: int
) -> None:
    first, second, labels = answers(n, classes, seed, skill)
    found = values(compare_pair(first, second, labels))
    agreement, kappa = found.pop("agreement"), found.pop("kappa")
    assert agreement == pytest.approx(np.mean(first == second), abs=1e-12)
    if n > 1:
        assert kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert found == pytest.approx(plain_counts(first, second, labels), abs=1e-12)
    assert sum(found[cell] for cell in CELLS[:4]) == pytest.approx(1, abs=1e-12)
    assert found["same_wrong"] <= found["both_wrong"]
    assert agreement == pytest.approx(found["both_right"] + found["same_wrong"], abs=1e-12)


def test_a_model_agrees_with_itself() -> None:
    first, _, labels = answers()
    found = compare_pair(first, first, labels)
    assert found["agreement"] == {"value": 1, "low": 1, "high": 1}
    assert found["kappa"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    assert found["cells"]["only_first"]["value"] == found["cells"]["only_second"]["value"] == 0
    assert found["cells"]["same_wrong"] == found["cells"]["both_wrong"]


@pytest.mark.parametrize(
    ("first", "second", "kappa"), [(3, 3, float("nan")), (3, 4, 0.0), (3, None, 0.0), (None, 3, 0.0)]
)
def test_kappa_of_models_that_always_say_the_same(
    first: int | None, second: int | None, kappa: float
) -> None:
    varied, _, labels = answers()
    a, b = (varied if value is None else np.full(len(labels), value) for value in (first, second))
    found = compare_pair(a, b, labels)
    assert found["kappa"]["value"] == pytest.approx(kappa, nan_ok=True, abs=1e-12)
    assert found["agreement"]["value"] == np.mean(a == b)


def test_swapping_the_models_swaps_their_cells() -> None:
    first, second, labels = answers()
    one, other = (compare_pair(a, b, labels) for a, b in ((first, second), (second, first)))
    swapped = values(other)
    swapped["only_first"], swapped["only_second"] = swapped["only_second"], swapped["only_first"]
    assert values(one) == pytest.approx(swapped, abs=1e-12)
    for edge in ("low", "high"):
        assert one["kappa"][edge] == pytest.approx(other["kappa"][edge], abs=0.01)


def test_intervals_are_near_those_of_a_plain_bootstrap() -> None:
    first, second, labels = answers()
    found = intervals(compare_pair(first, second, labels))
    generator = np.random.default_rng(1)
    draws: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(400):
        taken = generator.integers(len(labels), size=len(labels))
        a, b, y = first[taken], second[taken], labels[taken]
        draws["agreement"].append(float(np.mean(a == b)))
        draws["kappa"].append(cohen_kappa_score(a, b))
        for name, share in plain_counts(a, b, y).items():
            draws[name].append(share)
    for name, measured in found.items():
        assert measured["low"] <= measured["value"] <= measured["high"], name
        low, high = np.percentile(draws[name], [2.5, 97.5])
        assert (measured["low"], measured["high"]) == pytest.approx((low, high), abs=0.012), name
    assert found["agreement"]["high"] - found["agreement"]["low"] > 0.05


def test_intervals_depend_on_the_seed_alone() -> None:
    first, second, labels = answers()
    one, again, other = (compare_pair(first, second, labels, seed) for seed in (1, 1, 2))
    assert one == again
    assert one["kappa"]["low"] != other["kappa"]["low"]
    assert values(one) == values(other)


def test_tensors_are_taken_as_arrays_are() -> None:
    first, second, labels = answers(50)
    tensors = (torch.from_numpy(array) for array in (first, second, labels))
    assert compare_pair(*tensors) == compare_pair(first, second, labels)


def test_a_matrix_has_each_pair_on_both_sides() -> None:
    pairs = [
        {"first": a, "second": b, "agreement": {"value": value}}
        for a, b, value in (("x", "y", 0.1), ("x", "z", 0.2), ("y", "z", 0.3))
    ]
    expected = [[1, 0.1, 0.2], [0.1, 1, 0.3], [0.2, 0.3, 1]]
    np.testing.assert_array_equal(matrix(pairs, ["x", "y", "z"], "agreement"), expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_pairs_diversity_and_difference_are_those_of_its_correctness(seed: int) -> None:
    first, second, labels = answers(seed=seed)
    found = compare_pair(first, second, labels)
    for name, value in pair_diversity(first == labels, second == labels).items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["low"] < value < found[name]["high"], name
    accuracies = np.mean(first == labels), np.mean(second == labels)
    assert found["bound"] == pytest.approx(max(0, sum(accuracies) - 1), abs=1e-12)
    assert found["bound"] <= found["agreement"]["value"]
    difference = found["accuracy_difference"]
    assert difference["value"] == pytest.approx(accuracies[0] - accuracies[1], abs=1e-12)
    assert difference["low"] < difference["value"] < difference["high"]
    assert (difference["low"] > 0) == (found["mcnemar"]["p"] < 0.05)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (80, 120)])
def test_mcnemar_is_statsmodels_exact_test(only_first: int, only_second: int) -> None:
    theirs = their_mcnemar([[50, only_first], [only_second, 7]], exact=True).pvalue
    assert mcnemar(only_first, only_second)["p"] == pytest.approx(theirs, abs=1e-12)


def test_what_is_not_defined_has_a_reason() -> None:
    same = np.full(20, 3)
    found = compare_pair(same, same, same)
    reasons = {name: found[name]["reason"] for name in ("kappa", "q", "correlation", "error_consistency")}
    assert reasons == {
        "kappa": "both always name one and the same class",
        "q": "0/0: it needs images that both get right and that both get wrong, or that each alone gets right",
        "correlation": "one of both is right on all images, or on none",
        "error_consistency": "both are right on all images, or wrong on all",
    }


# Probabilities


def outputs(n: int = 300, classes: int = 5, models: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 3 * torch.randn(n, classes, generator=generator) for name in "abcdef"[:models]}


def test_divergences_equal_scipy() -> None:
    logits = outputs(n=5000)
    p, q = (logits[name].double().softmax(1).numpy() for name in "ab")
    found = divergences(logits["a"], logits["b"])
    np.testing.assert_allclose(found["first_second"], entropy(p, q, axis=1), atol=1e-9)
    np.testing.assert_allclose(found["second_first"], entropy(q, p, axis=1), atol=1e-9)
    np.testing.assert_allclose(found["jsd"], jensenshannon(p, q, axis=1) ** 2, atol=1e-9)
    assert found["jsd"].min() >= 0
    assert found["jsd"].max() <= np.log(2)


def test_divergences_of_a_model_from_itself_a_shift_and_a_scale() -> None:
    a = outputs()["a"]
    for other in (a, a + 100):
        for values in divergences(a, other).values():
            np.testing.assert_allclose(values, 0, atol=1e-6)
    assert divergences(a, 2 * a)["first_second"].mean() > 0.1
    certain = 1e4 * torch.eye(5)
    np.testing.assert_allclose(divergences(certain, certain.roll(1, dims=0))["jsd"], np.log(2), atol=1e-12)


def test_pairs_and_groups_of_several_models() -> None:
    logits = outputs()
    labels = np.random.default_rng(0).integers(5, size=300)
    pairs = all_pairs(logits, labels)
    assert [(pair["first"], pair["second"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in pairs:
        found = divergences(logits[pair["first"]], logits[pair["second"]])
        for key, measure in {**pair["kl"], "jsd": pair["jsd"]}.items():
            assert measure["value"] == pytest.approx(found[key].mean(), abs=1e-12)
            assert measure["low"] < measure["value"] < measure["high"]
    groups = all_groups(logits, labels, {"a": "student", "b": "teacher", "c": "teacher"})
    assert {name: group["members"] for name, group in groups.items()} == {
        "teachers": ["b", "c"],
        "all": [*"abc"],
    }
    right = np.stack([values.argmax(1).numpy() == labels for values in logits.values()])
    ratings = np.stack([right.sum(0), 3 - right.sum(0)], axis=1)
    assert groups["all"]["interrater_kappa"]["value"] == pytest.approx(fleiss_kappa(ratings))
    mean = np.mean([pair["disagreement"]["value"] for pair in pairs])
    assert groups["all"]["disagreement"]["value"] == pytest.approx(mean)
    assert groups["all"]["mutual_information"]["value"] > 0
    assert "teachers" not in all_groups(logits, labels, {"a": "student", "b": "teacher", "c": "ensemble"})


def test_a_teacher_that_knows_some_classes_has_a_divergence_in_one_direction() -> None:
    logits = outputs(models=2)
    logits["b"][:, 3] = NO_VOTE
    labels = np.zeros(300, dtype=int)
    (pair,) = all_pairs(logits, labels)
    assert pair["kl"]["first_second"]["reason"] == "b does not know all classes of a"
    assert 0 < pair["kl"]["second_first"]["value"] < 100
    assert 0 < pair["jsd"]["value"] < np.log(2)
    group = all_groups(logits, labels, {"a": "model", "b": "model"})["all"]
    assert group["mutual_information"]["reason"] == "a model among them does not know all classes"


# The analysis of a run


@pytest.fixture(scope="module")
def analyzed(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    return analyze_agreement(finished.folder, quick=True, out=tmp_path_factory.mktemp("analysis"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take most of the time."""
    monkeypatch.setattr(module, "draw_agreement", lambda *_: {})


def written(analysis: Agreement) -> dict[str, Any]:
    return json.loads((analysis.folder / "agreement.json").read_text())


def measures(value: Any) -> Iterator[dict[str, Any]]:
    """Every number with an interval, wherever it is."""
    if isinstance(value, dict):
        if {"value", "low", "high"} <= value.keys():
            yield value
        for inner in value.values():
            yield from measures(inner)
    if isinstance(value, list):
        for inner in value:
            yield from measures(inner)


def test_a_runs_numbers_are_those_of_its_predictions(finished: DistillResult, analyzed: Agreement) -> None:
    tensors = safetensors.torch.load_file(finished.folder / "predictions.safetensors")
    labels = tensors.pop("labels").numpy()
    logits = {name.removeprefix("logits/"): values for name, values in tensors.items()}
    predicted = {name: values.numpy().argmax(axis=1) for name, values in logits.items()}
    numbers = written(analyzed)
    assert numbers == json.loads(files.to_json(analyzed.numbers))
    assert {key: numbers[key] for key in ("source", "data", "n", "reference", "classes")} == {
        "source": str(finished.folder),
        "data": "digits",
        "n": 360,
        "reference": "ensemble",
        "classes": [str(c) for c in range(10)],
    }
    assert numbers["settings"] == {
        "quick": True, "images": 500, "seed": 0, "corruptions": True, "resamples": 1000, "temperature": 1,
    }  # fmt: skip
    assert numbers["models"] == list(numbers["roles"]) == list(finished.metrics["models"])
    assert sorted(numbers["models"]) == sorted(predicted)
    names = [(pair["first"], pair["second"]) for pair in numbers["pairs"]]
    assert names == list(combinations(numbers["models"], 2))
    for pair in numbers["pairs"]:
        first, second = predicted[pair["first"]], predicted[pair["second"]]
        found = values(pair)
        assert found.pop("agreement") == pytest.approx(np.mean(first == second), abs=1e-12)
        assert found.pop("kappa") == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
        assert found == pytest.approx(plain_counts(first, second, labels), abs=1e-12)
    ordered = {name: logits[name] for name in numbers["models"]}
    expected = fidelity(ordered, Compared.of(numbers["roles"]))
    assert numbers["fidelity"] == json.loads(files.to_json(expected))


def test_numbers_that_the_runs_metrics_hold_are_the_same(
    finished: DistillResult, analyzed: Agreement
) -> None:
    models = finished.metrics["models"]
    for name, row in analyzed.numbers["fidelity"]["targets"]["ensemble"].items():
        assert row["agreement"]["value"] == pytest.approx(models[name]["agreement"]["value"], abs=1e-12)
        assert row["kl"]["value"] == pytest.approx(models[name]["teacher_student_kl"]["value"], abs=1e-6)
    differences = finished.metrics["differences"]["labels"]
    gains = analyzed.numbers["fidelity"]["targets"]["ensemble"]["labels"]
    assert gains["agreement_gain"]["value"] == pytest.approx(differences["agreement"]["value"], abs=1e-12)
    for name, accuracy in analyzed.numbers["corruption"]["clean"]["accuracy"].items():
        assert accuracy["value"] == pytest.approx(models[name]["accuracy"]["value"], abs=1e-12)


def test_every_number_has_an_interval_or_a_reason(analyzed: Agreement) -> None:
    found = list(measures(written(analyzed)))
    assert len(found) > 500
    for measure in found:
        if measure["value"] is None:
            assert measure["reason"]
        else:
            assert measure["low"] <= measure["high"]


def test_under_corruption_models_are_run_on_the_corrupted_images(
    finished: DistillResult, analyzed: Agreement
) -> None:
    subjects = subjects_of(AgreementOptions(run=finished.folder))
    found = analyzed.numbers["corruption"]
    assert {kind: [row["strength"] for row in own["rows"]] for kind, own in found["kinds"].items()} == {
        kind: [strengths[1]] for kind, strengths in STRENGTHS.items()
    }
    strength = STRENGTHS["contrast"][1]
    logits = subjects.logits(corrupted(subjects.data.test, "contrast", strength, 0))
    answered = {name: z.argmax(1).numpy() for name, z in logits.items()}
    (row,) = found["kinds"]["contrast"]["rows"]
    for name, accuracy in row["accuracy"].items():
        expected = np.mean(answered[name] == subjects.data.test.known_labels.numpy())
        assert accuracy["value"] == pytest.approx(expected, abs=1e-12)
    for target in ("ensemble", "lenet", "resnet8"):
        agreement = {
            name: np.mean(answered[name] == answered[target])
            for name in ("student", "labels", "best-teacher", "independent")
        }
        for name, share in agreement.items():
            assert row["agreement"][target][name]["value"] == pytest.approx(share, abs=1e-12)
        for name, gain in row["gain"][target].items():
            assert gain["value"] == pytest.approx(agreement["student"] - agreement[name], abs=1e-12)
    shares = [own["mean"]["agreement"]["ensemble"]["labels"]["value"] for own in found["kinds"].values()]
    overall = found["overall"]["agreement"]["ensemble"]["labels"]
    assert overall["value"] == pytest.approx(np.mean(shares))
    assert overall["low"] < overall["value"] < overall["high"]
    assert found["verdict"].startswith("Under corruption it does so on ")


def test_all_strengths_are_tried_unless_it_is_quick(finished: DistillResult, digits: Dataset) -> None:
    subjects = subjects_of(AgreementOptions(run=finished.folder))
    few = replace(subjects, data=replace(subjects.data, test=subjects.data.test[torch.arange(8)]))
    options = AgreementOptions(images=5)
    found = module.under_corruption(few, Compared.of(few.roles), options)
    assert found["n"] == 5
    assert {
        kind: tuple(row["strength"] for row in own["rows"]) for kind, own in found["kinds"].items()
    } == STRENGTHS
    first = found["kinds"]["noise"]["mean"]["accuracy"]["student"]["value"]
    rows = [row["accuracy"]["student"]["value"] for row in found["kinds"]["noise"]["rows"]]
    assert first == pytest.approx(np.mean(rows))


def test_the_table_begins_with_fidelity(analyzed: Agreement) -> None:
    numbers, lines = analyzed.numbers, analyzed.table().splitlines()
    assert lines[0] == "digits, test split, 360 images; 95 % intervals over images, one seed"
    assert lines[2:4] == [numbers["fidelity"]["verdict"], numbers["corruption"]["verdict"]]
    assert lines[5] == "Fidelity to the teachers (KL from the teacher, in nats, temperature 1)"
    for target, rows in numbers["fidelity"]["targets"].items():
        for name, row in rows.items():
            named = name if name == "student" else f"control {name}"
            (line,) = (line for line in lines if line.strip().startswith(f"{named} to {target} "))
            assert f"{100 * row['agreement']['value']:.1f} % [" in line
    for pair in numbers["pairs"]:
        (line,) = (line for line in lines if line.strip().startswith(f"{pair['first']} – {pair['second']} "))
        assert f"{100 * pair['agreement']['value']:.1f} % [" in line
        assert line.rstrip().endswith(f"{100 * pair['cells']['same_wrong']['value']:.1f} %")
    for start in (
        "The teachers: ",
        "All models but the ensemble: ",
        "Agreement with ensemble under corruption",
    ):
        assert sum(line.startswith(start) for line in lines) == 1
    for kind in (*STRENGTHS, "none", "mean of the kinds"):
        assert sum(line.strip().startswith(f"{kind} ") for line in lines) == 1
    start = lines.index("Wrong classes, by mean probability:")
    sentences = [f"  {row['sentence']}" for row in numbers["dark"]["words"][:4]]
    assert lines[start + 1 : start + 5] == sentences
    assert lines[start + 5].startswith("  student: same nearest wrong class as ensemble for ")


def test_every_picture_can_be_opened_and_is_told_in_words(analyzed: Agreement) -> None:
    pictures = written(analyzed)["pictures"]
    assert list(pictures) == PICTURES
    for about in pictures.values():
        assert about["title"]
        assert about["alt"].endswith(".")
        with Image.open(analyzed.folder / about["file"]) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 50


@pytest.fixture
def unlaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made but not laid out and written, for tests of what is said of them."""
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: None)


@pytest.mark.usefixtures("unlaid")
def test_what_is_left_out_has_no_picture(analyzed: Agreement, tmp_path: Path) -> None:
    numbers = {**analyzed.numbers, "corruption": {"left_out": "as it was"}}
    numbers["dark"] = {**numbers["dark"], "words": []}
    numbers["by_class"] = [{**row, "n": 0} for row in numbers["by_class"]]
    assert list(draw_agreement(numbers, tmp_path)) == ["heat_maps", "cells", "diversity"]


@pytest.mark.usefixtures("unlaid")
def test_what_is_not_defined_is_unknown_in_words(analyzed: Agreement, tmp_path: Path) -> None:
    none = {"value": np.nan, "low": np.nan, "high": np.nan, "reason": "0/0"}
    numbers = {**analyzed.numbers, "corruption": {"left_out": "as it was"}}
    numbers["pairs"] = [{**pair, "error_consistency": none} for pair in numbers["pairs"]]
    numbers["dark"] = {**numbers["dark"], "correlation": dict.fromkeys(numbers["dark"]["correlation"], none)}
    alts = {key: about["alt"] for key, about in draw_agreement(numbers, tmp_path).items()}
    assert alts["heat_maps"].endswith("with an error consistency of unknown (0/0).")
    assert alts["dark"].endswith("The rank correlation of both is unknown (0/0).")
    assert not any("nan" in alt for alt in alts.values())


# Class by class


def class_numbers(count: int, empty: tuple[int, ...] = (), **roles: str) -> dict[str, Any]:
    """What agreement.json holds of `count` classes, for models with random answers."""
    generator = np.random.default_rng(0)
    labels = np.array([c for c in range(count) if c not in empty for _ in range(20)])
    roles = roles or {
        "student": "student", "labels": "control", "independent": "control", "a": "teacher", "ensemble": "ensemble",
    }  # fmt: skip
    answers = {
        name: np.where(
            generator.random(len(labels)) < 0.8, labels, generator.integers(count, size=len(labels))
        )
        for name in roles
    }
    compared = Compared.of(roles)
    names = [f"class {number}" for number in range(count)]
    return {"reference": compared.reference, "by_class": by_class(answers, labels, names, compared)}


@pytest.mark.parametrize(("count", "rows", "height"), [(3, 3, 200), (10, 10, 450), (130, 100, 2000)])
def test_classes_are_drawn_one_a_row(tmp_path: Path, count: int, rows: int, height: int) -> None:
    numbers = class_numbers(count, empty=(1,) if count == 3 else ())
    rows -= count == 3  # a class without images has no row
    about = draw_classes(numbers, tmp_path / "classes.png")
    assert open_picture(tmp_path / about["file"])[1] > height
    assert about["alt"].startswith(f"A row for each of {rows} classes,")
    assert "for the accuracy of student and independent," in about["alt"]
    shares = {row["class"]: row["agreement"]["student"]["value"] for row in numbers["by_class"] if row["n"]}
    least = min(shares.values())
    assert f"lowest agreement is {100 * least:.0f} %, on " in about["alt"]
    order = ", those first on which student agrees least: 100 of 130 classes" if count == 130 else ""
    assert about["title"] == f"Class by class, with Wilson's intervals of 95 %{order}"


def test_of_models_the_first_two_are_drawn_class_by_class(tmp_path: Path) -> None:
    about = draw_classes(class_numbers(4, a="model", b="model", c="model"), tmp_path / "classes.png")
    assert "for the accuracy of b and c, and for how often each gives the answer of a." in about["alt"]
    about = draw_classes(class_numbers(4, a="model", b="model"), tmp_path / "classes.png")
    assert "for the accuracy of b, and for how often each gives the answer of a." in about["alt"]


@pytest.mark.usefixtures("undrawn")
def test_the_runs_own_folder_is_the_default(finished: DistillResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    shutil.rmtree(run / "analysis", ignore_errors=True)
    found = analyze_agreement(str(run), corruptions=False)
    assert found.folder == run / "analysis"
    assert [path.name for path in (run / "analysis").iterdir()] == ["agreement.json"]


@pytest.mark.usefixtures("undrawn")
def test_numbers_repeat_and_depend_on_the_seed(
    finished: DistillResult, analyzed: Agreement, tmp_path: Path
) -> None:
    again = analyze_agreement(finished.folder, corruptions=False, quick=True, out=tmp_path / "again").numbers
    for key in ("fidelity", "pairs", "groups", "by_class", "dark"):
        assert files.to_json(again[key]) == files.to_json(analyzed.numbers[key]), key


# A run whose models are not to be had


@pytest.mark.usefixtures("undrawn")
def test_without_corruptions_no_model_is_loaded(
    finished: DistillResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "subjects_of", lambda *_: pytest.fail("loaded the models"))
    with logged() as lines:
        found = analyze_agreement(finished.folder, corruptions=False, out=tmp_path)
    assert found.numbers["corruption"] == {"left_out": "it was not asked for"}
    assert "Under corruption: left out (it was not asked for)." in found.table()
    assert lines == []


@pytest.mark.usefixtures("undrawn")
def test_a_run_whose_teachers_are_gone_is_compared_on_clean_images(
    finished: DistillResult, tmp_path: Path, own_cache: Path
) -> None:
    with logged() as lines:
        found = analyze_agreement(finished.folder, quick=True, out=tmp_path)
    (line,) = lines
    assert line.startswith(
        "WARNING: agreement under corruption is left out: teacher 'lenet' is not in the library"
    )
    assert found.numbers["corruption"]["left_out"].startswith("teacher 'lenet' is not in the library")
    assert found.numbers["fidelity"]["verdict"] in found.table()


@pytest.fixture
def of_objects(finished: DistillResult, tmp_path: Path) -> Path:
    """The run as if its teachers had been objects."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    status = json.loads((run / "status.json").read_text())
    files.write_json(run / "status.json", {**status, "verb": OBJECTS})
    return run


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_objects_says_why_a_part_is_left_out(of_objects: Path) -> None:
    with logged() as lines:
        found = analyze_agreement(of_objects, quick=True)
    reason = f"the models of {of_objects} are not all in files: it was given teachers, a student or a function as Python objects"
    assert found.numbers["corruption"] == {"left_out": reason}
    assert lines == [
        f"WARNING: agreement under corruption is left out: the models of {of_objects} are not all in files\n"
        "  why: it was given teachers, a student or a function as Python objects\n"
        "  fix: call the analysis from Python with teachers=[…], the same objects"
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_teachers_of_a_run_of_objects_can_be_given(
    finished: DistillResult, of_objects: Path, analyzed: Agreement
) -> None:
    teachers = subjects_of(AgreementOptions(run=finished.folder)).teachers
    found = analyze_agreement(of_objects, teachers=teachers, images=4, quick=True).numbers
    assert found["corruption"]["n"] == 4
    assert list(found["corruption"]["clean"]["accuracy"]) == analyzed.numbers["models"]
    assert len(found["by_class"]) == 10  # of the stored predictions, all of them
    assert sum(row["n"] for row in found["by_class"]) == 360
    other = replace(teachers[0], fingerprint="0" * 64)
    with pytest.raises(ModelError, match="is not the one that taught"):
        analyze_agreement(of_objects, teachers=[other, teachers[1]], quick=True)


@pytest.mark.usefixtures("undrawn")
def test_the_newest_finished_run_is_taken(
    finished: DistillResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, age in (("a-new", 100), ("b-old", 300), ("c-stopped", 0)):
        shutil.copytree(finished.folder, tmp_path / "runs" / name)
        metrics = tmp_path / "runs" / name / "metrics.json"
        written = metrics.stat().st_mtime - age
        os.utime(metrics, (written, written))
    (tmp_path / "runs" / "c-stopped" / "metrics.json").unlink()
    found = analyze_agreement(corruptions=False)
    assert found.folder == Path("runs/a-new/analysis")
    assert found.numbers["source"] == "runs/a-new"


def test_without_any_run_it_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(
        RunError,
        "no finished run in runs/",
        "none was named, and the newest is taken from there",
        "name a run folder, or make one: ekd distill --teachers resnet18,vgg16 --student lenet",
    ):
        analyze_agreement()


def test_an_unfinished_run_is_refused(finished: DistillResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "status.json"):
        shutil.copy(finished.folder / name, run / name)
    with refused(RunError, f"{run} did not finish", "it has no metrics.json", f"go on: ekd resume {run}"):
        analyze_agreement(run)
    assert not (run / "analysis").exists()


# Models instead of a run


@pytest.mark.usefixtures("undrawn")
def test_two_files_are_compared_as_in_their_run(
    finished: DistillResult, analyzed: Agreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    paths = ["student.safetensors", "controls/labels.safetensors"]
    found = analyze_agreement(models=paths, data="digits", quick=True, out=tmp_path / "out")
    numbers = found.numbers
    assert found.folder == tmp_path / "out"
    assert (numbers["models"], numbers["reference"]) == (paths, paths[0])
    assert numbers["roles"] == dict.fromkeys(paths, "model")
    assert numbers["fidelity"] == {"left_out": "models are compared, and none of them is a student"}
    (pair,) = numbers["pairs"]
    (in_run,) = (p for p in analyzed.numbers["pairs"] if (p["first"], p["second"]) == ("student", "labels"))
    assert values(pair) == pytest.approx(values(in_run), abs=1e-12)
    noise, in_run = (n["corruption"]["kinds"]["noise"]["mean"] for n in (numbers, analyzed.numbers))
    assert noise["accuracy"][paths[1]] == in_run["accuracy"]["labels"]
    assert set(noise["agreement"]) == {paths[0]}
    assert noise["gain"] == {paths[0]: {}}
    assert f"{paths[0]} – {paths[1]} " in found.table()


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_alone_or_twice_is_refused(
    finished: DistillResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.chdir(finished.folder)
    with pytest.raises(ConfigError):
        analyze_agreement(models=["student.safetensors"] * count, data="digits", out=tmp_path)


def test_a_run_and_models_together_are_refused(finished: DistillResult, tmp_path: Path) -> None:
    with refused(
        ConfigError,
        "models: name two or more, each once, and no run beside them",
        "pairs of models are compared",
        "say --models a,b --data NAME, or a run folder alone",
    ):
        analyze_agreement(finished.folder, models="lenet,resnet8", out=tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_the_command_line(finished: DistillResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["analyze-agreement", str(finished.folder), "--quick", "--no-corruptions", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers["folder"] == str(out)
    assert numbers["corruption"] == {"left_out": "it was not asked for"}
    assert (
        result.stderr.splitlines()[-1] == f"numbers and pictures: {out / 'agreement.json'}, agreement-*.png"
    )


# Names that mean something to rich or to matplotlib

NAMES = [r"x$\frac$", "[/b]", "[red]x", "a_b^c", "$", "ü – é", "%s{0}"]


def test_names_stand_in_a_table_as_they_are() -> None:
    table = text_table(["", *NAMES], [[name, *"1234567"] for name in NAMES], title="[/i] $x$")
    lines = table.splitlines()
    assert lines[0] == "[/i] $x$"
    for name in NAMES:
        assert sum(line.strip().startswith(f"{name} ") for line in lines) >= 1, name
        assert name in lines[2]


def test_hostile_names_go_through_the_whole_analysis(
    finished: DistillResult, digits: Dataset, tmp_path: Path
) -> None:
    classes = (
        "<script>alert(1)</script>",
        "[/b]",
        r"x$\frac$",
        "猫",
        "y" * 200,
        "\x1b[2J",
        "$",
        "%s",
        "&",
        "}",
    )
    few = replace(digits, classes=classes, test=digits.test[torch.arange(30)])
    subjects = subjects_of(AgreementOptions(run=finished.folder))
    networks = dict(zip(("[/i]", r"x$\frac$" * 30), subjects.networks.values(), strict=False))
    few_of = Subjects("here", tmp_path, few, networks)
    found = agreement_of(few_of, AgreementOptions(quick=True))
    assert list(found.numbers["pictures"]) == PICTURES
    assert written(found)["classes"] == list(classes)
    assert "\x1b" not in found.table()
    assert max(map(len, found.table().splitlines())) < 300
    for about in found.numbers["pictures"].values():
        assert min(open_picture(tmp_path / about["file"])) > 150


def open_picture(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


@pytest.mark.parametrize("count", [1, 7])
def test_names_stand_in_a_picture_as_they_are(tmp_path: Path, count: int) -> None:
    names = NAMES[:count]
    draw_heat_maps({"$a$": np.eye(count), "b": np.eye(count)}, names, tmp_path / "x.png")
    width, height = open_picture(tmp_path / "x.png")
    assert width > height > 100


def test_a_picture_shows_unknown_values_as_gaps(tmp_path: Path) -> None:
    unknown = np.array([[1, np.nan], [np.nan, 1]])
    draw_heat_maps({"kappa": unknown}, ["a", "b"], tmp_path / "x.png")
    assert min(open_picture(tmp_path / "x.png")) > 100


@pytest.mark.parametrize("length", [60, 300])
def test_long_names_leave_room_for_the_squares(tmp_path: Path, length: int) -> None:
    names = ["runs/" + letter * length for letter in "ab"]
    draw_heat_maps({"a": np.eye(2), "b": np.eye(2)}, names, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    lightest = (pixels == (252, 253, 191)).all(axis=2)
    assert lightest.sum() > 4000  # the four squares of value 1, the lightest colour of magma
