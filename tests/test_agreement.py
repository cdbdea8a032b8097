"""Agreement of two models against scikit-learn and plain counts, and the analysis of a run."""

from __future__ import annotations

import json
import os
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from support import refused

from ensemble_kd.analysis.agreement import CELLS, Agreement, analyze_agreement, compare_pair, matrix
from ensemble_kd.analysis.plots import draw_heat_maps
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import ConfigError, RunError
from ensemble_kd.tables import text_table

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


# The analysis of a run


@pytest.fixture(scope="module")
def analyzed(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    return analyze_agreement(finished.folder, out=tmp_path_factory.mktemp("analysis"))


def test_a_runs_numbers_are_those_of_its_predictions(finished: DistillResult, analyzed: Agreement) -> None:
    tensors = safetensors.torch.load_file(finished.folder / "predictions.safetensors")
    labels = tensors.pop("labels").numpy()
    predicted = {
        name.removeprefix("logits/"): logits.numpy().argmax(axis=1) for name, logits in tensors.items()
    }
    numbers = json.loads((analyzed.folder / "agreement.json").read_text())
    assert numbers == analyzed.numbers
    assert {key: numbers[key] for key in ("source", "data", "n")} == {
        "source": str(finished.folder),
        "data": "digits",
        "n": 360,
    }
    assert numbers["models"] == list(finished.metrics["models"])
    assert sorted(numbers["models"]) == sorted(predicted)
    names = [(pair["first"], pair["second"]) for pair in numbers["pairs"]]
    assert names == list(combinations(numbers["models"], 2))
    for pair in numbers["pairs"]:
        first, second = predicted[pair["first"]], predicted[pair["second"]]
        found = values(pair)
        assert found.pop("agreement") == pytest.approx(np.mean(first == second), abs=1e-12)
        assert found.pop("kappa") == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
        assert found == pytest.approx(plain_counts(first, second, labels), abs=1e-12)


def test_agreement_with_the_ensemble_is_that_of_the_runs_metrics(
    finished: DistillResult, analyzed: Agreement
) -> None:
    for pair in analyzed.numbers["pairs"]:
        if pair["second"] == "ensemble":
            expected = finished.metrics["models"][pair["first"]]["agreement"]["value"]
            assert pair["agreement"]["value"] == pytest.approx(expected, abs=1e-12)


def test_the_table_has_a_row_for_each_pair(analyzed: Agreement) -> None:
    lines = analyzed.table().splitlines()
    assert lines[0] == "digits, test split, 360 images; 95 % intervals over images"
    for pair in analyzed.numbers["pairs"]:
        (row,) = (line for line in lines if line.strip().startswith(f"{pair['first']} – {pair['second']} "))
        assert f"{100 * pair['agreement']['value']:.1f} % [" in row
        assert f"{pair['kappa']['value']:.3f} [" in row
        assert row.rstrip().endswith(f"{100 * pair['cells']['same_wrong']['value']:.1f} %")


def test_the_picture_can_be_opened(analyzed: Agreement) -> None:
    with Image.open(analyzed.folder / "agreement.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 50


def test_the_runs_own_folder_is_the_default(finished: DistillResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    shutil.rmtree(run / "analysis", ignore_errors=True)
    assert analyze_agreement(str(run)).folder == run / "analysis"
    assert sorted(path.name for path in (run / "analysis").iterdir()) == ["agreement.json", "agreement.png"]


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
    found = analyze_agreement()
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
    with pytest.raises(RunError):
        analyze_agreement(run)
    assert not (run / "analysis").exists()


# Models instead of a run


def test_two_files_are_compared_as_in_their_run(
    finished: DistillResult, analyzed: Agreement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    paths = ["student.safetensors", "controls/labels.safetensors"]
    found = analyze_agreement(models=paths, data="digits", out=tmp_path / "out")
    assert found.folder == tmp_path / "out"
    assert found.numbers["models"] == paths
    (pair,) = found.numbers["pairs"]
    (in_run,) = (p for p in analyzed.numbers["pairs"] if (p["first"], p["second"]) == ("student", "labels"))
    assert values(pair) == pytest.approx(values(in_run), abs=1e-12)
    assert (tmp_path / "out" / "agreement.png").stat().st_size > 1000


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


# Names that mean something to rich or to matplotlib

NAMES = [r"x$\frac$", "[/b]", "[red]x", "a_b^c", "$", "ü – é", "%s{0}"]


def test_names_stand_in_a_table_as_they_are() -> None:
    table = text_table(["", *NAMES], [[name, *"1234567"] for name in NAMES], title="[/i] $x$")
    lines = table.splitlines()
    assert lines[0] == "[/i] $x$"
    for name in NAMES:
        assert sum(line.strip().startswith(f"{name} ") for line in lines) >= 1, name
        assert name in lines[2]


def open_picture(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


@pytest.mark.parametrize("count", [1, 2, 7])
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
