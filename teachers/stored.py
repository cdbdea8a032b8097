"""What is in the target store: listed, compared with its checksums, explained and removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ensemble_kd import files
from ensemble_kd.errors import ConfigError, listing
from ensemble_kd.locks import lock
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.store import (
    FOR_PEOPLE,
    TEMPORARY,
    complete_views,
    digest_of,
    key_of,
    read_kept,
    targets_dir,
)

_DAY = 24 * 60 * 60
_LONG = 40
_NEWBORN = 60
"""Seconds in which a temporary folder may not have its lock yet."""
_WORDS = {
    "seed": "view seed",
    "teacher": "weights",
    "preprocess": "preprocessing",
    "policy": "view policy",
    "mix": "mixing",
    "views_version": "version of views",
    "folded": "folded normalisation",
    "ensemble_kd": "ensemble-kd",
    "count": "number of images",
    "classes": "number of classes",
    "top_k": "top-k",
    "features": "number of features",
    "dtype": "number format",
}
"""Names of facts, where their own will not do."""


def list_targets() -> list[dict[str, Any]]:
    """One row a store, the one used last first; nothing is compared with its checksums.

    `key`, `folder`, `teacher`, `data`, `policy`, `kind` (dense or top-K), `count` and `classes`, complete
    `views`, `missing_shards` of others that were begun, `bytes` on the disk, `created`, `used` (when it
    was last), `damaged` (what cannot be read, if anything).
    """
    rows = [_row(folder) for folder in _folders()]
    return sorted(rows, key=lambda row: row["used"], reverse=True)


def verify_targets(keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compare all that is kept, or what `keys` begin, with its checksums.

    Returns:
        one row a store: `key`, `teacher`, `data`, `shards` (how many were compared) and `damaged`, a text
        for each that is not as it was written.

    Raises:
        ConfigError: no store has that key, or several.
    """
    return [verify_store(folder) for folder in _chosen(keys)]


