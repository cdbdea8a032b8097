"""Malformed files for every reader of files, for minutes each: no tracebacks, no hangs, bounded memory.

    python tests/fuzz.py [--minutes 10] [--readers csv,yaml] [--jobs 1] [--out results.json] [--keep FOLDER]

Good files are mutated by turns; a mutant that ends in a message not seen before is mutated further. Each reader
runs in a process of its own, under an alarm and with a limit to its memory. What fails is kept in a folder, by
default fuzz-failures. A short form runs in the tests.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision
import torture
from PIL import Image

from ensemble_kd import config, console, files
from ensemble_kd.analysis.studies import check_measures
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.data import load_data
from ensemble_kd.errors import EkdError, WeightsError
from ensemble_kd.grid import StudyOptions, points_of, training_before
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.tables import text_table
from ensemble_kd.teachers import library
from ensemble_kd.teachers.class_map import read_map
from ensemble_kd.teachers.store import Store
from ensemble_kd.weights import load_student, read_tensors

_LOADED = (timm, torchvision)  # before the alarm is set, as that takes a while
ALARM = 20.0
"""Seconds that one file may take."""
ROOM = 1 << 30
"""Bytes that the process may grow by."""
_CORPUS = 500


class Reader(NamedTuple):
    """Good files, and what reads one of them from its bytes."""

    seeds: list[bytes]
    read: Callable[[bytes], Any]


class Row(NamedTuple):
    """What came of a reader."""

    reader: str
    seconds: float
    files: int
    refused: int
    """With a message; the others were read."""
    messages: int
    """Different ones."""
    tracebacks: int
    hangs: int
    grown: int
    """Bytes by which the process grew at most."""

    @property
    def good(self) -> bool:
        """Whether the reader held."""
        return not (self.tracebacks or self.hangs) and self.grown < ROOM


class HangError(BaseException):
    """A file took too long."""


# The readers


def in_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Reads what is written to the path."""

    def work(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return work


def pictures() -> dict[str, bytes]:
    """A picture in each of the formats that are read."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for name, ending, options in (
        ("jpg", "JPEG", {"exif": exif}), ("png", "PNG", {}), ("bmp", "BMP", {}), ("gif", "GIF", {}), ("webp", "WEBP", {}),
        ("tiff", "TIFF", {"compression": "tiff_lzw"}), ("ppm", "PPM", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        picture.save(buffer, format=ending, **options)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)).save(buffer, format="PNG")
    return found | {"deep": buffer.getvalue()}


def folder_of_images(folder: Path) -> Reader:
    """One image among others, decoded."""
    for name in ("a", "b"):
        for number in range(6):
            path = folder / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pictures()["png"] + bytes([number]))
        shutil.copytree(folder / "train" / name, folder / "test" / name)
    place = folder / "train" / "a" / "x.png"
    return Reader(
        list(pictures().values()),
        in_file(place, lambda path: load_data(f"imagefolder:{folder}", decode="once")),
    )


def members() -> dict[str, bytes]:
    """Of an archive of images."""
    return {f"{name}/{number}.{end}": data for name in "ab" for number in range(6)
            for end, data in list(pictures().items())[number % 2 : number % 2 + 1]}  # fmt: skip


def archives(folder: Path, kind: str) -> Reader:
    """Unpacked into the cache, which is emptied each time."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members().items():
                file.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind.endswith("gz") else "w") as file:
            for name, data in members().items():
                add(file, name, data)

    def read(path: Path) -> None:
        shutil.rmtree(files.cache_dir() / "archives", ignore_errors=True)
        load_data(f"imagefolder:{path}", decode="once")

    return Reader([buffer.getvalue()], in_file(folder / f"x.{kind}", read))


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.addfile(info, io.BytesIO(data))


