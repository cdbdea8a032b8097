"""What each process holds of teachers that are divided among them, and what that costs.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.sharding [MODEL …] [--batch 1] [--device cpu]

Networks of random weights, at their own input sizes. Milliseconds are those of a batch in each process, the median
of three, whole and divided by turns within one process group; all processes run at once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.data import Dataset, load_data
from ensemble_kd.files import readable
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.sharding import held_bytes, sharded, units

REPEATS = 3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["resnet50", "vgg16_bn", "vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with distributed.joined(arguments.device):
        device, data = torch.device(arguments.device), load_data("digits", limit_train=64)
        rows = [row(name, data, arguments.batch, device) for name in arguments.models]
    if distributed.speaks():
        header = ["teacher", "units", "whole", "held by each", "ms whole", "ms divided"]
        print(text_table(header, rows, f"{arguments.batch} images in each process"))


def row(name: str, data: Dataset, batch: int, device: torch.device) -> list[str]:
    """A network, whole and divided."""
    makes = [new_classifier(parse(name), data, size=224, stem="imagenet", seed=0) for _ in range(2)]
    whole = Teacher.of("whole", makes[0].to(device), "random")
    divided = sharded(Teacher.of("divided", makes[1], "random"), device)
    size = makes[0].card.preprocess
    pixels = torch.randint(0, 256, (batch, size.channels, *size.size), dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {"whole": [], "divided": []}
    for number in range(REPEATS + 1):
        for teacher in (whole, divided):
            took = seconds(teacher, pixels)
            if number:
                times[teacher.label].append(took)
    held: list[Classifier] = [teacher.classifier for teacher in (whole, divided)]
    return [
        name,
        str(len(units(held[1]))),
        *(readable(held_bytes(net)) for net in held),
        *(f"{1000 * statistics.median(values):,.0f}" for values in times.values()),
    ]


def seconds(teacher: Teacher, pixels: torch.Tensor) -> float:
    """Of one pass, begun by all processes together."""
    distributed.wait()
    started = time.perf_counter()
    teacher.runner(pixels.device)(pixels).logits.sum().item()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
