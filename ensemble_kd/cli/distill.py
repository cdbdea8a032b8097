"""`ekd distill` and `ekd resume`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble_kd import distributed
from ensemble_kd.cli.options import (
    NO_TRAIN,
    Debug,
    DryRun,
    Json,
    Quiet,
    emit,
    guarded,
    hint_next,
    show_plan,
    verb,
)
from ensemble_kd.cli.train import show as show_trained
from ensemble_kd.schema import DistillOptions

if TYPE_CHECKING:
    from ensemble_kd.distillation import DistillResult

_FLAGS = (
    "teachers",
    "student",
    "data",
    "data_root",
    "split",
    "image_size",
    "limit_train",
    "temperature",
    "soft_weight",
    "loss",
    "soft_schedule",
    "feature_weight",
    "combine",
    "weights",
    "pool",
    "calibrate",
    "class_map",
    "unlabelled",
    "unlabelled_only",
    "controls",
    "augment",
    "mix",
    "views",
    "top_k",
    "epochs",
    "batch_size",
    "lr",
    "teacher_epochs",
    "teacher_size",
    "teacher_batch",
    "shard_teachers",
    "student_size",
    "stem",
    "train_teachers",
    "seed",
    "teacher_seed",
    "device",
    "compile",
    "profile",
    "track",
    "offline",
    "out",
    "overwrite",
)


@verb(DistillOptions, _FLAGS, switches=NO_TRAIN, planned="distill")
def distill(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Teach one student from several teachers, beside its controls."""
    from ensemble_kd.distillation import distill as run

    _show(run(config_file=config, sets=sets, **given), as_json)


def resume(
    run: Annotated[Path, typer.Argument(help="folder of a run that was stopped")],
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped, from its last checkpoint."""

    def work() -> None:
        if dry_run:
            show_plan(json, "resume", folder=run)
            return
        from ensemble_kd.distillation import DistillResult
        from ensemble_kd.resuming import resume as go_on

        result = go_on(run)
        if isinstance(result, DistillResult):
            _show(result, json)
        else:
            show_trained(result, json)

    guarded(work, quiet=quiet, debug=debug)


def _show(result: DistillResult, as_json: bool) -> None:
    from ensemble_kd.tables import metrics_table

    emit(as_json, {"run": str(result.folder), **result.metrics}, metrics_table(result.metrics))
    took = sum(result.metrics["seconds"].values())
    if distributed.speaks():
        print(f"\ntook {took:.0f} s; curves in {result.folder / 'curves.png'}", file=sys.stderr)
    hint_next(
        ["ekd", "report", result.folder, "--quick"],
        ["ekd", "predict", result.folder, "IMAGE.jpg"],
        ["ekd", "export", result.folder],
    )
