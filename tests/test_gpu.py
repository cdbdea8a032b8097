"""What only a GPU can show: recorded steps, a loop that never waits, bf16 teachers, memory given back, analyses."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import logged
from torch import Tensor, nn

from ensemble_kd import loop as loop_module
from ensemble_kd.analysis.agreement import all_pairs, under_corruption
from ensemble_kd.analysis.calibration import calibration_of
from ensemble_kd.analysis.features import features_of
from ensemble_kd.analysis.fidelity import Compared
from ensemble_kd.analysis.options import (
    AgreementOptions,
    CalibrationOptions,
    FeaturesOptions,
    SurfaceOptions,
)
from ensemble_kd.analysis.subjects import Subjects
from ensemble_kd.analysis.surface import surface_of
from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.data.views import MIXES, POLICIES
from ensemble_kd.distillation import distill
from ensemble_kd.fit import fit
from ensemble_kd.fresh import new_classifier
from ensemble_kd.graphs import Replayed
from ensemble_kd.loop import Engine, Loop
from ensemble_kd.models import parse
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.runner import Runner, Running
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets
from ensemble_kd.weighting import agree_weights, entropy_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CUDA = torch.device("cuda")
RECIPE = Recipe(4, 32, "sgd", 0.05, 5e-4, 0.5, clip_norm=2.0)


def teachers(data: Dataset) -> list[Teacher]:
    nets = [new_classifier(parse(name), data, seed=3) for name in ("lenet", "resnet8")]
    return [Teacher.of(f"t{n}", net.to(CUDA), "here", storable=True) for n, net in enumerate(nets)]


def ensemble(data: Dataset, **options: Any) -> Ensemble:
    half = torch.tensor([0.5, 0.5], device=CUDA)
    return Ensemble(teachers(data), half, torch.tensor([4.0, 2.0], device=CUDA), **options)


def trained(
    data: Dataset,
    engine: Engine,
    student: str = "lenet",
    recipe: Recipe = RECIPE,
    viewing: Viewing | None = None,
    stored: bool = True,
    **objective: Any,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The student's tensors and history after training on the GPU."""
    together, viewing = ensemble(data), viewing or Viewing("crop", 2, 0)
    train, val = data.train.to(CUDA), data.val.to(CUDA)
    target = together.target(together.all_logits(val))
    targets = StoredTargets(together, train, viewing) if stored else LiveTargets(together)
    goal = Objective(0.7, 3.0, targets, target, **objective)
    model = new_classifier(parse(student), data, seed=1)
    history = fit(model, train, val, recipe, goal, viewing, seed=2, device=CUDA, engine=engine)
    return [tensor.detach().float().cpu() for tensor in model.state_dict().values()], history


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many graphs are recorded."""
    recorded: list[int] = []
    record: Callable[[Replayed], None] = Replayed._record

    def counting(self: Replayed) -> None:
        record(self)
        recorded.append(int(self._graph is not None))

    with monkeypatch.context() as patch:
        patch.setattr(Replayed, "_record", counting)
        yield recorded


CASES: dict[str, dict[str, Any]] = {
    "lenet": {},
    "resnet8": {"student": "resnet8"},
    "adamw": {"recipe": replace(RECIPE, optimizer="adamw", lr=1e-3)},
    "average": {"recipe": replace(RECIPE, ema=0.9), "student": "resnet8"},
    "smoothing": {"recipe": replace(RECIPE, label_smoothing=0.1, clip_norm=None)},
    "mixup": {"viewing": Viewing("crop-flip", 3, 0, "mixup")},
    "one view": {"viewing": Viewing("none", 1, 0)},
    "linear": {"schedule": "linear"},
    "cutoff": {"schedule": "cutoff", "span": 2},
    "mse": {"loss": "mse"},
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_train_the_same_network(few_digits: Dataset, monkeypatch, case: str) -> None:
    with counted(monkeypatch) as recorded, logged() as lines:
        replayed, history = trained(few_digits, Engine(graph=True), **CASES[case])
    assert recorded
    assert all(recorded), lines
    eager, plain = trained(few_digits, Engine(graph=False), **CASES[case])
    for one, other in zip(replayed, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
    for row, wanted in zip(history, plain, strict=True):
        assert row["train"].keys() == wanted["train"].keys()
        assert row["train"]["loss"] == pytest.approx(wanted["train"]["loss"], rel=1e-2)
        assert row["lr"] == wanted["lr"]


def test_what_cannot_be_recorded_is_trained_all_the_same(few_digits: Dataset, monkeypatch) -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x) if float(x.sum()) > -1e9 else x

    card = new_classifier(parse("lenet"), few_digits, seed=1).card
    train, val = few_digits.train.to(CUDA), few_digits.val.to(CUDA)
    model = Classifier(Peeking(), card)
    with logged() as lines:
        history = fit(model, train, val, RECIPE, Objective(), Viewing("none", 1, 0), seed=0, device=CUDA)
    assert any("not recorded as a CUDA graph" in line for line in lines)
    assert history[-1]["train"]["loss"] < history[0]["train"]["loss"]


@pytest.mark.parametrize(("policy", "mix"), list(itertools.product(POLICIES, MIXES)))
def test_the_loop_never_waits_for_the_device(few_digits: Dataset, monkeypatch, policy: str, mix: str) -> None:
    step, steps = Loop._step, []

    def strict(self: Loop, *args: Any) -> None:
        steps.append(1)
        step(self, *args)
        if len(steps) == 3:  # the first set up what is set up once
            torch.cuda.set_sync_debug_mode("error")
        if len(steps) % self.steps == 0:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop_module.Loop, "_step", strict)
    warnings.filterwarnings("ignore", message="Synchronization debug mode")
    viewing = Viewing(policy, 2, 0, mix)
    try:
        trained(few_digits, Engine(graph=False), viewing=viewing, recipe=replace(RECIPE, epochs=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == len(few_digits.train) // 32


@pytest.mark.parametrize(("policy", "mix"), list(itertools.product(POLICIES, MIXES)))
def test_views_are_the_same_bits_in_any_batch(few_digits: Dataset, policy: str, mix: str) -> None:
    images, viewing = few_digits.train.to(CUDA), Viewing(policy, 0, 5, mix)
    whole = viewing.take(images, torch.arange(200, device=CUDA), 1).pixels
    shuffled = torch.randperm(200, device=CUDA)
    for size in (1, 7, 64):
        parts = [viewing.take(images, index, 1).pixels for index in shuffled.split(size)]
        assert torch.equal(torch.cat(parts), whole[shuffled])
    on_cpu = viewing.take(few_digits.train, torch.arange(200), 1).pixels
    assert torch.equal(whole.cpu(), on_cpu)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stored_targets_are_the_live_ones_at_any_batch_size(
    digits: Dataset, own_cache, precision: str
) -> None:
    together, viewing = ensemble(digits), Viewing("crop", 1, 0)
    small, large = (
        replace(together, teachers=[replace(t, running=Running(b, precision)) for t in together.teachers])
        for b in (64, 512)
    )
    train = digits.train.to(CUDA)
    stored, live = StoredTargets(small, train, viewing), LiveTargets(large)
    index = torch.arange(512, device=CUDA)
    kept, now = (t(viewing.take(train, index, 0), index, 0, torch.zeros(512, 10)) for t in (stored, live))
    for one, other in ((kept.soft, now.soft), (kept.plain, now.plain)):
        assert float((one.exp() - other.exp()).abs().max()) <= 2e-3


def test_bf16_teachers_say_nearly_the_same(digits: Dataset) -> None:
    pixels = digits.train.pixels[:256].to(CUDA)
    for teacher in teachers(digits):
        answers = [
            Runner(teacher.classifier, "t", CUDA, Running(None, precision), own_code=False)(pixels).logits
            for precision in ("float32", "auto")
        ]
        one, other = (logits.softmax(dim=1) for logits in answers)
        assert 0 < float((one - other).abs().max()) < 1e-2
        assert answers[1].dtype == torch.float32


class OwnCode(nn.Module):
    """As users write networks: a view of what a convolution gave, and a weight of five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(1, 4, 3), nn.Conv3d(4, 4, (1, 3, 3))
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.deep(x.view(*x.shape[:2], 1, *x.shape[2:]))
        return self.out(x.view(len(x), -1))


