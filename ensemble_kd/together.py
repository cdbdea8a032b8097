"""Several distillations whose students are trained as one fleet; each still leaves a run of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensemble_kd.console import log
from ensemble_kd.distillation import finish, new_run, objective_of
from ensemble_kd.errors import RunError
from ensemble_kd.files import sha256_json
from ensemble_kd.fleet import Member, fit_together, unfit
from ensemble_kd.judges import Judges, combined, teachers_of
from ensemble_kd.models import ModelName
from ensemble_kd.runs import Stopwatch
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import Objects, Setting, prepare
from ensemble_kd.shared import Shared

_FREE: Any = {
    "temperature": True,
    "soft_weight": True,
    "loss_numbers": True,
    "seed": True,
    "out": True,
    "training": {"lr"},
}
"""Options in which students of a fleet may differ."""


@dataclass(frozen=True)
class _Prepared:
    setting: Setting
    names: list[ModelName | None]
    judges: Judges
    member: Member


def fleets(options: Sequence[DistillOptions], most: int = 32) -> list[list[int]]:
    """Positions of the options that can be of one fleet, in groups of at most `most`."""
    alike: dict[str, list[int]] = {}
    for position, own in enumerate(options):
        key = sha256_json(own.model_dump(mode="json", exclude=_FREE))
        alike.setdefault(key, []).append(position)
    return [group[start : start + most] for group in alike.values() for start in range(0, len(group), most)]


def distill_together(options: Sequence[DistillOptions], shared: Shared) -> str:
    """Train the students of several distillations as one fleet, and finish their runs.

    A student whose loss was not finite leaves no run: it is to be distilled by itself, which tells why.

    Returns:
        Why they cannot be a fleet, if so; then nothing was done.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM; students of an unfinished fleet leave nothing.
        EkdError: see `distill`.
    """
    if options[0].profile:
        return "each is profiled"
    if options[0].compile:
        return "each is compiled"
    prepared = [_prepare(own, shared) for own in options]
    first = prepared[0]
    if reason := unfit(first.member, first.setting.transfer):
        return reason
    train, val, device = first.setting.transfer, first.setting.data.val, first.setting.device
    log.info("fleet: %d students are trained together", len(prepared))
    members = [one.member for one in prepared]
    name, record = f"fleet of {len(prepared)}", first.setting.options.cuda_graph
    histories = fit_together(members, train, val, device, name, record)
    for one, history in zip(prepared, histories, strict=True):
        if history is not None:
            _keep(one, history)
    return ""


def _keep(one: _Prepared, history: list[dict[str, Any]]) -> None:
    """The run of a student that was trained, unless another process has made it meanwhile."""
    try:
        run = new_run(one.setting)
    except RunError as error:
        log.info("%s", error)
        return
    watch = Stopwatch()
    watch.seconds["student"] = round(sum(row["seconds"] for row in history), 3)
    with run.working():
        run.keep_network("student", one.member.model, history)
        finish(run, one.setting, one.names, watch, history)


def _prepare(options: DistillOptions, shared: Shared) -> _Prepared:
    setting, names = prepare(options, Objects({}, shared=shared))
    judges = combined(teachers_of(names, setting), setting)
    if setting.viewing.count:
        judges.store(setting)
    model = copy.deepcopy(setting.start).to(setting.device)
    objective = objective_of("student", model, judges, setting)
    member = Member(model, setting.recipe, objective, setting.viewing, options.seed)
    return _Prepared(setting, names, judges, member)
