"""What an image costs in a folder that is decoded afresh in every pass, as the folder grows.

    python -m benchmarks.growth --folder DIR [--sizes 10000 30000 100000] [--repeats 3] [--batch 64]
        [--side 224] [--tars]

Makes photo-like JPEGs of 224 pixels in DIR (those that are there already are used; another side needs another
DIR), or with --tars shards of 500 of them, then takes one pass over the
training images in a hashed order, each time in a new process: opening the folder (listing and headers), and
views crop-flip of all batches. Sizes are interleaved; medians with min–max. Besides the time of the clock, that
of all cores together, which other work on the machine disturbs less. Memory is the peak of the process.
Prints a table and writes benchmarks/results/growth.json, or growth-tars.json.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.tables import text_table

CLASSES, TEST_IMAGES, SHARD = 10, 20, 500
DISTINCT = 2_000
"""Different pictures; more files are copies of them, each a file of its own."""
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--tars", action="store_true", help="pack the images into shards")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # this size, in this process
    arguments = parser.parse_args()
    if arguments.measure:
        print(
            json.dumps(one_pass(arguments.folder / str(arguments.measure), arguments.batch, arguments.tars))
        )
        return
    commit = commit_now()
    make(arguments.folder, arguments.sizes, arguments.side)
    if arguments.tars:
        pack(arguments.folder, arguments.sizes)
    rows = measure(arguments.folder, arguments.sizes, arguments.repeats, arguments.batch, arguments.tars)
    print(as_text(rows))
    facts = {name: value for name, value in vars(arguments).items() if name not in ("folder", "measure")}
    name = "growth-tars.json" if arguments.tars else "growth.json"
    files.write_json(RESULTS / name, {"rows": rows, **facts, **surroundings(commit)})


def make(folder: Path, sizes: list[int], side: int) -> None:
    """Folders SIZE/train/CLASS and SIZE/test/CLASS in `folder`, where they are not complete already."""
    missing = [size for size in sizes if len(list((folder / str(size)).rglob("*.jpg"))) != size + TEST_IMAGES]
    if not missing:
        return
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda seed: picture(seed, side), range(min(DISTINCT, max(missing)))))
        for size in missing:
            for split, count in (("train", size), ("test", TEST_IMAGES)):
                where = folder / str(size) / split
                for name in range(CLASSES):
                    (where / str(name)).mkdir(parents=True, exist_ok=True)
                paths = [where / str(number % CLASSES) / f"{number:06d}.jpg" for number in range(count)]
                contents = (pictures[number % len(pictures)] for number in range(count))
                for _ in pool.map(Path.write_bytes, paths, contents):
                    pass


def pack(folder: Path, sizes: list[int]) -> None:
    """The folders' images as shards SIZE-tars/train-0000.tar …, mixed over the classes."""
    for size in sizes:
        target = folder / f"{size}-tars"
        target.mkdir(exist_ok=True)
        for split in ("train", "test"):
            paths = sorted((folder / str(size) / split).rglob("*.jpg"), key=lambda path: path.name)
            for start in range(0, len(paths), SHARD):
                with tarfile.open(target / f"{split}-{start // SHARD:04d}.tar", "w") as tar:
                    for path in paths[start : start + SHARD]:
                        tar.add(path, path.name)
                        label = tarfile.TarInfo(f"{path.stem}.cls")
                        label.size = len(path.parent.name)
                        tar.addfile(label, io.BytesIO(path.parent.name.encode()))


def picture(seed: int, side: int) -> bytes:
    """A JPEG with the look of a photo: large and small patches of colour, and some grain."""
    rng = np.random.default_rng(seed)
    layers = [_patches(rng, s, strength, side) for s, strength in ((4, 60), (16, 25), (56, 14))]
    pixels = 120 + sum(layers) + rng.normal(0, 4, (side, side, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def _patches(rng: np.random.Generator, count: int, strength: float, side: int) -> np.ndarray:
    coarse = rng.normal(0, strength, (3, count, count)).astype(np.float32)
    size, how = (side, side), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(channel).resize(size, how)) for channel in coarse], axis=-1)


def one_pass(folder: Path, batch: int, tars: bool) -> dict[str, float]:
    """Seconds to open the folder and to see all training images once, and the peak of the memory."""
    from ensemble_kd.data import load_data
    from ensemble_kd.objective import Viewing

    started = time.perf_counter()
    source = f"tars:{folder}-tars" if tars else f"imagefolder:{folder}"
    data = load_data(source, val_fraction=0.0, decode="always")
    opened, worked = time.perf_counter(), time.process_time()
    seen = 0
    order = data.train.order(0, 0)
    for images in Viewing("crop-flip", 0, 0).batches(data.train, order.split(batch), 0):
        seen += len(images)
    ended, worked = time.perf_counter(), time.process_time() - worked
    facts = {"images": seen, "opening": opened - started, "pass": ended - opened, "cpu": worked}
    return facts | {"peak_mb": peak_memory()}


def peak_memory() -> float:
    """Megabytes that this process had at most (Linux).

    Not by getrusage, whose peak a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(folder: Path, sizes: list[int], repeats: int, batch: int, tars: bool) -> list[dict[str, Any]]:
    """One row a size: milliseconds an image, and megabytes beyond the first size's, by repeat."""
    passes: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            command = [
                sys.executable,
                "-m",
                "benchmarks.growth",
                "--folder",
                folder,
                "--measure",
                size,
                "--batch",
                batch,
                *(["--tars"] if tars else []),
            ]
            result = subprocess.run(
                [str(part) for part in command], check=True, stdout=subprocess.PIPE, cwd=ROOT
            )
            passes[size].append(json.loads(result.stdout))
    first = median(row["peak_mb"] for row in passes[sizes[0]])
    return [
        {
            "size": size,
            "seconds_per_1000": spread([1000 * row["pass"] / row["images"] for row in passes[size]]),
            "cpu_seconds_per_1000": spread([1000 * row["cpu"] / row["images"] for row in passes[size]]),
            "opening_seconds_per_1000": spread([1000 * row["opening"] / size for row in passes[size]]),
            "peak_mb": spread([row["peak_mb"] for row in passes[size]]),
            "growth_mb": spread([row["peak_mb"] - first for row in passes[size]]),
        }
        for size in sizes
    ]


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def as_text(rows: list[dict[str, Any]]) -> str:
    names = ("seconds_per_1000", "cpu_seconds_per_1000", "opening_seconds_per_1000", "peak_mb", "growth_mb")
    digits = (3, 3, 3, 0, 1)
    cells = [
        [f"{row['size']:,}", *(_cell(row[name], n) for name, n in zip(names, digits, strict=True))]
        for row in rows
    ]
    headers = [
        "images",
        "s / 1,000",
        "of all cores",
        "opening, s / 1,000",
        "peak, MB",
        "more than the first, MB",
    ]
    return text_table(headers, cells, "One pass over a folder that is decoded afresh")


def _cell(value: dict[str, float], digits: int) -> str:
    median_, low, high = (f"{value[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median_} [{low}, {high}]"


if __name__ == "__main__":
    main()
