"""How long `ekd --help` and other quick commands take to start, beside `python -c "import typer"`.

    python -m benchmarks.cli_start [--repeats 15]

The sides take turns, each in a process of its own; the ratio is that of each round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

EKD = [sys.executable, "-m", "ensemble_kd"]
FLOOR = "import typer"
SIDES = {
    FLOOR: [sys.executable, "-c", "import typer"],
    "ekd --help": [*EKD, "--help"],
    "ekd --version": [*EKD, "--version"],
    "ekd distill --help": [*EKD, "distill", "--help"],
    "ekd config show": [*EKD, "config", "show", "--teachers", "lenet"],
}


def seconds(command: list[str]) -> float:
    """The wall time of a command, whose output is thrown away."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print medians with minimum and maximum."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    for command in SIDES.values():  # files come from the disk the first time
        seconds(command)
    rounds = [{name: seconds(command) for name, command in SIDES.items()} for _ in range(repeats)]
    for name in SIDES:
        times = [row[name] for row in rounds]
        ratios = [row[name] / row[FLOOR] for row in rounds]
        print(
            f"{name:<20} {median(times):.3f} s [{min(times):.3f}, {max(times):.3f}]"
            f"   {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times {FLOOR}"
        )


if __name__ == "__main__":
    main()
