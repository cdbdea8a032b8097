"""The one training loop: epochs of steps, eager, or recorded as a CUDA graph where that can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ensemble_kd import distributed
from ensemble_kd.checkpoints import Snapshot, random_state, set_random_state
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import ConfigError, TrainingError, listing
from ensemble_kd.features import FeatureTap
from ensemble_kd.guards import first_not_finite
from ensemble_kd.losses import UNLABELLED, Mixed, soft_cross_entropy
from ensemble_kd.objective import Objective, Target, Viewing
from ensemble_kd.profiling import StepProfile, report, span
from ensemble_kd.recorded import Recorded
from ensemble_kd.shared_norm import SharedStatistics
from ensemble_kd.stepping import Recipe, Stepper

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
        description: str = "training",
    ) -> None:
        self.description = description
        self.model, self.train, self.recipe, self.objective = model, train, recipe, objective
        self.viewing, self.seed, self.engine, self.advance = viewing, seed, engine, advance
        self.size = min(recipe.batch_size, len(train))
        self.steps = max(1, len(train) // self.size)
        self.stepper = Stepper(model.net, objective.features, recipe, self.steps)
        self.tap: FeatureTap | None = None
        self._forward = self._prepared(model)
        self._judge = torch.compile(self._judged) if engine.compile else self._judged
        labels = train.labels if objective.uses_labels else None
        self._unlabelled = labels is not None and bool((labels == UNLABELLED).any())
        self.objective = replace(objective, unlabelled=self._unlabelled)
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._recorded: Recorded | None = None
        self.between: Callable[[int], None] = lambda done: None
        """Called after each step of an epoch with how many were done."""

    def epoch(self, epoch: int, done: int = 0) -> dict[str, Any]:
        """Train on every whole batch, in a hashed order; the first `done` of them were trained on before.

        Returns:
            `train`: the means of the epoch; `weights`: the teachers' mean weights, where they vary;
            `profile`: milliseconds a step by part, where it was wanted.
        """
        self.model.train()
        weight = self.objective.weight(epoch, self.recipe.epochs)
        if weight != self._weight:  # which parts of the loss there are may change
            self._weight, self._recorded, self._sums = weight, None, {}
        if not done:
            for total in self._sums.values():
                total.zero_()
        targets = self.objective.targets
        if targets is not None and self._wants_targets:
            targets.begin(epoch)
        order = self._order(epoch)
        with warnings.catch_warnings():
            # The compiler looks at the gradient of the logits, which is None as it should be.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            with _compiling(self.engine.compile):
                row = self._train_on(epoch, order, done)
        means = self._means(epoch)
        if "weights" in self._sums:
            row["weights"] = (self._sums["weights"] / self.steps).tolist()
        return {"train": means} | row

    def _order(self, epoch: int) -> Tensor:
        return self.train.order(self.seed, epoch)[: self.steps * self.size]

    def _train_on(self, epoch: int, order: Tensor, done: int) -> dict[str, Any]:
        """The steps of an epoch that are left; returns the profile, where it was wanted."""
        trace = None if done else self.engine.trace
        if trace is not None and epoch == 0 and self.steps > 1:
            with StepProfile(trace, self.steps) as profile:
                self._walk(epoch, order, 0, profile)
            report(profile.table, trace)
            return {"profile": profile.table}
        if trace is not None and epoch == 0:
            log.warning("nothing is profiled: an epoch has one step only")
        if self._can_be_recorded:
            self._replay(epoch, order, done)
        else:
            self._walk(epoch, order, done)
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
        if distributed.size() > 1:
            return False
        if self.model.is_own_code:
            return False
        if self._wants_targets and not (targets is not None and targets.fixed):
            return False
        free, _ = torch.cuda.mem_get_info(pixels.device)
        return self._recorded is not None or pixels.nbytes < _SHARE_OF_MEMORY * free

    def _walk(self, epoch: int, order: Tensor, done: int, each: Callable[[], None] = lambda: None) -> None:
        chunks = [distributed.share(chunk) for chunk in order.split(self.size)[done:]]
        seen = self._spanned(self.viewing.batches(self.train, chunks, self.viewing.id_of(epoch)))
        for number, (index, batch) in enumerate(zip(chunks, seen, strict=True), done + 1):
            self._step(batch, index, epoch)
            each()
            self._count(number)

    def _count(self, done: int) -> None:
        self.stepper.count()
        self.advance(1)
        self.between(done)

    def _prepared(self, model: Classifier) -> Callable[[Tensor], Tensor]:
        """The network as its forward pass is called; with several processes, gradients are shared by it."""
        if distributed.size() == 1:
            return torch.compile(model) if self.engine.compile else model
        if self.objective.features is not None:
            raise _not_shared(
                "the feature loss", "its projectors are trained by one process", "--feature-weight"
            )
        if self.engine.compile:
            raise _not_shared("--compile", "it would compile what waits for other processes", "--compile")
        return DistributedDataParallel(model)

    @property
    def _whole_batch(self) -> AbstractContextManager[object]:
        """BatchNorm sees the whole batch, whoever holds its parts."""
        return nullcontext() if distributed.size() == 1 else SharedStatistics()

    @staticmethod
    def _spanned(batches: Iterator[Images]) -> Iterator[Images]:
        while True:
            with span("views"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _replay(self, epoch: int, order: Tensor, done: int) -> None:
        if self._recorded is None:
            self._recorded = Recorded(self)
        self._recorded.load(self.viewing.id_of(epoch), order, epoch, done)
        for number in range(done + 1, self.steps + 1):
            self._recorded.step()
            self._count(number)

    def _step(self, batch: Images, index: Tensor, epoch: int) -> None:
        objective, device = self.objective, batch.ids.device
        with (
            span("forward"),
            self._whole_batch,
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
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
        if distributed.size() > 1:  # means over a part become parts of the mean
            part = len(batch) / self.size
            measures = {name: value if name == "off" else value * part for name, value in measures.items()}
            loss = loss * part * distributed.size()  # whose gradients are averaged over the processes
        for name, value in measures.items():  # in place, so that a recorded step adds to the same number
            if name not in self._sums:
                self._sums[name] = value.clone()
            elif name == "off":  # one bad batch is enough
                torch.maximum(self._sums[name], value, out=self._sums[name])
            else:
                self._sums[name] += value
        self.stepper.guard.look(self._sums["loss"])
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

    def snapshot(self, epoch: int, done: int, state: Mapping[str, Any]) -> Snapshot:
        """All that goes on from `done` steps of an epoch; `state` is kept beside it.

        Raises:
            TrainingError: weights are not finite any more.
        """
        model, moments = self.stepper.state()
        if (name := first_not_finite(model)) in model:
            raise TrainingError(
                f"{self.description}: {name.partition('.')[2]} is not finite after epoch {epoch + 1}, step {done}",
                "the gradient was not, though the loss was",
                "try a lower --lr, or --set training.clip_norm=1",
            )
        sums = {f"sums.{name}": total.clone() for name, total in self._sums.items()}
        for name, total in sorted(sums.items()):  # in the same order in all processes
            (distributed.greatest if name == "sums.off" else distributed.add_up)(total)
        plain = {"epoch": epoch, "done": done, "steps": self.stepper.steps, "weight": self._weight, **state}
        return Snapshot(model, moments | sums, random_state(self.train.ids.device), plain)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where `snapshot` was taken."""
        device = self.train.ids.device
        moments = dict(snapshot.optimizer)
        for key in [key for key in moments if key.startswith("sums.")]:
            total = moments.pop(key).to(device)
            # They were added up over the processes, and will be again.
            self._sums[key.removeprefix("sums.")] = total if distributed.first() else torch.zeros_like(total)
        self.stepper.load(snapshot.model, moments, snapshot.state["steps"])
        self._weight = snapshot.state["weight"]
        if distributed.size() == 1:
            set_random_state(snapshot.rng, device)
        else:
            torch.manual_seed(distributed.own_seed(self.seed) + self.stepper.steps)

    def check_finite(self, epoch: int, done: int) -> None:
        """Say which batch of the epoch, and what in it, was the first that was not finite, if any was.

        Raises:
            TrainingError: the step of that batch, and those after it, were not taken.
        """
        if not (left_out := self.stepper.guard.left_out):
            return
        number = done - left_out
        index = self._order(epoch).split(self.size)[number]
        batch = self.viewing.take(self.train, index, self.viewing.id_of(epoch))
        name, rate = first_not_finite(self._terms(batch, index, epoch)), self.recipe.lr
        raise TrainingError(
            f"{self.description}: the loss is not finite in epoch {epoch + 1}, step {number + 1} of {self.steps}",
            f"{name} is not, for the batch of the images {listing(batch.ids.tolist(), 5)}; no such step was taken",
            f"try --lr {rate / 3:.1g}, or --set training.clip_norm=1",
        )

    @torch.no_grad()
    def _terms(self, batch: Images, index: Tensor, epoch: int) -> dict[str, Tensor | None]:
        """What the loss of a batch is made of, in the order of their making."""
        logits, objective = self.model(batch.decoded).float(), self.objective
        target = None
        if objective.targets is not None and self._wants_targets:
            target = objective.targets(batch, index, epoch, logits)
        soft, labels = target.soft if target else None, batch.labels if objective.uses_labels else None
        terms = {"what the network says": logits, "the target of the teachers": soft}
        if labels is not None:
            terms["the loss on labels"] = objective(logits, labels, soft, 0.0, self.recipe.label_smoothing)
        if soft is not None:
            terms["the soft loss"] = objective(logits, labels, soft, 1.0, 0.0)
        return terms

    def _means(self, epoch: int) -> dict[str, float]:
        for name, total in sorted(self._sums.items()):
            (distributed.greatest if name == "off" else distributed.add_up)(total)
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


def _not_shared(what: str, why: str, flag: str) -> ConfigError:
    return ConfigError(
        f"{what} is not for several processes", why, f"leave {flag} out, or start one process: ekd distill …"
    )


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
