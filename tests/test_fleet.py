"""Students trained together end with the numbers of students trained one after another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ensemble_kd import trackers
from ensemble_kd.config import resolve
from ensemble_kd.distillation import distill_with
from ensemble_kd.errors import TrainingError
from ensemble_kd.losses import LOSSES
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.setting import Objects
from ensemble_kd.shared import Shared
from ensemble_kd.stacked import Stack, StackedStepper
from ensemble_kd.stepping import Recipe, Stepper
from ensemble_kd.students import LeNet, SmallResNet
from ensemble_kd.together import distill_together, fleets
from ensemble_kd.weights import load_student

SHARED = Shared(pictures=False)


def options(folder: Path, **given: Any) -> DistillOptions:
    few = {"limit_train": 160, "epochs": 2, "teacher_epochs": 1, "controls": "none", "lr": 0.003}
    return resolve(DistillOptions, {"teachers": ["lenet", "resnet8"], **few, "out": folder, **given})


def both_ways(tmp_path: Path, cases: list[dict[str, Any]], tolerance: float = 1e-5, **common: Any) -> float:
    """The largest difference between weights and histories of a fleet and of single runs."""
    together = [options(tmp_path / f"fleet-{n}", **common, **case) for n, case in enumerate(cases)]
    assert distill_together(together, SHARED) == ""
    apart = 0.0
    for number, case in enumerate(cases):
        alone = distill_with(
            options(tmp_path / f"alone-{number}", **common, **case), Objects({}, shared=SHARED)
        )
        fleet = load_file(tmp_path / f"fleet-{number}" / "student.safetensors")
        for name, values in alone.student.net.state_dict().items():
            apart = max(apart, float((values.double() - fleet[name].double()).abs().max()))
        ours, theirs = (Run.open(tmp_path / f"{kind}-{number}").history() for kind in ("alone", "fleet"))
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            assert a["train"] == pytest.approx(b["train"], abs=tolerance)
            assert a["val"] == pytest.approx(b["val"], abs=tolerance)
            assert (a["lr"], a["soft_weight"], a["step"]) == pytest.approx(
                (b["lr"], b["soft_weight"], b["step"])
            )
    return apart


def test_fifty_steps_of_a_fleet_are_those_of_single_runs(tmp_path: Path) -> None:
    """Of a network without kinks: at those of ReLU and max-pooling a rounding in float32 may turn either way."""
    code = tmp_path / "smooth.py"
    code.write_text(
        "from torch import nn\n"
        "def net(num_classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),\n"
        "                         nn.Linear(54, num_classes))\n"
    )
    cases = [
        {"temperature": 1, "soft_weight": 0.9},
        {"temperature": 4, "soft_weight": 0.5, "seed": 1},
        {"temperature": 4, "soft_weight": 0, "lr": 0.001},
        {"temperature": 8, "soft_weight": 1, "seed": 2},
    ]
    assert (
        both_ways(tmp_path, cases, epochs=10, student=f"py:{code}:net", student_size=8) < 1e-5
    )  # 5 steps each


def test_adamw_averages_schedules_and_augmented_views_too(tmp_path: Path) -> None:
    training = {"optimizer": "adamw", "lr": 0.001, "ema": 0.8, "epochs": 3, "label_smoothing": 0.1}
    common = {"training": training, "lr": None, "augment": "crop", "views": 2, "soft_schedule": "linear"}
    # AdamW divides by roots of small numbers, which makes more of roundings; in float64, below, it is exact.
    assert both_ways(tmp_path, [{"temperature": 2}, {"seed": 3, "soft_weight": 0.4}], **common) < 2e-5


def test_numbers_of_a_loss_may_differ(tmp_path: Path) -> None:
    cases = [{"loss_numbers": {"beta": 2.0}}, {"loss_numbers": {"alpha": 0.5}, "temperature": 2}]
    assert both_ways(tmp_path, cases, loss="dkd") < 1e-5


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("kl", "dkd")])
def test_each_loss_of_a_fleet_is_that_of_one(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    target = torch.log_softmax(torch.randn(3, 8, 5, generator=generator, dtype=torch.float64), dim=2)
    temperatures = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    numbers = dict(LOSSES[loss].numbers)
    stacked = torch.func.vmap(lambda z, p, t: LOSSES[loss].compute(z, p, t, **numbers))
    single = [
        float(LOSSES[loss].compute(z, p, float(t), **numbers))
        for z, p, t in zip(logits, target, temperatures, strict=True)
    ]
    assert stacked(logits, target, temperatures).tolist() == pytest.approx(single, rel=1e-12)


@pytest.mark.parametrize("make", [lambda: LeNet(5, 1, 28), lambda: SmallResNet(5, 1, 28, 1)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_stack_steps_as_its_networks_do(make: Any, optimizer: str) -> None:
    """In float64, where no rounding decides which side of a kink is taken; BatchNorm's buffers too."""
    recipe = Recipe(4, 6, optimizer, 0.05, 0.01, 0.5, clip_norm=0.5, ema=0.7)
    nets = [make().double() for _ in range(3)]
    alone = copy.deepcopy(nets)
    stack, rates = Stack(nets), torch.tensor([0.05, 0.02, 0.05], dtype=torch.float64)
    stepper = StackedStepper(stack, recipe)
    singles = [Stepper(net.train(), None, recipe, 100) for net in alone]
    for _ in range(5):
        x = torch.randn(3, 6, 1, 28, 28, dtype=torch.float64)
        stepper.prepare()
        stepper(stack(x).square().mean(dim=(1, 2)), rates)
        for net, single, own, rate in zip(alone, singles, x, rates, strict=True):
            for group in single.optimizer.param_groups:
                group["lr"] = float(rate)
            single(net(own).square().mean())
    stepper.take_average()
    for net, one, single in zip(nets, alone, singles, strict=True):
        single.take_average()
        for ours, theirs in zip(net.state_dict().values(), one.state_dict().values(), strict=True):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-9, atol=1e-11)


