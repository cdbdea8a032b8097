"""What all networks of one distillation share, and everything that can be wrong, tried beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import recipes
from ensemble_kd.checking import (
    check_classes_known,
    check_combined,
    check_controls,
    check_label_free,
    check_label_loss,
    check_loss,
    check_mix,
    check_top_k,
)
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset, Images, joined
from ensemble_kd.data.unlabelled import load_unlabelled
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, together
from ensemble_kd.features import head_of
from ensemble_kd.fresh import for_data, new_classifier
from ensemble_kd.loop import Engine
from ensemble_kd.losses import LOSSES
from ensemble_kd.models import ModelName, parse
from ensemble_kd.names import label_of
from ensemble_kd.objective import Viewing
from ensemble_kd.schema import CombineOptions, DistillOptions, RunOptions
from ensemble_kd.shared import Shared
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.class_map import ClassMap
from ensemble_kd.teachers.combination import Combination, find_combiner
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import check_teacher, load_teacher
from ensemble_kd.teachers.runner import Running
from ensemble_kd.teachers.sharding import check_processes
from ensemble_kd.weighting import inputs_of

STORED_VIEWS = 16
STORED_BYTES = 20_000_000_000
VIEWS_COST = "on Fashion-MNIST that was worth 0.03 points [-0.53, +0.60] beside 16 stored, 0.20 beside 4, 0.61 beside 1"
"""Of accuracy: row 9 of docs/performance.md."""
_FEATURES = 2048
"""How many features a teacher is taken to have, where room is planned before it is loaded."""


@dataclass(frozen=True)
class Setting:
    """What all networks of one run share."""

    options: DistillOptions
    data: Dataset
    transfer: Images
    """What the student is distilled on: the training images, unlabelled ones, or both."""
    device: torch.device
    start: Classifier
    """The student before training; every control starts from the same weights."""
    recipe: Recipe
    viewing: Viewing
    combination: Combination
    temperatures: dict[str, float]
    """Of the teachers by label, and perhaps of the `student`."""
    given: dict[str, Teacher]
    """Teachers that were given as objects, by label."""
    shared: Shared


@dataclass(frozen=True)
class Objects:
    """What was given as Python objects instead of names, and what is shared with other runs."""

    teachers: dict[str, Teacher]
    student: Classifier | None = None
    combine: Callable[..., Tensor] | None = None
    shared: Shared = field(default_factory=Shared)

    def __bool__(self) -> bool:
        return bool(self.teachers) or self.student is not None or self.combine is not None


def prepare(options: DistillOptions, objects: Objects) -> tuple[Setting, list[ModelName | None]]:
    """Everything that can be wrong is tried before anything is trained or written, and told at once."""
    texts = [text for text in options.teachers if text not in objects.teachers]
    student, shared = objects.student, objects.shared
    *parsed, named_student, combination, device, data, _, _, _, _ = together(
        *(partial(parse, text) for text in texts),
        partial(parse, options.student) if student is None else lambda: None,
        partial(combination_of, options, objects.combine),
        partial(choose_device, options.device),
        partial(
            shared.once, partial(load_data, **options.load_arguments()), "data", options.load_arguments()
        ),
        partial(check_loss, options),
        partial(check_top_k, options),
        partial(check_mix, options),
        partial(check_processes, options.shard_teachers),
    )
    by_text = dict(zip(texts, parsed, strict=True))
    names = [by_text.get(text) for text in options.teachers]
    adapted, unlabelled, _, _, _, _, _, *maps, start = together(
        partial(adapt, objects.teachers, options, data),
        partial(load_unlabelled, options.unlabelled, data, options.decode)
        if options.unlabelled
        else lambda: None,
        partial(check_label_loss, options),
        partial(check_label_free, options, combination),
        partial(check_combined, options, combination),
        partial(check_controls, options, names),
        partial(recipes.check_teacher_batch, options.teacher_training, len(data.train)),
        *(
            partial(shared.once, check, "check", options.load_arguments(), check.args[0], check.keywords)
            for check in teacher_checks(options, parsed, data, features=options.feature_weight > 0)
        ),
        partial(_student, options, named_student, student, data),
    )
    check_classes_known(options, combination, dict(zip(texts, maps, strict=True)), adapted, data.classes)
    data = shared.once(partial(data.to, device), "data", options.load_arguments(), device)
    transfer = _transfer(options, data, unlabelled and unlabelled.to(device))
    recipe = recipes.student_recipe(start, len(transfer), options.training.model_dump())
    if options.soft_epochs is not None and options.soft_epochs > recipe.epochs:
        raise ConfigError(
            f"soft_epochs: {options.soft_schedule} over {options.soft_epochs} of {recipe.epochs} epochs",
            "training ends before the schedule does",
            f"say --set soft_epochs={recipe.epochs} or less, or train longer",
        )
    viewing = _viewing(options, data, len(transfer), recipe)
    temperatures = _temperatures(options)
    setting = Setting(
        options, data, transfer, device, start, recipe, viewing, combination, temperatures, adapted, shared
    )
    return setting, names


def combination_of(options: CombineOptions, function: Callable[..., Tensor] | None = None) -> Combination:
    """How the options say that teachers are combined; `function` goes before the name.

    Raises:
        ConfigError, ModelError: there is no such combiner, or it does not take the weights given.
    """
    name, weigh = find_combiner(function or options.combine or ("fixed" if options.weights else "mean"))
    if options.weights and "given" not in inputs_of(weigh):
        raise ConfigError(
            f"weights: {name} finds its own",
            "given weights are used by --combine fixed, and by functions of yours that name `given`",
            "leave out --weights or --combine",
        )
    return Combination(name, weigh, options.pool, options.calibrate, options.weights)


def teacher_checks(
    options: CombineOptions, names: Sequence[ModelName], data: Dataset, features: bool = False
) -> list[partial[ClassMap | None]]:
    """A check of each teacher that gives its class map, to be called together with others."""
    return [
        partial(
            check_teacher,
            name,
            data,
            size=options.teacher_size.get(name.label),
            stem=options.stem,
            offline=options.offline,
            class_map=options.class_map.get(name.label),
            features=features,
        )
        for name in names
    ]


def teacher_of(
    name: ModelName, options: CombineOptions, data: Dataset, seed: int, device: torch.device
) -> Teacher:
    """The teacher as the options want it; see `registry.load_teacher`."""
    return load_teacher(
        name,
        data,
        train=options.train_teachers,
        device=device,
        offline=options.offline,
        class_map=options.class_map.get(name.label),
        engine=engine_of(options) if isinstance(options, RunOptions) else None,
        **asked_of(name, options, seed),
    )


def asked_of(name: ModelName, options: CombineOptions, seed: int) -> dict[str, Any]:
    """What the options say of a teacher that is trained here; arguments of `registry.look_up`."""
    return {
        "size": options.teacher_size.get(name.label),
        "stem": options.stem,
        "seed": seed,
        "augment": None if options.augment == "auto" else options.augment,
        "training": options.teacher_training.model_dump(),
    }


def _student(
    options: DistillOptions, name: ModelName | None, given: Classifier | None, data: Dataset
) -> Classifier:
    """The student before training."""
    if given is not None:
        start = for_data(given, data, "the student")
    else:
        assert name is not None
        start = new_classifier(
            name,
            data,
            size=options.student_size,
            stem=options.stem,
            seed=options.seed,
            offline=options.offline,
        )
    if options.feature_weight > 0:
        head_of(start, "the student")
    return start


def adapt(teachers: dict[str, Teacher], options: CombineOptions, data: Dataset) -> dict[str, Teacher]:
    """Teachers that were given as objects, brought to the classes of the data.

    Raises:
        ConfigError: an option that shapes teachers names one of them.
        ModelError: the classes of one are others.
    """
    for option in ("class_map", "teacher_size"):
        if named := sorted(teachers.keys() & getattr(options, option).keys()):
            raise ConfigError(
                f"{option}: {', '.join(named)} was given as an object",
                "it has its size and its classes already",
                "leave it out, and give them to load_teacher",
            )
    if isinstance(options, DistillOptions) and options.feature_weight > 0:
        for label, teacher in teachers.items():
            head_of(teacher.classifier, label)
    found = together(*(partial(teacher.for_data, data) for teacher in teachers.values()))
    return dict(zip(teachers, found, strict=True))


def _transfer(options: DistillOptions, data: Dataset, unlabelled: Images | None) -> Images:
    if unlabelled is None:
        return data.train
    beside = "alone" if options.unlabelled_only else f"beside {len(data.train):,} labelled ones"
    log.info("distilling on %s unlabelled images %s", f"{len(unlabelled):,}", beside)
    return unlabelled if options.unlabelled_only else joined(data.train, unlabelled)


def _viewing(options: DistillOptions, data: Dataset, count: int, recipe: Recipe) -> Viewing:
    policy = data.augment if options.augment == "auto" else options.augment
    still = policy == options.mix == "none"
    views = options.views
    if views is None:
        kept = 2 * len(data.classes) if options.top_k is None else 4 * options.top_k
        numbers = kept + (2 * _FEATURES if options.feature_weight else 0)
        wanted = 1 if still else min(STORED_VIEWS, recipe.epochs)
        views = min(wanted, STORED_BYTES // (len(options.teachers) * count * numbers))
        views = max(views, 1) if options.top_k is not None else views  # to say top-k is to want a store
        _tell_views(policy, views, still)
    return Viewing(policy, views, options.seed, options.mix)


def _tell_views(policy: str, views: int, still: bool) -> None:
    """What was chosen, and what it costs."""
    if not views:
        gigabytes = STORED_BYTES / 1e9
        log.info("views: the teachers' outputs would take more than %d GB, so they run live", gigabytes)
    elif still:
        log.info("views: the images as they are, so the teachers run once")
    else:
        log.info(
            "views: %d of each image by %s, stored; --views 0 runs the teachers on fresh ones each epoch (%s)",
            views,
            policy,
            VIEWS_COST,
        )


def running_of(options: DistillOptions) -> Running:
    """How teachers are run for targets."""
    return Running(options.teacher_batch, options.teacher_precision)


def engine_of(options: RunOptions, trace: Path | None = None) -> Engine:
    """How training steps are carried out; some are profiled where that is wanted, and `trace` given."""
    return Engine(options.compile, options.cuda_graph, trace if options.profile else None)


def _temperatures(options: DistillOptions) -> dict[str, float]:
    """The temperature of each teacher, and the student's own where it is given."""
    table = options.temperature if isinstance(options.temperature, dict) else {}
    default = LOSSES[options.loss].temperature
    common = options.temperature if isinstance(options.temperature, float) else default
    return {label_of(text): common for text in options.teachers} | table
