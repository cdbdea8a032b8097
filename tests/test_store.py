"""The target store: held against plain numpy arrays, killed, damaged, filled up and shared.

Outputs of a view come from a generator seeded by it, so every process knows what each row should be.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from support import logged, refused

from ensemble_kd import files
from ensemble_kd.errors import ConfigError, EkdError, ModelError
from ensemble_kd.locks import lock
from ensemble_kd.objective import Viewing
from ensemble_kd.teachers import layout as layouts
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.teachers.store import Store, key_of, targets_dir
from ensemble_kd.teachers.stored import explain_stale, prune_targets
from ensemble_kd.topk import expand

FACTS = {
    "label": "resnet18", "data": "digits", "teacher": "ab" * 32, "architecture": "resnet18",
    "preprocess": "32x32", "images": "cd" * 32, "policy": "crop", "mix": "none", "seed": 0,
    "views_version": 1, "precision": "float32", "folded": False, "torch": "2.11.0", "timm": "1.0.20",
    "torchvision": "0.25", "ensemble_kd": "0.1.0",
}  # fmt: skip
N, C, D = 40, 10, 3
ROWS = 8
"""Of a shard, where `small_shards` is used."""
DENSE = Layout(N, C, features=D)
TOP = Layout(N, C, 3, (1.0, 4.0), D)
Outputs = namedtuple("Outputs", "logits features")


def outputs(view: int, layout: Layout = DENSE) -> Outputs:
    """What the made-up teacher says to all images of a view."""
    generator = np.random.default_rng(view)
    logits = generator.normal(0, 4, (layout.count, layout.classes)).astype(np.float32)
    features = generator.normal(0, 4, (layout.count, layout.features)).astype(np.float32)
    return Outputs(torch.from_numpy(logits), torch.from_numpy(features) if layout.features else None)


def put(store: Store, view: int, rows: range) -> None:
    logits, features = outputs(view, store.layout)
    part = slice(rows.start, rows.stop)
    store.put(view, rows, logits[part], None if features is None else features[part])


def build(store: Store, views: int, before_shard: Callable[[int], None] = lambda made: None) -> int:
    """Make what is missing of so many views; returns how many shards that were."""
    made = 0
    with store.building(views):
        for view in range(views):
            for rows in store.missing(view):
                before_shard(made)
                put(store, view, rows)
                made += 1
    return made


def halves(view: int, layout: Layout = DENSE) -> np.ndarray:
    """The bytes that dense logits have on the disk, by numpy."""
    logits = outputs(view, layout).logits.numpy()
    return (logits - logits.max(axis=1, keepdims=True)).astype(np.float16)


def on_disk(store: Store, name: str = "logits") -> np.ndarray:
    column = store.layout.columns[name]
    return np.memmap(store.folder / f"{name}.bin", column.dtype, "r").reshape(
        -1, store.layout.count, column.width
    )


def holds(store: Store, views: int, index: torch.Tensor | slice | None = None) -> bool:
    """Whether rows of all views are those of the teacher."""
    where = slice(None) if index is None else index
    good = store.views >= views
    for view in range(views):
        rows = store.rows(view, index)
        wanted = torch.from_numpy(halves(view, store.layout)).float()[where]
        good &= torch.equal(rows.logits, wanted)
        good &= rows.features is None or torch.equal(
            rows.features, outputs(view).features.half().float()[where]
        )
    return good


@pytest.fixture
def small_shards(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of eight rows, so that there are five in a view."""
    use_small_shards(monkeypatch.setattr)


def use_small_shards(set_attribute=setattr) -> None:
    set_attribute(layouts, "SHARD_BYTES", 4 * (C + D) * ROWS)
    for layout in (DENSE, TOP):
        layout.__dict__.pop("shards", None)


@pytest.fixture(autouse=True)
def _shards_as_usual():
    yield
    for layout in (DENSE, TOP):
        layout.__dict__.pop("shards", None)  # computed once, perhaps for small shards


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache on a disk of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    monkeypatch.setenv("EKD_CACHE", str(disk))
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


