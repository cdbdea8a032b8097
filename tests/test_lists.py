"""Lists of images in CSV files: the images of a folder, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from spoiled import ekd, image, pets, write
from support import logged, message, refused
from torch import Tensor

from ensemble_kd.data import lists, load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.data.inspect import inspect_data
from ensemble_kd.data.streams import FilePixels
from ensemble_kd.distillation import distill
from ensemble_kd.errors import DataError
from ensemble_kd.files import read_json

pytestmark = pytest.mark.usefixtures("empty_folder")
HEADER = "begin the file with a line path,label or path,label,split"
LINE = "name one, or take the line out"


def listed(split: bool = True, name: str = "pets/list.csv", **options: Any) -> None:
    """A list of the images in `pets`, by their folders SPLIT/CLASS."""
    paths = sorted(path.relative_to("pets") for path in Path("pets").rglob("*.png"))
    with Path(name).open("w", newline="", **options) as file:
        rows = csv.writer(file)
        rows.writerow(["label", "path", *(["split"] if split else []), "note"])
        for path in paths:
            rows.writerow([path.parts[1], path, *([path.parts[0]] if split else []), "a, b"])


def load(name: str = "pets/list.csv", **options: Any) -> Dataset:
    return load_data(f"csv:{name}", **options)


@pytest.mark.parametrize("decode", ["once", "always"])
def test_pixels_labels_and_ids_are_those_of_the_folder(decode):
    pets("train/cat:4 train/dog:4 val/cat:2 val/dog:2 test/cat:2 test/dog:2")
    listed(encoding="utf-8-sig")
    mine, other = load(decode=decode), load_data("imagefolder:pets", decode=decode)
    assert mine.classes == other.classes == ("cat", "dog")
    assert isinstance(mine.train.pixels, FilePixels if decode == "always" else Tensor)
    for name in ("train", "val", "test"):
        one, two = getattr(mine, name), getattr(other, name)
        assert one.decoded.equal(two.decoded)
        assert one.known_labels.equal(two.known_labels)
        assert one.ids.equal(two.ids)
    assert mine.fingerprint() == other.fingerprint() or decode == "always"


def test_without_splits_they_are_made():
    pets("all/cat:20 all/dog:20")
    listed(split=False)
    data = load()
    assert [len(part) for part in (data.train, data.val, data.test)] == [29, 3, 8]
    facts = inspect_data("csv:pets/list.csv")
    assert (facts["errors"], facts["warnings"], facts["file_sizes"]) == ([], [], {"32×32": 40})


def test_whole_numbers_are_classes_in_their_order():
    pets("all/10:4 all/9:4")
    listed(split=False)
    assert load().classes == ("9", "10")
    write("pets/list.csv", Path("pets/list.csv").read_text().replace("9,all", "09,all"))
    assert load().classes == ("09", "10")


def test_distilling_on_a_list_runs():
    pets("train/cat:8 train/dog:8 test/cat:2 test/dog:2")
    listed()
    result = distill("lenet", "lenet", data="csv:pets/list.csv", epochs=1, teacher_epochs=1, out="run")
    assert 0 <= result.metrics["models"]["student"]["accuracy"]["value"] <= 1
    assert read_json(Path("run/status.json"))["state"] == "finished"


GOOD = "path,label,split\na.png,x,train\nb.png,y,train\n"
LINES = {
    "no path": (",x,train", "the path is empty", "every line names an image", LINE),
    "no label": ("c.png, ,train", "the label is empty", "every line names a class", LINE),
    "split": ("c.png,x,valid", "there is no split 'valid'", "known are train, val, test", "did you mean 'val'?"),
    "no split": ("c.png,x,", "there is no split ''", "known are train, val, test",
                 "name one of these, or take the line out"),
    "twice": ("./a.png,y,test", "'./a.png' is listed twice", "line 2 has it too", "keep one of the lines"),
    "up": ("../c.png,x,train", "'../c.png' points out of the folder of the list",
           "paths are relative to it, and stay in it", "put the list above its images"),
    "absolute": ("/etc/passwd,x,train", "'/etc/passwd' points out of the folder of the list",
                 "paths are relative to it, and stay in it", "put the list above its images"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_refused(case):
    line, what, why, fix = LINES[case]
    image("a.png")
    image("b.png")
    write("l.csv", f"{GOOD}{line}\n")
    with refused(DataError, f"l.csv, line 4: {what}", why, fix):
        load("l.csv")


FILES = {
    "": ("l.csv has no column 'path'", "its first line is nothing", HEADER),
    "image,label\n": ("l.csv has no column 'path'", "its first line is image, label", HEADER),
    "path,class\n": ("l.csv has no column 'label'", "its first line is path, class", HEADER),
    "path,label,path\n": ("l.csv has two columns 'path'", "its first line is path, label, path", "keep one of them"),
    "path,label\n\n": ("l.csv lists no images", "there is no line below the names of the columns",
                       "name a CSV file with the columns path and label"),
    "path,label\na.png\n": ("cannot read the list l.csv, line 2", "it has 1 values for 2 columns",
                            "mend that line: values with commas in them stand in double quotes"),
    'path,label\na.png,"x\n': ("cannot read the list l.csv, line 2", "unexpected end of data", "mend that line"),
    f"path,label\na.png,{'x' * 200_000}\n": ("cannot read the list l.csv, line 2", "field larger than field limit (131072)",
                                            "mend that line"),
    b"path,label\n\xff,x\n": ("cannot read the list l.csv", "it is no UTF-8 text", "save it as CSV in UTF-8"),
    "path,label,split\na.png,x,test\n": ("l.csv lists no training images", "its splits are test",
                                         "say train in the column split, or leave that column out"),
    "path,label\na.png,x\n": (". has one class only: 'x'", "there is nothing to tell apart",
                              "add images with a second class"),
    f"{GOOD}c.png,z,test\n": ("the label 'z' of c.png is no class",
                              "no training image has that label, so a student cannot learn it",
                              "add such images to the training images, or leave these out"),
    f"{GOOD}d.png,y,test\n": ("cannot read d.png", "the file is gone", "mend the path, or take its line out of l.csv"),
    f"{GOOD}p.jpg,y,test\n": ("cannot read p.jpg", "it is a web page, saved under an image's name",
                              "mend the path, or take its line out of l.csv"),
    f"{GOOD}l.csv,y,test\n": ("cannot read l.csv", "it is no image that Pillow knows",
                              "mend the path, or take its line out of l.csv"),
    f"{GOOD}folder,y,test\n": ("cannot read folder", "Is a directory", "mend the path, or take its line out of l.csv"),
}  # fmt: skip


@pytest.mark.parametrize("content", FILES, ids=lambda value: repr(value[:40]))
def test_a_bad_list_is_refused(content):
    for name in "abc":
        image(f"{name}.png")
    write("p.jpg", "<html>")
    Path("folder").mkdir()
    write("l.csv", content)
    with refused(DataError, *FILES[content]):
        load("l.csv")


def test_places_without_a_list(monkeypatch):
    fix = "name a CSV file with the columns path and label"
    Path("folder").mkdir()
    for name, why in (("nothing.csv", "there is nothing at that path"), ("folder", "it is no file")):
        with refused(DataError, f"cannot read the list {name}", why, fix):
            load(name)
    write("l.csv", GOOD)
    monkeypatch.setattr(lists, "MOST_OF_LIST", 10)
    why = f"it has {len(GOOD)} B, and at most 10 B are read"
    with refused(DataError, "cannot read the list l.csv", why, "pack the images into shards: tars:PATH"):
        load("l.csv")


def test_all_that_is_wrong_is_told_and_many_are_counted():
    write("l.csv", "path,label\n" + ",\n" + "".join(f"{n}.png,\n" for n in range(600)))
    result = ekd("data", "csv:l.csv", "--sheet", "x.png")
    assert result.exit_code == 2
    assert "the label is empty" in result.stdout + result.stderr
    told = inspect_data("csv:l.csv")["errors"]
    assert len(told) == 11
    assert told[0] == message("l.csv, line 3: the label is empty", "every line names a class", LINE)
    assert told[10] == "and 590 more lines that cannot be used"


def test_a_list_without_test_images_and_copies_between_splits_are_told():
    pets("train/cat:6 train/dog:6")
    listed()
    with logged() as lines:
        load()
    assert [line.partition("\n")[0] for line in lines] == [
        "WARNING: pets/list.csv lists neither test nor val"
    ]
    Path("pets/copy.png").write_bytes(Path("pets/train/cat/0.png").read_bytes())
    with Path("pets/list.csv").open("a") as file:
        file.write("cat,copy.png,test,\n")
    with logged() as lines:
        load(val_fraction=0.2)
    assert lines[0].startswith("WARNING: 1 of the 1 test images of csv:pets/list.csv are training images too")
