"""Distilling: teachers, one soft target, a student and its controls, and a run folder with the answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ensemble_kd import config, distributed, files, trackers
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.curves import draw_curves
from ensemble_kd.errors import together
from ensemble_kd.features import FeatureTerm, feature_width
from ensemble_kd.fit import fit
from ensemble_kd.interrupts import deferred
from ensemble_kd.judges import Judges, combined, of_other_seeds, teachers_of
from ensemble_kd.losses import LOSSES
from ensemble_kd.models import ModelName, parse
from ensemble_kd.objective import Objective
from ensemble_kd.results import compare
from ensemble_kd.runs import OBJECTS, Run, Stopwatch, surroundings
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import Objects, Setting, engine_of, prepare
from ensemble_kd.shared import Shared
from ensemble_kd.teachers.combination import best_alone, describe
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.library import made_from
from ensemble_kd.teachers.targets import LiveTargets


@dataclass(frozen=True)
class DistillResult:
    """A finished run: its folder, its metrics.json as a dictionary, and the student in eval mode."""

    folder: Path
    metrics: dict[str, Any]
    student: Classifier


def distill(
    teachers: str | Sequence[str | Teacher] | None = None,
    student: str | Classifier | None = None,
    *,
    combine: str | Callable[..., Tensor] | None = None,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> DistillResult:
    """Teach one student from several teachers, beside its controls, and leave a run folder.

    Args:
        teachers: names (see `models.parse`), or `Teacher` objects.
        student: a name, or an untrained `Classifier`, which is copied.
        combine: a name of `weighting.COMBINERS`, `py:FILE.py:function`, or a function of your own, which
            is given those of the inputs listed in `weighting` that it names.
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
    objects = Objects(
        {t.label: t for t in listed or () if isinstance(t, Teacher)},
        student if isinstance(student, Classifier) else None,
        combine if callable(combine) else None,
    )
    given = {**options, "combine": None if callable(combine) else combine}
    if listed is not None:
        given["teachers"] = [t.label if isinstance(t, Teacher) else t for t in listed]
    if student is not None:
        given["student"] = student if isinstance(student, str) else student.card.model
    file = Path(config_file) if config_file else None
    return distill_with(config.resolve(DistillOptions, given, file=file, sets=sets), objects)


def go_on(run: Run, shared: Shared | None = None) -> DistillResult:
    """Finish a stopped run of `distill` whose folder is locked (see `resuming.resume`)."""
    with run.working():
        run.set_state("running")
        run.must_match("configuration", config.flat(config.read_yaml(run.path("config.yaml"))))
        options = config.resolve(DistillOptions, {}, file=run.path("config.yaml"))
        watch = Stopwatch()
        _, (setting, names) = together(
            lambda: trackers.check(options.track),
            lambda: prepare(options, Objects({}, shared=shared or Shared())),
        )
        return finish(run, setting, names, watch)


def distill_with(options: DistillOptions, objects: Objects) -> DistillResult:
    """`distill` with options that were read, and with what is no text."""
    if distributed.restarted() and options.out and (options.out / "status.json").is_file() and not objects:
        return go_on(Run.open(options.out).locked())
    watch = Stopwatch()
    _, (setting, names) = together(lambda: trackers.check(options.track), lambda: prepare(options, objects))
    run = new_run(setting, OBJECTS if objects else "distill")
    with run.working():
        return finish(run, setting, names, watch)


def new_run(setting: Setting, verb: str = "distill") -> Run:
    """The folder of a run, with its config.yaml; it is locked."""
    options = setting.options
    resolved = config.to_yaml(
        options,
        augment=setting.viewing.policy,
        decode=setting.data.decode,
        views=setting.viewing.count,
        training=setting.recipe.to_json(),
        combine=setting.combination.name,
        loss_numbers={
            **LOSSES[options.loss].numbers,
            **options.loss_numbers.model_dump(exclude_none=True),
        },
        temperature=setting.temperatures,
        soft_weight=options.soft,
        out=None,
        overwrite=False,
    )
    run = Run.create(verb, options.out, f"{options.data}-{options.student}", options.overwrite, resolved)
    log.info("run folder %s", run.folder)
    return run


