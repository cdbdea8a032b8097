"""`ekd evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_kd.cli.options import emit, verb
from ensemble_kd.schema import EvaluateOptions

_FLAGS = ("path", "data", "data_root", "split", "image_size", "on", "device", "offline")


@verb(EvaluateOptions, _FLAGS, arguments=["path"])
def evaluate(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Judge a trained model on a data set."""
    from ensemble_kd.evaluation import evaluate as run
    from ensemble_kd.tables import metrics_table

    metrics = run(given.pop("path", None), config_file=config, sets=sets, **given)
    emit(as_json, metrics, metrics_table(metrics))
