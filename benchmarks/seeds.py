"""One distillation over several seeds: mean, spread, and what was gained over the controls.

    python -m benchmarks.seeds NAME --seeds 0,1,2 [--teacher-seeds] OPTION=VALUE ...

OPTION=VALUE are options of `ekd distill`. The teachers are the same for all seeds, unless
--teacher-seeds trains them anew for each. Prints one table and writes benchmarks/results/NAME.json
with the machine, the commit and the command.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, commit_now, spread_cell, surroundings, t_interval
from ensemble_kd import files
from ensemble_kd.console import log_to_stderr
from ensemble_kd.distillation import distill
from ensemble_kd.metrics import mean_and_spread
from ensemble_kd.tables import text_table

COLUMNS = {"accuracy": 100.0, "nll": 1.0, "ece": 1.0, "teacher_student_kl": 1.0, "agreement": 100.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teacher-seeds", action="store_true")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    log_to_stderr()
    commit = commit_now()
    runs, seconds = [], []
    for seed in map(int, arguments.seeds.split(",")):
        started = time.perf_counter()
        teacher_seed = [f"teacher_seed={seed}"] if arguments.teacher_seeds else []
        result = distill(
            sets=[*arguments.options, *teacher_seed],
            seed=seed,
            out=Path("runs") / f"{arguments.name}-seed{seed}",
            overwrite=True,
        )
        runs.append(result.metrics)
        seconds.append(time.perf_counter() - started)
    summary = summarise(runs)
    print(table(summary, runs, seconds))
    facts = {
        "data": runs[0]["data"],
        "n": runs[0]["n"],
        "seeds": arguments.seeds,
        "seconds": seconds,
        "parts": [run["seconds"] for run in runs],
    }
    files.write_json(RESULTS / f"{arguments.name}.json", summary | facts | surroundings(commit))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd over seeds by model; paired gains over each control with a 95 % t interval."""
    models = {}
    for name, row in runs[0]["models"].items():
        measured = {c: [run["models"][name][c]["value"] for run in runs] for c in COLUMNS}
        models[name] = {
            "role": row["role"],
            "parameters": row["parameters"],
            **{
                c: dict(zip(("mean", "sd"), mean_and_spread(v), strict=True), values=v)
                for c, v in measured.items()
            },
        }
    gains = {}
    for control in runs[0]["differences"]:
        values = np.array([run["differences"][control]["accuracy"]["value"] for run in runs])
        gains[control] = t_interval(values)
    return {"models": models, "gains": gains}


def table(summary: dict[str, Any], runs: list[dict[str, Any]], seconds: list[float]) -> str:
    """What is printed: one row a model, then the gains."""
    rows = []
    for name, row in summary["models"].items():
        label = name if row["role"] in ("student", "ensemble") else f"{row['role']} {name}"
        cells = [spread_cell(row[column], scale) for column, scale in COLUMNS.items()]
        rows.append([label, *cells, f"{row['parameters']:,}"])
    title = f"{runs[0]['data']}, test split, {runs[0]['n']:,} images, {len(runs)} seeds, mean ± sd"
    lines = [text_table(["", "accuracy", "NLL", "ECE", "t–s KL", "agreement", "parameters"], rows, title)]
    for control, gain in summary["gains"].items():
        low, mean, high = (100 * gain[key] for key in ("low", "mean", "high"))
        lines.append(
            f"student − {control}: {mean:+.2f} points of accuracy, 95 % t interval {low:+.2f} … {high:+.2f}"
        )
    lines.append("seconds a run: " + ", ".join(f"{s:.0f}" for s in seconds))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
