"""The one training loop: teachers, students and controls all go through `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, progress
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import TrainingError
from ensemble_kd.features import FeatureTap
from ensemble_kd.initialise import unit_variance
from ensemble_kd.losses import UNLABELLED, soft_cross_entropy
from ensemble_kd.objective import Objective, Target, Viewing

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
        train: the samples that gradients come from; labels may be None at soft weight 1, and
            `losses.UNLABELLED` below it.
        val: held-out samples, measured after each epoch; nothing is selected by them.
        seed: of the order of samples and of dropout.
        description: of the progress bar.

    Returns:
        One row an epoch: `train` and `val` with `accuracy`, `loss` and, where there are targets,
        `teacher_student_cross_entropy` at temperature 1 (nats); `lr`, `soft_weight`, `seconds`,
        `images_per_second`; `weights`, the teachers' mean weights, where they differ by batch; with a
        feature term `train` has its `feature_loss`, and the validation loss is without it.

    Raises:
        TrainingError: the loss became infinite or NaN.
    """
    train, val = train.to(device), val.to(device)
    _make_ready(model, train, recipe, seed)
    steps_an_epoch, history = max(1, len(train) // recipe.batch_size), []
    tapped = FeatureTap(model, "the student") if objective.features else nullcontext()
    shown = progress(description, recipe.epochs * steps_an_epoch)
    with shown as advance, _own_random_state(device), tapped as tap:
        torch.manual_seed(seed)  # dropout; everything else has its own hash
        stepper = _Stepper(model, recipe, objective, steps_an_epoch, advance)
        for epoch in range(recipe.epochs):
            started, rate = time.perf_counter(), stepper.rate
            weight = objective.weight(epoch, recipe.epochs)
            passed = _Pass(model, train, recipe, objective, viewing, epoch, weight, seed)
            measured = passed.run(stepper, tap)
            seconds = time.perf_counter() - started
            if epoch == recipe.epochs - 1:
                stepper.take_average()
            validated = _validate(model, val, objective, weight)
            _check_finite((measured["loss"], validated["loss"]), description, epoch, recipe)
            rates = {"lr": rate, "soft_weight": weight, "seconds": seconds}
            row = passed.row(steps_an_epoch) | {"train": measured, "val": validated} | rates
            row["images_per_second"] = steps_an_epoch * min(recipe.batch_size, len(train)) / seconds
            history.append(row)
            _tell(description, recipe.epochs, row, advance)
    model.eval()
    return history


def _own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Global generators are seeded inside, and left as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _make_ready(model: Classifier, train: Images, recipe: Recipe, seed: int) -> None:
    """Move the model to where the images are, and give it the first weights of the recipe."""
    device = train.pixels.device
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    if recipe.init != "unit-variance":
        return
    first = views.order(seed, 0, len(train), device)[:_INIT_BATCH]
    with _own_random_state(device):
        torch.manual_seed(seed)
        unit_variance(model.net, model.card.preprocess(train.pixels[first]))


class _Stepper:
    """One optimiser step at a time: clipping, schedule and the running average of the weights."""

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        objective: Objective,
        steps_an_epoch: int,
        advance: Callable[..., None],
    ) -> None:
        self.model, self.recipe, self.advance = model, recipe, advance
        self.trained = nn.ModuleList([model] + ([objective.features] if objective.features else []))
        self.optimizer = make_optimizer(self.trained, recipe)
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
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.clip_norm)
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


