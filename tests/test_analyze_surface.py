"""The analysis of planes: its numbers against plain loops and the networks of a run, its pictures, its verb."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import seaborn as sns
import torch
from PIL import Image
from support import refused, unexplained
from torch import nn
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd.analysis import plots_surface, surface
from ensemble_kd.analysis.options import SurfaceOptions
from ensemble_kd.analysis.planes import components, plane_through
from ensemble_kd.analysis.plots_surface import Palette, Shown, distinct_colours, draw_planes
from ensemble_kd.analysis.subjects import Subjects
from ensemble_kd.analysis.surface import SurfaceAnalysis, analyze_surface, look, summarise, surface_of
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.cli import app
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import ConfigError, DataError, ModelError
from ensemble_kd.files import to_json
from ensemble_kd.weights import load_student

QUICK = SurfaceOptions(quick=True)
ROLES = {"student": "student", "labels": "control", "a": "teacher", "b": "teacher", "ensemble": "ensemble"}


# Networks and data of our own


def random_data(labels: Sequence[int], classes: int = 4, side: int = 6, constant: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(labels), 1, side, side), generator=generator, dtype=torch.uint8)
    if constant:
        pixels[:] = 7
    test = Images(pixels, torch.tensor(labels), torch.arange(len(labels)) + 100)
    return Dataset("noise", tuple(f"class {k}" for k in range(classes)), test, test, test)


def network(net: nn.Module, data: Dataset, mean: float = 0.4, std: float = 0.3) -> Classifier:
    preprocess = Preprocess(1, (data.image_size, data.image_size), (mean,), (std,))
    return Classifier(net, Card("own", "stock", preprocess, data.classes)).eval()


def mlp(seed: int, data: Dataset) -> nn.Sequential:
    torch.manual_seed(seed)
    pixels = data.image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 30), nn.Tanh(), nn.Linear(30, len(data.classes)))


def side_by_side(folder: Path, data: Dataset, **networks: nn.Module) -> Subjects:
    return Subjects("own", folder, data, {name: network(net, data) for name, net in networks.items()})


NOISE = random_data([0, 1, 2, 3] * 10)


# What is told of answers


def random_answers(planes: int = 7, points: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    answers = generator.integers(3, size=(planes, len(ROLES), points, points))
    return answers, generator.random((planes, len(ROLES), 3))


def test_means_equal_loops() -> None:
    answers, margins = random_answers()
    found, names = summarise(ROLES, answers, margins), list(ROLES)

    def alike(plane: int, a: str, b: str) -> float:
        return float(np.mean(answers[plane, names.index(a)] == answers[plane, names.index(b)]))

    assert [(p["first"], p["second"]) for p in found["pairs"]] == list(combinations(names, 2))
    for pair in found["pairs"]:
        values = [alike(t, pair["first"], pair["second"]) for t in range(7)]
        assert pair["reproducibility"]["value"] == pytest.approx(sum(values) / 7, abs=1e-12)
        assert pair["reproducibility"]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert (
            pair["reproducibility"]["low"]
            < pair["reproducibility"]["value"]
            < pair["reproducibility"]["high"]
        )
    assert [(g["control"], g["target"]) for g in found["gains"]] == [
        ("labels", "ensemble"),
        ("labels", "a"),
        ("labels", "b"),
    ]
    for gain in found["gains"]:
        target = gain["target"]
        values = [alike(t, "student", target) - alike(t, "labels", target) for t in range(7)]
        assert gain["gain"]["value"] == pytest.approx(sum(values) / 7, abs=1e-12)
        assert gain["gain"]["low"] < gain["gain"]["value"] < gain["gain"]["high"]
    for k, name in enumerate(names):
        regions = [components(answers[t, k]) for t in range(7)]
        counts, each = [sum(r.values()) for r in regions], [sum(r.values()) / len(r) for r in regions]
        measured = found["fragmentation"][name]
        assert measured["regions"]["value"] == pytest.approx(np.mean(counts), abs=1e-12)
        assert measured["per_class"]["value"] == pytest.approx(np.mean(each), abs=1e-12)
        assert found["margins"][name]["median"]["value"] == pytest.approx(np.median(margins[:, k]), abs=1e-12)
        assert found["margins"][name]["mean"]["value"] == pytest.approx(np.mean(margins[:, k]), abs=1e-12)


def test_the_order_of_the_planes_changes_nothing() -> None:
    answers, margins = random_answers()
    order = np.random.default_rng(1).permutation(7)
    first, second = summarise(ROLES, answers, margins), summarise(ROLES, answers[order], margins[order])
    for key, measured in (("pairs", "reproducibility"), ("gains", "gain")):
        for a, b in zip(first[key], second[key], strict=True):
            assert a[measured]["value"] == pytest.approx(b[measured]["value"], abs=1e-12)
            assert a[measured].get("sd") == pytest.approx(b[measured].get("sd"), abs=1e-12)
    for name in ROLES:
        for key, measured in (("fragmentation", "regions"), ("margins", "median"), ("margins", "mean")):
            a, b = (found[key][name][measured]["value"] for found in (first, second))
            assert a == pytest.approx(b, abs=1e-12)


def test_a_model_with_itself_gains_nothing_and_says_the_same() -> None:
    answers, margins = random_answers()
    answers[:, 1] = answers[:, 0]
    found = summarise(ROLES, answers, margins)
    assert found["pairs"][0]["reproducibility"] == {"value": 1, "low": 1, "high": 1, "sd": 0}
    assert {g["gain"]["value"] for g in found["gains"]} == {0}


def test_an_interval_of_a_gain_is_that_of_differences_plane_by_plane() -> None:
    """Planes differ much and models little: unpaired, the interval would be as wide as the planes' spread."""
    generator = np.random.default_rng(0)
    answers = np.zeros((12, len(ROLES), 10, 10), dtype=int)
    for plane in range(12):
        hard = generator.integers(10, 90)
        student = answers[plane, 0].reshape(-1)
        student[:hard] = 1
        answers[plane, 1].reshape(-1)[: hard + 5] = 1
    gain = summarise(ROLES, answers, np.ones((12, len(ROLES), 3)))["gains"][0]["gain"]
    assert gain == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})


