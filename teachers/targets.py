"""Where the soft targets of training batches come from: teachers run live, or their stored outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ensemble_kd.data.dataset import Images
from ensemble_kd.objective import Target, Viewing
from ensemble_kd.teachers.building import Keeping, build, open_stores, read
from ensemble_kd.teachers.ensemble import Ensemble, Outputs
from ensemble_kd.teachers.store import Store

HELD_BYTES = 1 << 30
"""Up to this size the targets of a view are held on the device; beyond it rows are read batch by batch."""
_BLOCK = 8192


@dataclass
class LiveTargets:
    """Runs the teachers on each batch of views: always fresh, and most of a step's time."""

    ensemble: Ensemble
    live: ClassVar[bool] = True

    @property
    def fixed(self) -> bool:
        """See `objective.TargetSource`."""
        return False

    def begin(self, epoch: int) -> None:
        """See `objective.TargetSource`."""

    def __call__(self, batch: Images, index: Tensor, epoch: int, student_logits: Tensor) -> Target:
        """See `objective.TargetSource`."""
        outputs = self.ensemble.look(batch)
        return self.ensemble.target(
            outputs.logits, batch, epoch, student_logits, outputs.features, outputs.tempered
        )


@dataclass
class StoredTargets:
    """Looks up what the teachers said to a view of the training images; what is missing is made first.

    Where the weights of the teachers depend on their outputs alone, the combined targets of a whole
    view are made at once, and a batch only picks its rows.
    """

    ensemble: Ensemble
    train: Images
    viewing: Viewing
    keeping: Keeping = field(default_factory=Keeping)
    stores: Sequence[Store] = ()
    live: ClassVar[bool] = False
    _view: int = -1
    _outputs: Outputs | None = None
    _table: Target | None = None

    def build(self, views: int | None = None) -> None:
        """Run the teachers on the views that are not stored yet, all of them by default."""
        if not self.stores:
            self.stores = open_stores(self.ensemble, self.train, self.viewing, self.keeping)
        count = self.viewing.count if views is None else views
        build(self.stores, self.ensemble, self.train, self.viewing, count)

    @property
    def fixed(self) -> bool:
        """See `objective.TargetSource`."""
        return self.ensemble.is_fixed and self._held_bytes <= HELD_BYTES

    @property
    def _held_bytes(self) -> int:
        """Of a view's targets, and of the outputs that they are made from."""
        count, classes = self.ensemble.known_mask.shape
        width = (count + 2) * classes + sum(store.layout.features for store in self.stores)
        return 4 * len(self.train) * width

    def begin(self, epoch: int) -> None:
        """See `objective.TargetSource`."""
        view_id = self.viewing.id_of(epoch)
        if view_id == self._view:
            return
        self.build(view_id + 1)
        self._view = view_id
        if self._held_bytes > HELD_BYTES:
            self._outputs = self._table = None
        elif self.ensemble.is_fixed:
            self._table = _into(self._table, self._whole_view(view_id))
        else:
            self._outputs = read(self.stores, self.ensemble, view_id, None, self.train.ids.device)

    def _whole_view(self, view_id: int) -> Target:
        device, parts = self.train.ids.device, []
        for start in range(0, len(self.train), _BLOCK):
            rows = slice(start, min(start + _BLOCK, len(self.train)))
            outputs = read(self.stores, self.ensemble, view_id, rows, device)
            parts.append(
                self.ensemble.target(outputs.logits, features=outputs.features, tempered=outputs.tempered)
            )
        soft, plain = (torch.cat([getattr(part, name) for part in parts]) for name in ("soft", "plain"))
        weights = parts[0].weights
        if weights.ndim == 2:
            weights = torch.cat([part.weights for part in parts], dim=1)
        features = [torch.cat(columns) for columns in zip(*(part.features for part in parts), strict=True)]
        return Target(soft, plain, weights, features)

    def __call__(self, batch: Images, index: Tensor, epoch: int, student_logits: Tensor) -> Target:
        """See `objective.TargetSource`."""
        self.begin(epoch)
        if self._table is not None:
            soft, plain, weights, features = self._table
            picked = weights if weights.ndim == 1 else weights[:, index]
            return Target(soft[index], plain[index], picked, [values[index] for values in features])
        if self._outputs is not None:
            outputs = self._outputs.at(index)
        else:
            outputs = read(self.stores, self.ensemble, self._view, index, batch.ids.device)
        return self.ensemble.target(
            outputs.logits, batch, epoch, student_logits, outputs.features, outputs.tempered
        )


def _into(kept: Target | None, new: Target) -> Target:
    """The new target in the tensors of the one before, since a recorded step reads those."""
    if kept is None:
        return new
    for old, values in zip((*kept[:3], *kept.features), (*new[:3], *new.features), strict=True):
        old.copy_(values)
    return kept
