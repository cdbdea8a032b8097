"""`ekd targets` and the functions behind it: what is listed, verified and removed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import message, refused
from typer.testing import CliRunner

from ensemble_kd.cli import app
from ensemble_kd.errors import ConfigError
from ensemble_kd.files import readable
from ensemble_kd.locks import lock
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.store import Store, targets_dir
from ensemble_kd.teachers.stored import list_targets, prune_targets, verify_targets

FACTS = {"label": "resnet18", "data": "digits", "policy": "crop", "seed": 0}
LAYOUT = Layout(40, 10, features=3)
DAY = 24 * 60 * 60


def ekd(*arguments):
    """Run `ekd targets` in this process; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, ["targets", *(str(a) for a in arguments)])


def keep(views: int = 2, layout: Layout = LAYOUT, **facts) -> Store:
    """A store with so many views of made-up outputs."""
    store = Store.open(FACTS | facts, layout)
    generator = torch.Generator().manual_seed(0)
    with store.building(views):
        for view in range(views):
            for rows in store.missing(view):
                logits = torch.randn(len(rows), layout.classes, generator=generator)
                features = (
                    torch.randn(len(rows), layout.features, generator=generator) if layout.features else None
                )
                store.put(view, rows, logits, features)
    return store


def used(store: Store, days: float) -> Store:
    """The store, as if it was used last so many days ago."""
    when = time.time() - days * DAY
    os.utime(store.folder / "store.json", (when, when))
    return store


def damage(store: Store, view: int = 1, row: int = 17) -> None:
    """Flip a bit of the logits of a row."""
    values = np.memmap(store.folder / "logits.bin", np.uint16, "r+").reshape(-1, 40, 10)
    values[view, row, 3] ^= 1
    values.flush()


