"""Trackers: the rows of a run as the real packages keep them, offline; and what happens when they fail."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import logged, refused
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import loop, trackers
from ensemble_kd.cli import app
from ensemble_kd.errors import ConfigError

SMALL = {
    "teachers": ["lenet", "resnet8"],
    "student": "lenet",
    "epochs": 2,
    "teacher_epochs": 1,
    "limit_train": 200,
}
ALL = ["tensorboard", "wandb", "trackio"]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run on all trackers that was stopped in the middle of the student's second epoch, and resumed."""
    for name in ALL:
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("tracked")
    original, taken = loop.Loop._count, []

    def counting(self, done):
        taken.append(done)
        if len(taken) == 6 + 6 + 6 + 3:
            signal.raise_signal(signal.SIGINT)
        original(self, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr("trackio.utils.TRACKIO_DIR", folder / "trackio")
        patch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder / "trackio")
        patch.setenv("EKD_CACHE", str(folder / "cache"))
        patch.setattr(loop.Loop, "_count", counting)
        with pytest.raises(KeyboardInterrupt):
            ensemble_kd.distill(**SMALL, track=ALL, out=folder / "run", combine="learned")
        patch.setattr(loop.Loop, "_count", original)
        run = ensemble_kd.resume(folder / "run")
        yield run, folder


def test_tensorboard_reads_every_epoch_once(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = tracked
    events = EventAccumulator(str(run.folder / "tracking" / "tensorboard"))
    events.Reload()
    for network in ("student", "labels"):
        rows = [row for row in history(run.folder) if row["network"] == network]
        for name, pick in (
            (f"{network}/val/accuracy", lambda row: row["val"]["accuracy"]),
            (f"{network}/train/loss", lambda row: row["train"]["loss"]),
            (f"{network}/lr", lambda row: row["lr"]),
        ):
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert found == [(row["step"], pytest.approx(pick(row), rel=1e-6)) for row in rows]
    assert len(events.Scalars("teacher resnet8/val/loss")) == 1
    [judged] = events.Scalars("test/student/accuracy")
    assert judged.value == pytest.approx(run.metrics["models"]["student"]["accuracy"]["value"])
    [config] = events.Tensors("config/text_summary")
    assert b"combine: learned" in config.tensor_proto.string_val[0]


def transactions(data: bytes) -> Iterator[bytes]:
    """The records of an offline file of wandb: a LevelDB log, whose blocks of 32 KiB hold whole records or parts."""
    at, parts = 7, b""  # after the head of the file
    while at + 7 <= len(data):
        if (left := -at % 32_768) and left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_keeps_the_same_in_runs_of_one_id(tracked):
    from wandb.proto import wandb_internal_pb2

    run, _ = tracked
    key = json.loads((run.folder / "tracking" / "run.json").read_text())["id"]
    files = sorted((run.folder / "tracking" / "wandb").glob(f"offline-run-*-{key}/run-{key}.wandb"))
    assert len(files) == 2, "one before the stop, and one of the same id after it"
    rows, names = [], set()
    for file in files:
        for data in transactions(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
            if record.HasField("run"):
                names.add((record.run.project, record.run.display_name, record.run.run_id))
    assert names == {("ensemble-kd", "run", key)}
    found = [row["student/val/accuracy"] for row in rows if "student/val/accuracy" in row]
    assert found == [row["val"]["accuracy"] for row in history(run.folder) if row["network"] == "student"]
    steps = [row["labels/step"] for row in rows if "labels/step" in row]
    assert steps == [row["step"] for row in history(run.folder) if row["network"] == "labels"]
    assert [row["test/student/nll"] for row in rows if "test/student/nll" in row] == [
        run.metrics["models"]["student"]["nll"]["value"]
    ]


def test_trackio_goes_on_with_its_run(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    run, folder = tracked
    assert (folder / "trackio" / "ensemble-kd.db").is_file()
    key = json.loads((run.folder / "tracking" / "run.json").read_text())["id"]
    assert SQLiteStorage.get_runs("ensemble-kd") == [f"run-{key}"]
    logs = SQLiteStorage.get_logs("ensemble-kd", f"run-{key}")
    found = [(row["step"], row["student/val/loss"]) for row in logs if "student/val/loss" in row]
    kept = [(row["step"], row["val"]["loss"]) for row in history(run.folder) if row["network"] == "student"]
    assert found == kept
    assert SQLiteStorage.get_run_config("ensemble-kd", f"run-{key}")["training.epochs"] == 2


class Broken:
    """Fails from its second row on."""

    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, row, step):
        self.rows.append((step, row))
        if len(self.rows) == 2:
            raise OSError(28, "No space left on device\nand more")

    def finish(self):
        self.finished = True


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch):
    broken, fine = Broken(), Broken()
    fine.log = lambda row, step: fine.rows.append((step, row))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda start: broken)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", lambda start: fine)
    with logged() as lines:
        run = ensemble_kd.train(
            "lenet", role="control", epochs=4, limit_train=200, track="wandb,trackio", out=tmp_path / "a"
        )
    assert [line for line in lines if line.startswith("WARNING")] == [
        "WARNING: wandb failed, and the run goes on without it: [Errno 28] No space left on device"
    ]
    assert (len(broken.rows), broken.finished) == (2, False)
    assert [step for step, _ in fine.rows] == [6, 12, 18, 24, 24]
    assert fine.finished
    assert fine.rows[-1][1]["test/lenet/accuracy"] == run.metrics["models"]["lenet"]["accuracy"]["value"]
    alone = ensemble_kd.train("lenet", role="control", epochs=4, limit_train=200, out=tmp_path / "b")
    assert alone.metrics["models"] == run.metrics["models"]
    assert not (tmp_path / "b" / "tracking").exists()


