"""The loop of steps against one written out by hand, and its engine: compiled, profiled, with and without targets."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax, softmax, xlogy
from torch import Tensor, nn

from ensemble_kd import distillation
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.distillation import distill
from ensemble_kd.errors import TrainingError
from ensemble_kd.fit import fit, train_on_labels
from ensemble_kd.loop import Engine
from ensemble_kd.objective import Objective, TargetSource, Viewing
from ensemble_kd.profiling import STEPS, WARM_UP
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

CPU = torch.device("cpu")
MEAN, STD = 0.3, 0.4
WEIGHTS, TEMPERATURES = (0.25, 0.75), (2.0, 4.0)
STUDENTS_TEMPERATURE = 3.0
RECIPE = Recipe(
    epochs=3, batch_size=40, optimizer="sgd", lr=0.05, weight_decay=5e-4, warmup_epochs=0.5, clip_norm=None
)


def classifier(net: nn.Module) -> Classifier:
    """8×8 grey images through `net`."""
    card = Card("lenet", "small", Preprocess(1, (8, 8), (MEAN,), (STD,)), tuple("0123456789"))
    return Classifier(net, card)


def linear_net(seed: int = 0, scale: float = 1.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.mul_(scale)
    return net


def conv_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def two_teachers() -> Ensemble:
    """Linear ones, so that they can be written out; their logits are far apart."""
    teachers = [
        Teacher.of(f"t{number}", classifier(linear_net(11 + number, 4.0)), "test") for number in range(2)
    ]
    return Ensemble(teachers, torch.tensor(WEIGHTS), torch.tensor(TEMPERATURES))


def objective(targets: TargetSource, val: Images, soft_weight: float = 0.7, **options: Any) -> Objective:
    target = targets.ensemble.target(targets.ensemble.all_logits(val))
    return Objective(soft_weight, STUDENTS_TEMPERATURE, targets, target, **options)


def train(
    data: Dataset,
    towards: Objective | None = None,
    *,
    net: nn.Module | None = None,
    recipe: Recipe = RECIPE,
    viewing: Viewing | None = None,
    seed: int = 5,
    engine: Engine | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    net = net or linear_net()
    viewing = viewing or Viewing("crop", 2, seed)
    history = fit(
        classifier(net),
        data.train,
        data.val,
        recipe,
        towards or Objective(),
        viewing,
        seed=seed,
        device=CPU,
        engine=engine,
    )
    return net, history


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# By hand


@dataclass
class ByHand:
    """Training a linear network in numpy float64: views and order are the package's, all the rest is not."""

    data: Dataset
    recipe: Recipe
    viewing: Viewing
    soft_weights: list[float]
    seed: int = 5

    def __post_init__(self) -> None:
        head = linear_net()[1]
        self.at = [head.weight.detach().double().numpy().T.copy(), head.bias.detach().double().numpy().copy()]
        self.momentum = [np.zeros_like(values) for values in self.at]
        self.average: list[np.ndarray] | None = None
        self.rates: list[float] = []
        self.teachers = [linear_net(11 + number, 4.0)[1] for number in range(2)]

    def run(self) -> list[dict[str, float]]:
        rows, count, size = [], len(self.data.train), self.recipe.batch_size
        for epoch in range(self.recipe.epochs):
            order, found = views.order(self.seed, epoch, count).tolist(), []
            for start in range(0, count - size + 1, size):
                self.rates.append(self.rate(count // size))
                found.append(self.step(np.array(order[start : start + size]), epoch))
            rows.append({name: float(np.mean([row[name] for row in found])) for name in found[0]})
        return rows

    def rate(self, steps: int) -> float:
        step, total = len(self.rates), self.recipe.epochs * steps
        warm = round(self.recipe.warmup_epochs * steps)
        if step < warm:
            return self.recipe.lr * (step + 1) / (warm + 1)
        return self.recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    def batch(self, index: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels (B, 64), labels as distributions (B, 10) and the labels that count as right."""
        images, how = self.data.train, self.viewing
        number = {"seed": how.seed, "view_id": epoch % how.count if how.count else epoch}
        at = torch.from_numpy(index)
        pixels = views.view(images.pixels[at], images.ids[at], policy=how.policy, **number)
        labels = images.known_labels.numpy()
        truth = np.eye(10)[labels[index]]
        if how.mix != "none":
            partners = views.partners(images.ids[at], len(images), **number)
            others = views.view(images.pixels[partners], images.ids[partners], policy=how.policy, **number)
            mixed, share = views.mix(pixels, others, images.ids[at], kind=how.mix, **number)
            part = share.double().numpy()[:, None]
            truth = part * truth + (1 - part) * np.eye(10)[labels[partners.numpy()]]
            if how.mix == "mixup":
                blended = (
                    part[:, :, None, None] * pixels.numpy() + (1 - part[:, :, None, None]) * others.numpy()
                )
                assert np.abs(blended - mixed.numpy()).max() <= 0.5
            else:
                kept = (mixed == pixels).double().mean((1, 2, 3)).numpy()
                assert (kept >= part[:, 0] - 1e-6).all()  # at least: both may be black
            pixels = mixed
        smooth = (1 - self.recipe.label_smoothing) * truth + self.recipe.label_smoothing / 10
        return pixels.double().numpy().reshape(len(index), 64), smooth, labels[index]

    def step(self, index: np.ndarray, epoch: int) -> dict[str, float]:
        pixels, truth, labels = self.batch(index, epoch)
        x, w, t = (pixels / 255 - MEAN) / STD, self.soft_weights[epoch], STUDENTS_TEMPERATURE
        z = [
            x @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
            for head in self.teachers
        ]
        p, plain = (
            sum(
                share * softmax(own / at, axis=1)
                for share, own, at in zip(WEIGHTS, z, temperatures, strict=True)
            )
            for temperatures in (TEMPERATURES, (1.0, 1.0))
        )
        s = x @ self.at[0] + self.at[1]
        loss = -(1 - w) * (truth * log_softmax(s, axis=1)).sum()
        loss += w * t**2 * (xlogy(p, p) - p * log_softmax(s / t, axis=1)).sum()
        slope = (1 - w) * (softmax(s, axis=1) - truth) + w * t * (softmax(s / t, axis=1) - p)
        self.move([x.T @ slope / len(x), slope.mean(axis=0)])
        return {
            "loss": loss / len(x),
            "accuracy": (s.argmax(axis=1) == labels).mean(),
            "teacher_student_cross_entropy": -(plain * log_softmax(s, axis=1)).sum(axis=1).mean(),
        }

    def move(self, gradients: list[np.ndarray]) -> None:
        """A step of SGD with Nesterov momentum 0.9; weight decay on the matrix alone."""
        if (most := self.recipe.clip_norm) is not None:
            norm = math.sqrt(sum((g**2).sum() for g in gradients))
            gradients = [g * min(1.0, most / (norm + 1e-6)) for g in gradients]
        gradients[0] = gradients[0] + self.recipe.weight_decay * self.at[0]
        for values, gradient, momentum in zip(self.at, gradients, self.momentum, strict=True):
            momentum *= 0.9
            momentum += gradient
            values -= self.rates[-1] * (gradient + 0.9 * momentum)
        if (decay := self.recipe.ema) is not None:
            before = self.average or self.at
            self.average = [decay * old + (1 - decay) * now for old, now in zip(before, self.at, strict=True)]


CASES: dict[str, dict[str, Any]] = {
    "kl": {},
    "fresh views": {"viewing": Viewing("crop-flip", 0, 5)},
    "smoothing, clipping, average": {
        "recipe": replace(RECIPE, label_smoothing=0.2, clip_norm=0.5, ema=0.8, weight_decay=0.1)
    },
    "mixup": {"viewing": Viewing("crop", 2, 5, "mixup")},
    "cutmix, smoothing": {
        "viewing": Viewing("none", 2, 5, "cutmix"), "recipe": replace(RECIPE, label_smoothing=0.2),
    },
    "cutmix on fresh views": {"viewing": Viewing("rrc", 0, 5, "cutmix")},
    "soft weight 1": {"soft_weight": 1.0, "weights": [1.0] * 3},
    "linear": {"options": {"schedule": "linear"}, "weights": [0.7, 0.7 * 2 / 3, 0.0]},
    "cutoff": {"options": {"schedule": "cutoff", "span": 2}, "weights": [0.7, 0.7, 0.0]},
    "warm-up": {"options": {"schedule": "warmup", "span": 2}, "weights": [0.35, 0.7, 0.7]},
    "linear mixup": {
        "options": {"schedule": "linear"}, "weights": [0.7, 0.7 * 2 / 3, 0.0],
        "viewing": Viewing("crop", 2, 5, "mixup"),
    },
}  # fmt: skip


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_training_is_what_it_is_by_hand(few_digits: Dataset, case: str, live: bool) -> None:
    how = {
        "recipe": RECIPE,
        "viewing": Viewing("crop", 2, 5),
        "soft_weight": 0.7,
        "options": {},
        **CASES[case],
    }
    if not live and not how["viewing"].count:
        how["viewing"] = replace(how["viewing"], count=2)
    weights = how.get("weights", [how["soft_weight"]] * 3)
    ensemble = two_teachers()
    targets = LiveTargets(ensemble) if live else StoredTargets(ensemble, few_digits.train, how["viewing"])
    towards = objective(targets, few_digits.val, how["soft_weight"], **how["options"])
    net, history = train(few_digits, towards, recipe=how["recipe"], viewing=how["viewing"])
    hand = ByHand(few_digits, how["recipe"], how["viewing"], weights)
    expected = hand.run()
    error = 1e-5 if live else 2e-3  # of half precision
    for epoch, (row, wanted) in enumerate(zip(history, expected, strict=True)):
        if how["soft_weight"] == 1:
            wanted.pop("accuracy")  # no label is read
        if live and weights[epoch] == 0:
            wanted.pop("teacher_student_cross_entropy")  # live teachers are not run to be measured alone
        assert row["train"] == pytest.approx(wanted, rel=error)
        assert row["train"].keys() == wanted.keys()
        assert row["lr"] == pytest.approx(hand.rates[epoch * 5], rel=1e-12)
        assert row["soft_weight"] == pytest.approx(weights[epoch])
        assert "teacher_student_cross_entropy" in row["val"]
    weight, bias = hand.average or hand.at
    np.testing.assert_allclose(net[1].weight.detach().numpy(), weight.T, rtol=0, atol=error)
    np.testing.assert_allclose(net[1].bias.detach().numpy(), bias, rtol=0, atol=error)


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_training_on_labels_alone_is_what_it_is_by_hand(few_digits: Dataset, mix: str) -> None:
    viewing, recipe = Viewing("crop", 2, 5, mix), replace(RECIPE, label_smoothing=0.1)
    hand = ByHand(few_digits, recipe, viewing, [0.0] * 3)
    expected = hand.run()
    stored = StoredTargets(two_teachers(), few_digits.train, viewing)
    # A control is measured against stored targets, which does not change it.
    nets = []
    for towards in (Objective(), replace(objective(stored, few_digits.val), soft_weight=0.0)):
        net, history = train(few_digits, towards, recipe=recipe, viewing=viewing)
        measured = {"loss", "accuracy"} | ({"teacher_student_cross_entropy"} if towards.targets else set())
        for row, wanted in zip(history, expected, strict=True):
            assert row["train"].keys() == measured
            wanted = {name: wanted[name] for name in measured}
            assert row["train"] == pytest.approx(wanted, rel=1e-3 if towards.targets else 1e-5)
        np.testing.assert_allclose(net[1].weight.detach().numpy(), hand.at[0].T, rtol=0, atol=1e-5)
        nets.append(net)
    assert same(*nets)


def test_the_last_rate_is_that_before_nothing(few_digits: Dataset) -> None:
    recipe = replace(RECIPE, epochs=4, warmup_epochs=0.0)
    _, history = train(few_digits, recipe=recipe)
    rates = [RECIPE.lr * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [row["lr"] for row in history] == pytest.approx(rates)


# Engines


def test_a_compiled_network_is_trained_the_same(few_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is traced as always; that no code is generated from that saves most of the time."""
    compiled: list[Any] = []
    compile_ = torch.compile

    def without_code(what: Any) -> Any:
        compiled.append(what)
        return compile_(what, backend="eager")

    monkeypatch.setattr(torch, "compile", without_code)
    viewing, recipe, found = Viewing("crop", 2, 5, "mixup"), replace(RECIPE, label_smoothing=0.1), []
    for engine in (Engine(compile=True), Engine()):
        towards = objective(LiveTargets(two_teachers()), few_digits.val)
        found.append(train(few_digits, towards, recipe=recipe, viewing=viewing, engine=engine))
        assert len(compiled) == 2  # the network and what judges it, once
    (net, history), (plain, rows) = found
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], wanted, rtol=1e-5, atol=1e-6)
    for row, wanted in zip(history, rows, strict=True):
        assert row["train"] == pytest.approx(wanted["train"], rel=1e-5)
        assert row["val"] == pytest.approx(wanted["val"], rel=1e-5)


PARTS = {"views", "forward", "targets", "loss", "backward", "optimizer", "other", "step"}


def profiled(
    data: Dataset, folder: Path, batch_size: int, epochs: int = 2
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, list[float]]]:
    """The network, its history, and the milliseconds of every span in the trace."""
    trace = folder / "deep" / "trace.json"
    towards = objective(LiveTargets(two_teachers()), data.val)
    recipe = replace(RECIPE, batch_size=batch_size, epochs=epochs)
    net, history = train(data, towards, net=conv_net(), recipe=recipe, engine=Engine(trace=trace))
    spans: dict[str, list[float]] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") == "user_annotation" and event["ph"] == "X":
            spans.setdefault(event["name"].partition("#")[0], []).append(event["dur"] / 1000)
    return net, history, spans


