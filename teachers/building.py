"""Making the stored targets: every view of the training images, once through all teachers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import distributed
from ensemble_kd.console import log, progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.features import feature_width
from ensemble_kd.files import readable
from ensemble_kd.inference import batch_for
from ensemble_kd.objective import Viewing
from ensemble_kd.teachers.ensemble import Ensemble, Outputs, Teacher, stacked
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.runner import Answers
from ensemble_kd.teachers.store import Store
from ensemble_kd.teachers.stored import explain_stale
from ensemble_kd.topk import expand

_WORTH_TIMING = 20
"""Batches of work below which the time is not estimated."""


@dataclass(frozen=True)
class Keeping:
    """How outputs are kept."""

    data: str = ""
    """The name of the images, for people."""
    top_k: int | None = None
    """Keep the largest k logits of each image; all of them where it is None."""


def open_stores(ensemble: Ensemble, train: Images, viewing: Viewing, keeping: Keeping) -> list[Store]:
    """The store of each teacher, with what it holds already."""
    return [_open(ensemble, number, train, viewing, keeping) for number in range(len(ensemble.teachers))]


def _open(ensemble: Ensemble, number: int, train: Images, viewing: Viewing, keeping: Keeping) -> Store:
    teacher, layout = ensemble.teachers[number], layout_of(ensemble, number, len(train), keeping)
    if not teacher.storable:
        return Store.open(None, layout)
    facts = facts_of(teacher, train, viewing, keeping)
    stale = explain_stale(facts, layout)
    if stale:
        log.info("%s", stale)
    return Store.open(facts, layout)


def facts_of(teacher: Teacher, train: Images, viewing: Viewing, keeping: Keeping) -> dict[str, Any]:
    """All that the kept outputs of a teacher depend on."""
    facts = teacher.facts(train, keeping.data, viewing, teacher.running.dtype(train.ids.device))
    if keeping.top_k is not None and teacher.class_map is not None:
        facts["class map"] = teacher.class_map.groups
    return facts


def layout_of(ensemble: Ensemble, number: int, count: int, keeping: Keeping) -> Layout:
    """What is kept of a teacher for `count` images.

    Dense outputs are kept in the teacher's own classes; the largest k are those of the data's classes,
    with their normalisation at the temperatures of the run.
    """
    teacher = ensemble.teachers[number]
    width = feature_width(teacher.classifier, teacher.label) if ensemble.features else 0
    if keeping.top_k is None:
        return Layout(count, len(teacher.classifier.classes), features=width)
    classes, temperatures = ensemble.known_mask.shape[1], _in_use(ensemble, number)
    return Layout(count, classes, min(keeping.top_k, classes), temperatures, width)


def _in_use(ensemble: Ensemble, number: int) -> tuple[float, float]:
    """The temperatures at which a teacher's logits are read: for measuring, and for the soft target."""
    scale = 1.0 if ensemble.scales is None else float(ensemble.scales[number])
    return scale, scale * float(ensemble.temperatures[number])


def build(stores: Sequence[Store], ensemble: Ensemble, train: Images, viewing: Viewing, views: int) -> None:
    """Run the teachers on what is missing of the first `views` views; each image is read once for all of them.

    Raises:
        ModelError: a teacher's output is not finite.
        EkdError: the disk is full.
    """
    if distributed.told(all(store.views >= views for store in stores)):
        return
    with ExitStack() as locks:
        if distributed.first():
            for store in sorted(
                stores, key=lambda store: store.folder
            ):  # so that no two runs wait for each other
                locks.enter_context(store.building(views))
        for store, temporary in zip(
            stores, distributed.told([store.temporary for store in stores]), strict=True
        ):
            if temporary and not distributed.first():
                store.become_temporary()
                locks.enter_context(store.building(views))
        left = {view_id: [store.missing(view_id) for store in stores] for view_id in range(views)}
        left = distributed.told({view_id: missing for view_id, missing in left.items() if any(missing)})
        total = sum(len(chunk) for missing in left.values() for chunk in _chunks(missing, _batch(train)))
        if total:
            _tell(stores, ensemble, train, viewing, list(left.values()))
        with progress("teachers: storing targets", total, "images") as advance:
            for view_id, missing in left.items():
                _build_view(stores, ensemble, train, viewing, view_id, missing, advance)
    distributed.wait()
    for store in stores:
        if not (distributed.first() or store.temporary):
            store.look_again()


