"""The training loop, first weights, and teachers that stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import logged, refused
from torch import Tensor, nn

from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.data.views import MIXES, POLICIES, order
from ensemble_kd.errors import ModelError, TrainingError
from ensemble_kd.fit import fit, train_on_labels
from ensemble_kd.inference import predict
from ensemble_kd.initialise import unit_variance
from ensemble_kd.losses import distillation_loss, soft_cross_entropy
from ensemble_kd.objective import Objective, TargetSource, Viewing
from ensemble_kd.stepping import Recipe, make_optimizer, warmup_cosine
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

CPU = torch.device("cpu")
CLASSES = tuple(str(digit) for digit in range(10))
RECIPE = Recipe(
    epochs=3, batch_size=40, optimizer="sgd", lr=0.05, weight_decay=5e-4, warmup_epochs=0.5, clip_norm=2.0
)
ONE_STEP = replace(RECIPE, epochs=1, batch_size=200, warmup_epochs=0.0, weight_decay=0.0, clip_norm=None)


def classifier(net: nn.Module) -> Classifier:
    """8×8 grey images through `net`."""
    return Classifier(net, Card("lenet", "small", Preprocess(1, (8, 8), (0.3,), (0.4,)), CLASSES))


def conv_net(seed: int = 0, width: int = 8) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 36, 10),
        )


def linear_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Watched(nn.Module):
    """Notes the mode and the number of images of each forward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, len(x)))
        return self.net(x)


def two_teachers(wrap: Callable[[nn.Module], nn.Module] = lambda net: net) -> Ensemble:
    """Untrained teachers; one has BatchNorm buffers away from their first values."""
    nets = [conv_net(seed=11, width=12), conv_net(seed=12)]
    nets[0][1].running_mean.uniform_(-0.5, 0.5)
    nets[0][1].running_var.uniform_(0.5, 2)
    teachers = [Teacher.of(f"t{number}", classifier(wrap(net)), "test") for number, net in enumerate(nets)]
    return Ensemble(teachers, torch.tensor([0.25, 0.75]), torch.tensor([2.0, 4.0]))


def distilling(targets: TargetSource, soft_weight: float = 0.9, val: Images | None = None) -> Objective:
    val_target = None
    if val is not None:
        ensemble = targets.ensemble
        val_target = ensemble.target(ensemble.all_logits(val))
    return Objective(soft_weight, 4.0, targets, val_target)


