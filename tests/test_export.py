"""Exported folders: what is in them, that others reload them, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from support import logged, message, refused
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import files, portable
from ensemble_kd.classifier import Card, Preprocess
from ensemble_kd.cli import app
from ensemble_kd.errors import ConfigError, ModelError, RunError
from ensemble_kd.exporting import ExportResult, export
from ensemble_kd.timm_form import timm_entry

RELOAD = Path(__file__).parents[1] / "benchmarks" / "reload_export.py"
SMALL = {"role": "control", "epochs": 1, "limit_train": 200}
MODELS = {
    "lenet": ("lenet", {}),
    "mobilenet": ("timm:mobilenetv3_small_050", {"size": 32, "stem": "imagenet"}),
    "vit": ("timm:test_vit", {"size": 32}),
    "squeezenet": ("tv:squeezenet1_1", {"size": 32}),
}
EXPORTS = [
    ("lenet", "timm"), ("lenet", "onnx"), ("lenet", "torch"), ("mobilenet", "timm"), ("vit", "timm"),
    ("squeezenet", "torch"), ("squeezenet", "safetensors"),
]  # fmt: skip
BATCHES = [1, 7, 32]


class Exported(NamedTuple):
    """An export and the images and logits of the run's network that it was held against."""

    result: ExportResult
    inputs: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: ensemble_kd.train(model, **SMALL, **options, out=folder / name).folder
        for name, (model, options) in MODELS.items()
    }


@pytest.fixture(scope="module")
def exported(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Exported]:
    """Each of `EXPORTS`, with inputs and expected logits as files."""
    place = tmp_path_factory.mktemp("exports")
    images = ensemble_kd.load_data("digits").test.pixels[:40]
    found = {}
    for name, kind in EXPORTS:
        student = ensemble_kd.load_student(runs[name])
        with torch.no_grad():
            logits = torch.cat([student(batch) for batch in images.split(BATCHES)])
        inputs = place / f"{name}-{kind}.safetensors"
        tensors = {"inputs": student.card.preprocess(images), "logits": logits}
        safetensors.torch.save_file(tensors, inputs)
        found[name, kind] = Exported(export(runs[name], format=kind, out=place / f"{name}-{kind}"), inputs)
    return found


