"""What must survive kills, flipped bits, malformed files, full disks, signals and a second process.

    python tests/torture.py [--scale 1.0] [--only exports] [--out results.json]

One row a promise: how many trials, how many survived. Processes are forked after everything is imported, so a
trial costs milliseconds and kills fall at random moments of the work. A short form runs in the tests.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import ensemble_kd
from ensemble_kd import config, files
from ensemble_kd.checkpoints import Checkpoints, Snapshot
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.data.sources import _read_idx
from ensemble_kd.distillation import distill
from ensemble_kd.errors import EkdError, TrainingError
from ensemble_kd.fit import fit
from ensemble_kd.loop import Loop
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.stepping import Recipe
from ensemble_kd.tables import text_table
from ensemble_kd.teachers import library
from ensemble_kd.teachers.class_map import read_map
from ensemble_kd.teachers.layout import Layout
from ensemble_kd.teachers.store import Store, read_kept
from ensemble_kd.verifying import verify
from ensemble_kd.weights import load_classifier, load_student, save_classifier

CPU = torch.device("cpu")
CLASSES = tuple("0123456789")


class Row(NamedTuple):
    """A promise, and how often it was put to the test and held."""

    promise: str
    trials: int
    survived: int
    note: str = ""


def tiny(seed: int = 0) -> Classifier:
    """A network with every kind of state: weights, buffers, draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(144, 10),
        )
    return Classifier(net, Card("tiny", "stock", Preprocess(1, (8, 8), (0.5,), (0.5,)), CLASSES))


def a_lenet(seed: int = 0) -> Classifier:
    """One that a file can bring back."""
    from ensemble_kd.students import LeNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(
            LeNet(10, 1, 28), Card("lenet", "stock", Preprocess(1, (28, 28), (0.5,), (0.5,)), CLASSES)
        )


def snapshot(step: int) -> Snapshot:
    """Every tensor says which step it belongs to."""
    model = {f"w{number}": torch.full((400,), float(step)) for number in range(20)}
    return Snapshot(
        model, {"0.m": torch.full((400,), float(step))}, {"cpu": torch.get_rng_state()}, {"steps": step}
    )


LAYOUT = Layout(200, 10)


def outputs(view: int) -> torch.Tensor:
    """What a made-up teacher says to a view."""
    return torch.from_numpy(np.random.default_rng(view).normal(0, 4, (200, 10)).astype(np.float16)).float()


def fill(store: Store, views: int) -> None:
    """Build what is missing."""
    with store.building(views):
        for view in range(views):
            for rows in store.missing(view):
                store.put(view, rows, outputs(view)[rows.start : rows.stop])


def right(store: Store, views: range) -> bool:
    """Whether those views are what was stored; logits are kept up to a shift, in half precision."""
    pairs = ((store.rows(view).logits, outputs(view)) for view in views)
    return all(torch.allclose(a.softmax(1), b.softmax(1), rtol=0, atol=2e-3) for a, b in pairs)


def build(facts: dict[str, Any], views: int) -> None:
    """Open a store and fill it."""
    fill(Store.open(facts, LAYOUT), views)


