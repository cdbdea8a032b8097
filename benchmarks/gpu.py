"""What a GPU does: steps in a CUDA graph and eager, stored and online targets, storing, a teacher's training.

    python -m benchmarks.gpu --root FOLDER-OF-FASHION-MNIST --out results/gpu.json

Images are Fashion-MNIST's (30 MB), padded to 32×32 and in three channels, repeated to 240,000, so that an
epoch is long against what is done once an epoch; without --root they are random bytes. Every speed is that
of whole epochs of the public `fit`, the first of which (set-up, recording) is left out. Sides that are
compared take turns. Meant for ten minutes on an H200; torch ≥ 2.11.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import SCENES
from benchmarks.memory import in_turn as in_turn_alone
from ensemble_kd import load_data
from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.fit import fit
from ensemble_kd.fresh import new_classifier
from ensemble_kd.loop import Engine
from ensemble_kd.models import parse
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.building import Keeping, build, open_stores
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

CUDA = torch.device("cuda")
COUNT, SMALL = 240_000, 48_000
BYTES = {"lenet": 173e3, "resnet8": 2.97e6}
"""Bytes an image that a step must move, unfused."""


def images(root: Path | None, count: int) -> Images:
    """`count` images of 3×32×32 on the GPU."""
    if root is None:
        pixels = torch.randint(0, 256, (60_000, 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(0, 10, (60_000,))
    else:
        train = load_data("fashion-mnist", root=root, offline=True).train
        pixels = F.pad(train.pixels, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        labels = train.known_labels
    index = torch.arange(count) % len(pixels)
    return Images(pixels[index].to(CUDA), labels[index].to(CUDA), torch.arange(count, device=CUDA))


class Bench:
    """The data, two small-image teachers with random weights, and what is measured with them."""

    def __init__(self, root: Path | None) -> None:
        self.train = images(root, COUNT)
        self.few = self.train[torch.arange(SMALL, device=CUDA)]
        first = self.train[torch.arange(2048, device=CUDA)]
        self.data = Dataset("bench", tuple(map(str, range(10))), first, first, first)
        self.teachers = [
            Teacher.of(name, self.network(name).to(CUDA), "random", storable=True)
            for name in ("resnet18", "vgg16_bn")
        ]
        half = torch.tensor([0.5, 0.5], device=CUDA)
        self.ensemble = Ensemble(self.teachers, half, torch.tensor([4.0, 4.0], device=CUDA))
        self.viewing = Viewing("crop-flip", 4, 0)  # another view in each epoch that counts
        self.val_target = self.ensemble.target(self.ensemble.all_logits(first))
        self._kept: dict[int, StoredTargets] = {}

    def network(self, name: str) -> Classifier:
        """A network in its small-image form, from seed 0."""
        return new_classifier(parse(name), self.data, seed=0, size=32)

    def run(
        self, name: str, batch: int, kind: str, engine: Engine, epochs: int, train: Images | None = None
    ) -> list[float]:
        """Images per second of each epoch but the first; `kind` is plain, stored or online."""
        train = self.few if train is None else train
        targets: Any = {"plain": None, "online": LiveTargets(self.ensemble), "stored": None}[kind]
        if kind == "stored":
            targets = self.kept(train)
        recipe = Recipe(epochs + 1, batch, "sgd", 0.01, 5e-4, 0.5, clip_norm=2.0)
        model, weight = self.network(name), 0.0 if targets is None else 0.9
        goal = Objective(weight, 4.0, targets, None if targets is None else self.val_target)
        rows = fit(
            model, train, self.data.val, recipe, goal, self.viewing, seed=0, device=CUDA, engine=engine
        )
        return [row["images_per_second"] for row in rows[1:]]

    def kept(self, train: Images) -> StoredTargets:
        """Stored targets of these images, made once."""
        if len(train) not in self._kept:
            self._kept[len(train)] = StoredTargets(self.ensemble, train, self.viewing)
            self._kept[len(train)].build()
        return self._kept[len(train)]


def median(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def in_turn(sides: dict[str, Callable[[], list[float]]], blocks: int) -> dict[str, list[float]]:
    """All sides one after the other, `blocks` times; the median of each block."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(blocks):
        for name, side in sides.items():
            found[name].append(statistics.median(side()))
    return found


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Of paired blocks."""
    return median([a / b for a, b in zip(above, below, strict=True)])


def step_costs(bench: Bench) -> dict[str, Any]:
    """Row 2: the time of a step with stored targets over that of a plain one."""
    rows: dict[str, Any] = {}
    for name, batch in (("lenet", 512), ("resnet8", 512)):
        for engine in (Engine(graph=True), Engine(graph=False)):
            train = bench.train if engine.graph else bench.few
            sides = {
                kind: lambda kind=kind, e=engine, t=train: bench.run(name, batch, kind, e, 2, t)  # noqa: B023
                for kind in ("plain", "stored")
            }
            speeds = in_turn(sides, 5)
            rows[f"{name}, B={batch}, {'graph' if engine.graph else 'eager'}"] = {
                "stored step / plain step": ratios(speeds["plain"], speeds["stored"]),
                **{f"{kind} images/s": median(values) for kind, values in speeds.items()},
            }
    return rows


def throughput(bench: Bench, copy_rate: float) -> dict[str, Any]:
    """The absolute rows of students: stored targets of two teachers, in a graph."""
    rows = {}
    for name, batch in (("lenet", 512), ("lenet", 4096), ("resnet8", 512), ("resnet8", 2048)):
        for compiled in (False, True):
            speed = median(bench.run(name, batch, "stored", Engine(compile=compiled), 3, bench.train))
            bound = copy_rate / BYTES[name]
            label = f"{name}, B={batch}{', compiled' if compiled else ''}"
            rows[label] = {"images/s": speed, "of the bandwidth bound": speed["median"] / bound}
    return rows


def teachers_speed(bench: Bench) -> dict[str, Any]:
    """Storing the outputs of both teachers, and training one of them, in images per second."""
    rates = []
    for seed in range(4):
        viewing = Viewing("crop-flip", 1, seed)
        stores = open_stores(bench.ensemble, bench.few, viewing, Keeping())
        torch.cuda.synchronize()
        started = time.perf_counter()
        build(stores, bench.ensemble, bench.few, viewing, 1)
        rates.append(SMALL / (time.perf_counter() - started))
    rows = {"storing resnet18 + vgg16_bn": median(rates[1:])}
    for label, engine in (("graph", Engine()), ("compiled, graph", Engine(compile=True))):
        rows[f"training resnet18, B=512, {label}"] = median(bench.run("resnet18", 512, "plain", engine, 3))
    return rows


def online(bench: Bench) -> dict[str, Any]:
    """Row 4: online over stored, beside the ratio of their operations."""
    sides = {
        kind: lambda kind=kind: bench.run("resnet8", 512, kind, Engine(graph=False), 2)
        for kind in ("stored", "online")
    }
    speeds = in_turn(sides, 3)
    student, *teachers = (flops(bench.network(name)) for name in ("resnet8", "resnet18", "vgg16_bn"))
    return {
        "online step / stored step, eager": ratios(speeds["stored"], speeds["online"]),
        "by operations": (3 * student + sum(teachers)) / (3 * student),
        **{f"{kind} images/s": median(values) for kind, values in speeds.items()},
    }


def flops(network: Classifier) -> int:
    """Of a forward pass of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to(CUDA).eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=CUDA))
    return int(counter.get_total_flops())


