"""Two and three processes on the CPU against one: the same samples, numbers and files; deaths and restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_kd.distillation import distill

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "EKD_CACHE": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What 1, 2 and then 3 processes found; each goes on with a training that the one before left."""
    folder, counts = tmp_path_factory.mktemp("distributed"), (1, 2, 3)
    command = [sys.executable, "tests/distributed_work.py", str(folder), ",".join(map(str, counts))]
    ran = subprocess.run(
        command, env=environment(folder), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    return {count: json.loads((folder / f"{count}.json").read_text()) for count in counts}


def losses(history: list[dict[str, Any]]) -> np.ndarray:
    return np.array([(row["train"]["loss"], row["val"]["loss"]) for row in history])


@pytest.mark.parametrize("count", [2, 3])
class TestAgainstOneProcess:
    def test_batch_norm_is_that_of_the_whole_batch(self, found, count):
        assert found[count]["batch_norm"] < 1e-12

    def test_every_step_sees_the_same_images_in_the_same_order(self, found, count):
        assert found[count]["ids"] == found[1]["ids"]

    @pytest.mark.parametrize("kind", ["history", "with_norm"])
    def test_losses_agree_to_a_millionth(self, found, count, kind):
        np.testing.assert_allclose(losses(found[count][kind]), losses(found[1][kind]), rtol=0, atol=1e-6)
        for one, other in zip(found[count][kind], found[1][kind], strict=True):
            assert one["train"]["accuracy"] == pytest.approx(other["train"]["accuracy"], abs=1e-9)

    def test_answers_are_gathered_in_order(self, found, count):
        np.testing.assert_allclose(found[count]["logits"], found[1]["logits"], rtol=0, atol=1e-5)
        assert found[count]["few"] == 2

    def test_a_training_goes_on_with_another_number_of_processes(self, found, count):
        assert found[count]["went_on_from"] == {2: 10, 3: 36}[count]
        np.testing.assert_allclose(
            losses(found[count]["resumed"]), losses(found[1]["history"]), rtol=0, atol=1e-6
        )

    def test_a_loss_of_one_process_stops_all(self, found, count):
        assert found[count]["bad"] == "training: the loss is not finite in epoch 1, step 7 of 12"


FLAGS = [
    "--teachers", "lenet#7", "--student", "lenet", "--epochs", "20", "--teacher-epochs", "1", "--limit-train", "300",
    "--augment", "crop", "--views", "2", "--controls", "none",
]  # fmt: skip


def test_a_process_that_dies_is_started_again_and_the_run_is_that_of_one_process(tmp_path, own_cache):
    alone = distill(
        "lenet#7", "lenet", epochs=20, teacher_epochs=1, limit_train=300, augment="crop", views=2, controls="none",
        out=tmp_path / "alone",
    )  # fmt: skip
    out, where = tmp_path / "run", environment(tmp_path / "cache")
    command = [
        *TORCHRUN,
        "2",
        "--max-restarts",
        "1",
        "-m",
        "ensemble_kd",
        "distill",
        *FLAGS,
        "--out",
        str(out),
        "--json",
    ]
    process = subprocess.Popen(
        command, env=where, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "student  epoch 2" in line:
            break
    os.kill(newest_worker(process.pid), signal.SIGKILL)
    printed, rest = process.communicate(timeout=250)
    assert process.returncode == 0, rest
    found = json.loads(printed)  # one process speaks
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml", "curves.png", "history.jsonl", "manifest.json", "metrics.json", "predictions.safetensors",
        "status.json", "student.safetensors", "train.log",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 21))
    stores = list((tmp_path / "cache" / "targets").glob("*/store.json"))
    assert max(json.loads(store.read_text())["views"] for store in stores) == 2
    for name, row in alone.metrics["models"].items():
        for measure in ("accuracy", "nll", "agreement"):
            assert found["models"][name][measure]["value"] == pytest.approx(row[measure]["value"], abs=3e-3)


def test_a_message_is_said_once_under_torchrun(tmp_path):
    command = [*TORCHRUN, "2", "-m", "ensemble_kd", "distill", *FLAGS, "--loss", "nothing"]
    command += ["--out", str(tmp_path / "run")]
    ran = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode != 0
    assert ran.stderr.count("fix: name one of these") == 1
    assert not (tmp_path / "run").exists()


def newest_worker(parent: int) -> int:
    """The last of the processes that torchrun started."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        workers = [
            int(pid) for pid in children if b"ensemble_kd" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        if workers:
            return max(workers)
        time.sleep(0.05)
    raise AssertionError("torchrun has no workers")
