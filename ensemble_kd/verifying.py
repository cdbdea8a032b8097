"""`verify`: a run, an export, a kept teacher or a target store, held against its checksums and reloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from ensemble_kd import files
from ensemble_kd.errors import ConfigError, EkdError, RunError, nearest_path
from ensemble_kd.exported import CHECK, LABELS, Export, is_export, open_network, read_export
from ensemble_kd.files import SUMS
from ensemble_kd.runs import Run
from ensemble_kd.teachers.store import read_kept, targets_dir
from ensemble_kd.teachers.stored import verify_store
from ensemble_kd.weights import load_classifier, read_card

_TOLERANCE, _TOLERANCE_INT8 = 1e-3, 0.1
"""How far logits may be from the kept ones, as a share of the largest (or of 1): processors differ."""


class Finding(NamedTuple):
    """One file, or one thing that was tried: `ok` is None where nothing tells."""

    what: str
    ok: bool | None
    why: str = ""

    def __str__(self) -> str:
        state = {True: "ok", False: "damaged", None: "not checked"}[self.ok]
        return f"{state:<12} {self.what}" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True)
class Verification:
    """What was found in a folder."""

    folder: Path
    kind: str
    findings: list[Finding]

    @property
    def damaged(self) -> list[Finding]:
        """What is wrong."""
        return [finding for finding in self.findings if finding.ok is False]

    @property
    def summary(self) -> str:
        """What came of it, in one line."""
        unknown = sum(finding.ok is None for finding in self.findings)
        parts = [f"{len(self.damaged)} damaged" if self.damaged else "nothing is damaged"]
        parts += [f"{unknown} could not be checked"] if unknown else []
        return f"{', '.join(parts)}, of {len(self.findings)} looked at"


def verify(path: str | Path) -> Verification:
    """Compare a folder of this project with its checksums, and reload the networks in it.

    Args:
        path: a run folder (with its checkpoints, exports, teachers and targets), an exported folder, a
            teacher of the library, or a target store.

    Returns:
        One finding a file. Nothing is raised for damage.

    Raises:
        RunError: the path is none of these.
    """
    folder = Path(path).expanduser()
    kinds: list[tuple[str, bool, Callable[[Path], Iterator[Finding]]]] = [
        ("run", (folder / "status.json").is_file(), _run),
        ("teacher", (folder / "teacher.json").is_file(), _teacher),
        ("target store", (folder / "store.json").is_file(), _store),
        ("export", is_export(folder), _export),
    ]
    for kind, is_one, look in kinds:
        if is_one:
            return Verification(folder, kind, list(look(folder)))
    why = "there is nothing at that path"
    if folder.exists():
        why = (
            "it has none of status.json, SHA256SUMS, teacher.json and store.json"
            if folder.is_dir()
            else "it is a file"
        )
    raise RunError(
        f"{path} cannot be verified",
        why,
        ("" if folder.exists() else nearest_path(folder))
        or "name the folder of a run, of an export, of a teacher in the library or of a target store",
    )


def _run(folder: Path) -> Iterator[Finding]:
    run = Run(folder)
    sealed = _sealed(folder, "status.json")
    yield sealed
    try:
        status = run.status()
    except RunError as error:
        if sealed.ok is not False:
            yield Finding("status.json", False, error.problems[0].why)
        return
    networks = {kept["file"]: kept["sha256"] for kept in status["networks"].values()}
    hashes = {**networks, **status.get("files", {})}
    yield from (_hashed(folder, name, digest) for name, digest in hashes.items())
    if status["state"] != "finished":
        yield Finding(
            str(folder), None, f"the run is {status['state']}; its other files have no checksums yet"
        )
    elif "files" not in status:
        yield Finding(str(folder), None, "an earlier version made it, which kept checksums of networks alone")
    for step in sorted(folder.glob("checkpoints/**/step-*")):
        yield from _checkpoint(folder, step)
    yield from (_reloads(folder, name) for name in networks)
    for part in sorted(folder.glob("export/*")):
        if is_export(part):
            yield from _below(part.relative_to(folder), _export(part))
    yield from _linked(run)


def _sealed(folder: Path, name: str) -> Finding:
    try:
        as_sealed = files.is_as_sealed(folder / name)
    except (OSError, ValueError) as error:
        return Finding(name, False, f"it cannot be read: {error}")
    why = {
        None: "an earlier version made it, which kept no checksum",
        True: "",
        False: "it is not what was written",
    }
    return Finding(name, as_sealed, why[as_sealed])


def _hashed(folder: Path, name: str, digest: str) -> Finding:
    path = folder / name
    if not path.is_file():
        return Finding(name, False, "it is missing")
    same = files.sha256_file(path) == digest
    return Finding(name, same, "" if same else "it is not what was written")


def _checkpoint(folder: Path, step: Path) -> Iterator[Finding]:
    where = step.relative_to(folder)
    try:
        digests = {str(name): str(digest) for name, digest in files.read_json(step / files.MANIFEST).items()}
        as_written = (step / files.MANIFEST).read_text(encoding="utf-8") == files.to_json(digests)
    except (OSError, ValueError, AttributeError) as error:
        yield Finding(f"{where}/{files.MANIFEST}", False, f"it cannot be read: {error}")
        return
    yield Finding(f"{where}/{files.MANIFEST}", as_written, "" if as_written else "it is not what was written")
    yield from _below(where, (_hashed(step, name, digest) for name, digest in digests.items()))


def _reloads(folder: Path, name: str) -> Finding:
    what = f"{name}, loaded"
    try:
        if read_card(folder / name).model.startswith("py:"):
            return Finding(what, None, "it is of a module of your own, whose code is not run here")
        load_classifier(folder / name)
    except EkdError as error:
        return Finding(what, False, error.problems[0].why)
    return Finding(what, True)


def _below(where: Path | str, findings: Iterable[Finding]) -> Iterator[Finding]:
    return (finding._replace(what=f"{where}/{finding.what}") for finding in findings)


def _linked(run: Run) -> Iterator[Finding]:
    """The run's teachers in the library and their targets in the store, as far as they are still there."""
    try:
        teachers = run.manifest().get("teachers", []) if run.path("manifest.json").is_file() else []
        prints = {str(row["after"]): str(row["label"]) for row in teachers}
        origins = {str(row["label"]): Path(str(row["origin"])) for row in teachers}
    except (RunError, KeyError, TypeError):
        return  # told above
    for label, folder in origins.items():
        if (folder / "teacher.json").is_file():
            yield from _below(f"teacher {label}", _teacher(folder))
    for place in sorted(targets_dir().glob("*/store.json")):
        kept = read_kept(place.parent)
        if kept is not None and kept.facts.get("teacher") in prints:
            yield from _below(
                f"targets of {prints[kept.facts['teacher']]} {place.parent.name[:12]}", _store(place.parent)
            )


