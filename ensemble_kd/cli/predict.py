"""`ekd predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from ensemble_kd.cli.options import emit, verb
from ensemble_kd.deploying import PredictOptions

_FLAGS = ("model", "images", "top", "csv", "device")


@verb(PredictOptions, _FLAGS, arguments=["model", "images"])
def predict(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Name the likeliest classes of images, by a run or an exported folder."""
    from ensemble_kd.predicting import predict_images as run

    result = run(given.pop("model", None), given.pop("images", ()), config_file=config, sets=sets, **given)
    emit(as_json, result.to_json(), result.table() if result.answers else "no image could be read")
    for problem in result.failed:
        print(f"error: {problem}", file=sys.stderr)
    if result.failed:
        raise typer.Exit(2)
