"""The data sets that are known by name. Each loader returns (train, test, class names)."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.data.dataset import Images, stratified_split
from ensemble_kd.errors import DataError
from ensemble_kd.files import cache_dir

Splits = tuple[Images, Images, tuple[str, ...]]

_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_MOST_BYTES = 1 << 30
_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def load_digits(root: Path | None, offline: bool) -> Splits:
    """scikit-learn's 1,797 digits, 8×8 grey; a fixed fifth of them, stratified, is the test split."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    images = Images(pixels, labels, torch.arange(len(labels)))
    kept, held = stratified_split(labels, held_out=360, seed=0)
    return images[kept], images[held], _DIGITS


def load_mnist(root: Path | None, offline: bool) -> Splits:
    """MNIST: 60,000 + 10,000 grey digits, 28×28."""
    return (*_load_idx("MNIST", root, offline), _DIGITS)


def load_fashion_mnist(root: Path | None, offline: bool) -> Splits:
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28×28."""
    return (*_load_idx("FashionMNIST", root, offline), _FASHION)


def load_cifar10(root: Path | None, offline: bool) -> Splits:
    """CIFAR-10: 50,000 + 10,000 colour images of 10 classes, 32×32."""
    return _load_cifar("CIFAR10", root, offline)


def load_cifar100(root: Path | None, offline: bool) -> Splits:
    """CIFAR-100: 50,000 + 10,000 colour images of 100 classes, 32×32."""
    return _load_cifar("CIFAR100", root, offline)


SOURCES: dict[str, tuple[Callable[[Path | None, bool], Splits], str]] = {
    "digits": (load_digits, "none"),
    "mnist": (load_mnist, "crop"),
    "fashion-mnist": (load_fashion_mnist, "crop-flip"),
    "cifar10": (load_cifar10, "crop-flip"),
    "cifar100": (load_cifar100, "crop-flip"),
}
"""Name → loader, and the policy of views that suits the images."""


def _load_idx(name: str, root: Path | None, offline: bool) -> tuple[Images, Images]:
    import torchvision

    root = root or cache_dir() / "data"
    found = _find_idx(root, name)
    if found is None:
        files = ", ".join(f"{stem}-ubyte[.gz]" for stem in _IDX_FILES)
        _download(getattr(torchvision.datasets, name), root, name, offline, files)
        found = _find_idx(root, name)
        assert found is not None
    train_x, train_y, test_x, test_y = (_read_idx(path) for path in found)
    for pixels, labels, path in ((train_x, train_y, found[1]), (test_x, test_y, found[3])):
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise DataError(
                f"{path} does not belong to the images beside it",
                f"labels of shape {tuple(labels.shape)} for images of shape {tuple(pixels.shape)}",
                "fetch the four files again",
            )
    train = Images(train_x[:, None], train_y.long(), torch.arange(len(train_y)))
    test_ids = torch.arange(len(train_y), len(train_y) + len(test_y))
    return train, Images(test_x[:, None], test_y.long(), test_ids)


def _find_idx(root: Path, name: str) -> list[Path] | None:
    """The four files, plain or .gz, in `root` itself or where torchvision puts them."""
    for folder in (root, root / "raw", root / name / "raw"):
        paths = [
            next((p for p in (folder / f"{stem}-ubyte", folder / f"{stem}-ubyte.gz") if p.is_file()), None)
            for stem in _IDX_FILES
        ]
        if all(paths):
            return [path for path in paths if path]
    return None


def _read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes (LeCun's format): magic number, big-endian shape, data."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
            if zero != 0 or kind != 8:
                raise ValueError("wrong magic number")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            if (count := math.prod(shape)) > _MOST_BYTES:
                raise ValueError(f"it would be {count:,} bytes")
            data = file.read(count + 1)  # and no more, however much a .gz would unpack to
        if len(data) != count:
            raise ValueError(f"{len(data):,} bytes or more for {count:,}")
        return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(
            f"cannot read {path}", f"it is no intact idx file ({error})", "delete it and fetch it again"
        ) from error


def _load_cifar(name: str, root: Path | None, offline: bool) -> Splits:
    import torchvision

    root = root or cache_dir() / "data"
    cls = getattr(torchvision.datasets, name)
    try:
        # These files are pickles; torchvision opens them only if their MD5 is the published one.
        parts = [cls(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError, pickle.UnpicklingError):
        _download(cls, root, name, offline, f"the folder {cls.base_folder}")
        parts = [cls(root, train=train) for train in (True, False)]
    start, splits = 0, []
    for part in parts:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(part.targets)
        splits.append(Images(pixels, labels, torch.arange(start, start + len(labels))))
        start += len(labels)
    return splits[0], splits[1], tuple(parts[0].classes)


def _download(cls: type, root: Path, name: str, offline: bool, files: str) -> None:
    fix = f"put {files} there, or name another folder by --data-root"
    if offline:
        raise DataError(f"{name} is not in {root}", "--offline forbids to download it", fix)
    try:
        cls(root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} is not in {root}", f"the download failed: {error}", fix) from error
