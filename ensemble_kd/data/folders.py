"""A folder of images, one subfolder a class: what is in it, what is wrong with it, and its pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ensemble_kd.console import log, progress
from ensemble_kd.data.archives import is_archive, unpacked
from ensemble_kd.data.dataset import Images, stratified_split
from ensemble_kd.errors import DataError, Problem, listing

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_DEFAULT_SIZE = 224
_ORIENTATION = 0x0112  # the tag in EXIF
_BLOCK = 256  # images that a thread decodes at a time


@dataclass
class Folder:
    """The files of an image folder by split, with class names and everything found wrong."""

    root: Path
    classes: tuple[str, ...] = ()
    files: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    shapes: dict[tuple[int, int], int] = field(default_factory=dict)
    """How many images have which (width, height)."""
    grey: bool = False

    def check(self) -> None:
        """Log the warnings; raise all errors together."""
        for problem in self.warnings:
            log.warning("%s", problem)
        if self.errors:
            raise DataError(self.errors)


def open_folder(path: Path, wanted: str = "a folder with one subfolder a class") -> Path:
    """The folder itself, or that of an archive's content; `wanted` says what a better path would be.

    Raises:
        DataError: there is no such folder or archive.
    """
    if path.is_file() and is_archive(path):
        return _inner(unpacked(path))
    if not path.is_dir():
        why = "it is a file, and no .tar or .zip" if path.exists() else "there is nothing at that path"
        raise DataError(f"no image folder at {path}", why, f"name {wanted}")
    return path


def _inner(folder: Path) -> Path:
    """The only folder in an unpacked archive, which is often packed with the folder around the images."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__"))]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def scan(path: Path) -> Folder:
    """List the images of all splits and look into each file's header.

    `train/` with `test/` or `val/` (or all three) are taken as they are; without `train/` the folder
    itself holds the classes and is split later. Class indices follow the sorted names in `train/`,
    so a split that lacks a class shifts nothing.
    """
    root = open_folder(path)
    folder = Folder(root)
    splits = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in splits:
        splits = {"all": root}
    elif len(splits) == 1:
        folder.warnings.append(
            Problem(f"{root} has neither test/ nor val/", "a part of train/ is held out as the test split")
        )
    first = splits.get("train", root)
    folder.classes = tuple(_class_folders(first, folder))
    _check_classes(first, folder)
    for name, where in splits.items():
        folder.files[name] = _list_split(name, where, folder)
    read_headers(folder)
    return folder


def _class_folders(where: Path, folder: Folder) -> list[str]:
    names = sorted(entry.name for entry in where.iterdir() if entry.is_dir())
    hidden = [name for name in names if name.startswith((".", "__"))]
    if hidden:
        folder.warnings.append(
            Problem(f"{where}: left out {listing(hidden)}", "hidden folders are not classes")
        )
    return [name for name in names if name not in hidden]


def _check_classes(where: Path, folder: Folder) -> None:
    if not folder.classes:
        folder.errors.append(
            Problem(
                f"{where} has no class folders",
                "images are expected as CLASS/NAME.jpg",
                "make one subfolder a class, or name the folder above",
            )
        )
    elif len(folder.classes) == 1:
        folder.errors.append(
            Problem(
                f"{where} has one class only: {folder.classes[0]!r}",
                "there is nothing to tell apart",
                "add a second class folder, or name the folder above",
            )
        )


def _list_split(name: str, where: Path, folder: Folder) -> list[tuple[Path, int]]:
    index = {cls: i for i, cls in enumerate(folder.classes)}
    if name in ("val", "test"):
        known = set(_class_folders(where, folder))
        if extra := sorted(known - index.keys()):
            folder.errors.append(
                Problem(
                    f"{where} has classes that train/ lacks: {listing(extra)}",
                    "a student cannot learn them",
                    "add them to train/, or remove them",
                )
            )
        if missing := sorted(index.keys() - known):
            folder.warnings.append(
                Problem(
                    f"{where} lacks the classes {listing(missing)}",
                    "labels follow the names in train/, so the other classes keep theirs",
                )
            )
    files = []
    for cls, label in index.items():
        if not (where / cls).is_dir():
            continue
        paths = sorted(p for p in (where / cls).rglob("*") if is_image(p, where))
        if not paths and name in ("train", "all"):
            folder.errors.append(
                Problem(
                    f"class {cls!r} in {where} has no images",
                    f"known endings: {', '.join(sorted(EXTENSIONS))}",
                    "add images, or remove the folder",
                )
            )
        files += [(path, label) for path in paths]
    if not files and name in ("val", "test"):
        folder.errors.append(
            Problem(
                f"{where} has no images",
                f"known endings: {', '.join(sorted(EXTENSIONS))}",
                "add images, or remove the folder",
            )
        )
    return files


def is_image(path: Path, where: Path) -> bool:
    """By its ending; hidden files, and files in hidden folders, are none."""
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(where).parts)
    return path.suffix.lower() in EXTENSIONS and not hidden and not path.is_dir()


