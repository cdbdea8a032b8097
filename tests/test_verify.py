"""Every changed byte of a run, an export, a teacher or a target store is found."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import message, refused
from typer.testing import CliRunner

from ensemble_kd import files, portable
from ensemble_kd.checkpoints import Checkpoints, Snapshot
from ensemble_kd.cli import app
from ensemble_kd.errors import RunError
from ensemble_kd.exporting import export
from ensemble_kd.runs import Run
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.library import keep
from ensemble_kd.teachers.store import Store
from ensemble_kd.verifying import Finding, Verification, verify


def flip(path: Path, seed: int) -> None:
    """Flip one bit somewhere in the file."""
    content = bytearray(path.read_bytes())
    generator = random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def noticed(folder: Path, name: str) -> bool:
    """Whether that file is found damaged; of a list of checksums, a file whose checksum was changed may be."""
    damaged = {finding.what for finding in verify(folder).damaged}
    return bool(damaged) if Path(name).name in (files.SUMS, files.MANIFEST) else name in damaged


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an export in it and a checkpoint left over."""
    folder = tmp_path_factory.mktemp("verify") / "run"
    shutil.copytree(finished.folder, folder)
    export(folder)
    weights = {"w": torch.arange(10.0)}
    Checkpoints(folder / "checkpoints" / "student", {}).save(3, Snapshot(weights, weights, {}, {"steps": 3}))
    return folder


@pytest.fixture(scope="module")
def onnx(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished.folder, format="onnx", out=tmp_path_factory.mktemp("onnx") / "e").folder


@pytest.fixture(scope="module")
def torches(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished.folder, format="torch", out=tmp_path_factory.mktemp("torch") / "e").folder


@pytest.fixture
def teacher(own_cache: Path, finished) -> Path:
    return keep(finished.student, {"model": "lenet", "data": "digits", "seed": 0}, {"history": []})


@pytest.fixture
def store(own_cache: Path) -> Path:
    built = Store.open({"label": "t", "data": "digits", "teacher": "x"}, Layout(50, 10))
    with built.building(2):
        for view in range(2):
            for rows in built.missing(view):
                built.put(view, rows, torch.randn(len(rows), 10))
    return built.folder


def test_a_whole_run_is_found_so(whole):
    result = verify(whole)
    assert (result.kind, result.damaged) == ("run", [])
    told = [finding.what for finding in result.findings]
    kept = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert kept <= set(told)
    assert {"student.safetensors, loaded", "export/safetensors/the network, reloaded"} <= set(told)
    assert "teacher resnet8/model.safetensors" in told
    assert any(what.startswith("targets of lenet ") for what in told)


def test_a_flipped_bit_in_any_file_of_a_run_is_found(whole, tmp_path):
    names = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    assert len(names) > 20
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        flip(folder / name, number)
        assert noticed(folder, name), name
        shutil.rmtree(folder)


def test_a_flipped_bit_in_any_file_of_an_export_is_found(onnx, tmp_path):
    names = sorted(path.name for path in onnx.iterdir())
    assert len(names) == 7
    for seed in range(3):
        for name in names:
            folder = tmp_path / f"{seed}-{name}"
            shutil.copytree(onnx, folder)
            flip(folder / name, seed)
            assert noticed(folder, name), (name, seed)
    shutil.copytree(onnx, tmp_path / "more")
    (tmp_path / "more" / ".gitattributes").write_text("*.onnx filter=lfs\n")
    assert verify(tmp_path / "more").damaged == []
    assert verify(tmp_path / "more").findings[-1].ok
    (tmp_path / "more" / "extra.bin").write_bytes(b"x")
    (tmp_path / "more" / "labels.json").unlink()
    assert {str(finding) for finding in verify(tmp_path / "more").damaged} == {
        "damaged      extra.bin: SHA256SUMS does not name it",
        "damaged      labels.json: it is missing",
    }


@pytest.mark.parametrize("kind", ["teacher", "store"])
def test_a_flipped_bit_in_a_teacher_or_a_store_is_found(kind, request):
    folder = request.getfixturevalue(kind)
    assert verify(folder).damaged == []
    assert verify(folder).kind == {"teacher": "teacher", "store": "target store"}[kind]
    for path in sorted(p for p in folder.iterdir() if p.stat().st_size):
        for seed in range(20):
            content = path.read_bytes()
            flip(path, seed)
            assert verify(folder).damaged, (path.name, seed)
            path.write_bytes(content)


