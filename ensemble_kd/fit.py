"""The one training loop: teachers, students and controls all go through `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, progress
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import TrainingError
from ensemble_kd.initialise import unit_variance
from ensemble_kd.losses import distillation_loss, soft_cross_entropy

EVAL_BATCH = 512
_INIT_BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. All numbers are set; defaults for a case come from `recipes`."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    warmup_epochs: float
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    init: str = "default"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Target(NamedTuple):
    """The ensemble's probabilities for a batch, (B, C): what is distilled, and those at temperature 1."""

    soft: Tensor
    plain: Tensor


class TargetSource(Protocol):
    """Gives the soft target of a batch of views."""

    def __call__(self, batch: Images, index: Tensor, view_id: int) -> Target:
        """`batch` holds view `view_id` of the training samples at positions `index`."""
        ...


@dataclass(frozen=True)
class Objective:
    """(1 − w) · CE(labels) + w · T² · KL(target ‖ student); see `losses.distillation_loss`."""

    soft_weight: float = 0.0
    temperature: float = 1.0
    targets: TargetSource | None = None
    """Where the soft targets of training batches come from; with w = 0 they are only measured."""
    val_target: Target | None = None
    """The soft target of the whole validation split."""

    def __call__(
        self, logits: Tensor, labels: Tensor | None, target: Tensor | None, smoothing: float
    ) -> Tensor:
        return distillation_loss(
            logits,
            labels,
            target,
            soft_weight=self.soft_weight,
            temperature=self.temperature,
            label_smoothing=smoothing,
        )


@dataclass(frozen=True)
class Viewing:
    """Which views the epochs use: epoch e takes view e mod `count`, or a fresh one where `count` is 0."""

    policy: str
    count: int
    seed: int

    def id_of(self, epoch: int) -> int:
        """The view of an epoch."""
        return epoch % self.count if self.count else epoch

    def apply(self, batch: Images, view_id: int) -> Images:
        """That view of the batch."""
        pixels = views.view(batch.pixels, batch.ids, policy=self.policy, seed=self.seed, view_id=view_id)
        return Images(pixels, batch.labels, batch.ids)


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
) -> list[dict[str, Any]]:
    """Train `model` in place for `recipe.epochs` epochs; the last epoch's weights stay.

    Args:
        model: with its weights initialised; moved to `device` and left there in eval mode.
        train: the samples that gradients come from; labels may be None at soft weight 1.
        val: held-out samples, measured after each epoch; nothing is selected by them.
        seed: of the order of samples and of dropout.
        description: of the progress bar.

    Returns:
        One row an epoch: `train` and `val` with `accuracy`, `loss` and, where there are targets,
        `teacher_student_cross_entropy` at temperature 1 (nats); `lr`, `seconds`, `images_per_second`.

    Raises:
        TrainingError: the loss became infinite or NaN.
    """
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    train, val = train.to(device), val.to(device)
    steps_an_epoch = max(1, len(train) // recipe.batch_size)
    if recipe.init == "unit-variance":
        _initialise(model, train, seed)
    history = []
    with progress(description, recipe.epochs * steps_an_epoch) as advance, _own_random_state(device):
        torch.manual_seed(seed)  # dropout; everything else has its own hash
        stepper = _Stepper(model, recipe, steps_an_epoch, advance)
        for epoch in range(recipe.epochs):
            started, rate = time.perf_counter(), stepper.rate
            measured = _train_epoch(model, train, recipe, objective, viewing, epoch, seed, stepper)
            seconds = time.perf_counter() - started
            if epoch == recipe.epochs - 1:
                stepper.take_average()
            validated = _validate(model, val, objective)
            _check_finite((measured["loss"], validated["loss"]), description, epoch, recipe)
            row = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * steps_an_epoch,
                "train": measured,
                "val": validated,
                "lr": rate,
                "seconds": seconds,
                "images_per_second": steps_an_epoch * min(recipe.batch_size, len(train)) / seconds,
            }
            history.append(row)
            _tell(description, recipe.epochs, row, advance)
    model.eval()
    return history


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Global generators are seeded inside, and left as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _initialise(model: Classifier, train: Images, seed: int) -> None:
    first = views.order(seed, 0, len(train), train.pixels.device)[:_INIT_BATCH]
    with _own_random_state(train.pixels.device):
        torch.manual_seed(seed)
        unit_variance(model.net, model.card.preprocess(train.pixels[first]))