# --- What a row is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        (Layout(100, 10), 20),
        (Layout(100, 10, dtype="float32"), 40),
        (Layout(100, 1000, features=512), 2 * 1512),
        (Layout(100, 1000, 10, (1, 4)), 10 * 2 + 10 * 2 + 2 * 4),
        (Layout(100, 65536, 10, (1,)), 44),
        (Layout(100, 65537, 10, (1,)), 64),
        (Layout(100, 1000, 10, (1,), 512, "float32"), 10 * 2 + 10 * 4 + 4 + 512 * 4),
    ],
)
def test_bytes_are_those_of_the_columns(layout, row):
    assert layout.row_bytes == row
    assert layout.view_bytes == 100 * row


@pytest.mark.parametrize("layout", [DENSE, Layout(1_281_167, 1000), Layout(50_000, 100), Layout(7, 10**8)])
def test_shards_cover_a_view_once_and_are_no_larger_than_32_mb(layout):
    covered = [row for rows in layout.shards for row in (rows.start, rows.stop)]
    assert covered[0] == 0
    assert covered[-1] == layout.count
    assert covered[1:-1:2] == covered[2::2]
    for rows in layout.shards:
        assert len(rows) == 1 or len(rows) * 4 * (layout.classes + layout.features) <= 1 << 25


def test_more_logits_than_there_are_cannot_be_kept():
    with refused(
        ConfigError,
        "top_k: 11 of 10 logits cannot be kept",
        "it is how many logits of a teacher are kept for each image",
        "give a number from 1 to 10, or leave it out to keep all",
    ):
        Layout(N, C, 11, (1.0,))
    for wrong in ({"top_k": 3}, {"temperatures": (1.0,)}):
        with pytest.raises(ValueError, match="top_k and temperatures belong together"):
            Layout(N, C, **wrong)


# --- In and out -------------------------------------------------------------------------------------


def test_the_files_are_flat_arrays_of_views_samples_and_classes(small_shards):
    store = Store.open(FACTS, DENSE)
    assert build(store, 3) == 15
    assert on_disk(store).shape == (3, N, C)
    for view in range(3):
        assert (on_disk(store)[view] == halves(view)).all()
        assert (on_disk(store, "features")[view] == outputs(view).features.numpy().astype(np.float16)).all()
    known = json.loads((store.folder / "store.json").read_text())
    assert known["facts"] == FACTS
    assert known["views"] == 3
    assert known["layout"] == {
        "count": N, "classes": C, "top_k": None, "temperatures": [], "features": D, "dtype": "float16"
    }  # fmt: skip
    assert store.folder == targets_dir() / key_of(FACTS, DENSE)
    assert len(store.folder.name) == 32


