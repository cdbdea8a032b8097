"""Images that stay in their files or shards: decoded afresh in every pass, by threads, a few batches ahead."""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ensemble_kd.data.headers import FORMATS, HEAD, is_sixteen_bit, why_broken
from ensemble_kd.data.shards import Shards
from ensemble_kd.errors import DataError, Problem

AHEAD = 3
"""Batches that are decoded while one is in use: this bounds the memory, however many images there are."""
_PIECE = 16  # images that a thread decodes at a time, or fewer, so that all threads have a share of a batch
_CHUNKS = 256  # positions that are read from an accelerator at once, in batches
_CPU = torch.device("cpu")
_ROWS = 1 << 16
_TAIL = 4096
_GAP = 3  # Pillow's documentation calls a reduction up to this times the size as good as none


class Inside(Protocol):
    """What images lie in, such as shards."""

    def read(self, position: int, start: int, length: int) -> bytes:
        """`length` bytes of an image, from its byte `start` on, or an OSError."""


@dataclass(frozen=True, eq=False, repr=False)
class Files:
    """Image files below one folder, in a fixed order: a few bytes an image, shared by all splits of them."""

    root: Path
    names: list[str]
    """Below `root`, with slashes."""
    lengths: np.ndarray
    """In bytes, int64 (N,)."""
    changed: np.ndarray
    """When each file was changed, in nanoseconds, int64 (N,)."""
    inside: Inside | None = None
    """What the images lie in, if they are no files of their own; their names then start with its name."""
    fix: str = "replace or delete the file"
    """What to do about one that cannot be read."""

    @classmethod
    def of(cls, root: Path, names: list[str], fix: str = fix) -> Files:
        """Files that nothing is known of yet but their names."""
        lengths, changed = np.zeros((2, len(names)), dtype=np.int64)
        return cls(root, names, lengths, changed, fix=fix)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _base(self) -> str:
        """Where the folder is also after the working directory has changed."""
        return os.path.abspath(self.root)

    def open_name(self, position: int) -> str:
        """The path to open a file by."""
        return f"{self._base}/{self.names[position]}"

    def open(self, position: int) -> IO[bytes]:
        """An image to read from.

        Raises:
            OSError: it cannot be read.
        """
        if self.inside is None:
            return open(self.open_name(position), "rb")
        return io.BytesIO(self.content(position, 0, int(self.lengths[position])))

    def problem(self, position: int, error: Exception) -> Problem:
        """Why a file cannot be read, under the path that the user knows it by."""
        what, path = f"cannot read {self.root / self.names[position]}", self.open_name(position)
        if self.inside is None and not os.path.exists(path):
            gone = "it is a link to a file that is not there" if os.path.islink(path) else "the file is gone"
            return Problem(what, gone, self.fix)
        try:
            why = why_broken(self.content(position, 0, HEAD), error)
        except OSError as unread:
            why = unread.strerror or str(unread)
        return Problem(what, why, self.fix)

    def content(self, position: int, start: int, length: int) -> bytes:
        """At most `length` bytes of a file, from its byte `start` on.

        Raises:
            OSError: it cannot be read.
        """
        if self.inside is not None:
            return self.inside.read(position, start, min(length, int(self.lengths[position]) - start))
        with open(self.open_name(position), "rb") as file:
            file.seek(start)
            return file.read(length)

    def read(self, position: int, out: np.ndarray) -> Problem | None:
        """Decode one file into `out` (C, H, W), uint8; returns what is wrong with it."""
        try:
            with self.open(position) as file:
                decode_file(file, out)
        except Exception as error:  # Pillow's decoders raise many kinds
            return self.problem(position, error)
        return None

    def identify(self, positions: np.ndarray) -> Iterator[bytes]:
        """What tells these files from others, and from themselves before they were changed."""
        for start in range(0, len(positions), _ROWS):
            rows = positions[start : start + _ROWS]
            yield os.fsencode("\0".join(self.names[row] for row in rows.tolist()))
            yield self.lengths[rows].tobytes() + self.changed[rows].tobytes()

    def ends(self, positions: Sequence[int]) -> list[tuple[int, bytes]]:
        """Length and hash of the last 4 kB of files: equal for copies, whatever their names and dates."""
        keys = []
        for position in positions:
            length = int(self.lengths[position])
            tail = self.content(position, max(0, length - _TAIL), _TAIL)
            keys.append((length, hashlib.blake2b(tail, digest_size=16).digest()))
        return keys