def test_a_user_s_own_code_may_take_views(few_digits: Dataset) -> None:
    """Which fail in the layout that the toolkit's own networks have on a GPU."""
    card = new_classifier(parse("lenet"), few_digits, seed=0).card
    pre = replace(card.preprocess, size=(8, 8))
    model = Classifier(OwnCode(), replace(card, model="py:mine.py:OwnCode", preprocess=pre))
    objective, viewing = Objective(), Viewing("none", 1, 0)
    history = fit(model, few_digits.train, few_digits.val, RECIPE, objective, viewing, seed=0, device=CUDA)
    assert history[-1]["val"]["loss"] < history[0]["val"]["loss"]


def test_teachers_give_their_memory_back(digits: Dataset) -> None:
    together, train = ensemble(digits), digits.train.to(CUDA)
    stored = StoredTargets(together, train, Viewing("crop", 2, 0))
    stored.build()
    before = torch.cuda.memory_allocated()
    together.release()
    assert torch.cuda.memory_allocated() < before
    assert all(p.device.type == "cpu" for t in together.teachers for p in t.classifier.parameters())
    assert all(t.check_unchanged() == t.fingerprint for t in together.teachers)


def test_a_teacher_that_runs_out_of_memory_goes_on_with_half(digits: Dataset) -> None:
    teacher = Teacher.of(
        "wide", new_classifier(parse("resnet18"), digits, seed=0).to(CUDA), "", storable=True
    )
    pixels = digits.train.pixels.repeat(8, 1, 1, 1)[:8192].to(CUDA)
    runner = Runner(teacher.classifier, "wide", CUDA, Running(8192), own_code=False)
    torch.cuda.reset_peak_memory_stats()
    wanted = runner(pixels).logits
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    free = (peak - torch.cuda.memory_reserved()) / 2
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
    try:
        with logged() as lines:
            got = runner(pixels).logits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert lines
    assert all("images at a time are too many, going on with" in line for line in lines)
    assert float((got.softmax(1) - wanted.softmax(1)).abs().max()) < 1e-2


