"""Images in memory: one uint8 tensor a split, batched by indexing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ensemble_kd.errors import DataError
from ensemble_kd.losses import UNLABELLED


@dataclass(frozen=True)
class Images:
    """One split: uint8 `pixels` (N, C, H, W), int64 `labels` (N,) or None, int64 `ids` (N,).

    An id names a sample within its source, whatever split it falls into; views depend on it.
    """

    pixels: Tensor
    labels: Tensor | None
    ids: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> Images:
        labels = None if self.labels is None else self.labels[index]
        return Images(self.pixels[index], labels, self.ids[index])

    def to(self, device: torch.device | str) -> Images:
        """The same split on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Images(self.pixels.to(device), labels, self.ids.to(device))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and ids."""
        digest = hashlib.sha256()
        for tensor in (self.pixels, self.labels, self.ids):
            if tensor is not None:
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[Images]:
        """The split in order, `size` samples at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            labels = None if self.labels is None else self.labels[start : start + size]
            yield Images(self.pixels[start : start + size], labels, self.ids[start : start + size])

    @property
    def known_labels(self) -> Tensor:
        """The labels, for code that cannot do without.

        Raises:
            DataError: the split has none.
        """
        if self.labels is None:
            raise DataError(
                "this split has no labels",
                "accuracy and the label loss need them",
                "use labelled images, or --soft-weight 1",
            )
        return self.labels


def joined(labelled: Images, unlabelled: Images) -> Images:
    """Both one after the other; those without a label have `losses.UNLABELLED` in its place."""
    labels = torch.full_like(unlabelled.ids, UNLABELLED)
    pixels = torch.cat([labelled.pixels, unlabelled.pixels])
    ids = torch.cat([labelled.ids, unlabelled.ids])
    return Images(pixels, torch.cat([labelled.known_labels, labels]), ids)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images of one source, with their class names."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    augment: str = "none"
    """The policy of views that suits these images (see `views.POLICIES`)."""

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return int(self.train.pixels.shape[1])

    @property
    def image_size(self) -> int:
        """The shorter side of the images in pixels."""
        return int(min(self.train.pixels.shape[2:]))

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def fingerprint(self) -> str:
        """SHA-256 of classes, pixels, labels and splits: equal exactly when the data are equal."""
        digests = [split.digest for split in (self.train, self.val, self.test)]
        return hashlib.sha256(repr((self.classes, digests)).encode()).hexdigest()

    @cached_property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training pixels by channel, in [0, 1], to six digits."""
        counts = torch.zeros(self.channels, 256, dtype=torch.float64)
        for batch in self.train.batches(1024):  # counts of bytes: exact, and small for images of any size
            for channel, pixels in enumerate(batch.pixels.transpose(0, 1)):
                counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
        share = counts / counts.sum(dim=1, keepdim=True)
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ level
        std = (share @ level.square() - mean.square()).clamp(min=1e-8).sqrt()
        # Rounded, so that a card and a library key are the same on every machine.
        return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())

    def limit_train(self, count: int) -> Dataset:
        """The same data with the first `count` training images of a fixed stratified draw."""
        if count >= len(self.train):
            return self
        if count < len(self.classes):
            raise DataError(
                f"cannot train on {count} images",
                f"the data has {len(self.classes)} classes, and each needs an image",
                f"say --limit-train {len(self.classes)} or more",
            )
        kept, _ = stratified_split(self.train.known_labels, len(self.train) - count, seed=0)
        return replace(self, train=self.train[kept])


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the samples kept and of `held_out` samples, drawn evenly from the classes.

    Raises:
        DataError: a class is too small to be divided.
    """
    try:
        kept, held = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=held_out,
            random_state=seed,
            stratify=labels.cpu().numpy(),
        )
    except ValueError as error:
        raise DataError(
            f"cannot hold {held_out} of {len(labels)} images out for validation or test",
            "every class needs at least two images, and the held-out part one of each class",
            "add images to the smallest classes (`ekd data` counts them), or remove those classes",
        ) from error
    return torch.from_numpy(kept).sort().values, torch.from_numpy(held).sort().values


def hold_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training images in two: those to train on, and a stratified `fraction` for validation."""
    classes = len(images.known_labels.unique())
    count = max(classes, round(len(images) * fraction))
    kept, held = stratified_split(images.known_labels, count, seed)
    return images[kept], images[held]


def check_labels(labels: Tensor, classes: Iterable[str], where: str) -> None:
    """Refuse labels that name no class.

    Raises:
        DataError: a label lies outside 0 … C − 1.
    """
    count = len(tuple(classes))
    wrong = ((labels < 0) | (labels >= count)).nonzero().flatten()
    if len(wrong):
        raise DataError(
            f"{where}: {len(wrong)} label(s) outside 0…{count - 1}, the first is {int(labels[wrong[0]])}"
            f" at image {int(wrong[0])}",
            f"the data has {count} classes",
            "mend the labels, or name all the classes",
        )