def forked(work: Callable[[], None]) -> int:
    """The process that does `work` and exits; its messages are dropped."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
        code = 0
    finally:
        os._exit(code)


def killed_while(work: Callable[[], None], generator: random.Random, longest: float) -> None:
    """Let another process work, and kill it at a random moment."""
    pid = forked(work)
    time.sleep(generator.uniform(0.001, longest))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# Kills


def kills_in_checkpoints(folder: Path, trials: int, generator: random.Random) -> Row:
    """The newest checkpoint can always be read, all its parts are of one step, and nothing half written stays."""
    held = 0
    kept = Checkpoints(folder, {}, seconds=0)
    kept.save(1, snapshot(1))
    for _ in range(trials):
        first = kept.latest()
        start = first.state["steps"] if first else 0

        def work(start: int = start) -> None:
            for step in range(start + 1, start + 500):
                kept.save(step, snapshot(step))

        killed_while(work, generator, 0.15)
        found = kept.latest()
        if found is None:
            continue
        step = found.state["steps"]
        whole = all(
            bool((values == step).all())
            for part in (found.model, found.optimizer)
            for values in part.values()
        )
        kept.save(step + 1, snapshot(step + 1))  # sweeps what was left
        held += whole and step >= start and not list(folder.glob(".*.tmp"))
    return Row("kill -9 while checkpoints are written", trials, held)


def kills_in_the_store(folder: Path, trials: int, generator: random.Random) -> Row:
    """What the store names is what was written, and building goes on."""
    held = 0
    for number in range(trials):
        facts = {"label": "t", "teacher": number}
        for _ in range(2):
            killed_while(partial(build, facts, 40), generator, 0.2)
        store = Store.open(facts, LAYOUT)
        good = right(store, range(store.views))
        fill(store, 6)
        good &= right(store, range(6))
        held += good
        shutil.rmtree(store.folder)
    return Row("kill -9 while targets are stored", trials, held)


def kills_in_files(folder: Path, trials: int, generator: random.Random) -> Row:
    """A student's file and a kept teacher are the old one or the new one."""
    held, models = 0, [a_lenet(0), a_lenet(1)]
    prints = {model.fingerprint() for model in models}
    path, made = folder / "student.safetensors", {"model": "m", "data": "d", "seed": 0}
    save_classifier(path, models[0])
    library.keep(models[0], made, {})
    for _ in range(trials):

        def work() -> None:
            for number in range(1000):
                save_classifier(path, models[number % 2])
                library.keep(models[number % 2], made, {})

        killed_while(work, generator, 0.1)
        teacher = library.find(made)  # None: noticed as not whole, and would be trained again
        good = load_student(path).fingerprint() in prints
        held += good and (teacher is None or teacher.fingerprint() in prints)
        library.keep(models[0], made, {})
    return Row("kill -9 while a student and a teacher are saved", trials, held)


def two_exports(folder: Path) -> list[dict[str, bytes]]:
    """The files of two exports of different networks, but for their checksums."""
    found = []
    for seed in (0, 1):
        options = {"role": "control", "epochs": 1, "limit_train": 200, "seed": seed}
        run = ensemble_kd.train("lenet", **options, out=folder / f"run-{seed}").folder
        made = ensemble_kd.export(run).folder
        found.append({p.name: p.read_bytes() for p in made.iterdir() if p.name != files.SUMS})
    return found


def kills_in_exports(folder: Path, trials: int, generator: random.Random) -> Row:
    """An export that is replaced is the old one or the new one, whole; what was left is swept by the next."""
    contents, path, held = two_exports(folder), folder / "export", 0
    files.write_summed_folder(path, contents[0])
    for _ in range(trials):

        def work() -> None:
            for number in range(1000):
                files.write_summed_folder(path, contents[number % 2])

        killed_while(work, generator, 0.1)
        weights = (path / "model.safetensors").read_bytes() if path.exists() else b""
        good = not verify(path).damaged and weights in [each["model.safetensors"] for each in contents]
        files.write_summed_folder(path, contents[0])
        held += good and not list(folder.glob(".*.tmp"))
    return Row("kill -9 while an export is replaced", trials, held)


# Flipped bits


