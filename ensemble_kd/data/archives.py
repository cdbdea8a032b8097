"""Unpacking an archive of images once, so that nothing in it lands outside its own folder or fills the disk."""

from __future__ import annotations

import secrets
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ensemble_kd.errors import DataError
from ensemble_kd.files import FULL, cache_dir, free_at, readable, sha256_file

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")
ROOM, TIMES = 1 << 30, 100
"""How much an archive may unpack to: so many bytes, and so many times its own size."""
_BLOCK = 4096
"""What a file takes on the disk at least."""


class _Member(NamedTuple):
    name: str
    size: int
    plain: bool
    """Whether it is a file or a folder, rather than a link or a device."""


def is_archive(path: Path) -> bool:
    """Whether the name says that this is an archive that can be unpacked."""
    return path.name.lower().endswith(SUFFIXES)


def unpacked(archive: Path) -> Path:
    """The folder with the archive's content, in the cache under the archive's SHA-256.

    Raises:
        DataError: a member is a link or would land outside the folder, the archive is damaged, it unpacks
            to far more than its own size, or there is no room for that.
    """
    folder = cache_dir() / "archives" / sha256_file(archive)[:16]
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"cannot unpack {archive} into {folder.parent}",
            error.strerror or str(error),
            "unpack it elsewhere: EKD_CACHE=PATH",
        ) from error
    try:
        _extract(archive, temporary)
        temporary.rename(folder)  # complete, or not there
    except (tarfile.FilterError, ValueError) as error:
        raise _foreign(archive, str(error)) from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        OSError,
        LZMAError,
        zlib.error,
        RuntimeError,
    ) as error:
        if folder.is_dir():  # another process was faster
            return folder
        full = isinstance(error, OSError) and error.errno in FULL
        fix = "make room, or unpack it elsewhere: EKD_CACHE=PATH" if full else "fetch the archive again"
        raise DataError(f"cannot unpack {archive}", str(error), fix) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            _check(archive, map(_of_zip, file.infolist()), folder)
            file.extractall(folder)  # noqa: S202 (a zip, whose members were checked)
    else:
        with tarfile.open(archive) as file:
            _check(archive, _of_tar(file), folder)
            file.extractall(folder, filter="data")


def _of_zip(info: zipfile.ZipInfo) -> _Member:
    return _Member(info.filename, info.file_size, not stat.S_ISLNK(info.external_attr >> 16))


def _of_tar(file: tarfile.TarFile) -> Iterator[_Member]:
    """One after another, so that no more is decompressed than is asked for."""
    for member in file:
        yield _Member(member.name, member.size, member.isreg() or member.isdir())


def _check(archive: Path, members: Iterable[_Member], folder: Path) -> None:
    """Before anything is written. Links are refused: not every Python sees where a chain of them leads."""
    total, allowed = 0, ROOM + TIMES * archive.stat().st_size
    for name, size, plain in members:
        if not plain:
            raise _foreign(archive, f"{name!r} is neither a file nor a folder")
        if not name:
            raise _foreign(archive, "it has no name")
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise _foreign(archive, f"{name!r} would be written outside the folder")
        total += max(size, _BLOCK)
        if total > allowed:
            raise DataError(
                f"{archive} would unpack to more than {readable(allowed)}",
                f"that is over {TIMES} times its own size, as of files that are made to fill disks",
                "unpack it by hand if you trust it, and name the folder",
            )
    if total > (free := free_at(folder)):
        raise DataError(
            f"no room to unpack {archive}: {readable(total)} are needed, {readable(free)} are free",
            f"it is unpacked into {folder.parent}",
            "make room, or unpack it elsewhere: EKD_CACHE=PATH",
        )


def _foreign(archive: Path, why: str) -> DataError:
    return DataError(
        f"{archive} has a member that does not belong in it",
        why,
        "unpack only archives that you trust, by hand, and name the folder",
    )
