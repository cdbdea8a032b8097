"""Ctrl-C and SIGTERM: a training step is finished first, so that what is saved is whole."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """Whether a signal asked to stop."""

    asked: bool = False


_current: list[Stop] = []


@contextmanager
def deferred() -> Iterator[Stop]:
    """While entered, the first Ctrl-C or SIGTERM only asks, and the second interrupts.

    Who enters it looks at `asked` after each step, and raises KeyboardInterrupt where it is well placed;
    at the end of the outermost block it is raised in any case. Outside of the main thread, where Python
    takes no signals, nothing is ever asked.
    """
    if _current:
        yield _current[0]
        return
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        print("stopping after this step (once more to stop at once)", file=sys.stderr)

    with _handling(ask):
        _current.append(stop)
        try:
            yield stop
        finally:
            _current.clear()
    if stop.asked:
        raise KeyboardInterrupt


@contextmanager
def as_interrupt() -> Iterator[None]:
    """While entered, SIGTERM is what Ctrl-C is: a KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(interrupt, (signal.SIGTERM,)):
        yield


@contextmanager
def _handling(handler: object, numbers: tuple[signal.Signals, ...] = _SIGNALS) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)
