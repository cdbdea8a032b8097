"""Row 9: what stored views cost in accuracy against fresh ones, at the same number of epochs.

    python -m benchmarks.view_counts --data fashion-mnist --root FOLDER --seeds 5 --epochs 48

One student for each seed and number of views V = 1, 4, 16 and 0 (online: a fresh view each epoch, teachers
run live), everything else the same: teachers, first weights, order, epochs. Differences to online are
paired by seed, with 95 % t intervals; the control on labels trains on the same views. The test split is
measured once a run, at the last epoch, and nothing is chosen on it. Writes results/view-counts-NAME.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, commit_now, surroundings, t_interval
from ensemble_kd import distill, files
from ensemble_kd.tables import text_table

COUNTS = (1, 4, 16, 0)


def accuracies(chosen: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Student's and control's test accuracy, and seconds, by number of views."""
    row = {}
    for count in COUNTS:
        run = distill(
            chosen.teachers,
            chosen.student,
            data=chosen.data,
            data_root=chosen.root,
            limit_train=chosen.limit,
            augment=chosen.augment,
            views=count,
            controls=chosen.controls,
            epochs=chosen.epochs,
            batch_size=chosen.batch,
            seed=seed,
            device=chosen.device,
            offline=True,
            out=folder / f"{seed}-{count}",
        )
        models = run.metrics["models"]
        row[str(count)] = {
            "student": models["student"]["accuracy"]["value"],
            "labels": models.get("labels", {}).get("accuracy", {}).get("value", float("nan")),
            "agreement": models["student"]["agreement"]["value"],
            "seconds": sum(v for k, v in run.metrics["seconds"].items() if k in ("targets", "student")),
        }
    return row


def no_control(values: dict[str, np.ndarray]) -> bool:
    """Whether there was no control."""
    return bool(np.isnan(values["labels"]).any())


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table: accuracy by V, and the difference to online with its interval, in points."""
    table = []
    for count in map(str, COUNTS):
        values = {name: np.array([row[count][name] for row in rows]) for name in rows[0][count]}
        online = np.array([row["0"]["student"] for row in rows])
        apart = t_interval(100 * (values["student"] - online))
        table.append(
            [
                "online" if count == "0" else count,
                f"{100 * values['student'].mean():.2f} %",
                "–" if count == "0" else f"{apart['mean']:+.2f} [{apart['low']:+.2f}, {apart['high']:+.2f}]",
                "–" if no_control(values) else f"{100 * values['labels'].mean():.2f} %",
                f"{100 * values['agreement'].mean():.2f} %",
                f"{values['seconds'].mean():.0f} s",
            ]
        )
    return table


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--name", help="of the results; default the data's")
    parser.add_argument("--teachers", default="resnet18,vgg16")
    parser.add_argument("--student", default="lenet")
    parser.add_argument("--augment", default="auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--controls", default="labels", help="labels, or none to save their time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the sources, where there is no repository")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    """Run all, write and print."""
    chosen = options_of()
    facts = surroundings(chosen.commit or commit_now())
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name(0)
    settings = {k: str(v) for k, v in vars(chosen).items() if k not in ("root", "out", "commit")}
    rows: list[dict[str, Any]] = []
    name = chosen.name or chosen.data.rpartition(":")[2].rpartition("/")[2]
    for seed in range(chosen.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(accuracies(chosen, seed, Path(folder)))
        result = facts | {"settings": settings, "seeds": rows}
        files.write_json(chosen.out / f"view-counts-{name}.json", result)
    headers = ["views", "student", "− online, points", "labels alone", "agreement", "targets + student"]
    print(text_table(headers, summary(rows), f"{name}, {chosen.student}, {len(rows)} seeds"))


if __name__ == "__main__":
    main()