def test_one_plane_has_no_intervals_and_says_so() -> None:
    answers, margins = random_answers(planes=1)
    found = summarise(ROLES, answers, margins)
    measured = [found["pairs"][0]["reproducibility"], found["gains"][0]["gain"]]
    measured += [
        *found["fragmentation"]["a"].values(),
        *(found["margins"]["a"][k] for k in ("median", "mean")),
    ]
    for one in measured:
        assert np.isfinite(one["value"])
        assert np.isnan([one["low"], one["high"]]).all()
        assert one["reason"] == "one plane has no spread"
    assert np.isnan(found["pairs"][0]["reproducibility"]["sd"])
    assert unexplained(json.loads(to_json(found))) == []


def test_images_without_a_boundary_are_far_in_the_median_and_not_in_the_mean() -> None:
    answers, _ = random_answers(planes=3)
    margins = np.ones((3, len(ROLES), 3))
    margins[0, 0], margins[0, 1, 0], margins[:, 2] = np.inf, np.inf, np.inf
    found = summarise(ROLES, answers, margins)["margins"]
    student, one, everywhere = (found[name] for name in ("student", "labels", "a"))
    assert (student["without_boundary"], student["images"]) == (3, 9)
    assert student["median"]["value"] == student["mean"]["value"] == 1
    assert student["median"]["high"] == np.inf
    assert student["median"]["reason"] == "3 of 9 images have no boundary in their box"
    assert one["without_boundary"] == 1
    assert everywhere["median"]["value"] == np.inf
    assert np.isnan(everywhere["mean"]["value"])
    assert everywhere["mean"]["reason"] == "9 of 9 images have no boundary in their box"
    assert found["b"]["mean"] == {"value": 1, "low": 1, "high": 1}


# What networks say on a plane


