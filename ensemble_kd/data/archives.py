"""Unpacking an archive of images once, so that nothing in it lands outside its own folder."""

from __future__ import annotations

import secrets
import shutil
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from ensemble_kd.errors import DataError
from ensemble_kd.files import cache_dir, sha256_file

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".zip")


def is_archive(path: Path) -> bool:
    """Whether the name says that this is an archive that can be unpacked."""
    return path.name.lower().endswith(SUFFIXES)


def unpacked(archive: Path) -> Path:
    """The folder with the archive's content, in the cache under the archive's SHA-256.

    Raises:
        DataError: a member would land outside the folder, or the archive is damaged.
    """
    folder = cache_dir() / "archives" / sha256_file(archive)[:16]
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        _extract(archive, temporary)
        temporary.rename(folder)  # complete, or not there
    except (tarfile.FilterError, ValueError) as error:
        raise DataError(
            f"{archive} has a member that does not belong in it",
            str(error),
            "unpack only archives that you trust, by hand, and name the folder",
        ) from error
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
        raise DataError(f"cannot unpack {archive}", str(error), "fetch the archive again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _extract(archive: Path, folder: Path) -> None:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            _check_members(file.namelist())
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            _check_members(file.getnames())
            file.extractall(folder, filter="data")


def _check_members(names: list[str]) -> None:
    for name in names:
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise ValueError(f"{name!r} would be written outside the folder")
