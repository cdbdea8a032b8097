"""Recipes: how a network is trained where the user does not say.

Chosen on validation splits, never on test splits; docs/decisions.md says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ensemble_kd.classifier import Classifier
from ensemble_kd.errors import ConfigError
from ensemble_kd.schema import RecipeOptions
from ensemble_kd.stepping import Recipe

FEW_IMAGES = 5000
LARGE_INPUT = 128


def student_recipe(model: Classifier, train_size: int, overrides: Mapping[str, Any]) -> Recipe:
    """For students and their controls: 15 epochs, which suffice for small networks to settle."""
    return _complete(model, train_size, 15, 0.0, overrides)


def teacher_recipe(model: Classifier, train_size: int, overrides: Mapping[str, Any]) -> Recipe:
    """For teachers, which learn from labels alone: few epochs, since they are large, with smoothing."""
    few = train_size < FEW_IMAGES
    epochs = (3 if normalisation(model.net) == "none" else 5) if few else 10
    return _complete(model, train_size, epochs, 0.1, overrides)


def normalisation(net: nn.Module) -> str:
    """`batch`, `other` (layer, group, …) or `none`: which kind of normalisation the network has."""
    kinds = {type(module).__name__.lower() for module in net.modules()}
    if any("batchnorm" in kind for kind in kinds):
        return "batch"
    return "other" if any("norm" in kind for kind in kinds) else "none"


def _complete(
    model: Classifier, train_size: int, epochs: int, smoothing: float, overrides: Mapping[str, Any]
) -> Recipe:
    kind = normalisation(model.net)
    large = max(model.card.preprocess.size) > LARGE_INPUT
    recipe = Recipe(
        epochs=epochs,
        batch_size=min(32 if train_size < FEW_IMAGES or large else 128, train_size),
        optimizer="sgd",
        lr=0.1,
        weight_decay=5e-4,
        warmup_epochs=min(0.5, epochs / 4),
        label_smoothing=smoothing,
        clip_norm=2.0,
    )
    if kind == "none":
        ours = not model.is_own_code  # a user's own first weights are left alone
        recipe = replace(recipe, lr=0.03, init="unit-variance" if ours else "default")
    elif kind == "other":
        recipe = replace(recipe, optimizer="adamw", lr=1e-3, weight_decay=0.05)
    if model.pretrained:  # fine-tuning: gentler, from the weights that are there
        recipe = replace(recipe, lr=recipe.lr / 10, init="default")
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = replace(recipe, **given)
    check_batch(recipe.batch_size, train_size)
    return recipe


def check_batch(size: int | None, train_size: int, option: str = "batch_size") -> None:
    """Refuse a batch of more images than there are; `option` is the name of its field.

    Raises:
        ConfigError: it is.
    """
    if size is not None and size > train_size:
        flag = "--batch-size " if option == "batch_size" else f"--set {option}="
        raise ConfigError(
            f"{option}: {size} is more than the {train_size} training images",
            "an epoch would have no step",
            f"say {flag}{min(32, train_size)}",
        )


def check_teacher_batch(training: RecipeOptions, train_size: int) -> None:
    """`check_batch` for the teachers that are trained.

    Raises:
        ConfigError: the batch is too large.
    """
    check_batch(training.batch_size, train_size, "teacher_training.batch_size")
