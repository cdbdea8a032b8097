"""The options of every verb as models: each option's type, default and description, once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ensemble_kd.errors import Problem, listing, nearest
from ensemble_kd.fields import (
    Count,
    Files,
    Names,
    NotNegative,
    Number,
    Options,
    Part,
    PerTeacher,
    Positive,
    Seed,
    Share,
    Sizes,
    numbers,
)
from ensemble_kd.names import label_of

AUGMENT = Literal["auto", "none", "crop", "crop-flip", "rrc", "trivial"]
CONTROLS = ("labels", "best-teacher", "independent")
TRACKERS = ("tensorboard", "wandb", "trackio")
RESERVED = {"student", "ensemble", *CONTROLS}


class RecipeOptions(Options):
    """How a network is trained; what is left out is chosen for the network and the data."""

    epochs: Count | None = Field(None, description="passes over the training images")
    batch_size: Count | None = Field(None, description="images a step")
    optimizer: Literal["sgd", "adamw"] | None = Field(None, description="sgd (Nesterov, 0.9) or adamw")
    lr: Positive | None = Field(None, description="highest learning rate")
    weight_decay: NotNegative | None = Field(None, description="on matrices and filters only")
    warmup_epochs: NotNegative | None = Field(None, description="linear warm-up before the cosine")
    label_smoothing: Share | None = Field(None, description="towards uniform labels")
    clip_norm: Positive | None = Field(None, description="largest norm of the gradient")
    ema: Share | None = Field(None, description="decay of an average of the weights, which is then kept")
    init: Literal["default", "unit-variance"] | None = Field(None, description="how weights start")


class DataOptions(Options):
    """Which images."""

    data: str = Field(
        "digits",
        description="digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, tars:PATH, csv:FILE or hf:NAME",
    )
    data_columns: Names | None = Field(
        None, description="of hf:NAME, the columns of images and labels, where they are not clear"
    )
    data_root: Path | None = Field(
        None, description="where the files of a named source lie, or are downloaded to"
    )
    split: Part = Field(0.2, description="test part of an image folder without train/")
    val_fraction: Part = Field(0.1, description="part of the training images held out for validation")
    split_seed: Annotated[int, Field(ge=0, lt=1 << 32), Number] = Field(
        0, description="fixes which images those are"
    )
    image_size: Count | None = Field(None, description="decode the images of a folder to this side")
    limit_train: Count | None = Field(None, description="train on this many images only")
    decode: Literal["auto", "once", "always"] = Field(
        "auto", description="images of a folder: once into memory, or always anew; auto looks at the memory"
    )
    offline: bool = Field(False, description="never download anything")

    def load_arguments(self) -> dict[str, Any]:
        """The arguments of `data.load_data`."""
        names = ("split", "val_fraction", "split_seed", "image_size", "limit_train", "decode", "offline")
        chosen = {"source": self.data, "root": self.data_root, "columns": self.data_columns}
        return {**chosen, **{name: getattr(self, name) for name in names}}


class InspectOptions(DataOptions):
    """`ekd data`."""

    sheet: Path | None = Field(
        None, description="where to write the contact sheet; default runs/data-NAME.png"
    )


class NetworkOptions(DataOptions):
    """What all verbs that build networks have in common."""

    stem: Literal["auto", "imagenet"] = Field(
        "auto", description="imagenet keeps the stock form on small images"
    )
    augment: AUGMENT = Field(
        "auto", description="views: none, crop, crop-flip, rrc or trivial; auto takes what suits the data"
    )
    seed: Seed = Field(0, description="of weights, order of images and views")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    out: Path | None = Field(None, description="folder for results; default in runs/, by data, name and time")


class RunOptions(NetworkOptions):
    """What all verbs that leave a run have in common."""

    training: RecipeOptions = RecipeOptions()
    compile: bool = Field(False, description="compile the trained network by torch.compile")
    cuda_graph: bool = Field(True, description="record training steps as a CUDA graph where that can be")
    profile: bool = Field(False, description="say where the time of a training step goes")
    track: Names = Field(
        [],
        description="tensorboard, wandb, trackio, by commas or repeated: log there too, beside history.jsonl",
    )
    overwrite: bool = Field(False, description="replace what is in the run folder")

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """See `Options.cross_checks`."""
        return [({"track"}, problem) for problem in _unknown("track", self.track, TRACKERS)]


class TrainOptions(RunOptions):
    """`ekd train`."""

    model: str = Field(description="network to train", examples=["lenet"])
    role: Literal["teacher", "control"] = Field(
        "teacher", description="teacher: its recipe, kept in the library; control: a student's recipe"
    )
    size: Count | None = Field(None, description="side of the network's input in pixels")


class EvaluateOptions(DataOptions):
    """`ekd evaluate`."""

    path: str = Field(
        description="run folder, .safetensors file, or a teacher's name", examples=["runs/NAME"]
    )
    on: Literal["test", "val"] = Field("test", description="which split: test or val")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")


class CombineOptions(NetworkOptions):
    """Which teachers, and how they are combined."""

    teachers: Names = Field(
        default=[],
        description="names, by commas or repeated",
        validate_default=False,
        examples=[["resnet18", "vgg16"]],
    )
    combine: str | None = Field(
        None,
        description="how teachers are weighted: mean, fixed, learned, greedy, entropy, confidence, agree, "
        "drop, best or py:FILE.py:function; default mean",
    )
    weights: Annotated[list[NotNegative], BeforeValidator(numbers)] | None = Field(
        None, description="fixed weights of the teachers, summing to 1"
    )
    pool: Literal["prob", "logit", "pool-then-temper"] = Field(
        "prob", description="what is averaged: prob, logit, or pool-then-temper (prob, tempered afterwards)"
    )
    calibrate: Literal["none", "teachers", "pool", "both"] = Field(
        "none", description="fit temperatures on the validation split: of the teachers, the pool, or both"
    )
    class_map: Files = Field({}, description="NAME=FILE.yaml,... which classes of a teacher are the data's")
    teacher_size: Sizes = Field({}, description="NAME=PIXELS,... for teachers")
    teacher_training: RecipeOptions = RecipeOptions()
    teacher_seed: Seed = Field(0, description="of teachers trained here")
    train_teachers: bool = Field(True, description="train teachers that are not in the library")

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """See `Options.cross_checks`."""
        labels = [label_of(name) for name in self.teachers]
        found = [({"teachers"}, problem) for problem in self._check_teachers(labels)]
        found += [({"weights", "teachers", "combine"}, p) for p in self._check_weights(labels)]
        for option in ("teacher_size", "class_map"):
            problems = _check_names(option, list(getattr(self, option)), labels, [])
            found += [({option, "teachers"}, problem) for problem in problems]
        return found

    def _check_teachers(self, labels: Sequence[str]) -> list[Problem]:
        problems = []
        if not labels:
            problems.append(
                Problem(
                    "no teachers are named",
                    "there is nothing to distil from",
                    "say --teachers resnet18,vgg16",
                )
            )
        for label in sorted(RESERVED.intersection(labels)):
            problems.append(
                Problem(
                    f"a teacher cannot be called {label!r}",
                    "tables and files of the run use that name",
                    "rename its folder or file",
                )
            )
        for label in [label for label, count in Counter(labels).items() if count > 1]:
            base = label.partition("#")[0]
            same = len({name for name in self.teachers if label_of(name) == label}) == 1
            problems.append(
                Problem(
                    f"teacher {label!r} is named twice",
                    "the same network twice teaches nothing new",
                    f"leave one out, or give each its own seed: {base}#1,{base}#2",
                )
                if same
                else Problem(
                    f"two teachers are called {label!r}",
                    "tables and options tell teachers apart by that name",
                    "rename one of the folders or files",
                )
            )
        return problems

    def _check_weights(self, labels: Sequence[str]) -> list[Problem]:
        if self.weights is None and self.combine == "fixed":
            even = ",".join([f"{1 / len(labels):.7g}"] * len(labels)) if labels else "0.7,0.3"
            return [Problem("combine: fixed has no weights", "none are given", f"say --weights {even}")]
        if self.weights is None or not labels:
            return []
        total = sum(self.weights)
        if len(self.weights) != len(labels):
            return [
                Problem(
                    f"weights: {len(self.weights)} number(s) for {len(labels)} teacher(s)",
                    f"the teachers are {listing(labels)}",
                    "give one weight a teacher, in their order",
                )
            ]
        if not math.isclose(total, 1, abs_tol=1e-6):
            even = ",".join(f"{w / total:.7g}" for w in self.weights) if total > 0 else "1,…"
            return [
                Problem(
                    f"weights: {listing(self.weights)} sum to {total:g}, not to 1",
                    "other sums would change the scale of the loss",
                    f"say --weights {even}",
                )
            ]
        return []


class TeachersOptions(CombineOptions):
    """`ekd analyze-teachers`."""

    resamples: Count = Field(1000, description="of the bootstrap")


class LossNumbers(Options):
    """The own numbers of a loss, where they are not its defaults (see `losses.LOSSES`)."""

    alpha: NotNegative | None = Field(None, description="of dkd: weight of the target-class part")
    beta: NotNegative | None = Field(
        None, description="of dkd: of the other classes; of dist: between classes"
    )
    gamma: NotNegative | None = Field(None, description="of dist: within the batch")


class DistillOptions(CombineOptions, RunOptions):
    """`ekd distill`."""

    student: str = Field("lenet", description="network to teach")
    temperature: PerTeacher | None = Field(
        None,
        description="one number, or NAME=T,... a teacher; student=T sets the student's own; "
        "default 4 (logit-std 2, dist 1)",
    )
    soft_weight: Share | None = Field(
        None, description="w in (1-w)*CE(labels) + w*soft loss; default 0.3 (1 without labels)"
    )
    loss: str = Field(
        "kl",
        description="soft loss: kl, kl-unscaled, ce, reverse-kl, js, mse, dkd, dist, logit-std or hard",
    )
    loss_numbers: LossNumbers = LossNumbers()
    feature_weight: NotNegative = Field(0.0, description="of the loss between penultimate features")
    soft_schedule: Literal["constant", "linear", "cutoff", "warmup"] = Field(
        "constant", description="of w: linear to 0 in the second half, cutoff or warmup over soft_epochs"
    )
    soft_epochs: Count | None = Field(None, description="of cutoff and warmup; default half of the epochs")
    unlabelled: Path | None = Field(
        None, description="folder of images without labels, to distil on beside the training images"
    )
    unlabelled_only: bool = Field(False, description="distil on the unlabelled images alone")
    controls: Names = Field(["labels"], description="labels, best-teacher, independent; or none")
    views: Annotated[int, Field(ge=0), Number] | None = Field(
        None, description="stored views of each image, 0 for a fresh one each epoch; default 1 or 16"
    )
    mix: Literal["none", "mixup", "cutmix"] = Field(
        "none", description="mix each view with that of another image: mixup or cutmix"
    )
    top_k: Count | None = Field(
        None, description="store the largest k outputs of a teacher only; for many classes"
    )
    teacher_batch: Count | None = Field(None, description="images that a teacher sees at a time")
    teacher_precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of teachers making targets; auto takes bfloat16 where it is native"
    )
    shard_teachers: bool = Field(
        False, description="under torchrun, hold a part of every teacher in each process"
    )
    student_size: Count | None = Field(None, description="side of the student's input in pixels")

    @property
    def soft(self) -> float:
        """The soft weight, as given or by default."""
        return self.soft_weight if self.soft_weight is not None else 1.0 if self.unlabelled_only else 0.3

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """See `Options.cross_checks`."""
        labels = [label_of(name) for name in self.teachers]
        found = super().cross_checks() + RunOptions.cross_checks(self)
        names = list(self.temperature) if isinstance(self.temperature, dict) else []
        problems = _check_names("temperature", names, labels, ["student"])
        found += [({"temperature", "teachers"}, problem) for problem in problems]
        found += [({"controls"}, problem) for problem in _unknown("controls", self.controls, CONTROLS)]
        fields = {"unlabelled", "unlabelled_only", "soft_weight", "soft_schedule"}
        found += [(fields, problem) for problem in self._check_unlabelled()]
        if self.soft_epochs is not None and self.soft_schedule not in ("cutoff", "warmup"):
            problem = Problem(
                f"soft_epochs: {self.soft_schedule} has no such span",
                "only cutoff and warmup last a number of epochs",
                "say --soft-schedule cutoff or warmup, or leave it out",
            )
            found.append(({"soft_epochs", "soft_schedule"}, problem))
        return found

    def _check_unlabelled(self) -> list[Problem]:
        if not self.unlabelled_only:
            return []
        problems = []
        if self.unlabelled is None:
            problems.append(
                Problem(
                    "unlabelled_only: there are no such images", "none are named", "say --unlabelled PATH"
                )
            )
        if self.soft != 1:
            problems.append(
                Problem(
                    f"soft_weight: {self.soft:g} leaves {1 - self.soft:g} to labels",
                    "the student sees no labelled image",
                    "leave it out, or say --soft-weight 1",
                )
            )
        if self.soft_schedule != "constant":
            problems.append(
                Problem(
                    f"soft_schedule: {self.soft_schedule} gives epochs to labels",
                    "the student sees no labelled image",
                    "leave it out, or say --soft-schedule constant",
                )
            )
        return problems


def _unknown(option: str, names: Sequence[str], known: Sequence[str]) -> list[Problem]:
    return [
        Problem(
            f"{option}: there is no {name!r}",
            f"known are {', '.join(known)} and none",
            nearest(name, known) or "name one of these",
        )
        for name in names
        if name not in known
    ]


def _check_names(
    option: str, names: Sequence[str], labels: Sequence[str], extra: Sequence[str]
) -> list[Problem]:
    known = [*labels, *extra]
    return [
        Problem(
            f"{option}: there is no teacher {name!r}",
            f"the teachers are {listing(labels)}",
            nearest(name, known) or "name one of these",
        )
        for name in names
        if name not in known
    ]