def test_a_profile_tells_where_the_time_of_a_step_goes(few_digits: Dataset, tmp_path: Path) -> None:
    net, history, spans = profiled(few_digits, tmp_path, 200 // (WARM_UP + STEPS + 2))
    assert "profile" not in history[1]
    profile = history[0]["profile"]
    assert profile.keys() == PARTS
    assert all(value >= 0 for value in profile.values())
    *names, last = profile
    assert last == "step"
    assert [profile[name] for name in names] == sorted((profile[name] for name in names), reverse=True)
    assert sum(profile[name] for name in names) == pytest.approx(profile["step"])
    # The trace tells the same.
    assert len(spans["ProfilerStep"]) == STEPS
    assert profile["step"] == pytest.approx(sum(spans["ProfilerStep"]) / STEPS, rel=1e-3)
    for name in PARTS - {"other", "step"}:
        assert len(spans[f"ekd: {name}"]) == STEPS
        assert profile[name] == pytest.approx(sum(spans[f"ekd: {name}"]) / STEPS, rel=1e-3)
    towards = objective(LiveTargets(two_teachers()), few_digits.val)
    recipe = replace(RECIPE, batch_size=8, epochs=2)
    plain, rows = train(few_digits, towards, net=conv_net(), recipe=recipe)
    assert same(net, plain)
    assert [row["train"] for row in rows] == [row["train"] for row in history]


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_a_profile_of_a_short_epoch_is_by_its_own_steps(
    few_digits: Dataset, tmp_path: Path, steps: int
) -> None:
    _, history, spans = profiled(few_digits, tmp_path, 200 // steps, epochs=1)
    profile = history[0]["profile"]
    assert profile.keys() == PARTS
    taken = len(spans["ekd: forward"])
    assert 1 <= taken <= steps
    for name in PARTS - {"other", "step"}:
        assert profile[name] == pytest.approx(sum(spans[f"ekd: {name}"]) / taken, rel=1e-3)
    assert sum(profile.values()) == pytest.approx(2 * profile["step"])


def test_one_step_is_not_worth_a_profile(few_digits: Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, batch_size=200, epochs=2)
    _, history = train(few_digits, recipe=recipe, engine=Engine(trace=tmp_path / "trace.json"))
    assert all("profile" not in row for row in history)
    assert not list(tmp_path.iterdir())


def test_a_network_on_labels_is_profiled_without_targets(few_digits: Dataset, tmp_path: Path) -> None:
    history = train_on_labels(
        classifier(linear_net()),
        few_digits,
        replace(RECIPE, batch_size=8, epochs=1),
        "none",
        seed=0,
        device=CPU,
        description="teacher",
        engine=Engine(trace=tmp_path / "trace.json"),
    )
    assert history[0]["profile"].keys() == PARTS - {"targets"}


def test_an_error_while_profiling_leaves_the_next_run_alone(few_digits: Dataset, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("by the hook")

    net = conv_net()
    net.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="by the hook"):
        train(few_digits, net=net, engine=Engine(trace=tmp_path / "trace.json"))
    _, history = train(few_digits)
    assert all("profile" not in row for row in history)


# Targets


def test_weights_that_are_none_in_one_batch_are_told(few_digits: Dataset) -> None:
    calls: list[int] = []

    def weigh(logits: Tensor) -> Tensor:
        calls.append(1)
        return torch.tensor([0.5, 0.5 if len(calls) != 3 else 0.504])

    ensemble = replace(two_teachers(), weigh=weigh)
    towards = objective(LiveTargets(ensemble), few_digits.val, weights_vary=True)
    calls.clear()
    with pytest.raises(TrainingError, match="epoch 1: the weights of the teachers are none"):
        train(few_digits, towards)


def test_a_control_on_labels_is_measured_by_targets_of_its_own_pixels(
    few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside unlabelled images as well, from which the student's partners come too."""
    folder = tmp_path / "more"
    folder.mkdir()
    for number, pixels in enumerate(torch.randint(0, 256, (30, 8, 8), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    apart: dict[str, float] = {}
    original = distillation.fit

    def checked(
        model: Classifier,
        images: Images,
        val: Images,
        recipe: Recipe,
        towards: Objective,
        viewing: Viewing,
        **more: Any,
    ) -> list[dict[str, Any]]:
        index, name = torch.arange(100, 140), more["description"]
        if towards.targets is not None:
            batch = viewing.take(images, index, 0)
            live = LiveTargets(towards.targets.ensemble)
            ours, wanted = (
                source(batch, index, 0, torch.zeros(40, 10)).plain for source in (towards.targets, live)
            )
            apart[name] = float((ours.exp() - wanted.exp()).abs().max())
        return original(model, images, val, recipe, towards, viewing, **more)

    monkeypatch.setattr(distillation, "fit", checked)
    monkeypatch.setattr(distillation, "_conclude", lambda *_: {})
    distill(
        "lenet", "lenet", unlabelled=folder, mix="mixup", augment="crop", views=1, controls="labels", epochs=1,
        teacher_epochs=1, limit_train=200, out=tmp_path / "run",
    )  # fmt: skip
    assert apart["student"] < 2e-3
    assert apart.get("control labels", 0.0) < 2e-3


def test_fresh_views_are_those_of_their_epoch(few_digits: Dataset) -> None:
    seen: list[Tensor] = []
    model = classifier(linear_net())
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    fit(
        model, few_digits.train, few_digits.val, RECIPE, Objective(), Viewing("rrc", 0, 7), seed=3, device=CPU
    )  # fmt: skip
    images = few_digits.train
    for epoch in range(3):
        index = views.order(3, epoch, 200)
        wanted = views.view(images.pixels[index], images.ids[index], policy="rrc", seed=7, view_id=epoch)
        assert torch.equal(torch.cat(seen[5 * epoch : 5 * epoch + 5]), wanted)
