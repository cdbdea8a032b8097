"""What each of several processes does in test_distributed.py; the first writes what all of them found.

    python tests/distributed_work.py FOLDER 1,2,3

writes FOLDER/1.json and so on. The processes are forked with the environment that torchrun gives, as each would
otherwise spend most of its time in importing torch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ensemble_kd import distributed
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import TrainingError
from ensemble_kd.fit import fit
from ensemble_kd.inference import predict
from ensemble_kd.loop import Loop
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.shared_norm import shared_batch_norm
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.targets import StoredTargets

RECIPE = Recipe(3, 16, "sgd", 0.02, 1e-3, 1, 0.1, clip_norm=2.0, ema=0.9)
VIEWING = Viewing("crop", 2, 5, "mixup")


def network(seed: int, norm: bool) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 10))
    classes = tuple("0123456789")
    return Classifier(net, Card("tiny", "stock", Preprocess(1, (8, 8), (0.5,), (0.5,)), classes))


def train(
    data: Dataset, norm: bool, kept: Checkpoints | None = None
) -> tuple[Classifier, list[dict[str, Any]]]:
    """Distils from two teachers with stored targets and mixing."""
    teachers = [Teacher.of(f"t{seed}", network(seed, True), "test", storable=True) for seed in (11, 12)]
    ensemble = Ensemble(teachers, torch.tensor([0.25, 0.75]), torch.tensor([2.0, 4.0]))
    targets = StoredTargets(ensemble, data.train, VIEWING)
    objective = Objective(0.9, 4.0, targets, ensemble.target(ensemble.all_logits(data.val)))
    model = network(3, norm)
    cpu = torch.device("cpu")
    history = fit(
        model, data.train, data.val, RECIPE, objective, VIEWING, seed=5, device=cpu, checkpoints=kept
    )
    return model, history


def batch_norm_apart() -> float:
    """The largest difference to BatchNorm of the whole batch, in output, running numbers and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, probe = (torch.randn(7, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    outcomes = []
    for shared in (False, True):
        rows = distributed.share(torch.arange(7)) if shared else torch.arange(7)
        own = x[rows].clone().requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = (shared_batch_norm if shared else F.batch_norm)(own, mean, var, w, b, True, 0.1, 1e-5)
        (y * probe[rows]).sum().backward()
        found = [y.detach(), own.grad]
        if shared:
            found = [distributed.gathered(values, 7) for values in found]
            for gradient in (w.grad, b.grad):
                distributed.add_up(gradient)
        outcomes.append([*found, w.grad, b.grad, mean, var])
    return max(float((one - other).abs().max()) for one, other in zip(*outcomes, strict=True))


def noted(data: Dataset) -> tuple[Classifier, list[dict[str, Any]], list[list[int]]]:
    """A training, and the images of each of its steps in the order of the whole batch."""
    steps, original = [], Loop._step

    def noting(loop: Loop, batch: Any, index: Any, epoch: int) -> None:
        steps.append(distributed.gathered(batch.ids, loop.size).tolist())
        original(loop, batch, index, epoch)

    Loop._step = noting  # type: ignore[method-assign]
    try:
        return *train(data, norm=False), steps
    finally:
        Loop._step = original  # type: ignore[method-assign]


class Interrupted(Exception):
    """In place of a signal."""


def stopped_at(data: Dataset, kept: Checkpoints, step: int) -> None:
    """Train up to a step, and leave a checkpoint."""
    original, taken = Loop._count, []

    def counting(loop: Loop, done: int) -> None:
        taken.append(done)
        original(loop, done)
        if loop.stepper.steps >= step:
            raise Interrupted

    Loop._count = counting  # type: ignore[method-assign]
    try:
        train(data, False, kept)
    except Interrupted:
        pass
    finally:
        Loop._count = original  # type: ignore[method-assign]


def one_bad_loss(data: Dataset) -> str:
    """The message where one process alone meets a loss that is not finite."""
    original, seen = Loop._judged, []

    def poisoned(loop: Loop, logits: torch.Tensor, *rest: Any) -> Any:
        seen.append(None)
        bad = len(seen) == 7 and distributed.rank() == distributed.size() - 1
        return original(loop, logits * float("nan") if bad else logits, *rest)

    Loop._judged = poisoned  # type: ignore[method-assign]
    try:
        train(data, norm=False)
    except TrainingError as error:
        return error.problems[0].what
    finally:
        Loop._judged = original  # type: ignore[method-assign]
    return "no error"


def work(result: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    data = load_data("digits", limit_train=200)
    with distributed.joined("cpu"):
        kept = Checkpoints(folder, {}, seconds=0)
        # Goes on from what a run with another number of processes left, and leaves something for the next.
        first_step = (found := kept.latest()) and found.state["steps"]
        if (step := first_step or 0) < 20:
            stopped_at(data, kept, step + 10)
        resumed = train(data, False, kept)[1] if step else []
        model, history, steps = noted(data)
        found = {
            "size": distributed.size(),
            "batch_norm": batch_norm_apart(),
            "ids": steps,
            "history": history,
            "with_norm": train(data, norm=True)[1],
            "went_on_from": first_step,
            "resumed": resumed,
            "logits": predict(model, data.test).tolist(),
            "few": len(predict(model, data.test[torch.arange(2)])),
            "bad": one_bad_loss(data),
        }
        if distributed.first():
            result.write_text(json.dumps(found))


def forked(rank: int, count: int, port: int, folder: Path) -> int:
    """One of `count` processes; its number, to the parent."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "EKD_CACHE": str(folder / f"cache-{count}"),
        }  # fmt: skip
        work(folder / f"{count}.json", folder / "checkpoints")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # what the parent would clean up is its own


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def main() -> None:
    folder = Path(sys.argv[1])
    for count in map(int, sys.argv[2].split(",")):
        port = free_port()
        pids = [forked(rank, count, port, folder) for rank in range(count)]
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status:  # the others would wait for it
                for other in pids:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"one of {count} processes failed")


if __name__ == "__main__":
    main()