@pytest.fixture(scope="module")
def reloaded(exported: dict[tuple[str, str], Exported]) -> dict[tuple[str, str], dict[str, Any]]:
    """What another process, with the library of each format alone, finds."""
    paths = [str(path) for entry in exported.values() for path in (entry.result.folder, entry.inputs)]
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums differ in their last bits by the number of threads
    result = subprocess.run([sys.executable, str(RELOAD), *paths], capture_output=True, text=True, env=alike)
    assert result.returncode == 0, result.stderr
    return dict(zip(exported, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("name", "kind"), EXPORTS)
def test_an_export_reloads_in_a_fresh_process(name, kind, exported, reloaded):
    found, result = reloaded[name, kind], exported[name, kind].result
    bound = 0 if kind in ("timm", "safetensors") else 1e-5
    assert found["max_difference"] <= bound
    assert found["argmax_identical"]
    assert found["images"] == 40
    checked = result.checked
    assert checked["max_difference"] <= bound
    assert {k: checked[k] for k in ("images", "of", "batches", "argmax_identical")} == {
        "images": 40, "of": "images of the test split", "batches": BATCHES, "argmax_identical": True,
    }  # fmt: skip
    card = (result.folder / "README.md").read_text()
    assert (
        "Reloaded and held against the run's network on 40 images of the test split, in batches of 1, 7, 32: "
        f"logits differ by at most {checked['max_difference']:g}, the likeliest class is the same for all."
    ) in card


@pytest.mark.parametrize(("name", "kind"), EXPORTS)
def test_a_folder_holds_all_that_is_needed_and_no_place_of_this_machine(name, kind, exported, runs):
    folder = exported[name, kind].result.folder
    graph = {"onnx": {"model.onnx"}, "torch": {"model.pt2"}}.get(kind, set())
    always = {
        "config.json",
        "model.safetensors",
        "labels.json",
        "README.md",
        "check.safetensors",
        "SHA256SUMS",
    }
    assert {path.name for path in folder.iterdir()} == always | graph
    assert json.loads((folder / "labels.json").read_text()) == list("0123456789")
    config = json.loads((folder / "config.json").read_text())
    pre = ensemble_kd.load_student(runs[name]).card.preprocess
    assert config["num_classes"] == 10
    assert config["label_names"] == list("0123456789")
    about = config["pretrained_cfg"]
    assert about["input_size"] == [pre.channels, *pre.size]
    assert (about["mean"], about["std"]) == (list(pre.mean), list(pre.std))
    assert about["interpolation"] == "bilinear"
    manifest = json.loads((runs[name] / "manifest.json").read_text())
    assert config["ensemble_kd"]["run"]["data_fingerprint"] == manifest["data"]["fingerprint"]
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in (
            str(runs[name].parent),
            sys.prefix,
            str(Path(ensemble_kd.__file__).parent),
            "site-packages",
        ):
            assert place.encode() not in content, f"{place} in {path.name}"


def test_weights_are_the_run_s_own_bytes_but_for_timm(exported, runs):
    (other,) = [exported["squeezenet", "safetensors"].result.folder]
    original = (runs["squeezenet"] / "model.safetensors").read_bytes()
    assert (other / "model.safetensors").read_bytes() == original
    with safetensors.safe_open(exported["lenet", "timm"].result.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("kind", ["safetensors", "timm", "torch"])
def test_two_exports_are_equal_byte_for_byte(kind, runs, tmp_path):
    folders = [export(runs["lenet"], format=kind, out=tmp_path / name).folder for name in ("a", "b")]
    sums = [(folder / "SHA256SUMS").read_text() for folder in folders]
    assert sums[0] == sums[1]
    result = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folders[0], capture_output=True, text=True)
    assert (result.returncode, result.stdout.count(": OK")) == (0, len(sums[0].splitlines()))


def test_eight_bits_are_measured_and_the_model_beside_them_is_the_same_as_without(runs, exported, tmp_path):
    result = export(runs["lenet"], format="onnx", int8=True, out=tmp_path / "e")
    plain = (exported["lenet", "onnx"].result.folder / "model.onnx").read_bytes()
    assert (result.folder / "model.onnx").read_bytes() == plain
    eight = result.config["ensemble_kd"]["int8"]
    assert (result.folder / eight["file"]).stat().st_size < 0.6 * len(plain)
    assert eight["calibration_images"] == 200
    test = ensemble_kd.load_data("digits").test
    run = portable.onnx_graph(result.folder / eight["file"])
    logits = run(ensemble_kd.load_student(result.folder).card.preprocess(test.pixels))
    right = float((logits.argmax(1) == test.labels).double().mean())
    assert eight["accuracy_after"]["value"] == pytest.approx(right)
    before = ensemble_kd.evaluate(runs["lenet"])["models"]["lenet"]["accuracy"]
    assert eight["accuracy_before"] == pytest.approx(before)
    assert eight["difference"]["value"] == pytest.approx(right - before["value"])
    after = f"{100 * right:.2f} % [{100 * eight['accuracy_after']['low']:.2f}"
    assert f"{100 * before['value']:.2f} %" in (result.folder / "README.md").read_text()
    assert after in (result.folder / "README.md").read_text()


def test_preprocessing_can_be_inside_the_graph(runs, tmp_path):
    result = export(runs["lenet"], format="torch", with_preprocess=True, out=tmp_path / "e")
    graph = torch.export.load(result.folder / "model.pt2").module()
    images = ensemble_kd.load_data("digits").test.pixels[:9]
    with torch.no_grad():
        torch.testing.assert_close(graph(images), ensemble_kd.load_student(runs["lenet"])(images))
    assert (
        "uint8 (B, 1, 8, 8): resizing and normalising are inside the graph"
        in (result.folder / "README.md").read_text()
    )


def test_timm_without_pretrained_gives_random_weights_and_the_card_says_so(exported, runs):
    folder = exported["lenet", "timm"].result.folder
    weights = ensemble_kd.load_student(runs["lenet"]).net.state_dict()
    for pretrained in (True, False):
        net = timm.create_model(f"local-dir:{folder}", pretrained=pretrained)
        same = all(torch.equal(values, weights[name]) for name, values in net.state_dict().items())
        assert same == pretrained
    text = (folder / "README.md").read_text()
    assert "**Without `pretrained=True` timm silently gives random weights.**" in text
    assert "import ensemble_kd  # registers its networks with timm\nimport timm\n" in text


def test_timm_knows_the_project_s_own_networks(exported):
    assert timm.list_models("ekd_*") == ["ekd_cifar_quick", "ekd_lenet", "ekd_resnet8", "ekd_resnet20"]
    for name in timm.list_models("ekd_*"):
        net = timm.create_model(name, num_classes=7, in_chans=3, img_size=32)
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    data = timm.data.resolve_model_data_config(
        timm.create_model(f"local-dir:{exported['lenet', 'timm'].result.folder}")
    )
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ([1, 28, 28], 1.0, "bilinear")


def test_a_student_s_card_has_the_run_s_numbers(finished, tmp_path):
    result = export(finished.folder, out=tmp_path / "e")
    text = (result.folder / "README.md").read_text()
    for name, row in finished.metrics["models"].items():
        shown = name if row["role"] in ("student", "ensemble") else f"{row['role']} {name}"
        accuracy = row["accuracy"]
        cell = f"{100 * accuracy['value']:.2f} % [{100 * accuracy['low']:.2f}, {100 * accuracy['high']:.2f}]"
        assert f"| {shown} | {cell} |" in text
    assert "taught by lenet, resnet8" in text
    assert "points of accuracy against labels alone" in text
    assert text.startswith("---\npipeline_tag: image-classification\n")
    student = ensemble_kd.load_student(result.folder)
    assert student.fingerprint() == finished.student.fingerprint()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("hf:org/name", "hf:org/name"),
        ("hf:org/name:part", "hf:org/name:part"),
        ("hf:/home/me/cats", "hf:cats"),
        ("hf:~/cats", "hf:cats"),
        ("hf:../cats", "hf:cats"),
        ("hf-hub:org/net", "hf-hub:org/net"),
        ("imagefolder:/home/me/cats/", "imagefolder:cats"),
    ],
)
def test_no_folder_of_this_machine_is_told_and_names_of_the_hub_are(name, kept):
    from ensemble_kd.exporting import _without_folders

    assert _without_folders(name) == kept


