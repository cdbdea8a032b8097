"""Who is compared: the networks of a run with its teachers and ensemble, or models by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ensemble_kd.analysis.options import AnalysisOptions
from ensemble_kd.classifier import Classifier
from ensemble_kd.config import resolve
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, ModelError, RunError
from ensemble_kd.evaluation import load_any
from ensemble_kd.inference import predict
from ensemble_kd.models import parse
from ensemble_kd.results import ENSEMBLE
from ensemble_kd.runs import OBJECTS, RUNS, Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import combination_of, teacher_of
from ensemble_kd.teachers.combination import set_up
from ensemble_kd.teachers.ensemble import Ensemble, Teacher

Chosen = TypeVar("Chosen", bound=AnalysisOptions)
FORM = 2
"""Of the files of numbers; a report makes anew what has another."""


@dataclass(frozen=True)
class Subjects:
    """Models side by side on one data set: student and controls (or `models`), teachers, ensemble."""

    source: str
    """The run folder, or the names of the models."""
    folder: Path
    """Where numbers and pictures of the analyses go."""
    data: Dataset
    networks: Mapping[str, Classifier]
    """`student` first, then the controls; or models by name."""
    ensemble: Ensemble | None = None

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The teachers of the run; none where models are compared."""
        return self.ensemble.teachers if self.ensemble else ()

    @cached_property
    def idle(self) -> list[str]:
        """The teachers without weight in the ensemble, where weights do not change by batch."""
        if self.ensemble is None or self.ensemble.weigh is not None:
            return []
        weights = zip(self.teachers, self.ensemble.weights.tolist(), strict=True)
        return [teacher.label for teacher, weight in weights if weight == 0]

    @cached_property
    def roles(self) -> dict[str, str]:
        """`student`, `control`, `teacher`, `ensemble` or `model` by name, in the order of all tables."""
        if self.ensemble is None:
            return dict.fromkeys(self.networks, "model")
        networks = {name: "student" if name == "student" else "control" for name in self.networks}
        return {**networks, **{t.label: "teacher" for t in self.teachers}, ENSEMBLE: "ensemble"}

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        """All single networks by name, in order: those above and the teachers."""
        return {**self.networks, **{teacher.label: teacher.classifier for teacher in self.teachers}}

    def head(self, images: Images, /, **settings: Any) -> dict[str, Any]:
        """What every file of numbers begins with: who is compared, on what, and the settings that shaped it."""
        return {
            "form": FORM,
            "source": self.source,
            "data": self.data.name,
            "classes": list(self.data.classes),
            "n": len(images),
            "roles": self.roles,
            "settings": settings,
        }

    def logits(self, images: Images) -> dict[str, Tensor]:
        """Logits (N, C) of every model for the images, float32, in the classes of the data.

        Nothing is stored. Those of the ensemble are the log of its probabilities at temperature 1.

        Args:
            images: uint8, or float in [0, 1], of any size; on the device of the networks.
        """
        found = {name: predict(network, images) for name, network in self.networks.items()}
        if self.ensemble is None:
            return found
        stacked = torch.stack([t.mapped(predict(t.classifier, images)) for t in self.teachers])
        found |= {teacher.label: logits for teacher, logits in zip(self.teachers, stacked, strict=True)}
        return found | {ENSEMBLE: self.ensemble.target(stacked).plain}

    def some(self, most: int, seed: int) -> Images:
        """The test images in order, or a choice of `most` of them where there are more."""
        test = self.data.test
        if len(test) <= most:
            return test
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:most]
        return test[chosen.sort().values.to(test.ids.device)]


