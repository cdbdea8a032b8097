"""Many students of one kind trained at once, to the same numbers as one after another.

They may differ in seed, learning rate, soft weight, temperature and the numbers of the loss. Parameters are
stacked and the forward pass is vectorised over them, so that a GPU works on all with one launch a kernel.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.fit import make_ready, validate
from ensemble_kd.graphs import Replayed
from ensemble_kd.interrupts import deferred
from ensemble_kd.losses import LOSSES, UNLABELLED, hard_cross_entropy, soft_cross_entropy
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.stacked import Stack, StackedStepper
from ensemble_kd.stepping import Recipe, warmup_cosine


@dataclass(frozen=True)
class Member:
    """One student of a fleet: its first weights, and what is its own."""

    model: Classifier
    recipe: Recipe
    """That of the fleet, but for the learning rate."""
    objective: Objective
    viewing: Viewing
    seed: int


def unfit(member: Member, train: Images) -> str:
    """Why a student cannot be in a fleet, or nothing."""
    objective, targets = member.objective, member.objective.targets
    reasons = {
        "images are mixed": member.viewing.mix != "none",
        "features are distilled": objective.features is not None,
        "teachers run live, or are weighted by batch": targets is None or not targets.fixed,
        "some images have no labels": train.labels is None or bool((train.labels == UNLABELLED).any()),
        "there are several processes": distributed.size() > 1,
        "some weights are frozen": not all(p.requires_grad for p in member.model.net.parameters()),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return found[0] if found else _untried(member.model, train)


def _untried(model: Classifier, train: Images) -> str:
    """Why the network cannot be vectorised, or nothing, by trying a pass through two and back."""
    stack = Stack([copy.deepcopy(model.net).train() for _ in range(2)])
    x = model.fitted(train[torch.arange(2, device=train.ids.device)].decoded)
    try:
        torch.autograd.grad(stack(torch.stack([x, x])).sum(), list(stack.parameters.values()))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"the network cannot be vectorised ({str(error).strip().splitlines()[0]})"
    return ""


def fit_together(
    members: Sequence[Member],
    train: Images,
    val: Images,
    device: torch.device,
    description: str = "fleet",
    record: bool = True,
) -> list[list[dict[str, Any]] | None]:
    """Train all members in place, as `fit.fit` trains one.

    Args:
        record: whether steps may be recorded as a CUDA graph.

    Returns:
        A history for each, as `fit` gives it; None for one whose loss was not finite, which is to be trained by
        itself to be told why.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a step is finished; nothing is kept.
    """
    train, val = train.to(device), val.to(device)
    for member in members:
        make_ready(member.model, train, member.recipe, member.seed)
        member.model.to(memory_format=torch.contiguous_format)
    fleet = Fleet(members, train, record)
    epochs = members[0].recipe.epochs
    histories: list[list[dict[str, Any]]] = [[] for _ in members]
    with deferred() as stop, progress(description, epochs * fleet.steps) as advance:
        for epoch in range(epochs):
            started, rates = time.perf_counter(), fleet.rates.tolist()
            for _ in fleet.epoch(epoch):
                advance(1)
                if stop.asked:
                    raise KeyboardInterrupt
            means = fleet.means()
            seconds = (time.perf_counter() - started) / len(members)
            if epoch == epochs - 1:
                fleet.stepper.take_average()
            for member, row, history, rate in zip(members, means, histories, rates, strict=True):
                history.append(fleet.row(member, epoch, row, val, rate, seconds))
            log.debug("%s  epoch %d/%d  %.1f s a student", description, epoch + 1, epochs, seconds)
    fine = torch.isfinite(fleet.losses_seen).tolist()
    validated = [all(math.isfinite(row["val"]["loss"]) for row in history) for history in histories]
    return [
        own if trained and judged else None
        for own, trained, judged in zip(histories, fine, validated, strict=True)
    ]


class Fleet:
    """The step of all members; sums stay on the device until an epoch ends."""

    def __init__(self, members: Sequence[Member], train: Images, record: bool = True) -> None:
        self.members, self.train = members, train
        recipe = members[0].recipe
        self.size = min(recipe.batch_size, len(train))
        self.steps = max(1, len(train) // self.size)
        self.stack = Stack([member.model.net for member in members])
        self.stepper = StackedStepper(self.stack, recipe)
        device, count = train.ids.device, len(members)
        self._scale = warmup_cosine(recipe.epochs * self.steps, round(recipe.warmup_epochs * self.steps))
        self._highest = torch.tensor([member.recipe.lr for member in members], device=device)
        self.rates = torch.zeros(count, device=device)
        """Learning rates (S,) of the next step."""
        self._weights = torch.zeros(count, device=device)
        self._temperatures = torch.tensor([m.objective.temperature for m in members], device=device)
        names = {**LOSSES[members[0].objective.loss].numbers}
        self._numbers = {
            name: torch.tensor([{**names, **m.objective.numbers}[name] for m in members], device=device)
            for name in names
        }
        self._order = torch.empty(count, self.steps * self.size, dtype=torch.int64, device=device)
        self._at = torch.arange(self.size, device=device)
        self._start = torch.zeros((), dtype=torch.int64, device=device)
        self._sums = torch.zeros(3, count, device=device)
        self.losses_seen = torch.zeros(count, device=device)
        """The sums of all losses, which are not finite where one was not."""
        self._done, self._epoch = 0, 0
        still = all(member.viewing.policy == "none" for member in members)
        self._still = still
        record = record and not members[0].model.is_own_code
        recorded = record and device.type == "cuda" and still and isinstance(train.pixels, Tensor)
        self._step = Replayed(self._work, device) if recorded else self._work
        self._losses = vmap(self._loss)
        self._set_rates()

    def _set_rates(self) -> None:
        self.rates.copy_(self._highest * self._scale(self._done))

    def epoch(self, epoch: int) -> Any:
        """Train on every whole batch, each member in its own order; yields after each step."""
        self._epoch = epoch
        epochs = self.members[0].recipe.epochs
        weights = [member.objective.weight(epoch, epochs) for member in self.members]
        self._weights.copy_(torch.tensor(weights))
        self._start.zero_()
        self._sums.zero_()
        for row, member in zip(self._order, self.members, strict=True):
            order = self.train.order(member.seed, epoch)
            row.copy_(order[: self.steps * self.size])
            assert member.objective.targets is not None
            member.objective.targets.begin(epoch)
        for _ in range(self.steps):
            self.stepper.prepare()
            self._step()
            self._done += 1
            self._set_rates()
            yield

    def _work(self) -> None:
        """One step of all members, from the tensors that `epoch` fills."""
        index = self._order[:, self._start + self._at]
        self._start += self.size
        batches = self._seen(index)
        device = index.device
        x = torch.stack(
            [m.model.fitted(batch.decoded) for m, batch in zip(self.members, batches, strict=True)]
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = self.stack(x)
        logits = logits.float()
        labels = torch.stack([batch.labels for batch in batches if batch.labels is not None])
        targets = [
            m.objective.targets(batch, own, self._epoch, own_logits.detach())
            for m, batch, own, own_logits in zip(self.members, batches, index, logits, strict=True)
            if m.objective.targets is not None
        ]
        soft, plain = (
            torch.stack([getattr(target, name) for target in targets]) for name in ("soft", "plain")
        )
        losses = self._losses(logits, labels, soft, self._weights, self._temperatures, self._numbers)
        self.stepper(losses, self.rates)
        with torch.no_grad():
            right = (logits.argmax(dim=2) == labels).float().mean(dim=1)
            apart = vmap(soft_cross_entropy)(logits, plain)
            self._sums += torch.stack([losses.detach(), right, apart])
            self.losses_seen += losses.detach()

    def _seen(self, index: Tensor) -> list[Images]:
        """Each member's view of its batch."""
        if self._still:  # all batches are fetched at once
            flat = self.members[0].viewing.take(self.train, index.flatten(), 0)
            parts = torch.arange(index.numel(), device=index.device).split(self.size)
            return [flat[part] for part in parts]
        return [
            member.viewing.take(self.train, own, member.viewing.id_of(self._epoch))
            for member, own in zip(self.members, index, strict=True)
        ]

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        soft: Tensor,
        weight: Tensor,
        temperature: Tensor,
        numbers: dict[str, Tensor],
    ) -> Tensor:
        """`losses.distillation_loss` of one member, with tensors for its numbers."""
        chosen, smoothing = LOSSES[self.members[0].objective.loss], self.members[0].recipe.label_smoothing
        more = {**numbers, **({"labels": labels} if chosen.needs_labels else {})}
        towards = chosen.compute(logits, soft, temperature, **more)
        hard = hard_cross_entropy(logits, labels, smoothing)
        mixed = (1 - weight) * hard + weight * towards
        return torch.where(weight == 0, hard, torch.where(weight == 1, towards, mixed))

    def means(self) -> list[dict[str, float]]:
        """The means of the epoch by member."""
        names = ("loss", "accuracy", "teacher_student_cross_entropy")
        rows = (self._sums / self.steps).T.tolist()
        found = [dict(zip(names, row, strict=True)) for row in rows]
        for member, row in zip(self.members, found, strict=True):
            if not member.objective.uses_labels:
                del row["accuracy"]
        return found

    def row(
        self, member: Member, epoch: int, means: dict[str, float], val: Images, rate: float, seconds: float
    ) -> dict[str, Any]:
        """A row of the member's history; see `fit.fit`."""
        weight = member.objective.weight(epoch, member.recipe.epochs)
        return {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.steps,
            "train": means,
            "val": validate(member.model, val, member.objective, weight),
            "lr": rate,
            "soft_weight": weight,
            "seconds": seconds,
            "images_per_second": self.steps * self.size / seconds,
        }
