"""`ekd study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.cli.options import NO_TRAIN, emit, verb
from ensemble_kd.grid import StudyOptions

_FLAGS = (
    "study",
    "over",
    "seeds",
    "baseline",
    "measures",
    "jobs",
    "fleet",
    "teachers",
    "student",
    "data",
    "data_root",
    "limit_train",
    "temperature",
    "soft_weight",
    "loss",
    "augment",
    "views",
    "epochs",
    "batch_size",
    "lr",
    "teacher_epochs",
    "train_teachers",
    "device",
    "offline",
    "out",
    "overwrite",
)
_SWITCHES = {**NO_TRAIN, "fleet": ("--no-fleet", "train every point by itself")}


@verb(StudyOptions, _FLAGS, arguments=["study"], switches=_SWITCHES)
def study(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Vary any options of distill over a grid and seeds, and say what they change."""
    from ensemble_kd.studying import study as run

    result = run(given.pop("study", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(f"\npage: {result.page}, table: {result.folder / 'results.csv'}", file=sys.stderr)
