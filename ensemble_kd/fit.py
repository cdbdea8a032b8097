"""Training a classifier: teachers, students and controls all go through `fit`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ensemble_kd import distributed, trackers
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, progress
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import TrainingError
from ensemble_kd.features import FeatureTap
from ensemble_kd.inference import predict
from ensemble_kd.initialise import unit_variance
from ensemble_kd.interrupts import deferred
from ensemble_kd.loop import Engine, Loop
from ensemble_kd.losses import soft_cross_entropy
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.saving import Saving
from ensemble_kd.stepping import Recipe

_INIT_BATCH = 128


def fit(
    model: Classifier,
    train: Images,
    val: Images,
    recipe: Recipe,
    objective: Objective,
    viewing: Viewing,
    *,
    seed: int,
    device: torch.device,
    description: str = "training",
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place for `recipe.epochs` epochs; the last epoch's weights stay.

    Args:
        model: with its weights initialised; moved to `device` and left there in eval mode.
        train: the samples that gradients come from; labels may be None at soft weight 1, and
            `losses.UNLABELLED` below it.
        val: held-out samples, measured after each epoch; nothing is selected by them.
        seed: of the order of samples and of dropout.
        checkpoints: where it saves how far it is, and goes on from if there is one.

    Returns:
        One row an epoch: `train` and `val` with `accuracy`, `loss` and, where there are targets,
        `teacher_student_cross_entropy` at temperature 1 (nats); `lr`, `soft_weight`, `seconds`,
        `images_per_second`; `weights`, the teachers' mean weights, where they differ by batch. Of mixed
        images, training accuracy counts the first label; `feature_loss` is in `train` alone.

    Raises:
        TrainingError: the loss became infinite or NaN; the step of that batch was not taken.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    engine = engine or Engine()
    train, val = train.to(device), val.to(device)
    make_ready(model, train, recipe, seed)
    tapped = FeatureTap(model, "the student") if objective.features else nullcontext()
    steps = recipe.epochs * max(1, len(train) // recipe.batch_size)
    shown = progress(description, steps, "images", min(recipe.batch_size, len(train)))
    with deferred() as stop, shown as advance, _own_random_state(device), tapped as tap:
        torch.manual_seed(distributed.own_seed(seed))  # dropout; everything else has its own hash
        loop = Loop(model, train, recipe, objective, viewing, seed, engine, advance, description)
        loop.tap = tap
        saving = Saving(loop, checkpoints, stop)
        for epoch in range(saving.epoch, recipe.epochs):
            passed, rate, seconds = saving.run(epoch)
            if epoch == recipe.epochs - 1:
                loop.stepper.take_average()
            weight = objective.weight(epoch, recipe.epochs)
            validated = validate(model, val, objective, weight)
            if not math.isfinite(validated["loss"]):
                raise _not_finite(description, epoch, recipe)
            row = {"epoch": epoch + 1, "step": (epoch + 1) * loop.steps, **passed, "val": validated}
            speed = {"seconds": seconds, "images_per_second": loop.steps * loop.size / seconds}
            saving.history.append(row | {"lr": rate, "soft_weight": weight, **speed})
            _tell(description, recipe.epochs, saving.history[-1], advance)
    model.eval()
    return saving.history


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Global generators are seeded inside, and left as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def make_ready(model: Classifier, train: Images, recipe: Recipe, seed: int) -> None:
    """Move the model to where the images are, and give it the first weights of the recipe."""
    device = train.pixels.device
    model.to(device)
    if device.type == "cuda" and not model.is_own_code:
        model.to(memory_format=torch.channels_last)
    if recipe.init != "unit-variance":
        return
    first = views.order(seed, 0, len(train), device)[:_INIT_BATCH]
    with _own_random_state(device):
        torch.manual_seed(seed)
        unit_variance(model.net, model.card.preprocess(train.pixels[first]))


def _not_finite(description: str, epoch: int, recipe: Recipe) -> TrainingError:
    return TrainingError(
        f"{description}: the validation loss is not finite after epoch {epoch + 1}",
        f"the learning rate {recipe.lr:g} is too high, or a teacher's output is not finite",
        f"try --lr {recipe.lr / 3:.1g}, or --set training.clip_norm=1",
    )


def train_on_labels(
    model: Classifier,
    data: Dataset,
    recipe: Recipe,
    policy: str,
    *,
    seed: int,
    device: torch.device,
    description: str,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, Any]]:
    """`fit` with the labels alone and a fresh view each epoch."""
    viewing = Viewing(policy, 0, seed)
    return fit(
        model,
        data.train,
        data.val,
        recipe,
        Objective(),
        viewing,
        seed=seed,
        device=device,
        description=description,
        engine=engine,
        checkpoints=checkpoints,
    )


def validate(model: Classifier, val: Images, objective: Objective, soft_weight: float) -> dict[str, float]:
    """The measures of a row of the history on held-out images; leaves the model in eval mode."""
    model.eval()
    logits, labels, target = predict(model, val), val.labels, objective.val_target
    soft = target.soft if target is not None else None
    row = {"loss": float(objective(logits, labels, soft, soft_weight, 0.0))}
    if labels is not None:
        row["accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
    if target is not None:
        row["teacher_student_cross_entropy"] = float(soft_cross_entropy(logits, target.plain))
    return row


def _tell(description: str, epochs: int, row: dict[str, Any], advance: Callable[..., None]) -> None:
    val = row["val"]
    shown = {"acc": "accuracy", "loss": "loss"}
    note = " ".join(f"{short} {val[name]:.3f}" for short, name in shown.items() if name in val)
    advance(0, note=note)
    trackers.log_epoch(description, row)
    log.debug(
        "%s  epoch %d/%d  val %s  %.1f s  %d img/s",
        description,
        row["epoch"],
        epochs,
        note,
        row["seconds"],
        row["images_per_second"],
    )
