"""The one training loop: epochs of steps, eager, or recorded as a CUDA graph where that can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import TrainingError
from ensemble_kd.features import FeatureTap
from ensemble_kd.graphs import Replayed
from ensemble_kd.losses import UNLABELLED, Mixed, soft_cross_entropy
from ensemble_kd.objective import Objective, Target, Viewing
from ensemble_kd.profiling import StepProfile, report, span
from ensemble_kd.stepping import Recipe, Stepper

_BLOCK = 4096
_SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class Engine:
    """How steps are carried out; what they compute stays the same."""

    compile: bool = False
    """Whether the network is compiled by torch.compile."""
    graph: bool = True
    """Whether steps are recorded as a CUDA graph, on a GPU and where their inputs lie there."""
    trace: Path | None = None
    """Where to write a profile of some steps of the first epoch, which then are eager."""


class Loop:
    """Trains a model epoch by epoch; sums stay on the device until an epoch ends, so that it never waits."""

    def __init__(
        self,
        model: Classifier,
        train: Images,
        recipe: Recipe,
        objective: Objective,
        viewing: Viewing,
        seed: int,
        engine: Engine,
        advance: Callable[..., None],
    ) -> None:
        self.model, self.train, self.recipe, self.objective = model, train, recipe, objective
        self.viewing, self.seed, self.engine, self.advance = viewing, seed, engine, advance
        self.size = min(recipe.batch_size, len(train))
        self.steps = max(1, len(train) // self.size)
        self.stepper = Stepper(model.net, objective.features, recipe, self.steps)
        self.tap: FeatureTap | None = None
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if engine.compile else model
        self._judge = torch.compile(self._judged) if engine.compile else self._judged
        labels = train.labels if objective.uses_labels else None
        self._unlabelled = labels is not None and bool((labels == UNLABELLED).any())
        self.objective = replace(objective, unlabelled=self._unlabelled)
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._recorded: _Recorded | None = None

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train on every whole batch, in a hashed order.

        Returns:
            `train`: the means of the epoch; `weights`: the teachers' mean weights, where they vary;
            `profile`: milliseconds a step by part, where it was wanted.
        """
        self.model.train()
        weight = self.objective.weight(epoch, self.recipe.epochs)
        if weight != self._weight:  # which parts of the loss there are may change
            self._weight, self._recorded, self._sums = weight, None, {}
        for total in self._sums.values():
            total.zero_()
        targets = self.objective.targets
        if targets is not None and self._wants_targets:
            targets.begin(epoch)
        order = views.order(self.seed, epoch, len(self.train), self.train.ids.device)
        order = order[: self.steps * self.size]
        with warnings.catch_warnings():
            # The compiler looks at the gradient of the logits, which is None as it should be.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            with _compiling(self.engine.compile):
                row = self._train_on(epoch, order)
        if "weights" in self._sums:
            row["weights"] = (self._sums["weights"] / self.steps).tolist()
        return {"train": self._means(epoch)} | row

    def _train_on(self, epoch: int, order: Tensor) -> dict[str, Any]:
        """All steps of an epoch; returns the profile, where it was wanted."""
        trace = self.engine.trace
        if trace is not None and epoch == 0 and self.steps > 1:
            with StepProfile(trace, self.steps) as profile:
                self._walk(epoch, order, profile)
            report(profile.table, trace)
            return {"profile": profile.table}
        if trace is not None and epoch == 0:
            log.warning("nothing is profiled: an epoch has one step only")
        if self._can_be_recorded:
            self._replay(epoch, order)
        else:
            self._walk(epoch, order, lambda: None)
        return {}

    @property
    def _wants_targets(self) -> bool:
        targets = self.objective.targets
        return targets is not None and (
            self._weight > 0 or self.objective.features is not None or not targets.live
        )

    @property
    def _can_be_recorded(self) -> bool:
        """On a GPU, with images and targets that stay where they are; a user's own code may not be repeatable."""
        pixels, targets = self.train.pixels, self.objective.targets
        if not (self.engine.graph and isinstance(pixels, Tensor) and pixels.device.type == "cuda"):
            return False
        if self.model.card.model.startswith("py:"):
            return False
        if self._wants_targets and not (targets is not None and targets.fixed):
            return False
        free, _ = torch.cuda.mem_get_info(pixels.device)
        return self._recorded is not None or pixels.nbytes < _SHARE_OF_MEMORY * free

    def _walk(self, epoch: int, order: Tensor, each: Callable[[], None]) -> None:
        chunks = order.split(self.size)
        seen = self._spanned(self.viewing.batches(self.train, chunks, self.viewing.id_of(epoch)))
        for index, batch in zip(chunks, seen, strict=True):
            self._step(batch, index, epoch)
            self.stepper.count()
            self.advance(1)
            each()

    @staticmethod
    def _spanned(batches: Iterator[Images]) -> Iterator[Images]:
        while True:
            with span("views"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _replay(self, epoch: int, order: Tensor) -> None:
        if self._recorded is None:
            self._recorded = _Recorded(self)
        self._recorded.load(self.viewing.id_of(epoch), order, epoch)
        for _ in range(self.steps):
            self._recorded.step()
            self.stepper.count()
            self.advance(1)

    def _step(self, batch: Images, index: Tensor, epoch: int) -> None:
        objective, device = self.objective, batch.ids.device
        with span("forward"), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = self._forward(batch.decoded)
        logits = logits.float()
        labels = batch.labels if objective.uses_labels else None
        mixed = None
        if labels is not None and batch.partner_labels is not None and batch.share is not None:
            mixed = Mixed(batch.partner_labels, batch.share)
        target = None
        if objective.targets is not None and self._wants_targets:
            with span("targets"):
                target = objective.targets(batch, index, epoch, logits.detach())
        with span("loss"):
            loss, measures = self._judge(logits, labels, mixed, target, self._weight)
            if objective.features and target and self.tap:
                term = objective.features(self.tap.take(), target.features, target.weights)
                loss = loss + term
                measures |= {"feature_loss": term.detach(), "loss": loss.detach()}
        for name, value in measures.items():  # in place, so that a recorded step adds to the same number
            if name not in self._sums:
                self._sums[name] = value.clone()
            elif name == "off":  # one bad batch is enough
                torch.maximum(self._sums[name], value, out=self._sums[name])
            else:
                self._sums[name] += value
        self.stepper(loss)

    def _judged(
        self,
        logits: Tensor,
        labels: Tensor | None,
        mixed: Mixed | None,
        target: Target | None,
        weight: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what is summed over the epoch."""
        soft = target.soft if target and weight > 0 else None
        loss = self.objective(logits, labels, soft, weight, self.recipe.label_smoothing, mixed)
        with torch.no_grad():
            measures = {"loss": loss.detach()}
            if labels is not None:
                measures["right"] = (logits.argmax(dim=1) == labels).float().mean()
                if self._unlabelled:
                    measures["labelled"] = (labels != UNLABELLED).float().mean()
            if target is not None:
                measures["teacher_student_cross_entropy"] = soft_cross_entropy(logits, target.plain)
                if self.objective.weights_vary:
                    weights = target.weights
                    measures["weights"] = weights.mean(dim=1) if weights.ndim == 2 else weights
                    measures["off"] = (weights.sum(dim=0) - 1).abs().amax() - weights.amin().clamp_max(0)
        return loss, measures

    def _means(self, epoch: int) -> dict[str, float]:
        sums = {name: float(total) for name, total in self._sums.items() if name != "weights"}
        off = sums.pop("off", 0.0)
        means = {name: total / self.steps for name, total in sums.items()}
        if not off <= 1e-3:  # NaN is none either
            raise TrainingError(
                f"epoch {epoch + 1}: the weights of the teachers are none",
                "some were negative, or did not sum to 1 in a batch, which changes the scale of the loss",
                "return weights that sum to 1 over the teachers for every batch",
            )
        right, labelled = means.pop("right", None), means.pop("labelled", 1.0)
        if right is not None and labelled > 0:
            means["accuracy"] = right / labelled
        return means


@contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    """The compiler's own errors as one line; it has many kinds."""
    try:
        yield
    except Exception as error:
        if not wanted or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise TrainingError(
            "the network cannot be compiled",
            (str(error).strip().splitlines() or [type(error).__name__])[0],
            "leave --compile out; on a CPU it needs a C++ compiler such as g++",
        ) from error


class _Recorded:
    """Steps of a loop as a CUDA graph, and the buffers that it reads: an epoch's views and its order."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._epoch, self._view = loop, 0, -1
        device = loop.train.ids.device
        plain = loop.viewing.policy == loop.viewing.mix == "none"
        self._seen = loop.train if plain else None
        self._plain = plain
        self._order = torch.empty(loop.steps * loop.size, dtype=torch.int64, device=device)
        self._at = torch.arange(loop.size, device=device)
        self._start = torch.zeros((), dtype=torch.int64, device=device)
        self.step = Replayed(self._work, device)

    def load(self, view_id: int, order: Tensor, epoch: int) -> None:
        """Bring the views of all images, and the order of this epoch, to where the graph reads them."""
        self._epoch = epoch
        self._order.copy_(order)
        self._start.zero_()
        if self._plain or view_id == self._view:
            return
        self._view, loop = view_id, self._loop
        chunks = torch.arange(len(loop.train), device=order.device).split(_BLOCK)
        for chunk, batch in zip(chunks, loop.viewing.batches(loop.train, chunks, view_id), strict=True):
            if self._seen is None:
                self._seen = Images(*(_room_for(values, len(loop.train)) for values in _fields(batch)))
            for room, values in zip(_fields(self._seen), _fields(batch), strict=True):
                if room is not None:
                    room[chunk] = values

    def _work(self) -> None:
        assert self._seen is not None
        index = self._order[self._start + self._at]
        self._start += self._loop.size
        self._loop._step(self._seen[index], index, self._epoch)


def _fields(images: Images) -> list[Any]:
    return [getattr(images, field.name) for field in fields(images)]


def _room_for(values: Tensor | None, count: int) -> Any:
    return None if values is None else values.new_empty((count, *values.shape[1:]))