@dataclass
class _Pass:
    """One pass in a hashed order; sums stay on the device until the end, so the loop never waits."""

    model: Classifier
    train: Images
    recipe: Recipe
    objective: Objective
    viewing: Viewing
    epoch: int
    soft_weight: float
    seed: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def run(self, step: Callable[[Tensor], None], tap: FeatureTap | None) -> dict[str, float]:
        """Train on every batch; returns the means that the history holds."""
        self.model.train()
        view_id = self.viewing.id_of(self.epoch)
        order = views.order(self.seed, self.epoch, len(self.train), self.train.pixels.device)
        size = min(self.recipe.batch_size, len(self.train))
        self.steps = len(self.train) // size
        for number in range(self.steps):
            index = order[number * size : (number + 1) * size]
            step(self._loss(self.viewing.apply(self.train[index], view_id), index, tap))
        return self._means()

    def _loss(self, batch: Images, index: Tensor, tap: FeatureTap | None) -> Tensor:
        objective, device = self.objective, batch.pixels.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = self.model(batch.pixels)
        logits = logits.float()
        labels = batch.labels if objective.uses_labels else None
        target = None
        if objective.targets and (self.soft_weight > 0 or objective.features or not objective.targets.live):
            target = objective.targets(batch, index, self.epoch, logits.detach())
        soft = target.soft if target and self.soft_weight > 0 else None
        loss = objective(logits, labels, soft, self.soft_weight, self.recipe.label_smoothing)
        if objective.features and target and tap:
            term = objective.features(tap.take(), target.features, target.weights)
            loss = loss + term
            self._add("feature_loss", term)
        self._measure(loss, logits, labels, target)
        return loss

    @torch.no_grad()
    def _measure(self, loss: Tensor, logits: Tensor, labels: Tensor | None, target: Target | None) -> None:
        self._add("loss", loss)
        if labels is not None:
            self._add("right", (logits.argmax(dim=1) == labels).float().mean())
            self._add("labelled", (labels != UNLABELLED).float().mean())
        if target is not None:
            self._add("teacher_student_cross_entropy", soft_cross_entropy(logits, target.plain))
            if self.objective.weights_vary:
                weights = target.weights
                self._add("weights", weights.mean(dim=1) if weights.ndim == 2 else weights)
                self._add("off", (weights.sum(dim=0) - 1).abs().amax() - weights.amin().clamp_max(0))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _means(self) -> dict[str, float]:
        means = {name: float(total) / self.steps for name, total in self.sums.items() if name != "weights"}
        if means.pop("off", 0.0) > 1e-3:
            raise TrainingError(
                f"epoch {self.epoch + 1}: the weights of the teachers are none",
                "some were negative, or did not sum to 1 in a batch, which changes the scale of the loss",
                "return weights that sum to 1 over the teachers for every batch",
            )
        right, labelled = means.pop("right", None), means.pop("labelled", 0.0)
        if right is not None and labelled > 0:
            means["accuracy"] = right / labelled
        return means

    def row(self, steps_an_epoch: int) -> dict[str, Any]:
        """Where in training this pass stands, and the teachers' mean weights where they differ by batch."""
        row: dict[str, Any] = {"epoch": self.epoch + 1, "step": (self.epoch + 1) * steps_an_epoch}
        if "weights" in self.sums:
            row["weights"] = (self.sums["weights"] / self.steps).tolist()
        return row


def _validate(model: Classifier, val: Images, objective: Objective, soft_weight: float) -> dict[str, float]:
    model.eval()
    logits, labels, target = predict(model, val), val.labels, objective.val_target
    soft = target.soft if target is not None else None
    row = {"loss": float(objective(logits, labels, soft, soft_weight, 0.0))}
    if labels is not None:
        row["accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
    if target is not None:
        row["teacher_student_cross_entropy"] = float(soft_cross_entropy(logits, target.plain))
    return row


def predict(model: Classifier, images: Images) -> Tensor:
    """Logits (N, C), float32, of all images in order; the model must be in eval mode."""
    return torch.cat(list(_logits(model, images)))


def predict_with_features(model: Classifier, images: Images, tap: FeatureTap) -> tuple[Tensor, Tensor]:
    """`predict`, with the penultimate features (N, D), float32, from an entered `tap` on the model."""
    pairs = [(logits, tap.take().float()) for logits in _logits(model, images)]
    logits, features = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return logits, features


@torch.inference_mode()
def _logits(model: Classifier, images: Images) -> Iterator[Tensor]:
    height, width = model.card.preprocess.size
    batch_size = max(8, min(EVAL_BATCH, EVAL_BATCH * 64**2 // (height * width)))  # activations stay small
    for batch in images.batches(batch_size):
        yield model(batch.pixels).float()


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
