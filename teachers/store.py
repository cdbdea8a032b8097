"""The target store: what frozen teachers said to stored views, in flat files that are read by mapping.

One folder a teacher, `cache/targets/KEY`, with one file a column (`logits.bin`, shaped (V, N, C), …) and
`store.json`. The key is a hash of all that the outputs depend on, so a stale store is never read; the
number of views is no part of it, so a store grows. A view is written in shards, blocks of its rows: first
the bytes, flushed to the disk, then their SHA-256 in store.json. What that does not name does not exist.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.console import log
from ensemble_kd.errors import EkdError
from ensemble_kd.locks import lock
from ensemble_kd.teachers.layout import Layout, Rows, pack, unpack

FORMAT = 1
FOR_PEOPLE = ("label", "data")
"""Facts that are no part of the key: names, which may change while what they name is the same."""
TEMPORARY = "ekd-targets-"
"""What the names of temporary stores begin with."""
_OURS: set[Path] = set()
_MOST_VIEWS = 1 << 20
"""The stores that this process builds."""


class Kept(NamedTuple):
    """What store.json says."""

    facts: dict[str, Any]
    layout: Layout
    created: str
    shards: dict[int, list[str | None]]
    """SHA-256 of each shard, by view; None where it is missing."""


def targets_dir() -> Path:
    """The folder of all stores, inside the cache."""
    return files.cache_dir() / "targets"


def key_of(facts: Mapping[str, Any], layout: Layout) -> str:
    """The name of a store's folder: 32 hex digits of a hash of all that its bytes depend on."""
    matters = {name: value for name, value in facts.items() if name not in FOR_PEOPLE}
    return files.sha256_json([FORMAT, layout.shard_rows, matters, asdict(layout)])[:32]


def read_kept(folder: Path) -> Kept | None:
    """What the store.json of a folder says; None where it is missing, damaged or that of another store."""
    try:
        known = files.read_json(folder / "store.json")
        layout = Layout(**known["layout"])
        if key_of(known["facts"], layout) != folder.name:
            return None
        shards = {int(view): list(digests) for view, digests in known["shards"].items()}
        if any(len(digests) != len(layout.shards) for digests in shards.values()):
            return None
        if not all(0 <= view < _MOST_VIEWS for view in shards):
            return None
        return Kept(known["facts"], layout, str(known["created"]), shards)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EkdError):
        return None


def whole(digests: Sequence[str | None] | None) -> bool:
    """Whether a view has all its shards."""
    return digests is not None and None not in digests


def complete_views(shards: Mapping[int, Sequence[str | None]]) -> int:
    """How many views can be read: 0, 1, … up to the first that has not all its shards."""
    count = 0
    while whole(shards.get(count)):
        count += 1
    return count


def digest_of(folder: Path, layout: Layout, view_id: int, rows: range) -> str:
    """SHA-256 of a shard's bytes on the disk, one column after another; of fewer where a file ends before."""
    digest = hashlib.sha256()
    for name, column in layout.columns.items():
        with suppress(FileNotFoundError), _column_file(folder, name).open("rb") as file:
            file.seek((view_id * layout.count + rows.start) * column.row_bytes)
            digest.update(file.read(len(rows) * column.row_bytes))
    return digest.hexdigest()


