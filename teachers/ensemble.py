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


@dataclass(frozen=True)
class Teacher:
    """A frozen classifier under a short name, with the hash of its tensors when it was loaded."""

    label: str
    classifier: Classifier
    origin: str
    """Where its weights came from: a path, or the name of published weights."""
    fingerprint: str

    @classmethod
    def of(cls, label: str, classifier: Classifier, origin: str) -> Teacher:
        """Freeze `classifier` as a teacher."""
        classifier.freeze()
        return cls(label, classifier, origin, classifier.fingerprint())

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

    @torch.inference_mode()
    def logits(self, images: Images) -> Tensor:
        """Stacked logits (K, N, C) of all images, one teacher after another, each in batches."""
        return torch.stack([predict(teacher.classifier, images) for teacher in self.teachers])

    def checked_logits(self, images: Images) -> Tensor:
        """`logits`, all of them finite.

        Raises:
            ModelError: a teacher's output is not.
        """
        logits = self.logits(images)
        for teacher, out in zip(self.teachers, logits, strict=True):
            if not bool(out.isfinite().all()):
                raise ModelError(
                    f"teacher {teacher.label!r} gives NaN or infinite outputs",
                    "its weights are damaged, or its input is not what it was trained on",
                    "check it with `ekd evaluate`, or leave it out",
                )
        return logits

    def target(self, logits: Tensor) -> Target:
        """The soft target of stacked logits (K, B, C), tempered and at temperature 1."""
        plain = combine(logits, self.weights, torch.ones_like(self.temperatures), self.pool)
        return Target(combine(logits, self.weights, self.temperatures, self.pool), plain)

    @property
    def parameter_count(self) -> int:
        """The parameters of all teachers together."""
        return sum(t.classifier.parameter_count for t in self.teachers)

    @property
    def byte_count(self) -> int:
        """The bytes of all teachers together."""
        return sum(t.classifier.byte_count for t in self.teachers)


@dataclass
class LiveTargets:
    """Runs the teachers on each batch of views: always fresh, and most of a step's time."""

    ensemble: Ensemble

    def __call__(self, batch: Images, index: Tensor, view_id: int) -> Target:
        """See `fit.TargetSource`."""
        return self.ensemble.target(self.ensemble.logits(batch))


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
        return self.ensemble.target(self.view(view_id)[:, index])

    def view(self, view_id: int) -> Tensor:
        """The logits (K, N, C) of one view of all training images, computed when first asked for."""
        if view_id not in self.views:
            description = f"teachers on view {view_id + 1}/{max(1, self.viewing.count)}"
            blocks = []
            with progress(description, len(self.train)) as advance:
                for batch in self.train.batches(EVAL_BATCH):
                    blocks.append(self.ensemble.checked_logits(self.viewing.apply(batch, view_id)))
                    advance(len(batch))
            self.views[view_id] = torch.cat(blocks, dim=1)
        return self.views[view_id]
