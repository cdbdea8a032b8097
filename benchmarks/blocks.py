"""What the benchmarks of steps and of memory share: networks with random weights, and blocks of sides in turn.

Every side sees random uint8 images of 10 classes and, where it distils, the mean of the teachers'
probabilities at the same temperature and soft weight. Blocks are interleaved, A B C A B C …, after one
block of each that is not counted; ratios are of blocks that ran next to each other.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import commit_now, surroundings
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Images
from ensemble_kd.fit import fit
from ensemble_kd.loop import Engine
from ensemble_kd.models import build, parse
from ensemble_kd.objective import Objective, TargetSource, Viewing
from ensemble_kd.stepping import Recipe
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Ensemble, Teacher

CLASSES, TEMPERATURE, SOFT_WEIGHT = 10, 4.0, 0.9
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SGD: dict[str, Any] = {"lr": 0.001, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
"""What `fit` takes for its recipe; low, as nothing can be learned from random images."""


def network(name: str, form: str = "stock", size: int = 32) -> Classifier:
    """A network that the toolkit knows by `name`, or `quarter-vgg16`, with random weights."""
    own = name == "quarter-vgg16"
    net = (
        quarter_vgg16() if own else build(parse(name), num_classes=CLASSES, channels=3, size=size, form=form)
    )
    classes = tuple(map(str, range(CLASSES)))
    return Classifier(net, Card(name, form, Preprocess(3, (size, size), MEAN, STD), classes))


def quarter_vgg16() -> nn.Module:
    """VGG16 with a quarter of its channels, a global pool and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((16, 2), (32, 2), (64, 3), (128, 3), (128, 3)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def random_images(count: int, size: int, device: torch.device) -> Images:
    """Noise with random labels, the same on every call."""
    source = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, CLASSES, (count,), generator=source)
    return Images(pixels, labels, torch.arange(count)).to(device)


def as_ensemble(teachers: Mapping[str, Classifier], device: torch.device) -> Ensemble:
    """The teachers, frozen from now on, with equal weights."""
    frozen = [
        Teacher.of(name, model.to(device), "random weights", storable=True)
        for name, model in teachers.items()
    ]
    weights = torch.full((len(frozen),), 1 / len(frozen), device=device)
    return Ensemble(frozen, weights, torch.full_like(weights, TEMPERATURE))


def distilling(targets: TargetSource, ensemble: Ensemble, data: Images) -> Objective:
    """The objective of a student of `ensemble`, judged on the images that `train` validates on."""
    judged = ensemble.target(ensemble.all_logits(held_out(data)))
    return Objective(SOFT_WEIGHT, TEMPERATURE, targets, judged)


def held_out(data: Images) -> Images:
    """A few images to validate on, as `fit` must; its steps' seconds are without that."""
    return data[torch.arange(CLASSES, device=data.ids.device)]


def train(
    model: Classifier,
    data: Images,
    viewing: Viewing,
    batch: int,
    objective: Objective,
    engine: Engine | None = None,
) -> float:
    """Seconds that an epoch of our `fit` spends on its steps: the second on a GPU, where the first records them."""
    device = data.pixels.device
    epochs = 2 if device.type == "cuda" else 1
    recipe = Recipe(epochs, batch, "sgd", SGD["lr"], SGD["weight_decay"], warmup_epochs=0)
    history = fit(
        model, data, held_out(data), recipe, objective, viewing, seed=0, device=device, engine=engine
    )
    return float(history[-1]["seconds"])


@contextmanager
def own_cache() -> Iterator[None]:
    """Targets are stored in a folder of the block's own, so that none are found from earlier."""
    before = os.environ.get("EKD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EKD_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("EKD_CACHE")
            if before is not None:
                os.environ["EKD_CACHE"] = before


class Stack(nn.Module):
    """Teachers and student as one module with one graph, every parameter asking for its gradient."""

    def __init__(self, teachers: Sequence[nn.Module], student: nn.Module) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.student = student
        self.requires_grad_(True)
        self.teachers.eval()
        self.student.train()

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The logits of each teacher, and of the student."""
        return [teacher(x) for teacher in self.teachers], self.student(x)

    def step(self, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, detached: bool) -> None:
        """One step of the plain loop; `detached` spares the teachers the backward pass, not the graph."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            teachers, student = self(x)
        target = torch.stack([F.softmax(z.float() / TEMPERATURE, dim=1) for z in teachers]).mean(dim=0)
        log_q = F.log_softmax(student.float() / TEMPERATURE, dim=1)
        soft = F.kl_div(log_q, target.detach() if detached else target, reduction="batchmean")
        hard = F.cross_entropy(student.float(), labels)
        loss = (1 - SOFT_WEIGHT) * hard + SOFT_WEIGHT * TEMPERATURE**2 * soft
        self.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def wait_for(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(sides: Mapping[str, Callable[[], float]], blocks: int) -> dict[str, list[float]]:
    """What each side says of each of its blocks; the sides run in turn, first once uncounted."""
    for side in sides.values():
        side()
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(blocks):
        for name, side in sides.items():
            measured[name].append(side())
    return measured


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return float(np.median(values)), float(np.min(values)), float(np.max(values))


def compare(
    row: int | None,
    name: str,
    ours: Sequence[float],
    other: Sequence[float],
    over: Sequence[float],
    **facts: Any,
) -> dict[str, Any]:
    """One row of results: medians of both sides, and the ratio of paired blocks.

    Args:
        row: of the table of aims; None for what is only of interest.
        over: `ours` or `other`, whichever the ratio is divided by.
        facts: `unit` and `note`.
    """
    above = other if over is ours else ours
    ratio, low, high = spread([a / b for a, b in zip(above, over, strict=True)])
    return {
        "row": row,
        "name": name,
        "ours": spread(ours)[0],
        "other": spread(other)[0],
        "ratio": ratio,
        "low": low,
        "high": high,
        "unit": "",
        "note": "",
    } | facts


def as_text(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """The rows as a table, each with its number in the table of aims, and their notes below."""
    cells = [
        [
            f"{row['row'] or '–'}  {row['name']}",
            f"{row['ours']:.4g} {row['unit']}",
            f"{row['other']:.4g} {row['unit']}",
            f"{row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}]",
        ]
        for row in rows
    ]
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([text_table(["", "ours", "other", "ratio [min, max]"], cells, title), *notes])


def arguments_of(module_doc: str | None) -> argparse.ArgumentParser:
    """The options that every such benchmark has."""
    parser = argparse.ArgumentParser(
        description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and short blocks: whether it runs")
    parser.add_argument("--device", default="auto")
    return parser


def where(device: torch.device) -> str:
    """One line on the machine, for the head of a table."""
    facts = surroundings(commit_now())
    card = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{facts['machine']}{card}, torch {facts['torch']}, {facts['threads']} threads, commit {facts['commit']}"
