"""Teachers divided among processes: the same targets and hashes, and a part of the memory."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np
import pytest
import sharding_work
from spoiled import ekd
from support import message
from test_distributed import ROOT, TORCHRUN, environment

from ensemble_kd.teachers import sharding


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one process and two found."""
    folder = tmp_path_factory.mktemp("sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKD_CACHE", str(folder / "cache-1"))
        patch.setattr(sharding, "LEAST", sharding.LEAST)  # brought back, as it is changed
        alone = sharding_work.find()
    command = [*TORCHRUN, "2", "tests/sharding_work.py", str(folder / "2.json")]
    where = environment(folder / "cache-2")
    ran = subprocess.run(command, env=where, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    return {1: alone, 2: json.loads((folder / "2.json").read_text())}


def test_targets_are_those_of_whole_teachers(found):
    for name in ("logits", "stored", "live"):
        np.testing.assert_allclose(found[2][name], found[1][name], rtol=0, atol=1e-6)


def test_each_process_holds_half(found):
    """Nearly: buffers are whole in each."""
    assert found[2]["units"] == [4, 4]  # three blocks, and the rest
    assert found[2]["bytes"] == found[1]["bytes"]
    assert found[2]["parameters"] == found[1]["parameters"]
    for held, whole in zip(found[2]["held"], found[1]["held"], strict=True):
        assert 0.5 < held / whole < 0.51
    print(f"bytes of a teacher in each of two processes: {found[2]['held'][0]:,} of {found[1]['held'][0]:,}")


def test_hashes_are_those_of_whole_teachers_and_changes_are_noticed(found):
    for count in (1, 2):
        assert found[count]["unchanged"]
        assert found[count]["changed"] == message(
            "teacher 't1' changed while it taught",
            "its parameters or buffers have another hash than when it was loaded",
            "a module of your own that writes to its buffers in eval mode cannot be a teacher",
        )


def test_a_network_that_reads_other_layers_is_refused(found):
    what, _, fix = found[2]["reaching"].splitlines()
    assert what == "teacher 'reaching' cannot be divided among processes"
    assert fix == "  fix: leave --shard-teachers or that teacher out"


FLAGS = [
    "--teachers", "lenet#7", "--student", "lenet", "--epochs", "1", "--teacher-epochs", "1", "--limit-train", "200",
    "--controls", "none", "--shard-teachers",
]  # fmt: skip


def test_a_run_with_divided_teachers(tmp_path):
    out = tmp_path / "run"
    command = [*TORCHRUN, "2", "-m", "ensemble_kd", "distill", *FLAGS, "--device", "cpu", "--out", str(out)]
    ran = subprocess.run(
        command, env=environment(tmp_path / "cache"), cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    (teacher,) = manifest["teachers"]
    assert teacher["before"] == teacher["after"]
    assert "teacher lenet#7: each of 2 processes holds 88.9 kB of 177.7 kB" in (out / "train.log").read_text()


def test_one_process_is_refused(tmp_path, own_cache):
    result = ekd("distill", *FLAGS, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert result.stderr == "error: " + message(
        "shard_teachers: there is one process",
        "each of several holds a part of every teacher",
        "start several: torchrun --nproc-per-node 2 -m ensemble_kd distill …, or leave it out\n",
    )
    assert not (tmp_path / "run").exists()
