"""What combining and the soft loss cost, as a share of a plain LeNet step.

    python -m benchmarks.combine_cost [--blocks 9] [--batch 128] [--teachers 3]

A plain step is forward, cross-entropy, backward and SGD of LeNet on 1×32×32 images. Combining is
what a stored target adds to it: weights, both targets (the distilled one and that at temperature 1), the
soft loss and its gradient to the logits. Blocks of both are interleaved; medians with min–max. Prints
two tables and writes benchmarks/results/combine-cost.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Images
from ensemble_kd.losses import LOSSES, distillation_loss, hard_cross_entropy
from ensemble_kd.students import LeNet
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.combination import Combination, set_up
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.weighting import COMBINERS

CLASSES, STEPS = 10, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--teachers", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    commit, batch = commit_now(), images(arguments.batch)
    logits = 3 * torch.randn(arguments.teachers, arguments.batch, CLASSES)
    student = torch.randn(arguments.batch, CLASSES, requires_grad=True)
    step = plain_step(batch)
    combiners = {name: ensemble(name, logits, batch) for name in COMBINERS}
    works = {name: combining(one, logits, batch, student, "kl") for name, one in combiners.items()}
    mean = combiners["mean"]
    losses = {name: combining(mean, logits, batch, student, name) for name in LOSSES}
    rows = {
        "combiners with kl": measure(works, step, arguments.blocks),
        "losses with mean": measure(losses, step, arguments.blocks),
    }
    for title, table in rows.items():
        print(as_text(table, title))
    files.write_json(
        RESULTS / "combine-cost.json", {"shares": rows, **vars(arguments), **surroundings(commit)}
    )


def images(count: int) -> Images:
    pixels = torch.randint(0, 256, (count, 1, 32, 32), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % CLASSES, torch.arange(count))


def ensemble(name: str, logits: Tensor, val: Images) -> Ensemble:
    card = Card("lenet", "stock", Preprocess(1, (32, 32), (0.5,), (0.5,)), tuple("0123456789"))
    teachers = [Teacher.of(f"t{k}", Classifier(LeNet(10, 1, 32), card), "") for k in range(len(logits))]
    given = [1 / len(logits)] * len(logits)
    how = Combination(name, COMBINERS[name], given=given)
    return set_up(teachers, torch.full((len(logits),), 4.0), how, logits, val.known_labels)


def plain_step(batch: Images) -> Callable[[], None]:
    net = LeNet(CLASSES, 1, 32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    pixels = batch.pixels.float() / 255

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        hard_cross_entropy(net(pixels), batch.known_labels).backward()
        optimizer.step()

    return step


def combining(
    judges: Ensemble, logits: Tensor, batch: Images, student: Tensor, loss: str
) -> Callable[[], None]:
    epoch = iter(range(10**9))

    def work() -> None:
        target = judges.target(logits, batch, next(epoch), student.detach())
        soft = distillation_loss(
            student, batch.labels, target.soft, soft_weight=1, temperature=4.0, loss=loss
        )
        torch.autograd.grad(soft, student)

    return work


def measure(
    works: dict[str, Callable[[], None]], step: Callable[[], None], blocks: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each work and its share of a step in the same block."""
    for work in (step, *works.values()):
        seconds(work)
    shares: dict[str, list[float]] = {name: [] for name in works}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(blocks):
        for name, work in works.items():
            plain, own = seconds(step), seconds(work)
            shares[name].append(own / plain)
            times[name].append(1000 * own)
    return {
        name: {
            "milliseconds": float(np.median(times[name])),
            "share": dict(
                zip(("median", "min", "max"), (f(shares[name]) for f in (np.median, min, max)), strict=True)
            ),
        }
        for name in works
    }


def seconds(work: Callable[[], None]) -> float:
    """Of one call, over `STEPS` calls."""
    started = time.perf_counter()
    for _ in range(STEPS):
        work()
    return (time.perf_counter() - started) / STEPS


def as_text(rows: dict[str, dict[str, Any]], title: str) -> str:
    cells = []
    for name, row in rows.items():
        median, low, high = (100 * row["share"][key] for key in ("median", "min", "max"))
        cells.append([name, f"{row['milliseconds']:.3f}", f"{median:.1f} % [{low:.1f}, {high:.1f}]"])
    return text_table(["", "ms", "of a plain step"], cells, title)


if __name__ == "__main__":
    main()
