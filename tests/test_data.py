"""Named data sources, splits and the in-memory data set."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from support import refused

from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset, Images, check_labels
from ensemble_kd.errors import DataError

IDX_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def splits(data: Dataset) -> dict[str, Images]:
    return {"train": data.train, "val": data.val, "test": data.test}


def class_counts(images: Images, classes: int = 10) -> np.ndarray:
    return np.bincount(images.known_labels.numpy(), minlength=classes)


# --- digits --------------------------------------------------------------------------------------


def test_digits_are_split_into_disjoint_parts(digits):
    assert {name: len(part) for name, part in splits(digits).items()} == {
        "train": 1293,
        "val": 144,
        "test": 360,
    }
    ids = torch.cat([part.ids for part in splits(digits).values()])
    assert sorted(ids.tolist()) == list(range(1797))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_digits_are_those_of_scikit_learn(digits, part):
    images, source = splits(digits)[part], load_digits()
    expected = source.images[images.ids.numpy()] * 255 / 16
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.shape[1:] == (1, 8, 8)
    assert np.abs(images.pixels[:, 0].numpy() - expected).max() <= 0.5
    assert (int(images.pixels.min()), int(images.pixels.max())) == (0, 255)
    assert images.known_labels.tolist() == source.target[images.ids.numpy()].tolist()


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_digits_are_stratified(digits, part):
    images = splits(digits)[part]
    share = np.bincount(load_digits().target) / 1797
    assert np.abs(class_counts(images) - share * len(images)).max() < 2


def test_the_split_seed_alone_decides_the_validation_split(digits):
    again, other = load_data("digits"), load_data("digits", split_seed=1)
    assert again.val.ids.equal(digits.val.ids)
    assert not other.val.ids.equal(digits.val.ids)
    assert other.test.ids.equal(digits.test.ids)
    assert sorted([*other.train.ids, *other.val.ids]) == sorted([*digits.train.ids, *digits.val.ids])


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 144), (0.25, 359), (0.0, 10)])
def test_the_validation_fraction_leaves_one_image_a_class_at_least(fraction, held_out):
    val = load_data("digits", val_fraction=fraction).val
    assert len(val) == held_out
    assert class_counts(val).min() >= 1


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("cifar", "did you mean 'cifar10'?"),
        ("/my/photos", "for a folder of images say imagefolder:/my/photos"),
    ],
)
def test_an_unknown_source_is_refused(source, fix):
    known = "known are digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, tars:PATH, csv:FILE and hf:NAME"
    with refused(DataError, f"unknown data source {source!r}", known, fix):
        load_data(source)


# --- MNIST and Fashion-MNIST ---------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    """LeCun's format: two zero bytes, 8 for unsigned bytes, the shape in big-endian, the data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, suffix: str = "") -> list[np.ndarray]:
    """40 training and 20 test images of 28×28 with labels 0…9 in turn."""
    rng = np.random.default_rng(0)
    arrays = []
    for count in (40, 20):
        arrays += [
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in zip(IDX_STEMS, arrays, strict=True):
        data = idx_bytes(array)
        (folder / f"{stem}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "raw", "FashionMNIST/raw"])
def test_idx_files_are_found_and_read(tmp_path, folder, suffix):
    train_x, train_y, test_x, test_y = write_idx(tmp_path / folder, suffix)
    data = load_data("fashion-mnist", root=tmp_path, offline=True)
    assert np.array_equal(data.test.pixels[:, 0], test_x)
    assert data.test.known_labels.tolist() == test_y.tolist()
    assert data.test.ids.tolist() == list(range(40, 60))
    for part in (data.train, data.val):
        assert np.array_equal(part.pixels[:, 0], train_x[part.ids])
        assert part.known_labels.tolist() == train_y[part.ids].tolist()
    assert (len(data.train), len(data.val)) == (30, 10)


@pytest.mark.parametrize(
    ("source", "folder", "first", "augment"),
    [("mnist", "MNIST/raw", "0", "crop"), ("fashion-mnist", "FashionMNIST/raw", "T-shirt/top", "crop-flip")],
)
def test_each_source_has_its_own_classes_and_views(tmp_path, source, folder, first, augment):
    write_idx(tmp_path / folder)
    data = load_data(source, root=tmp_path, offline=True)
    assert (data.classes[0], len(data.classes), data.channels, data.augment) == (first, 10, 1, augment)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


WHOLE = idx_bytes(np.zeros((40, 28, 28), dtype=np.uint8))
NOISE = gzip.compress(np.random.default_rng(0).bytes(31376))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("", b""),
        ("", WHOLE[:3]),
        ("", WHOLE[:-1]),
        ("", WHOLE + b"x"),
        ("", b"\x00\x00\x0d\x03" + WHOLE[4:]),
        ("", b"<!doctype html><html></html>"),
        (".gz", WHOLE),
        (".gz", gzip.compress(WHOLE)[:-20]),
        (".gz", flipped(gzip.compress(WHOLE), 12)),
        (".gz", flipped(NOISE, len(NOISE) // 2)),
    ],
    ids=[
        "empty",
        "head",
        "short",
        "long",
        "floats",
        "html",
        "not-gzip",
        "gzip-short",
        "gzip-bad-block",
        "gzip-bad-sum",
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, suffix, content):
    write_idx(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data("mnist", root=tmp_path, offline=True)
    problem = caught.value.problems[0]
    assert problem.what == f"cannot read {path}"
    assert problem.why.startswith("it is no intact idx file (")
    assert problem.fix == "delete it and fetch it again"


def test_images_without_their_labels_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(39, dtype=np.uint8) % 10))
    with pytest.raises(DataError):
        load_data("mnist", root=tmp_path, offline=True)


def test_a_label_outside_the_classes_is_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(20, dtype=np.uint8)))
    with refused(
        DataError,
        "mnist, test: 10 label(s) outside 0…9, the first is 10 at image 10",
        "the data has 10 classes",
        "mend the labels, or name all the classes",
    ):
        load_data("mnist", root=tmp_path, offline=True)


