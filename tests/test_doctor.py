"""`ekd doctor`: what it finds, what it calls wrong, and that it leaves nothing behind."""

from __future__ import annotations

import io
import json
from importlib import metadata

import torch
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import examining
from ensemble_kd.cli import app


def ekd(*arguments, **env):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env)


def problem(what: str, why: str, fix: str) -> dict[str, str]:
    return {"what": what, "why": why, "fix": fix}


def test_what_it_finds_here(own_cache):
    facts = ensemble_kd.doctor()
    assert facts["usable"]
    assert facts["problems"] == []
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["versions"]["ensemble-kd"] == ensemble_kd.__version__
    cpu = facts["devices"][0]
    assert cpu["device"] == "cpu"
    assert 0 < cpu["free"] <= cpu["memory"]
    assert not cpu["cuda_graphs"]
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert {row["source"]: row["at_hand"] for row in facts["data"]}["digits"]
    assert not {row["source"]: row["at_hand"] for row in facts["data"]}["cifar10"]
    assert not own_cache.exists(), "it made a folder to try, and took it away again"


def test_it_prints_the_same_as_text_and_json(own_cache):
    shown = ekd("doctor")
    assert shown.exit_code == 0, shown.stderr
    for part in ("versions\n", "devices\n", "caches\n", "extras\n", "data\n", "nothing is in the way"):
        assert part in shown.stdout
    facts = json.loads(ekd("doctor", "--json").stdout)
    assert set(facts) == {
        "usable", "problems", "warnings", "versions", "devices", "threads", "caches", "extras", "data",
    }  # fmt: skip


def test_sizes_of_caches_count_each_byte_once(own_cache):
    folder = own_cache / "teachers" / "a"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100_000)
    (folder / "link").symlink_to(folder / "model.safetensors")
    with (own_cache / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (own_cache / "targets").mkdir()
    (own_cache / "sparse").rename(own_cache / "targets" / "logits.bin")
    sizes = {row["what"]: row["bytes"] for row in ensemble_kd.doctor()["caches"]}
    assert 100_000 <= sizes["teachers"] < 200_000
    assert sizes["targets"] < 100_000, "holes of a store that is not full take no room"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "file" / "cache"))
    facts = ensemble_kd.doctor()
    expected = problem(
        f"{tmp_path / 'file' / 'cache'} cannot be written",
        "Not a directory",
        "keep trained teachers and targets elsewhere: EKD_CACHE=PATH",
    )
    assert facts["problems"] == [expected]
    result = ekd("doctor", EKD_CACHE=str(tmp_path / "file" / "cache"))
    assert result.exit_code == 2
    assert "it cannot be used like this" in result.stdout


def test_a_file_system_without_locks(own_cache, monkeypatch):
    monkeypatch.setattr(examining, "lock", lambda folder: io.BytesIO())
    [found] = ensemble_kd.doctor()["problems"]
    assert found["what"] == f"files in {own_cache} cannot be locked"


def test_versions_that_are_too_old(own_cache, monkeypatch):
    versions = {"torch": "2.9.1", "timm": None}

    def version(name):
        if versions.get(name, "9") is None:
            raise metadata.PackageNotFoundError
        return versions.get(name, "9")

    monkeypatch.setattr(examining.metadata, "version", version)
    monkeypatch.setattr(
        examining.metadata, "requires", lambda name: ["torch>=2.10", "timm>=1.0.20", "numpy>=1"]
    )
    found = {row["what"]: row for row in ensemble_kd.doctor()["problems"]}
    assert list(found) == ["torch 2.9.1 is too old", "timm is not installed"]
    assert found["torch 2.9.1 is too old"] == problem(
        "torch 2.9.1 is too old",
        "earlier ones can be made to run code by a file of weights (CVE-2025-32434, CVE-2026-24747)",
        "pip install 'torch>=2.10'",
    )


def test_extras_and_how_to_get_them(own_cache, monkeypatch):
    wanted = [
        "torch>=2.10", 'pytest>=8; extra == "dev"', 'torch>=2; extra == "here"', 'nothing-such>=1; extra == "onnx"',
        'torch>=99; extra == "onnx"', 'old; python_version < "3" and extra == "here"',
    ]  # fmt: skip
    monkeypatch.setattr(examining.metadata, "requires", lambda name: wanted)
    assert ensemble_kd.doctor()["extras"] == [
        {"extra": "here", "at_hand": True, "missing": [], "command": "pip install 'ensemble-kd[here]'"},
        {"extra": "onnx", "at_hand": False, "missing": ["nothing-such", "torch"],
         "command": "pip install 'ensemble-kd[onnx]'"},
    ]  # fmt: skip
    assert "  onnx             missing: pip install 'ensemble-kd[onnx]'\n" in ekd("doctor").stdout


def test_where_it_is_not_installed_no_extras_are_known(own_cache, monkeypatch):
    monkeypatch.setattr(examining.metadata, "requires", lambda name: None)
    said = "extras\n  not known: it runs from a folder, and is not installed (pip install .)\ndata\n"
    assert said in ekd("doctor").stdout


def test_a_misspelt_variable_is_in_the_way(own_cache, monkeypatch):
    name = "EKD_SEDE"
    monkeypatch.setenv(name, "1")
    [found] = ensemble_kd.doctor()["problems"]
    assert found["what"] == f"environment: {name} is no option of any verb"
    assert found["fix"] == "did you mean 'EKD_SEED'?"


def test_little_room_is_a_warning(own_cache, monkeypatch):
    monkeypatch.setattr(examining, "free_at", lambda path: 5_000_000)
    facts = ensemble_kd.doctor()
    assert facts["usable"]
    assert facts["warnings"] == [
        problem(
            f"the disk of {own_cache} has 5.0 MB free",
            "teachers and targets are kept there",
            "ekd targets prune --older-than 30, or EKD_CACHE=PATH",
        )
    ]