INDICES = {
    "all": None,
    "a slice": slice(3, 31, 7),
    "in order": torch.tensor([0, 1, 2]),
    "out of order, with repeats": torch.tensor([39, 0, 7, 7, 38]),
    "from the end": torch.tensor([-1, -40]),
    "32 bits": torch.tensor([5, 4], dtype=torch.int32),
    "none at all": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("case", INDICES)
def test_rows_come_in_the_order_of_the_index(case, own_cache):
    store = Store.open(FACTS, DENSE)
    build(store, 2)
    index = INDICES[case]
    assert holds(store, 2, index)
    assert holds(Store.open(FACTS, DENSE), 2, index)
    rows = store.rows(1, index)
    assert rows.logits.dtype == rows.features.dtype == torch.float32
    assert rows.topk is None
    rows.logits.zero_()  # a copy
    assert holds(store, 2, index)


def test_half_precision_moves_logits_by_a_two_thousandth_of_their_distance_to_the_largest(own_cache):
    layout = Layout(500, 100)
    store = Store.open(FACTS, layout)
    build(store, 1)
    z = outputs(0, layout).logits.double()
    below = z - z.amax(dim=1, keepdim=True)
    back = store.rows(0).logits.double()
    assert ((back - below).abs() <= below.abs() * 2**-11 + 1e-6).all()
    assert torch.equal(back.argmax(dim=1), z.argmax(dim=1))
    for temperature in (1.0, 4.0):
        apart = ((back / temperature).softmax(1) - (z / temperature).softmax(1)).abs().sum(1) / 2
        assert apart.max() < 2.7e-3


def test_single_precision_comes_back_as_it_was(own_cache):
    layout = Layout(N, C, features=D, dtype="float32")
    store = Store.open(FACTS, layout)
    build(store, 1)
    logits, features = outputs(0)
    assert torch.equal(store.rows(0).logits, logits)
    assert torch.equal(store.rows(0).features, features)


def test_ten_of_a_thousand_logits_give_their_probabilities(own_cache):
    layout = Layout(300, 1000, 10, (4, 1.0))
    store = Store.open(FACTS, layout)
    build(store, 2)
    assert on_disk(store, "index").dtype == np.uint16
    index = torch.tensor([299, 0, 0, 150])
    for view in range(2):
        rows = Store.open(FACTS, layout).rows(view, index)
        assert rows.logits is None
        assert rows.features is None
        z = outputs(view, layout).logits[index].numpy().astype(np.float64)
        for temperature in (1.0, 4.0):
            p = softmax(z / temperature, axis=1)
            q = expand(rows.topk, temperature, 1000).div(temperature).softmax(dim=1).numpy()
            at = np.argsort(-z, axis=1, kind="stable")[:, :10]
            assert (np.sort(rows.topk.classes.numpy()) == np.sort(at)).all()
            np.testing.assert_allclose(np.take_along_axis(q, at, 1), np.take_along_axis(p, at, 1), rtol=5e-3)
            np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)


def test_more_classes_than_16_bits_can_count(own_cache):
    layout = Layout(3, 70_000, 2, (1.0,))
    store = Store.open(FACTS, layout)
    logits = torch.zeros(3, 70_000)
    logits[:, 69_999], logits[:, 65_536] = 9.0, 8.0
    with store.building(1):
        store.put(0, range(3), logits)
    assert store.rows(0).topk.classes.tolist() == [[69_999, 65_536]] * 3


def test_logits_beyond_half_precision_stay_finite(own_cache):
    logits = torch.tensor([[1e6, 1e6 - 2, -1e6, 0.0], [3e38, 0.0, 0.0, 0.0], [-1e5, -1e5, -1e5, -2e5]])
    for layout in (Layout(3, 4), Layout(3, 4, 4, (1.0,))):
        store = Store.open(FACTS, layout)
        with store.building(1):
            store.put(0, range(3), logits)
        rows = store.rows(0)
        back = rows.logits if rows.topk is None else expand(rows.topk, 1.0, 4)
        assert back.isfinite().all()
        torch.testing.assert_close(back.softmax(dim=1), logits.softmax(dim=1), atol=1e-6, rtol=0)


def test_outputs_that_cannot_be_kept(own_cache):
    store = Store.open(FACTS, DENSE)
    logits, features = outputs(0)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        with (
            refused(
                ModelError,
                "teacher 'resnet18' gives NaN or infinite outputs",
                "its weights are damaged, or its input is not what it was trained on",
                "check it with `ekd evaluate`, or leave it out",
            ),
            store.building(1),
        ):
            store.put(0, range(N), logits.index_fill(1, torch.tensor([2]), wrong), features)
    with (
        refused(
            ModelError,
            "features of teacher 'resnet18' reach 70,000",
            "they are kept in half precision, which ends at 65,504",
            "keep no views, so that the teacher is run on each batch: --views 0",
        ),
        store.building(1),
    ):
        store.put(0, range(N), logits, features.index_fill(1, torch.tensor([1]), -7e4))
    assert store.missing(0) == [range(N)]


