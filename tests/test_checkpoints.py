"""Stopping and going on: bit-exact from any step, whatever is damaged, changed or in use is told."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

import ensemble_kd
from ensemble_kd import checkpoints as module
from ensemble_kd import files
from ensemble_kd.checkpoints import Checkpoints, Snapshot
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.distillation import DistillResult, distill
from ensemble_kd.errors import EkdError, ModelError, Problem, RunError, TrainingError
from ensemble_kd.fit import fit
from ensemble_kd.fresh import new_classifier
from ensemble_kd.interrupts import Stop, deferred
from ensemble_kd.locks import lock
from ensemble_kd.loop import Loop
from ensemble_kd.models import parse
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.resuming import resume
from ensemble_kd.runs import Run
from ensemble_kd.stepping import Recipe
from ensemble_kd.students import STUDENTS

CPU = torch.device("cpu")
STEPS = 12  # an epoch of 200 images at batch 16


def with_everything(number: int) -> Recipe:
    """Recipes that between them have every kind of state."""
    kind = ("sgd", "adamw")[number % 2]
    return Recipe(3, 16, kind, 0.01, 1e-3, 1, 0.1, clip_norm=2.0, ema=(None, 0.9)[number // 2 % 2])


def network(data: Dataset) -> Classifier:
    """BatchNorm has buffers, dropout draws from the global generator."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
    )
    return Classifier(net, Card("tiny", "stock", Preprocess(1, (8, 8), (0.5,), (0.5,)), data.classes))


def trained(
    data: Dataset, recipe: Recipe, kept: Checkpoints | None = None
) -> tuple[Classifier, list[dict[str, Any]]]:
    model = network(data)
    history = fit(
        model,
        data.train,
        data.val,
        recipe,
        Objective(),
        Viewing("crop", 2, 5),
        seed=5,
        device=CPU,
        checkpoints=kept,
    )
    return model, history


