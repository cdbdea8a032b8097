"""Seconds of the main job on this machine: cold (empty cache) and warm, each in a process of its own.

    python -m benchmarks.demo_time [--repeats 1] [--warm 3]

Each repeat is one cold run and then the warm ones.

Writes benchmarks/results/demo-time.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ensemble_kd import files

COMMAND = ["distill", "--teachers", "resnet18,vgg16", "--student", "lenet"]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ["cold", *["warm"] * arguments.warm]:
                seconds[kind].append(run(folder))
    for kind, values in seconds.items():
        spread = f"{min(values):.1f} … {max(values):.1f}, n={len(values)}"
        print(f"{kind}: median {statistics.median(values):.1f} s ({spread})")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    facts = {"command": f"ekd {' '.join(COMMAND)}", "seconds": seconds, "cpu_count": os.cpu_count(),
             "machine": platform.machine(), "python": platform.python_version(), "commit": commit}  # fmt: skip
    files.write_json(RESULTS / "demo-time.json", facts)


def run(folder: str) -> float:
    """Seconds of one whole process with its cache in `folder`."""
    started = time.perf_counter()
    environment = {**os.environ, "EKD_CACHE": f"{folder}/cache"}
    command = [sys.executable, "-m", "ensemble_kd", *COMMAND, "--quiet"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
