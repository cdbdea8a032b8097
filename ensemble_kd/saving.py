"""A training that can stop after any step and go on from there, in the same process or another."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from ensemble_kd import distributed
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.console import log
from ensemble_kd.interrupts import Stop
from ensemble_kd.loop import Loop

_MEET = 16
"""Steps between two looks at whether another process was asked to stop, where looking makes the device wait."""


class Pass(NamedTuple):
    """One epoch of training: what `Loop.epoch` says, its first learning rate, and its seconds."""

    row: dict[str, Any]
    rate: float
    seconds: float


class Saving:
    """Runs the epochs of a loop, and saves where it stands: now and then, and where it is asked to stop."""

    def __init__(self, loop: Loop, checkpoints: Checkpoints | None, stop: Stop) -> None:
        """Goes on from the newest of the `checkpoints`, if there is one."""
        self._loop, self._checkpoints, self._stop = loop, checkpoints, stop
        self.history: list[dict[str, Any]] = []
        """A row for each epoch that ended."""
        self.epoch = 0
        """The first that is not finished."""
        self._done, self._rate, self._started = 0, loop.stepper.rate, time.perf_counter()
        self._spent = 0.0
        self._device = loop.train.ids.device
        self._waits = self._device.type == "cpu"
        loop.between = self._between
        if kept := checkpoints.latest() if checkpoints else None:
            loop.restore(kept)
            state = kept.state
            self.history, self.epoch, self._done = state["history"], state["epoch"], state["done"]
            self._rate, self._spent = state["rate"], state["spent"]
            loop.advance(state["steps"], earlier=True)
            log.info("%s: goes on after step %d of epoch %d", loop.description, self._done, self.epoch + 1)

    def run(self, epoch: int) -> Pass:
        """What is left of an epoch.

        Raises:
            TrainingError: a loss was not finite.
            KeyboardInterrupt: it was asked to stop, and what was done is saved.
        """
        done = self._done if epoch == self.epoch else 0
        if not done:
            self._rate, self._spent = self._loop.stepper.rate, 0.0
        self.epoch, self._started = epoch, time.perf_counter()
        row = self._loop.epoch(epoch, done)
        self._loop.check_finite(epoch, self._loop.steps)
        return Pass(row, self._rate, self._seconds)

    @property
    def _seconds(self) -> float:
        return self._spent + time.perf_counter() - self._started

    def _between(self, done: int) -> None:
        asked, due = self._together(done)
        if due or asked or self._waits:
            self._loop.check_finite(self.epoch, done)
        if due or asked:
            self._save(done)
        if asked:
            raise KeyboardInterrupt

    def _together(self, done: int) -> tuple[bool, bool]:
        """Whether to stop, and whether to save, in all processes alike; on GPUs they meet every few steps."""
        due = self._checkpoints is not None and self._checkpoints.due
        if distributed.size() == 1:
            return self._stop.asked, due
        if not self._waits and done % _MEET and done < self._loop.steps:
            return False, False
        flags = torch.tensor(
            [float(self._stop.asked), float(due and distributed.first())], device=self._device
        )
        distributed.greatest(flags)
        asked, due = (bool(flag) for flag in flags)
        return asked, due

    def _save(self, done: int) -> None:
        if self._checkpoints is None:
            return
        state = {"history": self.history, "rate": self._rate, "spent": self._seconds}
        snapshot = self._loop.snapshot(self.epoch, done, state)
        if distributed.first():
            self._checkpoints.save(snapshot.state["steps"], snapshot)
