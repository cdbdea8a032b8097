"""Shards of images: the pixels of a folder, an order that reads few shards at a time, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import logged, message, refused

from ensemble_kd import files
from ensemble_kd.data import dataset, load_data, shards, tar_index, views
from ensemble_kd.data.dataset import Dataset, Images, joined
from ensemble_kd.data.hashing import blocked_order
from ensemble_kd.data.hashing import order as plain_order
from ensemble_kd.data.inspect import inspect_data
from ensemble_kd.data.streams import FilePixels
from ensemble_kd.data.tars import find_shards, scan_tars
from ensemble_kd.data.unlabelled import load_unlabelled
from ensemble_kd.distillation import distill
from ensemble_kd.errors import DataError
from ensemble_kd.files import read_json
from ensemble_kd.fit import train_on_labels
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.recipes import student_recipe

SIDE = 12
AGAIN = "fetch the shard again, or pack it again"
Member = tuple[str, bytes]


def picture(seed: int, ending: str = "png", size: tuple[int, int] = (20, 16)) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format={"jpg": "JPEG"}.get(ending, ending.upper()))
    return buffer.getvalue()


def pack(path: Path, members: Iterable[Member | tarfile.TarInfo], mode: str = "w") -> Path:
    """A tar of members, which are (name, content), or headers of no content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def sample(key: str, label: str, seed: int = 0) -> list[Member]:
    return [(f"{key}.png", picture(seed)), (f"{key}.cls", label.encode())]