def flipped(path: Path, generator: random.Random) -> bytes:
    """Flip one bit of the file; returns what it was."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
    path.write_bytes(damaged)
    return whole


def flips_in_checkpoints(folder: Path, trials: int, generator: random.Random) -> Row:
    """A flipped bit is noticed, and the step before is taken."""
    kept, held = Checkpoints(folder, {}), 0
    kept.save(1, snapshot(1))
    kept.save(2, snapshot(2))
    paths = sorted(p for p in (folder / "step-00000002").iterdir())
    for _ in range(trials):
        path = generator.choice(paths)
        whole = flipped(path, generator)
        found = kept.latest()
        # In the manifest, white space can change and mean the same.
        held += found is not None and (found.state["steps"] == 1 or path.name == files.MANIFEST)
        path.write_bytes(whole)
    return Row("a flipped bit in a checkpoint is noticed", trials, held, "falls back to the step before")


def flips_in_kept_files(folder: Path, trials: int, generator: random.Random) -> Row:
    """A flipped bit in a kept teacher, a run's network or a stored target is noticed."""
    held, made = 0, {"model": "m", "data": "d", "seed": 1}
    teacher = library.keep(a_lenet(), made, {}) / "model.safetensors"
    run = Run.create("distill", folder / "run", "x", False, "a: 1\n")
    run.keep_network("student", a_lenet(), [])
    run.unlock()
    store = Store.open({"label": "t", "teacher": "flips"}, LAYOUT)
    fill(store, 2)
    for number in range(trials):
        if number % 3 == 0:
            whole, path = flipped(teacher, generator), teacher
            held += library.find(made) is None
        elif number % 3 == 1:
            path = run.path("student.safetensors")
            whole = flipped(path, generator)
            held += run.finished_network("student") is None
        else:
            path = store.folder / "logits.bin"
            whole = flipped(path, generator)
            held += Store.open({"label": "t", "teacher": "flips"}, LAYOUT).views < 2
            fill(store, 2)
        path.write_bytes(whole)
    return Row("a flipped bit in a teacher, student or target is noticed", trials, held)


def flips_in_exports(folder: Path, trials: int, generator: random.Random) -> Row:
    """`verify` notices a flipped bit in any file of an export."""
    path, held = folder / "export", 0
    files.write_summed_folder(path, two_exports(folder)[0])
    paths = sorted(path.iterdir())
    for _ in range(trials):
        file = generator.choice(paths)
        whole = flipped(file, generator)
        held += bool(verify(path).damaged)
        file.write_bytes(whole)
    return Row("a flipped bit in any file of an export is noticed", trials, held)


# Malformed files


def mutants(folder: Path, trials: int, generator: random.Random) -> Row:
    """Every reader of files ends in a value or in an error with a message."""
    held, kinds = 0, 0
    for name, (good, suffix, read) in readers(folder).items():
        kinds += 1
        for number in range(trials):
            path = folder / f"mutant-{name}{suffix}"
            path.write_bytes(mutated(good, generator))
            try:
                read(path)
                held += 1
            except EkdError:
                held += 1
            except BaseException as error:
                print(f"{name}, mutant {number}: {type(error).__name__}: {error}", file=sys.stderr)
                traceback.print_exc()
    return Row("a malformed file ends in one clear line", trials * kinds, held, f"{kinds} kinds of files")


def readers(folder: Path) -> dict[str, tuple[bytes, str, Callable[[Path], Any]]]:
    """A good file, its suffix and its reader, by name."""
    save_classifier(folder / "good.safetensors", a_lenet())
    student = (folder / "good.safetensors").read_bytes()
    torch.save(a_lenet().net.state_dict(), folder / "good.pth")
    store = Store.open({"label": "t", "teacher": "mutants"}, LAYOUT)
    fill(store, 1)
    options = config.to_yaml(DistillOptions(teachers=["lenet"])).encode()
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 4, 4)) + bytes(range(48))
    return {
        "safetensors": (student, ".safetensors", load_student),
        "pickle": ((folder / "good.pth").read_bytes(), ".pth", _read_pth),
        "configuration": (options, ".yaml", lambda path: config.resolve(DistillOptions, {}, file=path)),
        "class map": (b"a: [x, y]\nb: [z]\n", ".yaml", read_map),
        "idx": (idx, "-ubyte", _read_idx),
        "store": ((store.folder / "store.json").read_bytes(), ".json", _read_store),
        "checkpoint": (_whole_checkpoint(folder), ".json", _read_checkpoint(folder)),
        "teacher": (
            json.dumps({"sha256": "0", "made_from": {}, "results": {}}).encode(),
            ".json",
            library._read,
        ),
    }


def _read_pth(path: Path) -> None:
    from ensemble_kd.weights import read_tensors

    read_tensors(path)


def _read_store(path: Path) -> None:
    place = path.parent / "mutant-store"
    place.mkdir(exist_ok=True)
    shutil.copy(path, place / "store.json")
    read_kept(place)


def _whole_checkpoint(folder: Path) -> bytes:
    Checkpoints(folder / "mutant-checkpoint", {}).save(1, snapshot(1))
    return (folder / "mutant-checkpoint" / "step-00000001" / files.MANIFEST).read_bytes()