def test_what_does_not_belong_is_refused(small_shards):
    store = Store.open(FACTS, DENSE)
    logits, features = (values[:ROWS] for values in outputs(0))
    first = range(ROWS)
    with pytest.raises(ValueError, match=r"^view 0 is not being built$"):
        store.put(0, first, logits, features)
    cases = [
        ((2, first, logits, features), "view 2 is not being built"),
        ((0, range(4), logits[:4], features[:4]), r"range\(0, 4\) is no missing shard of view 0"),
        ((0, first, logits[:4], features), r"shaped \[\(4, 10\), \(8, 3\)\], not \[\(8, 10\), \(8, 3\)\]"),
        ((0, first, logits, features[:, :2]), r"shaped \[\(8, 10\), \(8, 2\)\], not"),
        ((0, first, logits), r"shaped \[\(8, 10\), None\], not"),
        ((0, first, logits.T, features), r"shaped \[\(10, 8\), \(8, 3\)\], not"),
    ]
    with store.building(2):
        for arguments, told in cases:
            with pytest.raises(ValueError, match=told):
                store.put(*arguments)
        store.put(0, first, logits, features)
        with pytest.raises(ValueError, match=r"range\(0, 8\) is no missing shard of view 0"):
            store.put(0, first, logits, features)
    with pytest.raises(ValueError, match="view 0 of resnet18 is not complete"):
        store.rows(0)
    build(store, 1)
    with pytest.raises(ValueError, match="view 1 of resnet18 is not complete"):
        store.rows(1)
    with pytest.raises(IndexError):
        store.rows(0, torch.tensor([N]))


# --- Growth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [DENSE, TOP])
def test_four_views_grow_to_sixteen_and_keep_their_bytes(layout, small_shards):
    store = Store.open(FACTS, layout)
    assert build(store, 4) == 20
    before = {name: on_disk(store, name).tobytes() for name in layout.columns}
    grown = Store.open(FACTS, layout)
    assert grown.views == 4
    assert build(grown, 16) == 60
    for name, old in before.items():
        assert on_disk(grown, name).shape[0] == 16
        assert on_disk(grown, name).tobytes().startswith(old)
    assert store.views == 4
    assert torch.equal(store.rows(3).features, grown.rows(3).features)
    assert build(store, 16) == 0
    assert store.views == 16
    assert build(Store.open(FACTS, layout), 4) == 0


def test_views_are_counted_up_to_the_first_that_is_missing(small_shards):
    store = Store.open(FACTS, DENSE)
    with store.building(3):
        for rows in [*store.missing(0), *store.missing(2)]:
            put(store, 0 if store.missing(0) else 2, rows)
    assert store.views == 1
    assert store.missing(1) == [range(at, at + ROWS) for at in range(0, N, ROWS)]
    assert build(store, 3) == 5
    assert holds(store, 3)


def test_a_shard_that_was_kept_is_not_made_again(small_shards):
    def stop(made: int) -> None:
        if made == 3:
            raise KeyboardInterrupt

    store = Store.open(FACTS, DENSE)
    with pytest.raises(KeyboardInterrupt):
        build(store, 2, stop)
    assert Store.open(FACTS, DENSE).missing(0) == [range(24, 32), range(32, 40)]
    assert build(store, 2) == 7
    assert holds(Store.open(FACTS, DENSE), 2)


# --- Keys -------------------------------------------------------------------------------------------

