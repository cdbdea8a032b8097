"""Distilling: teachers, one soft target, a student and its controls, and a run folder with the answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import config, files, recipes
from ensemble_kd.classifier import Classifier
from ensemble_kd.combine import uniform_weights
from ensemble_kd.console import log
from ensemble_kd.curves import draw_curves
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, RunError, together
from ensemble_kd.fit import Objective, Recipe, Viewing, fit
from ensemble_kd.fresh import for_data, new_classifier
from ensemble_kd.models import ModelName, parse
from ensemble_kd.names import label_of
from ensemble_kd.results import compare, confident_logits
from ensemble_kd.runs import Run, Stopwatch, surroundings
from ensemble_kd.schema import DistillOptions
from ensemble_kd.teachers.ensemble import Ensemble, LiveTargets, StoredTargets, Teacher
from ensemble_kd.teachers.library import recipe_of
from ensemble_kd.teachers.registry import can_be_trained, check_teacher, load_teacher

STORED_VIEWS = 16
STORED_BYTES = 1_000_000_000
OBJECTS = "distill with objects"
"""The verb in the status of a run that was given Python objects, which no file can bring back."""
OTHER_SEEDS = 1000
"""What is added to the teachers' seeds for the control `independent`."""


@dataclass(frozen=True)
class DistillResult:
    """A finished run: its folder, its metrics.json as a dictionary, and the student in eval mode."""

    folder: Path
    metrics: dict[str, Any]
    student: Classifier


@dataclass(frozen=True)
class _Setting:
    """What all networks of one run share."""

    options: DistillOptions
    data: Dataset
    device: torch.device
    start: Classifier
    """The student before training; every control starts from the same weights."""
    recipe: Recipe
    viewing: Viewing


