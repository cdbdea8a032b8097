"""One process against two that torchrun starts on one machine's CPU, and where the rest of the time goes.

    python -m benchmarks.processes [--quick] [--blocks 5] [--student lenet]

Every side distils the student from stored targets of two teachers, on random 3×32×32 images, one thread a process:

    one         a process alone, batches of 128
    two         two processes that train as one: each takes 64 of every 128
    apart       two processes at the same time that know nothing of each other, batches of 64: what two cores
                give where nothing is shared
    watched     `two`, with a clock around each place where the processes wait for each other

Sides take turns in blocks within one pair of processes; medians with min–max, ratios of neighbouring blocks. What a
clock sees includes waiting for a process that is late. Prints a table and writes results/processes.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.blocks import (
    as_ensemble,
    distilling,
    interleave,
    network,
    own_cache,
    random_images,
    spread,
    train,
)
from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import distributed, files
from ensemble_kd.guards import FiniteGuard
from ensemble_kd.objective import Viewing
from ensemble_kd.saving import Saving
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.targets import StoredTargets

BATCH, VIEWING, CPU = 128, Viewing("crop-flip", 1, 0), torch.device("cpu")
STEPS = {"lenet": 30, "resnet8": 6}
"""Of a block."""
PARTS = ("gradients", "BatchNorm", "is the loss finite", "stop or save?")
"""Where the processes wait for each other in every step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and short blocks: whether it runs")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--student", choices=STEPS, action="append", help="one of them; may be repeated")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # where it writes what it measured
    arguments = parser.parse_args()
    students = arguments.student or list(STEPS)
    torch.set_num_threads(1)
    blocks, shorter = (1, 3) if arguments.quick else (arguments.blocks, 1)
    if arguments.worker:
        with distributed.joined("cpu"):
            found = {name: measure(name, STEPS[name] // shorter, blocks) for name in students}
            if distributed.first():
                files.write_json(arguments.worker, found)
        return
    commit, before = commit_now(), os.getloadavg()
    measured = in_two_processes(sys.argv[1:])
    load = {"before": before, "after": os.getloadavg()}
    print(*(as_text(name, rows) for name, rows in measured.items()), f"load averages: {load}", sep="\n\n")
    if not arguments.quick:
        facts = {"blocks": blocks, "batch": BATCH, "steps": {name: STEPS[name] for name in students}}
        value = {"students": measured, "load": load, **facts, **surroundings(commit)}
        files.write_json(RESULTS / "processes.json", value)


def in_two_processes(arguments: list[str]) -> dict[str, Any]:
    """What this module measures as two workers of torchrun, with a cache of their own."""
    with tempfile.TemporaryDirectory() as folder, own_cache():
        path = Path(folder) / "measured.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        work = ["-m", "benchmarks.processes", *arguments, "--worker", str(path)]
        subprocess.run(
            [sys.executable, *launch, *work], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return files.read_json(path)


def measure(student: str, steps: int, blocks: int) -> dict[str, Any]:
    """Milliseconds for 128 images of each side, block by block, and the parts of `watched` a step."""
    teachers = {f"lenet#{seed}": network("lenet") for seed in (1, 2)}
    for teacher in teachers.values():  # the same in both processes
        for number, parameter in enumerate(teacher.net.parameters()):
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    ensemble, data = as_ensemble(teachers, CPU), random_images(steps * BATCH, 32, CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = network(student)
    targets = StoredTargets(ensemble, data, VIEWING)
    targets.build()
    targets.begin(0)  # together, as whoever trains alone would leave the others behind
    objective = distilling(targets, ensemble, data)
    parts: dict[str, list[float]] = defaultdict(list)

    def epoch(batch: int) -> float:
        return 1000 * train(copy.deepcopy(start), data, VIEWING, batch, objective) / steps

    def one() -> float:
        with alone():
            found = epoch(BATCH) if os.environ["RANK"] == "0" else 0.0
        dist.barrier()
        return found

    def apart() -> float:
        dist.barrier()
        with alone():
            found = epoch(BATCH // 2) / 2  # of two batches of each, 256 images
        dist.barrier()
        return found

    def watched() -> float:
        with clocks() as spent:
            found = epoch(BATCH)
        for part in PARTS:
            parts[part].append(1000 * spent[part] / steps)
        return found

    ms = interleave({"one": one, "two": lambda: epoch(BATCH), "apart": apart, "watched": watched}, blocks)
    return {"ms": ms, "parts": {part: values[1:] for part, values in parts.items()}}


@contextmanager
def alone() -> Iterator[None]:
    """While entered, the toolkit takes this process for the only one."""
    with patch.dict(os.environ, WORLD_SIZE="1"):
        yield


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """While entered, seconds are added up in which this process waits for the other, by what for."""
    spent: dict[str, float] = defaultdict(float)

    def timed(work: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*given)
            finally:
                spent[part] += time.perf_counter() - started

        return wrapped

    def averaged(state, bucket):  # bare, as DDP compares annotations, and these would be texts
        """What DDP does by itself, waited for at once: small networks are one bucket, so nothing ran beside it."""
        values = bucket.buffer().div_(dist.get_world_size())
        timed(dist.all_reduce, PARTS[0])(values)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(values)
        return done

    def sharing(model: nn.Module) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, averaged)
        return wrapped

    with ExitStack() as stack:
        for place, name, part in (
            (distributed, "add_up", PARTS[1]),
            (FiniteGuard, "look", PARTS[2]),
            (Saving, "_together", PARTS[3]),
        ):
            stack.enter_context(patch.object(place, name, timed(getattr(place, name), part)))
        stack.enter_context(patch("ensemble_kd.loop.DistributedDataParallel", sharing))
        yield spent


def as_text(student: str, measured: Mapping[str, Any]) -> str:
    """Sides with images a second and their ratio to one process; then the parts of a step of two."""
    ms, cells = measured["ms"], []
    for name, values in measured["ms"].items():
        median, low, high = spread([1000 * BATCH / value for value in values])
        gain = spread([a / b for a, b in zip(ms["one"], values, strict=True)])
        times = f"{gain[0]:.2f} [{gain[1]:.2f}, {gain[2]:.2f}]"
        cells.append([name, f"{spread(values)[0]:.1f}", f"{median:,.0f} [{low:,.0f}, {high:,.0f}]", times])
    title = f"{student}: {len(ms['one'])} blocks, one thread a process"
    sides = text_table(["", "ms for 128", "images/s [min, max]", "times one"], cells, title)
    rows = [
        [part, *(f"{value:.2f}" for value in spread(values))] for part, values in measured["parts"].items()
    ]
    return sides + "\n\n" + text_table(["waits of a step of two", "ms", "min", "max"], rows)


if __name__ == "__main__":
    main()
