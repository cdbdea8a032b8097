"""Every write of the project: a temporary name, flushed to the disk, then renamed into place.

A reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemble_kd.errors import DiskError

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
_SEAL = "seal"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of errors which say that a disk is full."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, making its folder; a symbolic link is followed.

    Raises:
        DiskError: it cannot be written; what was there before is there still.
    """
    path = Path(os.path.realpath(path))
    temporary = _beside(path)
    with _explained(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _put(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _flush_names(path.parent)


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a new folder of files with the SHA-256 of each in manifest.json, atomically.

    Raises:
        FileExistsError: there is something at `path`.
        DiskError: it cannot be written.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    _write_folder(path, {**contents, MANIFEST: to_json(_digests(contents)).encode()})


def write_summed_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files with SHA256SUMS, atomically; one that is there is replaced as a whole.

    Raises:
        DiskError: it cannot be written; what was there before is there still.
    """
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    _write_folder(path, {**contents, SUMS: sums_of(_digests(contents)).encode()})


def sums_of(digests: Mapping[str, str]) -> str:
    """SHA256SUMS of files by name, as `sha256sum` writes and checks it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _digests(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def _write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    temporary = _beside(path)
    with _explained(path, sum(map(len, contents.values()))):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for name, data in contents.items():
                _put(temporary / name, data)
            _flush_names(temporary)
            _move_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_names(path.parent)


def _move_folder(new: Path, path: Path) -> None:
    """Give a folder its name; what had it before is exchanged with it in one step, and removed then."""
    if not path.exists():
        os.rename(new, path)
        return
    if not _exchange(new, path):  # no Linux, or a file system that cannot: for a moment there is nothing
        old = _beside(path)
        os.rename(path, old)
        os.rename(new, path)
        new = old
    shutil.rmtree(new)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders have each other's name, in one step; says whether it can be done."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """What keeps `size` bytes from being written to `path`, with what can be done."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        what, fix = f"cannot write {path}", "make it writable, or name another folder"
        if error.errno in FULL:
            what = f"no room for {path}: {readable(size)} are needed, {readable(free_at(path))} are free"
            fix = "make room, or name another folder; what was there before is there still"
        told = DiskError(what, why, fix)
        told.errno, told.strerror = error.errno, error.strerror
        raise told from error


def free_at(path: Path) -> int:
    """The free bytes of the disk that `path` lies on, or would."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def readable(count: float) -> str:
    """Bytes for people, such as 41 B or 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def read_folder(path: Path) -> dict[str, bytes]:
    """What `write_folder` wrote to `path`.

    Raises:
        OSError, ValueError: a file is missing, or is not what was written.
    """
    digests = read_json(path / MANIFEST)
    contents = {str(name): (path / str(name)).read_bytes() for name in digests}
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != digests[name]:
            raise ValueError(f"{path / name} is not what was written")
    return contents


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`, which no other process may write to now."""
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _put(path: Path, data: bytes) -> None:
    """A new file, on the disk before this returns."""
    # os.open with 0o666 honours the user's umask; tempfile would make the file private.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity become null, so that any reader takes it."""
    write_text(path, to_json(value) + "\n")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json`, with a hash of the whole table under the key `seal`, so that any change can be told."""
    write_text(path, _sealed(value))


def _sealed(value: Mapping[str, Any]) -> str:
    plain = {key: item for key, item in value.items() if key != _SEAL}
    return to_json({**plain, _SEAL: hashlib.sha256(to_json(plain).encode()).hexdigest()}) + "\n"


def is_as_sealed(path: Path) -> bool | None:
    """Whether a file is as `write_sealed` wrote it, byte for byte; None where it was never sealed.

    Raises:
        OSError, ValueError: it cannot be read, or is no table.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError("it is no table")
    return path.read_bytes() == _sealed(value).encode() if _SEAL in value else None


def to_json(value: Any) -> str:
    """`value` as indented JSON, NaN and infinity as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def json_line(value: Mapping[str, Any]) -> str:
    """`value` as one line of JSON, with its newline."""
    return json.dumps(_finite(value), ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON, as hex: a key for whatever `value` describes."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def cache_dir() -> Path:
    """Where trained teachers and unpacked archives are kept: $EKD_CACHE, or ~/.cache/ensemble-kd."""
    configured = os.environ.get("EKD_CACHE")
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ensemble-kd"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
