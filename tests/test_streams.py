"""Images that stay in their files: the same pixels as in memory, a few batches ahead, and nothing else."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import logged, message, refused

from ensemble_kd import fit as fitting
from ensemble_kd.data import dataset, folders, load_data, streams, views
from ensemble_kd.data.dataset import Dataset, Images, joined
from ensemble_kd.data.inspect import inspect_data
from ensemble_kd.data.streams import AHEAD, FilePixels
from ensemble_kd.data.unlabelled import load_unlabelled
from ensemble_kd.errors import DataError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.objective import Viewing
from ensemble_kd.recipes import student_recipe

SIDE = 12
ORIENTATION = 0x0112


def photo(number: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some grain, other ones for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    grainy = smooth + rng.normal(0, 8, (height, width, 1))
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def write_kinds(folder: Path, seed: int, colour: bool = True) -> None:
    """One image of each kind, 18 in colour and 4 in grey, of many sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(seed).integers(0, 65536, (20, 24)).astype(np.uint16)
    Image.fromarray(grey).save(folder / "sixteen.png")
    photo(seed, 20, 14).convert("L").save(folder / "grey.png")
    photo(seed + 1, 20, 14).convert("1").save(folder / "bits.png")
    photo(seed + 2, 30, 14).convert("L").save(folder / "grey.jpg", exif=turned(6))
    if not colour:
        return
    for orientation in range(1, 9):
        photo(seed + 10 + orientation, 26, 17).save(
            folder / f"turned{orientation}.jpg", exif=turned(orientation)
        )
    photo(seed + 20, 17, 26).save(folder / "turned.png", exif=turned(8))
    photo(seed + 21, SIDE, SIDE).save(folder / "as it is.png")
    photo(seed + 22, 20, 40).save(folder / "lossy.webp", quality=80)
    photo(seed + 23, 40, 20).save(folder / "exact.webp", lossless=True)
    photo(seed + 24, 15, 15).convert("P").save(folder / "palette.png")
    photo(seed + 25, 5, 9).convert("P").save(folder / "small.gif")
    clear = photo(seed + 26, 22, 22)
    clear.putalpha(128)
    clear.save(folder / "clear.png")
    photo(seed + 27, 400, 300).save(folder / "large.jpg", quality=90)  # is shrunk by the decoder
    photo(seed + 28, 21, 21).convert("CMYK").save(folder / "print.tif")
    photo(seed + 29, 18, 33).save(folder / "bitmap.bmp")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of files in two classes, split by folder."""
    root = tmp_path_factory.mktemp("kinds")
    for number, place in enumerate(f"{s}/{c}" for s in ("train", "val", "test") for c in ("cat", "dog")):
        write_kinds(root / place, 100 * number)
    return root


def load(root: Path, decode: str = "always", **options: Any) -> Dataset:
    return load_data(f"imagefolder:{root}", decode=decode, **{"image_size": SIDE, **options})


@pytest.fixture(scope="module")
def streamed(kinds: Path) -> Dataset:
    return load(kinds)


@pytest.fixture(scope="module")
def held(kinds: Path) -> Dataset:
    """The same images in memory."""
    return load(kinds, "once")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded, as they are."""
    seen: list[str] = []
    original = streams.decode_file

    def spy(path: str, out: np.ndarray) -> None:
        seen.append(path)
        original(path, out)

    monkeypatch.setattr(streams, "decode_file", spy)
    return seen


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert decoding_threads() == []


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def splits(data: Dataset) -> list[Images]:
    return [data.train, data.val, data.test]


def same(one: Images, other: Images) -> bool:
    """Bit for bit, in all fields."""
    pairs = [
        (getattr(one, name), getattr(other, name)) for name in ("labels", "ids", "partner_labels", "share")
    ]
    pairs.append((one.decoded, other.decoded))
    return all(a is b is None or (a.dtype == b.dtype and a.equal(b)) for a, b in pairs)


# --- The same pixels as in memory ------------------------------------------------------------------


