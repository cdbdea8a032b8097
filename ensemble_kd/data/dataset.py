"""Images by split: a uint8 tensor batched by indexing, or files that are decoded batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from ensemble_kd.console import log
from ensemble_kd.data import views
from ensemble_kd.data.streams import FilePixels
from ensemble_kd.errors import DataError
from ensemble_kd.losses import UNLABELLED

MEASURED = 20_000
"""Images in files that mean and deviation are taken from, where there are more: a sample is close enough."""
WINDOW = 16
"""Shards whose images are mixed with each other, where they are read in every pass."""
_BLOCK = 256


@dataclass(frozen=True)
class Images:
    """One split: uint8 `pixels` (N, C, H, W), int64 `labels` (N,) or None, int64 `ids` (N,).

    An id names a sample within its source, whatever split it falls into; views depend on it. Where the
    images stay in files, `pixels` are `FilePixels`; those of batches are always a tensor.
    """

    pixels: Tensor | FilePixels
    labels: Tensor | None
    ids: Tensor
    partner_labels: Tensor | None = None
    """Of the images that are mixed into these, where they are."""
    share: Tensor | None = None
    """Float (N,): how much of each mixed image is the first one."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> Images:
        """The samples at positions `index`; images in files stay there."""
        pixels = self.pixels
        if isinstance(pixels, FilePixels):
            return self._with(pixels.subset(index), itemgetter(index))
        # Whole images are copied at once; indexing would go pixel by pixel on a CPU.
        picked = pixels[index] if index.dtype == torch.bool else pixels.index_select(0, index)
        return self._with(picked, itemgetter(index))

    def to(self, device: torch.device | str) -> Images:
        """The same split on another device; images in files are put there when they are decoded."""
        return self._with(self.pixels.to(device), lambda values: values.to(device))

    def _with(self, pixels: Tensor | FilePixels, change: Callable[[Tensor], Tensor]) -> Images:
        """Other pixels, and the rest of the fields changed alike."""
        optional = (self.labels, self.partner_labels, self.share)
        labels, partner_labels, share = (None if values is None else change(values) for values in optional)
        return Images(pixels, labels, change(self.ids), partner_labels, share)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels, labels and ids; for files, of their names, lengths and dates in place of pixels."""
        digest = hashlib.sha256()
        for values in (self.pixels, self.labels, self.ids):
            if isinstance(values, FilePixels):
                for part in values.identify():
                    digest.update(part)
            elif values is not None:
                digest.update(repr(tuple(values.shape)).encode())
                digest.update(values.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def decoded(self) -> Tensor:
        """The pixels as a tensor (N, C, H, W): those of a batch as they are, of a split in files all of them."""
        return self.pixels if isinstance(self.pixels, Tensor) else self.pixels[:]

    def fetch(self, chunks: Iterable[Tensor]) -> Iterator[Images]:
        """The samples at each chunk of positions in turn, their pixels as a tensor.

        Images in files are decoded a few batches ahead; see `FilePixels.stream`.

        Raises:
            DataError: a file cannot be read.
        """
        if isinstance(self.pixels, FilePixels):
            return self._streamed(self.pixels, chunks)
        return (self[chunk] for chunk in chunks)

    def _streamed(self, files: FilePixels, chunks: Iterable[Tensor]) -> Iterator[Images]:
        with closing(files.stream(chunks)) as stream:
            for chunk, pixels in stream:
                yield self._with(pixels, itemgetter(chunk))

    def batches(self, size: int) -> Iterator[Images]:
        """The split in order, `size` samples at a time; the last batch may be smaller."""
        positions = torch.arange(len(self), device=self.ids.device)
        return self.fetch(positions.split(size) if len(self) else ())

    def order(self, seed: int, epoch: int) -> Tensor:
        """All positions in the order of an epoch, int64 (N,): a function of seed and epoch.

        Images in shards come from `WINDOW` shards at a time (see `hashing.blocked_order`), so that what is
        read lies close together.
        """
        blocks = self.pixels.blocks if isinstance(self.pixels, FilePixels) else None
        if blocks is None:
            return views.order(seed, epoch, len(self), self.ids.device)
        return views.blocked_order(seed, epoch, blocks, WINDOW, self.ids.device)

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
    ids = torch.cat([labelled.ids, unlabelled.ids])
    pixels = _joined_pixels(labelled.pixels, unlabelled.pixels)
    return Images(pixels, torch.cat([labelled.known_labels, labels]), ids)


def _joined_pixels(first: Tensor | FilePixels, second: Tensor | FilePixels) -> Tensor | FilePixels:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    one, other = (FilePixels.holding(p) if isinstance(p, Tensor) else p for p in (first, second))
    return one.followed_by(other)


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
    def decode(self) -> str:
        """`always` where images stay in files, `once` where they are in memory (see `load_data`)."""
        return "always" if isinstance(self.train.pixels, FilePixels) else "once"

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
        moved = replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))
        if "mean_and_std" in vars(self):  # not to be measured again, which takes a while for files
            vars(moved)["mean_and_std"] = self.mean_and_std
        return moved

    def fingerprint(self) -> str:
        """SHA-256 of classes, pixels, labels and splits: equal exactly when the data are equal.

        Of images in files, names, lengths and dates are taken for their pixels; see `Images.digest`.
        """
        digests = [split.digest for split in (self.train, self.val, self.test)]
        return hashlib.sha256(repr((self.classes, digests)).encode()).hexdigest()

    @cached_property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training pixels by channel, in [0, 1], to six digits.

        Of more than `MEASURED` images in files, that many are looked at, chosen by hash.
        """
        counts = torch.zeros(self.channels, 256, dtype=torch.float64)
        for batch in self._sample().batches(_BLOCK):
            # Counts of bytes: exact, and small for images of any size.
            for channel, pixels in enumerate(batch.decoded.transpose(0, 1)):
                counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
        share = counts / counts.sum(dim=1, keepdim=True)
        level = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ level
        std = (share @ level.square() - mean.square()).clamp(min=1e-8).sqrt()
        # Rounded, so that a card and a library key are the same on every machine.
        return tuple(round(v, 6) for v in mean.tolist()), tuple(round(v, 6) for v in std.tolist())

    def _sample(self) -> Images:
        count = len(self.train)
        if isinstance(self.train.pixels, Tensor) or count <= MEASURED:
            return self.train
        log.info(
            "mean and deviation are those of %s of the %s training images", f"{MEASURED:,}", f"{count:,}"
        )
        hashed = views.order(0, 0, count)
        return self.train[hashed[torch.arange(MEASURED) * count // MEASURED].sort().values]

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