@dataclass(frozen=True, eq=False, repr=False)
class Held:
    """Decoded images in memory, beside others that are in files."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, position: int, out: np.ndarray) -> None:
        """Copy one image into `out`."""
        out[:] = self.pixels[position]

    def identify(self, positions: np.ndarray) -> Iterator[bytes]:
        """The pixels."""
        for start in range(0, len(positions), _PIECE):
            yield self.pixels[positions[start : start + _PIECE]].tobytes()


@dataclass(frozen=True, eq=False, repr=False)
class FilePixels:
    """Stands in the place of a uint8 tensor (N, C, H, W) of images that are decoded when they are asked for.

    Indexing decodes and gives a tensor on `device`; `subset` picks images without decoding any.
    """

    parts: tuple[Files | Held, ...]
    index: Tensor
    """Which images, int64 (N,) on the CPU: positions in the parts laid end to end."""
    size: tuple[int, int, int]
    """(C, H, W) of each image."""
    device: torch.device = _CPU
    """Where decoded pixels are put."""

    dtype = torch.uint8
    ndim = 4

    @classmethod
    def of(cls, files: Files, size: tuple[int, int, int]) -> FilePixels:
        """All of the files, in their order."""
        return cls((files,), torch.arange(len(files)), size)

    @classmethod
    def holding(cls, pixels: Tensor) -> FilePixels:
        """Images in memory as such pixels, to be joined to others; batches are put together on the CPU."""
        channels, height, width = pixels.shape[1:]
        held = Held(pixels.cpu().numpy())
        return cls((held,), torch.arange(len(pixels)), (channels, height, width), pixels.device)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.size))

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Tensor]:
        for _, pixels in self.stream(torch.arange(len(self)).split(64)):
            yield from pixels

    def __getitem__(self, index: Any) -> Tensor:
        """Decoded pixels, as indexing a tensor by `index` along its first dimension would give them.

        Raises:
            DataError: a file cannot be read.
        """
        picked = torch.arange(len(self))[_on_cpu(index)]
        ((_, pixels),) = self.stream([picked.flatten()])
        return pixels.view(*picked.shape, *self.size)

    def subset(self, index: Any) -> FilePixels:
        """The images at `index`, still in their files."""
        return replace(self, index=self.index[_on_cpu(index)])

    def to(self, device: torch.device | str) -> FilePixels:
        """The same images, to be put on another device."""
        return replace(self, device=torch.device(device))

    def followed_by(self, other: FilePixels) -> FilePixels:
        """Both, one after the other."""
        index = torch.cat([self.index, other.index + self._starts[-1]])
        return replace(self, parts=self.parts + other.parts, index=index)

    @cached_property
    def _starts(self) -> list[int]:
        """The first position of each part, and the number of all."""
        return list(accumulate(map(len, self.parts), initial=0))

    def stream(self, chunks: Iterable[Tensor]) -> Generator[tuple[Tensor, Tensor]]:
        """Each chunk of positions (B,) with its pixels (B, C, H, W), in order.

        While one is in use, the next `AHEAD` are decoded by as many threads as the machine has cores.
        They end with the iterator, also where it is closed or dropped before its end.

        Raises:
            DataError: files of a chunk cannot be read.
        """
        waiting: deque[tuple[Tensor, Tensor, list[Future[list[Problem]]]]] = deque()
        pool = decoders()
        try:
            for chunk, positions in _with_copies(chunks, self.device):
                waiting.append((chunk, *self._begin(pool, positions)))
                if len(waiting) > AHEAD:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, positions: Tensor
    ) -> tuple[Tensor, list[Future[list[Problem]]]]:
        where = self.index[positions].numpy()
        # Pinned, so that the copy to the device goes on beside its work.
        pixels = torch.empty(
            (len(where), *self.size), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        out, step = pixels.numpy(), max(1, min(_PIECE, -(-len(where) // _threads())))
        rows = where.argsort(kind="stable")  # as they lie on the disk, as far as that is known
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        return pixels, [pool.submit(self._read, where, piece, out) for piece in pieces]

    def _read(self, where: np.ndarray, rows: np.ndarray, out: np.ndarray) -> list[Problem]:
        """Decode the images at positions `where[rows]` into `out[rows]`."""
        problems = []
        for row in rows.tolist():
            position = int(where[row])
            number = bisect_right(self._starts, position) - 1
            problem = self.parts[number].read(position - self._starts[number], out[row])
            if problem:
                problems.append(problem)
        return problems

    def _finish(
        self, chunk: Tensor, pixels: Tensor, works: list[Future[list[Problem]]]
    ) -> tuple[Tensor, Tensor]:
        problems = [problem for work in works for problem in work.result()]
        if problems:
            raise DataError(shortened(problems))
        return chunk, pixels.to(self.device, non_blocking=True)

    def identify(self) -> Iterator[bytes]:
        """What tells these images from others, without decoding any: hash it.

        It is the name, length and date of each file, and the size that they are decoded to.
        """
        yield repr(self.size).encode()
        for part, start in zip(self.parts, self._starts, strict=False):
            inside = (self.index >= start) & (self.index < start + len(part))
            yield inside.nonzero().numpy().tobytes()
            yield from part.identify((self.index[inside] - start).numpy())

    @cached_property
    def blocks(self) -> Tensor | None:
        """How many images follow each other in the same shard, int64 in their order; None if not all are in shards."""
        found = [part.inside for part in self.parts if isinstance(part, Files)]
        shards = [inside for inside in found if isinstance(inside, Shards)]
        if len(shards) < len(self.parts):
            return None
        starts = accumulate((len(shard.paths) for shard in shards), initial=0)
        which = np.concatenate([shard.which + start for shard, start in zip(shards, starts, strict=False)])
        return torch.from_numpy(which)[self.index].unique_consecutive(return_counts=True)[1]

    def files(self) -> list[tuple[Files, np.ndarray]]:
        """The lists of files with the positions in them, in their order."""
        found = []
        for part, start in zip(self.parts, self._starts, strict=False):
            if isinstance(part, Files):
                local = self.index - start
                found.append((part, local[(local >= 0) & (local < len(part))].numpy()))
        return found


def _on_cpu(index: Any) -> Any:
    return index.cpu() if isinstance(index, Tensor) else index


def _with_copies(chunks: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk with a copy of it on the CPU.

    From an accelerator many are read at once: reading waits for all work that was given to it before.
    """
    rest, count = iter(chunks), 1 if device.type == "cpu" else _CHUNKS
    while some := list(islice(rest, count)):
        copies = torch.cat(some).cpu().split([len(chunk) for chunk in some])
        yield from zip(some, copies, strict=True)