def test_networks_are_asked_at_the_images_and_between_them(tmp_path: Path) -> None:
    """Plain numpy from pixels to answers: every network sees the same images through its own preprocessing."""
    nets = {name: mlp(seed, NOISE) for seed, name in enumerate("ab")}
    networks = {"a": network(nets["a"], NOISE), "b": network(nets["b"], NOISE, mean=0.1, std=2.0)}
    three = NOISE.test.decoded[:3].double() / 255
    plane = plane_through(three)
    assert plane is not None
    seen = look(Subjects("own", tmp_path, NOISE, networks), plane, points=5)
    xs, ys = plane.axes(5)
    u, v, outside = *plane.basis.numpy(), 0.0
    for k, (name, mean, std) in enumerate((("a", 0.4, 0.3), ("b", 0.1, 2.0))):
        for row, y in enumerate(ys):
            for column, x in enumerate(xs):
                pixels = three[0].numpy() + x * u + y * v
                outside += np.mean((pixels < 0) | (pixels > 1)) / 50
                given = torch.from_numpy((pixels - mean) / std).float()[None]
                with torch.no_grad():
                    p = nets[name](given).softmax(dim=1)[0]
                assert seen.answers[k, row, column] == int(p.argmax())
                assert seen.confidence[k, row, column] == pytest.approx(float(p.max()), abs=1e-5)
    assert seen.outside == pytest.approx(outside, abs=1e-12)
    assert 0 < seen.outside < 1
    assert seen.margins.shape == (2, 3)


def test_a_network_says_the_same_to_floats_as_to_bytes(finished: DistillResult, digits: Dataset) -> None:
    student, images = load_student(finished.folder), digits.test.decoded[:50]
    with torch.no_grad():
        torch.testing.assert_close(student(images), student(images / 255), atol=1e-4, rtol=0)


def test_a_plane_in_parts_is_the_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = side_by_side(tmp_path, NOISE, a=mlp(0, NOISE), b=mlp(1, NOISE))
    plane = plane_through(NOISE.test.decoded[:3].double() / 255)
    assert plane is not None
    whole = look(subjects, plane, points=9)
    monkeypatch.setattr(surface, "_HELD", 36 * 10)
    parts = look(subjects, plane, points=9)
    np.testing.assert_array_equal(parts.answers, whole.answers)
    np.testing.assert_allclose(parts.margins, whole.margins, atol=1e-5)
    assert parts.outside == pytest.approx(whole.outside, abs=1e-12)


def test_a_shift_or_positive_scale_of_logits_changes_nothing(tmp_path: Path) -> None:
    net, louder = mlp(0, NOISE), mlp(0, NOISE)
    with torch.no_grad():
        louder[3].weight *= 5
        louder[3].bias *= 5
        louder[3].bias += 3
    found = surface_of(side_by_side(tmp_path, NOISE, a=net, b=louder), QUICK).numbers
    assert found["pairs"][0]["reproducibility"]["value"] == 1
    assert found["fragmentation"]["a"] == found["fragmentation"]["b"]
    for key in ("median", "mean"):
        assert found["margins"]["a"][key] == pytest.approx(found["margins"]["b"][key], abs=1e-4)


def test_a_network_that_always_says_one_class(tmp_path: Path) -> None:
    silent = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        silent[1].weight.zero_()
        silent[1].bias.copy_(torch.tensor([0.0, 2.0, 0.0, 0.0]))
    analysis = surface_of(side_by_side(tmp_path, NOISE, a=silent, b=mlp(0, NOISE)), QUICK)
    assert analysis.numbers["fragmentation"]["a"]["regions"] == {"value": 1, "low": 1, "high": 1}
    written = json.loads((tmp_path / "surface.json").read_text())["margins"]["a"]
    nothing = {
        "value": None,
        "low": None,
        "high": None,
        "reason": "9 of 9 images have no boundary in their box",
    }
    assert written == {"median": nothing, "mean": nothing, "images": 9, "without_boundary": 9}
    (row,) = (line for line in analysis.table().splitlines() if line.endswith("9 of 9"))
    assert row.split() == [
        "a",
        "1.00",
        "[1.00,",
        "1.00]",
        "1.00",
        "[1.00,",
        "1.00]",
        "none",
        "none",
        *["9", "of", "9"],
    ]


def test_a_network_without_numbers_is_refused(tmp_path: Path) -> None:
    broken = mlp(0, NOISE)
    with torch.no_grad():
        broken[1].weight.fill_(torch.nan)
    with refused(
        ModelError,
        "'b' gives NaN or infinite outputs between test images",
        "its weights are damaged, or it cannot take pixels a little below 0 or above 1",
        "check it with `ekd evaluate`, or leave it out",
    ):
        surface_of(side_by_side(tmp_path, NOISE, a=mlp(0, NOISE), b=broken), QUICK)


