"""`ekd data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ensemble_kd.cli.options import emit, verb
from ensemble_kd.config import resolve
from ensemble_kd.schema import InspectOptions

_FLAGS = ("data", "data_root", "split", "image_size", "offline", "sheet")


@verb(InspectOptions, _FLAGS, arguments=["data"])
def data(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Show a data source: classes, counts, sizes, a contact sheet, and what is wrong with it."""
    from ensemble_kd.data.inspect import inspect_data
    from ensemble_kd.tables import text_table

    chosen = resolve(InspectOptions, given, file=config, sets=sets)
    sheet = chosen.sheet or Path("runs") / f"data-{chosen.data.rpartition('/')[2].rpartition(':')[2]}.png"
    facts = inspect_data(sheet=sheet, **chosen.load_arguments())
    lines = []
    if "classes" in facts:
        counts = facts["counts"]
        rows = [[name, *(str(counts[split][name]) for split in counts)] for name in facts["classes"]]
        rows.append(["all", *(str(sum(counts[split].values())) for split in counts)])
        lines.append(text_table(["class", *counts], rows, str(facts["data"])))
        height, width = facts["image_size"]
        colour = "grey" if facts["channels"] == 1 else "RGB"
        lines.append(
            f"{colour}, {height}×{width}; views by default: {facts['augment']}; contact sheet: {facts['sheet']}"
        )
    lines += [f"warning: {text}" for text in facts["warnings"]]
    lines += [f"error: {text}" for text in facts["errors"]]
    emit(as_json, facts, "\n".join(lines))
    if facts["errors"]:
        raise typer.Exit(2)
