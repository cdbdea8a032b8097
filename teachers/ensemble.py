"""Frozen teachers side by side: stacked logits (K, B, C), and one soft target of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensemble_kd.classifier import Classifier
from ensemble_kd.combine import combine
from ensemble_kd.console import progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import ModelError
from ensemble_kd.fit import EVAL_BATCH, Target, Viewing, predict
from ensemble_kd.teachers.outputs import through_store


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier under a short name, with the hash of its tensors when it was loaded."""

    label: str
    classifier: Classifier
    origin: str
    """Where its weights came from: a path, or the name of published weights."""
    fingerprint: str
    storable: bool = False
    """Whether tensors and card say all about it, so that its outputs can be kept for later runs."""

    @classmethod
    def of(cls, label: str, classifier: Classifier, origin: str, storable: bool = False) -> Teacher:
        """Freeze `classifier` as a teacher; leave `storable` out for a module of your own."""
        classifier.freeze()
        return cls(label, classifier, origin, classifier.fingerprint(), storable)

    def check_unchanged(self) -> str:
        """The hash of its tensors now.

        Raises:
            ModelError: they are not those that were loaded.
        """
        now = self.classifier.fingerprint()
        if now != self.fingerprint:
            raise ModelError(
                f"teacher {self.label!r} changed while it taught",
                "its parameters or buffers have another hash than when it was loaded",
                "a module of your own that writes to its buffers in eval mode cannot be a teacher",
            )
        return now

    def all_logits(self, images: Images, viewing: Viewing | None = None, view_id: int = 0) -> Tensor:
        """Logits (N, C) of all images, or of one view of them, from the store where they are kept.

        Raises:
            ModelError: an output is not finite.
        """
        policy = viewing.policy if viewing else "none"
        depends_on = {
            "teacher": self.fingerprint,
            "card": self.classifier.card.to_json() | {"data": None},
            "images": images.digest,
            "view": None if viewing is None or policy == "none" else (policy, viewing.seed, view_id),
        }
        logits = through_store(
            depends_on if self.storable else None, lambda: self._compute(images, viewing, view_id)
        )
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"teacher {self.label!r} gives NaN or infinite outputs",
                "its weights are damaged, or its input is not what it was trained on",
                "check it with `ekd evaluate`, or leave it out",
            )
        return logits.to(images.pixels.device)

    def _compute(self, images: Images, viewing: Viewing | None, view_id: int) -> Tensor:
        blocks = []
        with progress(f"teacher {self.label}, view {view_id + 1}", len(images)) as advance:
            for batch in images.batches(EVAL_BATCH):
                seen = viewing.apply(batch, view_id) if viewing else batch
                blocks.append(predict(self.classifier, seen))
                advance(len(batch))
        return torch.cat(blocks)


@dataclass(frozen=True)
class Ensemble:
    """K teachers with their weights, temperatures (both K numbers) and the pool that combines them."""

    teachers: Sequence[Teacher]
    weights: Tensor
    temperatures: Tensor
    pool: str = "prob"

    def to(self, device: torch.device) -> Ensemble:
        """Move all teachers to `device`; returns itself."""
        for teacher in self.teachers:
            teacher.classifier.to(device)
        return self

    def all_logits(self, images: Images, viewing: Viewing | None = None, view_id: int = 0) -> Tensor:
        """Stacked logits (K, N, C) of all images or one view of them, one teacher after another.

        Raises:
            ModelError: a teacher's output is not finite.
        """
        return torch.stack([teacher.all_logits(images, viewing, view_id) for teacher in self.teachers])

    def target(self, logits: Tensor) -> Target:
        """The soft target of stacked logits (K, B, C), tempered and at temperature 1."""
        plain = combine(logits, self.weights, torch.ones_like(self.temperatures), self.pool)
        return Target(combine(logits, self.weights, self.temperatures, self.pool), plain)


@dataclass
class LiveTargets:
    """Runs the teachers on each batch of views: always fresh, and most of a step's time."""

    ensemble: Ensemble

    def __call__(self, batch: Images, index: Tensor, view_id: int) -> Target:
        """See `fit.TargetSource`."""
        logits = [predict(teacher.classifier, batch) for teacher in self.ensemble.teachers]
        return self.ensemble.target(torch.stack(logits))


@dataclass
class StoredTargets:
    """Runs the teachers once per view over all training images, then only looks up.

    Holds V · K · N · C float32 numbers on the device of the images.
    """

    ensemble: Ensemble
    train: Images
    viewing: Viewing
    views: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, batch: Images, index: Tensor, view_id: int) -> Target:
        """See `fit.TargetSource`."""
        if view_id not in self.views:
            self.views[view_id] = self.ensemble.all_logits(self.train, self.viewing, view_id)
        return self.ensemble.target(self.views[view_id][:, index])
