"""`ekd verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ensemble_kd.cli.options import Debug, Json, Quiet, emit, guarded


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="folder of a run, export, teacher or target store")
    ],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare a run, an export, a teacher or targets with their checksums, and reload them; 2 is returned for damage."""

    def work() -> None:
        from ensemble_kd.errors import printable
        from ensemble_kd.verifying import verify as run

        result = run(path)
        rows = [finding._asdict() for finding in result.findings]
        lines = [f"{result.kind} {result.folder}", *map(str, result.findings), result.summary]
        emit(json, {"folder": str(result.folder), "kind": result.kind, "findings": rows},
             "\n".join(map(printable, lines)))  # fmt: skip
        if result.damaged:
            raise typer.Exit(2)

    guarded(work, quiet=quiet, debug=debug)
