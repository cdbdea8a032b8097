"""`ekd models`."""

from __future__ import annotations

from typing import Annotated

import typer

from ensemble_kd.cli.options import Debug, Json, Quiet, emit, guarded


def models(
    pattern: Annotated[
        str | None, typer.Argument(help="part of a name, or a pattern such as 'tv:vgg*'")
    ] = None,
    limit: Annotated[int, typer.Option(help="how many to show")] = 40,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List models with parameters, input size and whether weights are at hand."""

    def work() -> None:
        from ensemble_kd.models import find
        from ensemble_kd.tables import text_table
        from ensemble_kd.teachers.catalogue import list_models

        found = list_models(pattern, limit)
        rows = [
            [
                row["name"],
                f"{row['parameters']:,}" if row["parameters"] else "–",
                "×".join(map(str, row["input_size"])),
                row["weights"],
            ]
            for row in found["models"]
        ]
        text = text_table(["model", "parameters", "input", "published weights"], rows)
        if found["trained"]:
            kept = [
                [t["name"], t["data"], str(t["seed"]), f"{t['val_accuracy']:.3f}"] for t in found["trained"]
            ]
            text += "\n\n" + text_table(
                ["in the teacher library", "data", "seed", "validation accuracy"], kept
            )
        if pattern is None:
            text += f"\n\n{len(find('timm:*'))} more in timm, {len(find('tv:*'))} in torchvision: ekd models PATTERN"
        elif found["matches"] > limit:
            text += f"\n\n{found['matches'] - limit} more match; show them with --limit {found['matches']}"
        emit(json, found, text)

    guarded(work, quiet=quiet, debug=debug)
