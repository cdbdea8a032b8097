"""A folder of images without labels, to distil on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ensemble_kd.console import log
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.data.folders import (
    EXTENSIONS,
    Folder,
    check_memory,
    decode,
    is_image,
    open_folder,
    read_headers,
)
from ensemble_kd.errors import DataError

FIRST_ID = 1 << 32
"""Ids of unlabelled images start here, so that no labelled one has the same."""


def load_unlabelled(path: Path, data: Dataset) -> Images:
    """All images in a folder or archive, in the size and the channels of `data`, without labels.

    Subfolders are searched too; their names mean nothing.

    Raises:
        DataError: with everything that is wrong with the folder.
    """
    root = open_folder(path.expanduser(), "a folder of images")
    found = sorted(file for file in root.rglob("*") if is_image(file, root))
    if not found:
        raise DataError(
            f"{path} has no images",
            f"known endings: {', '.join(sorted(EXTENSIONS))}",
            "name a folder of images",
        )
    folder = Folder(root, files={"unlabelled": [(file, 0) for file in found]})
    read_headers(folder)
    folder.check()
    folder.grey = data.channels == 1
    height, width = data.train.pixels.shape[2:]
    check_memory(folder, (height, width))
    images = decode(folder, "unlabelled", (height, width), FIRST_ID)
    _warn_of_test_images(images, data, path)
    return Images(images.pixels, None, images.ids)


def _warn_of_test_images(images: Images, data: Dataset, path: Path) -> None:
    test = {_digest(pixels) for pixels in data.test.pixels.cpu()}
    same = sum(_digest(pixels) in test for pixels in images.pixels)
    if same:
        log.warning(
            "%d of the images in %s are test images too: what is measured on them is too good", same, path
        )


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()