@pytest.fixture(autouse=True)
def _own_temporary_folder(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


# --- ls ---------------------------------------------------------------------------------------------


def test_nothing_is_kept(own_cache):
    result = ekd("ls")
    assert result.exit_code == 0
    assert result.stdout == f"no targets are kept in {own_cache / 'targets'}\n"
    assert json.loads(ekd("ls", "--json").stdout) == {"targets": []}
    assert ekd("verify").stdout == "no targets are kept\n"
    assert ekd("prune", "--all").stdout == "0 B removed\n"


def test_ls_shows_what_is_kept_the_last_used_first():
    old = used(keep(), 3)
    top = keep(3, Layout(40, 10, 4, (1, 4)), label="vgg16", policy="crop-flip")
    with pytest.raises(KeyboardInterrupt), top.building(4):
        raise KeyboardInterrupt
    rows = list_targets()
    assert [row["key"] for row in rows] == [top.folder.name, old.folder.name]
    first, second = rows
    assert {name: first[name] for name in ("teacher", "data", "policy", "kind", "count", "classes", "views")} == {
        "teacher": "vgg16", "data": "digits", "policy": "crop-flip", "kind": "top-4", "count": 40,
        "classes": 10, "views": 3,
    }  # fmt: skip
    assert second["kind"] == "dense"
    assert second["missing_shards"] == 0
    assert second["damaged"] is None
    assert second["folder"] == str(old.folder)
    on_disk = sum(path.stat().st_blocks * 512 for path in old.folder.iterdir())
    assert second["bytes"] == on_disk >= 2 * LAYOUT.view_bytes
    assert second["created"] >= second["used"]
    text = ekd("ls").stdout
    assert text.index(top.folder.name[:12]) < text.index(old.folder.name[:12])
    assert text.splitlines()[0].split() == [
        "key", "teacher", "data", "views", "of", "kind", "views", "size", "last", "used"
    ]  # fmt: skip
    assert text.splitlines()[-1].endswith(f" in {targets_dir()}")
    assert json.loads(ekd("ls", "--json").stdout) == {"targets": rows}


def test_ls_shows_parts_and_damage(monkeypatch):
    monkeypatch.setattr("ensemble_kd.teachers.layout.SHARD_BYTES", 4 * 13 * 8)
    layout = Layout(40, 10, features=3)
    store = Store.open(FACTS, layout)
    with store.building(2):
        for view, rows in [(0, rows) for rows in store.missing(0)] + [(1, range(8))]:
            store.put(view, rows, torch.zeros(8, 10), torch.zeros(8, 3))
    (row,) = list_targets()
    assert (row["views"], row["missing_shards"]) == (1, 4)
    assert "1, and a part" in ekd("ls").stdout
    (store.folder / "store.json").write_text("{")
    (row,) = list_targets()
    assert (row["views"], row["damaged"], row["teacher"]) == (None, "store.json", None)
    assert "damaged" in ekd("ls").stdout


def test_opening_counts_as_use():
    store = used(keep(), 10)
    Store.open(FACTS, LAYOUT)
    assert time.time() - (store.folder / "store.json").stat().st_mtime < 60


# --- verify -----------------------------------------------------------------------------------------


def test_verify_finds_what_is_damaged():
    good, bad = keep(), keep(3, seed=1)
    assert ekd("verify").exit_code == 0
    damage(bad)
    rows = {row["key"]: row for row in verify_targets()}
    assert rows[good.folder.name] == {
        "key": good.folder.name, "teacher": "resnet18", "data": "digits", "shards": 2, "damaged": []
    }  # fmt: skip
    assert rows[bad.folder.name]["shards"] == 3
    assert rows[bad.folder.name]["damaged"] == ["view 1, images 0 to 39"]

    result = ekd("verify")
    assert result.exit_code == 2
    assert "view 1, images 0 to 39" in result.stdout
    assert result.stderr == "error: " + message(
        f"kept targets are damaged: {bad.folder.name[:12]}",
        "they are not what was written: a disk or another program changed them",
        "run the distillation again: damaged parts are noticed and made anew\n",
    )
    assert ekd("verify", good.folder.name).exit_code == 0
    both = ekd("verify", "--json", good.folder.name[:8], bad.folder.name)
    assert both.exit_code == 2
    assert {row["key"]: row for row in json.loads(both.stdout)["targets"]} == rows

    keep(3, seed=1)  # what the message advises
    assert ekd("verify").exit_code == 0


def test_verify_finds_a_damaged_store_json():
    store = keep()
    (store.folder / "store.json").write_text("")
    (row,) = verify_targets()
    assert row["damaged"] == ["store.json"]
    assert ekd("verify").exit_code == 2


# --- Keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [verify_targets, prune_targets])
def test_keys_that_name_none_or_several(function):
    with refused(
        ConfigError,
        "no kept targets have the key 'abc'",
        "kept are none at all",
        "see which they are: ekd targets ls",
    ):
        function(["abc"])
    names = sorted(keep(1, seed=seed).folder.name for seed in range(17))
    shown = ", ".join(name[:12] for name in names[:10]) + " … and 7 more"
    with refused(
        ConfigError,
        "no kept targets have the key 'x'",
        f"kept are {shown}",
        "see which they are: ekd targets ls",
    ):
        function(["x"])
    with refused(
        ConfigError,
        "no kept targets have the key ''",
        f"kept are {shown}",
        "see which they are: ekd targets ls",
    ):
        function([""])
    # 17 keys begin with 16 digits: two of them with the same.
    digit = next(name[0] for name, after in itertools.pairwise(names) if name[0] == after[0])
    count = sum(name[0] == digit for name in names)
    with refused(
        ConfigError,
        f"{count} stores of targets have keys that begin with {digit!r}",
        f"kept are {shown}",
        "see which they are: ekd targets ls",
    ):
        function([names[0], digit])
    assert len(list_targets()) == 17


# --- prune ------------------------------------------------------------------------------------------


def test_prune_without_a_name_is_refused():
    store = keep()
    with refused(
        ConfigError,
        "nothing is named that could be removed",
        "kept targets took teachers' time, and go only where it is meant",
        "name keys as `ekd targets ls` shows them, or say --older-than DAYS, or --all",
    ):
        prune_targets()
    result = ekd("prune")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: nothing is named that could be removed\n")
    assert ekd("prune", "--older-than", "-1").exit_code == 2
    assert store.folder.exists()


def test_prune_by_key_age_and_all():
    stores = {days: used(keep(1, seed=days), days) for days in (0, 10, 40, 50)}
    row = list_targets()[-1]
    rehearsed = ekd("prune", "--older-than", 30, "--dry-run")
    assert rehearsed.exit_code == 0
    assert rehearsed.stdout.count("would be removed: ") == 2
    assert f"would be removed: {row['key'][:12]} resnet18 for digits, " in rehearsed.stdout
    assert all(store.folder.exists() for store in stores.values())

    done = prune_targets([stores[40].folder.name, stores[0].folder.name], older_than_days=30)
    assert [row["key"] for row in done["removed"]] == [stores[40].folder.name]
    assert done["bytes"] == done["removed"][0]["bytes"] > 0

    result = ekd("prune", "--older-than", 30, "--json")
    assert json.loads(result.stdout)["removed"] == [row]
    assert [store.folder.exists() for store in stores.values()] == [True, True, False, False]
    assert ekd("prune", stores[10].folder.name[:10]).exit_code == 0
    assert not stores[10].folder.exists()
    assert ekd("prune", "--all").stdout.splitlines()[-1].endswith("kB removed")
    assert not stores[0].folder.exists()
    assert not list(targets_dir().iterdir())


def test_a_store_that_is_being_built_is_never_removed():
    store = keep()
    with lock(store.folder):
        done = prune_targets(everything=True)
        assert done["removed"] == []
        assert [row["key"] for row in done["in_use"]] == [store.folder.name]
        assert ekd("prune", "--all").stdout == (
            f"in use, and left: {store.folder.name[:12]} resnet18 for digits\n0 B removed\n"
        )
    assert store.folder.exists()
    assert [row["key"] for row in prune_targets(everything=True)["removed"]] == [store.folder.name]


def test_prune_removes_a_damaged_store():
    store = keep()
    (store.folder / "store.json").write_text("{")
    result = ekd("prune", "--all")
    assert result.stdout.startswith(f"removed: {store.folder.name[:12]}, ")
    assert not store.folder.exists()


LEAVE = """
import os, sys, tempfile
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.store import Store
tempfile.tempdir = sys.argv[1]
store = Store.open(None, Layout(40, 10))
print(store.folder, flush=True)
sys.stdin.read()
"""


def test_prune_sweeps_what_killed_processes_and_earlier_versions_left(own_cache, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", LEAVE, tmp_path / "tmp"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    left = Path(child.stdout.readline().strip())
    alive = Store.open(None, LAYOUT).folder  # its object is gone at once
    assert not alive.exists()
    mine = Store.open(None, LAYOUT)
    (own_cache / "outputs").mkdir(parents=True)
    (own_cache / "outputs" / "x.safetensors").write_bytes(bytes(5000))
    begun = targets_dir() / ("0" * 32)
    begun.mkdir(parents=True)
    (begun / "lock").touch()
    newborn = tmp_path / "tmp" / "ekd-targets-newborn"
    newborn.mkdir()
    for folder in (left, mine.folder):
        os.utime(folder, (0, 0))

    def leftovers(**options) -> set[str]:
        return set(prune_targets(older_than_days=1000, **options)["leftovers"])

    swept = {str(begun), str(own_cache / "outputs")}
    assert leftovers(dry_run=True) == swept
    child.kill()
    child.communicate()
    assert leftovers(dry_run=True) == swept | {str(left)}
    size = prune_targets(older_than_days=1000, dry_run=True)["bytes"]
    assert size == prune_targets(older_than_days=1000, dry_run=True)["bytes"] >= 5000
    done = ekd("prune", "--older-than", "1000")
    assert done.stdout.splitlines()[-1] == f"{readable(size)} removed"
    assert f"removed: {left}, left over" in done.stdout
    assert not left.exists()
    assert not begun.exists()
    assert not (own_cache / "outputs").exists()
    assert newborn.exists()
    assert mine.folder.exists()


def test_help_names_what_there_is():
    text = ekd("--help").stdout
    for verb in ("ls", "verify", "prune"):
        assert verb in text
        flags = [line for line in ekd(verb, "--help").stdout.splitlines() if line.strip().startswith("-")]
        assert all(len(line.split()) >= 3 for line in flags), flags
    assert "targets" in CliRunner().invoke(app, ["--help"]).stdout
