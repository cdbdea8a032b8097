"""What a person sees while something runs: log lines and progress bars, all on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_kd.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def _harmless(record: logging.LogRecord) -> bool:
    """Names of files and classes must not steer a terminal."""
    record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    return True


_SECONDS = 30.0
"""Between two lines of a progress that is no bar, at first."""
_LATELY, _GLANCE = 30.0, 0.5
"""Seconds that a rate is the mean of, and between two looks at the clock that count."""
log = logging.getLogger("ensemble_kd")
log.addHandler(logging.NullHandler())
log.addFilter(_harmless)
_bars: list[Progress] = []


@contextmanager
def progress(description: str, total: int, unit: str = "", worth: int = 1) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line from time to time elsewhere, both with rate and time left.

    A bar inside another is shown below it, and of no work nothing is shown. Colours are left out where
    NO_COLOR is set.

    Args:
        unit: of the rate, such as `images`, of which one step is `worth` so many.

    Yields:
        `advance(steps=1, note=None, earlier=False)`, to call as the work goes on; `earlier` steps were taken
        before this began, and say nothing of its speed.
    """
    if not total or _stderr.level > logging.INFO:
        yield lambda steps=1, note=None, earlier=False: None
    elif not sys.stderr.isatty():
        yield _Lines(printable(description), Meter(total, unit, worth))
    else:
        with _display() as bar:
            task = bar.add_task(printable(description), total=total, note="", speed="")
            yield _Bar(bar, task, Meter(total, unit, worth))
            if len(bar.tasks) > 1:  # an inner bar goes when its work is done, the outer one stays as a line
                bar.remove_task(task)


class Meter:
    """How far work is, how fast it went of late, and how long the rest will take."""

    def __init__(
        self, total: int, unit: str = "", worth: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done, self.unit, self.worth, self.clock = total, 0, unit, worth, clock
        self.began = clock()
        self._seen = deque([(self.began, 0)])

    def count(self, steps: int, earlier: bool = False) -> bool:
        """Count steps; returns whether there is something new to show."""
        self.done += steps
        if earlier:
            self._seen = deque((moment, done + steps) for moment, done in self._seen)
        now = self.clock()
        if now - self._seen[-1][0] < _GLANCE and self.done < self.total:
            return False
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _LATELY:
            self._seen.popleft()
        return True

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self.clock() - self.began

    @property
    def speed(self) -> str:
        """Such as `1,234 images/s, 3 min left`, or what it took in all."""
        (before, done), (now, new) = self._seen[0], self._seen[-1]
        if now <= before or new <= done:
            return ""
        rate = (new - done) / (now - before)
        left = (self.total - self.done) / rate
        rest = f"{lasting(left)} left" if self.done < self.total else f"took {lasting(self.elapsed)}"
        return f"{_rate(rate * self.worth, self.unit)}, {rest}"


def _rate(rate: float, unit: str) -> str:
    """Such as `1,234 images/s`, or `10.6 s each` where one takes more than a second."""
    if rate < 1:
        return f"{1 / rate:.3g} s each"
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return f"{shown}{' ' if unit else ''}{unit}/s"


@dataclass
class _Lines:
    """A line now and then, more rarely the longer it takes."""

    description: str
    meter: Meter
    last: float = 0.0

    def __call__(self, steps: int = 1, note: str | None = None, earlier: bool = False) -> None:
        meter, elapsed = self.meter, self.meter.elapsed
        if not meter.count(steps, earlier) or elapsed - self.last < max(_SECONDS, elapsed / 10):
            return
        self.last = elapsed
        log.debug("%s  %d/%d  %s", self.description, meter.done, meter.total, meter.speed)


@dataclass
class _Bar:
    """A bar of the display."""

    bar: Progress
    task: TaskID
    meter: Meter

    def __call__(self, steps: int = 1, note: str | None = None, earlier: bool = False) -> None:
        fields = {} if note is None else {"note": printable(note)}
        if self.meter.count(steps, earlier):
            fields["speed"] = self.meter.speed
        self.bar.update(self.task, advance=steps, **fields)  # type: ignore[arg-type]


def lasting(seconds: float) -> str:
    """Seconds for people: 41 s, 3 min, 2.5 h."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 10_800 else f"{seconds / 3600:,.1f} h"


@contextmanager
def _display() -> Iterator[Progress]:
    """The one display of bars, opened by the outermost."""
    if _bars:
        yield _bars[0]
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
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
