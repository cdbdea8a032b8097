"""`ekd config`: the options of verbs, in files and after merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ensemble_kd.cli.options import Debug, Json, Quiet, emit, guarded, merging
from ensemble_kd.configuration import VERBS

config = typer.Typer(
    help="Write, show and check configurations.", no_args_is_help=True, rich_markup_mode=None
)
Verb = Annotated[str, typer.Argument(help="whose options: distill, train, evaluate, …")]


@config.command("init")
def init(
    verb: Verb = "distill",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="where to write it; else it is printed")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a YAML file with every option of a verb, what it is, and its default."""

    def work() -> None:
        from ensemble_kd import files
        from ensemble_kd.configuration import config_template
        from ensemble_kd.errors import ConfigError

        text = config_template(verb)
        if out and out.exists() and not overwrite:
            raise ConfigError(
                f"{out} is there already", "it is not replaced unasked", "say --overwrite, or name another"
            )
        if out:
            files.write_text(out, text)
        said = f"{out}: use it with ekd {verb} --config {out}" if out else text.rstrip()
        emit(json, {"verb": verb, "file": out and str(out), "text": text}, said)

    guarded(work, quiet=quiet, debug=debug)


@config.command(
    "show",
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": ["-h", "--help"],
    },
)
def show(
    context: typer.Context,
    verb: Verb = "distill",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show all options of a verb after merging, and where each came from.

    All flags of the verb can follow: ekd config show distill --config FILE --set a.b=c --seed 3
    """
    words = context.args
    if verb.startswith("-"):  # flags at once: the verb was left out
        verb, words = "distill", [verb, *words]

    found = merging(context, verb, words) if verb in VERBS else None

    def work() -> None:
        from ensemble_kd.configuration import options_of, show_config, shown

        options_of(verb)
        assert found is not None
        given, file, sets = found()
        rows = show_config(verb, config_file=file, sets=sets, **given)
        values: dict[str, Any] = {
            row["option"]: {"value": row["value"], "from": row["origin"]} for row in rows
        }
        emit(json, {"verb": verb, "options": values}, shown(rows))

    guarded(work, quiet=quiet, debug=debug)


@config.command("validate")
def validate(
    file: Annotated[str, typer.Argument(help="YAML file")],
    verb: Annotated[
        str | None, typer.Argument(help="whose options; by default those it was written for, or of distill")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say everything that is wrong with a file, and return 2 then; data and models are looked at by --dry-run."""

    def work() -> None:
        from ensemble_kd.configuration import validate_config

        turned = verb is not None and verb not in VERBS and file in VERBS  # as with init and show
        path, wanted = (str(verb), file) if turned else (file, verb)
        found = validate_config(path, wanted)
        emit(json, {"file": path, "verb": found}, f"{path}: nothing is wrong with it, for ekd {found}")

    guarded(work, quiet=quiet, debug=debug)
