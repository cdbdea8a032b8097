"""`ekd doctor`."""

from __future__ import annotations

import typer

from ensemble_kd.cli.options import Debug, Json, Quiet, emit, guarded


def doctor(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Look at versions, devices, caches, extras and data; return 2 where something keeps it from working."""

    def work() -> None:
        from ensemble_kd.examining import described
        from ensemble_kd.examining import doctor as examine

        facts = examine()
        emit(json, facts, described(facts))
        if not facts["usable"]:
            raise typer.Exit(2)

    guarded(work, quiet=quiet, debug=debug)
