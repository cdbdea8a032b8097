"""Images that lie in shards: plain .tar files, whose members are read at their places, in any order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

_OPEN = 64
"""Shards that are kept open: a window of a blocked order, and room for other data."""


@dataclass(frozen=True, eq=False, repr=False)
class Shards:
    """Where each of N images lies."""

    paths: tuple[Path, ...]
    lengths: np.ndarray
    """Of the shards in bytes when they were looked through, int64."""
    changed: np.ndarray
    """When they had been changed, in nanoseconds, int64."""
    which: np.ndarray
    """The shard of each image, int32 (N,)."""
    offsets: np.ndarray
    """Where its bytes begin in the shard, int64 (N,)."""

    def read(self, position: int, start: int, length: int) -> bytes:
        """`length` bytes of an image, from its byte `start` on.

        Raises:
            OSError: the shard is gone, or was changed.
        """
        number = self.which[position]
        known = int(self.lengths[number]), int(self.changed[number])
        shard = _opened(self.paths[number], known)
        facts = os.fstat(shard.number)
        if (facts.st_size, facts.st_mtime_ns) != known:
            raise OSError("the shard was changed after it was looked through")
        return os.pread(shard.number, length, int(self.offsets[position]) + start)


class _Open:
    """A file that is closed when nobody holds it any more, be it by the cache or by a thread that reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=_OPEN)
def _opened(path: Path, known: tuple[int, int]) -> _Open:
    """The shard with this length and date: one that was replaced is opened anew."""
    return _Open(path)
