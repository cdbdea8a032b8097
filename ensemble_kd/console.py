"""What a person sees while something runs: log lines and progress bars, all on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_kd.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress


def _harmless(record: logging.LogRecord) -> bool:
    """Names of files and classes must not steer a terminal."""
    record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    return True


log = logging.getLogger("ensemble_kd")
log.addHandler(logging.NullHandler())
log.addFilter(_harmless)
_bars: list[Progress] = []


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere; a bar inside another is shown below it.

    Yields:
        `advance(steps=1, note="")`, to call as the work goes on.
    """
    if not sys.stderr.isatty() or _stderr.level > logging.INFO:
        yield lambda steps=1, note="": None
        return
    with _display() as bar:
        task = bar.add_task(printable(description), total=total, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            fields = {} if note is None else {"note": printable(note)}
            bar.update(task, advance=steps, **fields)  # type: ignore[arg-type]

        yield advance
        if len(bar.tasks) > 1:  # an inner bar goes when its work is done, the outer one stays as a line
            bar.remove_task(task)


@contextmanager
def _display() -> Iterator[Progress]:
    """The one display of bars, opened by the outermost."""
    if _bars:
        yield _bars[0]
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        _bars.append(bar)
        try:
            yield bar
        finally:
            _bars.clear()


def log_to_stderr(quiet: bool = False, silent: bool = False) -> None:
    """Show log lines on stderr; epoch lines (debug) only where no progress bar shows them.

    Where another process says the same, this one is `silent`.
    """
    shown = logging.INFO if sys.stderr.isatty() else logging.DEBUG
    _stderr.setLevel(logging.CRITICAL if silent else logging.WARNING if quiet else shown)
    if _stderr not in log.handlers:
        log.addHandler(_stderr)
    log.setLevel(logging.DEBUG)
    log.propagate = False


@contextmanager
def hushed(level: int = logging.WARNING) -> Iterator[None]:
    """While entered, nothing below `level` is shown on stderr, and no further bars."""
    before = _stderr.level
    _stderr.setLevel(max(before, level))
    try:
        yield
    finally:
        _stderr.setLevel(before)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append every log line to `path`, with the time, while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: no traceback a line
    before = log.level
    if log.getEffectiveLevel() > logging.DEBUG:
        log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()


class _Prefix(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time, as tests and notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_stderr = _Stderr()
_stderr.setFormatter(_Prefix())
