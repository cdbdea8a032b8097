"""Options from a file, `--set`, the environment, then flags or arguments: merged, checked at once, written back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ensemble_kd.errors import ConfigError, Problem, listing, nearest, shortened
from ensemble_kd.fields import Options
from ensemble_kd.yamls import UNREADABLE, parse_value, read_table, read_yaml, why_unread

__all__ = ["read_yaml", "resolve", "to_yaml"]

M = TypeVar("M", bound=Options)

SHORT = {
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "lr": "training.lr",
    "teacher_epochs": "teacher_training.epochs",
}
"""Short names of nested options, for flags and Python arguments."""
VARIABLE = "EKD_"
"""What the names of environment variables begin with: EKD_SEED, EKD_TRAINING__EPOCHS."""


def resolve(
    model: type[M], given: Mapping[str, Any], *, file: Path | None = None, sets: Sequence[str] = ()
) -> M:
    """The options from a YAML `file`, `sets`, then `given`; later ones win.

    Args:
        sets: assignments such as `training.epochs=3`, whose values are YAML, or as an environment variable
            has them, `EKD_TRAINING__EPOCHS=3`, whose values are texts as flags have them.

    Raises:
        ConfigError: with everything that is wrong, at once.
    """
    options, _ = resolved(model, given, file=file, sets=sets)
    return options


def values_of(text: str) -> list[Any]:
    """`1,2,4`, or a list as in YAML, to values.

    Raises:
        ConfigError: it cannot be read.

    Examples:
        >>> values_of("1,2.5,labels"), values_of("[[0.5, 0.5], null]")
        ([1, 2.5, 'labels'], [[0.5, 0.5], None])
    """
    parts = [text] if text.lstrip().startswith("[") else [part for part in text.split(",") if part.strip()]
    try:
        values = [parse_value(part) for part in parts]
    except UNREADABLE as error:
        raise ConfigError(f"{shortened(text)} cannot be read", why_unread(error), "quote it") from error
    return values[0] if parts == [text] and isinstance(values[0], list) else values


def resolved(
    model: type[M], given: Mapping[str, Any], *, file: Path | None = None, sets: Sequence[str] = ()
) -> tuple[M, Merged]:
    """`resolve`, and where each value came from."""
    merged = Merged(model)
    if file:
        merged.take_file(file)
    for assignment in sets:
        merged.take_assignment(assignment)
    for key, value in given.items():
        if value is not None:
            merged.assign(SHORT.get(key, key), value, "flag")
    options, found = _validate(model, merged)
    if merged.problems + found or options is None:
        raise ConfigError(merged.problems + found)
    return options, merged


@dataclass
class Merged:
    """Values from several places, the last of which counts."""

    model: type[Options]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """By dotted name: the file, `--set`, the name of a variable, or `flag`."""
    problems: list[Problem] = field(default_factory=list)

    def take_file(self, path: Path) -> None:
        """The table in a YAML file; an option that is there under two names is a problem."""
        table, twice = read_table(path, "--config")
        self.problems += twice
        names: dict[str, str] = {}
        for key, value in table.items():
            for leaf, inner in self._leaves(SHORT.get(key, key), value):
                if leaf in names and names[leaf] != key:
                    what = f"{path}: {names[leaf]!r} and {key!r} both say {leaf}"
                    self.problems.append(Problem(what, "one of them would be lost", "keep one of the two"))
                names[leaf] = key
                self.assign(leaf, inner, str(path))

    def take_assignment(self, text: str) -> None:
        """`a.b=value`, or an environment variable with its value."""
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            self.problems.append(
                Problem(f"--set {text} assigns nothing", "there is no = in it", "say --set a.b=value")
            )
        elif key.startswith(VARIABLE):
            name = option_of(key)
            self.assign(SHORT.get(name, name), value, key)
        else:
            try:
                parsed = parse_value(value) if value.strip() else None
            except UNREADABLE as error:
                what = f"--set {shortened(text)} cannot be read"
                self.problems.append(Problem(what, why_unread(error), "quote it"))
                return
            self.assign(SHORT.get(key, key), parsed, "--set")

    def assign(self, dotted: str, value: Any, origin: str) -> None:
        """Set an option, or each option of a table."""
        for leaf, inner in self._leaves(dotted, value):
            *parents, last = leaf.split(".")
            table = self.values
            for parent in parents:
                below = table.get(parent)
                table[parent] = dict(below) if isinstance(below, Mapping) else {}
                table = table[parent]
            table[last] = inner
            for old in [name for name in self.origins if name.startswith(f"{leaf}.")]:
                del self.origins[old]
            self.origins[leaf] = origin

    def origin(self, dotted: str) -> str:
        """Where the value of an option came from."""
        while dotted not in self.origins and "." in dotted:
            dotted = dotted.rpartition(".")[0]
        return self.origins.get(dotted, "default")

    def _leaves(self, dotted: str, value: Any) -> Iterator[tuple[str, Any]]:
        """The options that a value is for: itself, or those of the table that it is."""
        if isinstance(value, Mapping) and table_at(self.model, dotted):
            for key, inner in value.items():
                yield from self._leaves(f"{dotted}.{key}", inner)
        else:
            yield dotted, value


def option_of(variable: str) -> str:
    """`EKD_TRAINING__EPOCHS` to `training.epochs`."""
    return variable.removeprefix(VARIABLE).lower().replace("__", ".")


def variable_of(option: str) -> str:
    """`training.epochs` to `EKD_TRAINING__EPOCHS`.

    Examples:
        >>> variable_of("training.epochs")
        'EKD_TRAINING__EPOCHS'
    """
    return VARIABLE + option.replace(".", "__").upper()


def table_at(model: type[Options], dotted: str) -> type[Options] | None:
    """The model of the table that an option is; None where it is a single value."""
    inner: Any = model
    for part in dotted.split("."):
        known = inner.model_fields.get(part)
        inner = known.annotation if known else None
        if not (isinstance(inner, type) and issubclass(inner, Options)):
            return None
    return inner


def _validate(model: type[M], merged: Merged) -> tuple[M | None, list[Problem]]:
    values = merged.values
    try:
        options = model(**values)
        return options, [problem for _, problem in options.cross_checks()]
    except ValidationError as error:
        problems, wrong = [], set()
        for detail in _told_once(error):
            wrong.add(str(detail["loc"][0]))
            if (problem := _translate(model, detail, merged)) not in problems:
                problems.append(problem)
    # What is wrong is set aside, so that the fields that are right can be checked together.
    try:
        rest = model(**{key: value for key, value in values.items() if key not in wrong})
        problems += [problem for fields, problem in rest.cross_checks() if not fields & wrong]
    except ValidationError:
        pass
    return None, problems


def _told_once(error: ValidationError) -> list[Mapping[str, Any]]:
    """The errors, without those of the branch of a union that was not meant."""
    details: list[Mapping[str, Any]] = list(error.errors())
    meant = [detail for detail in details if detail["type"] not in ("dict_type", "float_type")]
    explained = {detail["loc"][0] for detail in meant}
    return meant + [detail for detail in details if detail["loc"][0] not in explained]


def _translate(model: type[Options], detail: Mapping[str, Any], merged: Merged) -> Problem:
    """A pydantic error as one of ours; branches of a union are told as one."""
    path = [str(part) for part in detail["loc"] if not _is_branch(part)]
    key, kind, value = ".".join(path), detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        known = keys(model)
        meant = nearest(key, known) or nearest(key, SHORT)
        why = "no option has that name" if meant else f"known are {listing(known, 40)}"
        return Problem(f"unknown option {key!r}", why, meant or "leave it out")
    if kind == "missing":
        return Problem(f"{key} is missing", "it has no default", f"name it, or say --set {key}=…")
    shown = shortened(repr(value))
    if kind == "dict_type":
        flag = f"--{key.replace('_', '-')}"
        fix = f"say {flag} NAME={shortened(str(value))}"
        return Problem(f"{key}: {shown} names no teacher", "it is given by teacher", fix)
    why, fix = _WANTED.get(kind, (str(detail["msg"]).replace("Input should be", "it should be"), ""))
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        fix = nearest(str(value), expected) or nearest(str(value).lower(), expected) or "name one of these"
    if kind == "int_parsing" and (digits := _in_digits(value)):
        why, fix = f"it should be a whole number, and {value} is a text in YAML", f"write {digits}"
    origin = merged.origin(key)
    where = f" ({origin})" if origin.startswith(VARIABLE) else ""
    return Problem(f"{key}: {shown} cannot be used{where}", why, fix or _mend(key, kind))


_WHOLE = ("it should be a whole number", "write it in digits, such as 10")
_NUMBER = ("it should be a number", "write one, such as 0.1")
_TRUTH = ("it should be a truth value", "write true or false")
_TEXT = ("it should be a text", "put it in quotes")
_WANTED = {
    "int_parsing": _WHOLE,
    "int_type": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": _WHOLE,
    "float_parsing": _NUMBER,
    "float_type": _NUMBER,
    "truth": ("it should be a number, not a truth value", "write a number"),
    "bool_parsing": _TRUTH,
    "bool_type": _TRUTH,
    "string_type": _TEXT,
    "path_type": _TEXT,
    "list_type": ("it should be a list", "write [a, b], or none"),
    "model_type": ("it should be a table of options", "write it with a dot, such as training.epochs"),
}
"""What values should be, and what to write, by pydantic's names of errors."""


def _in_digits(value: object) -> str:
    """A whole number such as 1e3 in digits; an empty string where it is none, or a long one."""
    try:
        number = float(str(value))
    except ValueError:
        return ""
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else ""


def _mend(key: str, kind: str) -> str:
    if kind in ("greater_than", "greater_than_equal", "less_than_equal", "less_than", "finite_number"):
        return f"give {key} a number in that range"
    return "see --help for what it takes"


def _is_branch(part: object) -> bool:
    return isinstance(part, str) and (
        part.startswith(("dict[", "list[", "literal[", "constrained", "function-")) or part == "float"
    )


def keys(model: type[Options], prefix: str = "") -> list[str]:
    """The names of all options, those of tables with a dot."""
    found = []
    for name in model.model_fields:
        found.append(prefix + name)
        if inner := table_at(model, name):
            found += keys(inner, f"{prefix}{name}.")
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result


def to_yaml(options: Options, **resolved: Any) -> str:
    """The options as YAML; `resolved` replaces values that were left to choose."""
    values = options.model_dump(mode="json") | resolved
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