IDX_FILES = ", ".join(f"{stem}-ubyte[.gz]" for stem in IDX_STEMS)
ABSENT = [
    ("mnist", "MNIST", IDX_FILES),
    ("fashion-mnist", "FashionMNIST", IDX_FILES),
    ("cifar10", "CIFAR10", "the folder cifar-10-batches-py"),
    ("cifar100", "CIFAR100", "the folder cifar-100-python"),
]


@pytest.fixture
def download(monkeypatch):
    """Set what torchvision's downloads do; FashionMNIST and CIFAR100 inherit theirs."""

    def set_to(action):
        for cls in (torchvision.datasets.MNIST, torchvision.datasets.CIFAR10):
            monkeypatch.setattr(cls, "download", action)

    return set_to


@pytest.mark.parametrize(("source", "name", "files"), ABSENT)
def test_offline_nothing_is_downloaded(tmp_path, download, source, name, files):
    download(lambda self: pytest.fail("a download was tried"))
    with refused(
        DataError,
        f"{name} is not in {tmp_path}",
        "--offline forbids to download it",
        f"put {files} there, or name another folder by --data-root",
    ):
        load_data(source, root=tmp_path, offline=True)


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("File not found or corrupted.")]
)
@pytest.mark.parametrize(("source", "name", "files"), ABSENT)
def test_a_failed_download_says_what_to_put_where(tmp_path, download, source, name, files, error):
    def fail(self):
        raise error

    download(fail)
    with refused(
        DataError,
        f"{name} is not in {tmp_path}",
        f"the download failed: {error}",
        f"put {files} there, or name another folder by --data-root",
    ):
        load_data(source, root=tmp_path)


def test_what_was_downloaded_is_read(tmp_path, download):
    download(lambda self: write_idx(tmp_path / "FashionMNIST" / "raw") and None)
    assert len(load_data("fashion-mnist", root=tmp_path).test) == 20


