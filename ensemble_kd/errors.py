"""Every error that a user can cause, in one family.

A message has three parts, each one line: what and where, why, and how to mend it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what` (and where), `why`, and the `fix`."""

    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [printable(self.what)]
        if self.why:
            lines.append(f"  why: {printable(self.why)}")
        if self.fix:
            lines.append(f"  fix: {printable(self.fix)}")
        return "\n".join(lines)


class EkdError(Exception):
    """Base of all errors with a message for the user; holds one or more `problems`."""

    def __init__(self, what: str | Sequence[Problem], why: str = "", fix: str = "") -> None:
        self.problems = (Problem(what, why, fix),) if isinstance(what, str) else tuple(what)
        super().__init__(str(self))

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class ConfigError(EkdError):
    """The options are wrong; all that is wrong with them is listed at once."""


class DataError(EkdError):
    """The images or labels cannot be used."""


class ModelError(EkdError):
    """A model cannot be found, built, or used for this data."""


class WeightsError(EkdError):
    """A file of weights cannot be read, or does not belong to the model."""


class RunError(EkdError):
    """A run folder is missing, occupied or incomplete."""


class TrainingError(EkdError):
    """Training cannot go on."""


class DiskError(EkdError, OSError):
    """A file cannot be written; an OSError too, with its number, for code that can do without the file."""

    __str__ = EkdError.__str__


def together(*works: Callable[[], Any]) -> list[Any]:
    """The results of all `works`; where some fail, one error with the problems of all of them.

    Raises:
        EkdError: the error of the only one that failed, or a ConfigError with all problems.
    """
    results, failures = [], []
    for work in works:
        try:
            results.append(work())
        except EkdError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ConfigError([problem for error in failures for problem in error.problems])
    return results


def printable(text: str) -> str:
    """`text` on one line and without control characters, whatever a file or a folder is called."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text that is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, as `did you mean 'x'?`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def nearest_path(path: Path) -> str:
    """What lies where `path` should and is called much like it, as `did you mean 'runs/mine'?`, or an empty string."""
    try:
        beside = os.listdir(path.parent)
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, sorted(beside), n=1, cutoff=0.6)
    return f"did you mean {str(path.parent / close[0])!r}?" if close and close[0] != path.name else ""


def listing(names: Iterable[object], limit: int = 10) -> str:
    """Names joined by commas, cut after `limit` with a count of the rest."""
    texts = [str(name) for name in names]
    rest = f" … and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