class Store:
    """Kept outputs of one teacher; see `Store.open`.

    Many processes may read at once. One at a time builds, and the next finds its work done:

        with store.building(views):
            for view_id in range(views):
                for rows in store.missing(view_id):
                    store.put(view_id, rows, logits)
    """

    def __init__(self, layout: Layout, facts: Mapping[str, Any], folder: Path | None) -> None:
        self.layout = layout
        self.facts = dict(facts)
        self.temporary = folder is None
        """Whether it goes with this object."""
        self.folder = folder or self._temporary_folder()
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._held: dict[int, list[str | None]] = {}
        self._maps: dict[str, np.ndarray[Any, Any]] = {}
        self._planned = 0

    @classmethod
    def open(cls, facts: Mapping[str, Any] | None, layout: Layout) -> Store:
        """The store of the outputs that `facts` tell of, as far as it was built; nothing is written.

        All that is held is compared with its checksums; damaged shards are dropped with a warning.

        Args:
            facts: all that the outputs depend on, as a flat table of JSON values; `label` and `data` are
                for people. None gives a temporary store.
            layout: the shape of what is kept.
        """
        if facts is None:
            return cls(layout, {}, None)
        store = cls(layout, facts, targets_dir() / key_of(facts, layout))
        if damaged := store._load():
            log.warning("targets of %s: %s damaged, and made again (%s)", store.label, damaged, store.folder)
        with suppress(OSError):
            os.utime(store.folder / "store.json")  # tells `prune` when it was used last
        return store

    @property
    def label(self) -> str:
        """The teacher's short name."""
        return str(self.facts.get("label", "a teacher"))

    @property
    def views(self) -> int:
        """How many views can be read: 0 … views − 1."""
        return complete_views(self._held)

    def missing(self, view_id: int) -> list[range]:
        """The shards of a view that are not held, as ranges of its rows."""
        shards = self.layout.shards
        held = self._held.get(view_id, [None] * len(shards))
        return [rows for rows, digest in zip(shards, held, strict=True) if digest is None]

    def rows(
        self, view_id: int, index: Tensor | slice | None = None, device: torch.device | str = "cpu"
    ) -> Rows:
        """Rows of a complete view: those at positions `index` (n,), in this order, or all.

        Raises:
            ValueError: the view is not complete.
            IndexError: a position lies outside of it.
        """
        if not whole(self._held.get(view_id)):
            raise ValueError(f"view {view_id} of {self.label} is not complete")
        views = {name: values[view_id] for name, values in self._maps.items()}
        if isinstance(index, Tensor):
            where = index.cpu().numpy()
            taken = {name: values.take(where, axis=0) for name, values in views.items()}
        else:
            taken = {name: values[index or slice(None)].copy() for name, values in views.items()}
        return unpack(self.layout, taken, device)

    @contextmanager
    def building(self, views: int) -> Iterator[None]:
        """Hold the lock while views 0 … views − 1 are made; nothing happens where they are complete.

        Where the cache cannot be written, the store becomes a temporary one, empty, with a warning. So ask
        for what is `missing` inside the block.

        Raises:
            EkdError: there is no room for them.
        """
        if self.views >= views:
            yield
            return
        held = None if self.temporary else self._take_lock()
        try:
            self._grow(views)
            self._planned = views
            yield
        finally:
            self._planned = 0
            if held:
                _OURS.discard(self.folder)
                held.close()

    def put(self, view_id: int, rows: range, logits: Tensor, features: Tensor | None = None) -> None:
        """Keep one whole shard, inside `building`.

        Args:
            view_id: one of the views that are being built.
            rows: one of `missing(view_id)`.
            logits: (n, C), on any device.
            features: (n, D), where the layout has them.

        Raises:
            ModelError: an output is not finite, or a feature is beyond half precision.
            EkdError: the disk is full.
            ValueError: for other views, rows or shapes.
        """
        self._check(view_id, rows, logits, features)
        columns = pack(self.layout, logits, features, self.label)
        digest = hashlib.sha256()
        try:
            for name, values in columns.items():
                at = (view_id * self.layout.count + rows.start) * self.layout.columns[name].row_bytes
                _write(_column_file(self.folder, name), at, values)
                digest.update(values.data)
            held = self._held.setdefault(view_id, [None] * len(self.layout.shards))
            held[self.layout.shards.index(rows)] = digest.hexdigest()
            self._record()
        except OSError as error:
            if error.errno not in files.FULL:
                raise
            raise self._no_room(len(rows) * self.layout.row_bytes) from error

    def _check(self, view_id: int, rows: range, logits: Tensor, features: Tensor | None) -> None:
        if not 0 <= view_id < self._planned:
            raise ValueError(f"view {view_id} is not being built")
        if rows not in self.missing(view_id):
            raise ValueError(f"{rows} is no missing shard of view {view_id}")
        width = self.layout.features
        given = [tuple(logits.shape), features if features is None else tuple(features.shape)]
        wanted = [(len(rows), self.layout.classes), (len(rows), width) if width else None]
        if given != wanted:
            raise ValueError(f"logits and features are shaped {given}, not {wanted}")

    def _load(self) -> str:
        """Take over what lies on the disk as it was written; says what does not, as `… are`."""
        kept = read_kept(self.folder)
        before = self._held
        self._held = {}
        named = lost = 0
        for view_id, digests in kept.shards.items() if kept else ():
            known = before.get(view_id, [None] * len(digests))
            self._held[view_id] = [
                digest
                if digest in (None, seen) or digest == digest_of(self.folder, self.layout, view_id, rows)
                else None
                for digest, seen, rows in zip(digests, known, self.layout.shards, strict=True)
            ]
            named += len(digests) - digests.count(None)
            lost += self._held[view_id].count(None) - digests.count(None)
        self._created = kept.created if kept else self._created
        self._map()
        if kept is None and (self.folder / "store.json").exists():
            return "store.json is"
        return f"{lost} of {named} parts are" if lost else ""

    def _take_lock(self) -> BinaryIO | None:
        """The lock of the store as other processes left it; without one, it is a temporary store now."""
        if self.folder in _OURS:  # it would wait for itself
            self._become_temporary("another teacher has the same weights")
            return None
        held = None
        try:
            held = lock(self.folder, self._say_that_it_waits)
            for left in self.folder.glob(".*.tmp"):  # by a process that was killed
                left.unlink()
            self._load()
            self._record()
        except BaseException as error:
            if held:
                held.close()
            if not isinstance(error, OSError):
                raise
            self._become_temporary(error.strerror or str(error))
            return None
        _OURS.add(self.folder)
        return held

    def _record(self) -> None:
        value = {
            "facts": self.facts,
            "layout": asdict(self.layout),
            "created": self._created,
            "views": self.views,
            "shards": {str(view): digests for view, digests in sorted(self._held.items())},
        }
        files.write_sealed(self.folder / "store.json", value)

    def _grow(self, views: int) -> None:
        """Make the files as long as `views` views, if there is room for what they lack."""
        needed = (
            sum(len(rows) for view in range(views) for rows in self.missing(view)) * self.layout.row_bytes
        )
        if needed > shutil.disk_usage(self.folder).free:
            raise self._no_room(needed)
        for name, column in self.layout.columns.items():
            length = views * self.layout.count * column.row_bytes
            with _column_file(self.folder, name).open("ab") as file:
                if os.fstat(file.fileno()).st_size < length:
                    file.truncate(length)  # sparse: takes no room yet
        self._map()

    def _map(self) -> None:
        """Map the files anew; maps outlive a `prune` by another process."""
        for name, column in self.layout.columns.items():
            path = _column_file(self.folder, name)
            length = path.stat().st_size if path.is_file() else 0
            shape = (length // (self.layout.count * column.row_bytes), self.layout.count, column.width)
            mapped = (
                np.memmap(path, column.dtype, "r", shape=shape) if shape[0] else np.empty(shape, column.dtype)
            )
            self._maps[name] = np.asarray(mapped)  # a plain array is indexed faster

    def look_again(self) -> None:
        """Take over what another process wrote meanwhile."""
        self._load()

    def become_temporary(self) -> None:
        """Keep nothing beyond this process, as another one of its group does."""
        if not self.temporary:
            self._become_temporary("the first process keeps its own so too")

    def _say_that_it_waits(self) -> None:
        log.info("another process makes the targets of %s: waiting for it", self.label)

    def _become_temporary(self, why: str) -> None:
        log.warning("targets of %s are kept for this run only: %s (%s)", self.label, why, self.folder)
        self.temporary, self.folder = True, self._temporary_folder()
        self._held = {}

    def _temporary_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        alive = lock(folder)  # tells `prune` that the process lives
        weakref.finalize(self, _discard, folder, alive, os.getpid())
        return folder

    def _no_room(self, needed: int) -> EkdError:
        variable = "TMPDIR" if self.temporary else "EKD_CACHE"
        free = shutil.disk_usage(self.folder).free
        return EkdError(
            f"no room for the targets of {self.label}: {files.readable(needed)} are needed, {files.readable(free)} are free",
            f"they are kept in {self.folder}",
            f"remove old ones, `ekd targets prune --older-than 30`, or keep them elsewhere: {variable}=PATH",
        )


def _column_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _write(path: Path, at: int, values: np.ndarray[Any, Any]) -> None:
    """Write and flush; not through a map, where a full disk would end the process."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def _discard(folder: Path, alive: BinaryIO | None, owner: int) -> None:
    if os.getpid() == owner:  # and not a child that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
    if alive:
        alive.close()