@pytest.mark.parametrize("weigh", [entropy_weights, agree_weights])
def test_weights_by_batch_train_on_the_gpu(few_digits: Dataset, weigh) -> None:
    together, viewing = ensemble(few_digits, weigh=weigh), Viewing("crop", 2, 0)
    train, val = few_digits.train.to(CUDA), few_digits.val.to(CUDA)
    target = together.target(together.all_logits(val))
    goal = Objective(0.5, 3.0, StoredTargets(together, train, viewing), target, weights_vary=True)
    model = new_classifier(parse("lenet"), few_digits, seed=1)
    history = fit(model, train, val, RECIPE, goal, viewing, seed=2, device=CUDA)
    assert sum(history[-1]["weights"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("options", [{}, {"views": 0}, {"feature_weight": 0.1}, {"mix": "cutmix"}, {"top_k": 3},
                                     {"compile": True}, {"profile": True}])  # fmt: skip
def test_distilling_on_a_gpu(tmp_path, options) -> None:
    run = distill(
        ["lenet", "resnet8"],
        "lenet",
        limit_train=600,
        epochs=6,
        teacher_epochs=3,
        augment="crop",
        device="cuda",
        out=tmp_path / "run",
        **options,
    )
    assert run.metrics["models"]["student"]["accuracy"]["value"] > 0.4
    assert run.student.card.model == "lenet"


# The analyses


def subjects_on(device: torch.device, data: Dataset, folder: Path) -> Subjects:
    """A student, a control, two teachers and their ensemble, all untrained and the same on every device."""
    moved = data.to(device)
    networks = {
        name: new_classifier(parse("lenet"), data, seed=seed).to(device).eval()
        for seed, name in enumerate(("student", "labels"))
    }
    taught = [
        Teacher.of(f"t{seed}", new_classifier(parse(name), data, seed=seed).to(device).eval(), "here")
        for seed, name in enumerate(("lenet", "resnet8"), start=5)
    ]
    together = Ensemble(taught, torch.tensor([0.5, 0.5], device=device), torch.ones(2, device=device))
    return Subjects("here", folder, moved, networks, together)


def apart(first: Any, second: Any) -> float:
    """The largest difference of two numbers at the same place of two results; the rest of them is equal."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return max((apart(own, second[key]) for key, own in first.items()), default=0.0)
    if isinstance(first, list):
        assert len(first) == len(second)
        return max((apart(a, b) for a, b in zip(first, second, strict=True)), default=0.0)
    if isinstance(first, float) and isinstance(second, float):
        return 0.0 if math.isnan(first) and math.isnan(second) else abs(first - second)
    return 0.0


def on_both(
    analyse: Callable[[Subjects, Any], Any], options: Any, data: Dataset, folder: Path
) -> list[dict[str, Any]]:
    return [
        analyse(subjects_on(device, data, folder / device.type), options).numbers
        for device in (torch.device("cpu"), CUDA)
    ]


def test_layers_are_compared_as_on_the_cpu(few_digits: Dataset, tmp_path: Path) -> None:
    """CKA to 1e-3 with its intervals; a neighbour may change places with one as far away."""
    cpu, gpu = on_both(features_of, FeaturesOptions(images=200), few_digits, tmp_path)
    for one, other in zip(cpu["pairs"], gpu["pairs"], strict=True):
        for key in ("cka", "penultimate", "logits", "procrustes"):
            assert apart(one[key], other[key]) < 1e-3, key
        assert apart(one["mutual_knn"], other["mutual_knn"]) < 0.02
    assert cpu["layers"] == gpu["layers"]
    assert (cpu["idle"], cpu["undefined"]) == (gpu["idle"], gpu["undefined"]) == ([], {})


def test_planes_are_seen_as_on_the_cpu(few_digits: Dataset, tmp_path: Path) -> None:
    """The same planes; of their points one in a hundred may be too near a boundary."""
    cpu, gpu = on_both(surface_of, SurfaceOptions(triplets=3, points=20), few_digits, tmp_path)
    assert cpu["planes"] == gpu["planes"]
    assert apart(cpu["outside"], gpu["outside"]) < 1e-6
    for one, other in zip(cpu["pairs"], gpu["pairs"], strict=True):
        assert abs(one["reproducibility"]["value"] - other["reproducibility"]["value"]) < 0.01


def test_answers_are_compared_as_on_the_cpu(few_digits: Dataset, tmp_path: Path) -> None:
    """Shares to 0.02, also of corrupted images; divergences to 1e-3."""
    images = few_digits.test
    found = []
    for device in (torch.device("cpu"), CUDA):
        subjects = subjects_on(device, few_digits, tmp_path)
        logits = {name: values.cpu() for name, values in subjects.logits(images.to(device)).items()}
        corruption = under_corruption(
            subjects, Compared.of(subjects.roles), AgreementOptions(quick=True, images=200)
        )
        found.append((all_pairs(logits, images.known_labels.numpy()), corruption))
    (pairs, corruption), (their_pairs, their_corruption) = found
    for one, other in zip(pairs, their_pairs, strict=True):
        assert apart(one["agreement"], other["agreement"]) < 0.02
        assert apart([one["kl"], one["jsd"]], [other["kl"], other["jsd"]]) < 1e-3
    assert apart(corruption["overall"], their_corruption["overall"]) < 0.02


def test_calibration_is_judged_as_on_the_cpu(few_digits: Dataset, tmp_path: Path) -> None:
    """Brier and NLL to 1e-3; an image may fall into the next bin, which moves ECE by no more than 0.01."""
    cpu, gpu = on_both(calibration_of, CalibrationOptions(images=200), few_digits, tmp_path)
    for name, row in cpu["models"].items():
        for key, tolerance in (("brier", 1e-3), ("nll", 1e-3), ("ece", 0.01)):
            assert apart(row["before"][key], gpu["models"][name]["before"][key]) < tolerance, (name, key)


def test_a_fleet_ends_where_single_runs_do(tmp_path: Path) -> None:
    """In bfloat16 and recorded as a graph: near, not equal."""
    from ensemble_kd.config import resolve
    from ensemble_kd.distillation import distill_with
    from ensemble_kd.runs import Run
    from ensemble_kd.schema import DistillOptions
    from ensemble_kd.setting import Objects
    from ensemble_kd.shared import Shared
    from ensemble_kd.together import distill_together

    def options(kind: str, number: int) -> DistillOptions:
        given = {"teachers": ["lenet", "resnet8"], "controls": "none", "epochs": 8, "teacher_epochs": 2}
        own = {"temperature": number + 1, "soft_weight": 0.3 * number, "seed": number % 2}
        return resolve(
            DistillOptions, {**given, **own, "device": "cuda", "out": tmp_path / f"{kind}{number}"}
        )

    shared = Shared(pictures=False)
    assert distill_together([options("fleet", number) for number in range(4)], shared) == ""
    for number in range(4):
        alone = distill_with(options("alone", number), Objects({}, shared=shared)).metrics["models"][
            "student"
        ]
        fleet = Run.open(tmp_path / f"fleet{number}").metrics()["models"]["student"]
        assert fleet["accuracy"]["value"] == pytest.approx(alone["accuracy"]["value"], abs=0.02)
        assert fleet["nll"]["value"] == pytest.approx(alone["nll"]["value"], abs=0.05)
