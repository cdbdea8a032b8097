"""`train`: one network on labels, as a teacher for the library or as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ensemble_kd import config, distributed, files, recipes, trackers
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.curves import draw_curves
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, together
from ensemble_kd.fit import train_on_labels
from ensemble_kd.fresh import new_classifier
from ensemble_kd.inference import predict
from ensemble_kd.interrupts import deferred
from ensemble_kd.metrics import measure
from ensemble_kd.models import parse
from ensemble_kd.runs import Run, Stopwatch, surroundings
from ensemble_kd.schema import TrainOptions
from ensemble_kd.setting import engine_of
from ensemble_kd.teachers.library import history_of, made_from
from ensemble_kd.teachers.registry import can_be_trained, check_teacher, load_teacher


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, its metrics.json as a dictionary, and the network in eval mode."""

    folder: Path
    metrics: dict[str, Any]
    model: Classifier


def train(
    model: str | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> TrainResult:
    """Train one network on labels and leave a run folder with `model.safetensors`.

    As a `teacher` (the default) it gets a teacher's recipe and is kept in the teacher library, where
    `distill` finds it; as a `control` it gets a student's.

    Args:
        model: a name (see `models.parse`).
        config_file: YAML with any of the options.
        sets: assignments such as `"training.weight_decay=0.01"`.
        options: the fields of `schema.TrainOptions`; nested ones also by their short names.

    Raises:
        EkdError: options, data or model cannot be used.
    """
    file = Path(config_file) if config_file else None
    chosen = config.resolve(TrainOptions, {**options, "model": model}, file=file, sets=sets)
    data = load_data(**chosen.load_arguments())
    check_options(chosen, data)
    policy = data.augment if chosen.augment == "auto" else chosen.augment
    run = Run.create(
        "train",
        chosen.out,
        f"{chosen.data}-{parse(chosen.model).label}",
        chosen.overwrite,
        config.to_yaml(chosen, augment=policy, decode=data.decode, out=None, overwrite=False),
    )
    log.info("run folder %s", run.folder)
    with run.working():
        return _finish(run, chosen, data, policy)


def check_options(chosen: TrainOptions, data: Dataset) -> None:
    """What can be wrong, as far as it can be told before anything is written."""
    name = parse(chosen.model)
    if chosen.role == "teacher" and not can_be_trained(name):
        raise ConfigError(
            f"model: {chosen.model!r} is trained already",
            "a file or a run brings its own weights",
            "name an architecture, or train on from the file with --role control",
        )
    together(
        partial(trackers.check, chosen.track),
        partial(choose_device, chosen.device),
        partial(check_teacher, name, data, size=chosen.size, stem=chosen.stem, offline=chosen.offline),
        partial(recipes.check_batch, chosen.training.batch_size, len(data.train)),
    )


def go_on(run: Run) -> TrainResult:
    """Finish a stopped run of `train` whose folder is locked (see `resuming.resume`)."""
    with run.working():
        run.set_state("running")
        run.must_match("configuration", config.flat(config.read_yaml(run.path("config.yaml"))))
        chosen = config.resolve(TrainOptions, {}, file=run.path("config.yaml"))
        return _finish(run, chosen, load_data(**chosen.load_arguments()), chosen.augment)


def _finish(run: Run, chosen: TrainOptions, data: Dataset, policy: str) -> TrainResult:
    """Everything after the run folder is there."""
    watch = Stopwatch()
    run.must_match("data", {"fingerprint": data.fingerprint()})
    watch.lap("data")
    with trackers.tracking(chosen.track, run.folder, config.flat(config.read_yaml(run.path("config.yaml")))):
        return _tracked(run, chosen, data, policy, watch)


def _tracked(run: Run, chosen: TrainOptions, data: Dataset, policy: str, watch: Stopwatch) -> TrainResult:
    device, name = choose_device(chosen.device), parse(chosen.model)
    classifier, recipe = _train(run, chosen, data, device, policy)
    watch.lap("training")
    test = data.test.to(device)
    row = {
        "role": chosen.role,
        "parameters": classifier.parameter_count,
        "bytes": classifier.byte_count,
        **measure(predict(classifier, test), test.known_labels),
    }
    if distributed.first():
        draw_curves(run.history(), run.path("curves.png"))
    watch.lap("test")
    metrics = {"data": data.name, "split": "test", "n": len(test)}
    metrics |= {"models": {name.label: row}, "seconds": watch.seconds}
    about = {"name": data.name, "fingerprint": data.fingerprint(), "shape": list(data.test.pixels.shape[1:])}
    facts = {"seed": chosen.seed, "data": about}
    resolved = config.to_yaml(
        chosen, augment=policy, decode=data.decode, training=recipe, out=None, overwrite=False
    )
    if distributed.first():
        files.write_text(run.path("config.yaml"), resolved)
    run.write_json("manifest.json", surroundings(device) | facts)
    run.write_json("metrics.json", metrics)
    trackers.log_results(metrics)
    return TrainResult(run.folder, metrics, classifier)


def _train(
    run: Run, chosen: TrainOptions, data: Dataset, device: torch.device, policy: str
) -> tuple[Classifier, dict[str, Any] | None]:
    """The trained network and its recipe, which is that of its role; kept in the run."""
    name, overrides = parse(chosen.model), chosen.training.model_dump()
    engine = engine_of(chosen, run.path("trace.json"))
    common: dict[str, Any] = {
        "size": chosen.size, "stem": chosen.stem, "seed": chosen.seed, "offline": chosen.offline,
    }  # fmt: skip
    if chosen.role == "teacher":
        teacher = load_teacher(
            name, data, **common, augment=policy, training=overrides, device=device, engine=engine
        )
        folder = Path(teacher.origin)
        run.keep_network("model", teacher.classifier, history_of(folder))
        return teacher.classifier, made_from(folder).get("recipe")
    classifier = new_classifier(name, data, **common)
    recipe = recipes.student_recipe(classifier, len(data.train), overrides)
    with deferred():  # who asks to stop at the very end finds the network kept
        history = train_on_labels(
            classifier,
            data,
            recipe,
            policy,
            seed=chosen.seed,
            device=device,
            description=name.label,
            engine=engine,
            checkpoints=run.checkpoints("model"),
        )
        run.keep_network("model", classifier, history)
    return classifier, recipe.to_json()