def test_the_seed_fixes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "draw_surfaces", lambda *given: {})
    subjects = side_by_side(tmp_path, NOISE, a=mlp(0, NOISE), b=mlp(1, NOISE))
    first, again = (surface_of(subjects, SurfaceOptions(triplets=4, points=5, seed=3)).numbers for _ in "ab")
    other = surface_of(subjects, SurfaceOptions(triplets=4, points=5, seed=4)).numbers
    assert first == again
    assert first["planes"] != other["planes"]
    assert len(first["planes"]) == first["settings"]["triplets"] == 4
    sampled = {sample for plane in first["planes"] for sample in plane["images"]}
    assert sampled <= set(NOISE.test.ids.tolist())


@pytest.mark.parametrize(("labels", "found"), [([0, 1] * 5, "2 classes"), ([3] * 10, "1 class")])
def test_fewer_than_three_classes_are_refused(tmp_path: Path, labels: list[int], found: str) -> None:
    data = random_data(labels)
    with refused(
        DataError,
        f"the test images of noise are of {found}",
        "a plane goes through three images of three different classes",
        "look at data with three classes or more",
    ):
        surface_of(side_by_side(tmp_path, data, a=mlp(0, data), b=mlp(1, data)), QUICK)
    assert not list(tmp_path.iterdir())


def test_equal_images_are_refused(tmp_path: Path) -> None:
    data = random_data([0, 1, 2, 3] * 3, constant=True)
    with refused(
        DataError,
        "no plane through three images was found in 100 draws",
        "images of different classes are equal, or lie on a line in the space of pixels",
        "look at the images: ekd data",
    ):
        surface_of(side_by_side(tmp_path, data, a=mlp(0, data), b=mlp(1, data)), QUICK)


# The analysis of a run


@pytest.fixture(scope="module")
def analyzed(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> SurfaceAnalysis:
    return analyze_surface(finished.folder, quick=True, out=tmp_path_factory.mktemp("surface"))


def test_a_runs_file_says_who_and_on_what(finished: DistillResult, analyzed: SurfaceAnalysis) -> None:
    numbers = json.loads((analyzed.folder / "surface.json").read_text())
    assert numbers == analyzed.numbers
    assert (numbers["source"], numbers["data"], numbers["n"]) == (str(finished.folder), "digits", 360)
    assert numbers["settings"] == {
        "quick": True,
        "seed": 0,
        "triplets": 3,
        "points": 20,
        "border": 0.1,
        "clipped": False,
    }
    names = list(numbers["roles"])
    assert names == ["student", "labels", "best-teacher", "independent", "lenet", "resnet8", "ensemble"]
    assert [(p["first"], p["second"]) for p in numbers["pairs"]] == list(combinations(names, 2))
    assert [(g["control"], g["target"]) for g in numbers["gains"]] == [
        (control, target)
        for control in ("labels", "best-teacher", "independent")
        for target in ("ensemble", "lenet", "resnet8")
    ]
    assert list(numbers["fragmentation"]) == list(numbers["margins"]) == names
    assert all(len(set(plane["classes"])) == 3 for plane in numbers["planes"])
    assert 0 < numbers["outside"] < 0.5


def test_a_runs_numbers_are_those_of_its_networks(
    finished: DistillResult, analyzed: SurfaceAnalysis, digits: Dataset
) -> None:
    """From the ids in the file and the files of weights, on our own grid."""
    student = load_student(finished.folder)
    control = load_student(finished.folder / "controls" / "labels.safetensors")
    position = {int(sample): k for k, sample in enumerate(digits.test.ids)}
    alike = []
    for plane in analyzed.numbers["planes"]:
        rows = [position[sample] for sample in plane["images"]]
        assert [digits.classes[k] for k in digits.test.known_labels[rows]] == plane["classes"]
        a, b, c = digits.test.decoded[rows].numpy().astype(float) / 255
        u = (b - a) / np.linalg.norm(b - a)
        v = (c - a) - ((c - a) * u).sum() * u
        v /= np.linalg.norm(v)
        corners = np.array([[(x * u).sum(), (x * v).sum()] for x in (a - a, b - a, c - a)])
        low, high = corners.min(axis=0), corners.max(axis=0)
        xs, ys = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 20).T
        images = torch.tensor(np.stack([a + x * u + y * v for y in ys for x in xs]), dtype=torch.float32)
        with torch.no_grad():
            alike.append(float((student(images).argmax(1) == control(images).argmax(1)).float().mean()))
    pair = analyzed.numbers["pairs"][0]
    assert pair["reproducibility"]["value"] == pytest.approx(np.mean(alike), abs=2 / 1200)
    assert pair["reproducibility"]["sd"] == pytest.approx(np.std(alike, ddof=1), abs=0.01)


