"""What a network is trained towards: labels, soft targets, features; and on which views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ensemble_kd.data import views
from ensemble_kd.data.dataset import Images
from ensemble_kd.features import FeatureTerm
from ensemble_kd.fused import fused_kd
from ensemble_kd.losses import LOSSES, Mixed, distillation_loss, soft_weight_at


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

    @property
    def fixed(self) -> bool:
        """Whether targets are only looked up, in tensors that stay where they are from epoch to epoch."""
        ...

    def begin(self, epoch: int) -> None:
        """Make ready for the batches of an epoch."""
        ...

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
    unlabelled: bool = True
    """Whether some labels may be `losses.UNLABELLED`."""
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
        mixed: Mixed | None = None,
    ) -> Tensor:
        common: dict[str, Any] = {
            "soft_weight": soft_weight,
            "temperature": self.temperature,
            "label_smoothing": smoothing,
            "mixed": mixed,
        }
        eager = not torch.compiler.is_compiling()  # a compiler fuses the plain formula itself
        if self.loss == "kl" and target is not None and soft_weight > 0 and eager:
            return fused_kd(logits, labels, target, **common, unlabelled=self.unlabelled)
        return distillation_loss(logits, labels, target, **common, loss=self.loss, numbers=self.numbers)


@dataclass(frozen=True)
class Viewing:
    """Which views the epochs use: epoch e takes view e mod `count`, or a fresh one where `count` is 0."""

    policy: str
    count: int
    seed: int
    mix: str = "none"

    def id_of(self, epoch: int) -> int:
        """The view of an epoch."""
        return epoch % self.count if self.count else epoch

    def take(self, images: Images, index: Tensor, view_id: int) -> Images:
        """That view of the samples at positions `index`."""
        return next(self.batches(images, [index], view_id))

    def batches(self, images: Images, chunks: Iterable[Tensor], view_id: int) -> Iterator[Images]:
        """That view of the samples at each chunk of positions in turn.

        With mixing, partners come from all of `images`, so that a view does not depend on the batch.
        """
        if self.mix == "none":
            return (self._seen(batch, view_id) for batch in images.fetch(chunks))
        paired = (torch.cat([chunk, self._partners(images, chunk, view_id)]) for chunk in chunks)
        return (self._mixed(both, view_id) for both in images.fetch(paired))

    def _seen(self, batch: Images, view_id: int) -> Images:
        pixels = views.view(batch.decoded, batch.ids, policy=self.policy, seed=self.seed, view_id=view_id)
        return Images(pixels, batch.labels, batch.ids)

    def _partners(self, images: Images, index: Tensor, view_id: int) -> Tensor:
        return views.partners(images.ids[index], len(images), seed=self.seed, view_id=view_id)

    def _mixed(self, both: Images, view_id: int) -> Images:
        seen, half = self._seen(both, view_id), len(both) // 2
        first, second = seen.decoded[:half], seen.decoded[half:]
        ids, labels = seen.ids[:half], seen.labels
        pixels, share = views.mix(first, second, ids, kind=self.mix, seed=self.seed, view_id=view_id)
        if labels is None:
            return Images(pixels, None, ids, None, share)
        return Images(pixels, labels[:half], ids, labels[half:], share)
