"""A folder of images without labels, to distil on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensemble_kd.console import log
from ensemble_kd.data.copies import same_files, same_pixels
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.data.folders import (
    EXTENSIONS,
    Folder,
    decode,
    image_names,
    left_in_files,
    open_folder,
    read_headers,
    stays_in_files,
)
from ensemble_kd.data.streams import FilePixels, Files
from ensemble_kd.errors import DataError

FIRST_ID = 1 << 32
"""Ids of unlabelled images start here, so that no labelled one has the same."""
_NAME = "unlabelled"


def load_unlabelled(path: Path, data: Dataset, decode: str = "auto") -> Images:
    """All images in a folder or archive, in the size and the channels of `data`, without labels.

    Subfolders are searched too; their names mean nothing. `decode` is that of `load_data`.

    Raises:
        DataError: with everything that is wrong with the folder.
    """
    root = open_folder(path.expanduser(), "a folder of images")
    files = Files.of(root, list(image_names(root)))
    if not len(files):
        raise DataError(
            f"{path} has no images",
            f"known endings: {', '.join(sorted(EXTENSIONS))}",
            "name a folder of images",
        )
    folder = Folder(root, files={_NAME: files})
    read_headers(folder)
    folder.check()
    folder.grey = data.channels == 1
    height, width = data.train.pixels.shape[2:]
    take = left_in_files if stays_in_files(folder, (height, width), decode) else _decoded
    images = take(folder, _NAME, (height, width), FIRST_ID)
    _warn_of_test_images(images, files, data, path)
    return images


_decoded = decode  # the name of an argument above


def _warn_of_test_images(images: Images, files: Files, data: Dataset, path: Path) -> None:
    if isinstance(data.test.pixels, FilePixels):
        same = same_files(files, np.arange(len(files)), data.test.pixels)
    elif isinstance(images.pixels, FilePixels):
        log.info("%s is not searched for test images: its images are decoded only when they are used", path)
        return
    else:
        same = same_pixels(images.pixels, data.test.pixels)
    if same:
        log.warning(
            "%d of the images in %s are test images too: what is measured on them is too good", same, path
        )
