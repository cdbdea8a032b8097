"""Experiment trackers beside history.jsonl: the same rows, sent to packages that show them as they come.

Each is one function in `TRACKERS` that starts it. What fails later is told once and left alone: no tracker
stops a training.
"""

from __future__ import annotations

import io
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ensemble_kd import distributed, files
from ensemble_kd.console import log
from ensemble_kd.errors import ConfigError, Problem, printable

PROJECT = "ensemble-kd"
FOLDER = "tracking"
"""Of a run folder: what the trackers keep there, and the id of the run."""


class Tracker(Protocol):
    """Where rows of numbers go."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Numbers by name, such as `student/val/accuracy`, after so many steps of that network."""

    def finish(self) -> None:
        """All that was logged is to be there."""


@dataclass(frozen=True)
class Start:
    """What a tracker is told of a run."""

    folder: Path
    config: Mapping[str, Any]
    """Options by dotted name."""
    id: str
    """The same when a run is resumed."""
    resumed: bool

    @property
    def name(self) -> str:
        """Of the run, for people."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class _Functions:
    """A tracker made of two functions."""

    log: Callable[[Mapping[str, float], int], None]
    finish: Callable[[], None]


def tensorboard(start: Start) -> Tracker:
    """Event files in `tracking/tensorboard/` of the run; a resumed run adds one."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(start.folder / FOLDER / "tensorboard"))
    if not start.resumed:
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in start.config.items()))

    def send(row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Functions(send, writer.close)


def wandb(start: Start) -> Tracker:
    """A run of Weights & Biases; its own variables say where and how (WANDB_MODE, WANDB_PROJECT, …)."""
    import os

    import wandb as package

    run = package.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=start.name,
        id=start.id,
        dir=str(start.folder / FOLDER),
        resume="allow" if start.resumed else None,
        config=dict(start.config),
        settings=package.Settings(silent=True, console="off"),
    )
    axes: set[str] = set()

    def send(row: Mapping[str, float], step: int) -> None:
        prefixes = {name.partition("/")[0] for name in row}
        for prefix in sorted(prefixes - axes):  # each network has steps of its own
            run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        axes.update(prefixes)
        run.log({**row, **{f"{prefix}/step": step for prefix in prefixes}})

    return _Functions(send, run.finish)


def trackio(start: Start) -> Tracker:
    """A run of trackio, in its own folder (TRACKIO_DIR) or Space."""
    import trackio as package

    package.init(
        project=PROJECT,
        name=f"{start.name}-{start.id}",
        config=dict(start.config),
        resume="allow" if start.resumed else "never",
    )
    return _Functions(lambda row, step: package.log(dict(row), step=step), package.finish)


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}


def check(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        ConfigError: with the commands that install them.
    """
    missing = [
        Problem(
            f"track: {name} is not installed",
            "it is an extra",
            f"pip install 'ensemble-kd[{name}]', or leave it out",
        )
        for name in names
        if find_spec(name) is None
    ]
    if missing:
        raise ConfigError(missing)


@dataclass
class Tracking:
    """The trackers of a run that still work, by name."""

    trackers: dict[str, Tracker] = field(default_factory=dict)
    last: int = 0
    """The step that was logged last."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Send a row to all of them."""
        self.last = step
        for name, tracker in list(self.trackers.items()):
            self._try(name, lambda tracker=tracker: tracker.log(row, step))  # type: ignore[misc]

    def finish(self) -> None:
        """End all of them."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            with _overheard():
                work()
        except Exception as error:  # whatever a package, its network or its disk comes up with
            del self.trackers[name]
            log.warning("%s failed, and the run goes on without it: %s", name, _first_line(error))


_current: list[Tracking] = []


@contextmanager
def tracking(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Tracking]:
    """While entered, epochs are logged to these trackers; of several processes the first does.

    A run whose folder was tracked before goes on where the tracker can.

    Raises:
        ConfigError: one cannot be started for a new run; a resumed one goes on without it.
    """
    current = Tracking(_started(names, folder, config) if names and distributed.first() else {})
    _current.append(current)
    try:
        yield current
    finally:
        _current.remove(current)
        current.finish()


def _started(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> dict[str, Tracker]:
    note = folder / FOLDER / "run.json"
    resumed = note.is_file()
    if not resumed:
        files.write_json(note, {"id": secrets.token_hex(4)})
    start, found = Start(folder, config, files.read_json(note)["id"], resumed), {}
    for name in names:
        try:
            with _overheard():
                found[name] = TRACKERS[name](start)
        except Exception as error:
            if not resumed:
                Tracking(found).finish()
                fix = "mend that, or leave --track out"
                raise ConfigError(f"track: {name} cannot be started", _first_line(error), fix) from error
            log.warning("%s cannot be started, and the run goes on without it: %s", name, _first_line(error))
    return found


@contextmanager
def _overheard() -> Iterator[None]:
    """What a package prints becomes log lines without colours: stdout is for results."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in filter(str.strip, re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).splitlines()):
            log.info("%s", printable(line))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def log_epoch(description: str, row: Mapping[str, Any]) -> None:
    """Send the numbers of an epoch of a network to whatever tracks the run."""
    network = description.removeprefix("control ")
    for current in _current:
        current.log(_numbers(row, network), row["step"])


def log_results(metrics: Mapping[str, Any]) -> None:
    """Send what was measured on the test split, as `test/MODEL/MEASURE`."""
    rows = {
        model: {name: found["value"] if isinstance(found, Mapping) else found for name, found in row.items()}
        for model, row in metrics["models"].items()
    }
    for current in _current:
        current.log(_numbers(rows, "test"), current.last)


def _numbers(values: Any, name: str) -> dict[str, float]:
    """All numbers of nested tables and lists, by their path."""
    if isinstance(values, Mapping):
        pairs = [(f"{name}/{key}", inner) for key, inner in values.items()]
    elif isinstance(values, (list, tuple)):
        pairs = [(f"{name}/{number}", inner) for number, inner in enumerate(values, 1)]
    else:
        return {name: float(values)} if isinstance(values, (int, float)) else {}
    return {path: number for key, inner in pairs for path, number in _numbers(inner, key).items()}