def _teacher(folder: Path) -> Iterator[Finding]:
    yield _sealed(folder, "teacher.json")
    try:
        digest = str(files.read_json(folder / "teacher.json")["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        yield Finding("model.safetensors", None, "teacher.json does not tell its checksum")
        return
    yield _hashed(folder, "model.safetensors", digest)
    if (folder / "model.safetensors").is_file():
        yield _reloads(folder, "model.safetensors")


def _store(folder: Path) -> Iterator[Finding]:
    yield _sealed(folder, "store.json")
    found = verify_store(folder)
    yield from (
        Finding(part, False, "it is not what was written")
        for part in found["damaged"]
        if part != "store.json"
    )
    if found["damaged"] == ["store.json"]:
        yield Finding("store.json", False, "it is not that of this store")
    else:
        good = found["shards"] - len(found["damaged"])
        yield Finding(f"{good} of {found['shards']} stored parts", True if good else None)


def _export(folder: Path) -> Iterator[Finding]:
    findings = list(_summed(folder))
    yield from findings
    if all(finding.ok is not False for finding in findings):
        yield _answers_again(folder)
    else:
        yield Finding("the network", None, "damaged files are not loaded")


def _summed(folder: Path) -> Iterator[Finding]:
    """Every file of an exported folder against SHA256SUMS, which names them all."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        yield Finding(SUMS, False, f"it cannot be read: {error}")
        return
    digests = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)}
    as_written = text == files.sums_of(digests) and bool(digests)
    yield Finding(SUMS, as_written, "" if as_written else "it is not what was written")
    there = {path.name for path in folder.iterdir()} - {SUMS}
    for name in sorted(there | digests.keys()):
        if name in digests:
            yield _hashed(folder, name, digests[name])
        elif name.startswith("."):  # as what the hub and version control add
            yield Finding(name, None, f"{SUMS} does not name it, as no hidden file")
        else:
            yield Finding(name, False, f"{SUMS} does not name it")


def _answers_again(folder: Path) -> Finding:
    """Whether the reloaded network says to the kept images what it said when it was exported."""
    what = "the network, reloaded"
    try:
        export = read_export(folder)
        if files.read_json(folder / LABELS) != list(export.card.classes):
            return Finding(LABELS, False, "it names other classes than config.json")
        kept = safetensors.torch.load_file(folder / CHECK)
        if export.card.model.startswith("py:") and export.format != "onnx":
            return Finding(what, None, "it is a module of your own, whose code is not run here")
        with torch.inference_mode():
            logits = open_network(export)(kept["images"])
        off = float((logits - kept["logits"]).abs().max())
        highest = float(kept["logits"].abs().max())
    except ConfigError as error:
        return Finding(what, None, f"{error.problems[0].what}: {error.problems[0].fix}")
    except KeyError as error:
        return Finding(what, False, f"{CHECK} holds no {error}")
    except (EkdError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
        return Finding(what, False, error.problems[0].what if isinstance(error, EkdError) else str(error))
    bound = (_TOLERANCE_INT8 if export.int8 else _TOLERANCE) * max(1.0, highest)
    return Finding(
        f"{what}{_from(export)}", off <= bound, f"its logits differ by up to {off:.2g} from the kept ones"
    )


def _from(export: Export) -> str:
    return " from model.safetensors (a .pt2 can run code)" if export.format == "torch" else ""
