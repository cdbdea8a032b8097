"""Every combiner and the baselines, with three unlike teachers and a bad one, over several seeds.

    python benchmarks/combiners.py DATA --seeds 0,1,2 [--teachers A,B,C] OPTION=VALUE ...

OPTION=VALUE are options of `ekd distill`. The bad teacher is a LeNet that saw 200 images; all teachers
are the same for all seeds. Each seed trains one student a combiner and the control on labels, from the
same first weights. Prints one table and writes benchmarks/results/combiners-NAME.json with the machine,
the commit and the command.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, commit_now, points, spread_cell, surroundings, t_interval

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
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
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
    summary = {"students": summarise(runs), "judges": judges}
    print(table(summary, arguments, metrics["n"], len(seeds)))
    seconds = time.perf_counter() - started
    facts = {"data": metrics["data"], "n": metrics["n"], "seeds": seeds, "seconds": seconds}
    files.write_json(RESULTS / f"combiners-{arguments.name}.json", summary | facts | surroundings(commit))


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
    """Mean and sd over seeds of each measure; accuracy against labels and against the mean, seed by seed."""
    rows = {}
    for name, models in runs.items():
        values = {column: [model[column]["value"] for model in models] for column in COLUMNS}
        rows[name] = {
            column: dict(zip(("mean", "sd"), mean_and_spread(v), strict=True), values=v)
            for column, v in values.items()
        }
        for other in ("labels", "mean"):
            theirs = [model["accuracy"]["value"] for model in runs[other]]
            rows[name][f"over_{other}"] = t_interval(np.subtract(values["accuracy"], theirs))
    return rows


def table(summary: dict[str, Any], arguments: argparse.Namespace, images: int, seeds: int) -> str:
    """One row a student, then the teachers."""
    rows = []
    for name, row in summary["students"].items():
        cells = [spread_cell(row[column], scale) for column, scale in COLUMNS.items()]
        gains = ["" if name == other else points(row[f"over_{other}"]) for other in ("labels", "mean")]
        rows.append([name, *cells, *gains])
    for name, row in summary["judges"].items():
        label = name if row["role"] == "ensemble" else f"teacher {name}"
        cells = [
            f"{100 * row[c]['value']:.2f} %" if scale == 100 else f"{row[c]['value']:.4f}"
            for c, scale in COLUMNS.items()
        ]
        rows.append([label, *cells, "", ""])
    headers = ["", "accuracy", "NLL", "ECE", "agreement", "points over labels", "points over mean"]
    title = f"{arguments.name}, test split, {images:,} images, {seeds} seeds: mean ± sd, 95 % t intervals"
    return text_table(headers, rows, title)


if __name__ == "__main__":
    main()
