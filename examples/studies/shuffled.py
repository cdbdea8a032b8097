"""A trained resnet8 whose likeliest class stays what it is, while the logits of all others change places.

    py:examples/studies/shuffled.py:resnet8@FILE.safetensors

Its top-1 answers and its confidence are those of the network in FILE; what it says of the wrong classes is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemble_kd.students import SmallResNet


class Shuffled(SmallResNet):
    """resnet8 with a fixed permutation of the wrong classes for each likeliest class."""

    def __init__(self, num_classes: int, channels: int, size: int) -> None:
        super().__init__(num_classes, channels, size, blocks=1)
        generator = torch.Generator().manual_seed(0)
        rows = []
        for best in range(num_classes):
            others = [c for c in range(num_classes) if c != best]
            mixed = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
            row = torch.empty(num_classes, dtype=torch.int64)
            row[others], row[best] = torch.tensor(mixed), best
            rows.append(row)
        self.register_buffer("places", torch.stack(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.gather(1, self.places[logits.argmax(dim=1)])


def resnet8(num_classes: int, channels: int, size: int) -> nn.Module:
    """The factory that `py:` calls."""
    return Shuffled(num_classes, channels, size)
