"""Data sets of Hugging Face's `datasets`, made by the package itself; and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from spoiled import ekd
from support import logged, refused

from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.data.inspect import inspect_data
from ensemble_kd.distillation import distill
from ensemble_kd.errors import DataError
from ensemble_kd.files import read_json

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("empty_folder", "own_cache")
ROW = "take its row out of the data set"
SIDE = (9, 8)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIDE, 3), dtype=np.uint8))


def png(image: Image.Image, ending: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=ending, **options)
    return buffer.getvalue()


def rows(seeds: range, names: Any = ("dog", "cat"), images: list[Any] | None = None, **columns: Any) -> Any:
    """A table of pictures; labels by turns, of a ClassLabel, or as they are given."""
    labels = columns.pop("labels", [seed % 2 for seed in seeds])
    kind = {"label": datasets.ClassLabel(names=list(names))} if names else {}
    images = images or [{"bytes": png(picture(seed)), "path": None} for seed in seeds]
    table = {"image": images, "label": labels, **columns}
    plain = {name: datasets.Value("string") for name in columns}
    features = datasets.Features({"image": datasets.Image(), **kind, **plain}) if names else None
    made = datasets.Dataset.from_dict(table, features=features)
    return made if names else made.cast_column("image", datasets.Image())


def save(form: str, **splits: Any) -> str:
    """The place of these splits in one of the forms that `datasets` writes."""
    if form == "disk":
        datasets.DatasetDict(splits).save_to_disk("there")
    elif form == "folder":
        for name, split in splits.items():
            for number, row in enumerate(split.cast_column("image", datasets.Image(decode=False))):
                path = Path("there", name, split.features["label"].int2str(row["label"]), f"{number:03d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row["image"]["bytes"])
    else:
        Path("there").mkdir()
        for name, split in splits.items():
            split.to_parquet(f"there/{name}-00000-of-00001.parquet")
    return "there"


def load(place: str, **options: Any) -> Dataset:
    return load_data(f"hf:{place}", **options)


def pixels(seeds: list[int]) -> np.ndarray:
    return np.stack([np.asarray(picture(seed)).transpose(2, 0, 1) for seed in seeds])


@pytest.mark.parametrize("decode", ["once", "always"])
@pytest.mark.parametrize("form", ["disk", "parquet", "folder"])
def test_images_and_labels_are_those_that_were_saved(form, decode):
    place = save(form, train=rows(range(20)), validation=rows(range(20, 24)), test=rows(range(30, 36)))
    data = load(place, decode=decode)
    if form == "folder":  # sorted by class, whose names are sorted
        assert data.classes == ("cat", "dog")
        order = [seed for kind in (1, 0) for seed in range(30, 36) if seed % 2 == kind]
    else:
        assert data.classes == ("dog", "cat")
        order = list(range(30, 36))
    assert data.test.decoded.numpy().tolist() == pixels(order).tolist()
    names = [data.classes[label] for label in data.test.known_labels.tolist()]
    assert names == [("dog", "cat")[seed % 2] for seed in order]
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 4, 6]
    assert data.decode == decode
    assert data.fingerprint() == load(place, decode=decode).fingerprint()


def test_a_single_table_is_split_and_the_only_validation_split_is_the_test_split():
    rows(range(40)).save_to_disk("one")
    rows(range(40)).to_parquet("one.parquet")
    for place in ("one", "one.parquet"):
        assert [len(part) for part in (load(place).train, load(place).val, load(place).test)] == [29, 3, 8]
    save("disk", train=rows(range(20)), validation=rows(range(20, 24)), extra=rows(range(30, 36)))
    with logged() as lines:
        data = load("there")
    assert data.test.decoded.numpy().tolist() == pixels(list(range(20, 24))).tolist()
    assert lines == [
        "WARNING: hf:there: left out extra\n  why: known splits are train, validation, valid, val, dev, test"
    ]
    facts = inspect_data("hf:there")
    assert (facts["errors"], facts["file_sizes"]) == ([], {"8×9": 24})


@pytest.mark.parametrize(("labels", "classes"), [
    (["b", "a"] * 10, ("a", "b")), ([10, 9] * 10, ("9", "10")),
])  # fmt: skip
def test_labels_without_names_are_classes_sorted(labels, classes):
    save(
        "parquet",
        train=rows(range(20), None, labels=labels),
        test=rows(range(20, 24), None, labels=labels[:4]),
    )
    data = load("there")
    assert (data.classes, data.test.known_labels.tolist()) == (classes, [1, 0, 1, 0])


def test_columns_are_chosen():
    table = rows(range(20)).rename_columns({"image": "picture", "label": "fine"})
    more = table.add_column("coarse", [0, 1] * 10).cast_column(
        "coarse", datasets.ClassLabel(names=["x", "y"])
    )
    save("disk", train=more, test=more.select(range(8)))
    fix = "say --set data_columns=image,label with their names"
    with refused(
        DataError, "hf:there: which column has the labels?",
        "it could be fine, coarse; there are picture, fine, coarse", fix,
    ):  # fmt: skip
        load("there")
    assert load("there", columns=["picture", "coarse"]).classes == ("x", "y")
    with refused(
        DataError, "hf:there has no column 'coars'", "it has picture, fine, coarse", "did you mean 'coarse'?"
    ):
        load("there", columns=["picture", "coars"])
    with refused(
        DataError, "data_columns: 1 are named, not two", "they are that of the images and that of the labels",
        "say --set data_columns=image,label",
    ):  # fmt: skip
        load("there", columns=["picture"])
    with refused(
        DataError,
        "digits has no columns to choose",
        "data_columns names those of hf:NAME",
        "leave data_columns out",
    ):
        load_data("digits", columns=["image", "label"])
    result = ekd("data", "hf:there", "--set", "data_columns=picture,fine", "--sheet", "x.png", "--json")
    assert (result.exit_code, json.loads(result.stdout)["classes"]) == (0, ["dog", "cat"])


def test_distilling_runs_on_images_that_stay_in_their_table():
    save("parquet", train=rows(range(16)), test=rows(range(20, 24)))
    result = distill(
        "lenet",
        "lenet",
        data="hf:there",
        epochs=1,
        teacher_epochs=1,
        decode="always",
        image_size=8,
        out="run",
    )
    assert 0 <= result.metrics["models"]["student"]["accuracy"]["value"] <= 1
    assert read_json(Path("run/status.json"))["state"] == "finished"


# What is refused


@pytest.mark.parametrize(("offline", "why", "fix"), [
    (True, "--offline forbids to download it", "run once without --offline, or name a folder"),
    (False, "there is no such path, and the hub cannot be reached", "mend the path, or try again with a network"),
])  # fmt: skip
def test_a_name_that_only_the_hub_knows(offline, why, fix):
    for place in ("nobody/nothing", "nobody/nothing:small"):
        with refused(DataError, f"the data set hf:{place} is not on this machine", why, fix):
            load(place, offline=offline)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused(
        DataError, "hf:there cannot be read", "datasets is not installed", "pip install 'ensemble-kd[hf]'"
    ):
        load("there")


DEEP = np.linspace(0, 65535, 72).round().astype(np.uint16).reshape(8, 9)
BAD = {
    "web page": (b"<html>404</html>", "it is a web page, saved under an image's name"),
    "text": (b"hello", "it is no image that Pillow knows"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n", "it is no image that Pillow knows"),
    "32 bits": (png(Image.new("F", (9, 9)), "TIFF"),
                "its grey has 32 bits, of which none is known to be white: save it with 8 or 16"),
    "empty": (b"", "the file is empty"),
    "none": (None, "the row has no image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_named(case):
    data, why = BAD[case]
    good = [{"bytes": png(picture(seed)), "path": None} for seed in range(7)]
    bad = None if data is None else {"bytes": data, "path": None}
    save("parquet", train=rows(range(8), images=[*good[:3], bad, *good[3:]]), test=rows(range(20, 24)))
    with refused(DataError, "cannot read there/train/3", why, ROW):
        load("there")


def test_a_bomb_and_a_truncated_image_are_named(monkeypatch):
    cut = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)))[
        :9000
    ]
    images = [{"bytes": png(picture(seed)), "path": None} for seed in range(7)]
    save(
        "disk", train=rows(range(8), images=[*images, {"bytes": cut, "path": None}]), test=rows(range(20, 24))
    )
    with refused(DataError, "cannot read there/train/7", "image file is truncated", ROW):
        load("there", decode="once")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with refused(
        DataError, "cannot read there/train/7", "it has so many pixels that it could exhaust the memory", ROW
    ):
        load("there")


def test_a_row_names_no_file_outside_of_the_data_set():
    picture(0).save("x.png")
    for path, why in (
        (
            str(Path("x.png").resolve()),
            f"the row names a file outside of the data set, where save_to_disk would take it: {Path('x.png').resolve()}",
        ),
        (
            "/dev/zero",
            "the row names a file outside of the data set, where save_to_disk would take it: /dev/zero",
        ),
        (
            str(Path("there/no.png").resolve()),
            f"the row names a file that is not there: {Path('there/no.png').resolve()}",
        ),
    ):
        images = [{"bytes": png(picture(1)), "path": None}] * 7 + [{"bytes": None, "path": path}]
        # Not by save_to_disk, which would read the file itself.
        Path("there").mkdir(exist_ok=True)
        table = rows(range(8), images=images).cast_column("image", datasets.Image(decode=False))
        features = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                    "label": datasets.ClassLabel(names=["a", "b"])}  # fmt: skip
        table.cast(datasets.Features(features)).to_parquet("there/train-0.parquet")
        with refused(DataError, "cannot read there/train/7", why, ROW):
            load("there", columns=["image", "label"])


def test_deep_grey_is_scaled_and_turned_photos_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray((DEEP // 257).astype(np.uint8))
    for name, data, upright in (
        ("deep", png(Image.fromarray(DEEP)), np.round(DEEP / 257)),
        ("turned", png(turned, exif=exif), np.rot90(np.asarray(turned), -1)),
    ):
        rows(range(20), images=[{"bytes": data, "path": None}] * 20).to_parquet(f"{name}.parquet")
        data = load(f"{name}.parquet")
        assert data.channels == 1
        assert data.train.decoded[0, 0].numpy().tolist() == upright.tolist()


LABELS = {
    "none": ([0, 1, None, 1], ("a", "b"), "hf:there: row 2 of train has no label", "every image needs a class", ROW),
    "outside": ([0, 1, 5, 1], None, "the label 5 of there/test/2 is no class",
                "no training image has that label, so a student cannot learn it",
                "add such images to the training images, or leave these out"),
    "hidden": ([0, 1, -1, 1], ("a", "b"), "the label -1 of there/train/2 is no class",
               "the data set names 2 classes, 0…1", "mend the label, or name the class"),
    "float": ([0.5, 1.0, 2.0, 1.0], None, "hf:there: 0.5 is no label",
              "labels are whole numbers or texts, and the column is of float",
              "name another column: --set data_columns=image,label"),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_a_bad_label_is_named(case):
    labels, names, what, why, fix = LABELS[case]
    good = rows(range(4), names, labels=[0, 1, 0, 1])
    bad = rows(range(4), names, labels=labels)
    save("disk", **({"train": good, "test": bad} if case == "outside" else {"train": bad, "test": good}))
    with refused(DataError, what, why, fix):
        load("there")


def test_other_places_are_refused_and_no_code_of_a_data_set_runs():
    fix = "name a data set of images, or another configuration"
    Path("empty").mkdir()
    with pytest.raises(DataError) as caught:
        load("empty")
    assert caught.value.problems[0].what == "cannot load hf:empty"
    assert caught.value.problems[0].fix == fix
    Path("file.txt").write_text("x")
    with refused(
        DataError, "cannot load hf:file.txt", "it is no folder, and no .parquet or .arrow",
        "name a folder of such files, or one that save_to_disk made",
    ):  # fmt: skip
        load("file.txt")
    Path("texts").mkdir()
    Path("texts/train.txt").write_text("x")
    with refused(
        DataError, "cannot load hf:texts",
        "it is read by 'text', and what is read is of parquet, arrow, imagefolder, webdataset, json, csv", "convert it to parquet",
    ):  # fmt: skip
        load("texts")
    Path("code").mkdir()
    Path("code/code.py").write_text("open('ran', 'w')\n")
    Path("code/x.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(DataError):
        load("code")
    assert not Path("ran").exists()
    Path("bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError) as caught:
        load("bad.parquet")
    assert caught.value.problems[0].what == "cannot load hf:bad.parquet"
    rows(range(4), None, labels=["x"] * 4).remove_columns("image").to_parquet("no.parquet")
    with refused(
        DataError, "hf:no.parquet: which column has the images?", "none is known to; there are label",
        "say --set data_columns=image,label with their names",
    ):  # fmt: skip
        load("no.parquet")


def test_splits_without_training_images_and_empty_ones():
    save("disk", test=rows(range(4)), validation=rows(range(4)))
    with refused(
        DataError,
        "hf:there has no training images",
        "its splits are test, validation",
        "call one of them train",
    ):
        load("there")
