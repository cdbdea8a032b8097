"""Flags made from the fields of the option models, so that each option is described once."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ensemble_kd import console, distributed
from ensemble_kd.cli.completion import for_option
from ensemble_kd.config import SHORT, variable_of
from ensemble_kd.configuration import from_environment
from ensemble_kd.errors import EkdError
from ensemble_kd.fields import Options
from ensemble_kd.interrupts import as_interrupt

STOPPED = 75
_COMMON = ("json", "quiet", "debug", "dry_run")
NO_TRAIN = {"train_teachers": ("--no-train", "fail where a teacher would have to be trained")}
_TABLES = {
    "temperature": "T|NAME=T,...",
    "teacher_size": "NAME=N,...",
    "class_map": "NAME=FILE,...",
    "over": "NAME=A,B,...",
    "baseline": "labels|none|NAME=A,...",
}

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file with any of the options")
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=V", help="any option; repeatable")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of the table")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only warnings and the result")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="say what would run, for how long and how much it takes; write nothing"),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


class Merging(NamedTuple):
    """What an options model is made from: flags, then before them a file, and assignments with the environment."""

    given: dict[str, Any]
    config: Path | None
    sets: list[str]


def verb(
    model: type[Options],
    flags: Sequence[str],
    arguments: Sequence[str] = (),
    switches: Mapping[str, tuple[str, str]] | None = None,
    planned: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn `work(given, config, sets, json)` into a command with one flag a field in `flags`.

    Args:
        model: whose fields describe the flags; nested ones by the short names of `config.SHORT`.
        flags: names of fields; those named in `arguments` become positional.
        switches: field → flag and help for booleans that are on by default, such as `--no-train`.
        planned: the verb as `planning.plan` knows it, where there is `--dry-run`.
    """

    def read(config: Path | str | None, sets: Sequence[str] | None, **words: Any) -> Merging:
        given = {
            flag: list(words[flag]) if isinstance(words[flag], tuple) else words[flag]
            for flag in flags
            if words[flag] not in (None, [], (), False)
        }
        for field in switches or {}:
            given[field] = False if words[field] else None
        variables = from_environment(model, os.environ)
        return Merging(given, Path(config) if config else None, [*(sets or ()), *variables])

    def decorate(work: Callable[..., None]) -> Callable[..., None]:
        def command(json: bool, quiet: bool, debug: bool, dry_run: bool = False, **words: Any) -> None:
            def job() -> None:
                given, config, sets = read(**words)
                if dry_run:
                    show_plan(json, planned, config_file=config, sets=sets, **given)
                else:
                    work(given, config, sets, json)

            device = words.get("device") or os.environ.get(variable_of("device")) or "auto"
            guarded(job, quiet=quiet, debug=debug, device=device)

        command.read = read  # type: ignore[attr-defined]
        parameters = [
            _parameter(model, flag, flag in arguments, (switches or {}).get(flag)) for flag in flags
        ]
        common = {"config": Config, "sets": Sets, "json": Json, "quiet": Quiet, "debug": Debug}
        defaults = {"config": None, "sets": None, "json": False, "quiet": False, "debug": False}
        if planned:
            common, defaults = {"dry_run": DryRun, **common}, {"dry_run": False, **defaults}
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
            for name, hint in common.items()
        ]
        command.__name__, command.__doc__ = work.__name__, work.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def merging(context: typer.Context, verb: str, words: Sequence[str]) -> Callable[[], Merging]:
    """What a verb would be given by these flags, and by the environment; wrong flags end as they do there."""
    command: Any = context.find_root().command.get_command(context, verb)  # type: ignore[attr-defined]
    with command.make_context(f"ekd {verb}", list(words)) as inner:
        told = {name: value for name, value in inner.params.items() if name not in _COMMON}
    return lambda: command.callback.read(**told)


def _parameter(
    model: type[Options], name: str, positional: bool, switch: tuple[str, str] | None
) -> inspect.Parameter:
    field = _field(model, SHORT.get(name, name))
    text = field.description or ""
    if SHORT.get(name, "").startswith("teacher_training."):
        text = f"for teachers trained here: {text}"
    plain = field.default
    if isinstance(plain, (str, int, float)) and not isinstance(plain, bool) and plain not in ("",):
        text += f"; default {plain}"
    elif isinstance(plain, list) and plain:
        text += f"; default {','.join(plain)}"
    offer = for_option(name, field.annotation)
    flag, text = switch or (f"--{name.replace('_', '-')}", text)
    if switch or field.annotation is bool:
        hint: Any = Annotated[bool, typer.Option(flag, help=text)]
        default: Any = False
    elif positional and isinstance(field.default, list):
        metavar = name.removesuffix("s").upper()
        hint, default = (
            Annotated[list[str] | None, typer.Argument(help=text, metavar=metavar, autocompletion=offer)],
            None,
        )
    elif positional:
        hint, default = (
            Annotated[str | None, typer.Argument(help=text, metavar=name.upper(), autocompletion=offer)],
            None,
        )
    elif _takes_several(field.default, name):
        metavar = _TABLES.get(name, "A,B")
        hint, default = (
            Annotated[list[str] | None, typer.Option(flag, help=text, metavar=metavar, autocompletion=offer)],
            None,
        )
    else:
        hint, default = (
            Annotated[
                str | None, typer.Option(flag, help=text, metavar=_metavar(field), autocompletion=offer)
            ],
            None,
        )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _field(model: type[Options], dotted: str) -> Any:
    *parents, last = dotted.split(".")
    for parent in parents:
        model = model.model_fields[parent].annotation  # type: ignore[assignment]
    return model.model_fields[last]


def _takes_several(default: Any, name: str) -> bool:
    return isinstance(default, (list, dict)) or name == "temperature"


def _metavar(field: Any) -> str:
    text = str(field.annotation)
    if "Literal" in text:
        return "NAME"
    return "N" if "int" in text or "float" in text else "PATH" if "Path" in text else "TEXT"


def guarded(work: Callable[[], None], *, quiet: bool, debug: bool, device: str = "auto") -> None:
    """Run a command; every error becomes a message and an exit code, never a traceback.

    Of several processes the first alone logs; `device` is where they will compute.
    """
    console.log_to_stderr(quiet, silent=not distributed.speaks())
    try:
        with as_interrupt(), distributed.joined(device):
            work()
    except EkdError as error:
        if debug:
            raise
        for problem in error.problems:
            print(f"error: {problem if distributed.speaks() else problem.what}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped: what was finished is kept", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except typer.Exit:
        raise
    except BrokenPipeError:  # who reads stdout has seen enough, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        why = getattr(error, "strerror", None) or str(error) or "no message"
        print(
            f"error: {type(error).__name__}{where}\n  why: {why}\n  fix: see more with --debug",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


def show_plan(as_json: bool, verb: str, **arguments: Any) -> None:
    """Print what a verb would do."""
    from ensemble_kd.planning import plan

    found = plan(verb, **arguments)
    emit(as_json, found.facts, found.table())


def emit(as_json: bool, value: Any, text: str) -> None:
    """Print the result on stdout: as one JSON object, or as text."""
    if not distributed.speaks():
        return
    if as_json:
        from ensemble_kd.files import to_json

        print(to_json(value))
    else:
        print(text)


def hint_next(*commands: Sequence[object]) -> None:
    """The next commands to try, on stderr, quoted for a shell."""
    if not distributed.speaks():
        return
    lines = ("  " + shlex.join(str(word) for word in command) for command in commands)
    print("\nnext:", *lines, sep="\n", file=sys.stderr)
