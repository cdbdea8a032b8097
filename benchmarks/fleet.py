"""A fleet of 16 LeNets against 16 single runs: seconds, their ratio, and how far the results are apart.

    python -m benchmarks.fleet [--count 16] [--rounds 3] OPTION=VALUE ...

Sides run in turn; teachers and targets are made before. "in turn" is what `ekd study` does on a CPU: one after
another, with shared images and teachers; "stacked" is what it does on a GPU. Writes benchmarks/results/fleet.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.config import resolve
from ensemble_kd.distillation import distill_with
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import Objects
from ensemble_kd.shared import Shared
from ensemble_kd.tables import text_table
from ensemble_kd.together import distill_together
from ensemble_kd.weights import load_student

TEMPERATURES, WEIGHTS = (1, 2, 4, 8), (0.1, 0.5, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    commit = commit_now()
    points = [(t, w) for t in TEMPERATURES for w in WEIGHTS][: arguments.count]
    with tempfile.TemporaryDirectory() as scratch:
        sides: dict[str, Callable[[Path], None]] = {
            "single": lambda folder: single(points, arguments.options, folder),
            "in turn": lambda folder: in_turn(points, arguments.options, folder),
            "stacked": lambda folder: stacked(points, arguments.options, folder),
        }
        single(points[:1], arguments.options, Path(scratch) / "first")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                side(Path(scratch) / f"{name}-{number}")
                seconds[name].append(time.perf_counter() - started)
        apart = {
            name: largest_difference(Path(scratch) / "single-0", Path(scratch) / f"{name}-0", len(points))
            for name in ("in turn", "stacked")
        }
    ratios = {
        name: [one / own for one, own in zip(seconds["single"], seconds[name], strict=True)] for name in apart
    }
    print(table(seconds, ratios, apart, len(points)))
    facts = {"seconds": seconds, "times_as_fast": ratios, "largest_difference": apart, "count": len(points)}
    files.write_json(RESULTS / "fleet.json", facts | surroundings(commit))


def options_of(point: tuple[float, float], sets: Sequence[str], out: Path) -> DistillOptions:
    """A student of that temperature and soft weight, without controls."""
    given: dict[str, Any] = {"temperature": point[0], "soft_weight": point[1], "controls": "none"}
    defaults = ["teachers=[resnet8, cifar-quick]"]
    return resolve(DistillOptions, {**given, "out": out}, sets=[*defaults, *sets])


def single(points: Sequence[tuple[float, float]], sets: Sequence[str], folder: Path) -> None:
    """Each run by itself."""
    for number, point in enumerate(points):
        shared = Shared(pictures=False)
        distill_with(options_of(point, sets, folder / str(number)), Objects({}, shared=shared))


def in_turn(points: Sequence[tuple[float, float]], sets: Sequence[str], folder: Path) -> None:
    """One after another, with shared images and teachers."""
    shared = Shared(pictures=False)
    for number, point in enumerate(points):
        distill_with(options_of(point, sets, folder / str(number)), Objects({}, shared=shared))


def stacked(points: Sequence[tuple[float, float]], sets: Sequence[str], folder: Path) -> None:
    """All in the same steps."""
    options = [options_of(point, sets, folder / str(number)) for number, point in enumerate(points)]
    if reason := distill_together(options, Shared(pictures=False)):
        raise SystemExit(f"no fleet: {reason}")


def largest_difference(first: Path, second: Path, count: int) -> float:
    """Between the weights of students of the same number."""
    pairs = [
        (load_student(first / str(number)).parameters(), load_student(second / str(number)).parameters())
        for number in range(count)
    ]
    return max(
        float((a - b).detach().abs().max())
        for ours, theirs in pairs
        for a, b in zip(ours, theirs, strict=True)
    )


def table(
    seconds: dict[str, list[float]], ratios: dict[str, list[float]], apart: dict[str, float], count: int
) -> str:
    """What is printed."""
    rows = []
    for name, own in seconds.items():
        spread = f"{statistics.median(own):.1f} ({min(own):.1f}–{max(own):.1f})"
        times = f"{statistics.median(ratios[name]):.2f}" if name in ratios else ""
        rows.append([name, spread, times, f"{apart[name]:.1e}" if name in apart else ""])
    title = f"{count} students, {len(seconds['single'])} rounds in turn: median (min–max)"
    return text_table(["", "seconds", "times as fast", "largest difference of a weight"], rows, title)


if __name__ == "__main__":
    main()
