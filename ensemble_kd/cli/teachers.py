"""`ekd analyze-teachers`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.cli.options import NO_TRAIN, emit, hint_next, verb
from ensemble_kd.schema import TeachersOptions

_FLAGS = (
    "teachers",
    "data",
    "data_root",
    "split",
    "image_size",
    "limit_train",
    "combine",
    "weights",
    "pool",
    "calibrate",
    "class_map",
    "augment",
    "teacher_epochs",
    "teacher_size",
    "stem",
    "train_teachers",
    "seed",
    "teacher_seed",
    "device",
    "offline",
    "out",
)


@verb(TeachersOptions, _FLAGS, switches=NO_TRAIN)
def analyze_teachers(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Judge teachers on the validation split: each alone, every combiner, and which one to drop."""
    from ensemble_kd.analysis.teachers import analyze_teachers as run

    result = run(config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(f"\nnumbers: {result.folder / 'teachers.json'}", file=sys.stderr)
    kept = {flag: value for flag, value in given.items() if value is not None and flag != "out"}
    hint_next(["ekd", "distill", *(word for flag, value in kept.items() for word in _as_flag(flag, value))])


def _as_flag(name: str, value: Any) -> list[str]:
    """A flag as it was given, for a command that follows."""
    if name == "train_teachers":
        return ["--no-train"]
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    return [flag, ",".join(value) if isinstance(value, list) else str(value)]
