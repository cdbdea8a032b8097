"""Every combiner and the baselines, with three unlike teachers and a bad one, over several seeds.

    python -m benchmarks.combiners NAME --seeds 0,1,2 [--teachers A,B,C] OPTION=VALUE ...
    python -m benchmarks.combiners NAME --show

OPTION=VALUE are options of `ekd distill`. The bad teacher is a LeNet that saw 200 images; all teachers
are the same for all seeds. Each seed trains one student a combiner and the control on labels, from the
same first weights. Prints three tables and writes benchmarks/results/combiners-NAME.json with the machine,
the commit and the command.
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
from ensemble_kd.training import train
from ensemble_kd.weighting import COMBINERS

COLUMNS = {"accuracy": 100.0, "nll": 1.0, "ece": 1.0, "agreement": 100.0}
RUNS = Path("runs/combiners")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teachers", default="resnet8,cifar-quick,mobilenetv3_small_050")
    parser.add_argument("--show", action="store_true", help="print the tables of an earlier run")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    path = RESULTS / f"combiners-{arguments.name}.json"
    if arguments.show:
        print(tables(files.read_json(path), arguments.name))
        return
    log_to_stderr()
    started, commit = time.perf_counter(), commit_now()
    teachers = [*arguments.teachers.split(","), str(bad_teacher(arguments))]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    runs = {name: [] for name in ("labels", "mean", *COMBINERS) if name != "fixed"}
    for seed in seeds:
        for name in [name for name in runs if name != "labels"]:
            metrics = one(name, seed, teachers, arguments)
            runs[name].append(metrics["models"]["student"])
            if name == "mean":
                runs["labels"].append(metrics["models"]["labels"])
                judges = {k: v for k, v in metrics["models"].items() if v["role"] in ("teacher", "ensemble")}
    seconds = time.perf_counter() - started
    summary = {"students": summarise(runs), "judges": judges, "seeds": seeds, "seconds": seconds}
    summary |= {"data": metrics["data"], "n": metrics["n"]}
    print(tables(summary, arguments.name))
    files.write_json(path, summary | surroundings(commit))


def bad_teacher(arguments: argparse.Namespace) -> Path:
    """A LeNet that saw 200 images for three epochs, as a run folder."""
    folder = RUNS / arguments.name / "bad"
    data = [text for text in arguments.options if text.split("=")[0] in ("data", "data_root", "image_size")]
    train(
        "lenet", role="control", sets=[*data, "limit_train=200", "training.epochs=3"], out=folder,
        overwrite=True,
    )  # fmt: skip
    return folder


def one(name: str, seed: int, teachers: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The metrics of one student; the run with `mean` also trains the control on labels."""
    return distill(
        teachers,
        combine=name,
        seed=seed,
        controls="labels" if name == "mean" else "none",
        sets=arguments.options,
        out=RUNS / arguments.name / f"{name}-{seed}",
        overwrite=True,
    ).metrics


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each measure of each student over the seeds, with mean and sd."""
    rows = {}
    for name, models in runs.items():
        values = {column: [model[column]["value"] for model in models] for column in COLUMNS}
        rows[name] = {
            column: dict(zip(("mean", "sd"), mean_and_spread(v), strict=True), values=v)
            for column, v in values.items()
        }
    return rows


def tables(summary: dict[str, Any], name: str) -> str:
    """The measures, then each student's paired differences to labels alone and to equal weights."""
    students, seeds = summary["students"], len(summary["seeds"])
    rows = [
        [name, *(spread_cell(row[column], scale) for column, scale in COLUMNS.items())]
        for name, row in students.items()
    ]
    for judge, row in summary["judges"].items():
        label = judge if row["role"] == "ensemble" else f"teacher {judge}"
        rows.append(
            [
                label,
                *(
                    f"{100 * row[c]['value']:.2f} %" if scale == 100 else f"{row[c]['value']:.4f}"
                    for c, scale in COLUMNS.items()
                ),
            ]
        )
    headers = ["", "accuracy", "NLL", "ECE", "agreement"]
    title = f"{name}, test split, {summary['n']:,} images, {seeds} seeds: mean ± sd"
    parts = [text_table(headers, rows, title)]
    for other, words in (("labels", "labels alone"), ("mean", "equal weights")):
        rows = [
            [name, *(difference(row[c], students[other][c], scale) for c, scale in COLUMNS.items())]
            for name, row in students.items()
            if name != other
        ]
        headers = ["", "points of accuracy", "NLL", "ECE", "points of agreement"]
        parts.append(text_table(headers, rows, f"minus {words}, paired by seed, with 95 % t intervals"))
    return "\n\n".join(parts)


def difference(first: dict[str, Any], second: dict[str, Any], scale: float) -> str:
    """Mean of the differences seed by seed, with its interval."""
    measured = t_interval(scale * np.subtract(first["values"], second["values"]))
    digits = 2 if scale == 100 else 4
    mean, low, high = (f"{measured[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