def shards(folder: Path) -> Reader:
    """One shard, whose index is kept in the cache only while it is the same."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number in range(12):
            ending = ("jpg", "png", "webp", "bmp")[number % 4]
            add(file, f"{number}.{ending}", pictures()[ending])
            label = (
                (f"{number}.cls", b"%d" % (number % 2))
                if number % 3
                else (f"{number}.json", json.dumps({"label": number % 2}).encode())
            )
            add(file, *label)

    def read(path: Path) -> None:
        shutil.rmtree(files.cache_dir() / "shards", ignore_errors=True)
        load_data(f"tars:{path}", decode="once", val_fraction=0.3)

    return Reader([buffer.getvalue()], in_file(folder / "x.tar", read))


def shard_index(folder: Path) -> Reader:
    """What the cache keeps of a shard."""
    shard = shards(folder)
    shard.read(shard.seeds[0])
    (kept,) = (files.cache_dir() / "shards").iterdir()
    place = folder / "x.tar"

    def read(path: Path) -> None:
        load_data(f"tars:{place}", decode="once", val_fraction=0.3)

    return Reader([kept.read_bytes()], in_file(kept, read))


def csv_list(folder: Path) -> Reader:
    """A list of images."""
    for number in range(12):
        (folder / f"{number}.png").write_bytes(pictures()["png"] + bytes([number]))
    lists = []
    for split in (True, False):
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["path", "label", *(["split"] if split else [])])
        for number in range(12):
            rows.writerow(
                [f"{number}.png", "ab"[number % 2], *([("train", "test")[number // 8]] if split else [])]
            )
        lists.append(text.getvalue().encode())
    return Reader(
        lists,
        in_file(folder / "list.csv", lambda path: load_data(f"csv:{path}", decode="once", val_fraction=0.3)),
    )


def idx(folder: Path) -> Reader:
    """Images and labels of MNIST's format; one of the files is mutated."""
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (40, 28, 28))
    images = head + bytes(40 * 784)
    labels = b"\0\0\x08\x01" + (40).to_bytes(4, "big") + bytes(n % 10 for n in range(40))
    for stem, data in (("train-images-idx3", images), ("train-labels-idx1", labels),
                       ("t10k-images-idx3", images), ("t10k-labels-idx1", labels)):  # fmt: skip
        (folder / f"{stem}-ubyte").write_bytes(data)

    def read(data: bytes) -> None:
        name = "train-labels-idx1" if len(data) < 10_000 else "train-images-idx3"
        path = folder / f"{name}-ubyte"
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            load_data("mnist", root=folder, offline=True)
        finally:
            path.write_bytes(before)

    return Reader([images, labels], read)


def run_file(folder: Path, name: str, good: bytes, read: Callable[[Run], Any]) -> Reader:
    """A file of a run folder."""
    text = config.to_yaml(DistillOptions(teachers=["lenet"]))
    run = Run.create("distill", folder / "run", "run", False, text)
    run.set_state("finished")
    run.unlock()
    (folder / "run" / "metrics.json").write_text("{}")
    if name == "status.json":
        good = (folder / "run" / name).read_bytes()
    return Reader([good], in_file(folder / "run" / name, lambda path: read(Run.open(folder / "run"))))


def predictions(folder: Path) -> Reader:
    """Kept logits and labels."""
    import safetensors.torch

    tensors = {"logits/student": torch.randn(20, 10), "labels": torch.arange(20)}
    return run_file(
        folder, "predictions.safetensors", safetensors.torch.save(tensors), lambda run: run.predictions()
    )


def checkpoint(folder: Path) -> Reader:
    """The parts of a checkpoint by turns; their hashes are mended, so that they are read."""
    kept = Checkpoints(folder, {})
    kept.save(1, torture.snapshot(1))
    place = folder / "step-00000001"
    seeds = {path.name: path.read_bytes() for path in place.iterdir()}

    def read(data: bytes) -> None:
        name = "state.json" if data[:1] in b"{[" else "model.safetensors"
        for part, good in seeds.items():
            (place / part).write_bytes(good)
        (place / name).write_bytes(data)
        digests = json.loads(seeds[files.MANIFEST])
        digests[name] = files.sha256_file(place / name)
        files.write_json(place / files.MANIFEST, digests)
        kept.latest()

    return Reader([seeds["state.json"], seeds["model.safetensors"], seeds["rng.safetensors"]], read)


