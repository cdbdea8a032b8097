"""A folder of images, one subfolder a class: what is in it, what is wrong with it, and its pixels."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ensemble_kd.console import log, progress
from ensemble_kd.data.archives import is_archive, unpacked
from ensemble_kd.data.dataset import Images, stratified_split
from ensemble_kd.data.headers import is_grey, look_at
from ensemble_kd.data.streams import FilePixels, Files, decoders, shortened
from ensemble_kd.device import available_memory
from ensemble_kd.errors import DataError, Problem, listing, nearest, nearest_path

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_DEFAULT_SIZE = 224
DECODE = ("auto", "once", "always")
"""Into memory if there is plenty of it, into memory, or afresh in every pass."""
_BLOCK = 256  # files that a thread looks at, or decodes, at a time
_PLENTY, _MOST = 0.5, 0.8  # of the free memory, that images may take by themselves, and when told to


@dataclass
class Folder:
    """The files of an image folder by split, with class names and everything found wrong."""

    root: Path
    classes: tuple[str, ...] = ()
    files: dict[str, Files] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    """Of the files, by split; unlabelled ones have none."""
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
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
        raise DataError(f"no image folder at {path}", why, nearest_path(path) or f"name {wanted}")
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
        _list_split(name, where, folder)
    read_headers(folder)
    return folder


def _class_folders(where: Path, folder: Folder) -> list[str]:
    names = sorted(entry.name for entry in where.iterdir() if entry.is_dir())
    hidden = [name for name in names if name.startswith((".", "__"))]
    if hidden:
        folder.warnings.append(
            Problem(f"{where}: left out {listing(hidden)}", "hidden folders are not classes")
        )
    for name in names:
        if not _is_text(name):
            folder.errors.append(
                Problem(
                    f"the name of the class folder {os.fsencode(name)!r} in {where} is no UTF-8",
                    "no file that names the classes could be written",
                    "rename the folder",
                )
            )
    return [name for name in names if name not in hidden]


def _is_text(name: str) -> bool:
    """Whether the bytes of a file's name are UTF-8."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


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


def _list_split(name: str, where: Path, folder: Folder) -> None:
    """Enter the files of a split, and their labels, class by class."""
    if name in ("val", "test"):
        _compare_classes(where, folder)
    names: list[str] = []
    counts = []
    for cls in folder.classes:
        found = list(image_names(folder.root, f"{'' if name == 'all' else f'{name}/'}{cls}"))
        if not found and name in ("train", "all"):
            folder.errors.append(
                Problem(
                    f"class {cls!r} in {where} has no images",
                    f"known endings: {', '.join(sorted(EXTENSIONS))}",
                    "add images, or remove the folder",
                )
            )
        names += found
        counts.append(len(found))
    if not names and name in ("val", "test"):
        folder.errors.append(
            Problem(
                f"{where} has no images",
                f"known endings: {', '.join(sorted(EXTENSIONS))}",
                "add images, or remove the folder",
            )
        )
    folder.files[name] = Files.of(folder.root, names)
    folder.labels[name] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def _compare_classes(where: Path, folder: Folder) -> None:
    """The class folders of a split beside those of the training split."""
    index, known = set(folder.classes), set(_class_folders(where, folder))
    if extra := sorted(known - index):
        folder.errors.append(
            Problem(
                f"{where} has classes that train/ lacks: {listing(extra)}",
                "a student cannot learn them",
                "add them to train/, or remove them",
            )
        )
    if missing := sorted(index - known):
        folder.warnings.append(
            Problem(
                f"{where} lacks the classes {listing(missing)}",
                "labels follow the names in train/, so the other classes keep theirs",
            )
        )


def image_names(root: Path, below: str = "") -> Iterator[str]:
    """Names of the images at any depth below a folder in `root`, relative to `root` and sorted by their parts.

    Images are told by their endings; hidden files, and files in hidden folders, are none. Where there is
    no such folder, there are none.

    Raises:
        DataError: a folder cannot be read.
    """
    found = []
    try:
        with os.scandir(root / below) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__")):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found.append((entry.name, True))
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and not entry.is_dir():
                    found.append((entry.name, False))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(
            f"cannot read the folder {root / below}",
            error.strerror or str(error),
            "make it readable, or remove it",
        ) from error
    for name, is_folder in sorted(found):
        path = f"{below}/{name}" if below else name
        if is_folder:
            yield from image_names(root, path)
        else:
            yield path


def read_headers(folder: Folder) -> None:
    """Sizes and modes of all images, and the files that are none."""
    broken: list[Problem] = []
    modes: set[str] = set()
    blocks = [(files, start) for files in folder.files.values() for start in range(0, len(files), _BLOCK)]
    with progress("reading headers", sum(map(len, folder.files.values()))) as advance, decoders() as pool:
        read = pool.map(lambda block: _headers(*block), blocks)
        for (files, start), (shapes, seen, problems) in zip(blocks, read, strict=True):
            folder.shapes.update(shapes)
            modes |= seen
            broken += problems
            advance(min(_BLOCK, len(files) - start))
    folder.grey = all(map(is_grey, modes))
    folder.errors += shortened(broken)


