"""Options of a distillation that do not go together, each told with what to choose instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ensemble_kd.errors import ConfigError, nearest
from ensemble_kd.losses import LOSSES
from ensemble_kd.models import ModelName
from ensemble_kd.names import label_of
from ensemble_kd.schema import DistillOptions
from ensemble_kd.teachers.class_map import ClassMap
from ensemble_kd.teachers.combination import Combination, check_known, label_free, rehearse
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import can_be_trained
from ensemble_kd.weighting import inputs_of


def check_loss(options: DistillOptions) -> None:
    """Refuse a loss that is not known, and numbers that it does not have.

    Raises:
        ConfigError: with what to choose instead.
    """
    if options.loss not in LOSSES:
        raise ConfigError(
            f"loss: there is no {options.loss!r}",
            f"known are {', '.join(LOSSES)}",
            nearest(options.loss, LOSSES) or "name one of these",
        )
    known = LOSSES[options.loss].numbers
    given = options.loss_numbers.model_dump(exclude_none=True)
    if extra := [name for name in given if name not in known]:
        raise ConfigError(
            f"loss_numbers: {options.loss} has no {', '.join(extra)}",
            f"it has {', '.join(known) or 'no numbers of its own'}",
            "leave them out, or choose another loss",
        )


def check_top_k(options: DistillOptions) -> None:
    """Refuse stored top-k outputs for what reads more than these.

    Raises:
        ConfigError: with what to choose instead.
    """
    if options.top_k is None:
        return
    what = "top_k: the largest logits alone do not do"
    if options.loss in LOSSES and LOSSES[options.loss].needs_all:
        fitting = [name for name, loss in LOSSES.items() if not loss.needs_all]
        raise ConfigError(
            what,
            f"the loss {options.loss} reads those of unlikely classes too",
            f"leave --top-k out, or say --loss {', '.join(fitting[:-1])} or {fitting[-1]}",
        )
    if options.pool != "prob" or options.calibrate in ("pool", "both"):
        raise ConfigError(
            what,
            "the pooled target would be tempered, or logits averaged, and the rest of them is not known",
            "leave --top-k out, or say --pool prob --calibrate none or teachers",
        )
    if options.views == 0:
        raise ConfigError(
            "top_k: nothing is stored", "with --views 0 the teachers run live", "leave one of them out"
        )


def check_mix(options: DistillOptions) -> None:
    """Refuse mixed images for a loss that needs one label an image.

    Raises:
        ConfigError: with what to choose instead.
    """
    if options.mix != "none" and options.loss in LOSSES and LOSSES[options.loss].needs_labels:
        raise ConfigError(
            f"mix: {options.loss} needs one label an image",
            "a mixed image has two",
            "leave --mix out, or choose another loss",
        )


def check_combined(options: DistillOptions, combination: Combination) -> None:
    """Refuse a combiner that mixed images or top-k outputs are not enough for.

    Raises:
        ConfigError: with what to choose instead.
    """
    inputs = inputs_of(combination.weigh)
    if options.mix != "none" and "labels" in inputs:
        raise ConfigError(
            f"combine: {combination.name} needs one label an image",
            f"with --mix {options.mix} each has two",
            f"choose one of {', '.join(label_free())}",
        )
    if options.top_k is not None and "temperatures" in inputs:
        raise ConfigError(
            f"combine: {combination.name} tempers logits itself",
            "with --top-k the rest of them is not known at other temperatures",
            "leave --top-k out, or choose another combiner",
        )


def check_label_free(options: DistillOptions, combination: Combination) -> None:
    """Refuse unlabelled images for a combiner that needs labels.

    Raises:
        ConfigError: with what to choose instead.
    """
    if options.unlabelled is not None and "labels" in inputs_of(combination.weigh):
        raise ConfigError(
            f"combine: {combination.name} needs the label of every training image",
            "the unlabelled ones have none",
            f"choose one of {', '.join(label_free())}",
        )


def check_label_loss(options: DistillOptions) -> None:
    """Refuse unlabelled images for a loss that needs labels.

    Raises:
        ConfigError: with what to choose instead.
    """
    if options.unlabelled is not None and LOSSES[options.loss].needs_labels:
        free = [name for name, loss in LOSSES.items() if not loss.needs_labels]
        raise ConfigError(
            f"loss: {options.loss} needs the label of every training image",
            "the unlabelled ones have none",
            f"choose one of {', '.join(free)}",
        )


def check_classes_known(
    options: DistillOptions,
    combination: Combination,
    maps: dict[str, ClassMap | None],
    given: dict[str, Teacher],
    classes: Sequence[str],
) -> None:
    """Refuse what teachers that know some classes only cannot do, as far as their maps are known."""
    labels = [label_of(text) for text in options.teachers]
    found = [given[text].class_map if text in given else maps[text] for text in options.teachers]
    everything = torch.ones(len(classes), dtype=torch.bool)
    known = torch.stack([one.known if one else everything for one in found])
    check_known(labels, known, combination, "best-teacher" in options.controls, classes)
    partly = [label for label, mask in zip(labels, known, strict=True) if not bool(mask.all())]
    if options.top_k is not None and partly:
        raise ConfigError(
            f"top_k: {', '.join(partly)} knows some of the classes only",
            "the rest of its logits is spread over all classes, and would be cut away again",
            "leave --top-k out, or that teacher",
        )
    rehearse(combination, known)


def check_controls(options: DistillOptions, names: Sequence[ModelName | None]) -> None:
    """Refuse independent teachers where some cannot be trained from another seed.

    Raises:
        ConfigError: with what to choose instead.
    """
    if "independent" not in options.controls:
        return
    fixed = [
        label_of(text)
        for text, name in zip(options.teachers, names, strict=True)
        if name is None or not can_be_trained(name, options.class_map.get(name.label))
    ]
    if fixed:
        raise ConfigError(
            f"controls: independent teachers cannot be made for {', '.join(fixed)}",
            "they come with trained weights, so there is no other seed to train",
            "leave that control out: --controls labels,best-teacher",
        )
