"""Data sets of Hugging Face's `datasets`: from the hub, or from files of its formats on this machine.

Images are taken as their bytes and decoded here, as those of image folders are; no code of a data set is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd.data.folders import Folder, read_headers
from ensemble_kd.data.labels import enter_labels
from ensemble_kd.data.streams import Files, shortened
from ensemble_kd.errors import DataError, Problem, listing, nearest
from ensemble_kd.errors import shortened as cut
from ensemble_kd.files import cache_dir, readable

if TYPE_CHECKING:
    import datasets
    import pyarrow

_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
_KINDS = ("parquet", "arrow", "imagefolder", "webdataset", "json", "csv", "cache")
"""Readers of `datasets` that are used; others could unpickle, or run programs."""
_MOST_OF_IMAGE = 1 << 28
_FIX = "take its row out of the data set"
_ENDINGS = {".parquet": "parquet", ".arrow": "arrow"}


def scan_hf(place: str, columns: Sequence[str] | None = None, offline: bool = False) -> Folder:
    """The images of a data set: a name on the hub, or a folder or file that `datasets` reads, also of `save_to_disk`.

    Args:
        place: PATH_OR_NAME, or with a configuration NAME:CONFIG.
        columns: those of images and labels; None takes the only ones of those kinds.
        offline: never ask the hub.

    Raises:
        DataError: there is no such data set, or it has no images with labels. Of all else, problems are listed.
    """
    splits = _load(place, offline)
    folder = Folder(Path(place))
    labels = {}
    for name, split in _named(place, splits, folder).items():
        image, label = _columns(place, split, columns)
        table = _plain(split, image)
        folder.files[name] = _files(place, name, table.column(image), split)
        labels[name], named = _labels(
            place, name, table.column(label).to_pylist(), split.features[label], folder
        )
    if folder.errors:
        return folder
    read_headers(folder)
    enter_labels(labels, folder, "images", "leave these out", ("the data set", named) if named else None)
    return folder


def _load(place: str, offline: bool) -> dict[str, datasets.Dataset]:
    """The splits by name; a lone table is called `all`."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"hf:{place} cannot be read", f"{error.name} is not installed", "pip install 'ensemble-kd[hf]'"
        ) from error
    path = Path(place).expanduser()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs comes as an error too
    try:
        with _hub_left_alone(offline):
            if path.exists():
                return _from_files(place, path)
            name, _, part = place.partition(":")
            builder = datasets.load_dataset_builder(name, part or None)
            return _prepared(place, builder)
    except DataError:
        raise
    except ConnectionError as error:
        raise _not_there(place, offline) from error
    except Exception as error:  # of many kinds, from the readers of many formats
        why = cut(" ".join(f"{error}".split())) or type(error).__name__
        raise DataError(
            f"cannot load hf:{place}", why, "name a data set of images, or another configuration"
        ) from error


@contextmanager
def _hub_left_alone(offline: bool) -> Iterator[None]:
    """While entered with `offline`, neither `datasets` nor the hub's own library asks anybody."""
    import datasets
    import huggingface_hub

    places = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(*place) for place in places]
    try:
        for module, name in places:
            setattr(module, name, offline or getattr(module, name))
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _not_there(place: str, offline: bool) -> DataError:
    what = f"the data set hf:{place} is not on this machine"
    if offline:
        why, fix = "--offline forbids to download it", "run once without --offline, or name a folder"
    else:
        why, fix = (
            "there is no such path, and the hub cannot be reached",
            "mend the path, or try again with a network",
        )
    return DataError(what, why, fix)


def _from_files(place: str, path: Path) -> dict[str, datasets.Dataset]:
    import datasets

    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        found = datasets.load_from_disk(str(path))
        return dict(found) if isinstance(found, datasets.DatasetDict) else {"all": found}
    kept = str(cache_dir() / "datasets")
    if path.is_dir():
        builder = datasets.load_dataset_builder(str(path), cache_dir=kept)
    elif kind := _ENDINGS.get(path.suffix.lower()):
        builder = datasets.load_dataset_builder(kind, data_files={"rows": str(path)}, cache_dir=kept)
    else:
        why = f"it is no folder, and no {' or '.join(_ENDINGS)}"
        raise DataError(
            f"cannot load hf:{place}", why, "name a folder of such files, or one that save_to_disk made"
        )
    return _prepared(place, builder)


def _prepared(place: str, builder: datasets.DatasetBuilder) -> dict[str, datasets.Dataset]:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _KINDS:
        why = f"it is read by {kind!r}, and what is read is of {', '.join(_KINDS[:-1])}"
        raise DataError(f"cannot load hf:{place}", why, "convert it to parquet")
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _named(place: str, splits: dict[str, datasets.Dataset], folder: Folder) -> dict[str, datasets.Dataset]:
    """The splits by our names, in the order train, val, test; `all` where there is a single one."""
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise DataError(f"hf:{place} is empty", "it has no rows", "name a data set of images")
    if len(splits) == 1 and "train" not in splits:
        return {"all": next(iter(splits.values()))}
    found: dict[str, Any] = {}
    for name in sorted(
        splits, key=lambda name: list(_SPLITS.values()).index(_SPLITS[name]) if name in _SPLITS else 9
    ):
        if name in _SPLITS and _SPLITS[name] not in found:
            found[_SPLITS[name]] = splits[name]
    left = [name for name, split in splits.items() if split not in found.values()]
    if left:
        why = f"known splits are {', '.join(_SPLITS)}"
        folder.warnings.append(Problem(f"hf:{place}: left out {listing(left)}", why))
    if "train" not in found:
        raise DataError(
            f"hf:{place} has no training images",
            f"its splits are {listing(splits)}",
            "call one of them train",
        )
    if len(found) == 1:
        folder.warnings.append(
            Problem(
                f"hf:{place} has neither test nor validation images",
                "a part of train is held out as the test split",
            )
        )
    return found


