"""What each of several processes does in test_sharding.py; the first writes what was found.

torchrun --nproc-per-node N tests/sharding_work.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemble_kd import distributed
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import load_data
from ensemble_kd.errors import EkdError
from ensemble_kd.objective import Viewing
from ensemble_kd.teachers import sharding
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.runner import Running
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

CPU = torch.device("cpu")
CLASSES = tuple("0123456789")


class Reaching(nn.Module):
    """A network that reads the parameters of a layer which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.layers[1].bias, self.layers[0](x), self.layers[1].weight.t())


def network(seed: int) -> Classifier:
    """Layers with BatchNorm, and blocks that are large beside the rest."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(width, 96), nn.GELU()) for width in (144, 96, 96)]
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), *blocks, nn.Linear(96, 10))
        net[1].running_mean.normal_()
    return classifier(net)


def classifier(net: nn.Module) -> Classifier:
    return Classifier(net, Card("tiny", "stock", Preprocess(1, (8, 8), (0.5,), (0.5,)), CLASSES))


def error_of(work: Any) -> str:
    try:
        work()
    except EkdError as error:
        return str(error)
    return "no error"


def changed(teacher: Teacher) -> None:
    """Another number in the part of the last process."""
    if distributed.rank() == distributed.size() - 1:
        weight: Any = teacher.classifier.net[6].weight
        (weight.to_local() if hasattr(weight, "to_local") else weight)[-1, -1] += 1
    teacher.check_unchanged()


def find() -> dict[str, Any]:
    """Targets, sizes and hashes of two teachers, divided where there are several processes."""
    sharding.LEAST = 20_000
    data = load_data("digits", limit_train=101)
    viewing = Viewing("crop", 2, 5, "mixup")
    whole = [Teacher.of(f"t{seed}", network(seed), "test", storable=True) for seed in (1, 2)]
    plain = {teacher.label: teacher.fingerprint for teacher in whole}
    teachers = [replace(sharding.sharded(teacher, CPU), running=Running(2, "float32")) for teacher in whole]
    ensemble = Ensemble(teachers, torch.tensor([0.25, 0.75]), torch.tensor([2.0, 4.0]))
    stored = StoredTargets(ensemble, data.train, viewing)
    stored.begin(1)
    index = torch.arange(5)  # in two processes three and two: two parts of two images, and one
    own = distributed.share(index)
    batch = viewing.take(data.train, own, 0)
    live = LiveTargets(ensemble)(batch, own, 0, torch.zeros(len(own), 10))
    found = {
        "logits": ensemble.all_logits(data.val).tolist(),
        "stored": stored(data.train[index], index, 1, torch.zeros(5, 10)).soft.tolist(),
        "live": distributed.gathered(live.soft, 5).tolist(),
        "units": [len(sharding.units(teacher.classifier)) for teacher in teachers],
        "held": [sharding.held_bytes(teacher.classifier) for teacher in teachers],
        "bytes": [teacher.classifier.byte_count for teacher in teachers],
        "parameters": [teacher.classifier.parameter_count for teacher in teachers],
        "unchanged": all(teacher.check_unchanged() == plain[teacher.label] for teacher in teachers),
        "changed": error_of(lambda: changed(teachers[0])),
    }
    sharding.LEAST = 1
    reaching = Teacher.of("reaching", classifier(Reaching()), "test")
    found["reaching"] = error_of(lambda: sharding.sharded(reaching, CPU))
    return found


def main() -> None:
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        found = find()
        if distributed.first():
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
