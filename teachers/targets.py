"""Where the soft targets of training batches come from: teachers run live, or once a view."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ensemble_kd.data.dataset import Images
from ensemble_kd.objective import Target, Viewing
from ensemble_kd.teachers.ensemble import Ensemble, Outputs


@dataclass
class LiveTargets:
    """Runs the teachers on each batch of views: always fresh, and most of a step's time."""

    ensemble: Ensemble
    live: ClassVar[bool] = True

    def __call__(self, batch: Images, index: Tensor, epoch: int, student_logits: Tensor) -> Target:
        """See `objective.TargetSource`."""
        outputs = self.ensemble.look(batch)
        return self.ensemble.target(outputs.logits, batch, epoch, student_logits, outputs.features)


@dataclass
class StoredTargets:
    """Runs the teachers once per view over all training images, then only looks up.

    Holds V · K · N · C float32 numbers on the device of the images, and the features where they are wanted.
    """

    ensemble: Ensemble
    train: Images
    viewing: Viewing
    views: dict[int, Outputs] = field(default_factory=dict)
    live: ClassVar[bool] = False

    def __call__(self, batch: Images, index: Tensor, epoch: int, student_logits: Tensor) -> Target:
        """See `objective.TargetSource`."""
        view_id = self.viewing.id_of(epoch)
        if view_id not in self.views:
            self.views[view_id] = self.ensemble.all_outputs(self.train, self.viewing, view_id)
        logits, features = self.views[view_id]
        picked = [values[index] for values in features]
        return self.ensemble.target(logits[:, index], batch, epoch, student_logits, picked)