def _columns(place: str, split: datasets.Dataset, wanted: Sequence[str] | None) -> tuple[str, str]:
    """The columns of images and of labels."""
    import datasets

    names = list(split.features)
    if wanted is not None:
        for name in wanted:
            if name not in names:
                hint = nearest(name, names) or "name one of these"
                raise DataError(f"hf:{place} has no column {name!r}", f"it has {listing(names)}", hint)
        if len(wanted) != 2:
            why = "they are that of the images and that of the labels"
            raise DataError(
                f"data_columns: {len(wanted)} are named, not two", why, "say --set data_columns=image,label"
            )
        return wanted[0], wanted[1]
    images = [name for name in names if isinstance(split.features[name], datasets.Image)]
    labels = [name for name in names if isinstance(split.features[name], datasets.ClassLabel)]
    labels = [name for name in labels or names if name in ("label", "labels")] or labels
    if len(images) != 1 or len(labels) != 1:
        kind, found = ("images", images) if len(images) != 1 else ("labels", labels)
        raise DataError(
            f"hf:{place}: which column has the {kind}?",
            f"{f'it could be {listing(found)}' if found else 'none is known to'}; there are {listing(names)}",
            "say --set data_columns=image,label with their names",
        )
    return images[0], labels[0]


def _plain(split: datasets.Dataset, image: str) -> pyarrow.Table:
    """The rows as they are kept, with the bytes of images."""
    import datasets

    if isinstance(split.features[image], datasets.Image):
        split = split.cast_column(image, datasets.Image(decode=False))
    return split.with_format("arrow")[:]


def _files(place: str, name: str, column: pyarrow.ChunkedArray, split: datasets.Dataset) -> Files:
    rows = Rows(column, _allowed(place))
    lengths = np.array([rows.length(row) for row in range(len(column))], dtype=np.int64)
    # What `datasets` knows these rows by, from its files' names and dates or the hub's commit.
    known = int(split._fingerprint[:15], 16)
    changed = np.full(len(column), known, dtype=np.int64)
    names = [f"{name}/{row}" for row in range(len(column))]
    return Files(Path(place), names, lengths, changed, rows, _FIX)


def _allowed(place: str) -> tuple[str, ...]:
    """Folders that rows may name files in."""
    import datasets
    import huggingface_hub

    path = Path(place).expanduser()
    folders = [
        cache_dir(),
        datasets.config.HF_DATASETS_CACHE,
        huggingface_hub.constants.HF_HUB_CACHE,
        *([path] if path.is_dir() else []),
    ]
    return tuple(os.path.realpath(folder) for folder in folders)


class Rows:
    """The images of a column, which holds their bytes, or the paths of files in certain folders."""

    def __init__(self, column: pyarrow.ChunkedArray, folders: tuple[str, ...]) -> None:
        self._column, self._folders = column, folders

    def length(self, position: int) -> int:
        """Bytes of an image; 0 where there are none."""
        try:
            data = self._bytes(position)
            return len(data) if data is not None else os.path.getsize(self._path(position))
        except OSError:
            return 0

    def read(self, position: int, start: int, length: int) -> bytes:
        """`length` bytes of an image, from its byte `start` on.

        Raises:
            OSError: there is no image, or a file of one cannot be read.
        """
        if length > _MOST_OF_IMAGE:
            raise OSError(f"it has {readable(length)}, and at most {readable(_MOST_OF_IMAGE)} are read")
        data = self._bytes(position)
        if data is not None:
            return data[start : start + length].to_pybytes()
        with open(self._path(position), "rb") as file:
            file.seek(start)
            return file.read(length)

    def _bytes(self, position: int) -> pyarrow.Buffer | None:
        value: Any = self._column[position]
        if hasattr(value, "keys"):
            value = value["bytes"] if value.is_valid else value
        found = value.as_buffer() if value.is_valid and hasattr(value, "as_buffer") else None
        return found

    def _path(self, position: int) -> str:
        value: Any = self._column[position].as_py()
        path = value.get("path") if isinstance(value, dict) else None
        if not path:
            raise OSError("the row has no image")
        real = os.path.realpath(path)
        if not any(os.path.commonpath([real, folder]) == folder for folder in self._folders):
            raise OSError(
                f"the row names a file outside of the data set, where save_to_disk would take it: {cut(path)}"
            )
        if not os.path.isfile(real):
            raise OSError(f"the row names a file that is not there: {cut(path)}")
        return real


def _labels(
    place: str, name: str, values: list[Any], feature: Any, folder: Folder
) -> tuple[list[int | str], tuple[str, ...] | None]:
    """The labels of a split, and the names of all classes where the data set has them."""
    names = tuple(feature.names) if getattr(feature, "names", None) else None
    missing = [row for row, value in enumerate(values) if value is None or value == ""]
    folder.errors += shortened(
        (
            Problem(f"hf:{place}: row {row} of {name} has no label", "every image needs a class", _FIX)
            for row in missing
        ),
        "rows without a label",
    )
    odd = next(
        (v for v in values if v is not None and (isinstance(v, bool) or not isinstance(v, (int, str)))), None
    )
    if odd is not None:
        raise DataError(
            f"hf:{place}: {cut(repr(odd))} is no label",
            f"labels are whole numbers or texts, and the column is of {type(odd).__name__}",
            "name another column: --set data_columns=image,label",
        )
    return values, names
