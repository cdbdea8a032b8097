"""The teachers of a run: loaded, combined on the validation split, and stored where their outputs are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import config
from ensemble_kd.console import log
from ensemble_kd.errors import ConfigError, Problem
from ensemble_kd.metrics import within
from ensemble_kd.models import ModelName
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import Objects, Setting, prepare, running_of, teacher_of
from ensemble_kd.teachers.building import Keeping
from ensemble_kd.teachers.combination import best_alone, set_up
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.registry import can_be_trained
from ensemble_kd.teachers.sharding import sharded
from ensemble_kd.teachers.store import Store
from ensemble_kd.teachers.targets import StoredTargets

OTHER_SEEDS = 1000
"""What is added to the teachers' seeds for the control `independent`."""
_SHAPING = ("stem", "augment", "teacher_size", "class_map", "teacher_training", "train_teachers")
"""Options that a teacher depends on, besides the data."""


@dataclass(frozen=True)
class Judges:
    """An ensemble, its logits (K, N, C) on the validation split, and what is stored of its teachers."""

    ensemble: Ensemble
    val_logits: Tensor
    stores: list[Store] = field(default_factory=list)

    def store(self, setting: Setting) -> None:
        """Run the teachers on all stored views, as far as that was not done before, and let go of them."""
        targets = self.stored(self.ensemble, setting)
        targets.build()
        self.stores[:] = targets.stores
        self.ensemble.release()

    def stored(self, ensemble: Ensemble, setting: Setting) -> StoredTargets:
        """What is stored, as targets of an ensemble of the same teachers."""
        keeping = Keeping(setting.data.name, setting.options.top_k)
        return StoredTargets(ensemble, setting.transfer, setting.viewing, keeping, list(self.stores))


def teachers_of(names: Sequence[ModelName | None], setting: Setting) -> list[Teacher]:
    """The teachers by their names, and where there is none, as they were given."""
    teachers = [
        _shared(setting.given[label], setting) if name is None else _teacher(name, setting)
        for label, name in zip(setting.options.teachers, names, strict=True)
    ]
    own, largest = setting.start.parameter_count, max(t.classifier.parameter_count for t in teachers)
    if own > largest:
        problem = Problem(
            f"the student has {own:,} parameters, and no teacher has more than {largest:,}",
            "distilling is meant to make a smaller model of larger ones",
            "choose a smaller student: ekd models",
        )
        log.warning("%s", problem)
    return teachers


def of_other_seeds(names: Sequence[ModelName | None], setting: Setting) -> list[Teacher]:
    """Teachers of the same names and other seeds."""
    default = setting.options.teacher_seed
    seeds = [(name, default if name.seed is None else name.seed) for name in names if name is not None]
    return [_teacher(replace(name, seed=seed + OTHER_SEEDS), setting, seed) for name, seed in seeds]


def _teacher(name: ModelName, setting: Setting, seed: int | None = None) -> Teacher:
    options, device = setting.options, setting.device
    seed = options.teacher_seed if seed is None else seed
    if options.shard_teachers and not can_be_trained(name, options.class_map.get(name.label)):
        device = torch.device("cpu")  # it may not fit on another
    shaping = [getattr(options, option) for option in _SHAPING]
    make = partial(teacher_of, name, options, setting.data, seed, device)
    teacher = setting.shared.once(make, "teacher", name, seed, device, options.load_arguments(), shaping)
    return _shared(teacher, setting)


def _shared(teacher: Teacher, setting: Setting) -> Teacher:
    """The teacher, divided among the processes where that is wanted."""
    return sharded(teacher, setting.device) if setting.options.shard_teachers else teacher


def combined(teachers: Sequence[Teacher], setting: Setting) -> Judges:
    """The teachers as an ensemble, with all that is fitted on the validation split."""
    running = running_of(setting.options)
    teachers = [replace(teacher, running=running) for teacher in teachers]
    val, options = setting.data.val, setting.options
    temperatures = torch.tensor([setting.temperatures[teacher.label] for teacher in teachers])
    logits = torch.stack([teacher.all_logits(val) for teacher in teachers])
    ensemble = set_up(
        teachers,
        temperatures,
        setting.combination,
        logits,
        val.known_labels,
        seed=options.seed,
        features=options.feature_weight > 0,
    )
    if "best-teacher" in options.controls:
        best_alone(ensemble, logits, val.known_labels)  # refuses here what would fail after the student
    for teacher, mask, values in zip(teachers, ensemble.known_mask, logits, strict=True):
        _warn_of_chance(teacher.label, *within(mask.to(values.device), values, val.known_labels))
    return Judges(ensemble, logits)


def _warn_of_chance(label: str, logits: Tensor, labels: Tensor) -> None:
    """Of a teacher that is not two standard errors better than one that always says the commonest class."""
    if not len(labels):
        return
    right = float((logits.argmax(dim=1) == labels).double().mean())
    chance = float(labels.bincount().max()) / len(labels)
    if right <= chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
        problem = Problem(
            f"teacher {label!r} is right on {100 * right:.1f} % of {len(labels)} validation images",
            f"always saying the commonest class would be right on {100 * chance:.1f} %",
            "train it longer, check its classes and its input, or leave it out",
        )
        log.warning("%s", problem)


def build_targets(
    teachers: str | Sequence[str | Teacher] | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run the teachers on all views of the training images, and keep what they say for later runs.

    Args:
        teachers: names (see `models.parse`), or `Teacher` objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"views=16"`.
        options: the fields of `schema.DistillOptions`; with the same ones `distill` finds what is built here.

    Returns:
        `data`, `images`, `policy`, `mix`, `views`, and `teachers`: a row for each with `teacher`, `folder`
        and `bytes`.

    Raises:
        EkdError: options, data or teachers cannot be used, nothing is to be stored, or the disk is full.
    """
    listed = [teachers] if isinstance(teachers, str) else teachers
    given = {t.label: t for t in listed or () if isinstance(t, Teacher)}
    if listed is not None:
        options["teachers"] = [t.label if isinstance(t, Teacher) else t for t in listed]
    file = Path(config_file) if config_file else None
    chosen = config.resolve(DistillOptions, options, file=file, sets=sets)
    setting, names = prepare(chosen, Objects(given))
    if not setting.viewing.count:
        raise ConfigError("views: 0 stores nothing", "fresh views are seen once", "say --views 1 or more")
    loaded = teachers_of(names, setting)
    if lost := [teacher.label for teacher in loaded if not teacher.storable]:
        raise ConfigError(
            f"teachers: the outputs of {', '.join(lost)} are not kept",
            "it is code of your own, and nothing tells when that changes",
            "leave it out: `ekd distill` runs it once a view and keeps that for the run",
        )
    judges = combined(loaded, setting)
    judges.store(setting)
    viewing, stores = setting.viewing, zip(judges.ensemble.teachers, judges.stores, strict=True)
    return {
        "data": setting.data.name,
        "images": len(setting.transfer),
        "policy": viewing.policy,
        "mix": viewing.mix,
        "views": viewing.count,
        "teachers": [
            {"teacher": t.label, "folder": str(s.folder), "bytes": s.layout.view_bytes * viewing.count}
            for t, s in stores
        ],
    }