def test_the_table_shows_all_models_and_gains(analyzed: SurfaceAnalysis) -> None:
    text, numbers = analyzed.table(), analyzed.numbers
    title = "digits, 3 planes through three test images, 20×20 points each: how often two models say the same"
    assert text.splitlines()[0] == title
    for name, role in numbers["roles"].items():
        shown = f"{role} {name}" if role in ("control", "teacher") else name
        assert sum(line.strip().startswith(f"{shown} ") for line in text.splitlines()) >= 2
    for pair in numbers["pairs"]:
        if pair["second"] == "ensemble":
            assert f"{100 * pair['reproducibility']['value']:.1f} % [" in text
    for gain in numbers["gains"]:
        (row,) = (
            line for line in text.splitlines() if line.strip().startswith(f"over control {gain['control']} ")
        )
        assert f"{100 * gain['gain']['value']:+.1f} [" in row


def test_the_pictures_are_there_and_are_told_in_words(analyzed: SurfaceAnalysis) -> None:
    pictures = analyzed.numbers["pictures"]
    assert {key: row["file"] for key, row in pictures.items()} == {
        "planes": "surface-planes.png",
        "controls": "surface-controls.png",
        "reproducibility": "surface-reproducibility.png",
    }
    assert sorted(path.name for path in analyzed.folder.iterdir()) == sorted(
        ["surface.json", *(row["file"] for row in pictures.values())]
    )
    for row in pictures.values():
        with Image.open(analyzed.folder / row["file"]) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 50
    (value,) = (
        pair["reproducibility"]["value"]
        for pair in analyzed.numbers["pairs"]
        if (pair["first"], pair["second"]) == ("student", "ensemble")
    )
    assert f"student and ensemble on {100 * value:.1f} %" in pictures["planes"]["alt"]
    assert f"student and ensemble on {100 * value:.1f} %" in pictures["controls"]["alt"]
    assert "labels and ensemble on" in pictures["controls"]["alt"]


def test_models_are_compared_without_a_run(
    finished: DistillResult, analyzed: SurfaceAnalysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.folder)
    models = ["student.safetensors", "controls/labels.safetensors"]
    found = analyze_surface(models=models, data="digits", quick=True, out=tmp_path / "out")
    assert found.folder == tmp_path / "out"
    assert found.numbers["roles"] == dict.fromkeys(models, "model")
    (pair,) = found.numbers["pairs"]
    assert pair["reproducibility"] == analyzed.numbers["pairs"][0]["reproducibility"]
    assert found.numbers["gains"] == []
    assert list(found.numbers["pictures"]) == ["planes", "reproducibility"]
    assert "gain" not in found.table()


def test_a_run_and_models_together_are_refused(finished: DistillResult, tmp_path: Path) -> None:
    with refused(
        ConfigError,
        "models: name two or more, each once, and no run beside them",
        "pairs of models are compared",
        "say --models a,b --data NAME, or a run folder alone",
    ):
        analyze_surface(finished.folder, models="lenet,resnet8", out=tmp_path)


def test_the_verb_prints_the_numbers(finished: DistillResult, tmp_path: Path) -> None:
    command = ["analyze-surface", str(finished.folder), "--points", "4", "--triplets", "2", "--json"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert f"pictures and numbers in {tmp_path}: surface-planes.png" in result.stderr
    written = json.loads((tmp_path / "surface.json").read_text())
    assert json.loads(result.stdout) == {"folder": str(tmp_path), **written}
    assert (written["settings"]["triplets"], written["settings"]["points"]) == (2, 4)
    assert ensemble_kd.analyze_surface is analyze_surface


def test_the_verb_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["analyze-surface", str(tmp_path), "--points", "1"])
    assert result.exit_code == 2
    assert "points" in result.stderr
    assert "Traceback" not in result.stderr


