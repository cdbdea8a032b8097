"""Data: sources by name, splits, and views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ensemble_kd.console import log
from ensemble_kd.data.copies import copies
from ensemble_kd.data.dataset import Dataset, Images, check_labels, hold_out
from ensemble_kd.data.folders import Folder, check_choice, load_scanned, scan
from ensemble_kd.data.hf import scan_hf
from ensemble_kd.data.lists import scan_csv
from ensemble_kd.data.sources import SOURCES
from ensemble_kd.data.tars import scan_tars
from ensemble_kd.errors import DataError, nearest

__all__ = ["Dataset", "Images", "load_data"]

FOLDER, TARS, CSV, HF = "imagefolder:", "tars:", "csv:", "hf:"


def scanned(source: str, columns: Sequence[str] | None = None, offline: bool = False) -> Folder | None:
    """What is in the files that a source names by their place; None for all other sources.

    Raises:
        DataError: there is nothing at that place, or `columns` are given for a source that has none.
    """
    if source.startswith(HF):
        return scan_hf(source.removeprefix(HF), columns, offline)
    if columns is not None:
        raise DataError(
            f"{source} has no columns to choose",
            "data_columns names those of hf:NAME",
            "leave data_columns out",
        )
    if source.startswith(FOLDER):
        return scan(Path(source.removeprefix(FOLDER)).expanduser())
    if source.startswith(CSV):
        return scan_csv(Path(source.removeprefix(CSV)).expanduser())
    return scan_tars(source.removeprefix(TARS)) if source.startswith(TARS) else None


def load_data(
    source: str = "digits",
    *,
    root: str | Path | None = None,
    split: float = 0.2,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    image_size: int | None = None,
    limit_train: int | None = None,
    offline: bool = False,
    decode: str = "auto",
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Load a source, with a validation split held out of its training images.

    Args:
        source: a name of `SOURCES`, `imagefolder:PATH` for a folder or archive of images, `tars:PATH` for a
            folder or pattern of .tar shards (see `tars.scan_tars`), `csv:FILE` (see
            `lists.scan_csv`), or `hf:NAME` (see `hf.scan_hf`).
        root: where the files of a named source lie, or are downloaded to.
        split: the part of an image folder without `train/` that becomes the test split.
        val_fraction: the part of the training images that is held out, stratified by class.
        split_seed: fixes which images those are.
        image_size: decode the images of a folder to squares of this side.
        limit_train: train on this many images only (after holding out), drawn evenly from the classes.
        offline: never download.
        decode: the images of a folder or of shards `once`, into memory; `always`, afresh in every pass, with
            memory for a few batches; or `auto`, into memory where they take less than half of what is free.
        columns: of `hf:` sources, those of images and labels; None takes the only ones of those kinds.

    Raises:
        DataError: with everything that is wrong with the source.
    """
    check_choice(decode)
    path = Path(root).expanduser() if root is not None else None
    found = scanned(source, columns, offline)
    if found is not None:
        train, val, test, classes = load_scanned(found, split, image_size, decode)
        augment = "crop-flip"
    elif source in SOURCES:
        loader, augment = SOURCES[source]
        train, test, classes = loader(path, offline)
        val = None
    else:
        hint = nearest(source, SOURCES)
        raise DataError(
            f"unknown data source {source!r}",
            f"known are {', '.join(SOURCES)}, {FOLDER}PATH, {TARS}PATH, {CSV}FILE and {HF}NAME",
            hint or f"for a folder of images say {FOLDER}{source}",
        )
    for part, name in ((train, "train"), (test, "test"), (val, "val")):
        if part is not None:
            check_labels(part.known_labels, classes, f"{source}, {name}")
    if val is None:
        train, val = hold_out(train, val_fraction, split_seed)
    dataset = Dataset(source, classes, train, val, test, augment)
    dataset = dataset.limit_train(limit_train) if limit_train else dataset
    for problem in copies(dataset) if found else ():
        log.warning("%s", problem)
    return dataset