def run(
    model: Classifier | nn.Module,
    data: Dataset,
    objective: Objective | None = None,
    *,
    train: Images | None = None,
    recipe: Recipe = RECIPE,
    viewing: Viewing | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    model = model if isinstance(model, Classifier) else classifier(model)
    viewing = viewing or Viewing("crop", 2, seed)
    val = data.val
    if objective is not None and objective.soft_weight > 0 and objective.val_target is None:
        objective = distilling(objective.targets, objective.soft_weight, val)
    return fit(
        model, train or data.train, val, recipe, objective or Objective(), viewing, seed=seed, device=CPU
    )


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def trained(data: Dataset, **options: Any) -> dict[str, Tensor]:
    """The weights after training with `options`."""
    net = options.pop("net", conv_net)()
    run(net, data, **options)
    return weights_of(net)


def with_dropout() -> nn.Module:
    return nn.Sequential(*conv_net()[:4], nn.Dropout(0.5), conv_net()[4])


# Repeating


@pytest.mark.parametrize("net", [conv_net, with_dropout])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("init", ["default", "unit-variance"])
def test_a_seed_fixes_the_weights(
    few_digits: Dataset, net: Callable[[], nn.Module], optimizer: str, init: str
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, init=init, lr=0.01)
    first = trained(few_digits, net=net, recipe=recipe, seed=1)
    torch.manual_seed(99)  # whatever was drawn before
    assert same(first, trained(few_digits, net=net, recipe=recipe, seed=1))
    assert not same(first, trained(few_digits, net=net, recipe=recipe, seed=2))


def test_training_leaves_the_global_generator_alone(few_digits: Dataset) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(with_dropout(), few_digits, recipe=replace(RECIPE, init="unit-variance"))
    assert torch.equal(torch.rand(3), expected)


def test_train_on_labels_takes_a_fresh_view_each_epoch(few_digits: Dataset) -> None:
    first, second = classifier(conv_net()), classifier(conv_net())
    train_on_labels(first, few_digits, RECIPE, "crop", seed=3, device=CPU, description="teacher")
    run(second, few_digits, viewing=Viewing("crop", 0, 3), seed=3)
    assert same(weights_of(first), weights_of(second))


def test_views_repeat_after_their_count() -> None:
    assert [Viewing("crop", 3, 0).id_of(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [Viewing("crop", 0, 0).id_of(epoch) for epoch in range(4)] == [0, 1, 2, 3]


# Steps


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [
        (10, 4, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 7: 0.5, 10: 0.0}),
        (10, 0, {0: 1.0, 5: 0.5, 10: 0.0}),
        (8, 2, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 0.75, 6: 0.25, 8: 0.0, 9: 0.0}),
        (1, 0, {0: 1.0, 1: 0.0}),
        (2, 5, {0: 1 / 6, 1: 2 / 6}),
    ],
)
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(
    total: int, warmup: int, expected: dict[int, float]
) -> None:
    scale = warmup_cosine(total, warmup)
    assert {step: scale(step) for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_shrinks_filters_and_matrices_only(optimizer: str) -> None:
    net = conv_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(net, replace(RECIPE, optimizer=optimizer, lr=0.5, weight_decay=0.1)).step()
    shrunk = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {"0.weight", "4.weight"}
    decay = 0.5 * 0.1 * (1.9 if optimizer == "sgd" else 1)  # the first step of Nesterov momentum 0.9
    torch.testing.assert_close(net[4].weight, before["4.weight"] * (1 - decay))


def test_frozen_parameters_are_not_trained(few_digits: Dataset) -> None:
    net = conv_net()
    net[0].weight.requires_grad_(False)
    before = weights_of(net)
    run(net, few_digits)
    assert torch.equal(net[0].weight, before["0.weight"])
    assert not torch.equal(net[4].weight, before["4.weight"])


@pytest.mark.parametrize("clip_norm", [0.01, 0.1, None])
def test_clipping_bounds_the_step(few_digits: Dataset, clip_norm: float | None) -> None:
    net = linear_net()
    before = weights_of(net)
    run(net, few_digits, recipe=replace(ONE_STEP, clip_norm=clip_norm))
    squares = sum(float((now - before[name]).square().sum()) for name, now in net.state_dict().items())
    bound = ONE_STEP.lr * 1.9 * (clip_norm or 0.1)
    if clip_norm is None:
        assert squares**0.5 > 2 * bound
    else:
        assert squares**0.5 == pytest.approx(bound, rel=1e-3)


def test_the_average_of_the_weights_equals_one_by_hand(few_digits: Dataset) -> None:
    after_each_step: list[dict[str, Tensor]] = []
    net = linear_net()
    net.register_forward_pre_hook(
        lambda module, _: after_each_step.append(weights_of(module)) if module.training else None
    )
    run(net, few_digits)
    after_each_step = [*after_each_step[1:], weights_of(net)]
    assert len(after_each_step) == 3 * 5
    average = after_each_step[0]
    for now in after_each_step[1:]:
        average = {name: 0.9 * average[name] + 0.1 * now[name] for name in now}

    averaged = trained(few_digits, net=linear_net, recipe=replace(RECIPE, ema=0.9))
    assert not same(averaged, weights_of(net))
    for name, expected in average.items():
        torch.testing.assert_close(averaged[name], expected, rtol=1e-5, atol=1e-6)


def test_the_average_takes_buffers_along(few_digits: Dataset) -> None:
    plain = trained(few_digits)
    averaged = trained(few_digits, recipe=replace(RECIPE, ema=0.9))
    assert not torch.equal(averaged["1.running_mean"], plain["1.running_mean"])
    assert averaged["1.running_var"].isfinite().all()


def test_the_kept_weights_are_those_that_were_validated_last(few_digits: Dataset) -> None:
    model = classifier(conv_net())
    history = run(model, few_digits, recipe=replace(RECIPE, ema=0.9))
    right = predict(model, few_digits.val).argmax(dim=1) == few_digits.val.known_labels
    assert history[-1]["val"]["accuracy"] == pytest.approx(float(right.double().mean()))


def test_a_learning_rate_that_is_too_high_is_told(few_digits: Dataset) -> None:
    # The loss of the only step is finite; what the step leaves is not.
    with pytest.raises(TrainingError) as caught:
        run(conv_net(), few_digits, recipe=replace(ONE_STEP, lr=1e38))
    (problem,) = caught.value.problems
    assert problem.what == "training: the validation loss is not finite after epoch 1"
    assert problem.why.startswith("the learning rate 1e+38 is too high")
    assert problem.fix == "try --lr 3e+37, or --set training.clip_norm=1"


def test_so_is_one_whose_second_step_meets_no_finite_loss(few_digits: Dataset) -> None:
    with pytest.raises(TrainingError, match="the loss is not finite in epoch 1, step 2 of 5"):
        run(conv_net(), few_digits, recipe=replace(RECIPE, lr=1e30, clip_norm=None))


# Labels and history


class Unread(Tensor):
    """Labels that can be moved, indexed and asked for their shape, and nothing else."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in ("__getitem__", "to", "__get__"):
            raise AssertionError(f"the labels were read by {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_at_soft_weight_one_labels_are_not_read(few_digits: Dataset) -> None:
    images = few_digits.train
    unread = replace(images, labels=images.known_labels.as_subclass(Unread))
    objective = distilling(LiveTargets(two_teachers()), 1.0, few_digits.val)
    with_labels = trained(few_digits, objective=objective)
    assert same(with_labels, trained(few_digits, objective=objective, train=unread))
    assert same(with_labels, trained(few_digits, objective=objective, train=replace(images, labels=None)))


def test_below_soft_weight_one_labels_are_read(few_digits: Dataset) -> None:
    unread = replace(few_digits.train, labels=few_digits.train.known_labels.as_subclass(Unread))
    with pytest.raises(AssertionError, match="the labels were read"):
        run(conv_net(), few_digits, distilling(LiveTargets(two_teachers()), 0.9), train=unread)


@pytest.mark.parametrize(
    ("soft_weight", "has_targets", "in_train"),
    [
        (0.0, False, {"loss", "accuracy"}),
        (0.0, True, {"loss", "accuracy"}),  # live teachers are not run for a curve alone
        (0.5, True, {"loss", "accuracy", "teacher_student_cross_entropy"}),
        (1.0, True, {"loss", "teacher_student_cross_entropy"}),
    ],
)
def test_history_has_a_row_for_each_epoch(
    few_digits: Dataset, soft_weight: float, has_targets: bool, in_train: set[str]
) -> None:
    objective = Objective()
    if has_targets:
        objective = distilling(LiveTargets(two_teachers()), soft_weight, few_digits.val)
    rows = run(conv_net(), few_digits, objective)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 5), (2, 10), (3, 15)]
    for row in rows:
        assert set(row) == {
            "epoch", "step", "train", "val", "lr", "soft_weight", "seconds", "images_per_second",
        }  # fmt: skip
        assert set(row["train"]) == in_train
        assert set(row["val"]) == in_train | {"accuracy"} | (
            {"teacher_student_cross_entropy"} if has_targets else set()
        )
        assert 0 <= row["val"]["accuracy"] <= 1
    assert rows[-1]["train"]["loss"] < rows[0]["train"]["loss"]
    # Half an epoch of five steps is two of warm-up: the first step takes a third of the highest rate.
    assert rows[0]["lr"] == pytest.approx(RECIPE.lr / 3)


def test_validation_measures_the_training_loss_without_smoothing(few_digits: Dataset) -> None:
    ensemble, model = two_teachers(), classifier(conv_net())
    val, recipe = few_digits.val, replace(RECIPE, label_smoothing=0.3)
    target = ensemble.target(ensemble.all_logits(val))
    rows = run(model, few_digits, distilling(LiveTargets(ensemble), 0.5), recipe=recipe)
    logits = predict(model, val)
    loss = distillation_loss(logits, val.labels, target.soft, soft_weight=0.5, temperature=4.0)
    assert rows[-1]["val"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    expected = float(soft_cross_entropy(logits, target.plain))
    assert rows[-1]["val"]["teacher_student_cross_entropy"] == pytest.approx(expected, rel=1e-5)


def test_the_first_losses_equal_those_by_hand(few_digits: Dataset) -> None:
    ensemble, model = two_teachers(), classifier(linear_net())
    index = order(7, 0, 200)
    batch = Viewing("crop-flip", 0, 7).take(few_digits.train, index, 0)
    logits, target = predict(model, batch), ensemble.target(ensemble.all_logits(batch))
    loss = distillation_loss(logits, batch.labels, target.soft, soft_weight=0.9, temperature=4.0)
    rows = run(
        model,
        few_digits,
        distilling(LiveTargets(ensemble)),
        recipe=ONE_STEP,
        viewing=Viewing("crop-flip", 0, 7),
        seed=7,
    )
    right = (logits.argmax(dim=1) == batch.labels).float().mean()
    assert rows[0]["train"] == pytest.approx(
        {
            "loss": float(loss),
            "accuracy": float(right),
            "teacher_student_cross_entropy": float(soft_cross_entropy(logits, target.plain)),
        },
        rel=1e-5,
    )


def test_each_epoch_goes_through_the_images_in_its_hashed_order(few_digits: Dataset) -> None:
    model, seen = classifier(conv_net()), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs) if module.training else None)
    run(model, few_digits, viewing=Viewing("none", 1, 0), recipe=replace(RECIPE, epochs=2), seed=6)
    expected = torch.cat([order(6, epoch, 200) for epoch in (0, 1)])
    assert torch.equal(torch.cat([pixels for (pixels,) in seen]), few_digits.train.pixels[expected])


def test_an_incomplete_last_batch_is_left_out(few_digits: Dataset) -> None:
    student = Watched(conv_net())
    run(student, few_digits, recipe=replace(RECIPE, epochs=1, batch_size=90))
    assert [images for training, images in student.seen if training] == [90, 90]


# Modes and gradients


def test_the_student_trains_in_train_mode_in_every_epoch(few_digits: Dataset) -> None:
    student = Watched(conv_net())
    model = classifier(student)
    run(model, few_digits, distilling(LiveTargets(two_teachers())))
    an_epoch = [(True, 40)] * 5 + [(False, len(few_digits.val))]
    assert student.seen == an_epoch * 3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("soft_weight", [0.0, 0.5, 1.0])
def test_every_parameter_of_the_student_gets_a_gradient(few_digits: Dataset, soft_weight: float) -> None:
    net = conv_net()
    run(net, few_digits, distilling(LiveTargets(two_teachers()), soft_weight), recipe=ONE_STEP)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("live", [True, False])
def test_teachers_stay_in_eval_mode_and_as_they_were(few_digits: Dataset, live: bool) -> None:
    ensemble, viewing = two_teachers(Watched), Viewing("crop", 2, 0)
    for teacher in ensemble.teachers:
        teacher.classifier.net.seen.clear()
    before = [weights_of(teacher.classifier) for teacher in ensemble.teachers]
    targets = LiveTargets(ensemble) if live else StoredTargets(ensemble, few_digits.train, viewing)
    run(conv_net(), few_digits, distilling(targets), viewing=viewing)
    for teacher, tensors in zip(ensemble.teachers, before, strict=True):
        seen = teacher.classifier.net.seen
        assert seen
        assert not any(training for training, _ in seen)
        assert same(tensors, weights_of(teacher.classifier))
        assert teacher.check_unchanged() == teacher.fingerprint
        assert all(p.grad is None and not p.requires_grad for p in teacher.classifier.parameters())


# Stored and live targets


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("policy", POLICIES)
def test_stored_targets_are_the_live_ones(few_digits: Dataset, policy: str, mix: str) -> None:
    ensemble, viewing = two_teachers(), Viewing(policy, 3, 4, mix)
    stored, live = StoredTargets(ensemble, few_digits.train, viewing), LiveTargets(ensemble)
    for view_id in (2, 0):
        for index in order(1, view_id, 200).split(32):
            batch = viewing.take(few_digits.train, index, view_id)
            from_store, fresh = (source(batch, index, view_id, None) for source in (stored, live))
            torch.testing.assert_close(from_store.soft.exp(), fresh.soft.exp(), rtol=0, atol=2e-3)
            torch.testing.assert_close(from_store.plain.exp(), fresh.plain.exp(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("policy", ["none", "crop", "crop-flip"])
def test_training_from_stored_and_live_targets_is_the_same(few_digits: Dataset, policy: str) -> None:
    ensemble, viewing = two_teachers(), Viewing(policy, 2, 4)
    stored = StoredTargets(ensemble, few_digits.train, viewing)
    histories = [
        run(linear_net(), few_digits, distilling(targets), viewing=viewing)
        for targets in (stored, LiveTargets(ensemble))
    ]
    for from_store, fresh in zip(*histories, strict=True):
        assert from_store["train"] == pytest.approx(fresh["train"], rel=1e-3)
        assert from_store["val"] == pytest.approx(fresh["val"], rel=1e-3)


def test_stored_views_differ_from_each_other(few_digits: Dataset) -> None:
    stored = StoredTargets(two_teachers(), few_digits.train, Viewing("crop", 2, 0))
    index = torch.arange(40)
    first, second = (stored(few_digits.train[index], index, view_id, None) for view_id in (0, 1))
    assert float((first.soft - second.soft).abs().max()) > 0.01


def test_each_teacher_sees_each_stored_view_of_each_image_once(few_digits: Dataset) -> None:
    ensemble, viewing = two_teachers(Watched), Viewing("crop", 3, 0)
    stored = StoredTargets(ensemble, few_digits.train, viewing)
    objective = distilling(stored, val=few_digits.val)
    for teacher in ensemble.teachers:
        teacher.classifier.net.seen.clear()
    run(conv_net(), few_digits, objective, recipe=replace(RECIPE, epochs=7), viewing=viewing)
    for teacher in ensemble.teachers:
        assert sum(images for _, images in teacher.classifier.net.seen) == 3 * 200
    assert [store.views for store in stored.stores] == [3, 3]


def outputs_and_passes(teacher: Teacher, images: Images) -> tuple[Tensor, int]:
    """The teacher's outputs, and how many images ran through it for them."""
    teacher.classifier.net.seen.clear()
    logits = teacher.all_logits(images)
    return logits, sum(images for _, images in teacher.classifier.net.seen)


def test_kept_outputs_are_found_again_by_all_that_they_depend_on(
    few_digits: Dataset, own_cache: Path
) -> None:
    def teacher(seed: int = 0, storable: bool = True) -> Teacher:
        return Teacher.of("t", classifier(Watched(conv_net(seed))), "test", storable)

    train = few_digits.train
    made, passes = outputs_and_passes(teacher(), train)
    assert passes == 200
    again, passes = outputs_and_passes(teacher(), train)
    assert passes == 0
    assert torch.equal(again, made)
    others = [
        (teacher(seed=1), train),
        (teacher(storable=False), train),
        (teacher(), train[torch.arange(199, -1, -1)]),
        (teacher(), few_digits.val),
    ]
    for other, images in others:
        assert outputs_and_passes(other, images)[1] == len(images)
    kept = sorted((own_cache / "targets").glob("*/logits.bin"))
    assert len(kept) == len(others)  # all but that which must not be kept, and the first
    for file in kept:
        file.write_bytes(file.read_bytes()[:-5])
    with logged() as lines:
        again, passes = outputs_and_passes(teacher(), train)
    assert passes == 200
    assert torch.equal(again, made)
    assert len(lines) == 1
    assert "damaged" in lines[0]


# Teachers


def test_a_teacher_with_nan_outputs_is_named(few_digits: Dataset) -> None:
    good, bad = conv_net(), conv_net()
    with torch.no_grad():
        bad[4].weight[3, 5] = float("nan")
    teachers = [Teacher.of("good", classifier(good), ""), Teacher.of("resnet18#2", classifier(bad), "")]
    ensemble = Ensemble(teachers, torch.tensor([0.5, 0.5]), torch.ones(2))
    with refused(
        ModelError,
        "teacher 'resnet18#2' gives NaN or infinite outputs",
        "its weights are damaged, or its input is not what it was trained on",
        "check it with `ekd evaluate`, or leave it out",
    ):
        ensemble.all_logits(few_digits.val)


def test_logits_are_stacked_by_teacher_in_the_order_of_the_images(few_digits: Dataset) -> None:
    ensemble = two_teachers()
    logits = ensemble.all_logits(few_digits.train)
    assert logits.shape == (2, 200, 10)
    for teacher, ours in zip(ensemble.teachers, logits, strict=True):
        with torch.no_grad():
            expected = teacher.classifier(few_digits.train.pixels)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval mode too."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.net = linear_net()
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@pytest.mark.parametrize("persistent", [True, False])
def test_a_teacher_that_changes_its_own_buffer_is_refused(few_digits: Dataset, persistent: bool) -> None:
    teacher = Teacher.of("mine", classifier(Counting(persistent)), "test")
    assert teacher.check_unchanged() == teacher.fingerprint
    teacher.all_logits(few_digits.val)
    with refused(
        ModelError,
        "teacher 'mine' changed while it taught",
        "its parameters or buffers have another hash than when it was loaded",
        "a module of your own that writes to its buffers in eval mode cannot be a teacher",
    ):
        teacher.check_unchanged()


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.num_batches_tracked", "4.bias"])
def test_any_changed_tensor_changes_the_fingerprint(name: str) -> None:
    teacher = Teacher.of("t", classifier(conv_net()), "test")
    teacher.classifier.net.state_dict()[name].add_(1)
    with pytest.raises(ModelError, match="changed while it taught"):
        teacher.check_unchanged()


# First weights


def stack(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 40, bias=bias),
        nn.ReLU(),
        nn.Linear(40, 10, bias=bias),
    )


