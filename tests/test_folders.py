"""Folders and archives of images: what is read, what is refused, and how `ekd data` shows it."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import logged, message, refused
from typer.testing import CliRunner

from ensemble_kd.cli import app
from ensemble_kd.data import archives, folders, load_data
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.data.folders import EXTENSIONS, decode, scan
from ensemble_kd.data.inspect import inspect_data
from ensemble_kd.errors import DataError

SHADES = {"cat": 30, "dog": 120, "emu": 220}
"""Images of a class are of about one shade, so that pixels tell the class."""

ROTATIONS = {1: 0, 3: 2, 6: -1, 8: 1}
"""EXIF orientation → quarter turns to the left that make a stored image upright."""


def picture(path: Path, shade: int = 30, size: tuple[int, int] = (10, 8), mode: str = "L", **options) -> Path:
    """A noisy image of (width, height), different for each name and place."""
    rng = np.random.default_rng([shade, *"/".join(path.parts[-3:]).encode()])
    grey = np.clip(shade + rng.integers(-25, 26, size[::-1]), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).convert(mode).save(path, **options)
    return path


def make(root: Path, layout: str = "train/cat:8 train/dog:8 test/cat:3 test/dog:3", **options) -> Path:
    """A folder with so many images in each class folder."""
    for part in layout.split():
        folder, _, count = part.partition(":")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(int(count)):
            picture(root / folder / f"{number}.png", SHADES[Path(folder).name], **options)
    return root


def load(root: Path, **options) -> Dataset:
    return load_data(f"imagefolder:{root}", **options)


def errors_of(root: Path, **options) -> list[str]:
    """The problems that loading raises, each as a text."""
    with pytest.raises(DataError) as caught:
        load(root, **options)
    return [str(problem) for problem in caught.value.problems]


def unreadable(path: Path, why: str) -> str:
    return message(f"cannot read {path}", why, "replace or delete the file")


def shown_classes(data: Dataset, images: Images) -> set[tuple[str, str]]:
    """(class by its shade, class by its label) of all images: equal pairs mean right labels."""
    pairs = set()
    for pixels, label in zip(images.pixels, images.known_labels, strict=True):
        mean = float(pixels.float().mean())
        pairs.add((min(SHADES, key=lambda name: abs(SHADES[name] - mean)), data.classes[label]))
    return pairs


# --- Splits and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "options", "counts"),
    [
        ("train/cat:8 train/dog:8 test/cat:3 test/dog:2", {}, (14, 2, 5)),
        ("train/cat:8 train/dog:8 val/cat:3 val/dog:2", {}, (14, 2, 5)),
        ("train/cat:8 train/dog:8 val/cat:3 val/dog:2 test/cat:4 test/dog:4", {}, (16, 5, 8)),
        ("train/cat:10 train/dog:10", {}, (14, 2, 4)),
        ("cat:10 dog:10", {}, (14, 2, 4)),
        ("cat:10 dog:10", {"split": 0.5}, (8, 2, 10)),
        ("cat:20 dog:20", {"val_fraction": 0.25}, (24, 8, 8)),
    ],
)
def test_splits_follow_the_folders(tmp_path, layout, options, counts):
    data = load(make(tmp_path, layout), **options)
    parts = (data.train, data.val, data.test)
    assert tuple(len(part) for part in parts) == counts
    assert sorted(torch.cat([part.ids for part in parts]).tolist()) == list(range(sum(counts)))
    for part in parts:
        assert shown_classes(data, part) == {("cat", "cat"), ("dog", "dog")}


def test_val_alone_is_the_test_split_and_beside_test_the_validation_split(tmp_path):
    make(tmp_path / "two", "train/cat:8 train/dog:8 val/cat:3 val/dog:3")
    make(tmp_path / "three", "train/cat:8 train/dog:8 val/cat:3 val/dog:3 test/cat:4 test/dog:4")
    in_val = decode(scan(tmp_path / "two"), "val", (8, 10)).pixels
    assert load(tmp_path / "two").test.pixels.equal(in_val)
    in_val = decode(scan(tmp_path / "three"), "val", (8, 10)).pixels
    assert load(tmp_path / "three").val.pixels.equal(in_val)


def test_a_folder_without_a_test_split_is_split_the_same_way_each_time(tmp_path):
    make(tmp_path, "train/cat:10 train/dog:10")
    with logged() as lines:
        first, second = load(tmp_path), load(tmp_path, split_seed=1)
    assert first.test.ids.equal(second.test.ids)
    assert lines[0] == (
        f"WARNING: {tmp_path} has neither test/ nor val/\n"
        "  why: a part of train/ is held out as the test split"
    )


def test_classes_are_sorted_by_name_and_images_found_at_any_depth(tmp_path):
    make(tmp_path, "emu:0 cat:5 dog:5")
    for number in range(5):
        picture(tmp_path / "emu" / "2021" / "may" / f"{number}.PNG", SHADES["emu"])
    (tmp_path / "emu" / "notes.txt").write_text("no image")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog", "emu")
    assert len(data.train) + len(data.val) + len(data.test) == 15
    assert shown_classes(data, data.train) == {(name, name) for name in SHADES}


def test_a_hidden_folder_is_no_class_and_hidden_files_are_no_images(tmp_path):
    make(tmp_path)
    picture(tmp_path / "train" / ".ipynb_checkpoints" / "0.png")
    picture(tmp_path / "test" / "__MACOSX" / "0.png")
    plain = load(make(tmp_path / "plain"))
    with logged() as lines:
        data = load(tmp_path)
    assert lines == [
        f"WARNING: {tmp_path}/{split}: left out {name}\n  why: hidden folders are not classes"
        for split, name in (("train", ".ipynb_checkpoints"), ("test", "__MACOSX"))
    ]
    assert (data.classes, len(data.train), len(data.test)) == (plain.classes, 14, 6)


def test_copies_in_hidden_places_of_a_class_are_not_read(tmp_path):
    make(tmp_path)
    picture(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07 what a Mac leaves beside a file")
    data = load(tmp_path)
    assert len(data.train) + len(data.val) == 16


def test_a_class_that_the_test_split_lacks_shifts_no_label(tmp_path):
    make(tmp_path, "train/cat:8 train/dog:8 train/emu:8 test/dog:3 test/emu:3")
    with logged() as lines:
        data = load(tmp_path)
    assert lines == [
        f"WARNING: {tmp_path}/test lacks the classes cat\n"
        "  why: labels follow the names in train/, so the other classes keep theirs"
    ]
    assert data.test.known_labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert shown_classes(data, data.test) == {("dog", "dog"), ("emu", "emu")}


# --- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(("L", "L"), 1), (("1", "L"), 1), (("L", "RGB"), 3), (("RGB", "RGB"), 3), (("RGBA", "P"), 3)],
)
def test_only_an_all_grey_folder_has_one_channel(tmp_path, modes, channels):
    make(tmp_path, "cat:4", mode=modes[0])
    make(tmp_path, "dog:4", mode=modes[1])
    assert load(tmp_path).channels == channels


def test_grey_and_colour_pixels_are_those_of_the_files(tmp_path):
    for name, mode in (("grey", "L"), ("colour", "RGB")):
        make(tmp_path / name, mode=mode)
        folder = scan(tmp_path / name)
        images = decode(folder, "train", (8, 10))
        names = folder.files["train"].names
        for pixels, label, place in zip(images.pixels, images.known_labels, names, strict=True):
            with Image.open(folder.root / place) as image:
                stored = np.asarray(image).reshape(8, 10, -1)
            assert np.array_equal(pixels.permute(1, 2, 0), stored)
            assert folder.classes[label] == Path(place).parent.name


def test_sixteen_bit_grey_is_scaled_rather_than_clipped(tmp_path):
    make(tmp_path)
    values = np.linspace(0, 65535, 80).astype(np.uint16).reshape(8, 10)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(values).save(path)
    data = load(tmp_path)
    assert data.channels == 1
    assert np.abs(data.train.pixels[0, 0].numpy() - values / 257).max() <= 1


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([(10, 8), (10, 8)], {}, (8, 10)),
        ([(10, 8), (10, 8)], {"image_size": 6}, (6, 6)),
        ([(10, 8), (30, 20)], {}, (14, 14)),
        ([(10, 8), (30, 20)], {"image_size": 32}, (32, 32)),
        ([(300, 290), (310, 280)], {}, (224, 224)),
    ],
)
def test_equal_sizes_are_kept_and_others_become_squares(tmp_path, sizes, options, expected):
    make(tmp_path, "cat:4", size=sizes[0])
    make(tmp_path, "dog:4", size=sizes[1])
    data = load(tmp_path, **options)
    assert all(tuple(part.pixels.shape[2:]) == expected for part in (data.train, data.val, data.test))


def test_a_wide_image_is_cut_in_the_middle(tmp_path):
    make(tmp_path, "cat:4 dog:4")
    thirds = np.repeat(np.array([[0, 100, 200]], dtype=np.uint8), 10, axis=1).repeat(10, axis=0)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(thirds).save(path)
    assert set(load(tmp_path, image_size=10).train.pixels.unique().tolist()) == {100}


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("size", [(10, 10), (12, 6)], ids=["square", "wide"])
def test_the_rotation_in_exif_is_applied(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    make(tmp_path, size=size, exif=exif)
    folder = scan(tmp_path)
    with Image.open(tmp_path / folder.files["train"].names[0]) as image:
        upright = np.rot90(np.asarray(image), ROTATIONS[orientation])
    data = load(tmp_path)
    assert tuple(data.train.pixels.shape[2:]) == upright.shape
    assert np.array_equal(decode(folder, "train", upright.shape).pixels[0, 0], upright)


# --- What is refused -----------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path):
    with refused(
        DataError,
        f"no image folder at {tmp_path / 'nothing'}",
        "there is nothing at that path",
        "name a folder with one subfolder a class",
    ):
        load(tmp_path / "nothing")


def test_a_misspelt_folder_is_told_with_what_lies_beside_it(tmp_path):
    (tmp_path / "photos").mkdir()
    with refused(
        DataError,
        f"no image folder at {tmp_path / 'fotos'}",
        "there is nothing at that path",
        f"did you mean {str(tmp_path / 'photos')!r}?",
    ):
        load(tmp_path / "fotos")


def test_a_bar_ends_at_the_number_of_images(tmp_path, monkeypatch):
    """Images are read in blocks, the last of which is rarely full."""
    counts: dict[str, list[int]] = {}

    @contextmanager
    def counting(description, total):
        done = counts[description] = [0, total]
        yield lambda steps: done.__setitem__(0, done[0] + steps)

    make(tmp_path / "photos")
    monkeypatch.setattr(folders, "progress", counting)
    load(tmp_path / "photos")
    assert counts == {"reading headers": [22, 22], "decoding train": [16, 16], "decoding test": [6, 6]}


def test_a_file_is_no_folder(tmp_path):
    path = picture(tmp_path / "photo.png")
    with refused(
        DataError,
        f"no image folder at {path}",
        "it is a file, and no .tar or .zip",
        "name a folder with one subfolder a class",
    ):
        load(path)


def test_a_folder_without_classes_is_refused(tmp_path):
    picture(tmp_path / "0.png")
    with refused(
        DataError,
        f"{tmp_path} has no class folders",
        "images are expected as CLASS/NAME.jpg",
        "make one subfolder a class, or name the folder above",
    ):
        load(tmp_path)


def test_a_single_class_is_refused(tmp_path):
    with refused(
        DataError,
        f"{tmp_path} has one class only: 'cat'",
        "there is nothing to tell apart",
        "add a second class folder, or name the folder above",
    ):
        load(make(tmp_path, "cat:8"))


def test_an_empty_class_is_refused(tmp_path):
    with refused(
        DataError,
        f"class 'dog' in {tmp_path}/train has no images",
        f"known endings: {', '.join(sorted(EXTENSIONS))}",
        "add images, or remove the folder",
    ):
        load(make(tmp_path, "train/cat:8 train/dog:0 test/cat:2"))


def test_a_test_split_with_a_class_of_its_own_is_refused(tmp_path):
    with refused(
        DataError,
        f"{tmp_path}/test has classes that train/ lacks: emu",
        "a student cannot learn them",
        "add them to train/, or remove them",
    ):
        load(make(tmp_path, "train/cat:8 train/dog:8 test/cat:2 test/emu:2"))


@pytest.mark.parametrize("layout", ["test/cat:0 test/dog:0", "test:0"])
def test_a_test_split_without_images_is_refused(tmp_path, layout):
    with refused(
        DataError,
        f"{tmp_path}/test has no images",
        f"known endings: {', '.join(sorted(EXTENSIONS))}",
        "add images, or remove the folder",
    ):
        load(make(tmp_path, f"train/cat:8 train/dog:8 {layout}"))


def test_classes_too_small_to_be_divided_are_refused(tmp_path):
    with refused(
        DataError,
        "cannot hold 2 of 2 images out for validation or test",
        "every class needs at least two images, and the held-out part one of each class",
        "add images to the smallest classes (`ekd data` counts them), or remove those classes",
    ):
        load(make(tmp_path, "cat:1 dog:1"))


def truncated_jpeg(path: Path) -> str:
    picture(path, size=(40, 40))
    path.write_bytes(path.read_bytes()[:-300])
    with Image.open(path) as image, pytest.raises(OSError, match="truncated") as caught:
        image.load()
    return str(caught.value)


def web_page(path: Path) -> str:
    path.write_text("\n<!DOCTYPE html>\n<html>404</html>")
    return "it is a web page, saved under an image's name"


def nothing(path: Path) -> str:
    path.write_bytes(b"")
    return "the file is empty"


def words(path: Path) -> str:
    path.write_text("not an image at all")
    return "it is no image that Pillow knows"


@pytest.mark.parametrize("damage", [truncated_jpeg, web_page, nothing, words])
def test_a_broken_image_is_named_with_what_it_is(tmp_path, damage):
    path = make(tmp_path) / "train" / "cat" / "broken.jpg"
    why = damage(path)
    assert errors_of(tmp_path) == [unreadable(path, why)]


def test_a_broken_link_is_named(tmp_path):
    path = make(tmp_path) / "train" / "cat" / "lost.png"
    path.symlink_to(tmp_path / "gone.png")
    assert errors_of(tmp_path) == [unreadable(path, "it is a link to a file that is not there")]


@pytest.mark.parametrize("limit", [79, 30], ids=["Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch, limit):
    make(tmp_path, size=(4, 4))
    path = picture(tmp_path / "train" / "cat" / "bomb.png", size=(10, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    why = "it has so many pixels that it could exhaust the memory"
    assert errors_of(tmp_path) == [unreadable(path, why)]


def test_all_broken_files_are_reported_together(tmp_path):
    make(tmp_path)
    damages = {"train/cat/a.jpg": nothing, "train/dog/b.png": web_page, "test/dog/c.gif": words}
    expected = [unreadable(tmp_path / place, damage(tmp_path / place)) for place, damage in damages.items()]
    assert errors_of(tmp_path) == expected


def test_after_ten_broken_files_the_rest_is_counted(tmp_path):
    make(tmp_path)
    for number in range(13):
        nothing(tmp_path / "train" / "cat" / f"broken{number:02}.png")
    errors = errors_of(tmp_path)
    assert errors[:10] == [
        unreadable(tmp_path / "train" / "cat" / f"broken{number:02}.png", "the file is empty")
        for number in range(10)
    ]
    assert errors[10:] == ["and 3 more files that cannot be read"]


def mutants(data: bytes, count: int, head: int) -> list[bytes]:
    """Copies of `data` that are cut off, or have three bits of their first `head` bytes flipped."""
    rng, made = random.Random(0), []
    for number in range(count):
        copy = bytearray(data[: rng.randrange(len(data))] if number % 4 == 0 else data)
        for _ in range(3 if number % 4 else 0):
            copy[rng.randrange(min(head, len(copy)))] ^= 1 << rng.randrange(8)
        made.append(bytes(copy))
    return made


@pytest.mark.filterwarnings("ignore")  # Pillow warns of metadata that it skips
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_a_damaged_image_is_read_or_refused_and_nothing_else(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    options = {"exif": exif} if ending in ("jpg", "png", "webp", "tif") else {}
    path = picture(tmp_path / "cat" / f"0.{ending}", size=(20, 20), **options)
    picture(tmp_path / "dog" / "0.png")
    outcomes = set()
    for mutant in mutants(path.read_bytes(), 80, head=300):
        path.write_bytes(mutant)
        try:
            folder = scan(tmp_path)
            folder.check()
            outcomes.add(decode(folder, "all", (8, 8)).pixels.shape)
        except DataError as error:
            outcomes.add(error.problems[0].what)
    assert outcomes <= {(2, 1, 8, 8), (2, 3, 8, 8), f"cannot read {path}"}
    assert f"cannot read {path}" in outcomes


# --- Archives ------------------------------------------------------------------------------------


def pack(folder: Path, archive: Path, inside: str = "") -> Path:
    """An archive of a folder's content, below the folder `inside` if one is named."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        os.utime(path, (10**9, 10**9))  # the same bytes each time
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in paths:
                file.write(path, Path(inside) / path.relative_to(folder))
    else:
        kind = archive.suffix.removeprefix(".").replace("tgz", "gz").replace("tar", "")
        with tarfile.open(archive, f"w:{kind}") as file:
            for path in paths:
                file.add(path, str(Path(inside) / path.relative_to(folder)), recursive=False)
    return archive


