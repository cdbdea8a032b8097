"""What is kept of a teacher's outputs: the columns of a store, from tensors to their bytes and back.

Shapes: `V` views, `N` samples, `C` classes, `D` features, `n` rows of one view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.errors import ConfigError, ModelError
from ensemble_kd.topk import TopK, below_largest, compress

SHARD_BYTES = 1 << 25
"""Of a teacher's float32 output: what is held at once while a store is made, and lost by a kill."""
SHARD_ROWS = 1 << 16
"""So that little work is lost also where outputs are small."""
_HALF_MAX = torch.finfo(torch.float16).max


class Column(NamedTuple):
    """One file of a store: `width` numbers a row."""

    dtype: np.dtype[Any]
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * self.width


class Rows(NamedTuple):
    """Rows of one view in float32: all logits (n, C) or the largest of them, and features (n, D)."""

    logits: Tensor | None
    topk: TopK | None
    features: Tensor | None


@dataclass(frozen=True)
class Layout:
    """The shape of what is kept of one teacher.

    Raises:
        ConfigError: more logits are to be kept than there are.
        ValueError: for temperatures without top-k, or top-k without temperatures.
    """

    count: int
    """N, samples of a view."""
    classes: int
    """C, of the teacher's own outputs."""
    top_k: int | None = None
    """How many logits of each sample are kept; all without."""
    temperatures: tuple[float, ...] = ()
    """At which top-k logits may be used."""
    features: int = 0
    """D, the width of the penultimate features; 0 keeps none."""
    dtype: str = "float16"
    """Or float32, where outputs must come back as they were."""

    def __post_init__(self) -> None:
        # One key whatever their order, and whether one was written 4 or 4.0.
        object.__setattr__(self, "temperatures", tuple(sorted({float(t) for t in self.temperatures})))
        if (self.top_k is None) != (not self.temperatures):
            raise ValueError("top_k and temperatures belong together")
        if self.top_k is not None and not 1 <= self.top_k <= self.classes:
            raise ConfigError(
                f"top_k: {self.top_k} of {self.classes} logits cannot be kept",
                "it is how many logits of a teacher are kept for each image",
                f"give a number from 1 to {self.classes}, or leave it out to keep all",
            )

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The files of the store by name, in the order in which they are hashed."""
        values = np.dtype(self.dtype).newbyteorder("<")
        if self.top_k is None:
            found = {"logits": Column(values, self.classes)}
        else:
            found = {
                "index": Column(np.dtype("<u2" if self.classes <= 1 << 16 else "<i4"), self.top_k),
                "values": Column(values, self.top_k),
                "logsumexp": Column(np.dtype("<f4"), len(self.temperatures)),
            }
        return found | ({"features": Column(values, self.features)} if self.features else {})

    @property
    def row_bytes(self) -> int:
        """Bytes kept of one sample in one view."""
        return sum(column.row_bytes for column in self.columns.values())

    @property
    def view_bytes(self) -> int:
        """Bytes kept of one view."""
        return self.count * self.row_bytes

    @property
    def shard_rows(self) -> int:
        """Rows of every shard of a view but the last, which may have fewer."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // (4 * (self.classes + self.features))))

    @cached_property
    def shards(self) -> list[range]:
        """The shards of a view, as ranges of its rows."""
        step = self.shard_rows
        return [range(start, min(start + step, self.count)) for start in range(0, self.count, step)]


def check_finite(label: str, *outputs: Tensor | None) -> None:
    """Refuse NaN and infinity among a teacher's outputs.

    Raises:
        ModelError: there are some.
    """
    if not all(bool(values.isfinite().all()) for values in outputs if values is not None):
        raise ModelError(
            f"teacher {label!r} gives NaN or infinite outputs",
            "its weights are damaged, or its input is not what it was trained on",
            "check it with `ekd evaluate`, or leave it out",
        )


def pack(
    layout: Layout, logits: Tensor, features: Tensor | None, label: str
) -> dict[str, np.ndarray[Any, Any]]:
    """The columns of outputs (n, C) and (n, D), as they are written.

    In half precision logits are less the largest of their sample, which changes no softmax: large ones
    stay finite, and those that matter are finest.

    Raises:
        ModelError: an output is not finite, or a feature is beyond half precision.
    """
    check_finite(label, logits, features)
    half = layout.dtype == "float16"
    if half and features is not None and (largest := float(features.abs().max())) > _HALF_MAX:
        raise ModelError(
            f"features of teacher {label!r} reach {largest:,.0f}",
            f"they are kept in half precision, which ends at {_HALF_MAX:,.0f}",
            "keep no views, so that the teacher is run on each batch: --views 0",
        )
    columns: dict[str, Tensor] = {}
    if layout.top_k is not None:
        kept = compress(logits.detach(), layout.top_k, layout.temperatures)
        columns = {"index": kept.classes, "values": kept.values, "logsumexp": kept.logsumexp}
    else:
        plain = logits.detach().float()
        columns["logits"] = below_largest(plain) if half else plain
    if features is not None:
        columns["features"] = features.detach().float()
    return {name: _as_written(values, layout.columns[name].dtype) for name, values in columns.items()}


def _as_written(values: Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if dtype == np.float16:
        values = values.clamp(min=-_HALF_MAX).half()  # exp of anything below is 0 all the same
    return np.ascontiguousarray(values.cpu().numpy().astype(dtype, copy=False))


def unpack(
    layout: Layout, columns: Mapping[str, np.ndarray[Any, Any]], device: torch.device | str = "cpu"
) -> Rows:
    """The rows whose columns these are; half precision travels to the device as it is."""
    read = {
        name: torch.from_numpy(values.astype(np.int64) if name == "index" else values).to(device)
        for name, values in columns.items()
    }
    features = read["features"].float() if layout.features else None
    if layout.top_k is None:
        return Rows(read["logits"].float(), None, features)
    topk = TopK(read["index"], read["values"].float(), read["logsumexp"], layout.temperatures)
    return Rows(None, topk, features)
