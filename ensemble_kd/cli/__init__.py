"""The command line: one small file a verb; each parses, calls one public function and prints.

A verb's file is imported when the verb is used, so that `ekd --help` and completion need nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ensemble_kd import __version__
from ensemble_kd.errors import nearest

VERBS = {
    "distill": ("distill", "Teach one student from several teachers, beside its controls."),
    "resume": ("distill", "Go on with a run that was stopped, from its last checkpoint."),
    "train": ("train", "Train one network on labels, as a teacher or as a control."),
    "evaluate": ("evaluate", "Judge a trained model on a data set."),
    "predict": ("predict", "Label image files and folders with a trained model."),
    "export": ("export", "Write the student of a run as a folder for other programs."),
    "verify": ("verify", "Check a run, export, teacher or store against its checksums."),
    "analyze-agreement": ("agreement", "How near the student came to its teachers, beside controls."),
    "analyze-calibration": ("calibration", "How well the confidence of all models can be trusted."),
    "analyze-features": ("features", "Compare the layers of student, controls and teachers."),
    "analyze-surface": ("surface", "Compare how models divide planes through test images."),
    "analyze-teachers": ("teachers", "Before distilling: each teacher, every combiner, which to drop."),
    "report": ("report", "Say in one HTML page what runs show: did it help, and how alike they are."),
    "study": ("study", "Vary any options over a grid and seeds, and say what they change."),
    "models": ("models", "List models with parameters, input size and whether weights are at hand."),
    "data": ("data", "Show a data source, and what is wrong with it."),
    "targets": ("targets", "Build, list, verify and remove the kept outputs of teachers."),
    "config": ("config", "Write, show and check configurations."),
    "doctor": ("doctor", "What this machine has, what is missing, and how to get it."),
}
"""Each verb's file in this folder, and its line in `ekd --help`; in the file it is called like the verb."""


class _Verb(TyperCommand):
    """A command that knows why words are often left over: `--teachers a, b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        if (rest := super().parse_args(ctx, args)) and not ctx.resilient_parsing:
            words = " ".join(map(str, rest))
            ctx.fail(f"Nothing is to be done with {words!r} (names are joined by commas without spaces: a,b)")
        return rest


class _Verbs(TyperGroup):
    """Commands that are imported when they are asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}. {nearest(args[0], VERBS).capitalize()}".rstrip())
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"ensemble_kd.cli.{VERBS[cmd_name][0]}")
        found = getattr(module, cmd_name.replace("-", "_"))
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(**_COMMON, add_completion=False)
            alone.command(cmd_name, cls=_Verb)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


_COMMON: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    name="ekd",
    help="Teach several unlike image classifiers into one small one, and see whether it helped.",
    no_args_is_help=True,
    cls=_Verbs,
    **_COMMON,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="print the version"
    ),
) -> None:
    pass


def main() -> None:
    """The entry point of `ekd`."""
    app()
