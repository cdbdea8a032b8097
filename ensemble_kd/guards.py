"""A loss that is not finite: noticed on the device, before the step, and explained afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ensemble_kd import distributed


class FiniteGuard:
    """From the first loss that is not finite on, the optimiser that has `found` takes no step.

    Nothing waits for the device: fused optimisers read `found` (1.0 or 0.0) there, as they do for
    gradient scalers. How many steps were left out is asked for when it is convenient.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)
        self._left_out = torch.zeros((), device=device)

    def look(self, total: Tensor) -> None:
        """`total` is the sum of the losses of an epoch so far; once it is not finite, it stays so."""
        self.found.copy_((total - total) != 0)  # inf − inf is NaN, which differs from everything
        distributed.greatest(self.found)  # no process takes a step that another does not
        self._left_out += self.found

    @property
    def left_out(self) -> int:
        """How many steps were not taken; waits for the device."""
        return int(self._left_out)


def first_not_finite(terms: Mapping[str, Tensor | None]) -> str:
    """The name of the first of the terms that is not finite, or `the loss`."""
    for name, values in terms.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            return name
    return "the loss"