def read_headers(folder: Folder) -> None:
    """Sizes and modes of all images, and the files that are none."""
    paths = [path for files in folder.files.values() for path, _ in files]
    broken: list[Problem] = []
    grey = True
    with progress("reading headers", len(paths)) as advance, _pool() as pool:
        for block in pool.map(_headers, _blocks(paths)):
            for path, size, mode, why in block:
                if why:
                    broken.append(Problem(f"cannot read {path}", why, "replace or delete the file"))
                else:
                    folder.shapes[size] = folder.shapes.get(size, 0) + 1
                    grey = grey and (mode in ("1", "L") or mode.startswith("I;16"))
            advance(len(block))
    folder.grey = grey
    _add_broken(folder, broken)


def _add_broken(folder: Folder, broken: list[Problem]) -> None:
    folder.errors += broken[:10]
    if len(broken) > 10:
        folder.errors.append(Problem(f"and {len(broken) - 10} more files that cannot be read"))


def _headers(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, int], str, str]]:
    rows = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                    raise Image.DecompressionBombError
                turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                rows.append((path, image.size[::-1] if turned else image.size, image.mode, ""))
        except Exception as error:  # Pillow's decoders raise many kinds
            rows.append((path, (0, 0), "", _why_broken(path, error)))
    return rows


def _why_broken(path: Path, error: Exception) -> str:
    if not path.exists():
        return "it is a link to a file that is not there"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "it has so many pixels that it could exhaust the memory"
    head = path.read_bytes()[:256].lstrip().lower()
    if not head:
        return "the file is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, saved under an image's name"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows"
    return str(error) or type(error).__name__


def default_size(folder: Folder) -> tuple[int, int]:
    """(height, width) to decode to: the images' own if all agree, else a square of the median side.

    Neither is larger than a square of 224 pixels; `image_size` asks for more.
    """
    if len(folder.shapes) == 1:
        width, height = next(iter(folder.shapes))
        if width * height <= MAX_DEFAULT_SIZE**2:
            return height, width
    sides = [min(size) for size, count in folder.shapes.items() for _ in range(count)]
    side = min(MAX_DEFAULT_SIZE, int(median(sides)))
    return side, side


def decode(folder: Folder, split: str, size: tuple[int, int], first_id: int = 0) -> Images:
    """Decode one split into a uint8 tensor, all images resized to cover `size` and cut in the middle.

    Raises:
        DataError: files are damaged.
    """
    files = folder.files[split]
    channels = 1 if folder.grey else 3
    pixels = np.empty((len(files), channels, *size), dtype=np.uint8)
    broken: list[Problem] = []
    starts = range(0, len(files), _BLOCK)

    def work(start: int) -> list[Problem]:
        block = files[start : start + _BLOCK]
        return _decode_block([path for path, _ in block], pixels[start : start + _BLOCK])

    with progress(f"decoding {split}", len(files)) as advance, _pool() as pool:
        for found in pool.map(work, starts):
            broken += found
            advance(_BLOCK)
    if broken:
        _add_broken(folder, broken)
        raise DataError(folder.errors)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    ids = torch.arange(first_id, first_id + len(files))
    return Images(torch.from_numpy(pixels), labels, ids)


def _decode_block(paths: Sequence[Path], out: np.ndarray) -> list[Problem]:
    channels, height, width = out.shape[1:]
    broken = []
    for path, target in zip(paths, out, strict=True):
        try:
            with Image.open(path) as image:
                upright = _eight_bits(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
            if upright.size != (width, height):
                upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
            target[:] = np.asarray(upright).reshape(height, width, channels).transpose(2, 0, 1)
        except Exception as error:  # Pillow's decoders raise many kinds
            broken.append(
                Problem(f"cannot read {path}", _why_broken(path, error), "replace or delete the file")
            )
    return broken


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image in `mode`; 16-bit grey is scaled, where Pillow alone would clip it."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image.convert(mode)


def load_folder(
    path: Path, test_fraction: float, size: int | None
) -> tuple[Images, Images | None, Images, tuple[str, ...]]:
    """(train, val or None, test, class names) of an image folder.

    `val/` beside `test/` is the validation split; `val/` alone is the test split, as for ImageNet.
    """
    folder = scan(path)
    folder.check()
    shape = (size, size) if size else default_size(folder)
    check_memory(folder, shape)
    splits, first_id = {}, 0
    for name in folder.files:
        splits[name] = decode(folder, name, shape, first_id)
        first_id += len(splits[name])
    if "train" in splits and len(splits) > 1:
        test = splits.pop("test") if "test" in splits else splits.pop("val")
        return splits["train"], splits.get("val"), test, folder.classes
    images = splits.get("train") or splits["all"]
    held_out = max(len(folder.classes), round(len(images) * test_fraction))
    kept, held = stratified_split(images.known_labels, held_out, seed=0)
    return images[kept], None, images[held], folder.classes


def check_memory(folder: Folder, size: tuple[int, int]) -> None:
    """Refuse a folder whose images do not fit into the memory.

    Raises:
        DataError: they do not.
    """
    count, root = sum(map(len, folder.files.values())), folder.root
    needed, free = count * (1 if folder.grey else 3) * size[0] * size[1], _available_memory()
    if free is not None and needed > 0.8 * free:
        raise DataError(
            f"the images of {root} do not fit into memory",
            f"decoded they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "decode them smaller: --image-size 64",
        )


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say (it is Linux that does)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1)


def _blocks(paths: Sequence[Path]) -> list[Sequence[Path]]:
    return [paths[start : start + _BLOCK] for start in range(0, len(paths), _BLOCK)]