GOOD = [member for n in range(6) for member in sample(f"{n}", "ab"[n % 2], n)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same images as a folder and as shards, each shard of one split, in the folder's order."""
    root = tmp_path_factory.mktemp("both")
    folder, shards = root / "folder", root / "shards"
    for split, count in (("train", 48), ("val", 8), ("test", 8)):
        members: list[list[Member]] = []
        for number in range(count):
            name = ("cat", "dog")[2 * number // count]
            ending = ("jpg", "png", "webp", "bmp", "jpeg")[number % 5]
            data = picture(1000 * count + number, ending.replace("jpeg", "jpg"), (17 + number % 3, 15))
            path = folder / split / name / f"{number:03d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            label = (f"{number:03d}.cls", name.encode()) if number % 2 else (
                f"{number:03d}.json", json.dumps({"label": name, "more": [1]}).encode()
            )  # fmt: skip
            members.append([label, (path.name, data)])
        for number in range(0, count, 8):
            part = [member for pair in members[number : number + 8] for member in pair]
            pack(shards / f"{split}-{number:04d}.tar", part)
    return folder, shards


def load(place: Path | str, decode: str = "always", **options: Any) -> Dataset:
    return load_data(f"tars:{place}", decode=decode, **{"image_size": SIDE, **options})


def same(one: Images, other: Images) -> bool:
    return (
        one.decoded.equal(other.decoded)
        and one.known_labels.equal(other.known_labels)
        and one.ids.equal(other.ids)
    )


def splits(data: Dataset) -> list[Images]:
    return [data.train, data.val, data.test]


# --- The same images as in a folder ------------------------------------------------------------------


def test_pixels_labels_and_ids_are_those_of_the_folder(both):
    folder, shards = both
    plain = load_data(f"imagefolder:{folder}", decode="once", image_size=SIDE)
    streamed, held = load(shards), load(shards, "once")
    for data in (streamed, held):
        assert data.classes == plain.classes == ("cat", "dog")
        assert all(map(same, splits(data), splits(plain)))
        assert data.mean_and_std == plain.mean_and_std
    assert isinstance(streamed.train.pixels, FilePixels)
    assert isinstance(held.train.pixels, torch.Tensor)
    chunks = views.order(3, 1, len(plain.train)).split(7)
    assert all(map(same, streamed.train.fetch(chunks), plain.train.fetch(chunks)))


def test_sizes_and_facts_are_those_of_the_folder(both):
    folder, shards = both
    facts, other = inspect_data(f"tars:{shards}"), inspect_data(f"imagefolder:{folder}")
    assert facts | {"data": ""} == other | {"data": ""}
    assert facts["errors"] == facts["warnings"] == []


def test_subfolders_patterns_and_one_shard_find_the_same(both, tmp_path):
    _, shards = both
    for shard in shards.iterdir():
        split, _, rest = shard.name.partition("-")
        (tmp_path / split).mkdir(exist_ok=True)
        os.link(shard, tmp_path / split / rest)
    expected = load(shards)
    places = (tmp_path, f"{shards}/*.tar", f"{shards}/{{train,val,test}}-*.tar",
              f"{shards}/{{train-00{{00,08,16,24,32,40}},{{val,test}}-0000}}.tar")  # fmt: skip
    for place in places:
        assert all(map(same, splits(load(place)), splits(expected)))
    assert find_shards(f"{shards}/train-0000.tar") == (shards, [shards / "train-0000.tar"])


def test_numbers_in_braces_keep_their_zeros(both):
    _, shards = both
    root, found = find_shards(f"{shards}/train-{{0000..0000}}.tar")
    assert (root, found) == (shards, [shards / "train-0000.tar"])
    with refused(
        DataError,
        f"shards of {shards}/train-{{0000..0008}}.tar are not there: "
        + ", ".join(f"{shards}/train-000{n}.tar" for n in range(1, 8)),
        "the pattern names 9, and 7 of them are missing",
        "fetch them, or mend the pattern",
    ):
        find_shards(f"{shards}/train-{{0000..0008}}.tar")
    with refused(
        DataError,
        "no shards at x{0..9}{0..99999}.tar",
        "the pattern names more than 100,000 files",
        "name a folder of .tar files, or a pattern such as train-*.tar",
    ):
        find_shards("x{0..9}{0..99999}.tar")


def test_shards_without_a_split_are_split_later(tmp_path):
    pack(tmp_path / "0.tar", [m for n in range(30) for m in sample(f"deep/{n}", "ab"[n % 2], n)])
    data = load(tmp_path)
    assert [len(split) for split in splits(data)] == [22, 2, 6]
    assert data.classes == ("a", "b")
    for part in splits(data):
        assert part.known_labels.tolist() == (part.ids % 2).tolist()


def test_numbers_are_classes_in_their_order_or_lines_of_the_file(tmp_path):
    numbers = ["10", "9", "2"] * 4
    members = [m for n, label in enumerate(numbers) for m in sample(str(n), label, n)]
    pack(tmp_path / "train-0.tar", members)
    pack(
        tmp_path / "test-0.tar", [m for n, label in enumerate(numbers) for m in sample(str(n), label, 99 + n)]
    )
    data = load(tmp_path, val_fraction=0.25)
    assert (data.classes, data.test.known_labels.tolist()) == (("2", "9", "10"), [2, 1, 0] * 4)
    (tmp_path / "classes.txt").write_text("".join(f"class {n}\n" for n in range(11)))
    with logged() as lines:
        data = load(tmp_path, val_fraction=0.25)
    assert (data.classes[9], data.test.known_labels.tolist()) == ("class 9", [10, 9, 2] * 4)
    absent = ", ".join(f"class {n}" for n in (0, 1, 3, 4, 5, 6, 7, 8))
    assert lines == [
        f"WARNING: {tmp_path}: no training image is of the classes {absent}\n  why: classes.txt names them"
    ]


def test_training_gives_the_same_weights_streamed_in_memory_and_from_a_folder(both):
    folder, shards = both
    weights = []
    for data in (load(shards), load(shards, "once"), load_data(f"imagefolder:{folder}", image_size=SIDE)):
        model = new_classifier(parse("lenet"), data, seed=0)
        recipe = replace(student_recipe(model, 48, {"epochs": 2}), batch_size=8)
        cpu = torch.device("cpu")
        train_on_labels(model, data, recipe, "crop-flip", seed=3, device=cpu, description="")
        weights.append(model.fingerprint())
    assert len(set(weights)) == 1  # there are no more shards than are mixed at a time


def test_distilling_on_shards_runs(both, tmp_path, monkeypatch):
    _, shards = both
    monkeypatch.setattr(dataset, "WINDOW", 2)
    result = distill(
        data=f"tars:{shards}", teachers=["lenet"], student="lenet", image_size=SIDE, epochs=2, teacher_epochs=1,
        decode="always", out=tmp_path / "run",
    )  # fmt: skip
    assert 0 <= result.metrics["models"]["student"]["accuracy"]["value"] <= 1
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"


def test_unlabelled_copies_of_test_images_are_told(both, tmp_path):
    folder, shards = both
    with logged() as lines:
        more = load_unlabelled(folder / "test", load(shards), "always")
    assert lines == [
        f"WARNING: 8 of the images in {folder / 'test'} are test images too: what is measured on them is too good"
    ]
    mixed = joined(load(shards).train, more)
    assert mixed.order(1, 2).equal(views.order(1, 2, len(mixed)))  # else labelled and unlabelled never met


# --- The order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[5], [1] * 30, [7, 1, 30, 2, 9, 9, 3], [4, 0, 6, 0]])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_blocked_order_takes_each_sample_once_and_few_blocks_at_a_time(lengths, window):
    blocks = torch.tensor(lengths)
    count = sum(lengths)
    of = torch.arange(len(lengths)).repeat_interleave(blocks)
    orders = [blocked_order(seed, epoch, blocks, window) for seed in (0, 1) for epoch in (0, 1, 2)]
    for number, found in enumerate(orders):
        assert found.sort().values.tolist() == list(range(count))
        assert found.equal(blocked_order(number // 3, number % 3, blocks, window))
        if window >= len(lengths):
            assert found.equal(plain_order(number // 3, number % 3, count))
        # When a window was left, none of its blocks comes again.
        passed = of[found].tolist()
        spans = {b: (passed.index(b), count - passed[::-1].index(b)) for b in set(passed)}
        for place in range(count):
            assert sum(first <= place < last for first, last in spans.values()) <= window
    if count > 20:
        assert len({tuple(found.tolist()) for found in orders}) == len(orders)


def test_blocked_order_is_fair():
    """Over many epochs, each sample has each place about as often."""
    blocks, first = torch.tensor([3, 4, 5]), torch.zeros(12)
    for epoch in range(300):
        first[blocked_order(0, epoch, blocks, 1)[0]] += 1
    of = torch.arange(3).repeat_interleave(blocks)
    expected = 100 / blocks[of]
    assert ((first - expected).abs() < 5 * expected.sqrt()).all()


def test_an_epoch_goes_through_few_shards_at_a_time(both, monkeypatch):
    _, shards = both
    monkeypatch.setattr(dataset, "WINDOW", 2)
    train = load(shards).train
    assert train.pixels.blocks.tolist() == [8] * 6
    found = train.order(4, 1)
    assert found.equal(blocked_order(4, 1, torch.tensor([8] * 6), 2))
    which = (found // 8).split(16)
    assert [len(part.unique()) for part in which] == [2, 2, 2]
    limited = train[torch.arange(0, 48, 3)]
    assert limited.pixels.blocks.tolist() == [3, 3, 2] * 2
    held = load(shards, "once").train
    assert held.order(4, 1).equal(views.order(4, 1, 48))


def test_the_images_of_a_batch_are_read_in_the_order_of_the_shards(both, monkeypatch):
    _, shards = both
    train, offsets = load(shards).train, []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: offsets.append(args[::2]) or original(*args))
    train.pixels[torch.arange(7, -1, -1)]
    assert len(offsets) == 8
    assert offsets == sorted(offsets, key=lambda pair: pair[1])


# --- The index ---------------------------------------------------------------------------------------


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are looked through, as they are."""
    seen: list[str] = []
    original = tar_index._looked_through

    def spy(path: Path) -> tar_index.Index:
        seen.append(path.name)
        return original(path)

    monkeypatch.setattr(tar_index, "_looked_through", spy)
    return seen


def test_a_shard_is_looked_through_once_and_again_when_it_or_its_index_has_changed(
    tmp_path, own_cache, looked
):
    shard = pack(tmp_path / "s" / "0.tar", GOOD)
    first = scan_tars(str(shard.parent))
    assert scan_tars(f"{shard.parent}/*.tar").files["all"].names == first.files["all"].names
    assert looked == ["0.tar"]
    (kept,) = (own_cache / "shards").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-20], b"", whole.replace(b"0.png", b"9.png", 1), b"[]", b'{"version": 1}'):
        looked.clear()
        kept.write_bytes(damaged)
        assert scan_tars(str(shard.parent)).labels["all"].equal(first.labels["all"])
        assert looked == ["0.tar"]
        assert kept.read_bytes() == whole
    looked.clear()
    os.utime(shard, ns=(1, 1))
    again = scan_tars(str(shard.parent))
    assert looked == ["0.tar"]
    assert again.files["all"].changed.tolist() == [1] * 6
    assert len(list((own_cache / "shards").iterdir())) == 1


def test_without_a_cache_that_can_be_written_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    shard = pack(tmp_path / "0.tar", GOOD)
    with logged() as lines:
        assert len(scan_tars(str(shard)).files["all"]) == 6
    assert len(lines) == 1
    assert lines[0].startswith(f"WARNING: {shard} is looked through again the next time: cannot write ")


def test_a_fingerprint_tells_changed_shards_and_not_where_they_are(both, tmp_path):
    _, shards = both
    copy = tmp_path / "copy"
    copy.mkdir()
    for shard in shards.iterdir():
        os.link(shard, copy / shard.name)
    first = load(shards).fingerprint()
    assert load(shards).fingerprint() == first
    assert load(copy).fingerprint() == first
    changed = copy / "train-0000.tar"
    content = changed.read_bytes()
    changed.unlink()
    changed.write_bytes(content)
    assert load(copy).fingerprint() != first


def test_a_shard_that_changes_later_is_named_when_it_is_met(tmp_path):
    shard = pack(tmp_path / "train-0.tar", GOOD)
    pack(tmp_path / "test-0.tar", GOOD)
    data = load(tmp_path, val_fraction=0.4)
    os.utime(shard, ns=(5, 5))
    name = data.train.pixels.files()[0][0].names[int(data.train.ids[0])]
    with refused(
        DataError,
        f"cannot read {tmp_path / name}",
        "the shard was changed after it was looked through",
        "start again, or pack the shard again without it",
    ):
        data.train.pixels[0]
    (tmp_path / "test-0.tar").unlink()
    shards._opened.cache_clear()
    with refused(
        DataError,
        f"cannot read {tmp_path}/test-0.tar/0.png",
        "No such file or directory",
        "start again, or pack the shard again without it",
    ):
        data.test.pixels[0]


def test_few_files_stay_open(tmp_path):
    for number in range(100):
        pack(tmp_path / f"{number:03d}.tar", sample("0", "ab"[number % 2]))
    data = load(tmp_path, "always")
    before = len(os.listdir("/proc/self/fd"))
    data.train.pixels[torch.arange(len(data.train))]
    assert len(os.listdir("/proc/self/fd")) <= before + 64


# --- What is refused ---------------------------------------------------------------------------------


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


OUT = ("its name points out of the shard", "take only shards that you trust, or pack it again")
LINK = ("it is a link, not a plain file", "pack the files themselves: tar --dereference")
WRITE = "write a class's number, or its name"
WRITE_JSON = f'{WRITE}, as {{"label": …}}'
TWICE = "give each sample a key of its own"

MEMBERS = {
    "up": ([("../x.png", b"")], "../x.png", *OUT),
    "absolute": ([("/x.png", b"")], "/x.png", *OUT),
    "backslash": ([("a\\..\\x.png", b"")], "a\\..\\x.png", *OUT),
    "symbolic link": ([link("x.png", tarfile.SYMTYPE)], "x.png", *LINK),
    "hard link": ([link("x.png", tarfile.LNKTYPE, "0.png")], "x.png", *LINK),
    "device": ([link("x.png", tarfile.CHRTYPE)], "x.png", "it is a device or a sparse file, not a plain file", LINK[1]),
    "no label": ([("x.png", picture(0))], "x.png", "it has no label", "add x.cls with its class, or leave the image out"),
    "no image": ([("d/x.cls", b"a")], "d/x.cls", "there is no image d/x.{jpg,jpeg,png,webp,bmp}",
                 "add its image, or leave the label out"),
    "same name": (sample("0", "a")[:1], "0.png", "there are two members of that name", TWICE),
    "same key": ([("0.jpg", picture(0, "jpg"))], "0.jpg", "its key has another image, '0.png'", TWICE),
    "negative": (sample("x", "-1"), "x.cls", "its label is -1, and classes count from 0", WRITE),
    "empty label": (sample("x", " \n"), "x.cls", "its label is empty", WRITE),
    "no text": ([("x.cls", b"\xff\xfe")], "x.cls", "it is no UTF-8 text", WRITE),
    "no json": ([("x.json", b"{")], "x.json", 'it is no JSON object with a "label"', WRITE_JSON),
    "list": ([("x.json", b"[1]")], "x.json", 'it is no JSON object with a "label"', WRITE_JSON),
    "deep": ([("x.json", b"[" * 100_000)], "x.json", 'it is no JSON object with a "label"', WRITE_JSON),
    "other label": ([("x.json", b'{"label": true}')], "x.json", "its label is neither an integer nor text", WRITE_JSON),
    "long label": ([("x.cls", b"a" * 5000)], "x.cls", "it has 5.0 kB, and at most 4.1 kB are read",
                   "make it smaller, or leave it out"),
    "no picture": ([("x.png", b"hello")], "x.png", "it is no image that Pillow knows", "replace it, or pack the shard without it"),
    "empty picture": ([("x.png", b"")], "x.png", "the file is empty", "replace it, or pack the shard without it"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMBERS)
def test_a_bad_member_is_refused(tmp_path, case):
    members, name, why, fix = MEMBERS[case]
    shard = pack(tmp_path / "0.tar", [*GOOD, *members])
    with refused(DataError, f"cannot take {name!r} from the shard {shard}", why, fix):
        load(tmp_path)
    told = inspect_data(f"tars:{tmp_path}")["errors"]
    assert told == [message(f"cannot take {name!r} from the shard {shard}", why, fix)]


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=ending, **options)
    return buffer.getvalue()


AWAY = "replace it, or pack the shard without it"
BAD = {
    "web page": (b"<!DOCTYPE html><html>404</html>", "x.jpg", "it is a web page, saved under an image's name"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "x.png", "it is no image that Pillow knows"),
    "32 bits": (encoded(Image.new("F", (9, 9)), "TIFF"), "x.png",
                "its grey has 32 bits, of which none is known to be white: save it with 8 or 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_folder_would_refuse_is_refused_in_a_shard(tmp_path, case):
    data, name, why = BAD[case]
    shard = pack(tmp_path / "0.tar", [*GOOD, (name, data), ("x.cls", b"a")])
    with refused(DataError, f"cannot take {name!r} from the shard {shard}", why, AWAY):
        load(tmp_path)


@pytest.mark.parametrize("decode", ["once", "always"])
def test_an_image_that_is_cut_off_is_named(tmp_path, decode):
    cut = picture(1, "png", (200, 200))[:9000]
    pack(tmp_path / "train-0.tar", [*GOOD, ("x.png", cut), ("x.cls", b"a")])
    pack(tmp_path / "test-0.tar", [m for n in range(2) for m in sample(f"{n}", "ab"[n], 50 + n)])
    with pytest.raises(DataError) as caught:
        [split.decoded for split in splits(load(tmp_path, decode, val_fraction=0.3))]
    problem = caught.value.problems[0]
    assert problem.what == f"cannot read {tmp_path}/train-0.tar/x.png"
    assert problem.why == "image file is truncated"
    assert problem.fix == "start again, or pack the shard again without it"


def test_deep_grey_is_scaled_and_turned_photos_stand_upright(tmp_path):
    deep = np.linspace(0, 65535, 16 * 20).round().astype(np.uint16).reshape(16, 20)
    turned, exif = Image.fromarray((deep // 257).astype(np.uint8)), Image.Exif()
    exif[0x0112] = 6
    for name, data, upright in (
        ("deep", encoded(Image.fromarray(deep), "PNG"), np.round(deep / 257)),
        ("turned", encoded(turned, "PNG", exif=exif), np.rot90(np.asarray(turned), -1)),
    ):
        members = [m for n in range(8) for m in ((f"{n}.png", data), (f"{n}.cls", b"%d" % (n % 2)))]
        pack(tmp_path / name / "0.tar", members)
        data = load(tmp_path / name, image_size=None, val_fraction=0.34)
        assert data.channels == 1
        assert data.train.decoded[0, 0].numpy().tolist() == upright.tolist()


@pytest.mark.parametrize(("limit", "why"), [
    ("_MOST_OF_IMAGE", "it has 1.0 kB, and at most 1.0 kB are read"),
    ("MAX_IMAGE_PIXELS", "it has so many pixels that it could exhaust the memory"),
])  # fmt: skip
def test_a_huge_image_is_refused(tmp_path, monkeypatch, limit, why):
    big = picture(0)
    shard = pack(tmp_path / "0.tar", [("big.png", big), ("big.cls", b"a")])
    fix = "make it smaller, or leave it out"
    if limit == "MAX_IMAGE_PIXELS":
        monkeypatch.setattr(Image, limit, 100)
        fix = "replace it, or pack the shard without it"
    else:
        monkeypatch.setattr(tar_index, limit, len(big) - 1)
        shown = files.readable
        why = f"it has {shown(len(big))}, and at most {shown(len(big) - 1)} are read"
    with refused(DataError, f"cannot take 'big.png' from the shard {shard}", why, fix):
        load(tmp_path)


WHOLE = [
    (lambda data: b"", "the file is empty", AGAIN),
    (lambda data: b"no tar" * 300, "it is no tar file: invalid header", AGAIN),
    (lambda data: data[:300], "it is no tar file: truncated header", AGAIN),
    (lambda data: data[:5000], "it is cut off or damaged near the member '1.png': unexpected end of data", AGAIN),
    (lambda data: data.rstrip(b"\0").ljust(512 * -(-len(data.rstrip(b"\0")) // 512), b"\0"),
     "it is cut off or damaged near the member '5.cls': no mark of the end", AGAIN),
    (gzip.compress, "it is compressed by gzip, so that its members cannot be read at their places",
     "decompress it to a plain .tar: its images are compressed already"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "why", "fix"), WHOLE, ids=["empty", "magic", "short", "cut", "end", "gzip"]
)
def test_a_bad_shard_is_refused(tmp_path, damage, why, fix):
    shard = pack(tmp_path / "0.tar", GOOD)
    shard.write_bytes(damage(shard.read_bytes()))
    with refused(DataError, f"cannot read the shard {shard}", why, fix):
        load(tmp_path)


def test_every_cut_and_every_damaged_header_is_noticed(tmp_path, own_cache):
    shard = pack(tmp_path / "0.tar", GOOD)
    data = shard.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end, 1000):
        shard.write_bytes(data[:length])
        with pytest.raises(DataError, match="cannot read the shard"):
            load(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for offset in headers:
        shard.write_bytes(data[: offset + 3] + b"\xff" + data[offset + 4 :])
        with pytest.raises(DataError, match=r"it is (cut off or damaged near|no tar file)"):
            load(tmp_path)


def test_a_shard_without_images_and_places_without_shards(tmp_path):
    for members in ([], [("readme.txt", b"nothing")]):
        shard = pack(tmp_path / "0.tar", members)
        with refused(
            DataError,
            f"the shard {shard} has no images",
            "known endings: jpg, jpeg, png, webp, bmp",
            "add images with labels, or leave the shard out",
        ):
            load(tmp_path)
    (tmp_path / "empty").mkdir()
    for place, why in (
        ("empty", "the folder has no .tar, and neither have train/, val/ and test/ in it"),
        ("nowhere", "there is nothing at that path"),
        ("x*.tar", "no file fits the pattern"),
    ):
        fix = "name a folder of .tar files, or a pattern such as train-*.tar"
        with refused(DataError, f"no shards at {tmp_path / place}", why, fix):
            load(tmp_path / place)


@pytest.mark.parametrize(("classes", "labels", "shown", "why", "fix"), [
    ("x\ny\n", "02", "2", "classes.txt names 2 classes, 0…1", "mend the label, or name the class"),
    ("ape\nbee\n", ["ape", "beee"], "'beee'", "classes.txt does not name it", "did you mean 'bee'?"),
    ("0\nb\n", ["0", "1", "b"], "'1'", "classes.txt does not name it", "mend the label, or name the class"),
])  # fmt: skip
def test_a_label_that_is_no_class_is_refused(tmp_path, classes, labels, shown, why, fix):
    (tmp_path / "classes.txt").write_text(classes)
    pack(tmp_path / "0.tar", [m for n, label in enumerate(labels) for m in sample(f"{n}", label, n)])
    place = f"{tmp_path}/0.tar/{1}.png"
    with refused(DataError, f"the label {shown} of {place} is no class", why, fix):
        load(tmp_path)


def test_a_test_label_that_is_never_trained_on_is_refused(tmp_path):
    pack(tmp_path / "train-0.tar", GOOD)
    pack(tmp_path / "test-0.tar", [*GOOD, *sample("x", "c")])
    with refused(
        DataError,
        f"the label 'c' of {tmp_path}/test-0.tar/x.png is no class",
        "no training image has that label, so a student cannot learn it",
        f"add such images to the training shards, or name all classes in {tmp_path}/classes.txt",
    ):
        load(tmp_path)


@pytest.mark.parametrize(("text", "why"), [
    ("", "it is empty"), ("a\n\nb\n", "a line is empty"), ("a\nb\na\n", "it has a twice"),
])  # fmt: skip
def test_a_bad_list_of_classes_is_refused(tmp_path, text, why):
    pack(tmp_path / "0.tar", GOOD)
    (tmp_path / "classes.txt").write_text(text)
    fix = "write one class name a line, each once"
    with refused(DataError, f"cannot use {tmp_path}/classes.txt", why, fix):
        load(tmp_path)


@pytest.mark.parametrize(("names", "what", "why"), [
    (["train-0", "odd"], "it is not known which split odd.tar belongs to", "other shards are named by their split"),
    (["val-0", "test-0"], "has no training shards", "there are shards for val and test only"),
])  # fmt: skip
def test_unclear_splits_are_refused(tmp_path, names, what, why):
    for name in names:
        pack(tmp_path / f"{name}.tar", GOOD)
    fix = "name them train-*.tar, val-*.tar and test-*.tar, or put them in train/, val/ and test/"
    joint = ": " if what.startswith("it") else " "
    with refused(DataError, f"{tmp_path}{joint}{what}", why, fix):
        load(tmp_path)


def test_what_is_odd_but_usable_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble_kd.data.tars.WINDOW", 2)
    for number in range(4):
        label = "ab"[number // 2]
        members = [m for n in range(10) for m in sample(f"{n}", label, 10 * number + n)]
        odd = [("photo.1.png", b""), ("._0.png", b""), ("notes.txt", b"")] if number == 0 else []
        pack(tmp_path / f"train-{number}.tar", [*members, *odd])
    with logged() as lines:
        load(tmp_path)
    assert [line.partition("\n")[0] for line in lines] == [
        f"WARNING: {tmp_path} has neither test nor val shards",
        f"WARNING: {tmp_path}: left out train-0.tar/photo.1.png",
        f"WARNING: {tmp_path}: 4 of 4 training shards have images of one class only",
    ]


def test_many_problems_are_counted(tmp_path):
    pack(tmp_path / "0.tar", [(f"{n}.png", b"") for n in range(14)])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[10].what == "and 4 more problems in the shards"
