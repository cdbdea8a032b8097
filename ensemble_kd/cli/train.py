"""`ekd train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_kd.cli.options import emit, hint_next, verb
from ensemble_kd.schema import TrainOptions

if TYPE_CHECKING:
    from ensemble_kd.training import TrainResult

_FLAGS = (
    "model",
    "data",
    "data_root",
    "split",
    "image_size",
    "limit_train",
    "role",
    "size",
    "stem",
    "augment",
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "device",
    "compile",
    "profile",
    "track",
    "offline",
    "out",
    "overwrite",
)


@verb(TrainOptions, _FLAGS, arguments=["model"], planned="train")
def train(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Train one network on labels, as a teacher for the library or as a control."""
    from ensemble_kd.training import train as run

    show(run(given.pop("model", None), config_file=config, sets=sets, **given), as_json)


def show(result: TrainResult, as_json: bool) -> None:
    """Print the result of a finished run of `train`."""
    from ensemble_kd.tables import metrics_table

    emit(as_json, {"run": str(result.folder), **result.metrics}, metrics_table(result.metrics))
    data = ["--data", result.metrics["data"]]
    hint_next(
        ["ekd", "distill", "--teachers", result.folder, "--student", "lenet", *data],
        ["ekd", "evaluate", result.folder],
    )