def plain(path: Path, channels: int) -> np.ndarray:
    """A file decoded by Pillow's own means, without any of the shortcuts."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    upright = upright.convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(fitted).reshape(SIDE, SIDE, channels).transpose(2, 0, 1)


@pytest.mark.parametrize("colour", [True, False])
def test_files_are_decoded_as_by_pillow_itself(tmp_path, colour):
    for name in ("train/cat", "train/dog", "test/cat"):
        write_kinds(tmp_path / name, 7, colour)
    data = load(tmp_path)
    channels = 3 if colour else 1
    assert data.test.pixels.shape == (22 if colour else 4, channels, SIDE, SIDE)
    paths = sorted((tmp_path / "test" / "cat").iterdir())
    for pixels, path in zip(data.test.pixels, paths, strict=True):
        if path.name != "large.jpg":
            assert np.array_equal(pixels, plain(path, channels)), path.name


@pytest.mark.parametrize("size", [(800, 600), (1600, 1200)])
def test_a_jpeg_that_the_decoder_shrinks_looks_the_same(tmp_path, size):
    path, out = tmp_path / "large.jpg", np.empty((3, SIDE, SIDE), dtype=np.uint8)
    for number in range(5):
        photo(number, *size).save(path, quality=90)
        streams.decode_file(str(path), out)
        off = out.astype(float) - plain(path, 3)
        assert np.abs(off).max() <= 2
        assert np.sqrt((off**2).mean()) < 0.6


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 3, 10, 64])
def test_batches_are_those_in_memory(streamed, held, monkeypatch, threads, size):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    for there, here in zip(splits(streamed), splits(held), strict=True):
        batches = list(there.batches(size))
        assert [len(batch) for batch in batches] == [len(batch) for batch in here.batches(size)]
        assert all(map(same, batches, here.batches(size)))


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_in_any_order_are_those_in_memory(streamed, held, monkeypatch, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    count = len(held.train)
    chunks = [torch.randint(count, (n,)) for n in (1, 17, 4, 40, 2)]  # with repetitions
    chunks += [torch.tensor([], dtype=torch.int64), *views.order(3, 1, count).split(7)]
    assert all(map(same, streamed.train.fetch(iter(chunks)), held.train.fetch(chunks)))
    assert list(streamed.train.fetch([])) == []


@pytest.mark.parametrize("policy", ["none", "crop", "crop-flip"])
def test_views_are_those_in_memory(streamed, held, policy):
    for view_id in (0, 3):
        pair = []
        for data, size in ((streamed, 5), (held, 16)):
            viewing = Viewing(policy, 0, seed=5)
            parts = list(viewing.batches(data.train, views.order(1, 2, 32).split(size), view_id))
            pair.append(torch.cat([batch.decoded for batch in parts]))
        assert pair[0].equal(pair[1])


@pytest.mark.skipif(not hasattr(views, "mix"), reason="images are not mixed yet")
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_views_are_those_in_memory(streamed, held, mix):
    viewing, chunks = Viewing("crop-flip", 0, 5, mix), views.order(1, 2, 32).split(5)
    assert all(map(same, viewing.batches(streamed.train, chunks, 1), viewing.batches(held.train, chunks, 1)))


def test_one_view_of_some_images_ends_its_threads(streamed, held):
    index, viewing = torch.tensor([4, 0, 19]), Viewing("crop", 0, 1)
    assert same(viewing.take(streamed.train, index, 2), viewing.take(held.train, index, 2))
    assert decoding_threads() == []


def test_training_gives_the_same_weights(streamed, held):
    recipe, weights = student_recipe(new_classifier(parse("lenet"), held, seed=0), 40, {"epochs": 2}), []
    for data in (streamed, held):
        model = new_classifier(parse("lenet"), data, seed=0)
        history = fitting.train_on_labels(
            model,
            data,
            replace(recipe, batch_size=8),
            "crop-flip",
            seed=3,
            device=torch.device("cpu"),
            description="",
        )
        measured = [{name: row[name] for name in ("train", "val", "lr", "step")} for row in history]
        weights.append((model.fingerprint(), measured))
    assert weights[0] == weights[1]


def test_indexing_decodes_as_indexing_a_tensor_does(streamed, held):
    there, here = streamed.train.pixels, held.train.pixels
    mask = torch.arange(len(here)) % 3 == 0
    for index in (0, -1, slice(3, 9, 2), slice(None), torch.tensor([5, 5, 1]), mask, [2, 0], torch.tensor(4)):
        assert there[index].equal(here[index])
    grid = torch.tensor([[0, 1], [7, 3]])
    assert there[grid].equal(here[grid])
    assert torch.stack(list(there)).equal(here)
    with pytest.raises(IndexError):
        there[len(here)]
    assert (there.shape, there.dtype, there.device, there.ndim, len(there)) == (
        here.shape, here.dtype, here.device, here.ndim, len(here),
    )  # fmt: skip


# --- Nothing is decoded before its time --------------------------------------------------------------


def test_splitting_and_describing_decode_nothing(kinds, decoded):
    for options in ({}, {"limit_train": 10}, {"val_fraction": 0.4}, {"split": 0.3}):
        root = kinds / "train" if "split" in options else kinds
        load(root, **options)
    data = load(kinds, limit_train=20).to("cpu")
    assert (data.channels, data.image_size, len(data.train)) == (3, SIDE, 20)
    both = joined(data.train, load_unlabelled(kinds / "val", data, "always"))
    assert (len(both), both.pixels.shape[1:], len(both[torch.tensor([1, 30])])) == (64, (3, SIDE, SIDE), 2)
    assert len(data.fingerprint()) == len(both.digest) == 64
    assert decoded == []
    data.train.pixels[0]
    assert len(decoded) == 1


def test_subsets_and_limits_pick_what_they_pick_in_memory(kinds):
    for options in ({"limit_train": 10}, {"split_seed": 1}):
        for there, here in zip(
            splits(load(kinds, **options)), splits(load(kinds, "once", **options)), strict=True
        ):
            assert same(there, here)
    there, here = (load(kinds / "train", how, split=0.3) for how in ("always", "once"))
    assert all(map(same, splits(there), splits(here)))
    index = torch.tensor([9, 2, 2])
    assert same(there.train[index][torch.tensor([2, 0])], here.train[index][torch.tensor([2, 0])])


@pytest.mark.parametrize("size", [1, 4])
def test_only_a_few_batches_are_decoded_ahead(streamed, decoded, size):
    count = len(streamed.train)
    for number, _ in enumerate(streamed.train.batches(size)):
        assert len(decoded) <= size * (number + 1 + AHEAD)
    assert len(decoded) == count


def test_chunks_are_asked_for_only_as_they_are_needed(streamed):
    asked = []

    def chunks():
        for number in range(30):
            asked.append(number)
            yield torch.tensor([number])

    for number, _ in enumerate(streamed.train.fetch(chunks())):
        assert len(asked) <= number + 1 + AHEAD
    assert AHEAD <= 4


@pytest.mark.parametrize("through", [lambda images, chunks: images.fetch(chunks),
                                     lambda images, chunks: Viewing("crop-flip", 0, 0).batches(images, chunks, 0)],
                         ids=["fetch", "views"])  # fmt: skip
def test_a_pass_that_is_left_early_leaves_nothing_running(streamed, decoded, through):
    chunks = torch.arange(len(streamed.train)).split(2)
    batches = through(streamed.train, chunks)
    next(batches)
    batches.close()
    assert decoding_threads() == []
    assert len(decoded) <= 2 * (1 + AHEAD)
    for _ in through(streamed.train, chunks):
        break
    assert decoding_threads() == []
    with pytest.raises(ZeroDivisionError):
        _ = [1 / 0 for _ in through(streamed.train, chunks)]
    unused = through(streamed.train, chunks)
    assert decoding_threads() == []
    del unused


# --- Damage in the middle of a pass ------------------------------------------------------------------


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return "image file is truncated"


def emptied(path: Path) -> str:
    path.write_bytes(b"")
    return "the file is empty"


def removed(path: Path) -> str:
    path.unlink()
    return "the file is gone"


@pytest.mark.parametrize("damage", [cut, emptied, removed])
def test_a_file_damaged_since_is_named_when_it_is_met(tmp_path, damage):
    for number, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        write_kinds(tmp_path / name, number)
    data = load(tmp_path)
    place = data.train.pixels.files()[0][0].names[int(data.train.ids[20])]
    why = damage(tmp_path / place)
    met: list[int] = []
    with pytest.raises(DataError) as caught:
        met.extend(map(len, data.train.batches(3)))
    assert met == [3] * 6
    (problem,) = caught.value.problems
    assert problem.what == f"cannot read {tmp_path / place}"
    assert problem.why.startswith(why)
    assert problem.fix == "replace or delete the file"


def test_many_damaged_files_in_a_batch_are_counted(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        write_kinds(tmp_path / name, 0)
    data = load(tmp_path)
    for path in tmp_path.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        next(data.test.batches(64))
    assert len(caught.value.problems) == 11
    assert caught.value.problems[10].what == "and 34 more files that cannot be read"


def test_a_relative_folder_is_found_after_a_change_of_directory(kinds, held, monkeypatch, tmp_path):
    monkeypatch.chdir(kinds.parent)
    data = load(Path(kinds.name))
    monkeypatch.chdir(tmp_path)
    assert data.test.decoded.equal(held.test.decoded)
    assert data.test.pixels.files()[0][0].problem(0, ValueError("no")).what == (
        f"cannot read {Path(kinds.name) / 'test/cat/as it is.png'}"
    )


# --- Memory or files ---------------------------------------------------------------------------------

NEEDED = 3 * 44 * 3 * SIDE * SIDE
"""Bytes of all images of `kinds` when they are decoded."""


@pytest.mark.parametrize(
    ("free", "stays"), [(None, False), (2 * NEEDED + 1, False), (2 * NEEDED, True), (NEEDED, True)]
)
def test_by_default_images_stay_in_files_where_they_take_half_of_the_memory(kinds, monkeypatch, free, stays):
    monkeypatch.setattr(folders, "available_memory", lambda: free)
    with logged() as lines:
        data = load(kinds, "auto")
    assert isinstance(data.train.pixels, FilePixels) == stays
    told = (
        f"INFO: the images of {kinds} are decoded afresh in every pass: "
        "in memory they would take 0.0 GB, and 0.0 GB are free"
    )
    assert lines == ([told] if stays else [])
    assert isinstance(load(kinds, "always").val.pixels, FilePixels)


@pytest.mark.parametrize("kind", ["labelled", "unlabelled"])
def test_images_that_are_wanted_in_memory_must_fit(kinds, streamed, monkeypatch, kind):
    monkeypatch.setattr(folders, "available_memory", lambda: 57024)
    load_it = load if kind == "labelled" else lambda root, how: load_unlabelled(root, streamed, how)
    with refused(
        DataError,
        f"the images of {kinds} do not fit into memory",
        "decoded they take 0.0 GB, and 0.0 GB are free",
        "decode them afresh in every pass: --set decode=always, or smaller: --image-size 64",
    ):
        load_it(kinds, "once")
    monkeypatch.setattr(folders, "available_memory", lambda: math.ceil(NEEDED / 0.8))
    assert isinstance(load_it(kinds, "once"), (Dataset, Images))


@pytest.mark.parametrize(("given", "fix"), [("allways", "did you mean 'always'?"), ("x", "leave it out")])
def test_another_choice_is_refused(kinds, streamed, given, fix):
    for work in (
        lambda: load_data("digits", decode=given),
        lambda: load(kinds, given),
        lambda: load_unlabelled(kinds, streamed, given),
    ):
        with refused(DataError, f"unknown way to decode '{given}'", "known are auto, once, always", fix):
            work()


def test_named_sources_lie_in_memory_whatever_is_chosen():
    assert isinstance(load_data("digits", decode="always").train.pixels, torch.Tensor)


# --- Listing ----------------------------------------------------------------------------------------


def test_files_are_listed_in_the_order_of_the_parts_of_their_paths(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(60):
        parts = [
            "".join(rng.choice(list("aB-./ 1"), 2)).replace("/", "b").strip(". ") or "z" for _ in range(3)
        ]
        path = tmp_path.joinpath(*parts[: rng.integers(0, 3)], f"{parts[2]}.PNG")
        if not any(parent.suffix == ".PNG" for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to("nowhere")
    (tmp_path / "linked.png").symlink_to("a.PNG")
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    for name in (".hidden.png", "._a.png", "__MACOSX/a.png", "a/.b/a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list(folders.image_names(tmp_path))
    expected = [
        path.relative_to(tmp_path)
        for path in sorted(tmp_path.rglob("*"))
        if path.suffix.lower() == ".png"
        and not path.is_dir()
        and not any(part.startswith((".", "__")) for part in path.relative_to(tmp_path).parts)
    ]
    assert found == [path.as_posix() for path in expected]
    assert len(found) > 30


def test_a_folder_that_cannot_be_listed_is_refused(kinds, monkeypatch):
    original = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", closed)
    with refused(
        DataError,
        f"cannot read the folder {kinds / 'train' / 'dog'}",
        "Permission denied",
        "make it readable, or remove it",
    ):
        load(kinds)


def test_looking_at_headers_decodes_no_png(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        write_kinds(tmp_path / name, 0)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail(f"{image} was decoded"))
    assert sum(folders.scan(tmp_path).shapes.values()) == 44


# --- What tells data apart ---------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, kinds: Path) -> Path:
    return Path(shutil.copytree(kinds, tmp_path / "copy"))


def touch(root: Path) -> None:
    path = root / "train" / "cat" / "grey.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def lengthen(root: Path) -> None:
    path = root / "train" / "cat" / "grey.png"
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(before, before))


def rename(root: Path) -> None:
    (root / "train" / "cat" / "grey.png").rename(root / "train" / "cat" / "gray.png")


def relabel(root: Path) -> None:
    (root / "train" / "cat" / "grey.png").rename(root / "train" / "dog" / "grey 2.png")


@pytest.mark.parametrize("change", [touch, lengthen, rename, relabel])
def test_the_fingerprint_changes_with_the_files(copy, streamed, change):
    assert load(copy).fingerprint() == streamed.fingerprint()  # wherever they lie
    change(copy)
    assert load(copy).fingerprint() != streamed.fingerprint()


def test_the_fingerprint_changes_with_the_size_and_the_split_and_nothing_else(kinds, streamed):
    known = streamed.fingerprint()
    assert load(kinds).to("cpu").fingerprint() == known
    assert load(kinds, image_size=SIDE + 1).fingerprint() != known
    assert load(kinds, limit_train=30).fingerprint() != known
    assert load(kinds, split_seed=2).fingerprint() == known
    part = streamed.train[torch.arange(10)]
    assert part.digest != streamed.train[torch.arange(10).flip(0)].digest
    assert part.digest != replace(part, ids=part.ids + 1).digest
    assert part.digest != replace(part, labels=1 - part.known_labels).digest


# --- Mean and deviation ------------------------------------------------------------------------------


def test_mean_and_deviation_are_those_in_memory(streamed, held):
    assert streamed.mean_and_std == held.mean_and_std


def test_of_many_files_a_sample_is_measured_and_of_images_in_memory_all(kinds, held, decoded, monkeypatch):
    data, count = load(kinds), len(held.train)
    monkeypatch.setattr(dataset, "MEASURED", 9)
    with logged() as lines:
        measured = data.mean_and_std
    assert lines == [f"INFO: mean and deviation are those of 9 of the {count} training images"]
    assert len(decoded) == 9
    places = views.order(0, 0, count)[torch.arange(9) * count // 9]
    values = held.train.pixels[places].double() / 255
    assert measured[0] == pytest.approx(values.mean((0, 2, 3)), abs=1e-6)
    assert measured[1] == pytest.approx(values.std((0, 2, 3), correction=0), abs=1e-6)
    assert data.to("cpu").mean_and_std == measured
    assert len(decoded) == 9  # it is known where the data go
    assert load(kinds, "once").mean_and_std == held.mean_and_std


# --- Beside others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["always", "once"])
@pytest.mark.parametrize("second", ["always", "once"])
def test_labelled_and_unlabelled_images_are_joined_wherever_they_are(kinds, streamed, held, first, second):
    expected = joined(held.train, load_unlabelled(kinds / "val", held, "once"))
    labelled = streamed.train if first == "always" else held.train
    both = joined(labelled, load_unlabelled(kinds / "val", held, second))
    assert isinstance(both.pixels, FilePixels) == ("always" in (first, second))
    assert same(both, expected)
    index = views.order(0, 0, len(both))
    assert all(map(same, both.fetch(index.split(9)), expected.fetch(index.split(9))))
    assert same(both[index][torch.arange(20)], expected[index[:20]])
    again = joined(both, both)
    assert same(again, joined(expected, expected))
    digests = {part.digest for part in (both, again, both[index], both[torch.arange(len(both))])}
    assert len(digests) == 3
    alike = replace(both, labels=None, ids=torch.zeros_like(both.ids))
    ends = torch.tensor([0, len(both) - 1])
    assert alike[ends].digest != alike[ends.flip(0)].digest


def test_fields_of_mixed_images_are_carried_along(streamed):
    count = len(streamed.train)
    mixed = replace(streamed.train, partner_labels=torch.arange(count), share=torch.rand(count))
    index = torch.tensor([3, 1])
    for images in (
        mixed,
        mixed.to("cpu"),
        replace(mixed, pixels=torch.zeros(count, 1, 2, 2, dtype=torch.uint8)),
    ):
        for part in (images[index], next(images.fetch([index])), images[index].to("cpu")):
            assert part.partner_labels.tolist() == [3, 1]
            assert part.share.equal(mixed.share[index])


def test_copies_of_test_images_are_found_without_decoding(copy, streamed, held, decoded):
    (copy / "train" / "cat" / "grey.png").rename(copy / "stray.png")
    shutil.copy(copy / "test" / "cat" / "grey.png", copy / "train" / "other name.jpg.png")
    for path in (copy / "val").rglob("*.*"):
        path.unlink()
    warning = "WARNING: {} of the images in {} are test images too: what is measured on them is too good"
    with logged() as lines:
        load_unlabelled(copy, streamed, "always")
        load_unlabelled(copy / "train", streamed, "always")
    assert lines == [warning.format(45, copy), warning.format(1, copy / "train")]
    assert decoded == []
    with logged() as lines:
        load_unlabelled(copy / "train", streamed, "once")
        load_unlabelled(copy / "train", held, "once")
    assert lines == [warning.format(1, copy / "train")] * 2


def test_files_are_not_decoded_to_be_compared_with_test_images_in_memory(copy, held, decoded):
    with logged() as lines:
        load_unlabelled(copy, held, "always")
    assert lines == [
        f"INFO: {copy} is not searched for test images: its images are decoded only when they are used"
    ]
    assert decoded == []


def test_inspection_is_the_same_from_files(kinds, tmp_path):
    facts = []
    for how in ("always", "once"):
        sheet = tmp_path / f"{how}.png"
        facts.append(inspect_data(f"imagefolder:{kinds}", image_size=SIDE, decode=how, sheet=sheet))
        facts[-1]["sheet"] = sheet.read_bytes()
    assert facts[0] == facts[1]
    assert facts[0]["counts"]["train"] == {"cat": 22, "dog": 22}


def test_inspection_lists_what_it_meets_in_files(copy):
    for place in ("train/cat/large.jpg", "test/dog/large.jpg"):
        path = copy / place
        path.write_bytes(path.read_bytes()[:-500])
    errors = inspect_data(f"imagefolder:{copy}", image_size=SIDE, decode="always")["errors"]
    assert len(errors) == 1  # the test split is not looked at
    why = next(line for line in errors[0].splitlines() if "truncated" in line).removeprefix("  why: ")
    assert errors == [
        message(f"cannot read {copy / 'train/cat/large.jpg'}", why, "replace or delete the file")
    ]


def test_positions_on_a_device_are_read_many_at_a_time():
    asked = []
    chunks = (asked.append(number) or torch.arange(number) for number in range(600))
    pairs = streams._with_copies(chunks, torch.device("cuda"))
    for number, (chunk, copy) in enumerate(pairs):
        assert chunk.equal(torch.arange(number))
        assert copy.equal(chunk)
        assert len(asked) in (256, 512, 600)
    assert number == 599


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [1, 5])
def test_batches_are_put_on_the_device(streamed, held, size):
    there, here = streamed.train.to("cuda"), held.train.to("cuda")
    order = views.order(0, 0, len(here), "cuda")
    for one, other in zip(there.fetch(order.split(size)), here.fetch(order.split(size)), strict=True):
        assert one.pixels.device.type == "cuda"
        assert same(one, other)
    assert there.digest == streamed.train.digest
    assert same(joined(there, there), joined(here, here))
    assert same(joined(here, there), joined(here, here))
