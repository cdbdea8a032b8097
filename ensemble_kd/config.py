"""Options from a file, then `--set`, then flags or arguments: merged, checked at once, written back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ensemble_kd.errors import ConfigError, Problem, listing, nearest, shortened
from ensemble_kd.fields import Options

M = TypeVar("M", bound=Options)

SHORT = {
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "lr": "training.lr",
    "teacher_epochs": "teacher_training.epochs",
}
"""Short names of nested options, for flags and Python arguments."""


def resolve(
    model: type[M], given: Mapping[str, Any], *, file: Path | None = None, sets: Sequence[str] = ()
) -> M:
    """The options from a YAML `file`, `--set` assignments, then `given`; later ones win.

    Raises:
        ConfigError: with everything that is wrong, at once.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in (read_yaml(file) if file else {}).items():
        _assign(values, SHORT.get(key, key), value)
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        if not equals:
            problems.append(Problem(f"--set {assignment} assigns nothing", "", "say --set a.b=value"))
            continue
        try:
            value = yaml.load(text, Loader=_Values) if text.strip() else None  # noqa: S506
        except _UNREADABLE as error:
            what = f"--set {shortened(assignment)} cannot be read"
            problems.append(Problem(what, _why_unread(error), "quote it"))
            continue
        _assign(values, SHORT.get(key.strip(), key.strip()), value)
    for key, value in given.items():
        if value is not None:
            _assign(values, SHORT.get(key, key), value)
    options, found = _validate(model, values)
    if problems + found or options is None:
        raise ConfigError(problems + found)
    return options


def values_of(text: str) -> list[Any]:
    """`1,2,4`, or a list as in YAML, to values.

    Raises:
        ConfigError: it cannot be read.
    """
    parts = [text] if text.lstrip().startswith("[") else [part for part in text.split(",") if part.strip()]
    try:
        values = [yaml.load(part, Loader=_Values) for part in parts]  # noqa: S506
    except _UNREADABLE as error:
        raise ConfigError(f"{shortened(text)} cannot be read", _why_unread(error), "quote it") from error
    return values[0] if parts == [text] and isinstance(values[0], list) else values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        values[parent] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[parent]
    values[last] = value


def _validate(model: type[M], values: dict[str, Any]) -> tuple[M | None, list[Problem]]:
    try:
        options = model(**values)
        return options, [problem for _, problem in options.cross_checks()]
    except ValidationError as error:
        problems, wrong = [], set()
        for detail in _told_once(error):
            wrong.add(str(detail["loc"][0]))
            if (problem := _translate(model, detail)) not in problems:
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


def _translate(model: type[Options], detail: Mapping[str, Any]) -> Problem:
    """A pydantic error as one of ours; branches of a union are told as one."""
    path = [str(part) for part in detail["loc"] if not _is_branch(part)]
    key, kind, value = ".".join(path), detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        known = _keys(model)
        return Problem(
            f"unknown option {key!r}",
            f"known are {listing(known, 40)}",
            nearest(key, known) or nearest(key, SHORT) or "leave it out",
        )
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
        fix = nearest(str(value), expected) or "name one of these"
    if kind == "int_parsing" and (digits := _in_digits(value)):
        why, fix = f"it should be a whole number, and {value} is a text in YAML", f"write {digits}"
    return Problem(f"{key}: {shown} cannot be used", why, fix or _mend(key, kind))


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


def _keys(model: type[Options], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        keys.append(prefix + name)
        if isinstance(inner, type) and issubclass(inner, Options):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys


class _Plain:
    """Refuses a key that is given twice or is no plain value, and aliases, which can stand for endless tables."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            event = self.peek_event()  # type: ignore[attr-defined]
            why = f"the alias *{event.anchor} stands there, and values are written out"
            raise yaml.composer.ComposerError(None, None, why, event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[attr-defined]
        for key in keys:
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", node.start_mark)
            if keys.count(key) > 1:
                why = f"the key {key!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Values(_Plain, yaml.SafeLoader):
    """Numbers, true, false, null and texts; no tag in a file can make Python objects.

    `no`, `010`, `1:30` and dates are texts, where YAML 1.1 has False, 8, 90 and dates. What PyYAML writes
    without quotes is read as what it was.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own attribute)


_EXPONENT = r"([eE][-+][0-9]+)?"
_SCALARS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": ("~|null|Null|NULL|", ("~", "n", "N", "")),
    "int": ("[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        rf"[-+]?[0-9][0-9_]*\.[0-9_]*{_EXPONENT}|\.[0-9][0-9_]*{_EXPONENT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""What is no text, and how it begins."""
for _kind, (_form, _first) in _SCALARS.items():
    _Values.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), list(_first))


class _Texts(_Plain, yaml.BaseLoader):
    """Texts alone: `no` is a name, and so is `010`."""


_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises; all but the first for a value that its tag does not fit, and for endless brackets."""


def _why_unread(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, yaml.YAMLError):
        return "it holds a value that cannot be read"
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The table of options in the YAML file that `option` names.

    Raises:
        ConfigError: the file is missing or no table.
    """
    return _read(path, option, _Values)


def read_names(path: Path, option: str) -> dict[str, Any]:
    """A table in a YAML file in which every key and value is a text, a list or a table of texts.

    Raises:
        ConfigError: the file is missing or no table.
    """
    return _read(path, option, _Texts)


def _read(path: Path, option: str, loader: type[_Values] | type[_Texts]) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # noqa: S506
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}", str(error.strerror), f"check the path of {option}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}", "it is no text", f"check the path of {option}") from error
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"cannot read {path}{where}", _why_unread(error), "mend that line") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds no table",
            "it should be a table of key: value lines",
            f"write such lines, or check the path of {option}",
        )
    return {str(key): value for key, value in loaded.items()}


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