CHANGES = {
    "teacher": ("ff" * 32, "weights abababab → ffffffff"),
    "architecture": ("resnet34", "architecture resnet18 → resnet34"),
    "preprocess": ("64x64", "preprocessing 32x32 → 64x64"),
    "images": ("0" * 64, "images cdcdcdcd → 00000000"),
    "policy": ("crop-flip", "view policy crop → crop-flip"),
    "mix": ("mixup", "mixing none → mixup"),
    "seed": (1, "view seed 0 → 1"),
    "views_version": (2, "version of views 1 → 2"),
    "precision": ("bfloat16", "precision float32 → bfloat16"),
    "folded": (True, "folded normalisation no → yes"),
    "torch": ("2.15.0", "torch 2.11.0 → 2.15.0"),
    "timm": ("1.0.31", "timm 1.0.20 → 1.0.31"),
    "torchvision": ("0.26", "torchvision 0.25 → 0.26"),
    "ensemble_kd": ("0.2.0", "ensemble-kd 0.1.0 → 0.2.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_fact_gives_another_key_and_is_told(name, own_cache):
    build(Store.open(FACTS, DENSE), 1)
    value, told = CHANGES[name]
    changed = FACTS | {name: value}
    assert key_of(changed, DENSE) != key_of(FACTS, DENSE)
    assert explain_stale(changed, DENSE) == f"stored targets of resnet18 for digits are made anew: {told}"
    assert Store.open(changed, DENSE).views == 0
    assert explain_stale(FACTS, DENSE) is None


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (Layout(41, C, features=D), "number of images 40 → 41"),
        (Layout(N, 11, features=D), "number of classes 10 → 11"),
        (Layout(N, C), "number of features 3 → 0"),
        (Layout(N, C, features=D, dtype="float32"), "number format float16 → float32"),
        (TOP, "top-k none → 3, temperatures none → 1 and 4"),
    ],
)
def test_another_layout_is_another_store(layout, told, own_cache):
    build(Store.open(FACTS, DENSE), 1)
    assert explain_stale(FACTS, layout) == f"stored targets of resnet18 for digits are made anew: {told}"


def test_the_nearest_store_is_held_against(own_cache):
    assert explain_stale(FACTS, DENSE) is None
    build(Store.open(FACTS | {"seed": 7, "torch": "2.9"}, DENSE), 1)
    build(Store.open(FACTS | {"seed": 8}, DENSE), 1)
    build(Store.open(FACTS | {"label": "vgg16", "seed": 1, "mix": "cutmix"}, DENSE), 1)
    about = "stored targets of resnet18 for digits are made anew: "
    assert explain_stale(FACTS, DENSE) == about + "view seed 8 → 0"
    both = FACTS | {"seed": 7, "torch": "2.15.0"}
    assert explain_stale(both, DENSE) == about + "torch 2.9 → 2.15.0"
    assert explain_stale(FACTS | {"label": "vit"}, DENSE) is None
    assert explain_stale(FACTS | {"data": "mnist"}, DENSE) is None
    more = {key: value for key, value in FACTS.items() if key != "mix"} | {
        "seed": 8,
        "class map": [[1], [0]] * 20,
    }
    map_told = files.sha256_json([[1], [0]] * 20)[:8]
    assert explain_stale(more, DENSE) == about + f"class map none → {map_told}, mix none → none".replace(
        "mix ", "mixing "
    )


def test_names_for_people_are_no_part_of_the_key(own_cache):
    assert key_of(FACTS | {"label": "a", "data": "b"}, DENSE) == key_of(FACTS, DENSE)
    assert key_of(FACTS, Layout(N, C, 3, (4, 1), D)) == key_of(FACTS, TOP)
    build(Store.open(FACTS, DENSE), 1)
    assert holds(Store.open(FACTS | {"label": "a"}, DENSE), 1)