def test_teachers_that_the_hub_has_are_its_base_models():
    from ensemble_kd.model_card import _hub_id

    names = [
        "timm:resnet18.a1_in1k",
        "hf-hub:org/net#2",
        "resnet18",
        "runs/mine",
        "resnet18@w.v1.pth",
        "tv:vgg16@X",
    ]
    assert list(map(_hub_id, names)) == ["timm/resnet18.a1_in1k", "org/net", "", "", "", ""]
    assert (
        _hub_id("resnet18#3", True) == "timm/resnet18.a1_in1k"
    )  # of published weights, by timm's default tag
    assert _hub_id("tv:vgg16", True) == ""


def test_an_export_is_a_teacher(exported, few_digits):
    folder = exported["lenet", "timm"].result.folder
    teacher = ensemble_kd.load_teacher(str(folder), few_digits)
    assert teacher.fingerprint == ensemble_kd.load_student(folder).fingerprint()


NAMES = ["<script>alert(1)</script>", "猫", "two\nlines|`x`"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images in folders with names that could harm a page, a table or a terminal."""
    root = tmp_path_factory.mktemp("odd")
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "photos" / name.replace("/", "∕")).mkdir(parents=True)
        for image in range(10):
            pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name.replace("/", "∕") / f"{number}-{image}.png")
    options = {"role": "control", "epochs": 1, "batch_size": 4}
    return ensemble_kd.train(
        "lenet", data=f"imagefolder:{root / 'photos'}", **options, out=root / "run"
    ).folder


def test_names_of_classes_are_kept_and_harm_nothing(odd, tmp_path):
    folder = export(odd, format="timm", out=tmp_path / "e").folder
    names = sorted(name.replace("/", "∕") for name in NAMES)
    assert json.loads((folder / "labels.json").read_text()) == names
    assert list(ensemble_kd.load_student(folder).classes) == names
    text = (folder / "README.md").read_text()
    assert "<script>" not in text
    assert "- 3 classes: &lt;script&gt;alert(1)&lt;∕script&gt;, two lines\\|\\`x\\`, 猫\n" in text
    assert "imagefolder:photos" in text
    assert str(odd.parent) not in text + (folder / "config.json").read_text()


def test_without_the_run_s_images_made_up_ones_are_taken(odd, tmp_path):
    photos = odd.parent / "photos"
    (photos / "猫" / "more.png").write_bytes(
        (photos / "猫" / next((photos / "猫").iterdir()).name).read_bytes()
    )
    with logged() as lines:
        result = export(odd, out=tmp_path / "e")
    why = "they are others than those that it was trained on"
    assert (
        f"WARNING: the export is checked on made-up images, as those of the run cannot be had: {why}" in lines
    )
    assert result.checked["of"] == "made-up images"
    assert "held against the run's network on 40 made-up images" in (result.folder / "README.md").read_text()
    inside = export(odd, format="torch", with_preprocess=True, out=tmp_path / "f")
    assert inside.checked["of"] == "made-up images"
    with refused(
        RunError, f"int8: the images of {odd} cannot be had", why, "bring them back, or leave int8 out"
    ):
        export(odd, format="onnx", int8=True, out=tmp_path / "g")


CODE = """
from torch import nn

def make(num_classes, channels, size):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (size - 2) ** 2, num_classes))
"""


def test_a_module_of_the_user_s_own(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    name = f"py:{tmp_path / 'mine.py'}:make"
    run = ensemble_kd.train(name, **SMALL, out=tmp_path / "run").folder
    student = ensemble_kd.load_student(f"{name}@{run / 'model.safetensors'}")
    images = ensemble_kd.load_data("digits").test.pixels[:5]
    plain = export(run, out=tmp_path / "plain").folder
    again = ensemble_kd.load_student(f"{name}@{plain / 'model.safetensors'}")
    assert torch.equal(again(images), student(images))
    graph = torch.export.load(export(run, format="torch", out=tmp_path / "t").folder / "model.pt2").module()
    torch.testing.assert_close(graph(student.card.preprocess(images)), student(images))
    assert 'load_student("py:mine.py:make@PATH/model.safetensors")' in (plain / "README.md").read_text()
    why = "it is code of your own, which timm does not register"
    with refused(
        ModelError, "timm cannot load py:mine.py:make", why, "say --format safetensors, onnx or torch"
    ):
        export(run, format="timm", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_networks_that_timm_would_build_otherwise_are_refused(runs, tmp_path):
    out, fix = tmp_path / "e", "say --format safetensors, onnx or torch"
    with refused(
        ModelError, "timm cannot load tv:squeezenet1_1",
        "it is torchvision's own network, which timm does not register", fix,
    ):  # fmt: skip
        export(runs["squeezenet"], format="timm", out=out)
    small = Card(
        "timm:mobilenetv3_small_050", "small", Preprocess(3, (32, 32), (0.5,) * 3, (0.5,) * 3), ("a", "b")
    )
    with refused(
        ModelError,
        "timm cannot load mobilenetv3_small_050 in its small-image form",
        "timm registers the stock form alone, and would build another network",
        f"{fix}; or train it in that form: --stem imagenet",
    ):
        timm_entry(small)
    assert timm_entry(replace(small, form="stock"))["model_args"] == {"in_chans": 3}
    assert timm_entry(replace(small, model="timm:test_vit"))["model_args"] == {"in_chans": 3, "img_size": 32}
    assert not out.exists()


def test_what_is_no_finished_whole_run_is_refused(runs, tmp_path):
    with refused(
        RunError, f"{tmp_path} is no run folder", "it has no config.yaml and status.json",
        "name a folder made by `ekd distill`",
    ):  # fmt: skip
        export(tmp_path)
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(runs["lenet"]), str(run)], check=True)
    weights = bytearray((run / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (run / "model.safetensors").write_bytes(weights)
    with refused(
        RunError, f"{run / 'model.safetensors'} is not what the run wrote",
        "its SHA-256 is not the one in status.json",
        f"bring it back; see what else is damaged: ekd verify {run}",
    ):  # fmt: skip
        export(run)
    (run / "metrics.json").unlink()
    with refused(RunError, f"{run} did not finish", "it has no metrics.json", f"go on: ekd resume {run}"):
        export(run)


def test_an_export_is_replaced_only_where_it_is_wanted_and_is_one(runs, tmp_path):
    out = tmp_path / "e"
    (out / "mine").mkdir(parents=True)
    what, why = f"{out} is not empty", "an export is a folder of its own"
    with refused(
        RunError, what, why, "name another folder: --out PATH (what is no export is never overwritten)"
    ):
        export(runs["lenet"], out=out, overwrite=True)
    (out / "mine").rmdir()
    export(runs["lenet"], out=out)
    with refused(RunError, what, why, "replace it with --overwrite, or name another folder: --out PATH"):
        export(runs["lenet"], out=out)
    export(runs["lenet"], out=out, format="timm", overwrite=True)
    assert json.loads((out / "config.json").read_text())["ensemble_kd"]["format"] == "timm"
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_as_a_whole(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    path = tmp_path / "e"
    files.write_summed_folder(path, {"a": b"old", "b": b"old"})

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(files.DiskError):
            files.write_summed_folder(path, {"a": b"new"})
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "SHA256SUMS"} == {
        "a": b"old",
        "b": b"old",
    }
    (tmp_path / ".e.0123.tmp").mkdir()
    files.write_summed_folder(path, {"a": b"new"})
    assert sorted(p.name for p in path.iterdir()) == ["SHA256SUMS", "a"]
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_without_the_extra_it_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "find_spec", lambda name: None if name == "onnxscript" else name)
    with refused(
        ConfigError, "ONNX needs packages that are not installed: onnxscript",
        "they are an extra, which few need", "pip install 'ensemble-kd[onnx]'",
    ):  # fmt: skip
        export(runs["lenet"], format="onnx", out=tmp_path / "e")


def test_the_command_line(runs, tmp_path):
    out = tmp_path / "e"
    result = CliRunner().invoke(app, ["export", str(runs["lenet"]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        str(out),
        "40 images of the test split: logits differ by at most 0, the likeliest class is the same",
    ]
    asked = ["export", str(runs["lenet"]), "--out", str(out), "--overwrite", "--json", "--format", "timm"]
    assert json.loads(CliRunner().invoke(app, asked).stdout)["format"] == "timm"
    wrong = CliRunner().invoke(app, ["export", str(runs["lenet"]), "--int8"])
    assert wrong.exit_code == 2
    expected = message(
        "int8: the format safetensors has no such thing",
        "only onnx can have it",
        "say --format onnx, or leave it out",
    )
    assert wrong.stderr == f"error: {expected}\n"