# --- CIFAR ---------------------------------------------------------------------------------------


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int) -> np.ndarray:
    """Small pickles in torchvision's layout, whose MD5 sums torchvision is told; returns the test pixels."""
    cls = getattr(torchvision.datasets, name)
    labels, names = ("labels", "label_names") if name == "CIFAR10" else ("fine_labels", "fine_label_names")
    meta_file = "batches.meta" if name == "CIFAR10" else "meta"
    files = ("data_batch_1", "data_batch_2", "test_batch") if name == "CIFAR10" else ("train", "test")
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums, pixels = [], np.zeros(0)
    for file in files:
        pixels = rng.integers(0, 256, (3 * classes, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": pixels, labels: [i % classes for i in range(3 * classes)]})
        (folder / file).write_bytes(content)
        sums.append([file, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({names: [f"class {i}" for i in range(classes)]})
    (folder / meta_file).write_bytes(meta)
    monkeypatch.setattr(cls, "train_list", sums[:-1])
    monkeypatch.setattr(cls, "test_list", sums[-1:])
    monkeypatch.setattr(
        cls, "meta", {"filename": meta_file, "key": names, "md5": hashlib.md5(meta).hexdigest()}
    )
    return pixels.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize(
    ("source", "name", "classes", "train"),
    [("cifar10", "CIFAR10", 10, 60), ("cifar100", "CIFAR100", 100, 300)],
)
def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch, source, name, classes, train):
    test_pixels = write_cifar(tmp_path, monkeypatch, name, classes)
    data = load_data(source, root=tmp_path, offline=True)
    assert np.array_equal(data.test.pixels, test_pixels)
    assert data.test.known_labels.tolist() == [i % classes for i in range(3 * classes)]
    assert data.classes == tuple(f"class {i}" for i in range(classes))
    assert len(data.train) + len(data.val) == train
    ids = torch.cat([part.ids for part in splits(data).values()])
    assert sorted(ids.tolist()) == list(range(train + 3 * classes))


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_cifar_file_with_another_md5_is_never_unpickled(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10", 10)
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    pickle.loads(payload)  # noqa: S301 - the payload works: the test would notice
    (tmp_path / "ran").unlink()
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(payload)
    with pytest.raises(DataError, match="CIFAR10"):
        load_data("cifar10", root=tmp_path, offline=True)
    assert not (tmp_path / "ran").exists()


# --- The data set --------------------------------------------------------------------------------


def test_limit_train_draws_evenly_and_touches_nothing_else(digits, few_digits):
    share = class_counts(digits.train) / len(digits.train)
    assert len(few_digits.train) == 200
    assert np.abs(class_counts(few_digits.train) - 200 * share).max() < 1
    assert set(few_digits.train.ids.tolist()) < set(digits.train.ids.tolist())
    assert few_digits.val.ids.equal(digits.val.ids)
    assert few_digits.test.ids.equal(digits.test.ids)
    assert load_data("digits", limit_train=200).train.ids.equal(few_digits.train.ids)


def test_a_limit_that_reaches_all_images_changes_nothing(digits):
    assert digits.limit_train(1293) is digits


def test_a_limit_below_the_number_of_classes_names_the_limit(digits):
    with refused(
        DataError,
        "cannot train on 5 images",
        "the data has 10 classes, and each needs an image",
        "say --limit-train 10 or more",
    ):
        digits.limit_train(5)


@pytest.mark.parametrize(
    ("labels", "count", "first", "where"), [([0, -1, 3, 2], 2, -1, 1), ([0, 1, 2, 9], 1, 9, 3)]
)
def test_labels_outside_the_classes_are_refused(labels, count, first, where):
    with refused(
        DataError,
        f"made: {count} label(s) outside 0…2, the first is {first} at image {where}",
        "the data has 3 classes",
        "mend the labels, or name all the classes",
    ):
        check_labels(torch.tensor(labels), ("a", "b", "c"), "made")
    check_labels(torch.tensor([0, 1, 2]), ("a", "b", "c"), "made")


def test_a_split_without_labels_says_who_needs_them():
    images = Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), None, torch.arange(3))
    with refused(
        DataError,
        "this split has no labels",
        "accuracy and the label loss need them",
        "use labelled images, or --soft-weight 1",
    ):
        _ = images.known_labels


def random_images(count: int, first_id: int = 0, channels: int = 3) -> Images:
    pixels = torch.randint(0, 256, (count, channels, 4, 4), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 2, torch.arange(first_id, first_id + count))


def small(channels: int = 3, train: int = 6) -> Dataset:
    return Dataset(
        "small",
        ("a", "b"),
        random_images(train, 0, channels),
        random_images(4, train, channels),
        random_images(4, train + 4, channels),
    )


def with_pixel(data: Dataset, part: str) -> Dataset:
    images = splits(data)[part]
    pixels = images.pixels.clone()
    pixels[-1, 0, 0, 0] ^= 1
    return replace(data, **{part: replace(images, pixels=pixels)})


def with_label(data: Dataset, part: str) -> Dataset:
    images = splits(data)[part]
    labels = images.known_labels.clone()
    labels[0] = 1 - labels[0]
    return replace(data, **{part: replace(images, labels=labels)})


def with_a_sample_moved(data: Dataset) -> Dataset:
    """The first validation sample becomes the last of the training split."""
    first, rest = data.val[torch.tensor([0])], data.val[torch.arange(1, len(data.val))]
    fields = [torch.cat([getattr(data.train, f), getattr(first, f)]) for f in ("pixels", "labels", "ids")]
    return replace(data, train=Images(*fields), val=rest)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda data, p=part: with_pixel(data, p) for part in ("train", "val", "test")),
        *(lambda data, p=part: with_label(data, p) for part in ("train", "val", "test")),
        with_a_sample_moved,
        lambda data: replace(data, classes=("b", "a")),
        lambda data: replace(data, classes=("a", "b", "c")),
        lambda data: replace(data, val=replace(data.val, labels=None)),
        lambda data: replace(data, train=replace(data.train, ids=data.train.ids + 1)),
    ],
)
def test_the_fingerprint_changes_with_the_data(change):
    data = small()
    assert change(data).fingerprint() != data.fingerprint()