# --- Damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [DENSE, TOP])
def test_every_flipped_bit_costs_its_shard_alone(layout, small_shards):
    store = Store.open(FACTS, layout)
    build(store, 2)
    rng = random.Random(0)
    for trial in range(100):
        name = rng.choice(list(layout.columns))
        path, row_bytes = store.folder / f"{name}.bin", layout.columns[name].row_bytes
        at, bit = rng.randrange(2 * N * row_bytes), 1 << rng.randrange(8)
        view, row = divmod(at // row_bytes, N)
        flip(path, at, bit)
        with logged() as lines:
            damaged = Store.open(FACTS, layout)
        where = range(row - row % ROWS, row - row % ROWS + ROWS)
        assert damaged.missing(view) == [where]
        assert damaged.missing(1 - view) == []
        assert lines == [
            f"WARNING: targets of resnet18: 1 of 10 parts are damaged, and made again ({store.folder})"
        ]
        if trial % 10:
            flip(path, at, bit)
        else:
            with logged() as lines:
                assert build(damaged, 2) == 1
                assert Store.open(FACTS, layout).views == 2
            assert lines == []
    assert layout is TOP or holds(Store.open(FACTS, layout), 2)


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def test_files_that_end_too_early_or_are_gone(small_shards):
    store = Store.open(FACTS, DENSE)
    build(store, 2)
    row = 2 * C
    os.truncate(store.folder / "logits.bin", (N + 20) * row + 1)
    with logged() as lines:
        store = Store.open(FACTS, DENSE)
    assert lines == [
        f"WARNING: targets of resnet18: 3 of 10 parts are damaged, and made again ({store.folder})"
    ]
    assert store.missing(1) == [range(16, 24), range(24, 32), range(32, 40)]
    assert holds(store, 1)
    assert build(store, 2) == 3
    assert holds(Store.open(FACTS, DENSE), 2)
    (store.folder / "features.bin").unlink()
    assert build(Store.open(FACTS, DENSE), 2) == 10
    assert holds(Store.open(FACTS, DENSE), 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"count": 40', '"count": 41'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"shards"', '"shard"'),
        lambda text: text.replace('"0": [', '"x": ['),
        lambda text: text.replace('"classes": 10', '"classes": 10, "pickle": 1'),
        lambda text: text.replace("null", "[1]").replace('"top_k": [1]', '"top_k": "1"'),
    ],
)
def test_a_damaged_store_json_means_an_empty_store(damage, small_shards):
    store = Store.open(FACTS, DENSE)
    build(store, 1)
    path = store.folder / "store.json"
    path.write_text(damage(path.read_text()))
    with logged() as lines:
        store = Store.open(FACTS, DENSE)
    assert lines == [f"WARNING: targets of resnet18: store.json is damaged, and made again ({store.folder})"]
    assert store.views == 0
    assert build(store, 1) == 5
    assert holds(Store.open(FACTS, DENSE), 1)


# --- Other processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that start from one which has the libraries loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "scipy.special", "ensemble_kd.teachers.stored"])
    return context


def in_child(cache: str) -> None:
    os.environ["EKD_CACHE"] = cache
    torch.set_num_threads(1)
    use_small_shards()


def build_until_killed(cache, views, pipe) -> None:
    """Build at most six shards; tell of the beginning, and of each when it is kept."""
    in_child(cache)

    def tell(made: int) -> None:
        pipe.send(made)
        if made == 6:
            time.sleep(60)

    build(Store.open(FACTS, DENSE), views, tell)


def build_and_tell(cache, views, start, pipe) -> None:
    """Build when all are ready; tell how many shards were made, and whether all is right."""
    in_child(cache)
    store = Store.open(FACTS, DENSE)
    start.wait()
    pipe.send((build(store, views), holds(store, views)))


def read_and_tell(cache, pipe) -> None:
    """Read whatever is complete until told to stop; tell whether all was right, and how many views there are."""
    in_child(cache)
    good = True
    pipe.send("reading")
    while not pipe.poll():
        store = Store.open(FACTS, DENSE)
        good &= holds(store, store.views, torch.randint(N, (16,)))
    store = Store.open(FACTS, DENSE)
    pipe.send((good and holds(store, store.views), store.views))