def distill(
    teachers: str | Sequence[str | Teacher] | None = None,
    student: str | Classifier | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> DistillResult:
    """Teach one student from several teachers, beside its controls, and leave a run folder.

    Args:
        teachers: names (see `models.parse`), or `Teacher` objects.
        student: a name, or an untrained `Classifier`, which is copied.
        config_file: YAML with any of the options.
        sets: assignments such as `"training.weight_decay=0.01"`.
        options: the fields of `schema.DistillOptions`; nested ones also by their short names
            (`epochs`, `batch_size`, `lr`, `teacher_epochs`).

    Returns:
        The folder, the metrics and the student.

    Raises:
        ConfigError: with everything that is wrong with the options.
        EkdError: data, models or files cannot be used.
    """
    listed = [teachers] if isinstance(teachers, str) else teachers
    objects = {t.label: t for t in listed or () if isinstance(t, Teacher)}
    given = dict(options)
    if listed is not None:
        given["teachers"] = [t.label if isinstance(t, Teacher) else t for t in listed]
    if student is not None:
        given["student"] = student if isinstance(student, str) else student.card.model
    file = Path(config_file) if config_file else None
    resolved = config.resolve(DistillOptions, given, file=file, sets=sets)
    return _distill(resolved, objects, student if isinstance(student, Classifier) else None, None)


def resume(folder: str | Path) -> DistillResult:
    """Go on with a run that was stopped: networks that it finished are kept, the others trained.

    Raises:
        RunError: the folder is no run, or the run is finished.
    """
    run = Run.open(Path(folder))
    if run.status()["verb"] == OBJECTS:
        raise RunError(
            f"{folder} cannot be resumed",
            "it was given teachers or a student as Python objects, which are not in the folder",
            "call distill again with the same objects and overwrite=True",
        )
    if run.status()["verb"] != "distill":
        raise RunError(
            f"{folder} is a run of `ekd train`",
            "it trains one network, which starts again from the beginning",
            f"repeat it: ekd train --config {run.path('config.yaml')} --out {folder} --overwrite",
        )
    if run.status()["state"] == "finished":
        raise RunError(
            f"{folder} is finished",
            "there is nothing left to do",
            f"look at it: ekd analyze-agreement {folder}",
        )
    options = config.resolve(DistillOptions, {}, file=run.path("config.yaml"))
    run.set_state("running")
    return _distill(options, {}, None, run)


def _distill(
    options: DistillOptions, objects: dict[str, Teacher], student: Classifier | None, run: Run | None
) -> DistillResult:
    watch = Stopwatch()
    setting, names = _prepare(options, objects, student)
    if run is None:
        resolved = config.to_yaml(
            options,
            augment=setting.viewing.policy,
            views=setting.viewing.count,
            training=setting.recipe.to_json(),
            out=None,
            overwrite=False,
        )
        verb = "distill" if not objects and student is None else OBJECTS
        run = Run.create(verb, options.out, f"{options.data}-{options.student}", options.overwrite, resolved)
    log.info("run folder %s", run.folder)
    watch.lap("data")
    with run.working():
        found = [
            objects[label] if name is None else _teacher(name, setting, options.teacher_seed)
            for label, name in zip(options.teachers, names, strict=True)
        ]
        ensemble = _ensemble(found, options).to(setting.device)
        watch.lap("teachers")
        networks = _train_networks(run, setting, ensemble, names, watch)
        metrics = _conclude(run, setting, ensemble, networks, watch)
    return DistillResult(run.folder, metrics, networks["student"])


def _prepare(
    options: DistillOptions, objects: dict[str, Teacher], student: Classifier | None
) -> tuple[_Setting, list[ModelName | None]]:
    """Everything that can be wrong is tried before anything is trained or written, and told at once."""
    texts = [text for text in options.teachers if text not in objects]
    *parsed, named_student, device, data = together(
        *(partial(parse, text) for text in texts),
        partial(parse, options.student) if student is None else lambda: None,
        partial(choose_device, options.device),
        partial(load_data, **options.load_arguments()),
    )
    by_text = dict(zip(texts, parsed, strict=True))
    names = [by_text.get(text) for text in options.teachers]
    common: dict[str, Any] = {"stem": options.stem, "offline": options.offline}
    *_, start = together(
        partial(_check_controls, options, names),
        *(partial(for_data, teacher.classifier, data, label) for label, teacher in objects.items()),
        *(
            partial(check_teacher, name, data, size=options.teacher_size.get(name.label), **common)
            for name in parsed
        ),
        partial(for_data, student, data, "the student")
        if student is not None
        else partial(
            new_classifier, named_student, data, size=options.student_size, seed=options.seed, **common
        ),
    )
    recipe = recipes.student_recipe(start, len(data.train), options.training.model_dump())
    viewing = _viewing(options, data, recipe)
    return _Setting(options, data.to(device), device, start, recipe, viewing), names


def _viewing(options: DistillOptions, data: Dataset, recipe: Recipe) -> Viewing:
    policy = data.augment if options.augment == "auto" else options.augment
    wanted = 1 if policy == "none" else min(STORED_VIEWS, recipe.epochs)
    view_bytes = 4 * len(options.teachers) * len(data.train) * len(data.classes)
    default = min(wanted, STORED_BYTES // view_bytes)  # none fits: teachers run live
    return Viewing(policy, default if options.views is None else options.views, options.seed)


def _check_controls(options: DistillOptions, names: Sequence[ModelName | None]) -> None:
    if "independent" not in options.controls:
        return
    fixed = [
        label_of(text) for text, name in zip(options.teachers, names, strict=True) if not can_be_trained(name)
    ]
    if fixed:
        raise ConfigError(
            f"controls: independent teachers cannot be made for {', '.join(fixed)}",
            "they come with trained weights, so there is no other seed to train",
            "leave that control out: --controls labels,best-teacher",
        )


def _teacher(name: ModelName, setting: _Setting, seed: int) -> Teacher:
    options = setting.options
    return load_teacher(
        name,
        setting.data,
        size=options.teacher_size.get(name.label),
        stem=options.stem,
        seed=seed,
        augment=None if options.augment == "auto" else options.augment,
        training=options.teacher_training.model_dump(),
        train=options.train_teachers,
        device=setting.device,
        offline=options.offline,
    )


def _ensemble(teachers: list[Teacher], options: DistillOptions) -> Ensemble:
    table = options.temperature if isinstance(options.temperature, dict) else {}
    common = (
        options.temperature
        if isinstance(options.temperature, float)
        else DistillOptions.model_fields["temperature"].default
    )
    temperatures = torch.tensor([table.get(teacher.label, common) for teacher in teachers])
    weights = torch.tensor(options.weights) if options.weights else uniform_weights(len(teachers))
    return Ensemble(teachers, weights, temperatures, options.pool)


def _student_temperature(ensemble: Ensemble, options: DistillOptions) -> float:
    """The student's own: as given, else the weighted mean of the teachers'."""
    if isinstance(options.temperature, dict) and "student" in options.temperature:
        return options.temperature["student"]
    return float((ensemble.weights * ensemble.temperatures).sum())


def _train_networks(
    run: Run, setting: _Setting, ensemble: Ensemble, names: Sequence[ModelName | None], watch: Stopwatch
) -> dict[str, Classifier]:
    """The student and its controls, each from the same weights, order and views."""
    val_logits = ensemble.all_logits(setting.data.val)
    stored: dict[int, Tensor] = {}
    networks = {}
    for name in ["student", *setting.options.controls]:
        code = parse(setting.options.student) if setting.options.student.startswith("py:") else None
        kept = run.finished_network(name, code)
        if kept is not None:
            log.info("%s: finished before", name)
            networks[name] = kept.to(setting.device)
            continue
        own, own_val, own_stored = ensemble, val_logits, stored
        if name == "best-teacher":
            own = _best_alone(ensemble, val_logits, setting)
        elif name == "independent":
            own = replace(ensemble, teachers=_of_other_seeds(names, setting)).to(setting.device)
            own_val, own_stored = own.all_logits(setting.data.val), {}
        objective = _objective(name, own, own_val, own_stored, setting)
        networks[name] = _train(name, objective, setting, run)
        for teacher in own.teachers:
            teacher.check_unchanged()
        watch.lap(name)
    return networks


def _of_other_seeds(names: Sequence[ModelName | None], setting: _Setting) -> list[Teacher]:
    """Teachers of the same names and other seeds."""
    default = setting.options.teacher_seed
    seeds = [(name, default if name.seed is None else name.seed) for name in names if name is not None]
    return [_teacher(replace(name, seed=seed + OTHER_SEEDS), setting, seed) for name, seed in seeds]


def _best_alone(ensemble: Ensemble, val_logits: Tensor, setting: _Setting) -> Ensemble:
    """The same teachers with all weight on the one of the highest validation accuracy."""
    accuracies = (val_logits.argmax(dim=2) == setting.data.val.known_labels).double().mean(dim=1)
    best = int(accuracies.argmax())
    log.info("best teacher on the validation split: %s", ensemble.teachers[best].label)
    weights = torch.zeros_like(ensemble.weights)
    weights[best] = 1
    return replace(ensemble, weights=weights)


def _objective(
    name: str, ensemble: Ensemble, val_logits: Tensor, stored: dict[int, Tensor], setting: _Setting
) -> Objective:
    train, viewing = setting.data.train, setting.viewing
    alone = name == "labels"
    targets = StoredTargets(ensemble, train, viewing, stored) if viewing.count else LiveTargets(ensemble)
    return Objective(
        soft_weight=0.0 if alone else setting.options.soft_weight,
        temperature=_student_temperature(ensemble, setting.options),
        # The control on labels needs no targets; stored ones are looked up for its curve.
        targets=targets if viewing.count or not alone else None,
        val_target=ensemble.target(val_logits),
    )


def _train(name: str, objective: Objective, setting: _Setting, run: Run) -> Classifier:
    network = copy.deepcopy(setting.start)
    description = name if name == "student" else f"control {name}"
    log.info(
        "%s: training %s on %s, %d epochs",
        description,
        network.card.model,
        setting.data.name,
        setting.recipe.epochs,
    )
    history = fit(
        network,
        setting.data.train,
        setting.data.val,
        setting.recipe,
        objective,
        setting.viewing,
        seed=setting.options.seed,
        device=setting.device,
        description=description,
    )
    run.keep_network(name, network, history)
    return network


def _conclude(
    run: Run, setting: _Setting, ensemble: Ensemble, networks: dict[str, Classifier], watch: Stopwatch
) -> dict[str, Any]:
    """Measure everything on the test split, once, and write what the run leaves."""
    test = setting.data.test
    stacked = ensemble.all_logits(test)
    members = {teacher.label: teacher.classifier for teacher in ensemble.teachers}
    metrics, logits = compare(
        networks, members, stacked, confident_logits(ensemble.target(stacked).plain), test
    )
    watch.lap("test")
    unchanged = {teacher.label: teacher.check_unchanged() for teacher in ensemble.teachers}
    run.keep_predictions(logits, test.known_labels)
    draw_curves(run.history(), run.path("curves.png"))
    watch.lap("pictures")
    metrics = {
        "data": setting.data.name,
        "split": "test",
        "n": len(test),
        **metrics,
        "seconds": watch.seconds,
    }
    manifest = surroundings(setting.device) | {
        "seed": setting.options.seed,
        "data": {
            "name": setting.data.name,
            "fingerprint": setting.data.fingerprint(),
            "images": {s: len(getattr(setting.data, s)) for s in ("train", "val", "test")},
        },
        "teachers": [
            {
                "label": t.label,
                "origin": t.origin,
                "before": t.fingerprint,
                "after": unchanged[t.label],
                "recipe": recipe_of(Path(t.origin)),
                "preprocess": t.classifier.card.to_json()["preprocess"],
            }
            for t in ensemble.teachers
        ],
        "networks": run.status()["networks"],
    }
    files.write_json(run.path("manifest.json"), manifest)
    files.write_json(run.path("metrics.json"), metrics)
    return metrics