def channels_last(images: Images) -> Images:
    return replace(images, pixels=images.pixels.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: replace(data, name="renamed"),
        lambda data: replace(data, augment="crop"),
        lambda data: replace(data, train=channels_last(data.train)),
        lambda data: replace(data, train=data.train[torch.arange(len(data.train))]),
    ],
)
def test_the_fingerprint_depends_on_nothing_else(change):
    data = small()
    assert change(data).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(("channels", "count"), [(1, 10), (3, 5000)])
def test_mean_and_std_agree_with_numpy(channels, count):
    data = small(channels, count)
    mean, std = data.mean_and_std
    values = data.train.pixels.numpy() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-6)
    assert std == pytest.approx(values.std((0, 2, 3)), abs=1e-6)


def test_a_constant_channel_has_a_deviation_to_divide_by():
    data = small()
    data.train.pixels[:, 1] = 255
    mean, std = data.mean_and_std
    assert mean[1] == pytest.approx(1)
    assert std[1] == pytest.approx(1e-4)


@pytest.mark.parametrize(("size", "lengths"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (64, [10])])
@pytest.mark.parametrize("labelled", [True, False])
def test_batches_cover_a_split_in_order(size, lengths, labelled):
    images = random_images(10) if labelled else replace(random_images(10), labels=None)
    batches = list(images.batches(size))
    assert [len(batch) for batch in batches] == lengths
    assert torch.cat([batch.pixels for batch in batches]).equal(images.pixels)
    assert torch.cat([batch.ids for batch in batches]).equal(images.ids)
    if labelled:
        assert torch.cat([batch.known_labels for batch in batches]).equal(images.known_labels)
    else:
        assert all(batch.labels is None for batch in batches)


def test_an_index_picks_pixels_labels_and_ids_together():
    images = random_images(10, first_id=100)
    picked = images[torch.tensor([7, 2])]
    assert picked.ids.tolist() == [107, 102]
    assert picked.pixels.equal(images.pixels[[7, 2]])
    assert picked.known_labels.tolist() == [1, 0]


def test_the_image_size_is_the_shorter_side():
    pixels = torch.zeros(2, 3, 9, 7, dtype=torch.uint8)
    part = Images(pixels, torch.tensor([0, 1]), torch.arange(2))
    data = Dataset("wide", ("a", "b"), part, part, part)
    assert (data.image_size, data.channels) == (7, 3)
