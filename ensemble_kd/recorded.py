"""Steps of the training loop as a CUDA graph."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ensemble_kd.data.dataset import Images
from ensemble_kd.graphs import Replayed

if TYPE_CHECKING:
    from ensemble_kd.loop import Loop

_BLOCK = 4096


class Recorded:
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

    def load(self, view_id: int, order: Tensor, epoch: int, done: int) -> None:
        """Bring the views of all images, and the order of this epoch, to where the graph reads them."""
        self._epoch = epoch
        self._order.copy_(order)
        self._start.fill_(done * self._loop.size)
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