def decoders() -> ThreadPoolExecutor:
    """A thread for each core: Pillow lets others run while it decodes."""
    return ThreadPoolExecutor(_threads(), thread_name_prefix="decode")


def _threads() -> int:
    available = getattr(os, "sched_getaffinity", None)  # fewer than there are, in a container
    return len(available(0)) if available else os.cpu_count() or 1


def shortened(problems: Iterable[Problem], what: str = "files that cannot be read") -> list[Problem]:
    """The first ten, and how many more there are."""
    rest = iter(problems)
    first = list(islice(rest, 10))
    more = sum(1 for _ in rest)
    return first + ([Problem(f"and {more} more {what}")] if more else [])


def decode_file(file: IO[bytes], out: np.ndarray) -> None:
    """Decode a file into `out` (C, H, W), uint8: upright, resized to cover it, and cut in the middle."""
    channels, height, width = out.shape
    with Image.open(file, formats=FORMATS) as image:
        # Has the decoder shrink a JPEG that is far too large, to no less than three times what is wanted.
        image.draft(None, (_GAP * max(height, width),) * 2)
        ImageOps.exif_transpose(image, in_place=True)
        upright = _eight_bits(image, "L" if channels == 1 else "RGB")
        if upright.size != (width, height):
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        out[:] = np.asarray(upright).reshape(height, width, channels).transpose(2, 0, 1)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`; 16-bit grey is scaled, where Pillow alone would clip it."""
    if is_sixteen_bit(image):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)