def _build_view(
    stores: Sequence[Store],
    ensemble: Ensemble,
    train: Images,
    viewing: Viewing,
    view_id: int,
    missing: Sequence[Sequence[range]],
    advance: Callable[..., None],
) -> None:
    chunks, device = _chunks(missing, _batch(train)), train.ids.device
    positions = (
        distributed.own_part(torch.arange(chunk.start, chunk.stop, device=device)) for chunk in chunks
    )
    writers = [
        _Writer(store, teacher, view_id, shards)
        for store, teacher, shards in zip(stores, ensemble.teachers, missing, strict=True)
    ]
    for chunk, batch in zip(chunks, viewing.batches(train, positions, view_id), strict=True):
        for writer in writers:
            writer.take(chunk, batch, ensemble.features)
        advance(len(chunk))


class _Writer:
    """Collects a teacher's answers until a shard is whole."""

    def __init__(self, store: Store, teacher: Teacher, view_id: int, shards: Sequence[range]) -> None:
        self._store, self._teacher, self._view = store, teacher, view_id
        self._shards = iter(shards)
        self._shard = next(self._shards, None)
        self._parts: list[Answers] = []

    def take(self, chunk: range, batch: Images, features: bool) -> None:
        """Run the teacher on the batch where its shard is missing, and write the shard when it is whole."""
        if self._shard is None or chunk.start < self._shard.start:
            return
        answers = self._teacher.runner(batch.ids.device)(batch.decoded, features)
        logits, kept = distributed.gathered(answers.logits, len(chunk)), answers.features
        self._parts.append(Answers(logits, None if kept is None else distributed.gathered(kept, len(chunk))))
        if chunk.stop < self._shard.stop:
            return
        logits = torch.cat([part.logits for part in self._parts])
        kept = (
            torch.cat([part.features for part in self._parts if part.features is not None])
            if features
            else None
        )
        if self._store.layout.top_k is not None:
            logits = self._teacher.mapped(logits)
        if distributed.first() or self._store.temporary:
            self._store.put(self._view, self._shard, logits, kept)
        self._shard, self._parts = next(self._shards, None), []


def _chunks(missing: Sequence[Sequence[range]], size: int) -> list[range]:
    """The missing rows in order, in pieces of at most `size` that cross no shard of any store."""
    shards = [shard for own in missing for shard in own]
    edges = sorted({edge for shard in shards for edge in (shard.start, shard.stop)})
    starts: list[range] = []
    for low, high in itertools.pairwise(edges):
        if any(shard.start <= low < shard.stop for shard in shards):
            starts += [range(at, min(at + size, high)) for at in range(low, high, size)]
    return starts


def _tell(
    stores: Sequence[Store],
    ensemble: Ensemble,
    train: Images,
    viewing: Viewing,
    missing: Sequence[Sequence[Sequence[range]]],
) -> None:
    """Say how much is stored and how long it will take, from a batch that is timed."""
    rows = [sum(len(shard) for view in missing for shard in view[number]) for number in range(len(stores))]
    stored = sum(store.layout.row_bytes * count for store, count in zip(stores, rows, strict=True))
    wanted = [t for t, count in zip(ensemble.teachers, rows, strict=True) if count]
    names, images = ", ".join(teacher.label for teacher in wanted), max(rows)
    text = f"storing targets of {names}: {images:,} views of images, {readable(stored)}"
    processes = distributed.size()
    size = min(_batch(train) // processes, len(train))
    if images > _WORTH_TIMING * size * processes:
        seconds = _seconds_a_batch(wanted, train, viewing, size) * images / (size * processes)
        text += f", about {seconds:,.0f} s" if seconds < 180 else f", about {seconds / 60:,.0f} min"
    log.info("%s", text)


def _batch(train: Images) -> int:
    """How many images are read at a time, by all processes together."""
    height, width = train.pixels.shape[2:]
    return batch_for((int(height), int(width)), train.ids.device) * distributed.size()


def _seconds_a_batch(teachers: Sequence[Teacher], train: Images, viewing: Viewing, size: int) -> float:
    index = torch.arange(size, device=train.ids.device)
    for _ in range(2):  # the first sets up what is set up once
        started = time.perf_counter()
        batch = viewing.take(train, index, 0)
        for teacher in teachers:
            teacher.runner(batch.ids.device)(batch.decoded).logits.sum().item()
        seconds = time.perf_counter() - started
    return seconds


def read(
    stores: Sequence[Store],
    ensemble: Ensemble,
    view_id: int,
    rows: Tensor | slice | None,
    device: torch.device,
) -> Outputs:
    """Stored outputs of a view, stacked, in the classes of the data."""
    found = []
    for number, (store, teacher) in enumerate(zip(stores, ensemble.teachers, strict=True)):
        kept = store.rows(view_id, rows, device)
        features = [] if kept.features is None or not ensemble.features else [kept.features]
        if kept.topk is None:
            assert kept.logits is not None
            found.append(Outputs(teacher.mapped(kept.logits), features))
            continue
        plain, tempered = (expand(kept.topk, t, store.layout.classes) for t in _in_use(ensemble, number))
        found.append(Outputs(plain, features, tempered))
    return stacked(found)
