"""What the benchmarks share: where results go, what they were measured on, and intervals over seeds."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_kd.analysis import intervals

RESULTS = Path(__file__).parent / "results"


def commit_now() -> str:
    """The short hash of the checked-out commit; ask before anything runs, as sources may change meanwhile."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def surroundings(commit: str) -> dict[str, Any]:
    """The command, the machine and the commit of a measurement."""
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return names[0].partition(": ")[2] if names else platform.machine()


def t_interval(differences: np.ndarray) -> dict[str, float]:
    """Mean of paired differences over seeds with a 95 % t interval."""
    if len(differences) == 1:  # which has no spread
        return {"mean": float(differences[0]), "low": math.nan, "high": math.nan}
    found = intervals.t_interval(differences)
    return {"mean": found["value"], "low": found["low"], "high": found["high"]}


def spread_cell(value: dict[str, Any], scale: float) -> str:
    """`mean ± sd`; shares (scale 100) in per cent."""
    digits, unit = (2, " %") if scale == 100 else (4, "")
    return f"{abs(scale * value['mean']):.{digits}f} ± {scale * value['sd']:.{digits}f}{unit}"