def store(folder: Path) -> Reader:
    """The table of a store and its shards by turns, and what is read of them."""
    facts = {"label": "t", "teacher": "fuzz"}
    built = Store.open(facts, torture.LAYOUT)
    torture.fill(built, 2)
    table, values = built.folder / "store.json", built.folder / "logits.bin"
    good = table.read_bytes(), values.read_bytes()

    def read(data: bytes) -> None:
        table.write_bytes(good[0])
        values.write_bytes(good[1])
        (table if data[:1] in b"{[" else values).write_bytes(data)
        found = Store.open(facts, torture.LAYOUT)
        for view in range(found.views):
            found.rows(view)

    return Reader(list(good), read)


def kept_teacher(folder: Path) -> Reader:
    """The note beside a teacher of the library."""
    made = {"model": "lenet", "data": "digits", "seed": 0}
    kept = library.keep(torture.a_lenet(), made, {"val": {}, "history": []})
    place = kept / "teacher.json"
    return Reader([place.read_bytes()], in_file(place, lambda path: library.find(made)))


def exported(folder: Path) -> Reader:
    """The files of an exported folder by turns; unless they are mutated, its checksums are made anew."""
    from ensemble_kd.exported import read_export
    from ensemble_kd.exporting import export
    from ensemble_kd.training import train
    from ensemble_kd.verifying import verify

    run = train("lenet", epochs=1, limit_train=50, device="cpu", out=folder / "run").folder
    place = export(run, out=folder / "export").folder
    good = {path.name: path.read_bytes() for path in place.iterdir()}
    parts = ("config.json", "labels.json", files.SUMS, "check.safetensors", "model.safetensors")
    turn = iter(range(1 << 60))

    def read(data: bytes) -> None:
        name = parts[next(turn) % len(parts)]
        for part, content in (good | {name: data}).items():
            (place / part).write_bytes(content)
        if name != files.SUMS:
            digests = {part: files.sha256_file(place / part) for part in good if part != files.SUMS}
            (place / files.SUMS).write_text(files.sums_of(digests))
        damaged = verify(place).damaged
        read_export(place)
        if damaged:
            raise WeightsError(damaged[0].what, damaged[0].why, "")

    return Reader([good[part] for part in parts], read)


def study_file(folder: Path) -> Reader:
    """A study, up to the list of its points."""

    def read(path: Path) -> None:
        chosen = config.resolve(StudyOptions, {}, file=path)
        check_measures(chosen)
        points_of(chosen, folder)
        training_before(chosen, folder)

    place = Path(__file__).parents[1] / "examples" / "studies"
    return Reader(
        [(place / f"{name}.yaml").read_bytes() for name in ("regimes", "dark", "teachers")],
        in_file(folder / "x.yaml", read),
    )


def parquet(folder: Path) -> Reader:
    """A table of images, as `datasets` writes it; what was kept of the one before is thrown away."""
    import datasets

    rows = [
        {"image": {"bytes": data, "path": None}, "label": number % 2}
        for number, data in enumerate([*pictures().values()] * 2)
    ]
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(folder / "good.parquet")

    def read(path: Path) -> None:
        shutil.rmtree(files.cache_dir() / "datasets", ignore_errors=True)
        load_data(f"hf:{path}", decode="once", val_fraction=0.3, offline=True)

    return Reader([(folder / "good.parquet").read_bytes()], in_file(folder / "x.parquet", read))


