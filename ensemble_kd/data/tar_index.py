"""What lies where in a shard: looked through once, from its start to its end, and then kept in the cache.

A shard is a plain .tar in the style of WebDataset: the members of one sample share all of their name up to the
first dot after the last slash, such as `0001.jpg` and `0001.cls`.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ensemble_kd import files
from ensemble_kd.console import log
from ensemble_kd.data.headers import HEAD, is_grey, look_at, why_broken
from ensemble_kd.errors import DataError, DiskError, Problem

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
_LABELS = ("cls", "json")  # the first that there is, is taken
_MOST = {"cls": 1 << 12, "json": 1 << 20}
_MOST_OF_IMAGE = 1 << 28
_VERSION = 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_AGAIN = "fetch the shard again, or pack it again"
_INTEGER = re.compile(r"-?[0-9]{1,18}")


@dataclass
class Index:
    """The images of one shard in their order."""

    length: int
    """Of the shard in bytes, when it was looked through."""
    changed: int
    """When it had been changed, in nanoseconds."""
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    """As they are written: numbers or names of classes."""
    shapes: list[list[int]] = field(default_factory=list)
    """[width, height, how many images have them]."""
    grey: bool = True
    left_out: list[str] = field(default_factory=list)
    """Some members that look like images but have more in their names after the first dot."""


def index_of(shard: Path) -> Index:
    """The index of a shard, from the cache where it is of this very file.

    Raises:
        DataError: with what is wrong with the shard.
    """
    kept = files.cache_dir() / "shards" / f"{files.sha256_json(os.path.abspath(shard))[:32]}.json"
    try:
        facts = os.stat(shard)
        if (index := _read(kept)) and (index.length, index.changed) == (facts.st_size, facts.st_mtime_ns):
            return index
        index = _looked_through(shard)
    except OSError as error:
        raise DataError(
            f"cannot read the shard {shard}",
            error.strerror or str(error),
            "make it readable, or leave it out",
        ) from error
    content = asdict(index)
    record = {"version": _VERSION, "digest": files.sha256_json(content), "index": content}
    try:
        # ASCII: names of members may hold bytes that are no UTF-8.
        files.write_bytes(kept, json.dumps(record).encode())
    except DiskError as error:
        log.warning("%s is looked through again the next time: %s", shard, error.problems[0].what)
    return index


def _read(path: Path) -> Index | None:
    """The index that was written to `path`; None where there is none, or another version, or a damaged one."""
    try:
        record = files.read_json(path)
        content = record["index"]
        if record["version"] != _VERSION or record["digest"] != files.sha256_json(content):
            return None
        return Index(**{entry.name: content[entry.name] for entry in fields(Index)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class _Sample:
    """The members with one key, as far as they were met."""

    image: tarfile.TarInfo | None = None
    labels: dict[str, int | str] = field(default_factory=dict)


def _looked_through(path: Path) -> Index:
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        index = Index(facts.st_size, facts.st_mtime_ns)
        _check_start(path, file.read(HEAD))
        file.seek(0)
        samples: dict[str, _Sample] = {}
        shapes: Counter[tuple[int, int]] = Counter()
        problems: list[Problem] = []
        seen: set[str] = set()
        for tar, member in _members(path, file, index.length):
            try:
                _check_member(member, seen)
                _enter(tar, member, samples, shapes, index)
            except _RefusedError as refused:
                problems.append(_problem(path, member.name, *refused.args))
    _pair(path, samples, index, problems)
    if problems:
        raise DataError(problems)
    index.shapes = [[*shape, count] for shape, count in shapes.items()]
    return index


class _RefusedError(Exception):
    """A member that is not taken: why, and the fix."""


def _problem(path: Path, name: str, why: str, fix: str) -> Problem:
    return Problem(f"cannot take {name!r} from the shard {path}", why, fix)


def _check_start(path: Path, head: bytes) -> None:
    what = f"cannot read the shard {path}"
    if not head:
        raise DataError(what, "the file is empty", _AGAIN)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                what,
                f"it is compressed by {kind}, so that its members cannot be read at their places",
                "decompress it to a plain .tar: its images are compressed already",
            )


def _members(path: Path, file: IO[bytes], length: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar one after the other, each with the tar while it is at that place.

    Raises:
        DataError: it is no tar, or not whole; the standard library takes damage in the middle for the end.
    """
    name, end = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                name = member.name
                if member.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError("bad size")
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                end = tar.offset
                yield tar, member
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if block != bytes(tarfile.BLOCKSIZE):
                whole = len(block) == tarfile.BLOCKSIZE
                raise tarfile.ReadError("bad header" if whole else "no mark of the end")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        why = f"it is cut off or damaged near the member {name!r}" if name else "it is no tar file"
        raise DataError(f"cannot read the shard {path}", f"{why}: {error}", _AGAIN) from error


