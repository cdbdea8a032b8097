"""The teacher library: networks trained here, kept in the cache under a key of what they were made from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ensemble_kd import distributed, files
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.errors import ModelError, WeightsError
from ensemble_kd.locks import lock
from ensemble_kd.models import ModelName
from ensemble_kd.weights import load_classifier, save_classifier


def library_dir() -> Path:
    """The folder of the library, inside the cache."""
    return files.cache_dir() / "teachers"


def folder_of(made_from: dict[str, Any]) -> Path:
    """Where a teacher made from these facts lies: readable, and unique by their hash.

    What the data are is told by the hash of their pixels; their name alone may change.
    """
    key = files.sha256_json(made_from | {"data": None})[:12]
    if kept := sorted(library_dir().glob(f"*-{key}")):
        return kept[0]
    readable = re.sub(r"[^\w.-]+", "-", f"{made_from['model']}-{made_from['data']}-s{made_from['seed']}")
    return library_dir() / f"{readable[-80:].strip('-')}-{key}"


def find(made_from: dict[str, Any], code: ModelName | None = None) -> Classifier | None:
    """The teacher made from these facts, or None; a file that changed since it was kept is not used.

    For a module of the user's, `code` is its name, which is run to build it.
    """
    folder = folder_of(made_from)
    weights, facts = folder / "model.safetensors", folder / "teacher.json"
    if not facts.is_file() or not weights.is_file():
        return None
    known = _read(facts)
    if known is None or known["sha256"] != files.sha256_file(weights):
        changed = facts if known is None else weights
        log.warning("%s was changed since it was kept: the teacher is trained again", changed)
        return None
    try:
        return load_classifier(weights, code)
    except WeightsError as error:
        log.warning("the teacher is trained again: %s", error)
        return None


def keep(classifier: Classifier, made_from: dict[str, Any], results: dict[str, Any]) -> Path:
    """Save a trained teacher; `teacher.json` is written last, so a teacher without it is incomplete."""
    folder = folder_of(made_from)
    if not distributed.first():
        distributed.wait()
        return folder
    save_classifier(folder / "model.safetensors", classifier)
    digest = files.sha256_file(folder / "model.safetensors")
    facts = {"sha256": digest, "made_from": made_from, "results": results}
    files.write_sealed(folder / "teacher.json", facts)
    distributed.wait()
    return folder


def checkpoints(made_from: dict[str, Any]) -> Checkpoints:
    """Where the training of that teacher is saved, for whichever run goes on with it."""
    return Checkpoints(folder_of(made_from) / "checkpoints", made_from | {"data": None})


@contextmanager
def locked(made_from: dict[str, Any], label: str) -> Iterator[None]:
    """While entered, no other run trains that teacher; one that does is waited for."""
    held = distributed.by_first(lambda: _lock(made_from, label))
    try:
        yield
    finally:
        if held is not None:
            Path(held.name).unlink(missing_ok=True)
            held.close()


def _lock(made_from: dict[str, Any], label: str) -> BinaryIO | None:
    try:
        return lock(
            folder_of(made_from), lambda: log.info("another run trains teacher %s: waiting for it", label)
        )
    except OSError as error:
        raise ModelError(
            f"teacher {label!r} cannot be kept in {library_dir()}",
            str(error.strerror),
            "keep trained teachers elsewhere: EKD_CACHE=PATH",
        ) from error


def kept() -> list[dict[str, Any]]:
    """What is in the library: one row a teacher, with `folder`, `made_from` and `results`."""
    rows = []
    for facts in sorted(library_dir().glob("*/teacher.json")):
        if known := _read(facts):
            rows.append({"folder": facts.parent, **known})
    return rows


def _read(facts: Path) -> dict[str, Any] | None:
    """A `teacher.json`; None where it is damaged."""
    try:
        values = files.read_json(facts)
    except ValueError:
        return None
    complete = isinstance(values, dict) and values.keys() >= {"sha256", "made_from", "results"}
    return values if complete else None


def made_from(folder: Path) -> dict[str, Any]:
    """What a kept teacher was made from, as `recipe`, `published` and more; nothing for one not trained here."""
    facts = folder / "teacher.json"
    return dict(files.read_json(facts)["made_from"]) if facts.is_file() else {}


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a kept teacher's training; none for a teacher that was not trained here."""
    facts = folder / "teacher.json"
    return files.read_json(facts)["results"]["history"] if facts.is_file() else []
