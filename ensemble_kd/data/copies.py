"""Images that two splits have in common: what is measured on them is too good."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

from ensemble_kd.console import progress
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.data.streams import FilePixels, Files, decoders
from ensemble_kd.errors import Problem

_BLOCK = 256


def copies(data: Dataset) -> list[Problem]:
    """What to say of training images that are validation or test images too, as is found by their bytes."""
    found = []
    for name, split in (("validation", data.val), ("test", data.test)):
        if same := _same(split, data.train):
            found.append(
                Problem(
                    f"{same} of the {len(split)} {name} images of {data.name} are training images too",
                    "networks have seen them, so what is measured on them is too good",
                    "remove the copies, or keep all copies of an image in one split",
                )
            )
    return found


def _same(images: Images, among: Images) -> int:
    mine, others = images.pixels, among.pixels
    if isinstance(mine, FilePixels) and isinstance(others, FilePixels):
        return sum(same_files(files, positions, others) for files, positions in mine.files())
    if isinstance(mine, Tensor) and isinstance(others, Tensor):
        return same_pixels(mine, others)
    return 0


def same_pixels(images: Tensor, among: Tensor) -> int:
    """How many `images` (N, C, H, W) are equal to one of the others."""
    known = {_digest(pixels) for pixels in among.cpu()}
    return sum(_digest(pixels) in known for pixels in images.cpu())


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()


def same_files(files: Files, positions: np.ndarray, among: FilePixels) -> int:
    """How many of the files are copies of the others, by their lengths and last bytes: nothing is decoded."""
    mine = files.lengths[positions]
    lists = [(part, rows, part.lengths[rows]) for part, rows in among.files()]
    lengths = np.concatenate([of_part for _, _, of_part in lists])
    known = {end for part, rows, own in lists for end in _ends(part, rows[np.isin(own, mine)])}
    return sum(end in known for end in _ends(files, positions[np.isin(mine, lengths)]))


def _ends(files: Files, positions: np.ndarray) -> list[tuple[int, bytes]]:
    blocks = [positions[start : start + _BLOCK].tolist() for start in range(0, len(positions), _BLOCK)]
    with progress("looking for copies", len(positions)) as advance, decoders() as pool:
        found = []
        for block in pool.map(files.ends, blocks):
            found += block
            advance(len(block))
    return found