def readers() -> dict[str, Callable[[Path], Reader]]:
    """All of them; each is made in its own folder and cache."""
    from ensemble_kd.weights import save_classifier

    def saved(folder: Path) -> bytes:
        save_classifier(folder / "good.safetensors", torture.a_lenet())
        return (folder / "good.safetensors").read_bytes()

    def pth(folder: Path) -> list[bytes]:
        state, found = torture.a_lenet().net.state_dict(), []
        for new in (True, False):
            torch.save(state, folder / "good.pth", _use_new_zipfile_serialization=new)
            found.append((folder / "good.pth").read_bytes())
        return found

    options = config.to_yaml(DistillOptions(teachers=["lenet", "resnet18"])).encode()
    rows = b"".join(
        json.dumps({"network": "student", "epoch": n, "train": {"loss": 1 / (n + 1)}}).encode() + b"\n"
        for n in range(4)
    )
    metrics = json.dumps(
        {"n": 3, "models": {"student": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}}}}
    )
    maps = [b"a: [x, y]\nb: [z]\n", b"teacher_classes: [x, y, z]\nmap: {0: a, 1: b, 2: a}\n"]
    return {
        "weights and card (safetensors)": lambda f: Reader(
            [saved(f)], in_file(f / "x.safetensors", load_student)
        ),
        "weights of torch (.pth)": lambda f: Reader(pth(f), in_file(f / "x.pth", read_tensors)),
        "checkpoint": checkpoint,
        "store of targets": store,
        "teacher of the library": kept_teacher,
        "configuration (YAML)": lambda f: Reader(
            [options], in_file(f / "x.yaml", lambda path: config.resolve(DistillOptions, {}, file=path))
        ),
        "class map (YAML)": lambda f: Reader(maps, in_file(f / "x.yaml", read_map)),
        "history.jsonl": lambda f: run_file(f, "history.jsonl", rows, lambda run: run.history()),
        "metrics.json": lambda f: run_file(f, "metrics.json", metrics.encode(), lambda run: run.metrics()),
        "status.json": lambda f: run_file(f, "status.json", b"", lambda run: run.status()),
        "predictions": predictions,
        "image in a folder": folder_of_images,
        "zip of images": lambda f: archives(f, "zip"),
        "tar of images": lambda f: archives(f, "tar"),
        "tar.gz of images": lambda f: archives(f, "tar.gz"),
        "IDX (MNIST)": idx,
        "shard (tars:)": shards,
        "index of a shard": shard_index,
        "list (csv:)": csv_list,
        "parquet (hf:)": parquet,
        "study (YAML)": study_file,
        "exported folder": exported,
    }


# Fuzzing


def mutant(seeds: list[bytes], corpus: list[bytes], generator: random.Random) -> bytes:
    """A good file or, every second time, one of the corpus, changed up to four times, or joined to another."""
    data = generator.choice(seeds if generator.random() < 0.5 else corpus)
    for _ in range(generator.choice((1, 1, 2, 4))):
        if len(data) < 2:
            return data + generator.randbytes(4)
        if generator.random() < 0.1:
            other = generator.choice(corpus)
            data = data[: generator.randrange(len(data))] + other[generator.randrange(len(other) or 1) :]
        else:
            data = torture.mutated(data, generator)
    return data


def fuzz(name: str, make: Callable[[Path], Reader], seconds: float, seed: int, failures: Path) -> Row:
    """Mutants of one reader's files for so many seconds, or at least 20 of them."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        os.environ["EKD_CACHE"] = str(Path(root) / "cache")
        (Path(root) / "work").mkdir()
        reader = make(Path(root) / "work")
        for good in reader.seeds:
            reader.read(good)
        corpus, seen = list(reader.seeds), set[str]()
        counts = dict.fromkeys(("files", "refused", "tracebacks", "hangs"), 0)
        began, started = peak(), time.monotonic()
        limited(began + 4 * ROOM)
        while time.monotonic() - started < seconds or counts["files"] < 20:
            data = mutant(reader.seeds, corpus, generator)
            (Path(root) / "last").write_bytes(data)
            counts["files"] += 1
            before = peak()
            kind, text = outcome(reader, data)
            if kind != "read":
                counts[kind] += 1
                shape = re.sub(r"[0-9a-f]{6,}|\d+|'.*?'", "#", text)
                if shape not in seen and len(corpus) < _CORPUS:
                    seen.add(shape)
                    corpus.append(data)
            if kind in ("tracebacks", "hangs") or peak() - before > ROOM // 2:
                keep_failure(failures, name, data, text)
    return Row(name, round(time.monotonic() - started, 1), *_of(counts, len(seen)), peak() - began)


def _of(counts: dict[str, int], messages: int) -> tuple[int, int, int, int, int]:
    return counts["files"], counts["refused"], messages, counts["tracebacks"], counts["hangs"]


def outcome(reader: Reader, data: bytes) -> tuple[str, str]:
    """What came of a file: read, refused, a traceback or a hang; and its message."""
    faulthandler.dump_traceback_later(3 * ALARM, exit=True)  # where no handler gets a turn
    signal.setitimer(signal.ITIMER_REAL, ALARM)
    try:
        reader.read(data)
    except EkdError as error:
        return "refused", str(error)
    except HangError:
        return "hangs", traceback.format_exc()
    except BaseException:
        return "tracebacks", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return "read", ""


def keep_failure(folder: Path, name: str, data: bytes, text: str) -> None:
    """The file and what it did, once for each kind of end."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{hashlib.sha256(text[-300:].encode()).hexdigest()[:8]}"
    (folder / f"{stem}.bin").write_bytes(data)
    (folder / f"{stem}.txt").write_text(text)