@pytest.mark.parametrize("inside", ["", "pets"], ids=["bare", "wrapped"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip"])
def test_an_archive_loads_like_its_folder(tmp_path, own_cache, ending, inside):
    folder = make(tmp_path / "folder")
    archive = pack(folder, tmp_path / f"pets{ending}", inside)
    assert load(archive).fingerprint() == load(folder).fingerprint()


def test_an_archive_is_unpacked_once(tmp_path, own_cache, monkeypatch):
    archive = pack(make(tmp_path / "folder"), tmp_path / "pets.zip")
    first = load(archive).fingerprint()
    monkeypatch.setattr(archives, "_extract", lambda *_: pytest.fail("unpacked again"))
    assert load(archive).fingerprint() == first
    assert load(shutil.copy(archive, tmp_path / "renamed.zip")).fingerprint() == first


def write_member(archive: Path, name: str) -> None:
    """An archive with one member of that name."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, b"evil")
    else:
        with tarfile.open(archive, "w:gz") as file:
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"evil"))


def files_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
@pytest.mark.parametrize("name", ["../evil.png", "cat/../../evil.png", "{tmp}/evil.png"])
def test_an_archive_that_reaches_outside_its_folder_is_refused(tmp_path, own_cache, ending, name):
    archive = tmp_path / f"evil{ending}"
    write_member(archive, name.format(tmp=tmp_path))
    with pytest.raises(DataError) as caught:
        load(archive)
    problem = caught.value.problems[0]
    assert problem.what == f"{archive} has a member that does not belong in it"
    assert problem.fix == "unpack only archives that you trust, by hand, and name the folder"
    assert files_below(tmp_path) == {str(archive)}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_an_archive_leads_nowhere_outside(tmp_path, own_cache, kind):
    archive, target = tmp_path / "links.tar", tmp_path / "target"
    target.mkdir()
    with tarfile.open(archive, "w") as file:
        link = tarfile.TarInfo("cat")
        link.type, link.linkname = kind, str(target)
        file.addfile(link)
        member = tarfile.TarInfo("cat/evil.png")
        member.size = 4
        file.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(DataError, match="has a member that does not belong in it"):
        load(archive)
    assert files_below(tmp_path) == {str(archive)}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_a_truncated_archive_is_refused(tmp_path, own_cache, ending):
    archive = pack(make(tmp_path / "folder"), tmp_path / f"pets{ending}")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        load(archive)
    problem = caught.value.problems[0]
    assert (problem.what, problem.fix) == (f"cannot unpack {archive}", "fetch the archive again")
    assert files_below(own_cache) == set()


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(tmp_path, own_cache, ending):
    archive = pack(make(tmp_path / "folder"), tmp_path / f"pets{ending}")
    refusals = 0
    for mutant in mutants(archive.read_bytes(), 60, head=1 << 20):
        archive.write_bytes(mutant)
        try:
            load(archive)
        except DataError:
            refusals += 1
    assert refusals > 10


# --- inspect_data and `ekd data` -----------------------------------------------------------------


def test_inspection_counts_and_draws_a_contact_sheet(tmp_path):
    make(tmp_path / "pets", "train/cat:20 train/dog:8 train/emu:8 test/cat:3 test/emu:2")
    facts = inspect_data(f"imagefolder:{tmp_path / 'pets'}", sheet=tmp_path / "deep" / "sheet.png")
    assert facts["classes"] == ["cat", "dog", "emu"]
    assert {name: sum(counts.values()) for name, counts in facts["counts"].items()} == {
        "train": 32,
        "val": 4,
        "test": 5,
    }
    assert facts["counts"]["test"] == {"cat": 3, "dog": 0, "emu": 2}
    assert facts["file_sizes"] == {"10×8": 41}
    assert (facts["channels"], facts["image_size"], facts["augment"]) == (1, [8, 10], "crop-flip")
    assert facts["errors"] == []
    assert [text.partition("\n")[0] for text in facts["warnings"]] == [
        f"{tmp_path}/pets/test lacks the classes dog"
    ]
    assert facts["sheet"] == str(tmp_path / "deep" / "sheet.png")
    with Image.open(facts["sheet"]) as sheet:
        assert (sheet.format, sheet.size) == ("PNG", (12 * 50 + 2, 3 * 50 + 2))
        cells = np.asarray(sheet.convert("L"))[2:].reshape(3, 50, 602)[:, :48, 2:].reshape(3, 48, 12, 50)
    shades = cells[..., :48].mean((1, 3))  # one row a class, 12 columns, blank where a class has fewer
    assert np.abs(shades[0] - SHADES["cat"]).max() < 20
    assert np.abs(shades[1, :7] - SHADES["dog"]).max() < 20
    assert shades[1, 8:].min() == 255


def test_inspection_lists_errors_instead_of_raising_them(tmp_path):
    make(tmp_path, "train/cat:8 train/dog:0")
    broken = tmp_path / "train" / "cat" / "x.png"
    nothing(broken)
    facts = inspect_data(f"imagefolder:{tmp_path}")
    assert [text.partition("\n")[0] for text in facts["errors"]] == [
        f"class 'dog' in {tmp_path}/train has no images",
        f"cannot read {broken}",
    ]
    assert "counts" not in facts


def test_inspection_lists_what_only_decoding_finds(tmp_path):
    path = make(tmp_path) / "train" / "cat" / "half.jpg"
    why = truncated_jpeg(path)
    assert inspect_data(f"imagefolder:{tmp_path}")["errors"] == [unreadable(path, why)]


def test_inspection_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is nothing at that path"):
        inspect_data(f"imagefolder:{tmp_path / 'nothing'}")


@pytest.fixture
def ekd(tmp_path, monkeypatch):
    """Run the command line in an empty folder, and leave the package's logger as it was."""
    log = logging.getLogger("ensemble_kd")
    before = (log.handlers[:], log.level, log.propagate)
    monkeypatch.chdir(tmp_path)
    yield lambda *arguments: CliRunner().invoke(app, list(arguments))
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def test_the_command_shows_counts_and_writes_the_sheet(tmp_path, ekd):
    make(tmp_path / "pets")
    result = ekd("data", "imagefolder:pets", "--sheet", "sheet.png")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["cat", "7", "1", "3"] in rows
    assert ["all", "14", "2", "6"] in rows
    assert "grey, 8×10; views by default: crop-flip; contact sheet: sheet.png" in result.stdout
    assert (tmp_path / "sheet.png").is_file()


def test_the_command_fails_with_2_and_all_errors(tmp_path, ekd):
    make(tmp_path / "pets")
    for name in ("a.png", "b.png"):
        nothing(tmp_path / "pets" / "train" / "cat" / name)
    result = ekd("data", "imagefolder:pets")
    assert result.exit_code == 2
    for name in ("a.png", "b.png"):
        assert f"error: {unreadable(Path('pets/train/cat') / name, 'the file is empty')}" in result.stdout


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 2)])
def test_the_command_with_json_prints_one_object_and_nothing_else(tmp_path, ekd, broken, code):
    make(tmp_path / "pets", "train/cat:8 train/dog:8 test/dog:3")  # the missing class is a warning
    if broken:
        nothing(tmp_path / "pets" / "train" / "cat" / "a.png")
    result = ekd("data", "imagefolder:pets", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == code
    assert len(facts["errors"]) == int(broken)
    assert len(facts["warnings"]) == 1
    assert ("counts" in facts) != broken


def test_the_command_says_on_stderr_that_there_is_nothing(ekd):
    result = ekd("data", "imagefolder:nothing", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: " + message(
        "no image folder at nothing",
        "there is nothing at that path",
        "name a folder with one subfolder a class\n",
    )
