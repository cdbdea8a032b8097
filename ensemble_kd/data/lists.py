"""Images that a CSV file lists with their labels, and with their splits where it names them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ensemble_kd.data.folders import Folder, read_headers
from ensemble_kd.data.labels import Label, enter_labels
from ensemble_kd.data.streams import Files, shortened
from ensemble_kd.errors import DataError, Problem, listing, nearest
from ensemble_kd.errors import shortened as cut
from ensemble_kd.files import readable

SPLITS = ("train", "val", "test")
MOST_OF_LIST = 1 << 30
"""Bytes of a list: some ten million lines."""
_COLUMNS = ("path", "label", "split")
_HEADER = "begin the file with a line path,label or path,label,split"


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


def scan_csv(path: Path) -> Folder:
    """The images that a CSV file lists: columns `path` and `label`, and `split` with train, val or test.

    Paths are relative to the file's folder, with slashes, and stay in it; other columns mean nothing. Without the
    column `split` the images are split later. Classes are the labels of the training images, sorted.

    Raises:
        DataError: the file cannot be read as such a list; of all else, problems are listed.
    """
    rows = _rows(path)
    folder = Folder(path.parent)
    folder.errors += shortened(_problems(path, rows), "lines that cannot be used")
    if folder.errors:
        return folder
    for name in (*SPLITS, "all"):
        names = [row.path for row in rows if row.split == name]
        if names:
            folder.files[name] = Files.of(
                path.parent, names, f"mend the path, or take its line out of {path}"
            )
    _check_splits(path, folder)
    if folder.errors:
        return folder
    read_headers(folder)
    whole = all(_is_number(row.label) for row in rows)
    labels: dict[str, list[Label]] = {
        name: [int(row.label) if whole else row.label for row in rows if row.split == name]
        for name in folder.files
    }
    enter_labels(labels, folder, "images", "leave these out")
    return folder


def _is_number(label: str) -> bool:
    """Whether it is a whole number as Python writes it, so that 1 and 01 stay two labels."""
    return label.isascii() and label.isdigit() and len(label) < 10 and label == str(int(label))


def _rows(path: Path) -> list[_Row]:
    what, fix = f"cannot read the list {path}", "name a CSV file with the columns path and label"
    if not path.is_file():
        why = "it is no file" if path.exists() else "there is nothing at that path"
        raise DataError(what, why, fix)
    if (size := path.stat().st_size) > MOST_OF_LIST:
        why = f"it has {readable(size)}, and at most {readable(MOST_OF_LIST)} are read"
        raise DataError(what, why, "pack the images into shards: tars:PATH")
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            places = _places(path, next(lines, []))
            for line in lines:
                if any(line):
                    rows.append(_row(path, lines.line_num, line, places))
    except OSError as error:
        raise DataError(what, error.strerror or str(error), "make it readable") from error
    except UnicodeDecodeError as error:
        raise DataError(what, "it is no UTF-8 text", "save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{what}, line {lines.line_num}", str(error), "mend that line") from error
    if not rows:
        raise DataError(f"{path} lists no images", "there is no line below the names of the columns", fix)
    return rows


def _places(path: Path, header: list[str]) -> tuple[dict[str, int], int]:
    """Where the columns are that mean something, and how many there are."""
    names = [name.strip() for name in header]
    shown = cut(", ".join(names)) or "nothing"
    missing = [name for name in _COLUMNS[:2] if name not in names]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", f"its first line is {shown}", _HEADER)
    twice = [name for name in _COLUMNS if names.count(name) > 1]
    if twice:
        raise DataError(
            f"{path} has two columns {twice[0]!r}", f"its first line is {shown}", "keep one of them"
        )
    return {name: names.index(name) for name in _COLUMNS if name in names}, len(names)


def _row(path: Path, number: int, line: list[str], places: tuple[dict[str, int], int]) -> _Row:
    columns, count = places
    if len(line) != count:
        raise DataError(
            f"cannot read the list {path}, line {number}",
            f"it has {len(line)} values for {count} columns",
            "mend that line: values with commas in them stand in double quotes",
        )
    values = {name: line[place].strip() for name, place in columns.items()}
    return _Row(number, values["path"], values["label"], values.get("split", "all"))


def _problems(path: Path, rows: list[_Row]) -> Iterator[Problem]:
    """What is wrong with single lines."""
    seen: dict[str, int] = {}
    for row in rows:
        for what, why, fix in _wrong(row):
            yield Problem(f"{path}, line {row.line}: {what}", why, fix)
        first = seen.setdefault(str(PurePosixPath(row.path)), row.line)
        if first != row.line and row.path:
            what = f"{path}, line {row.line}: {cut(row.path)!r} is listed twice"
            yield Problem(what, f"line {first} has it too", "keep one of the lines")


def _wrong(row: _Row) -> Iterator[tuple[str, str, str]]:
    if not row.path:
        yield "the path is empty", "every line names an image", "name one, or take the line out"
    elif row.path.startswith("/") or ".." in PurePosixPath(row.path).parts or "\0" in row.path:
        yield (
            f"{cut(row.path)!r} points out of the folder of the list",
            "paths are relative to it, and stay in it",
            "put the list above its images",
        )
    if not row.label:
        yield "the label is empty", "every line names a class", "name one, or take the line out"
    if row.split not in (*SPLITS, "all"):
        hint = nearest(row.split, SPLITS) or "name one of these, or take the line out"
        yield f"there is no split {cut(row.split)!r}", f"known are {', '.join(SPLITS)}", hint


def _check_splits(path: Path, folder: Folder) -> None:
    names = list(folder.files)
    if "train" not in names and names != ["all"]:
        folder.errors.append(
            Problem(
                f"{path} lists no training images",
                f"its splits are {listing(names)}",
                "say train in the column split, or leave that column out",
            )
        )
    elif names == ["train"]:
        folder.warnings.append(
            Problem(f"{path} lists neither test nor val", "a part of train is held out as the test split")
        )
