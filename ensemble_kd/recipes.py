"""Recipes: how a network is trained where the user does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ensemble_kd.fit import Recipe
from ensemble_kd.forms import has_normalisation


def student_recipe(net: nn.Module, train_size: int, overrides: Mapping[str, Any]) -> Recipe:
    """For students and their controls: about a million images seen, in 15 to 40 epochs."""
    recipe = Recipe(
        epochs=min(40, max(15, round(1_000_000 / train_size))),
        batch_size=32 if train_size < 5000 else 128,
        optimizer="adamw",
        lr=2e-3,
        weight_decay=0.01,
        warmup_epochs=1,
    )
    return _override(recipe, train_size, overrides)


def teacher_recipe(net: nn.Module, train_size: int, overrides: Mapping[str, Any]) -> Recipe:
    """For teachers, which learn from labels alone."""
    recipe = Recipe(
        epochs=5 if train_size < 5000 else 10,
        batch_size=32 if train_size < 5000 else 128,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        label_smoothing=0.1,
        clip_norm=None if has_normalisation(net) else 1.0,
    )
    return _override(recipe, train_size, overrides)


def _override(recipe: Recipe, train_size: int, overrides: Mapping[str, Any]) -> Recipe:
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = replace(recipe, **given)
    return replace(recipe, batch_size=min(recipe.batch_size, train_size))