def run(processes, target, *arguments):
    """A process that gets one end of a pipe, and the other end."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def test_kills_at_random_moments_leave_what_is_right(small_shards, own_cache, processes):
    """Four builders are killed, each after some shards; what they kept is right, and is gone on with."""
    views, rng, kept = 8, random.Random(1), 0
    for _ in range(4):
        process, pipe = run(processes, build_until_killed, str(own_cache), views)
        told = [pipe.recv() for _ in range(rng.randint(1, 6))]
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        process.join()
        with logged() as lines:
            store = Store.open(FACTS, DENSE)
        assert lines == []
        held = N // ROWS * views - sum(len(store.missing(view)) for view in range(views))
        assert kept + told[-1] <= held <= kept + 6
        kept = held
        assert holds(store, store.views)
        for view in range(store.views, views):
            there = np.setdiff1d(np.arange(N), [row for rows in store.missing(view) for row in rows])
            assert (on_disk(store)[view][there] == halves(view)[there]).all()
    assert build(store, views) == N // ROWS * views - kept
    assert holds(Store.open(FACTS, DENSE), views)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "features.bin", "lock", "logits.bin", "store.json"
    ]  # fmt: skip


def test_what_a_kill_left_half_written_is_swept(small_shards):
    store = Store.open(FACTS, DENSE)
    build(store, 1)
    (store.folder / ".store.json.01234567.tmp").write_text("{")
    build(store, 2)
    assert not list(store.folder.glob(".*"))


def test_two_builders_at_once_do_the_work_once(small_shards, own_cache, processes):
    start = processes.Barrier(2)
    runs = [run(processes, build_and_tell, str(own_cache), 6, start) for _ in range(2)]
    told = [pipe.recv() for _, pipe in runs]
    for process, _ in runs:
        process.join()
    assert sorted(told) == [(0, True), (30, True)]
    assert holds(Store.open(FACTS, DENSE), 6)


def test_who_waits_says_so_once(small_shards):
    store = Store.open(FACTS, DENSE)
    other = lock(store.folder)
    assert lock(store.folder) is None
    waiting = threading.Event()
    with logged() as lines:
        thread = threading.Thread(target=lambda: (waiting.set(), build(store, 1)))
        thread.start()
        waiting.wait()
        while not lines:
            time.sleep(0.01)
        assert store.views == 0
        other.close()
        thread.join()
    assert lines == ["INFO: another process makes the targets of resnet18: waiting for it"]
    assert holds(store, 1)


def test_who_waited_for_a_store_that_was_removed_makes_it_anew(small_shards):
    build(Store.open(FACTS, DENSE), 1)
    store = Store.open(FACTS, DENSE)
    other = lock(store.folder)
    with logged() as lines:
        thread = threading.Thread(target=build, args=(store, 2))
        thread.start()
        while not lines:
            time.sleep(0.01)
        shutil.rmtree(store.folder)
        other.close()
        thread.join()
    assert holds(store, 2)
    assert holds(Store.open(FACTS, DENSE), 2)


def test_readers_see_whole_views_while_the_store_grows(small_shards, own_cache, processes):
    store = Store.open(FACTS, DENSE)
    build(store, 1)
    readers = [run(processes, read_and_tell, str(own_cache))[1] for _ in range(3)]
    assert {pipe.recv() for pipe in readers} == {"reading"}
    for views in range(2, 8):
        build(store, views)
    for pipe in readers:
        pipe.send("stop")
    assert {pipe.recv() for pipe in readers} == {(True, 7)}


def test_threads_read_the_same(own_cache):
    store = Store.open(FACTS, DENSE)
    build(store, 3)
    good = []
    threads = [threading.Thread(target=lambda: good.append(holds(store, 3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 4


def test_a_reader_outlives_the_removal_of_its_store(own_cache):
    store = Store.open(FACTS, DENSE)
    build(store, 2)
    reader = Store.open(FACTS, DENSE)
    prune_targets(everything=True)
    assert not store.folder.exists()
    assert holds(store, 2)
    assert holds(reader, 2)
    assert build(reader, 3) == 3  # all of it, as nothing is there any more
    assert holds(reader, 3)


# --- Room, and caches that cannot be written --------------------------------------------------------


def test_room_is_looked_for_before_anything_is_written(small_shards, monkeypatch):
    store = Store.open(FACTS, DENSE)
    build(store, 1)
    usage = shutil.disk_usage(store.folder)
    needed = 3 * DENSE.view_bytes
    assert needed == 3 * 40 * 26
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    before = (store.folder / "logits.bin").stat().st_size
    with (
        refused(
            EkdError,
            "no room for the targets of resnet18: 3.1 kB are needed, 3.1 kB are free",
            f"they are kept in {store.folder}",
            "remove old ones, `ekd targets prune --older-than 30`, or keep them elsewhere: EKD_CACHE=PATH",
        ),
        store.building(4),
    ):
        pass
    assert (store.folder / "logits.bin").stat().st_size == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert build(store, 4) == 15
    with lock(store.folder) as held:
        assert held


def test_a_disk_that_fills_up_meanwhile(small_disk, monkeypatch):
    """Others take the room after it was looked for: what was kept stays, and building goes on later."""
    layout = Layout(1000, 100)  # 200 kB a view
    monkeypatch.setattr(layouts, "SHARD_BYTES", 4 * 100 * 100)  # 20 kB each
    store = Store.open(FACTS, layout)

    def fill(made: int) -> None:
        if made == 10:
            (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))

    with pytest.raises(EkdError) as caught:
        build(store, 3, fill)
    assert str(caught.value).startswith("no room for the targets of resnet18: 20.0 kB are needed, ")
    (small_disk / "other").unlink()
    kept = Store.open(FACTS, layout)
    assert holds(kept, 1)
    left = len(kept.missing(1))
    assert 7 <= left <= 9
    assert build(kept, 3) == left + 10
    assert holds(Store.open(FACTS, layout), 3)


def test_a_full_disk_from_the_start_gives_a_temporary_store(small_disk, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    store = Store.open(FACTS, DENSE)
    folder = store.folder
    with logged() as lines:
        assert build(store, 2) == 2
    assert lines == [
        f"WARNING: targets of resnet18 are kept for this run only: No space left on device ({folder})"
    ]
    assert holds(store, 2)


def test_a_read_only_cache_is_read_and_not_written(small_disk, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    build(Store.open(FACTS, DENSE), 2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with logged() as lines:
        store = Store.open(FACTS, DENSE)
        assert build(store, 2) == 0
    assert lines == []
    assert holds(store, 2)
    folder = store.folder
    with logged() as lines:
        assert build(store, 3) == 3
    assert lines == [
        f"WARNING: targets of resnet18 are kept for this run only: Read-only file system ({folder})"
    ]
    assert store.temporary
    assert holds(store, 3)


def test_a_cache_that_is_no_folder_gives_a_temporary_store(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    store = Store.open(FACTS, DENSE)
    folder = store.folder
    with logged() as lines:
        assert build(store, 1) == 1
    assert lines == [f"WARNING: targets of resnet18 are kept for this run only: Not a directory ({folder})"]
    assert holds(store, 1)


def test_a_store_without_facts_goes_with_its_object(own_cache, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store.open(None, DENSE)
    assert store.label == "a teacher"
    assert store.folder.parent == tmp_path
    build(store, 2)
    assert build(store, 3) == 1
    assert holds(store, 3)
    assert not own_cache.exists()
    other = Store.open(None, DENSE)
    assert other.views == 0
    folders = store.folder, other.folder
    del store, other
    gc.collect()
    assert not any(folder.exists() for folder in folders)


def test_two_teachers_with_the_same_weights_do_not_wait_for_each_other(own_cache):
    first, second = Store.open(FACTS, DENSE), Store.open(FACTS | {"label": "copy"}, DENSE)
    folder = second.folder
    with logged() as lines, first.building(1), second.building(1):
        for store in (first, second):
            put(store, 0, range(N))
    assert lines == [
        f"WARNING: targets of copy are kept for this run only: another teacher has the same weights ({folder})"
    ]
    assert holds(first, 1)
    assert holds(second, 1)
    assert holds(Store.open(FACTS, DENSE), 1)


def test_the_facts_of_these_tests_are_those_that_teachers_have(few_digits, own_cache):
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1})
    facts = teacher.facts(few_digits.train, "digits", Viewing("crop", 1, 0), torch.float32)
    assert facts.keys() == FACTS.keys()