def _read_checkpoint(folder: Path) -> Callable[[Path], Any]:
    def read(path: Path) -> None:
        shutil.copy(path, folder / "mutant-checkpoint" / "step-00000001" / files.MANIFEST)
        Checkpoints(folder / "mutant-checkpoint", {}).latest()

    return read


def mutated(good: bytes, generator: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated, or with a number made huge; mostly near the beginning, where headers are."""
    data = bytearray(good)
    span = min(len(data), generator.choice([8, 64, 512, len(data)]))
    place = generator.randrange(span)
    kind = generator.randrange(6)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place] ^= 1 << generator.randrange(8)
    elif kind == 2:
        data[place : place + generator.randrange(1, 9)] = generator.randbytes(generator.randrange(1, 9))
    elif kind == 3:
        data[place:place] = data[place : place + 64]
    elif kind == 4:
        data[place : place + 8] = (1 << generator.randrange(8, 63)).to_bytes(8, "little")
    else:
        text = bytes(data)
        for old, new in (
            (b"0", b"1e999"),
            (b"1", b"-1"),
            (b"{", b"["),
            (b'"', b"'"),
            (b": ", b": !!python/name:os.system "),
        ):
            if generator.random() < 0.4:
                at = text.find(old, place)
                text = text if at < 0 else text[:at] + new + text[at + len(old) :]
        return text
    return bytes(data)


# Faults at writes


@contextmanager
def broken(call: str, number: int) -> Iterator[list[None]]:
    """The call of `os` fails, as on a full disk, when it is made for the `number`th time and after."""
    original, calls = getattr(os, call), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) >= number and not (call == "open" and args[1:] and args[1] == os.O_RDONLY):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    setattr(os, call, failing)
    try:
        yield calls
    finally:
        setattr(os, call, original)


def faults_at_every_write(folder: Path, trials: int, generator: random.Random) -> Row:
    """Whatever call fails, what was there before is there still, and no temporary file is."""
    old, new, done, held = a_lenet(0), a_lenet(1), 0, 0
    path, state, kept = folder / "s.safetensors", folder / "x.json", Checkpoints(folder / "c", {})

    def restore() -> None:
        save_classifier(path, old)
        files.write_json(state, {"old": 1})
        kept.clear()
        kept.save(1, snapshot(1))

    works: list[tuple[Callable[[], None], Callable[[], bool]]] = [
        (
            lambda: save_classifier(path, new),
            lambda: load_classifier(path).fingerprint() == old.fingerprint(),
        ),
        (lambda: files.write_json(state, {"new": 2}), lambda: files.read_json(state) == {"old": 1}),
        (lambda: kept.save(2, snapshot(2)), lambda: kept.latest().state["steps"] == 1),
    ]
    for work, intact in works:
        for call in ("open", "fsync", "replace", "rename", "fdopen", "mkdir"):
            for number in range(1, 9):
                restore()
                with broken(call, number) as calls:
                    try:
                        work()
                        failed = False  # such as a folder that is there already
                    except OSError:
                        failed = True
                if len(calls) < number:  # all of its calls were broken in turn, and the work was done
                    break
                done += 1
                good = (
                    not failed
                    or intact()
                    or _only_the_folder_was_not_flushed(call, folder, kept, old, path, state)
                )
                left = list(folder.rglob(".*.tmp"))
                if not good or left:
                    print(f"{call} {number} of work {works.index((work, intact))}: {left}", file=sys.stderr)
                held += good and not left
    return Row("a full disk at any call of a write leaves the old file", done, held, "every call, in turn")


def _only_the_folder_was_not_flushed(
    call: str, folder: Path, kept: Checkpoints, old: Classifier, path: Path, state: Path
) -> bool:
    """After the rename the new file is whole; only its name may not be on the disk yet."""
    if call not in ("open", "fsync"):
        return False
    found = kept.latest()
    return found is not None and load_classifier(path) is not None and files.read_json(state) is not None


# Training


RECIPE = Recipe(3, 16, "sgd", 0.01, 1e-3, 1, 0.1, clip_norm=2.0, ema=0.9)


def train(data: Dataset, kept: Checkpoints | None) -> Classifier:
    """A short training with dropout, BatchNorm, momentum and an average."""
    model = tiny()
    viewing = Viewing("crop", 2, 5)
    fit(model, data.train, data.val, RECIPE, Objective(), viewing, seed=5, device=CPU, checkpoints=kept)
    return model


@contextmanager
def at_step(count: int, act: Callable[[Loop], None]) -> Iterator[None]:
    """Do something when this process has taken that many steps."""
    original, taken = Loop._count, []

    def counting(loop: Loop, done: int) -> None:
        taken.append(done)
        if len(taken) == count:
            act(loop)
        original(loop, done)

    Loop._count = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop._count = original  # type: ignore[method-assign]


def stops_and_resumes(folder: Path, trials: int, generator: random.Random) -> Row:
    """Ctrl-C or SIGTERM after any step: saved, and the rest gives the same bits."""
    data, held = load_data("digits", limit_train=200), 0
    whole = train(data, None).fingerprint()
    for number in range(trials):
        kind = generator.choice([signal.SIGTERM, signal.SIGINT])
        stop = False
        with at_step(generator.randint(1, 36), lambda loop, kind=kind: signal.raise_signal(kind)):
            try:
                train(data, Checkpoints(folder / str(number), {}))
            except KeyboardInterrupt:
                stop = True
        torch.manual_seed(number)
        held += stop and train(data, Checkpoints(folder / str(number), {})).fingerprint() == whole
    return Row("SIGTERM or Ctrl-C at a random step; resumed bit-exact", trials, held)


def kills_and_resumes(folder: Path, trials: int, generator: random.Random) -> Row:
    """kill -9 in training, with a checkpoint after each step: resumed to the same bits."""
    data, held = load_data("digits", limit_train=200), 0
    whole = train(data, None).fingerprint()
    for number in range(trials):
        kept = Checkpoints(folder / str(number), {}, seconds=0)
        killed_while(lambda kept=kept: train(data, kept) and None, generator, 0.8)
        held += train(data, Checkpoints(folder / str(number), {})).fingerprint() == whole
    return Row("kill -9 in training; resumed bit-exact", trials, held)


@contextmanager
def poisoned_at(step: int, value: float) -> Iterator[None]:
    """In that step of this process the logits are multiplied by `value`."""
    original, seen = Loop._judged, []

    def poisoned(loop: Loop, logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(None)
        return original(loop, logits * value if len(seen) == step else logits, *rest)

    Loop._judged = poisoned  # type: ignore[method-assign]
    try:
        yield
    finally:
        Loop._judged = original  # type: ignore[method-assign]


def losses_that_are_not_finite(folder: Path, trials: int, generator: random.Random) -> Row:
    """No step is taken and nothing is saved from then on; the message names batch and term."""
    data, held = load_data("digits", limit_train=200), 0
    for number in range(trials):
        step, value = generator.randint(1, 36), generator.choice([float("nan"), float("inf")])
        kept = Checkpoints(folder / str(number), {}, seconds=0)
        try:
            with poisoned_at(step, value):
                train(data, kept)
        except TrainingError as error:
            found = kept.latest()
            saved = found.state["steps"] if found else 0
            named = f"epoch {(step - 1) // 12 + 1}, step {(step - 1) % 12 + 1} of 12" in str(error)
            held += saved == step - 1 and named and "for the batch of the images" in str(error)
    return Row("NaN or infinity in the loss stops before the step", trials, held)


# Two processes


def two_processes(folder: Path, trials: int, generator: random.Random) -> Row:
    """Two processes on one store, one teacher and one run folder: each result is one of theirs, whole."""
    held = 0
    for number in range(trials):
        facts = {"label": "t", "teacher": f"two {number}"}
        builders = [forked(partial(build, facts, 10)) for _ in range(2)]
        codes = [os.waitpid(pid, 0)[1] for pid in builders]
        store = Store.open(facts, LAYOUT)
        good = codes == [0, 0] and right(store, range(10))

        def run(number: int = number) -> None:
            created = Run.create("distill", folder / f"run-{number}", "x", False, "a: 1\n")
            time.sleep(0.05)
            created.keep_network("student", a_lenet(os.getpid()), [])
            created.unlock()

        codes = sorted(os.waitpid(pid, 0)[1] for pid in [forked(run), forked(run)])
        good &= codes[0] == 0 and codes[1] != 0  # the second is refused
        held += good and Run(folder / f"run-{number}").finished_network("student") is not None
    return Row("two processes on one store and one run folder", trials, held)


def stale_stores(folder: Path, trials: int, generator: random.Random) -> Row:
    """Whatever fact changes, the store made with the other is not read."""
    facts = {
        "label": "t", "teacher": "stale", "architecture": "a", "preprocess": {"size": [8, 8]}, "images": "d",
        "policy": "crop", "mix": "none", "seed": 0, "views_version": 1, "precision": "float32", "folded": True,
        "torch": "2", "timm": "1", "torchvision": "0", "ensemble_kd": "0",
    }  # fmt: skip
    fill(Store.open(facts, LAYOUT), 1)
    keys = [key for key in facts if key != "label"]
    held = sum(Store.open(facts | {key: "changed"}, LAYOUT).views == 0 for key in keys)
    return Row("a stale store is not read", len(keys), held, "each part of the key changed in turn")


def same_bytes(folder: Path, trials: int, generator: random.Random) -> Row:
    """The same run in another process leaves the same student, byte for byte."""
    held, prints = 0, []
    for number in range(trials):

        def work(number: int = number) -> None:
            torch.manual_seed(os.getpid())
            options = {"epochs": 1, "teacher_epochs": 1, "limit_train": 200, "controls": "none"}
            distill("lenet#7", "lenet", out=folder / f"same-{number}", **options)

        pid = forked(work)
        os.waitpid(pid, 0)
        prints.append(files.sha256_file(folder / f"same-{number}" / "student.safetensors"))
        held += prints[-1] == prints[0]
    return Row("the same run leaves the same bytes", trials, held)


PROMISES: list[tuple[Callable[[Path, int, random.Random], Row], int]] = [
    (kills_in_checkpoints, 50),
    (kills_in_the_store, 50),
    (kills_in_files, 50),
    (kills_in_exports, 50),
    (kills_and_resumes, 20),
    (stops_and_resumes, 20),
    (flips_in_checkpoints, 1000),
    (flips_in_kept_files, 1000),
    (flips_in_exports, 1000),
    (mutants, 1000),
    (faults_at_every_write, 1),
    (losses_that_are_not_finite, 20),
    (two_processes, 15),
    (stale_stores, 1),
    (same_bytes, 2),
]
"""Each promise with its trials at full scale."""


def run_all(scale: float, seed: int = 0, only: str = "") -> list[Row]:
    """All promises, or those with `only` in their names, in a folder and a cache of their own."""
    rows = []
    before = os.environ.get("EKD_CACHE")
    with tempfile.TemporaryDirectory() as root:
        os.environ["EKD_CACHE"] = str(Path(root) / "cache")
        try:
            for promise, trials in [p for p in PROMISES if only in p[0].__name__]:
                folder = Path(root) / promise.__name__
                folder.mkdir()
                started = time.perf_counter()
                row = promise(folder, max(1, round(scale * trials)), random.Random(seed))
                rows.append(row)
                seconds = time.perf_counter() - started
                print(f"{row.promise}: {row.survived} of {row.trials} ({seconds:.0f} s)", file=sys.stderr)
        finally:
            os.environ.pop("EKD_CACHE")
            if before is not None:
                os.environ["EKD_CACHE"] = before
    return rows


def table(rows: list[Row]) -> str:
    """One line a promise."""
    cells = [[row.promise, f"{row.trials:,}", f"{row.survived:,}", row.note] for row in rows]
    return text_table(["promise", "trials", "survived", ""], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="promises with this in their names, such as exports")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = run_all(chosen.scale, chosen.seed, chosen.only)
    print(table(rows))
    if chosen.out:
        files.write_json(chosen.out, [row._asdict() for row in rows])
    sys.exit(any(row.survived < row.trials for row in rows))


if __name__ == "__main__":
    main()