def problem_of(kind: type[EkdError], work: Callable[..., Any], *arguments: Any, **options: Any) -> Problem:
    with pytest.raises(kind) as caught:
        work(*arguments, **options)
    (problem,) = caught.value.problems
    return problem


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A signal arrives while step `count` of this process is taken."""
    original, taken = Loop._count, []

    def counting(loop: Loop, done: int) -> None:
        taken.append(done)
        if len(taken) == count:
            signal.raise_signal(random.Random(count).choice([signal.SIGTERM, signal.SIGINT]))
        original(loop, done)

    monkeypatch.setattr(Loop, "_count", counting)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


STOPS = [*random.Random(0).sample(range(1, 3 * STEPS + 1), 18), STEPS, 3 * STEPS]


@pytest.mark.parametrize(("number", "step"), list(enumerate(STOPS)))
def test_training_goes_on_bit_exact_from_any_step(number, step, few_digits, tmp_path, monkeypatch):
    data, recipe = few_digits, with_everything(number)
    whole, rows = trained(data, recipe)
    kept = Checkpoints(tmp_path / "c", {"number": number})
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(KeyboardInterrupt):
            trained(data, recipe, kept)
    torch.manual_seed(number)  # whatever else was drawn since
    again = Checkpoints(tmp_path / "c", {"number": number})
    assert again.latest().state["steps"] == step
    model, resumed = trained(data, recipe, again)
    assert model.fingerprint() == whole.fingerprint()
    assert without_times(resumed) == without_times(rows)


def test_a_training_that_stops_twice_is_the_same_too(few_digits, tmp_path, monkeypatch):
    recipe = with_everything(3)
    whole, _ = trained(few_digits, recipe)
    for step in (5, 13):
        with monkeypatch.context() as patched:
            stop_after(patched, step)
            with pytest.raises(KeyboardInterrupt):
                trained(few_digits, recipe, Checkpoints(tmp_path, {}))
    model, _ = trained(few_digits, recipe, Checkpoints(tmp_path, {}))
    assert model.fingerprint() == whole.fingerprint()


def test_saving_changes_nothing(few_digits, tmp_path):
    whole, _ = trained(few_digits, with_everything(2))
    often = Checkpoints(tmp_path, {}, seconds=0)
    model, _ = trained(few_digits, with_everything(2), often)
    assert model.fingerprint() == whole.fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000035", "step-00000036"]


# Files


def snapshot(step: int = 1) -> Snapshot:
    values = {"w": torch.full((3,), float(step)), "b": torch.zeros(())}
    return Snapshot(values, {"0.m": torch.ones(2)}, {"cpu": torch.get_rng_state()}, {"steps": step})


def test_a_checkpoint_is_safetensors_and_json_with_a_digest_of_each(tmp_path):
    Checkpoints(tmp_path, {}).save(7, snapshot(7))
    folder = tmp_path / "step-00000007"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    }
    digests = json.loads((folder / "manifest.json").read_text())
    assert digests == {name: files.sha256_file(folder / name) for name in names - {"manifest.json"}}
    assert torch.equal(safetensors.torch.load_file(folder / "model.safetensors")["w"], torch.full((3,), 7.0))


def test_every_flipped_bit_is_noticed_and_the_one_before_is_taken(tmp_path, caplog):
    kept, generator = Checkpoints(tmp_path, {}), np.random.default_rng(0)
    for step in (1, 2):
        kept.save(step, snapshot(step))
    everything = sorted((tmp_path / "step-00000002").iterdir())
    for _ in range(200):
        path = everything[generator.integers(len(everything))]
        whole = path.read_bytes()
        damaged, place = bytearray(whole), generator.integers(len(whole))
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        found = kept.latest()
        # Only spaces of the manifest could be changed without a change of meaning.
        same = path.name == "manifest.json" and found.state["steps"] == 2
        assert same or found.state["steps"] == 1
        path.write_bytes(whole)
    assert kept.latest().state["steps"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_file_that_is_missing_is_noticed(name, tmp_path):
    kept = Checkpoints(tmp_path, {})
    kept.save(1, snapshot(1))
    kept.save(2, snapshot(2))
    (tmp_path / "step-00000002" / name).unlink()
    assert kept.latest().state["steps"] == 1


def test_what_a_killed_process_left_is_swept_and_two_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, {})
    (tmp_path / ".step-00000009.abcd.tmp").mkdir()
    (tmp_path / ".step-00000009.abcd.tmp" / "model.safetensors").write_bytes(b"half")
    for step in range(1, 6):
        kept.save(step, snapshot(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_a_checkpoint_of_another_training_is_passed_over(tmp_path):
    Checkpoints(tmp_path, {"lr": 1}).save(1, snapshot())
    assert Checkpoints(tmp_path, {"lr": 2}).latest() is None
    assert Checkpoints(tmp_path, {"lr": 1}).latest() is not None


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "write"])
def test_a_failure_in_the_middle_of_a_write_leaves_the_one_before(call, tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, {})
    kept.save(1, snapshot(1))
    count = {"open": 7, "fsync": 7, "rename": 1, "write": 5}[call]
    for fails_at in range(1, count + 1):
        with monkeypatch.context() as patched:
            break_at(patched, call, fails_at)
            with pytest.raises(OSError, match="broken"):
                kept.save(2, snapshot(2))
        found = kept.latest()
        assert found is not None
        assert not list(tmp_path.glob(".*.tmp"))
        if found.state["steps"] == 2:  # only the names of the folder were not flushed
            assert (call, fails_at) in (("fsync", count), ("open", count))
            module.shutil.rmtree(tmp_path / "step-00000002")


def break_at(patched: pytest.MonkeyPatch, call: str, number: int) -> None:
    """The call of that name fails when it is made for the `number`th time."""
    calls: list[None] = []
    original = os.fdopen if call == "write" else getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            if call == "write":
                os.close(args[0])
            raise OSError(28, "broken")
        return original(*args, **kwargs)

    patched.setattr(os, "fdopen" if call == "write" else call, failing)


# Losses that are not finite


@pytest.mark.parametrize("step", [1, 7, STEPS, STEPS + 1, 2 * STEPS + 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(step, value, few_digits, tmp_path, monkeypatch):
    kept, recipe = Checkpoints(tmp_path, {}, seconds=0), with_everything(0)
    good: dict[int, dict[str, torch.Tensor]] = {}
    original, seen = Loop._judged, []

    def poisoned(loop: Loop, logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(None)
        if len(seen) == step:
            good[step] = {name: values.clone() for name, values in loop.model.net.named_parameters()}
            logits = logits * value
        return original(loop, logits, *rest)

    monkeypatch.setattr(Loop, "_judged", poisoned)
    model = network(few_digits)
    with pytest.raises(TrainingError) as caught:
        fit(
            model, few_digits.train, few_digits.val, recipe, Objective(), Viewing("crop", 2, 5),
            seed=5, device=CPU, checkpoints=kept, description="student",
        )  # fmt: skip
    (problem,) = caught.value.problems
    epoch, number = divmod(step - 1, STEPS)
    assert (
        problem.what == f"student: the loss is not finite in epoch {epoch + 1}, step {number + 1} of {STEPS}"
    )
    for name, values in model.net.named_parameters():  # the step was not taken
        assert torch.equal(values, good[step][name])
    found = kept.latest()
    assert (found.state["steps"] if found else 0) == step - 1


def test_the_message_names_the_term_and_the_batch(few_digits):
    model = network(few_digits)
    nn.init.constant_(model.net[0].weight, float("nan"))
    problem = problem_of(TrainingError, fit, model, few_digits.train, few_digits.val, with_everything(0), Objective(),
        Viewing("none", 1, 0), seed=5, device=CPU,
    )  # fmt: skip
    assert problem.why.startswith("what the network says is not, for the batch of the images ")
    assert problem.why.endswith(" … and 11 more; no such step was taken")
    assert problem.fix == "try --lr 0.003, or --set training.clip_norm=1"


# Signals


def test_a_second_signal_interrupts_at_once():
    seen = []

    def twice() -> None:
        with deferred() as stop:
            signal.raise_signal(signal.SIGTERM)
            seen.append(stop == Stop(asked=True))
            signal.raise_signal(signal.SIGINT)
            seen.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_asks_at_the_very_end_is_heard_when_all_is_kept():
    kept = []

    def work() -> None:
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGINT)
            kept.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert kept == [True]


OPTIONS = {"epochs": 3, "teacher_epochs": 2, "limit_train": 300, "controls": "labels"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> DistillResult:
    return distill("lenet#7", "lenet", out=tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


@pytest.mark.parametrize("step", [4, 12, 19, 33])
def test_a_run_goes_on_to_the_same_bytes(step, whole, tmp_path, monkeypatch):
    # With an own cache the teacher, in the first 18 steps, is interrupted too.
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(KeyboardInterrupt):
            distill("lenet#7", "lenet", out=tmp_path / "run", **OPTIONS)
    assert Run(tmp_path / "run").status()["state"] == "stopped"
    resumed = resume(tmp_path / "run")
    assert resumed.metrics["models"] == whole.metrics["models"]
    for name in ("student.safetensors", "controls/labels.safetensors"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    left = [path.name for path in resumed.folder.rglob("*") if path.is_file()]
    assert "lock" not in left
    assert not [name for name in left if name.startswith("step-")]


@pytest.mark.parametrize("role", ["teacher", "control"])
def test_a_run_of_train_goes_on_too(role, tmp_path, monkeypatch):
    def run(name: str) -> Any:
        monkeypatch.setenv("EKD_CACHE", str(tmp_path / f"cache-{name}"))
        return ensemble_kd.train("lenet", role=role, epochs=2, limit_train=200, out=tmp_path / name)

    first = run("whole")
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            run("part")
    resumed = resume(tmp_path / "part")
    assert resumed.model.fingerprint() == first.model.fingerprint()
    assert resumed.metrics["models"] == first.metrics["models"]


def test_a_process_that_is_stopped_can_be_resumed(whole, tmp_path):
    """By SIGTERM; kills in training are in test_torture.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EKD_CACHE": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from ensemble_kd.cli import main; main()",
    ]
    flags = [
        "--teachers",
        "lenet#7",
        "--student",
        "lenet",
        "--epochs",
        "3",
        "--teacher-epochs",
        "2",
        "--limit-train",
        "300",
    ]
    process = subprocess.Popen(
        [*command, "distill", *flags, "--out", str(tmp_path / "run")],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    for line in process.stderr:
        if "training lenet" in line or "epoch 1" in line:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 75, rest
    assert "Traceback" not in rest
    assert f"go on with it: ekd resume {tmp_path / 'run'}" in rest
    result = subprocess.run(
        [*command, "resume", str(tmp_path / "run"), "--json"],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (
        json.loads(result.stdout)["models"]
        == json.loads((whole.folder / "metrics.json").read_text())["models"]
    )


# What must not have changed


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        stop_after(patched, 30)
        with pytest.raises(KeyboardInterrupt):
            distill("lenet#7", "lenet", out=tmp_path / "run", **OPTIONS)
    return tmp_path / "run"


def test_a_changed_configuration_is_refused_with_the_difference(stopped):
    path = stopped / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["training"]["lr"], values["soft_weight"] = 0.5, 0.9
    path.write_text(yaml.safe_dump(values))
    problem = problem_of(RunError, resume, stopped)
    assert problem.what == f"{stopped} cannot go on: its configuration changed"
    assert problem.why == "training.lr was 0.03, is 0.5; soft_weight was 0.3, is 0.9"
    assert problem.fix == f"bring that back, or start anew: ekd distill --config {path} --out PATH"


def test_a_changed_data_set_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(Dataset, "fingerprint", lambda self: "other")
    problem = problem_of(RunError, resume, stopped)
    assert problem.what == f"{stopped} cannot go on: its data changed"
    assert problem.why.startswith("fingerprint was ")
    assert problem.why.endswith(", is other")


def test_a_changed_teacher_is_refused(stopped, tmp_path):
    (folder,) = (path.parent for path in (tmp_path / "cache" / "teachers").glob("*/teacher.json"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        card = file.metadata()
    tensors = {name: values + 1 for name, values in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", card)
    facts = json.loads((folder / "teacher.json").read_text())
    facts["sha256"] = files.sha256_file(folder / "model.safetensors")
    (folder / "teacher.json").write_text(json.dumps(facts))
    problem = problem_of(RunError, resume, stopped)
    assert problem.what == f"{stopped} cannot go on: its teachers changed"
    assert problem.why.startswith("lenet#7 was ")


def test_a_run_in_use_is_refused(stopped):
    with lock(stopped):
        problem = problem_of(RunError, resume, stopped)
        again = problem_of(RunError, distill, "lenet#7", "lenet", out=stopped, overwrite=True, **OPTIONS)
    assert problem.what == again.what == f"{stopped} is in use"
    assert problem.why == "another process writes to it"
    assert problem.fix == "wait for it, or name another: --out PATH"
    assert (stopped / "checkpoints").is_dir()


def test_a_library_that_cannot_be_written_to_is_told_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "file"))
    problem = problem_of(ModelError, distill, "lenet#7", "lenet", out=tmp_path / "run", **OPTIONS)
    assert problem.what == f"teacher 'lenet#7' cannot be kept in {tmp_path / 'file' / 'teachers'}"
    assert problem.fix == "keep trained teachers elsewhere: EKD_CACHE=PATH"


def test_every_student_can_be_saved(few_digits, tmp_path):
    assert set(STUDENTS) >= {"lenet", "resnet8"}
    for name in STUDENTS:
        model = new_classifier(parse(name), few_digits, seed=0)
        kept = Checkpoints(tmp_path / name, {}, seconds=0)
        recipe = Recipe(1, 100, "sgd", 0.01, 0.0, 0)
        fit(
            model,
            few_digits.train,
            few_digits.val,
            recipe,
            Objective(),
            Viewing("none", 1, 0),
            seed=0,
            device=CPU,
            checkpoints=kept,
        )
        assert kept.latest().state["steps"] == 2
