"""Shards of images: which belong to which split, what their classes are, and what is wrong with them."""

from __future__ import annotations

import re
from glob import glob, has_magic
from itertools import chain
from os import path as os_path
from pathlib import Path

import numpy as np

from ensemble_kd.console import progress
from ensemble_kd.data.dataset import WINDOW
from ensemble_kd.data.folders import Folder
from ensemble_kd.data.labels import enter_labels
from ensemble_kd.data.shards import Shards
from ensemble_kd.data.streams import Files, decoders, shortened
from ensemble_kd.data.tar_index import Index, index_of
from ensemble_kd.errors import DataError, Problem, listing

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tar.zst")
"""Of compressed ones too, which are then refused by name."""
_SPLITS = ("train", "val", "test")
_NAMED = re.compile(rf"({'|'.join(_SPLITS)})(?![a-z])", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_MOST_SHARDS = 100_000
_CLASSES = "classes.txt"


def scan_tars(place: str) -> Folder:
    """The images of all splits in the shards at `place`: a folder, one .tar, or a pattern with `*` or `{a,b}`, `{0..9}`.

    Shards belong to a split by a folder train/, val/ or test/, or else by their names: `train-0001.tar`. Where
    none is named so, they are split later. `classes.txt` beside them names the classes, one a line;
    without it, classes are the labels in the training shards, sorted.

    Raises:
        DataError: there are no shards, or `classes.txt` cannot be used. Of all else, problems are listed.
    """
    root, shards = find_shards(place)
    folder = Folder(root)
    splits = _by_split(root, shards, folder)
    indexes = _indexes(shards, folder)
    if folder.errors:
        return folder
    for index in indexes.values():
        for width, height, count in index.shapes:
            folder.shapes[width, height] += count
    folder.grey = all(index.grey for index in indexes.values())
    for name, paths in splits.items():
        folder.files[name] = _files(root, {path: indexes[path] for path in paths})
    _warn_of_names(indexes, folder)
    labels = {
        name: list(chain.from_iterable(indexes[path].labels for path in paths))
        for name, paths in splits.items()
    }
    listed = root / _CLASSES
    named = _named_classes(listed)
    enter_labels(
        labels, folder, "shards", f"name all classes in {listed}", (_CLASSES, named) if named else None
    )
    _warn_of_sorted([indexes[path] for path in next(iter(splits.values()))], folder)
    return folder


def find_shards(place: str) -> tuple[Path, list[Path]]:
    """The folder that holds them all, and the shards in the order of their names.

    Raises:
        DataError: there are none, or one that a pattern names is missing.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        folders = [path, *(path / name for name in _SPLITS)]
        found = [
            shard for folder in folders if folder.is_dir() for shard in folder.iterdir() if _is_shard(shard)
        ]
        if not found:
            raise _no_shards(place, "the folder has no .tar, and neither have train/, val/ and test/ in it")
        return path, sorted(found)
    if path.is_file():
        return path.parent, [path]
    patterns = list(dict.fromkeys(_expanded(str(path), place)))
    if patterns == [str(path)] and not has_magic(str(path)):
        raise _no_shards(place, "there is nothing at that path")
    missing = [name for name in patterns if not has_magic(name) and not Path(name).is_file()]
    if missing:
        raise DataError(
            f"shards of {place} are not there: {listing(missing)}",
            f"the pattern names {len(patterns)}, and {len(missing)} of them are missing",
            "fetch them, or mend the pattern",
        )
    found = [Path(n) for pattern in patterns for n in (glob(pattern) if has_magic(pattern) else [pattern])]
    shards = sorted({shard for shard in found if shard.is_file()})
    if not shards:
        raise _no_shards(place, "no file fits the pattern")
    return Path(os_path.commonpath([shard.parent for shard in shards])), shards


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(_ENDINGS) and not path.name.startswith(".") and path.is_file()


def _no_shards(place: str, why: str) -> DataError:
    return DataError(
        f"no shards at {place}", why, "name a folder of .tar files, or a pattern such as train-*.tar"
    )


def _expanded(pattern: str, place: str) -> list[str]:
    """The patterns that braces stand for, as in a shell: `{a,b}` and `{000..146}`."""
    patterns = [pattern]
    while match := next((m for m in map(_BRACES.search, patterns) if m), None):
        inside = match[1]
        if bounds := _RANGE.fullmatch(inside):
            first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
            count = abs(last - first) + 1
        else:
            count = inside.count(",") + 1
        if count * len(patterns) > _MOST_SHARDS:
            raise _no_shards(place, f"the pattern names more than {_MOST_SHARDS:,} files")
        if bounds:
            numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            choices = [f"{number:0{width}d}" for number in numbers]
        else:
            choices = inside.split(",")
        patterns = [
            one.replace(match[0], choice, 1)
            for one in patterns
            for choice in (choices if match[0] in one else [""])
        ]
    return patterns


def _by_split(root: Path, shards: list[Path], folder: Folder) -> dict[str, list[Path]]:
    """The shards by split, in the order train, val, test; `all` where none is named."""
    splits: dict[str, list[Path]] = {name: [] for name in (*_SPLITS, "all")}
    for shard in shards:
        first, *rest = shard.relative_to(root).parts
        named = _NAMED.match(shard.name)
        splits[first if rest and first in _SPLITS else named[1].lower() if named else "all"].append(shard)
    found = {name: paths for name, paths in splits.items() if paths}
    if len(found) == 1 and "train" not in found:
        return {"all": shards}
    fix = "name them train-*.tar, val-*.tar and test-*.tar, or put them in train/, val/ and test/"
    if "all" in found:
        odd = listing([shard.relative_to(root) for shard in found["all"]], 3)
        why = "other shards are named by their split"
        folder.errors.append(Problem(f"{root}: it is not known which split {odd} belongs to", why, fix))
    elif "train" not in found:
        why = f"there are shards for {' and '.join(found)} only"
        folder.errors.append(Problem(f"{root} has no training shards", why, fix))
    elif len(found) == 1:
        folder.warnings.append(
            Problem(
                f"{root} has neither test nor val shards",
                "a part of the training images is held out as the test split",
            )
        )
    return found


def _indexes(shards: list[Path], folder: Folder) -> dict[Path, Index]:
    """The index of each shard; what is wrong with them becomes errors of the folder."""

    def work(shard: Path) -> Index | DataError:
        try:
            return index_of(shard)
        except DataError as error:
            return error

    found: dict[Path, Index] = {}
    problems: list[Problem] = []
    with progress("looking through shards", len(shards)) as advance, decoders() as pool:
        for shard, result in zip(shards, pool.map(work, shards), strict=True):
            if isinstance(result, DataError):
                problems += result.problems
            else:
                found[shard] = result
            advance(1)
    folder.errors += shortened(problems, "problems in the shards")
    return found


def _files(root: Path, indexes: dict[Path, Index]) -> Files:
    found, paths = list(indexes.values()), tuple(Path(os_path.abspath(path)) for path in indexes)
    names = [f"{path.relative_to(root)}/{name}" for path, index in indexes.items() for name in index.names]
    counts = [len(index.names) for index in found]
    shards = Shards(
        paths,
        np.array([index.length for index in found], dtype=np.int64),
        np.array([index.changed for index in found], dtype=np.int64),
        np.arange(len(found), dtype=np.int32).repeat(counts),
        np.fromiter(chain.from_iterable(index.offsets for index in found), np.int64),
    )
    lengths = np.fromiter(chain.from_iterable(index.lengths for index in found), np.int64)
    return Files(
        root,
        names,
        lengths,
        shards.changed.repeat(counts),
        shards,
        "start again, or pack the shard again without it",
    )


def _named_classes(path: Path) -> tuple[str, ...] | None:
    """The lines of `classes.txt`, where there is one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}", str(error), "write one class name a line, in UTF-8") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if not names or "" in names or twice:
        why = (
            "it is empty"
            if not names
            else "a line is empty"
            if "" in names
            else f"it has {listing(twice)} twice"
        )
        raise DataError(f"cannot use {path}", why, "write one class name a line, each once")
    return tuple(names)


def _warn_of_names(indexes: dict[Path, Index], folder: Folder) -> None:
    odd = [f"{path.name}/{name}" for path, index in indexes.items() for name in index.left_out]
    if odd:
        folder.warnings.append(
            Problem(
                f"{folder.root}: left out {listing(odd, 3)}",
                "a sample's key ends at the first dot of a name, and what follows is no image's ending",
            )
        )


def _warn_of_sorted(training: list[Index], folder: Folder) -> None:
    alone = sum(len(set(index.labels)) == 1 for index in training)
    if len(training) > WINDOW and 2 * alone > len(training) and len(folder.classes) > 1:
        folder.warnings.append(
            Problem(
                f"{folder.root}: {alone} of {len(training)} training shards have images of one class only",
                f"images are mixed within {WINDOW} shards at a time, so that batches miss most classes;"
                " pack the images in a random order, or say --set decode=once",
            )
        )
