"""The table of `make bench`: rows 1, 3 to 7, 9 and 11 of the aims on this machine, every side in one run.

    python -m benchmarks [--rows 1,6] [--quick] [--device cpu]

Sides of a row take turns in blocks; medians with min–max, ratios of paired blocks. Row 9 trains 12 students,
row 11 writes 1.6 GB of JPEGs into a temporary folder. Rows that need a GPU: `python -m benchmarks.gpu`.
Writes results/speed.json with machine and commit; the rows that are not asked for keep what they had.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import growth, loaders, memory, steps, storing, view_counts
from benchmarks.blocks import as_text
from benchmarks.common import RESULTS, commit_now, surroundings, t_interval
from ensemble_kd import files
from ensemble_kd.device import choose_device


def loader_rows(quick: bool) -> list[dict[str, Any]]:
    """Row 6."""
    threads = torch.get_num_threads()
    try:
        found = loaders.rows(blocks=2 if quick else 7)
    finally:
        torch.set_num_threads(threads)
    return [
        {"row": 6, "unit": "img/CPU-s", "note": "", **row, "ratio": ratio["median"],
         "low": ratio["low"], "high": ratio["high"]}
        for row in found
        for ratio in [row["ratio"]]
    ]  # fmt: skip


def growth_rows(quick: bool) -> list[dict[str, Any]]:
    """Row 11: time and memory of a pass over the largest folder, against the smallest."""
    sizes = [500, 1500] if quick else [10_000, 30_000, 100_000]
    with tempfile.TemporaryDirectory() as folder:
        growth.make(Path(folder), sizes)
        first, *_, last = growth.measure(Path(folder), sizes, 1 if quick else 3, 64)
    rows = []
    for name, key, unit in (
        ("seconds per 1,000 images", "seconds_per_1000", "s"),
        ("peak memory", "peak_mb", "MB"),
    ):
        one, other = last[key], first[key]
        rows.append(
            {
                "row": 11,
                "name": f"{name}, {last['size']:,} / {first['size']:,} images",
                "ours": one["median"],
                "other": other["median"],
                "ratio": one["median"] / other["median"],
                "low": one["min"] / other["max"],
                "high": one["max"] / other["min"],
                "unit": unit,
                "note": "",
            }
        )
    return rows


def accuracy_rows(quick: bool, root: Path | None) -> list[dict[str, Any]]:
    """Row 9: test accuracy of V stored views minus that of fresh ones, in points, over seeds."""
    chosen = view_counts.options_of(
        ["--data", "fashion-mnist" if root else "digits", "--augment", "crop", "--teachers", "cifar-quick,lenet#1",
         "--controls", "none", "--limit", "200" if quick else "4000", "--epochs", "2" if quick else "32",
         *(["--root", str(root)] if root else [])]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        seeds = range(1 if quick else 3)
        found = [view_counts.accuracies(chosen, seed, Path(folder)) for seed in seeds]
    online = np.array([row["0"]["student"] for row in found])
    rows = []
    for count in ("1", "4", "16"):
        stored = np.array([row[count]["student"] for row in found])
        apart = t_interval(100 * (stored - online))
        rows.append(
            {
                "row": 9,
                "name": f"accuracy, {count} stored view(s) − online, {chosen.data}",
                "ours": 100 * float(stored.mean()),
                "other": 100 * float(online.mean()),
                "ratio": apart["mean"],
                "low": apart["low"],
                "high": apart["high"],
                "unit": "%",
                "note": f"points, mean and 95 % t interval over {len(found)} seeds, not a ratio",
            }
        )
    return rows


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="numbers by commas; all without")
    parser.add_argument("--quick", action="store_true", help="few and short blocks: whether it runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of its files; digits are used without")
    chosen = parser.parse_args()
    device, quick, blocks = choose_device(chosen.device), chosen.quick, 2 if chosen.quick else 7
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "1,3,4": lambda: steps.rows(device, blocks, quick),
        "5": lambda: memory.rows(device, repeats=1, exact=True),  # which repeats within 3 %
        "6": lambda: loader_rows(quick),
        "7": lambda: storing.rows(device, blocks, quick),
        "9": lambda: accuracy_rows(quick, chosen.fashion_mnist),
        "11": lambda: growth_rows(quick),
    }
    known = {number for numbers in parts for number in numbers.split(",")}
    wanted = set(chosen.rows.split(",")) if chosen.rows else known
    if unknown := wanted - known:
        parser.error(f"no rows {', '.join(sorted(unknown))}; known are {', '.join(parts)}")
    commit, path = commit_now(), RESULTS / "speed.json"
    kept = files.read_json(path) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EKD_CACHE"] = cache
        for numbers, part in parts.items():
            if wanted.isdisjoint(numbers.split(",")):
                continue
            started = time.perf_counter()
            rows = part()
            kept[numbers] = surroundings(commit) | {"seconds": time.perf_counter() - started, "rows": rows}
            if not quick:
                files.write_json(path, kept)
            print(as_text(rows, f"rows {numbers}, commit {commit}"), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
