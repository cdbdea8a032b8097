"""What a network is trained towards: labels, soft targets, features; and on which views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from ensemble_kd.data import views
from ensemble_kd.data.dataset import Images
from ensemble_kd.features import FeatureTerm
from ensemble_kd.losses import LOSSES, distillation_loss, soft_weight_at


class Target(NamedTuple):
    """The ensemble's answer to a batch, as log-probabilities (B, C)."""

    soft: Tensor
    """What is distilled, at the teachers' temperatures."""
    plain: Tensor
    """At temperature 1 and with the weights that evaluation uses: what networks are measured against."""
    weights: Tensor
    """Of the teachers in `soft`: (K,), or (K, B)."""
    features: Sequence[Tensor] = ()
    """Each teacher's penultimate features (B, D_k), where they are wanted."""


class TargetSource(Protocol):
    """Gives the soft target of a batch of views."""

    live: ClassVar[bool]
    """Whether teachers are run for each batch, so that targets only measured are not worth their time."""

    def __call__(self, batch: Images, index: Tensor, epoch: int, student_logits: Tensor) -> Target:
        """`batch` holds this epoch's view of the training samples at positions `index`."""
        ...


@dataclass(frozen=True)
class Objective:
    """(1 − w) · CE(labels) + w · soft loss + feature term; see `losses.distillation_loss`."""

    soft_weight: float = 0.0
    temperature: float = 1.0
    targets: TargetSource | None = None
    """Where the soft targets of training batches come from; with w = 0 they are only measured."""
    val_target: Target | None = None
    """The soft target of the whole validation split."""
    loss: str = "kl"
    numbers: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "constant"
    span: int | None = None
    """Of the schedule, in epochs; see `losses.soft_weight_at`."""
    features: FeatureTerm | None = None
    weights_vary: bool = False
    """Whether the teachers' weights differ by batch, and are worth a column of the history."""

    def weight(self, epoch: int, epochs: int) -> float:
        """The soft weight in an epoch."""
        return soft_weight_at(self.schedule, self.soft_weight, epoch, epochs, self.span)

    @property
    def uses_labels(self) -> bool:
        """Whether any epoch's loss needs labels; where not, they are not read."""
        return self.soft_weight < 1 or self.schedule != "constant" or LOSSES[self.loss].needs_labels

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        target: Tensor | None,
        soft_weight: float,
        smoothing: float,
    ) -> Tensor:
        return distillation_loss(
            logits,
            labels,
            target,
            soft_weight=soft_weight,
            temperature=self.temperature,
            label_smoothing=smoothing,
            loss=self.loss,
            numbers=self.numbers,
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