def _check_member(member: tarfile.TarInfo, seen: set[str]) -> None:
    if member.name.startswith(("/", "\\")) or ".." in PurePosixPath(member.name.replace("\\", "/")).parts:
        raise _RefusedError(
            "its name points out of the shard", "take only shards that you trust, or pack it again"
        )
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "a device or a sparse file"
        raise _RefusedError(f"it is {kind}, not a plain file", "pack the files themselves: tar --dereference")
    if member.name in seen:
        raise _RefusedError("there are two members of that name", "give each sample a key of its own")
    seen.add(member.name)


def _enter(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    samples: dict[str, _Sample],
    shapes: Counter[tuple[int, int]],
    index: Index,
) -> None:
    """Note a member that is an image, or read one that is a label; others mean nothing."""
    folder, _, base = member.name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    ending = ending.lower()
    if not stem or not member.isreg():  # a hidden file, such as macOS adds, or a folder
        return
    if ending not in (*IMAGES, *_LABELS):
        if ending.endswith(tuple(f".{known}" for known in IMAGES)) and len(index.left_out) < 11:
            index.left_out.append(member.name)
        return
    most = _MOST.get(ending, _MOST_OF_IMAGE)
    if member.size > most:
        raise _RefusedError(
            f"it has {files.readable(member.size)}, and at most {files.readable(most)} are read",
            "make it smaller, or leave it out",
        )
    file = tar.extractfile(member)
    assert file is not None
    sample = samples.setdefault(f"{folder}/{stem}", _Sample())
    if ending in _LABELS:
        sample.labels[ending] = _label(file.read(), ending)
        return
    if sample.image is not None:
        raise _RefusedError(
            f"its key has another image, {sample.image.name!r}", "give each sample a key of its own"
        )
    sample.image = member
    try:
        shape, mode = look_at(file)
    except Exception as error:  # Pillow's decoders raise many kinds
        file.seek(0)
        raise _RefusedError(
            why_broken(file.read(HEAD), error), "replace it, or pack the shard without it"
        ) from error
    shapes[shape] += 1
    index.grey &= is_grey(mode)


def _label(data: bytes, ending: str) -> int | str:
    """The number or the name of a class that a member holds."""
    fix = "write a class's number, or its name" + (', as {"label": …}' if ending == "json" else "")
    try:
        text = data.decode("utf-8-sig").strip()
        value: Any = json.loads(text)["label"] if ending == "json" else text
    except UnicodeDecodeError:
        raise _RefusedError("it is no UTF-8 text", fix) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _RefusedError('it is no JSON object with a "label"', fix) from None
    if isinstance(value, str):
        value = value.strip()
        value = int(value) if _INTEGER.fullmatch(value) else value
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _RefusedError("its label is neither an integer nor text", fix)
    if value == "":
        raise _RefusedError("its label is empty", fix)
    if isinstance(value, int) and not 0 <= value < 1 << 31:
        raise _RefusedError(f"its label is {str(value)[:40]}, and classes count from 0", fix)
    return value


def _pair(path: Path, samples: dict[str, _Sample], index: Index, problems: list[Problem]) -> None:
    """Enter the images with their labels; a member that was refused has no partner to be missed."""
    refused = bool(problems)
    for key, sample in samples.items():
        image, name = sample.image, key.removeprefix("/")
        if image is not None and sample.labels:
            index.names.append(image.name)
            index.offsets.append(image.offset_data)
            index.lengths.append(image.size)
            index.labels.append(next(sample.labels[kind] for kind in _LABELS if kind in sample.labels))
        elif refused:
            continue
        elif image is not None:
            fix = f"add {name}.cls with its class, or leave the image out"
            problems.append(_problem(path, image.name, "it has no label", fix))
        else:
            label = f"{name}.{next(iter(sample.labels))}"
            why = f"there is no image {name}.{{{','.join(IMAGES)}}}"
            problems.append(_problem(path, label, why, "add its image, or leave the label out"))
    if not index.names and not problems:
        problems.append(
            Problem(
                f"the shard {path} has no images",
                f"known endings: {', '.join(IMAGES)}",
                "add images with labels, or leave the shard out",
            )
        )
