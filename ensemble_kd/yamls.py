"""YAML as this project reads it: plain values alone, every key once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ensemble_kd.errors import ConfigError, Problem


class _Plain:
    """Refuses keys that are no plain value, and aliases, which can stand for endless tables.

    Keys that are given `twice` are noted, so that all of them can be told.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)  # type: ignore[call-arg]
        self.twice: list[yaml.MarkedYAMLError] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            event = self.peek_event()  # type: ignore[attr-defined]
            why = f"the alias *{event.anchor} stands there, and values are written out"
            raise yaml.composer.ComposerError(None, None, why, event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[attr-defined]
        for number, key in enumerate(keys):
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", node.start_mark)
            if keys[:number].count(key) == 1:
                why = f"the key {key!r} stands there twice"
                mark = node.value[number][0].start_mark
                self.twice.append(yaml.constructor.ConstructorError(None, None, why, mark))
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


UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""What PyYAML raises; all but the first for a value that its tag does not fit, and for endless brackets."""


def why_unread(error: Exception) -> str:
    """One of `UNREADABLE` in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, yaml.YAMLError):
        return "it holds a value that cannot be read"
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def parse_value(text: str) -> Any:
    """The value that stands behind `--set KEY=`.

    Raises:
        UNREADABLE: it is none; see `why_unread`.
    """
    value, twice = _load(text, _Values)
    if twice:
        raise twice[0]
    return value


def read_table(path: Path, option: str) -> tuple[dict[str, Any], list[Problem]]:
    """The table of options in the YAML file that `option` names, and the keys that stand in it twice.

    Raises:
        ConfigError: the file is missing or no table.
    """
    return _read(path, option, _Values)


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """The table of options in the YAML file that `option` names.

    Raises:
        ConfigError: the file is missing or no table, or a key stands in it twice.
    """
    return _whole(*read_table(path, option))


def read_names(path: Path, option: str) -> dict[str, Any]:
    """A table in a YAML file in which every key and value is a text, a list or a table of texts.

    Raises:
        ConfigError: the file is missing or no table, or a key stands in it twice.
    """
    return _whole(*_read(path, option, _Texts))


def _whole(values: dict[str, Any], twice: list[Problem]) -> dict[str, Any]:
    if twice:
        raise ConfigError(twice)
    return values


def _load(text: str, kind: type[_Values] | type[_Texts]) -> tuple[Any, list[yaml.MarkedYAMLError]]:
    loader = kind(text)
    try:
        return loader.get_single_data(), loader.twice
    finally:
        loader.dispose()


def _read(
    path: Path, option: str, kind: type[_Values] | type[_Texts]
) -> tuple[dict[str, Any], list[Problem]]:
    try:
        loaded, twice = _load(path.read_text(encoding="utf-8"), kind)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}", str(error.strerror), f"check the path of {option}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}", "it is no text", f"check the path of {option}") from error
    except UNREADABLE as error:
        raise ConfigError([_unread(path, error)]) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} holds no table",
            "it should be a table of key: value lines",
            f"write such lines, or check the path of {option}",
        )
    return {str(key): value for key, value in loaded.items()}, [_unread(path, error) for error in twice]


def _unread(path: Path, error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    return Problem(f"cannot read {path}{where}", why_unread(error), "mend that line")
