"""What several test files share: exact messages, and the package's log lines."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from ensemble_kd.errors import EkdError


def message(what: str, why: str, fix: str) -> str:
    """An error as the user reads it."""
    return f"{what}\n  why: {why}\n  fix: {fix}"


@contextmanager
def refused(kind: type[EkdError], what: str, why: str, fix: str) -> Iterator[None]:
    """The block raises exactly `kind` with exactly this message."""
    with pytest.raises(EkdError) as caught:
        yield
    expected = message(what, why, fix)
    assert str(caught.value) == expected, f"got:\n{caught.value}\nexpected:\n{expected}"
    assert type(caught.value) is kind


@contextmanager
def logged() -> Iterator[list[str]]:
    """The package's log lines as `LEVEL: text`, whatever the command line did to its logger before."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    log = logging.getLogger("ensemble_kd")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def unexplained(value: Any, path: str = "", above: bool = False) -> list[str]:
    """Where in numbers read from JSON a null stands without a reason.

    A null needs a `reason` in the object that it stands in; in a list, an object around it must name its
    layers or classes without numbers, with reasons, as `undefined`.
    """
    if value is None:
        return [path]
    if isinstance(value, dict):
        above = above or bool(value.get("undefined"))
        if isinstance(value.get("reason"), str) and value["reason"]:
            value = {key: own for key, own in value.items() if own is not None}
        found = [unexplained(own, f"{path}.{key}", above) for key, own in value.items()]
    elif isinstance(value, list):
        kept = [own for own in value if own is not None or not above]
        found = [unexplained(own, f"{path}[]", above) for own in kept]
    else:
        found = []
    return [place for places in found for place in places]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Figures are made, and blank ones saved: to lay them out takes longer than all else."""
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    Image.new("RGB", (640, 48)).save(buffer, format="png")
    patch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(buffer.getvalue()))