def busy(bench: Bench) -> dict[str, float]:
    """The part of a steady recorded loop in which the GPU computes."""
    from torch.profiler import ProfilerActivity, profile

    shares = {}
    for name, batch in (("lenet", 512), ("lenet", 4096), ("resnet8", 512)):
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            bench.run(name, batch, "stored", Engine(), 1)
        spans = sorted(
            (e.time_range.start, e.time_range.end)
            for e in seen.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
        )
        spans = spans[-len(spans) // 4 :]  # the steady end
        total, until = 0.0, spans[0][0]
        for start, end in spans:
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        shares[f"{name}, B={batch}"] = total / (until - spans[0][0])
    return shares


def memory() -> dict[str, Any]:
    """Row 5: megabytes over what was in use before the first step, by scene and side."""
    found: dict[str, Any] = {}
    for name in ("small", "large", "slides", "two-sizes"):
        scene = SCENES[name]
        found[scene.name] = in_turn_alone(name, CUDA, 1, exact=False)
    return found


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large bf16 product."""
    big = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=CUDA)
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    return {
        "copy, bytes/s": 2 * big.numel() / timed(lambda: big.clone()),
        "bf16 product, FLOP/s": 2 * 8192**3 / timed(lambda: a @ a),
    }


def timed(work: Callable[[], Tensor]) -> float:
    """Seconds, the median of ten after three."""
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def main() -> None:
    """Measure everything, write it as JSON and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--commit", default="", help="of the sources, where there is no repository")
    chosen = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.gpu",
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": chosen.commit,
        "images": "Fashion-MNIST, padded" if chosen.root else "random bytes",
    }
    result["ceilings"] = ceilings()
    bench = Bench(chosen.root)
    parts: dict[str, Callable[[], Any]] = {
        "teachers": lambda: teachers_speed(bench),
        "throughput": lambda: throughput(bench, result["ceilings"]["copy, bytes/s"]),
        "row 2": lambda: step_costs(bench),
        "row 5": memory,
        "row 4": lambda: online(bench),
        "busy": lambda: busy(bench),
    }
    for name, part in parts.items():
        started = time.perf_counter()
        try:
            result[name] = part()
        except Exception as error:  # the other figures are worth having
            result[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
