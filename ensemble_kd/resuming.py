"""`resume`: going on with a run that was stopped."""

from __future__ import annotations

from pathlib import Path

from ensemble_kd import distillation, training
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import RunError
from ensemble_kd.runs import OBJECTS, Run
from ensemble_kd.training import TrainResult


def resume(folder: str | Path) -> DistillResult | TrainResult:
    """Go on with a run of `distill` or `train` that was stopped, to the same numbers as without the stop.

    Networks that it finished are kept; the one in training goes on from its last checkpoint, in the
    middle of an epoch. Teachers in training do so too, whichever run wants them.

    Raises:
        RunError: the folder is no run, the run is finished or in use by another process, or its
            configuration, data or teachers changed; it says how.
    """
    run = stopped(folder)
    return (distillation if run.status()["verb"] == "distill" else training).go_on(run.locked())


def stopped(folder: str | Path) -> Run:
    """A run that can be gone on with.

    Raises:
        RunError: it is none.
    """
    run = Run.open(Path(folder))
    verb = run.status()["verb"]
    if verb == OBJECTS:
        raise RunError(
            f"{folder} cannot be resumed",
            "it was given teachers, a student or a function as Python objects, which are not in the folder",
            "call distill again with the same objects and overwrite=True",
        )
    if run.status()["state"] == "finished":
        raise RunError(
            f"{folder} is finished",
            "there is nothing left to do",
            f"look at it: ekd {'analyze-agreement' if verb == 'distill' else 'evaluate'} {folder}",
        )
    return run
