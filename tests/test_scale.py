"""docs/scale.md against the script that computes its tables, and the Slurm example against the command line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ensemble_kd.cli import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "cluster" / "slurm.sbatch"


def test_every_table_of_the_page_is_what_the_script_prints():
    command = [sys.executable, "-m", "benchmarks.scale"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "scale.md").read_text()
    tables = [part.partition("\n\n")[2].strip() for part in printed.split("### ")[1:]]
    assert len(tables) == 8
    assert [table.splitlines()[0] for table in tables if table not in page] == []


@pytest.mark.parametrize(
    ("verb", "arrays"), [("distill", ("data", "targets", "training")), ("targets build", ("data", "targets"))]
)
def test_every_flag_of_the_slurm_script_exists(verb, arrays):
    text = SCRIPT.read_text()
    known = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "200"}).output
    bodies = [re.search(rf"^{name}=\((.*?)\)$", text, re.S | re.M).group(1) for name in arrays]
    used = re.findall(r"--[a-z][a-z-]*", " ".join(bodies))
    assert len(used) >= 10
    assert [flag for flag in used if not re.search(rf"{flag}[ \n]", known)] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_can_parse_the_slurm_script():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