def test_a_tracker_that_cannot_start_ends_a_new_run_but_no_resumed_one(tmp_path, monkeypatch):
    def refuse(start):
        raise RuntimeError("no API key")

    fine = Broken()
    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", lambda start: fine)
    with (
        refused(
            ConfigError, "track: wandb cannot be started", "no API key", "mend that, or leave --track out"
        ),
        trackers.tracking(["trackio", "wandb"], tmp_path, {}),
    ):
        raise AssertionError("it was entered")
    assert fine.finished
    with logged() as lines, trackers.tracking(["wandb"], tmp_path, {}) as current:
        assert current.trackers == {}
    assert lines == ["WARNING: wandb cannot be started, and the run goes on without it: no API key"]


def test_a_missing_extra_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name != "tensorboard" else 1)
    result = CliRunner().invoke(
        app, ["distill", "--teachers", "lenet,nothing", "--track", "tensorboard,wandb", "--track", "trackio",
              "--out", str(tmp_path / "run")],
    )  # fmt: skip
    assert result.exit_code == 2
    assert "error: track: wandb is not installed\n  why: it is an extra\n" in result.stderr
    assert "  fix: pip install 'ensemble-kd[trackio]', or leave it out\n" in result.stderr
    assert "error: no model is called 'nothing'" in result.stderr
    assert not (tmp_path / "run").exists()
    with refused(
        ConfigError,
        "track: there is no 'wanddb'",
        "known are tensorboard, wandb, trackio and none",
        "did you mean 'wandb'?",
    ):
        ensemble_kd.train("lenet", track="wanddb")


def test_of_several_processes_the_first_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble_kd.distributed.first", lambda: False)
    with trackers.tracking(["wandb"], tmp_path, {}) as current:
        trackers.log_epoch("student", {"step": 3, "val": {"loss": 1.0}})
    assert current.trackers == {}
    assert list(tmp_path.iterdir()) == []


def test_stdout_is_left_to_results(tmp_path, monkeypatch):
    class Loud(Broken):
        def log(self, row, step):
            print("loud")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda start: Loud())
    result = CliRunner().invoke(
        app, ["train", "lenet", "--role", "control", "--epochs", "1", "--limit-train", "200", "--track", "wandb",
              "--json", "--out", str(tmp_path / "run")],
    )  # fmt: skip
    assert "lenet" in json.loads(result.stdout)["models"]
    assert "loud" in result.stderr


def test_every_tracker_is_an_option():
    from ensemble_kd.schema import TRACKERS

    assert set(TRACKERS) == set(trackers.TRACKERS)
