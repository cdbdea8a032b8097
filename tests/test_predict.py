"""Names for image files, by runs and exports; broken files are told and stop nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import message, refused
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd.cli import app
from ensemble_kd.errors import ConfigError, WeightsError
from ensemble_kd.exporting import export
from ensemble_kd.portable import onnx_graph
from ensemble_kd.predicting import Answer, Predictions, predict_images
from ensemble_kd.runs import Run

COUNT = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images of digits as PNGs, in two folders."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for number, pixels in enumerate(ensemble_kd.load_data("digits").test.pixels[:COUNT]):
        folder = root if number < COUNT // 2 else root / "more"
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def exports(finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The finished run in every format, and in eight bits."""
    root = tmp_path_factory.mktemp("exports")
    found = {kind: export(finished.folder, format=kind, out=root / kind).folder for kind in ("timm", "torch")}
    found["safetensors"] = export(finished.folder, out=root / "safetensors").folder
    found["onnx"] = export(
        finished.folder, format="onnx", with_preprocess=True, int8=True, out=root / "onnx"
    ).folder
    return found


def names_and_shares(result: Predictions) -> tuple[list[str], torch.Tensor]:
    return [a.image for a in result.answers], torch.tensor([a.probabilities for a in result.answers])


def test_a_run_says_to_files_what_it_said_to_the_test_split(finished, photos):
    result = predict_images(finished.folder, photos, top=10)
    logits, _ = Run(finished.folder).predictions()
    shares = torch.softmax(logits["student"][:COUNT].double(), dim=1)
    assert [Path(answer.image).name for answer in result.answers] == [f"{n:02}.png" for n in range(COUNT)]
    assert result.failed == []
    for answer, expected in zip(result.answers, shares, strict=True):
        order = expected.argsort(descending=True)
        assert answer.classes == [str(int(place)) for place in order]
        assert answer.probabilities == pytest.approx(expected[order].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["safetensors", "timm", "torch"])
def test_an_export_says_the_same_without_the_run(kind, finished, exports, photos):
    wanted, ours = names_and_shares(predict_images(finished.folder, photos, top=1))
    names, shares = names_and_shares(predict_images(exports[kind], [photos / "more", photos], top=1))
    assert names == wanted[COUNT // 2 :] + wanted
    torch.testing.assert_close(shares[COUNT // 2 :], ours, rtol=0, atol=1e-6)


def test_onnxruntime_answers_for_onnx_in_eight_bits_where_there_are(exports, photos):
    result = predict_images(exports["onnx"], photos, top=1)
    pixels = ensemble_kd.load_data("digits").test.pixels[:COUNT]
    logits = onnx_graph(exports["onnx"] / "model-int8.onnx")(pixels).double()
    shares = names_and_shares(result)[1][:, 0].double()
    torch.testing.assert_close(shares, logits.softmax(dim=1).amax(dim=1), rtol=0, atol=1e-6)
    assert [int(answer.classes[0]) for answer in result.answers] == logits.argmax(dim=1).tolist()


def test_a_lone_file_of_weights_will_do(finished, exports, photos):
    image = str(photos / "03.png")
    (answer,) = predict_images(exports["timm"] / "model.safetensors", image).answers
    assert answer == predict_images(finished.folder / "student.safetensors", image).answers[0]
    assert len(answer.classes) == 5


def test_files_are_turned_and_coloured_as_those_of_a_data_set(finished, photos, tmp_path):
    upright = Image.open(photos / "05.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    upright.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    answers = predict_images(finished.folder, [photos / "05.png", tmp_path / "turned.png"]).answers
    assert answers[0].classes == answers[1].classes
    assert answers[0].probabilities == pytest.approx(answers[1].probabilities)


def test_broken_files_are_told_and_the_others_answered(finished, photos, tmp_path):
    for name, content in (
        ("a.jpg", b"<html>no</html>"),
        ("b.png", b""),
        ("c.png", (photos / "01.png").read_bytes()[:60]),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "empty").mkdir()
    named = [tmp_path, tmp_path / "empty", tmp_path / "gone.png", photos / "01.png"]
    result = predict_images(finished.folder, named)
    assert [answer.image for answer in result.answers] == [str(photos / "01.png")]
    told = {problem.what.replace(str(tmp_path), "…"): problem.why for problem in result.failed}
    assert told.pop("cannot read …/c.png")
    assert told == {
        "no images in …/empty": "known endings: .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp",
        "cannot read …/gone.png": "there is nothing at that path",
        "cannot read …/a.jpg": "it is a web page, saved under an image's name",
        "cannot read …/b.png": "the file is empty",
        "cannot read …/link.png": "it is a link to a file that is not there",
    }


def test_the_command_line(finished, photos, tmp_path):
    table, gone = tmp_path / "answers.csv", tmp_path / "gone.png"
    asked = [
        "predict",
        str(finished.folder),
        str(photos / "01.png"),
        str(gone),
        "--top",
        "2",
    ]
    result = CliRunner().invoke(app, [*asked, "--csv", str(table)])
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: "
        + message(f"cannot read {gone}", "there is nothing at that path", "check the path")
        + "\n"
    )
    (answer,) = predict_images(finished.folder, photos / "01.png", top=2).answers
    cells = [f"{name} {100 * share:.1f} %" for name, share in zip(*answer[1:], strict=True)]
    assert result.stdout.splitlines()[-1].split(None, 1)[0] == answer.image
    assert all(cell in result.stdout for cell in cells)
    (heads, row) = csv.reader(table.read_text().splitlines())
    assert heads == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert row == [answer.image, *(c for n, p in zip(*answer[1:], strict=True) for c in (n, f"{p:.6f}"))]
    as_json = CliRunner().invoke(app, [*asked, "--json"])
    assert json.loads(as_json.stdout) == {
        "predictions": [answer._asdict()],
        "failed": [{"what": f"cannot read {gone}", "why": "there is nothing at that path"}],
    }
    nothing = CliRunner().invoke(app, ["predict", str(finished.folder)])
    wanted = message("no images are named", "there is nothing to look at", "name image files, or a folder")
    assert (nothing.exit_code, nothing.stderr) == (2, f"error: {wanted}\n")


def test_names_of_any_kind_stay_in_their_cells():
    names = ["a,b", "[/b]", "two\nlines"]
    result = Predictions([Answer("x.png", names, [0.5, 0.3, 0.2])], [])
    ((_, row),) = [list(csv.reader(result.csv().splitlines(keepends=True)))]
    assert row[1::2] == names
    assert "a,b 50.0 %   [/b] 30.0 %   two lines 20.0 %" in result.table()


def test_models_that_cannot_be_loaded(tmp_path, exports, photos):
    path = tmp_path / "gone"
    with refused(
        WeightsError, f"no run folder or file at {path}", "there is nothing at that path", "check the path"
    ):
        predict_images(path, photos)
    with refused(ConfigError, "model is missing", "it has no default", "name it, or say --set model=…"):
        predict_images(images=photos)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "SHA256SUMS").write_text("")
    (tmp_path / "e" / "config.json").write_text("{}")
    with refused(
        WeightsError, f"{tmp_path / 'e' / 'config.json'} is not that of an exported folder", "no 'ensemble_kd'",
        "export the run again: ekd export RUN",
    ):  # fmt: skip
        predict_images(tmp_path / "e", photos)