def prune_targets(
    keys: Sequence[str] = (),
    older_than_days: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Remove stores, and whatever killed processes and earlier versions left.

    A store that a living process is building is never removed.

    Args:
        keys: remove these, by the beginning of their keys.
        older_than_days: remove what was not used for so long, of `keys` where any are given.
        everything: remove all.
        dry_run: only tell.

    Returns:
        `removed` and `in_use`, rows as of `list_targets`; `leftovers`, paths; `bytes` of all that is
        removed; `dry_run`.

    Raises:
        ConfigError: nothing is named; or no store has that key, or several.
    """
    if not keys and older_than_days is None and not everything:
        raise ConfigError(
            "nothing is named that could be removed",
            "kept targets took teachers' time, and go only where it is meant",
            "name keys as `ekd targets ls` shows them, or say --older-than DAYS, or --all",
        )
    before = None if older_than_days is None else _stamp(time.time() - older_than_days * _DAY)
    removed: list[dict[str, Any]] = []
    in_use: list[dict[str, Any]] = []
    for folder in _chosen(keys):
        row = _row(folder)
        if before is None or row["used"] < before:
            (removed if _remove(folder, dry_run) else in_use).append(row)
    leftovers = _sweep(dry_run)
    return {
        "removed": removed,
        "in_use": in_use,
        "leftovers": list(leftovers),
        "bytes": sum(row["bytes"] for row in removed) + sum(leftovers.values()),
        "dry_run": dry_run,
    }


def explain_stale(facts: Mapping[str, Any], layout: Layout) -> str | None:
    """Why targets are made anew though some are kept for this teacher and data; None where none are.

    They are held against the kept ones that differ in the fewest facts.
    """
    if read_kept(targets_dir() / key_of(facts, layout)):
        return None
    kept = [found for folder in _folders() if (found := read_kept(folder))]
    alike = [k for k in kept if all(k.facts.get(name) == facts.get(name) for name in FOR_PEOPLE)]
    now = _flat(facts, layout)
    changes = [_changes(_flat(k.facts, k.layout), now) for k in alike]
    if not changes:
        return None
    nearest = min(changes, key=len)
    told = ", ".join(nearest)
    return f"stored targets of {facts.get('label')} for {facts.get('data')} are made anew: {told}"


def _flat(facts: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """What a key depends on, as JSON gives it back."""
    known = {**facts, **asdict(layout)}
    return json.loads(json.dumps({k: v for k, v in known.items() if k not in FOR_PEOPLE}, default=str))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{_WORDS.get(name, name)} {_told(old.get(name))} → {_told(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _told(value: Any) -> str:
    """A value in few words; a hash, or what is long, by eight digits."""
    if value in (None, "", []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        return value[:8]
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        text = " and ".join(map(_told, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONG else files.sha256_json(value)[:8]


def _folders() -> list[Path]:
    """All stores, those with a damaged store.json too."""
    return sorted(path.parent for path in targets_dir().glob("*/store.json"))


def _chosen(keys: Sequence[str]) -> list[Path]:
    folders = _folders()
    return sorted({_named(key, folders) for key in keys}) if keys else folders


def _named(key: str, folders: Iterable[Path]) -> Path:
    names = [folder.name for folder in folders]
    found = [folder for folder in folders if folder.name.startswith(key)] if key else []
    if len(found) != 1:
        shown = listing(name[:12] for name in names) or "none at all"
        raise ConfigError(
            f"{len(found)} stores of targets have keys that begin with {key!r}"
            if found
            else f"no kept targets have the key {key!r}",
            f"kept are {shown}",
            "see which they are: ekd targets ls",
        )
    return found[0]


def _row(folder: Path) -> dict[str, Any]:
    kept = read_kept(folder)
    row: dict[str, Any] = {
        "key": folder.name,
        "folder": str(folder),
        "bytes": _size(folder),
        "used": _stamp((folder / "store.json").stat().st_mtime),
        "damaged": None if kept else "store.json",
    }
    if kept is None:
        return row | dict.fromkeys(
            ("teacher", "data", "policy", "kind", "count", "classes", "views", "missing_shards", "created")
        )
    layout = kept.layout
    return row | {
        "teacher": kept.facts.get("label"),
        "data": kept.facts.get("data"),
        "policy": kept.facts.get("policy"),
        "kind": "dense" if layout.top_k is None else f"top-{layout.top_k}",
        "count": layout.count,
        "classes": layout.classes,
        "views": complete_views(kept.shards),
        "missing_shards": sum(digests.count(None) for digests in kept.shards.values()),
        "created": kept.created,
    }


def verify_store(folder: Path) -> dict[str, Any]:
    """The row of `verify_targets` for the store in a folder."""
    kept = read_kept(folder)
    if kept is None:
        return {"key": folder.name, "teacher": None, "data": None, "shards": 0, "damaged": ["store.json"]}
    named = [
        (view_id, rows, digest)
        for view_id, digests in sorted(kept.shards.items())
        for rows, digest in zip(kept.layout.shards, digests, strict=True)
        if digest
    ]
    damaged = [
        f"view {view_id}, images {rows.start} to {rows.stop - 1}"
        for view_id, rows, digest in named
        if digest_of(folder, kept.layout, view_id, rows) != digest
    ]
    about = {"key": folder.name, "teacher": kept.facts.get("label"), "data": kept.facts.get("data")}
    return about | {"shards": len(named), "damaged": damaged}


def _sweep(dry_run: bool) -> dict[str, int]:
    """Remove folders that no later run will use; returns their sizes in bytes.

    These are temporary stores of processes that were killed, stores that never began, and `outputs`,
    where outputs lay before there was a store.
    """
    born = time.time() - _NEWBORN
    temporary = [
        path
        for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*")
        if path.stat().st_mtime < born and path.stat().st_uid == os.getuid()
    ]
    begun = [path for path in targets_dir().glob("*/") if not (path / "store.json").exists()]
    sizes = {path: _size(path) for path in sorted(temporary + begun)}
    swept = {str(path): size for path, size in sizes.items() if _remove(path, dry_run)}
    if (earlier := files.cache_dir() / "outputs").is_dir():
        swept[str(earlier)] = _size(earlier)
        if not dry_run:
            shutil.rmtree(earlier)
    return swept


def _remove(folder: Path, dry_run: bool) -> bool:
    """Remove a folder unless a living process holds its lock; says whether it goes."""
    held = lock(folder)
    if held is None:
        return False
    with held:
        if not dry_run:
            (folder / "store.json").unlink(missing_ok=True)  # first: what it does not name does not exist
            shutil.rmtree(folder)
    return True


def _size(folder: Path) -> int:
    """Bytes on the disk; less than the lengths of sparse files."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary name that is just renamed by who builds
            size += path.stat().st_blocks * 512
    return size


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
