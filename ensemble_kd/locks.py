"""Exclusive locks of folders, which end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def lock(folder: Path, waiting: Callable[[], None] | None = None) -> BinaryIO | None:
    """The exclusive lock of a folder, held until it is closed or the process ends.

    Args:
        folder: made where it is missing; the lock is its file `lock`.
        waiting: called before waiting for another process; without it None is returned at once.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
        try:
            if not _locked_at_once(file):
                if waiting is None:
                    file.close()
                    return None
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            # Who waited for a folder that was removed meanwhile holds the lock of nothing, and tries again.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return file
            file.close()
        except BaseException:
            file.close()
            raise


def _locked_at_once(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