def peak() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limited(most: int) -> None:
    """No more address space than what there is now and `most`; beyond it Python raises MemoryError."""
    lines = Path("/proc/self/statm")
    now = int(lines.read_text().split()[0]) * resource.getpagesize() if lines.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (now + most, resource.RLIM_INFINITY))


def quiet() -> None:
    """Neither log lines nor warnings, of which there is one a file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    console.log.disabled = True


def hung(*_: Any) -> None:
    """The alarm."""
    raise HangError


def _alone(name: str, seconds: float, seed: int, failures: Path, out: Any) -> None:
    quiet()
    signal.signal(signal.SIGALRM, hung)
    out.send(fuzz(name, readers()[name], seconds, seed, failures))


def in_own_processes(
    names: list[str], seconds: float, seed: int, failures: Path, jobs: int, told: Callable[[list[Row]], None]
) -> list[Row]:
    """`fuzz` of each reader, some at a time; a process that dies counts as a traceback. `told` gets the rows so far."""
    context, rows, waiting, running = multiprocessing.get_context("fork"), dict[str, Row](), list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (waiting[0], seconds, seed, failures, sender)
            process = context.Process(target=_alone, args=arguments)
            process.start()
            sender.close()
            running[receiver] = (waiting.pop(0), process)
        for receiver in wait(list(running)):
            name, process = running.pop(receiver)
            try:
                rows[name] = receiver.recv()
            except EOFError:
                rows[name] = Row(name, seconds, 0, 0, 0, 1, 0, 0)
            process.join()
            good = "good" if rows[name].good else "BAD"
            print(f"{name}: {rows[name].files:,} files, {good}", file=sys.stderr, flush=True)
            told([rows[name] for name in names if name in rows])
    return [rows[name] for name in names]


def table(rows: list[Row]) -> str:
    """One line a reader."""
    header = ["reader", "minutes", "files", "read", "refused", "messages", "tracebacks", "hangs", "grew by"]
    cells = [
        [
            row.reader,
            f"{row.seconds / 60:.1f}",
            f"{row.files:,}",
            f"{row.files - row.refused - row.tracebacks - row.hangs:,}",
            f"{row.refused:,}",
            str(row.messages),
            str(row.tracebacks),
            str(row.hangs),
            files.readable(row.grown),
        ]
        for row in rows
    ]
    return text_table(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader")
    parser.add_argument("--readers", default="", help="parts of their names, by commas; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where what fails is kept")
    chosen = parser.parse_args()
    wanted = [part for part in chosen.readers.split(",") if part]
    names = [name for name in readers() if not wanted or any(part in name for part in wanted)]

    def told(rows: list[Row]) -> None:
        if chosen.out:
            files.write_json(chosen.out, [row._asdict() for row in rows])

    torch.set_num_threads(1)
    rows = in_own_processes(names, 60 * chosen.minutes, chosen.seed, chosen.keep, chosen.jobs, told)
    print(table(rows))
    sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
    main()
