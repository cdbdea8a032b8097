"""Options from a file, then `--set`, then flags or arguments: merged, checked at once, written back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ensemble_kd.errors import ConfigError, Problem, listing, nearest
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
            value = yaml.safe_load(text) if text.strip() else None
        except yaml.YAMLError:
            problems.append(Problem(f"--set {assignment} cannot be read", "the value is no YAML", "quote it"))
            continue
        _assign(values, SHORT.get(key.strip(), key.strip()), value)
    for key, value in given.items():
        if value is not None:
            _assign(values, SHORT.get(key, key), value)
    options, found = _validate(model, values)
    if problems + found or options is None:
        raise ConfigError(problems + found)
    return options


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
    if kind == "dict_type":
        flag = f"--{key.replace('_', '-')}"
        return Problem(
            f"{key}: {value!r} names no teacher", "it is given by teacher", f"say {flag} NAME={value}"
        )
    why = str(detail["msg"]).replace("Input should be", "it should be")
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        return Problem(
            f"{key}: {value!r} cannot be used", why, nearest(str(value), expected) or "name one of these"
        )
    return Problem(f"{key}: {value!r} cannot be used", why, _mend(key, kind))


def _mend(key: str, kind: str) -> str:
    if kind in ("greater_than", "greater_than_equal", "less_than_equal", "less_than", "finite_number"):
        return f"give {key} a number in that range"
    return "see --help for what it takes"


def _is_branch(part: object) -> bool:
    return isinstance(part, str) and (
        part.startswith(("dict[", "list[", "constrained", "function-")) or part == "float"
    )


def _keys(model: type[Options], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        keys.append(prefix + name)
        if isinstance(inner, type) and issubclass(inner, Options):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys


class _UniqueKeys:
    """Refuses a key that is given twice, and one that is no plain value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[attr-defined]
        for key in keys:
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", node.start_mark)
            if keys.count(key) > 1:
                why = f"the key {key!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Values(_UniqueKeys, yaml.SafeLoader):
    """Numbers, truth values and texts; no tag in a file can make Python objects."""


class _Texts(_UniqueKeys, yaml.BaseLoader):
    """Texts alone: `no` is a name, and so is `010`."""


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
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"cannot read {path}{where}", why, "mend that line") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds no table",
            "it should be a table of key: value lines",
            f"write such lines, or check the path of {option}",
        )
    return {str(key): value for key, value in loaded.items()}


def to_yaml(options: Options, **resolved: Any) -> str:
    """The options as YAML; `resolved` replaces values that were left to choose."""
    values = options.model_dump(mode="json") | resolved
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