def outputs_by_layer(net: nn.Sequential, inputs: Tensor) -> list[Tensor]:
    """What each convolution and linear layer gives, as (values, channels)."""
    found: list[Tensor] = []
    x = inputs
    with torch.no_grad():
        for layer in net:
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                found.append(x.transpose(0, 1).flatten(1).T if x.ndim == 4 else x)
    return found


def means_and_stds(outputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(values.mean(dim=0), values.std(dim=0)) for values in outputs]


def test_first_weights_give_each_channel_its_mean_and_spread(few_digits: Dataset) -> None:
    inputs, net = few_digits.train.pixels[:128] / 255, stack()
    unit_variance(net, inputs)
    *inner, head = means_and_stds(outputs_by_layer(net, inputs))
    assert len(inner) == 4
    for mean, std in inner:
        torch.testing.assert_close(mean, torch.full_like(mean, 0.5), rtol=0, atol=1e-3)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-3)
    torch.testing.assert_close(head[0], torch.zeros(10), rtol=0, atol=1e-4)
    torch.testing.assert_close(head[1], torch.full((10,), 0.1), rtol=0, atol=1e-4)


def test_first_weights_without_biases_keep_the_spread(few_digits: Dataset) -> None:
    inputs, net = few_digits.train.pixels[:128] / 255, stack(bias=False)
    unit_variance(net, inputs)
    *inner, head = means_and_stds(outputs_by_layer(net, inputs))
    for _, std in inner:
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-3)
    torch.testing.assert_close(head[1], torch.full((10,), 0.1), rtol=0, atol=1e-4)


def test_a_channel_that_hardly_varies_is_not_blown_up() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    inputs = torch.ones(64, 2, 4, 4)  # every channel is constant
    unit_variance(net, inputs)
    assert all(p.isfinite().all() for p in net.parameters())
    assert net(inputs).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_first_weights_leave_mode_and_hooks_as_they_were(few_digits: Dataset, training: bool) -> None:
    net = stack().train(training)
    unit_variance(net, few_digits.train.pixels[:64] / 255)
    assert all(module.training == training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    copied = copy.deepcopy(net)
    net(torch.rand(64, 1, 8, 8))
    assert same(weights_of(net), weights_of(copied))