def chosen_options(
    kind: type[Chosen],
    run: str | Path | None,
    models: str | Sequence[str] | None,
    options: Mapping[str, Any],
    config_file: str | Path | None,
    sets: Sequence[str],
) -> Chosen:
    """The options of an analysis, from the arguments that all of them take.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    given = {**options, "run": run, "models": [models] if isinstance(models, str) else models}
    return resolve(kind, given, file=Path(config_file) if config_file else None, sets=sets)


def subjects_of(options: AnalysisOptions, given: Sequence[Teacher] = ()) -> Subjects:
    """The models that the options name, on their device and in eval mode.

    Args:
        options: a run, or two or more models and data.
        given: the teachers of a run that was given them as objects.

    Raises:
        ConfigError: both a run and models are named, or fewer than two models.
        RunError: the run is missing or did not finish.
        ModelError: a teacher is no longer there, or is another than the one that taught.
    """
    device = choose_device(options.device)
    if options.models:
        return _models(options, device)
    run = run_of(options)
    return _networks_and_teachers(run, options.out or run.path("analysis"), device, given)


def run_of(options: AnalysisOptions) -> Run:
    """The run that is named, or the newest finished one."""
    return Run.open(options.run) if options.run else Run.newest()


def _models(options: AnalysisOptions, device: torch.device) -> Subjects:
    if options.run is not None or len(set(options.models)) < max(2, len(options.models)):
        raise ConfigError(
            "models: name two or more, each once, and no run beside them",
            "pairs of models are compared",
            "say --models a,b --data NAME, or a run folder alone",
        )
    data = load_data(**options.load_arguments()).to(device)
    networks = {name: load_any(name, data, device) for name in options.models}
    folder = options.out or RUNS / f"analysis-{datetime.now():%Y%m%d-%H%M%S}"
    return Subjects(",".join(options.models), folder, data, networks)


def _networks_and_teachers(
    run: Run, folder: Path, device: torch.device, given: Sequence[Teacher]
) -> Subjects:
    names = _distilled(run)
    options = resolve(DistillOptions, {"train_teachers": False}, file=run.path("config.yaml"))
    data = load_data(**options.load_arguments())
    manifest = run.manifest()
    if data.fingerprint() != manifest["data"]["fingerprint"]:
        raise RunError(
            f"the data of {run.folder} are not those that it was trained on",
            f"{options.data} has another fingerprint than in manifest.json",
            "bring the images back as they were, or distil again",
        )
    data = data.to(device)
    code = parse(options.student) if options.student.startswith("py:") else None
    networks = {}
    for name in names:
        network = run.finished_network(name, code)
        if network is None:
            raise RunError(
                f"{run.folder} has lost its network {name!r}",
                "its file is missing, or was changed",
                "distil again",
            )
        networks[name] = network.to(device).eval()
    teachers = _teachers(run, options, data, device, given)
    return Subjects(str(run.folder), folder, data, networks, _ensemble(options, teachers, data))


def _distilled(run: Run) -> list[str]:
    """The networks of a finished run of `distill`, the student first."""
    roles = {name: row["role"] for name, row in run.metrics()["models"].items()}
    if "student" not in roles:
        raise RunError(
            f"{run.folder} is no run of `ekd distill`",
            "it has no student and no teachers",
            f"compare it with others: --models {run.folder},OTHER --data NAME",
        )
    return [name for name, role in roles.items() if role in ("student", "control")]


def _teachers(
    run: Run, options: DistillOptions, data: Dataset, device: torch.device, given: Sequence[Teacher]
) -> list[Teacher]:
    """The teachers that taught: the same tensors, which the manifest's hashes tell."""
    own = {teacher.label: teacher.for_data(data) for teacher in given}
    if run.status()["verb"] == OBJECTS and not own:
        raise RunError(
            f"the models of {run.folder} are not all in files",
            "it was given teachers, a student or a function as Python objects",
            "call the analysis from Python with teachers=[…], the same objects",
        )
    hashes = {row["label"]: row["after"] for row in run.manifest()["teachers"]}
    teachers = [
        own[text] if text in own else teacher_of(parse(text), options, data, options.teacher_seed, device)
        for text in options.teachers
    ]
    for teacher in teachers:
        if hashes.get(teacher.label) != teacher.fingerprint:
            raise ModelError(
                f"teacher {teacher.label!r} is not the one that taught",
                "its tensors have another hash than in the run's manifest.json",
                "distil again, or bring the teacher's file back as it was",
            )
        teacher.classifier.to(device)
    return teachers


def _ensemble(options: DistillOptions, teachers: Sequence[Teacher], data: Dataset) -> Ensemble:
    """The teachers combined as in the run, fitted anew on the validation split."""
    tempered = options.temperature if isinstance(options.temperature, dict) else {}
    temperatures = torch.tensor([tempered.get(teacher.label, 1.0) for teacher in teachers])
    logits = torch.stack([teacher.all_logits(data.val) for teacher in teachers])
    return set_up(
        teachers,
        temperatures,
        combination_of(options),
        logits,
        data.val.known_labels,
        seed=options.seed,
    )