def _headers(files: Files, start: int) -> tuple[Counter[tuple[int, int]], set[str], list[Problem]]:
    """(width, height) by count, modes and problems of a block of files; enters their lengths and dates."""
    shapes: Counter[tuple[int, int]] = Counter()
    modes, problems = set(), []
    for position in range(start, min(start + _BLOCK, len(files))):
        try:
            with files.open(position) as file:
                shape, mode = look_at(file)
                shapes[shape] += 1
                modes.add(mode)
                if files.inside is None:
                    facts = os.fstat(file.fileno())
                    files.lengths[position], files.changed[position] = facts.st_size, facts.st_mtime_ns
        except Exception as error:  # Pillow's decoders raise many kinds
            problems.append(files.problem(position, error))
    return shapes, modes, problems


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
    pixels = np.empty((len(files), *_pixel_shape(folder, size)), dtype=np.uint8)
    broken: list[Problem] = []

    def work(start: int) -> list[Problem]:
        block = range(start, min(start + _BLOCK, len(files)))
        found = (files.read(position, pixels[position]) for position in block)
        return [problem for problem in found if problem]

    with progress(f"decoding {split}", len(files)) as advance, decoders() as pool:
        starts = range(0, len(files), _BLOCK)
        for start, found in zip(starts, pool.map(work, starts), strict=True):
            broken += found
            advance(min(_BLOCK, len(files) - start))
    if broken:
        folder.errors += shortened(broken)
        raise DataError(folder.errors)
    return _labelled(folder, split, torch.from_numpy(pixels), first_id)


def left_in_files(folder: Folder, split: str, size: tuple[int, int], first_id: int = 0) -> Images:
    """The same images as `decode` gives, each decoded when it is asked for."""
    return _labelled(folder, split, FilePixels.of(folder.files[split], _pixel_shape(folder, size)), first_id)


def _pixel_shape(folder: Folder, size: tuple[int, int]) -> tuple[int, int, int]:
    return (1 if folder.grey else 3, *size)


def _labelled(folder: Folder, split: str, pixels: Tensor | FilePixels, first_id: int) -> Images:
    return Images(pixels, folder.labels.get(split), torch.arange(first_id, first_id + len(pixels)))


def load_scanned(
    folder: Folder, test_fraction: float, size: int | None, how: str = "auto"
) -> tuple[Images, Images | None, Images, tuple[str, ...]]:
    """(train, val or None, test, class names) of what was found.

    `val/` beside `test/` is the validation split; `val/` alone is the test split, as for ImageNet. `how`
    images are decoded is one of `DECODE`.

    Raises:
        DataError: with everything that is wrong.
    """
    folder.check()
    shape = (size, size) if size else default_size(folder)
    take = left_in_files if stays_in_files(folder, shape, how) else decode
    splits, first_id = {}, 0
    for name in folder.files:
        splits[name] = take(folder, name, shape, first_id)
        first_id += len(splits[name])
    if "train" in splits and len(splits) > 1:
        test = splits.pop("test") if "test" in splits else splits.pop("val")
        return splits["train"], splits.get("val"), test, folder.classes
    images = splits.get("train") or splits["all"]
    held_out = max(len(folder.classes), round(len(images) * test_fraction))
    kept, held = stratified_split(images.known_labels, held_out, seed=0)
    return images[kept], None, images[held], folder.classes


def check_choice(how: str) -> None:
    """Refuse a way to decode that is none.

    Raises:
        DataError: it is not one of `DECODE`.
    """
    if how not in DECODE:
        known = f"known are {', '.join(DECODE)}"
        raise DataError(f"unknown way to decode {how!r}", known, nearest(how, DECODE) or "leave it out")


def stays_in_files(folder: Folder, size: tuple[int, int], how: str) -> bool:
    """Whether images are decoded afresh in every pass, rather than into memory at once.

    Raises:
        DataError: they are wanted in memory, and do not fit into it; or there is no such choice.
    """
    check_choice(how)
    count, root = sum(map(len, folder.files.values())), folder.root
    needed, free = count * math.prod(_pixel_shape(folder, size)), available_memory()
    if how == "always" or free is None:
        return how == "always"
    sizes = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if how == "auto" and needed >= _PLENTY * free:
        log.info(
            "the images of %s are decoded afresh in every pass: in memory they would take %s", root, sizes
        )
        return True
    if needed > _MOST * free:
        raise DataError(
            f"the images of {root} do not fit into memory",
            f"decoded they take {sizes}",
            "decode them afresh in every pass: --set decode=always, or smaller: --image-size 64",
        )
    return False