def test_an_export_that_says_something_else_than_it_did_is_found(whole, tmp_path):
    folder = tmp_path / "e"
    shutil.copytree(whole / "export" / "safetensors", folder)
    kept = safetensors.torch.load_file(folder / "check.safetensors")
    safetensors.torch.save_file(kept | {"logits": kept["logits"] + 0.5}, folder / "check.safetensors")
    digests = {path.name: files.sha256_file(path) for path in folder.iterdir() if path.name != files.SUMS}
    (folder / files.SUMS).write_text(files.sums_of(digests))
    told = [str(finding) for finding in verify(folder).damaged]
    assert told == ["damaged      the network, reloaded: its logits differ by up to 0.5 from the kept ones"]


def test_a_pt2_is_compared_but_not_loaded(torches, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *args, **options: pytest.fail("it was loaded"))
    result = verify(torches)
    assert result.damaged == []
    assert [str(finding) for finding in result.findings if finding.what.startswith("model")] == [
        "ok           model.pt2",
        "ok           model.safetensors",
    ]
    assert result.findings[-1].what == "the network, reloaded from model.safetensors (a .pt2 can run code)"


def test_without_the_extra_an_export_is_compared_alone(onnx, monkeypatch):
    monkeypatch.setattr(portable, "find_spec", lambda name: None)
    assert str(verify(onnx).findings[-1]) == (
        "not checked  the network, reloaded: ONNX needs packages that are not installed: onnx, onnxscript, "
        "onnxruntime: pip install 'ensemble-kd[onnx]'"
    )


def test_what_has_no_checksum_is_not_called_whole(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    status = {key: value for key, value in Run(folder).status().items() if key not in ("files", "seal")}
    files.write_json(folder / "status.json", status)
    told = [str(finding) for finding in verify(folder).findings if finding.ok is None]
    assert told == [
        "not checked  status.json: an earlier version made it, which kept no checksum",
        f"not checked  {folder}: an earlier version made it, which kept checksums of networks alone",
    ]
    files.write_sealed(folder / "status.json", {**status, "state": "stopped"})
    told = [str(finding) for finding in verify(folder).findings if finding.ok is None]
    assert told == [f"not checked  {folder}: the run is stopped; its other files have no checksums yet"]


def test_the_command_line(whole, tmp_path):
    result = CliRunner().invoke(app, ["verify", str(whole)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"run {whole}"
    assert lines[1] == "ok           status.json"
    assert lines[-1] == f"nothing is damaged, of {len(lines) - 2} looked at"
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "metrics.json").write_text("{}")
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert result.exit_code == 2
    wrong = [row for row in json.loads(result.stdout)["findings"] if row["ok"] is False]
    assert wrong == [{"what": "metrics.json", "ok": False, "why": "it is not what was written"}]
    findings = [Finding("a", True), Finding("b", False, "x"), Finding("c", None, "y")]
    assert (
        Verification(folder, "run", findings).summary == "1 damaged, 1 could not be checked, of 3 looked at"
    )


def test_other_paths_are_refused(tmp_path):
    fix = "name the folder of a run, of an export, of a teacher in the library or of a target store"
    (tmp_path / "x").write_text("")
    for path, why in (
        (tmp_path / "gone", "there is nothing at that path"),
        (tmp_path / "x", "it is a file"),
        (tmp_path, "it has none of status.json, SHA256SUMS, teacher.json and store.json"),
    ):
        with refused(RunError, f"{path} cannot be verified", why, fix):
            verify(path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "gone")])
    expected = message(f"{tmp_path / 'gone'} cannot be verified", "there is nothing at that path", fix)
    assert (result.exit_code, result.stderr) == (2, f"error: {expected}\n")
    (tmp_path / "mine").mkdir()
    with refused(
        RunError,
        f"{tmp_path / 'mien'} cannot be verified",
        "there is nothing at that path",
        f"did you mean {str(tmp_path / 'mine')!r}?",
    ):
        verify(tmp_path / "mien")


def summed(folder):
    """Checksums made anew, so that they agree with what was changed."""
    digests = {path.name: files.sha256_file(path) for path in folder.iterdir() if path.name != files.SUMS}
    (folder / files.SUMS).write_text(files.sums_of(digests))


def test_parts_that_do_not_fit_each_other_are_told_whatever_the_checksums(onnx, tmp_path):
    shutil.copytree(onnx, tmp_path / "a")
    kept = safetensors.torch.load_file(onnx / "check.safetensors")
    safetensors.torch.save_file({"images": kept["images"]}, tmp_path / "a" / "check.safetensors")
    shutil.copytree(onnx, tmp_path / "b")
    (tmp_path / "b" / "labels.json").write_text(json.dumps(["no digit"] * 10))
    told = []
    for name in ("a", "b"):
        summed(tmp_path / name)
        told += [str(finding) for finding in verify(tmp_path / name).damaged]
    assert told == [
        "damaged      the network, reloaded: check.safetensors holds no 'logits'",
        "damaged      labels.json: it names other classes than config.json",
    ]