def finish(
    run: Run,
    setting: Setting,
    names: Sequence[ModelName | None],
    watch: Stopwatch,
    untold: Sequence[Mapping[str, Any]] = (),
) -> DistillResult:
    """Everything after the run folder is there: what it holds already is not done again.

    `untold` are epochs of the student that no tracker has seen.
    """
    data = {"fingerprint": setting.data.fingerprint(), "transfer": setting.transfer.digest}
    run.must_match("data", data | {"combiner": _code_of(setting.combination.name)})
    watch.lap("data")
    chosen = config.flat(config.read_yaml(run.path("config.yaml")))
    with trackers.tracking(setting.options.track, run.folder, chosen):
        for row in untold:
            trackers.log_epoch("student", row)
        judges = combined(teachers_of(names, setting), setting)
        run.must_match(
            "teachers", {teacher.label: teacher.fingerprint for teacher in judges.ensemble.teachers}
        )
        watch.lap("teachers")
        networks = _train_networks(run, setting, judges, names, watch)
        metrics = _conclude(run, setting, judges, networks, watch)
    return DistillResult(run.folder, metrics, networks["student"])


def _train_networks(
    run: Run, setting: Setting, judges: Judges, names: Sequence[ModelName | None], watch: Stopwatch
) -> dict[str, Classifier]:
    """The student and its controls, each from the same weights, order and views."""
    networks = {}
    for name in ["student", *setting.options.controls]:
        code = parse(setting.options.student) if setting.options.student.startswith("py:") else None
        kept = run.finished_network(name, code)
        if kept is not None:
            log.info("%s: finished before", name)
            networks[name] = kept.to(setting.device)
            continue
        own = judges
        if name == "best-teacher":
            best = best_alone(judges.ensemble, judges.val_logits, setting.data.val.known_labels)
            log.info("best teacher on the validation split: %s", _heaviest(best))
            own = replace(judges, ensemble=best)
        elif name == "independent":
            own = combined(of_other_seeds(names, setting), setting)
        if setting.viewing.count:
            own.store(setting)
            watch.lap("targets")
        networks[name] = _train(name, own, setting, run)
        for teacher in own.ensemble.teachers:
            teacher.check_unchanged()
        watch.lap(name)
    return networks


def _heaviest(ensemble: Ensemble) -> str:
    return ensemble.teachers[int(ensemble.weights.argmax())].label


def objective_of(name: str, network: Classifier, judges: Judges, setting: Setting) -> Objective:
    """What the student, or the control of that name, is trained towards."""
    options, viewing, alone = setting.options, setting.viewing, name == "labels"
    ensemble = judges.ensemble.for_measuring() if alone else judges.ensemble
    targets = judges.stored(ensemble, setting) if viewing.count else LiveTargets(ensemble)
    # The control on labels needs no targets; stored ones of its images are looked up for its curve.
    # With mixing, partners come from all images that are trained on, so that others have other pixels.
    same = setting.transfer is setting.data.train or viewing.mix == "none"
    measured = not alone or (viewing.count > 0 and not options.unlabelled_only and same)
    return Objective(
        soft_weight=0.0 if alone else options.soft,
        temperature=setting.temperatures.get("student", ensemble.student_temperature),
        targets=targets if measured else None,
        val_target=ensemble.target(judges.val_logits),
        loss=options.loss,
        numbers=options.loss_numbers.model_dump(exclude_none=True),
        schedule="constant" if alone else options.soft_schedule,
        span=options.soft_epochs,
        features=_feature_term(network, ensemble, setting) if ensemble.features and not alone else None,
        weights_vary=ensemble.weigh is not None and not alone,
    )


def _feature_term(network: Classifier, ensemble: Ensemble, setting: Setting) -> FeatureTerm:
    widths = [feature_width(teacher.classifier, teacher.label) for teacher in ensemble.teachers]
    own = feature_width(network, "the student")
    term = FeatureTerm(own, widths, setting.options.feature_weight, setting.options.seed)
    return term.to(setting.device)