class _Stepper:
    """One optimiser step at a time: clipping, schedule and the running average of the weights."""

    def __init__(
        self, model: Classifier, recipe: Recipe, steps_an_epoch: int, advance: Callable[..., None]
    ) -> None:
        self.model, self.recipe, self.advance = model, recipe, advance
        self.optimizer = make_optimizer(model, recipe)
        scale = warmup_cosine(recipe.epochs * steps_an_epoch, round(recipe.warmup_epochs * steps_an_epoch))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)
        self.average = None
        if recipe.ema is not None:
            self.average = AveragedModel(
                model.net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
            )

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def __call__(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model.net)
        self.advance(1)

    def take_average(self) -> None:
        """Put the averaged weights, where they are kept, into the model."""
        if self.average is not None:
            self.model.net.load_state_dict(self.average.module.state_dict())


def _check_finite(losses: Iterable[float], description: str, epoch: int, recipe: Recipe) -> None:
    for loss in losses:
        if not math.isfinite(loss):
            raise TrainingError(
                f"{description}: the loss is {loss} in epoch {epoch + 1}",
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
    )


def _train_epoch(
    model: Classifier,
    train: Images,
    recipe: Recipe,
    objective: Objective,
    viewing: Viewing,
    epoch: int,
    seed: int,
    step: Callable[[Tensor], None],
) -> dict[str, float]:
    """One pass in a hashed order; sums stay on the device until the end, so the loop never waits."""
    model.train()
    device = train.pixels.device
    uses_labels = objective.soft_weight < 1
    view_id = viewing.id_of(epoch)
    order = views.order(seed, epoch, len(train), device)
    size = min(recipe.batch_size, len(train))
    sums = torch.zeros(3, device=device)
    steps = len(train) // size
    for number in range(steps):
        index = order[number * size : (number + 1) * size]
        batch = viewing.apply(train[index], view_id)
        target = objective.targets(batch, index, view_id) if objective.targets else None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch.pixels)
        logits = logits.float()
        labels = batch.labels if uses_labels else None
        soft = target.soft if target and objective.soft_weight > 0 else None
        loss = objective(logits, labels, soft, recipe.label_smoothing)
        step(loss)
        with torch.no_grad():
            sums[0] += loss.detach()
            if labels is not None:
                sums[1] += (logits.argmax(dim=1) == labels).float().mean()
            if target is not None:
                sums[2] += soft_cross_entropy(logits, target.plain)
    loss_mean, accuracy, cross_entropy = (sums / steps).tolist()
    measured = {"loss": loss_mean}
    if uses_labels:
        measured["accuracy"] = accuracy
    if objective.targets:
        measured["teacher_student_cross_entropy"] = cross_entropy
    return measured


def _validate(model: Classifier, val: Images, objective: Objective) -> dict[str, float]:
    model.eval()
    logits, labels, target = predict(model, val), val.labels, objective.val_target
    soft = target.soft if target is not None else None
    row = {"loss": float(objective(logits, labels, soft, 0.0))}
    if labels is not None:
        row["accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
    if target is not None:
        row["teacher_student_cross_entropy"] = float(soft_cross_entropy(logits, target.plain))
    return row


@torch.inference_mode()
def predict(model: Classifier, images: Images) -> Tensor:
    """Logits (N, C), float32, of all images in order; the model must be in eval mode."""
    height, width = model.card.preprocess.size
    batch_size = max(8, min(EVAL_BATCH, EVAL_BATCH * 64**2 // (height * width)))  # activations stay small
    return torch.cat([model(batch.pixels).float() for batch in images.batches(batch_size)])


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW; weight decay on matrices and filters only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True, fused=fused)


def warmup_cosine(total: int, warmup: int) -> Callable[[int], float]:
    """The learning rate's factor at each step: linear up over `warmup` steps, then half a cosine to 0."""

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return scale


def _tell(description: str, epochs: int, row: dict[str, Any], advance: Callable[..., None]) -> None:
    val = row["val"]
    shown = {"acc": "accuracy", "loss": "loss"}
    note = " ".join(f"{short} {val[name]:.3f}" for short, name in shown.items() if name in val)
    advance(0, note=note)
    log.debug(
        "%s  epoch %d/%d  val %s  %.1f s  %d img/s",
        description,
        row["epoch"],
        epochs,
        note,
        row["seconds"],
        row["images_per_second"],
    )
