"""The options of all verbs: as a file to fill in, as they are after merging, and as environment variables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from ensemble_kd import files
from ensemble_kd.config import SHORT, VARIABLE, keys, option_of, resolved, table_at, variable_of
from ensemble_kd.errors import ConfigError, Problem, listing, nearest
from ensemble_kd.fields import Options

VERBS = {
    "distill": "ensemble_kd.schema:DistillOptions",
    "train": "ensemble_kd.schema:TrainOptions",
    "evaluate": "ensemble_kd.schema:EvaluateOptions",
    "predict": "ensemble_kd.deploying:PredictOptions",
    "export": "ensemble_kd.deploying:ExportOptions",
    "study": "ensemble_kd.grid:StudyOptions",
    "data": "ensemble_kd.schema:InspectOptions",
    "analyze-teachers": "ensemble_kd.schema:TeachersOptions",
    "analyze-agreement": "ensemble_kd.analysis.options:AgreementOptions",
    "analyze-features": "ensemble_kd.analysis.options:FeaturesOptions",
    "analyze-surface": "ensemble_kd.analysis.options:SurfaceOptions",
    "analyze-calibration": "ensemble_kd.analysis.options:CalibrationOptions",
    "report": "ensemble_kd.analysis.options:ReportOptions",
}
"""The verbs that take options, and where these are described; `targets build` takes those of `distill`."""
_OTHERS = {"EKD_CACHE"}
"""Variables that are no options; those of the tests begin with EKD_TEST_."""


def options_of(verb: str) -> type[Options]:
    """The model of a verb's options.

    Raises:
        ConfigError: there is no such verb.
    """
    if verb not in VERBS:
        raise ConfigError(
            f"there is no verb {verb!r} with options",
            f"known are {', '.join(VERBS)}",
            nearest(verb, VERBS) or "name one of these",
        )
    module, _, name = VERBS[verb].partition(":")
    found: type[Options] = getattr(import_module(module), name)
    return found


def config_template(verb: str = "distill") -> str:
    """YAML with every option of a verb: what it is, and its default, or an example where there is none.

    Raises:
        ConfigError: there is no such verb.
    """
    head = f"# Every option of `ekd {verb}` with its default; what is not needed can be left out.\n\n"
    return head + "".join(f"{line}\n" for line in _lines(options_of(verb)))


def _lines(model: type[Options], indent: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if inner := table_at(model, name):
            yield f"{indent}# {(inner.__doc__ or name).splitlines()[0]}"
            yield f"{indent}{name}:"
            yield from _lines(inner, f"{indent}  ")
            continue
        yield f"{indent}# {field.description or name}"
        if field.examples:
            yield f"{indent}{_plain(name, field.examples[0])}  # an example: it has no default"
        else:
            yield f"{indent}{_plain(name, default_of(field))}"


def default_of(field: FieldInfo) -> Any:
    """The default of an option."""
    return field.get_default(call_default_factory=True, validated_data={})


def _plain(name: str, value: Any) -> str:
    """An option as a line of YAML."""
    value = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}"


def show_config(
    verb: str = "distill",
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Every option of a verb after merging.

    Args:
        config_file: YAML with any of the options.
        sets: assignments such as `"training.epochs=3"`, or `"EKD_TRAINING__EPOCHS=3"` for what a variable says.
        options: what flags say.

    Returns:
        A row for each option, by dotted name: `option`, `value`, and `origin`, which is `default`, the path of
        the file, `--set`, the name of a variable, or `flag`.

    Raises:
        ConfigError: with everything that is wrong.

    Examples:
        >>> rows = show_config("train", sets=["training.epochs=3"], model="lenet")
        >>> [(row["option"], row["value"]) for row in rows if row["origin"] != "default"]
        [('training.epochs', 3), ('model', 'lenet')]
    """
    file = Path(config_file) if config_file else None
    chosen, merged = resolved(options_of(verb), options, file=file, sets=sets)
    values = chosen.model_dump(mode="json")
    return [
        {"option": name, "value": _at(values, name), "origin": merged.origin(name)}
        for name in keys(type(chosen))
        if not table_at(type(chosen), name)
    ]


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `show_config` as YAML, which is a configuration again, with origins as comments."""
    lines = [(_plain(row["option"], row["value"]), row["origin"]) for row in rows]
    width = min(60, max(len(line) for line, _ in lines))
    return "\n".join(f"{line:{width}}  # {origin}" for line, origin in lines)


def _at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values


def validate_config(path: str | Path, verb: str | None = None) -> str:
    """Check a configuration as far as that goes without data and models.

    Args:
        verb: whose options they are; by default that of the template or of the run that it is of, or `distill`.

    Returns:
        The verb.

    Raises:
        ConfigError: with everything that is wrong.
    """
    file = Path(path)
    verb = verb or _verb_beside(file)
    resolved(options_of(verb), {}, file=file)
    return verb


def _verb_beside(file: Path) -> str:
    try:
        head = re.match(rf"# Every option of `ekd ({'|'.join(VERBS)})`", file.read_text("utf-8"))
        if head:  # `config_template` wrote it
            return head[1]
        verb = files.read_json(file.parent / "status.json")["verb"]
    except (OSError, ValueError, KeyError, TypeError):
        return "distill"
    return verb if verb in VERBS else "distill"


def from_environment(model: type[Options], environment: Mapping[str, str]) -> list[str]:
    """The variables that are options of `model`, as assignments; empty ones are as if they were not set.

    A variable that is an option of another verb is left alone: one environment serves all verbs of a script.

    Raises:
        ConfigError: the names of variables that are options of no verb.
    """
    given = {
        name: value
        for name, value in environment.items()
        if name.startswith(VARIABLE) and not name.startswith("EKD_TEST_") and name not in _OTHERS and value
    }
    _said_once(given)
    own = _variables(model)
    if set(given) <= own:  # most often; the models of all other verbs need not be loaded
        return [f"{name}={value}" for name, value in given.items()]
    known = own.union(*(_variables(options_of(verb)) for verb in VERBS))
    problems = [
        Problem(
            f"environment: {name} is no option of any verb",
            f"variables that begin with {VARIABLE} are options: {variable_of('training.epochs')}=3 is training.epochs",
            nearest(name, [*sorted(known), *_OTHERS]) or f"unset it; {listing(_OTHERS)} is none",
        )
        for name in sorted(set(given) - known)
    ]
    if problems:
        raise ConfigError(problems)
    return [f"{name}={value}" for name, value in given.items() if name in own]


def _said_once(given: Mapping[str, str]) -> None:
    """Refuse an option that two variables name, as a file with both names is refused."""
    names: dict[str, str] = {}
    for variable in given:
        option = SHORT.get(option_of(variable), option_of(variable))
        if other := names.get(option):
            what = f"environment: {other} and {variable} both say {option}"
            raise ConfigError(what, "one of them would be lost", "unset one of the two")
        names[option] = variable


def _variables(model: type[Options]) -> set[str]:
    own = [name for name in keys(model) if not table_at(model, name)]
    return {variable_of(name) for name in own} | {variable_of(s) for s, name in SHORT.items() if name in own}