def _train(name: str, judges: Judges, setting: Setting, run: Run) -> Classifier:
    network = copy.deepcopy(setting.start).to(setting.device)
    description = name if name == "student" else f"control {name}"
    log.info(
        "%s: training %s on %s, %d epochs",
        description,
        network.card.model,
        setting.data.name,
        setting.recipe.epochs,
    )
    labels = [teacher.label for teacher in judges.ensemble.teachers]
    with deferred():  # who asks to stop at the very end finds the network kept
        history = fit(
            network,
            setting.data.train if name == "labels" else setting.transfer,
            setting.data.val,
            setting.recipe,
            objective_of(name, network, judges, setting),
            setting.viewing,
            seed=setting.options.seed,
            device=setting.device,
            description=description,
            engine=engine_of(setting.options, run.path("trace.json") if name == "student" else None),
            checkpoints=run.checkpoints(name),
        )
        for row in history:
            if "weights" in row:
                row["weights"] = dict(zip(labels, row["weights"], strict=True))
        run.keep_network(name, network, history)
    return network


def _conclude(
    run: Run,
    setting: Setting,
    judges: Judges,
    networks: dict[str, Classifier],
    watch: Stopwatch,
) -> dict[str, Any]:
    """Measure everything on the test split, once, and write what the run leaves."""
    test, ensemble = setting.data.test, judges.ensemble
    for teacher in ensemble.teachers:
        teacher.classifier.to(setting.device)
    stacked = ensemble.all_logits(test)
    members = {teacher.label: teacher.classifier for teacher in ensemble.teachers}
    metrics, logits = compare(
        networks, members, stacked, ensemble.target(stacked).plain, test, ensemble.known, setting.shared
    )
    watch.lap("test")
    unchanged = {teacher.label: teacher.check_unchanged() for teacher in ensemble.teachers}
    run.keep_predictions(logits, test.known_labels)
    if distributed.first() and setting.shared.pictures:
        draw_curves(run.history(), run.path("curves.png"))
    watch.lap("pictures")
    report = describe(ensemble, setting.combination, judges.val_logits, setting.data.val)
    metrics = {
        "data": setting.data.name,
        "split": "test",
        "n": len(test),
        **metrics,
        "training": _training_of(run, setting),
        "combination": {**report, "mean_weights": _last_weights(run)},
        "seconds": watch.seconds,
    }
    manifest = surroundings(setting.device) | {
        "seed": setting.options.seed,
        "data": {
            "name": setting.data.name,
            "fingerprint": setting.data.fingerprint(),
            "shape": list(setting.data.test.pixels.shape[1:]),
            "images": {s: len(getattr(setting.data, s)) for s in ("train", "val", "test")},
            "transfer": {"images": len(setting.transfer), "digest": setting.transfer.digest},
        },
        "combine": {"name": setting.combination.name, "code": _code_of(setting.combination.name)},
        "teachers": [_of_teacher(t, unchanged[t.label]) for t in ensemble.teachers],
        "networks": run.status()["networks"],
    }
    run.write_json("manifest.json", manifest)
    run.write_json("metrics.json", metrics)
    trackers.log_results(metrics)
    return metrics


def _of_teacher(teacher: Teacher, after: str) -> dict[str, Any]:
    """Its part of the manifest; `after` is its fingerprint now."""
    made = made_from(Path(teacher.origin))
    return {
        "label": teacher.label,
        "origin": teacher.origin,
        "before": teacher.fingerprint,
        "after": after,
        "recipe": made.get("recipe"),
        "published": bool(made.get("published")),
        "preprocess": teacher.classifier.card.to_json()["preprocess"],
        "class_map": teacher.class_map and teacher.class_map.groups,
    }


def _code_of(combine: str) -> str | None:
    """SHA-256 of the file of a user's weight function."""
    path = combine.removeprefix("py:").rpartition(":")[0]
    return files.sha256_file(Path(path).expanduser()) if combine.startswith("py:") else None


def _training_of(run: Run, setting: Setting) -> dict[str, dict[str, int]]:
    """Each network's images and steps, which differ where there are unlabelled images."""
    steps = {row["network"]: row["step"] for row in run.history()}
    images = {name: len(setting.data.train if name == "labels" else setting.transfer) for name in steps}
    return {name: {"images": images[name], "steps": steps[name]} for name in steps}


def _last_weights(run: Run) -> dict[str, float] | None:
    """The teachers' mean weights in the student's last epoch, where they differed by batch."""
    rows = [row for row in run.history() if row["network"] == "student"]
    return rows[-1].get("weights") if rows else None