# Pictures


def shown_planes(classes: Sequence[str], models: Sequence[str], points: int = 12) -> list[Shown]:
    generator = np.random.default_rng(0)
    return [
        Shown(
            thumbnails=generator.random((3, 9, 5, 3)),
            classes=[classes[k] for k in (0, 1, 2)],
            corners=np.array([[0, 0], [3, 0], [1, 2.5]]),
            box=(-0.3, 3.3, -0.25, 2.75),
            answers={name: generator.integers(len(classes), size=(points, points)) for name in models},
            confidence={name: generator.random((points, points)) for name in models},
        )
        for _ in range(2)
    ]


HOSTILE = [r"x$\frac$", "[/b]", "<script>", "_hidden", "a_b^c", "$", "%s{0}", "y" * 200, "猫"]


@pytest.mark.parametrize("classes", [HOSTILE, [f"class {k}" for k in range(100)]], ids=["hostile", "100"])
def test_planes_are_drawn_whatever_the_names(tmp_path: Path, classes: list[str]) -> None:
    models = HOSTILE[:4]
    planes = shown_planes(classes, models)
    path = tmp_path / "x.png"
    draw_planes(
        planes,
        dict(zip(models, models, strict=True)),
        [(models[0], models[1])],
        Palette.of(planes, classes),
        path,
    )
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > picture.height > 300


def test_a_point_is_its_classs_colour_as_opaque_as_the_model_is_sure() -> None:
    palette = Palette(["a", "b"], {0: np.array([1.0, 0, 0]), 1: np.array([0, 0.5, 0])})
    painted = palette.paint(np.array([[0, 1], [1, 0]]), np.array([[1, 1], [0.5, 0]]))
    np.testing.assert_allclose(painted, [[[1, 0, 0], [0, 0.5, 0]], [[0.5, 0.75, 0.5], [1, 1, 1]]])


def test_up_to_ten_classes_look_alike_in_all_pictures_and_many_by_what_occurs() -> None:
    few, many = ([f"class {k}" for k in range(count)] for count in (10, 1000))
    planes = shown_planes(few, ["a"])
    planes = [replace(plane, answers={"a": plane.answers["a"] % 3}) for plane in planes]
    assert list(Palette.of(planes, few).colours) == list(range(10))
    assert list(Palette.of(planes, many).colours) == [0, 1, 2]


def test_ten_colours_are_seaborns_and_a_hundred_can_still_be_told_apart() -> None:
    np.testing.assert_allclose(distinct_colours(10), sns.color_palette("colorblind", 10))
    colours = distinct_colours(100)
    np.testing.assert_array_equal(colours[:10], distinct_colours(10))
    assert (colours >= 0).all()
    assert (colours <= 1).all()
    for eye in (np.eye(3), plots_surface._DEUTERANOPIA):
        lab = plots_surface._lab(colours, eye)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)[~np.eye(100, dtype=bool)]
        assert apart.min() > 5  # 2.3 is just noticeable


def test_lightness_and_hues_are_those_of_cielab() -> None:
    """Reference values of sRGB's primaries under D65 (Lindbloom's calculator)."""
    primaries = np.array(
        [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]], dtype=float
    )
    expected = [
        [100, 0, 0],
        [0, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [53.39, 0, 0],
    ]
    np.testing.assert_allclose(plots_surface._lab(primaries, np.eye(3)), expected, atol=0.05)


# The toy example


def test_the_toy_example_draws_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[1] / "examples" / "toy_surface.py"
    spec = importlib.util.spec_from_file_location("toy_surface", path)
    assert spec is not None
    assert spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    alike = toy.main(fast=True)
    assert list(alike) == ["student", "control on labels"]
    for shares in alike.values():
        assert list(shares) == ["teacher relu", "teacher tanh", "teacher waves", "ensemble"]
        assert all(0.5 < share < 1 for share in shares.values())
    with Image.open("toy_surface.png") as picture:
        picture.load()
        assert picture.width > 4 * picture.height