def test_a_student_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    cases = [options(tmp_path / "fine"), options(tmp_path / "wild", lr=1e30)]
    assert distill_together(cases, SHARED) == ""
    assert not (tmp_path / "wild").exists()
    with pytest.raises(TrainingError, match="the loss is not finite"):
        distill_with(cases[1], Objects({}, shared=SHARED))
    fine = distill_with(options(tmp_path / "alone"), Objects({}, shared=SHARED))
    kept = load_student(tmp_path / "fine")
    for ours, theirs in zip(kept.parameters(), fine.student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_trackers_are_told_of_each_student_as_if_it_were_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, list[tuple[list[str], int]]] = {}

    class Listener:
        def __init__(self, start: trackers.Start) -> None:
            self.rows = told.setdefault(start.folder.name, [])

        def log(self, row: Mapping[str, float], step: int) -> None:
            self.rows.append((sorted(row), step))

        def finish(self) -> None:
            """Nothing is open."""

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Listener)
    tracked = {"track": ["tensorboard"]}
    assert distill_together([options(tmp_path / str(n), seed=n, **tracked) for n in range(2)], SHARED) == ""
    distill_with(options(tmp_path / "alone", **tracked), Objects({}, shared=SHARED))
    assert told["0"] == told["1"] == told["alone"]
    assert len(told["alone"]) == 3  # two epochs, and the test split


def test_only_what_differs_in_numbers_flies_together(tmp_path: Path) -> None:
    cases = [
        options(tmp_path),
        options(tmp_path, temperature=8, soft_weight=0.1, seed=4, lr=0.2),
        options(tmp_path, student="cifar-quick"),
        options(tmp_path, loss="js"),
        options(tmp_path, limit_train=100),
        options(tmp_path, student="cifar-quick", seed=1),
    ]
    assert fleets(cases) == [[0, 1], [2, 5], [3], [4]]
    assert fleets(cases[:2] * 3, most=4) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"mix": "mixup"}, "images are mixed"),
        ({"views": 0}, "teachers run live, or are weighted by batch"),
        ({"combine": "entropy"}, ""),
        ({"combine": "confidence"}, "teachers run live, or are weighted by batch"),
        ({"feature_weight": 0.1}, "features are distilled"),
        ({"profile": True}, "each is profiled"),
        ({"compile": True}, "each is compiled"),
    ],
)
def test_what_cannot_fly_says_why(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    cases = [options(tmp_path / str(seed), seed=seed, epochs=1, **given) for seed in range(2)]
    assert distill_together(cases, SHARED) == why
    assert (tmp_path / "0").exists() == (not why)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("net.idle = nn.Linear(2, 2)", "the network cannot be vectorised ("),
        ("net[1].requires_grad_(False)", "some weights are frozen"),
    ],
)
def test_a_network_of_yours_that_would_be_trained_otherwise_does_not_fly(
    tmp_path: Path, more: str, why: str
) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return self[1](self[0](x))\n"
        "def make(num_classes):\n"
        f"    net = Net(nn.Flatten(), nn.Linear(64, num_classes))\n    {more}\n    return net\n"
    )
    cases = [
        options(tmp_path / str(seed), seed=seed, student=f"py:{code}:make", student_size=8)
        for seed in range(2)
    ]
    assert distill_together(cases, SHARED).startswith(why)


def test_a_student_that_is_not_finite_at_the_end_alone_leaves_no_run(tmp_path: Path) -> None:
    """One step: its loss was that of the first weights."""
    common = {"epochs": 1, "batch_size": 160}
    cases = [options(tmp_path / "fine", **common), options(tmp_path / "wild", **{**common, "lr": 1e30})]
    assert distill_together(cases, SHARED) == ""
    assert (tmp_path / "fine" / "metrics.json").is_file()
    assert not (tmp_path / "wild").exists()


def test_a_run_that_another_process_made_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    cases = [options(tmp_path / str(seed), seed=seed, epochs=1) for seed in range(2)]
    distill_with(cases[0], Objects({}, shared=SHARED))
    before = (tmp_path / "0" / "status.json").stat().st_mtime_ns
    assert distill_together(cases, SHARED) == ""
    assert (tmp_path / "0" / "status.json").stat().st_mtime_ns == before
    assert (tmp_path / "1" / "metrics.json").is_file()


def test_a_run_of_a_fleet_counts_the_seconds_of_its_training(tmp_path: Path) -> None:
    cases = [options(tmp_path / str(seed), seed=seed, epochs=1) for seed in range(2)]
    assert distill_together(cases, SHARED) == ""
    run = Run.open(tmp_path / "1")
    trained = sum(row["seconds"] for row in run.history())
    assert run.metrics()["seconds"]["student"] >= trained - 0.001 > 0


def test_dropout_does_not_fly() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="random"):
        Stack([copy.deepcopy(net) for _ in range(2)])(torch.ones(2, 2, 4))
