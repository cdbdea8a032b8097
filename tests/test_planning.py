"""`--dry-run`: it tells what a real run then does, and leaves no trace."""

from __future__ import annotations

import json
import signal
import zipfile
from pathlib import Path

import pytest
from support import refused
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import loop, timing
from ensemble_kd.cli import app
from ensemble_kd.errors import ConfigError, DataError, ModelError, RunError
from ensemble_kd.planned import FACTOR

SMALL = {
    "teachers": ["lenet", "resnet8"],
    "student": "lenet",
    "epochs": 2,
    "teacher_epochs": 1,
    "limit_train": 200,
}


def ekd(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def traces(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and date."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Fewer steps are timed than for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def planned_and_done(tmp_path_factory):
    """A plan before a small run, what the disk was like after it, the run, and a plan after it."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKD_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        before = ensemble_kd.plan("distill", **SMALL, augment="crop", views=2).facts
        left = traces(folder)
        run = ensemble_kd.distill(**SMALL, augment="crop", views=2, out=Path("runs/a"))
        there = traces(folder)
        after = ensemble_kd.plan("distill", **SMALL, augment="crop", views=2, out=Path("runs/b")).facts
        again = traces(folder)
        yield before, left, run, there, after, again, folder


def test_nothing_is_written(planned_and_done):
    """Neither where nothing is yet, nor where teachers and targets are found: not even a date changes."""
    _, left, _, there, _, again, _ = planned_and_done
    assert left == {}
    assert again == there


def test_steps_and_sizes_are_those_of_the_run(planned_and_done):
    before, _, run, there, _, _, _ = planned_and_done
    rows = {row["network"]: row for row in before["networks"]}
    assert list(rows) == ["teacher lenet", "teacher resnet8", "student", "labels"]
    assert all(row["state"] == "to train" for row in rows.values())
    for name in ("student", "labels"):
        assert rows[name]["steps"] == run.metrics["training"][name]["steps"]
        assert rows[name]["parameters"] == run.metrics["models"][name]["parameters"]
    stored = sum(
        size for path, (size, _) in there.items() if path.endswith("/logits.bin") and size == 200 * 2 * 10 * 2
    )
    assert before["targets"]["bytes"] == before["targets"]["missing_bytes"] == stored == 2 * 200 * 2 * 10 * 2
    in_run = sum(size for path, (size, _) in there.items() if "/runs/a/" in path)
    assert in_run / 2 < before["run_bytes"] < in_run * 2
    kept = sum(size for path, (size, _) in there.items() if "/cache/" in path)
    assert kept / 2 < before["cache_bytes"] < kept * 2
    assert before["disk"][0]["needed"] == before["run_peak_bytes"] > before["run_bytes"]
    assert before["enough"]
    assert 0 < before["memory"]["needed"] < before["memory"]["free"]


def test_seconds_are_within_the_stated_factor(planned_and_done):
    """Of two plans, as the machine may be busy with something else during one of them."""
    before, _, run, _, after, _, _ = planned_and_done
    rows = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    took = sum(row["seconds"] for row in rows)
    ratios = [facts["seconds"]["training"] / took for facts in (before, after)]
    assert any(1 / FACTOR < ratio < FACTOR for ratio in ratios), ratios
    assert str(FACTOR) in before["method"]


def test_what_is_there_is_not_planned_again(planned_and_done):
    after = planned_and_done[4]
    assert [row["state"] for row in after["networks"]] == ["at hand", "at hand", "to train", "to train"]
    assert after["targets"]["missing_bytes"] == 0 < after["targets"]["bytes"]
    assert after["seconds"]["teachers"] == after["seconds"]["targets"] == 0


def test_the_command_line_prints_it(planned_and_done, monkeypatch):
    folder = planned_and_done[6]
    monkeypatch.setenv("EKD_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    there = traces(folder)
    flags = ["--teachers", "lenet,resnet8", "--epochs", 2, "--teacher-epochs", 1, "--limit-train", 200]
    shown = ekd("distill", *flags, "--augment", "crop", "--views", 4, "--dry-run")
    assert shown.exit_code == 0, shown.stderr
    assert "views: 4 by crop; targets: 32.0 kB, 16.0 kB of them to make\n" in shown.stdout
    assert "nothing was written" in shown.stdout
    built = ekd("targets", "build", *flags, "--dry-run", "--json")
    facts = json.loads(built.stdout)
    assert [row["network"] for row in facts["networks"]] == ["teacher lenet", "teacher resnet8"]
    assert facts["run_bytes"] == 0
    trained = json.loads(
        ekd("train", "resnet8", "--epochs", 1, "--limit-train", 200, "--dry-run", "--json").stdout
    )
    assert trained["networks"][0]["state"] == "to train"  # by other views than the teacher above
    control = ekd(
        "train", "lenet", "--role", "control", "--epochs", 3, "--limit-train", 200, "--dry-run", "--json"
    )
    assert json.loads(control.stdout)["networks"][0]["steps"] == 3 * (200 // 32)
    assert traces(folder) == there


def test_live_teachers_are_part_of_the_steps(few_digits, own_cache):
    live, stored = (ensemble_kd.plan("distill", **SMALL, views=views).facts for views in (0, 1))
    assert live["targets"]["bytes"] == 0 < stored["targets"]["bytes"]
    rows = [{row["network"]: row["seconds"] for row in facts["networks"]} for facts in (live, stored)]
    assert rows[0]["student"] > rows[0]["labels"]
    assert rows[1]["student"] == rows[1]["labels"]


def test_a_stopped_run_has_less_to_do(tmp_path, monkeypatch):
    """One network finished, one in the middle: the plan of `resume` counts what is left."""
    original, taken = loop.Loop._count, []

    def counting(self, done):
        taken.append(done)
        if len(taken) == 6 + 6 + 12 + 5:  # teachers, the student, and some of the control
            signal.raise_signal(signal.SIGINT)
        original(self, done)

    monkeypatch.setattr(loop.Loop, "_count", counting)
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        ensemble_kd.distill(**SMALL, out=tmp_path / "run")
    monkeypatch.setattr(loop.Loop, "_count", original)
    there = traces(tmp_path)
    facts = json.loads(ekd("resume", tmp_path / "run", "--dry-run", "--json").stdout)
    rows = {row["network"]: row for row in facts["networks"]}
    assert rows["student"]["state"] == "finished"
    assert rows["labels"]["steps"] == 12 - 5
    assert traces(tmp_path) == there


def test_what_is_refused(tmp_path, own_cache, checkpoints):
    with refused(
        ConfigError,
        "there is no plan of 'distil'",
        "known are distill, train, targets build, resume",
        "did you mean 'distill'?",
    ):
        ensemble_kd.plan("distil")
    with refused(
        ModelError,
        "the weights of 'tv:vgg11' are not on this machine",
        "a dry run does not download them",
        "run once without --dry-run, or leave the weights out and it is trained from scratch",
    ):
        ensemble_kd.plan("distill", teachers=["tv:vgg11@IMAGENET1K_V1"])
    with refused(
        DataError,
        f"CIFAR10 is not in {tmp_path}",
        "a dry run does not download it",
        "put the folder cifar-10-batches-py there, or name another folder by --data-root",
    ):
        ensemble_kd.plan("distill", teachers=["lenet"], data="cifar10", data_root=tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/y.txt", "")
    with refused(
        ConfigError,
        f"{tmp_path / 'a.zip'} is not unpacked yet",
        "a dry run writes nothing",
        f"unpack it first: ekd data imagefolder:{tmp_path / 'a.zip'}",
    ):
        ensemble_kd.plan("distill", teachers=["lenet"], data=f"imagefolder:{tmp_path / 'a.zip'}")


def test_a_finished_run_is_not_planned(planned_and_done):
    run = planned_and_done[2]
    with refused(
        RunError,
        f"{run.folder} is finished",
        "there is nothing left to do",
        f"look at it: ekd analyze-agreement {run.folder}",
    ):
        ensemble_kd.plan("resume", folder=run.folder)
