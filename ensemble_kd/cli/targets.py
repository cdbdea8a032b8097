"""`ekd targets`: the kept outputs of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble_kd.cli.options import NO_TRAIN, Debug, Json, Quiet, emit, guarded, verb
from ensemble_kd.schema import DistillOptions

targets = typer.Typer(
    help="Build, list, verify and remove the kept outputs of teachers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_FLAGS = (
    "teachers",
    "student",
    "data",
    "data_root",
    "split",
    "image_size",
    "limit_train",
    "unlabelled",
    "unlabelled_only",
    "augment",
    "mix",
    "views",
    "top_k",
    "temperature",
    "loss",
    "combine",
    "weights",
    "pool",
    "calibrate",
    "class_map",
    "feature_weight",
    "epochs",
    "teacher_epochs",
    "teacher_size",
    "teacher_batch",
    "shard_teachers",
    "stem",
    "train_teachers",
    "seed",
    "teacher_seed",
    "device",
    "offline",
)
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="the beginning of a key")]


@targets.command("build")
@verb(DistillOptions, _FLAGS, switches=NO_TRAIN, planned="targets build")
def build(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Run teachers on all views of the training images now; `ekd distill` with the same options finds them."""
    from ensemble_kd.files import readable
    from ensemble_kd.judges import build_targets
    from ensemble_kd.tables import text_table

    made = build_targets(given.pop("teachers", None), config_file=config, sets=sets, **given)
    rows = [[row["teacher"], readable(row["bytes"]), row["folder"]] for row in made["teachers"]]
    mixed = "" if made["mix"] == "none" else f" with {made['mix']}"
    title = f"{made['data']}: {made['views']} views of {made['images']:,} images by {made['policy']}{mixed}"
    emit(as_json, made, text_table(["teacher", "size", "folder"], rows, title))


@targets.command("ls")
def ls(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List what is kept, the last used first."""

    def work() -> None:
        from ensemble_kd.files import readable
        from ensemble_kd.tables import text_table
        from ensemble_kd.teachers.store import targets_dir
        from ensemble_kd.teachers.stored import list_targets

        rows = list_targets()
        shown = [
            [
                row["key"][:12],
                *(str(row[name] or "–") for name in ("teacher", "data", "policy", "kind")),
                _views(row["views"], row["missing_shards"]),
                readable(row["bytes"]),
                row["used"][:10],
            ]
            for row in rows
        ]
        headers = ["key", "teacher", "data", "views of", "kind", "views", "size", "last used"]
        total = readable(sum(row["bytes"] for row in rows))
        text = f"{text_table(headers, shown)}\n\n{total} in {targets_dir()}"
        emit(json, {"targets": rows}, text if rows else f"no targets are kept in {targets_dir()}")

    guarded(work, quiet=quiet, debug=debug)


def _views(views: int | None, missing: int | None) -> str:
    if views is None:
        return "damaged"
    return f"{views}, and a part" if missing else str(views)


@targets.command("verify")
def verify(keys: Keys = None, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Compare all that is kept, or what keys name, with its checksums; 2 is returned where something is damaged."""

    def work() -> None:
        from ensemble_kd.errors import EkdError, listing
        from ensemble_kd.tables import text_table
        from ensemble_kd.teachers.stored import verify_targets

        rows = verify_targets(keys or [])
        shown = [
            [
                row["key"][:12],
                *(str(row[name] or "–") for name in ("teacher", "data", "shards")),
                listing(row["damaged"], 3) or "nothing",
            ]
            for row in rows
        ]
        text = text_table(["key", "teacher", "data", "parts", "damaged"], shown)
        emit(json, {"targets": rows}, text if rows else "no targets are kept")
        if damaged := [row for row in rows if row["damaged"]]:
            raise EkdError(
                f"kept targets are damaged: {listing(row['key'][:12] for row in damaged)}",
                "they are not what was written: a disk or another program changed them",
                "run the distillation again: damaged parts are noticed and made anew",
            )

    guarded(work, quiet=quiet, debug=debug)


@targets.command("prune")
def prune(
    keys: Keys = None,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="what was not used for so many days")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="all that is kept")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only tell what would go")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove kept targets, and what killed runs left over."""

    def work() -> None:
        from ensemble_kd.files import readable
        from ensemble_kd.teachers.stored import prune_targets

        done = prune_targets(keys or [], older_than, everything, dry_run)
        verb = "would be removed" if dry_run else "removed"
        lines = [f"{verb}: {_named(row)}, {readable(row['bytes'])}" for row in done["removed"]]
        lines += [f"{verb}: {path}, left over" for path in done["leftovers"]]
        lines += [f"in use, and left: {_named(row)}" for row in done["in_use"]]
        emit(json, done, "\n".join([*lines, f"{readable(done['bytes'])} {verb}"]))

    guarded(work, quiet=quiet, debug=debug)


def _named(row: dict[str, str]) -> str:
    teacher = f" {row['teacher']} for {row['data']}" if row["teacher"] else ""
    return f"{row['key'][:12]}{teacher}"
