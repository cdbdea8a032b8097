"""Images per CPU-second: crop-flip views of whole batches, against a loader of single PIL images.

    OMP_NUM_THREADS=1 python -m benchmarks.loaders [--blocks 7] [--batch 128]

Random CIFAR-sized images (32×32×3) in memory, one thread, no workers. The other side is what tutorials do:
torchvision's DataLoader with RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize. Plain
indexing of the images is the floor of any loader. All sides take turns in one process, in blocks of at least
some tenths of a second; ratios are taken within a block, and given as median with min–max. Prints a table
and writes benchmarks/results/loaders.json.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.classifier import Preprocess
from ensemble_kd.data.dataset import Images
from ensemble_kd.data.views import order
from ensemble_kd.objective import Viewing
from ensemble_kd.tables import text_table

COUNT = 20_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BATCHES = {"plain indexing": 600, "ours, uint8": 150, "ours, float": 100, "PIL": 8}
"""How many batches a block of each side takes."""


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images that are opened and augmented one by one, as torchvision's CIFAR-10 does."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), index % 10


def sides(batch: int) -> dict[str, Iterator[Any]]:
    """Endless batches of each side."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.arange(COUNT)
    images, viewing = Images(pixels, ids % 10, ids), Viewing("crop-flip", 0, 0)
    prepared = Preprocess(3, (32, 32), MEAN, STD)

    def chunks(epoch: int) -> tuple[Tensor, ...]:
        return order(0, epoch, COUNT).split(batch)[: COUNT // batch]

    def seen() -> Iterator[Tensor]:
        for epoch in itertools.count():
            for one in viewing.batches(images, chunks(epoch), viewing.id_of(epoch)):
                yield one.pixels

    def loaded() -> Iterator[Any]:
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        for _ in itertools.count():
            yield from DataLoader(Pictures(arrays), batch, shuffle=True, drop_last=True)

    return {
        "plain indexing": (pixels[index] for epoch in itertools.count() for index in chunks(epoch)),
        "ours, uint8": seen(),
        "ours, float": map(prepared, seen()),
        "PIL": loaded(),
    }


def rates(batch: int, blocks: int) -> dict[str, list[float]]:
    """Images per CPU-second of each side in each block; all but the first block count."""
    found: dict[str, list[float]] = {name: [] for name in BATCHES}
    running = sides(batch)
    for _ in range(blocks + 1):
        for name, batches in running.items():
            found[name].append(rate(lambda batches=batches: next(batches), BATCHES[name]) * batch)
    return {name: values[1:] for name, values in found.items()}


def rate(work: Callable[[], Any], times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        work()
    return times / (time.process_time() - started)


def rows(batch: int = 128, blocks: int = 7) -> list[dict[str, Any]]:
    """Ours against PIL, and against plain indexing: images per CPU-second, and their ratio by block."""
    torch.set_num_threads(1)
    found = rates(batch, blocks)
    pairs = [("ours, uint8", "PIL"), ("ours, float", "PIL"), ("ours, uint8", "plain indexing")]
    return [compared(f"{one} / {other}", found[one], found[other]) for one, other in pairs]


def compared(name: str, ours: list[float], other: list[float]) -> dict[str, Any]:
    ratio = np.array(ours) / np.array(other)
    return {
        "name": name,
        "ours": float(np.median(ours)),
        "other": float(np.median(other)),
        "ratio": {"median": float(np.median(ratio)), "low": float(ratio.min()), "high": float(ratio.max())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    commit = commit_now()
    table = rows(arguments.batch, arguments.blocks)
    cells = [
        [row["name"], f"{row['ours']:,.0f}", f"{row['other']:,.0f}", ratio_cell(row["ratio"])]
        for row in table
    ]
    print(text_table(["", "ours, img/s", "other, img/s", "ratio"], cells, "images per CPU-second"))
    facts = {"rows": table, "images": COUNT, **vars(arguments), **surroundings(commit)}
    files.write_json(RESULTS / "loaders.json", facts)


def ratio_cell(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


if __name__ == "__main__":
    main()
