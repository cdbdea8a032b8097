"""Penultimate features of any network, and the loss that pulls the student's towards the teachers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from support import refused
from torch import Tensor, nn

import ensemble_kd
from ensemble_kd import distillation
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.distillation import DistillResult, distill
from ensemble_kd.errors import ModelError
from ensemble_kd.features import FeatureTap, FeatureTerm, feature_width, head_of
from ensemble_kd.fit import fit
from ensemble_kd.fresh import new_classifier
from ensemble_kd.inference import predict_with_features
from ensemble_kd.models import parse
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.resuming import resume
from ensemble_kd.runs import Run
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers import registry
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

QUICK = {"epochs": 2, "teacher_epochs": 1, "limit_train": 200}
CARD = Card("lenet", "small", Preprocess(1, (8, 8), (0.3,), (0.4,)), tuple("0123456789"))


def wrapped(net: nn.Module) -> Classifier:
    """8×8 grey images through `net`."""
    return Classifier(net, CARD)


# --- Where they come from --------------------------------------------------------------------------


def of_timm(net: nn.Module, x: Tensor) -> Tensor:
    return net.forward_head(net.forward_features(x), pre_logits=True)


NETWORKS: dict[str, tuple[int | None, int, str, Callable[[nn.Module, Tensor], Tensor]]] = {
    "lenet": (None, 84, "classifier.4", lambda net, x: net.classifier[:-1](net.features(x).flatten(1))),
    "cifar-quick": (None, 64, "classifier.1", lambda net, x: net.classifier[0](net.features(x).flatten(1))),
    "resnet8": (None, 64, "fc", lambda net, x: net.blocks(F.relu(net.bn1(net.conv1(x)))).mean((2, 3))),
    "timm:resnet10t": (32, 512, "fc", of_timm),
    "timm:mobilenetv3_small_050": (32, 1024, "classifier", of_timm),
    "timm:vit_tiny_patch16_224": (32, 192, "head", of_timm),
    "tv:squeezenet1_1": (32, 512, "classifier.1", lambda net, x: net.features(x).mean((2, 3))),
    "tv:resnet18": (32, 512, "fc", lambda net, x: nn.Sequential(*list(net.children())[:-1])(x).flatten(1)),
}
"""The side of the input, the features' width, the head's name, and the way up to the head."""


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest, few_digits: Dataset) -> tuple[str, Classifier]:
    size = NETWORKS[request.param][0]
    return request.param, new_classifier(parse(request.param), few_digits, size=size).eval()


def test_features_are_what_the_last_layer_is_given(case, few_digits):
    name, classifier = case
    _, width, head, up_to_the_head = NETWORKS[name]
    assert head_of(classifier, name) is classifier.net.get_submodule(head)
    images = few_digits.val[torch.arange(12)]
    with FeatureTap(classifier, name) as tap:
        logits, features = predict_with_features(classifier, images, tap)
    assert features.shape == (12, width)
    assert feature_width(classifier, name) == width
    with torch.no_grad():
        x = classifier.card.preprocess(images.pixels)
        torch.testing.assert_close(features, up_to_the_head(classifier.net, x).float())
        torch.testing.assert_close(logits, classifier(images.pixels))
    assert features.std(dim=0).max() > 1e-4  # they tell images apart
    layer = classifier.net.get_submodule(head)
    if isinstance(layer, nn.Linear):
        torch.testing.assert_close(layer(features), logits)


def test_looking_leaves_no_trace(case, few_digits):
    name, classifier = case
    before = classifier.fingerprint()
    for training in (True, False):
        classifier.train(training)
        feature_width(classifier, name)
        assert all(module.training is training for module in classifier.modules())
        assert hooks(classifier) == 0
    assert classifier.fingerprint() == before


def hooks(classifier: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in classifier.modules())


class Sequence(nn.Module):
    """Classifies tokens (B, 4, 16) one by one and averages their logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(len(x), 4, 16)).mean(dim=1)


def conv_head() -> nn.Module:
    """Classifies positions (B, 3, 6, 6) one by one and averages their logits."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_tokens_and_positions_are_averaged(few_digits):
    """A linear head commutes with the mean: so the mean of what it is given, through it, are the logits."""
    for net in (Sequence(), conv_head()):
        classifier = wrapped(net).eval()
        with FeatureTap(classifier, "x") as tap, torch.no_grad():
            logits = classifier(few_digits.val.pixels[:6])
            features = tap.take()
        head = head_of(classifier, "x")
        shaped = features[:, :, None, None] if isinstance(head, nn.Conv2d) else features
        assert features.ndim == 2
        torch.testing.assert_close(head(shaped).flatten(1), logits)


def test_all_batches_are_kept_in_order(digits):
    classifier = new_classifier(parse("lenet"), digits).eval()
    images = digits.train[torch.arange(1200)]
    assert len(list(images.batches(512))) == 3
    with FeatureTap(classifier, "x") as tap:
        _, features = predict_with_features(classifier, images, tap)
        _, last = predict_with_features(classifier, images[torch.arange(1190, 1200)], tap)
    assert features.shape == (1200, 84)
    torch.testing.assert_close(features[-10:], last)


def test_the_hook_is_gone_also_after_an_error(few_digits):
    classifier = new_classifier(parse("lenet"), few_digits).eval()
    with FeatureTap(classifier, "x"):
        assert hooks(classifier) == 1
    assert hooks(classifier) == 0
    with pytest.raises(ZeroDivisionError), FeatureTap(classifier, "x"):
        _ = 1 / 0
    assert hooks(classifier) == 0


NO_FEATURES = "'x' has no penultimate features"
OTHERWISE = "leave --feature-weight out, or choose another network"


class Product(nn.Module):
    """A matrix, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix


class Unused(Product):
    """With a layer that is left out of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)


class Renamed(Unused):
    """Calls a layer its classifier, as timm's networks do, and leaves it out."""

    def get_classifier(self) -> nn.Module:
        return self.layer


class Backwards(nn.Module):
    """With its head before what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 10)
        self.body = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).relu())


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (Product, "it has no linear or convolutional layer"),
        (Unused, "it has no linear or convolutional layer"),
        (Renamed, "its last layer was not part of the forward pass"),
    ],
)
def test_a_network_without_a_layer_that_runs_is_refused_and_keeps_its_mode(net, why):
    classifier = wrapped(net()).train()
    with refused(ModelError, NO_FEATURES, why, OTHERWISE):
        feature_width(classifier, "x")
    assert all(module.training for module in classifier.modules())
    assert hooks(classifier) == 0


def test_the_head_is_the_layer_that_runs_last_not_the_one_named_last():
    classifier = wrapped(Backwards())
    assert head_of(classifier, "x") is classifier.net.head
    assert feature_width(classifier, "x") == 5
    assert hooks(classifier) == 0


def test_features_are_taken_once(few_digits):
    """Those of an earlier batch are never taken for those of this one."""
    classifier = new_classifier(parse("lenet"), few_digits).eval()
    with FeatureTap(classifier, "x") as tap:
        classifier(few_digits.val.pixels[:2])
        tap.take()
        with refused(ModelError, NO_FEATURES, "its last layer was not part of the forward pass", OTHERWISE):
            tap.take()


# --- The term --------------------------------------------------------------------------------------


def reference(term: FeatureTerm, features: Tensor, wanted: list[Tensor], weights: Tensor) -> float:
    """In float64: the projected features against the teachers', each sample of theirs standardised."""
    total = 0.0
    for k, target in enumerate(wanted):
        matrix, bias = (p.detach().double().numpy() for p in term.projectors[k].parameters())
        ours = features.detach().double().numpy() @ matrix.T + bias
        theirs = target.double().numpy()
        theirs = theirs - theirs.mean(axis=1, keepdims=True)
        theirs = theirs / np.sqrt((theirs**2).mean(axis=1, keepdims=True) + 1e-5)
        for b in range(len(ours)):
            cosine = ours[b] @ theirs[b] / np.linalg.norm(ours[b]) / np.linalg.norm(theirs[b])
            gap = np.abs(ours[b] - theirs[b])
            smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            share = float(weights[k] if weights.ndim == 1 else weights[k, b])
            total += share * (1 - cosine + smooth) / len(ours)
    return term.weight * total


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("widths", [(7,), (12, 5), (3, 20, 9)])
@pytest.mark.parametrize("weight", [0.25, 2.0])
def test_the_term_equals_the_reference(widths, by_sample, weight):
    term = FeatureTerm(6, widths, weight, seed=1)
    features = torch.randn(11, 6)
    wanted = [3 * torch.randn(11, width) + 1 for width in widths]
    weights = torch.rand(len(widths), 11) if by_sample else torch.rand(len(widths))
    weights = weights / weights.sum(dim=0)
    expected = reference(term, features, wanted, weights)
    assert float(term(features, wanted, weights).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_no_weight_does_not_count():
    term = FeatureTerm(6, (4, 5), 1.0, seed=0)
    features, one, other = torch.randn(8, 6), torch.randn(8, 4), torch.randn(8, 5)
    weights = torch.tensor([1.0, 0.0])
    assert term(features, [one, other], weights).equal(term(features, [one, torch.randn(8, 5)], weights))
    assert not term(features, [one, other], weights).equal(
        term(features, [torch.randn(8, 4), other], weights)
    )


def test_a_seed_fixes_the_projectors_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (FeatureTerm(6, (4, 4), 1.0, seed) for seed in (1, 1, 2))
    assert torch.rand(3).equal(expected)
    first, second = (projector.weight for projector in one.projectors)
    assert first.equal(same.projectors[0].weight)
    assert not first.equal(other.projectors[0].weight)
    assert not first.equal(second)


def test_features_in_half_precision_are_taken():
    """As the networks give them under autocast."""
    term, features = FeatureTerm(6, (4,), 1.0, seed=0), torch.randn(8, 6)
    wanted, weights = [torch.randn(8, 4)], torch.ones(1)
    half = term(features.bfloat16(), wanted, weights)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, term(features.bfloat16().float(), wanted, weights))


def test_the_gradient_reaches_all_below_the_head_and_the_projectors(few_digits):
    student = new_classifier(parse("lenet"), few_digits).train()
    term = FeatureTerm(84, (20,), 1.0, seed=0)
    with FeatureTap(student, "the student") as tap:
        student(few_digits.train.pixels[:16])
        term(tap.take(), [torch.randn(16, 20)], torch.ones(1)).backward()
    for name, parameter in student.net.named_parameters():
        if name.startswith("classifier.4"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().max() > 0, name
    assert term.projectors[0].weight.grad.abs().max() > 0


# --- Teachers' features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(digits: Dataset) -> list[Teacher]:
    """Untrained networks of two widths, one with BatchNorm."""
    names = ("lenet", "resnet8")
    return [Teacher.of(n, new_classifier(parse(n), digits, seed=3), "here", storable=True) for n in names]


def test_a_pass_gives_logits_and_features(teachers, few_digits, own_cache):
    for teacher, width in zip(teachers, (84, 64), strict=True):
        live = teacher.look(few_digits.val, features=True)
        kept = teacher.all_outputs(few_digits.val, features=True)
        for outputs in (live, kept):
            (features,) = outputs.features
            assert features.shape == (len(few_digits.val), width)
            torch.testing.assert_close(outputs.logits, teacher.all_logits(few_digits.val))
        torch.testing.assert_close(live.features[0], kept.features[0])
        assert not teacher.look(few_digits.val).features
        assert not teacher.all_outputs(few_digits.val).features
        assert hooks(teacher.classifier) == 0


def test_kept_features_are_found_again_and_kept_logits_are_not_taken_for_them(
    teachers, few_digits, own_cache, monkeypatch
):
    teacher, images = teachers[0], few_digits.val
    teacher.all_logits(images)
    first = teacher.all_outputs(images, features=True)
    assert len(list((own_cache / "targets").iterdir())) == 2
    monkeypatch.setattr(Teacher, "_compute", lambda *_: pytest.fail("computed again"))
    again = teacher.all_outputs(images, features=True)
    assert again.features[0].equal(first.features[0])
    assert again.logits.equal(first.logits)


def test_stored_and_live_targets_carry_the_same_features(teachers, few_digits, own_cache):
    ensemble = Ensemble(teachers, torch.tensor([0.5, 0.5]), torch.tensor([4.0, 4.0]), features=True)
    viewing = Viewing("crop-flip", 2, seed=0)
    stored, live = StoredTargets(ensemble, few_digits.train, viewing), LiveTargets(ensemble)
    index, before = torch.tensor([5, 199, 0, 42]), None
    for epoch in (0, 1, 2):
        batch = viewing.take(few_digits.train, index, viewing.id_of(epoch))
        kept, now = (target(batch, index, epoch, torch.zeros(4, 10)) for target in (stored, live))
        assert [features.shape for features in kept.features] == [(4, 84), (4, 64)]
        for one, other in zip(kept.features, now.features, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # half precision
        if epoch == 1:
            assert not kept.features[0].allclose(before, atol=1e-3)  # of another view
        before = kept.features[0]


# --- Distilling ------------------------------------------------------------------------------------

MODULES = """
import torch
from timm.models import VisionTransformer
from torch import nn

def vit(num_classes, channels):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=28, patch_size=7, in_chans=channels, num_classes=num_classes,
        embed_dim=24, depth=1, num_heads=2,
    )

class Product(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(channels, num_classes))

    def forward(self, x):
        return x.mean((2, 3)) @ self.matrix

def product(num_classes, channels):
    return Product(num_classes, channels)
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`py:FILE.py`, to go before a factory's name."""
    path = tmp_path_factory.mktemp("modules") / "mine.py"
    path.write_text(MODULES)
    return f"py:{path}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, modules: str) -> DistillResult:
    """A LeNet and a transformer teach a LeNet, also by their features; tests leave the run as it is."""
    return distill(
        ["lenet", f"{modules}:vit@own"],
        "lenet",
        feature_weight=0.5,
        controls="labels,best-teacher",
        out=tmp_path_factory.mktemp("features") / "run",
        **{**QUICK, "epochs": 4},
    )


def rows(result: DistillResult, network: str) -> list[dict]:
    return [row for row in Run(result.folder).history() if row["network"] == network]


def test_the_feature_loss_falls_in_the_history(run):
    for name in ("student", "best-teacher"):
        losses = [row["train"]["feature_loss"] for row in rows(run, name)]
        assert len(losses) == 4
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.9 * losses[0]
        assert all(row["train"]["loss"] > row["train"]["feature_loss"] for row in rows(run, name))
    assert all("feature_loss" not in row["train"] for row in rows(run, "labels"))
    assert all("feature_loss" not in row["val"] for row in Run(run.folder).history())


def test_the_projectors_are_left_behind(run, few_digits):
    fresh = new_classifier(parse("lenet"), few_digits)
    for file in ("student", "controls/labels", "controls/best-teacher"):
        tensors = safetensors.torch.load_file(run.folder / f"{file}.safetensors")
        assert tensors.keys() == fresh.net.state_dict().keys()
    row = run.metrics["models"]["student"]
    assert row["parameters"] == fresh.parameter_count
    assert ensemble_kd.load_student(run.folder).fingerprint() == run.student.fingerprint()


def test_the_hooks_are_gone_from_the_student(run):
    assert hooks(run.student) == 0
    assert not run.student.training


def test_a_run_with_features_is_repeated_by_its_configuration(run, tmp_path):
    again = distill(config_file=run.folder / "config.yaml", controls="none", out=tmp_path / "again")
    assert again.student.fingerprint() == run.student.fingerprint()


def test_features_change_the_student_and_no_control_on_labels(run, tmp_path):
    config = run.folder / "config.yaml"
    plain = distill(config_file=config, feature_weight=0, controls="labels", out=tmp_path / "plain")
    assert all("feature_loss" not in row["train"] for row in Run(plain.folder).history())
    labels = "controls/labels.safetensors"
    assert (plain.folder / labels).read_bytes() == (run.folder / labels).read_bytes()
    assert plain.student.fingerprint() != run.student.fingerprint()


def test_a_stopped_run_with_features_is_resumed(run, tmp_path, monkeypatch):
    original = distillation.fit

    def stop_at_the_control(*args, **kwargs):
        if kwargs["description"] != "student":
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    config = run.folder / "config.yaml"
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "fit", stop_at_the_control)
        with pytest.raises(KeyboardInterrupt):
            distill(config_file=config, controls="best-teacher", out=tmp_path / "part")
    resumed = resume(tmp_path / "part")
    names = ("student", "best-teacher")
    assert [resumed.metrics["models"][n] for n in names] == [run.metrics["models"][n] for n in names]


def test_the_student_itself_comes_nearer_to_a_teachers_features(teachers, few_digits):
    """Also behind a projector that stays as it is, to which the fall of the loss could be owed."""
    ensemble = Ensemble(teachers[1:], torch.ones(1), torch.tensor([4.0]), features=True)
    term = FeatureTerm(84, (64,), 1.0, seed=0).requires_grad_(False)
    before = [parameter.clone() for parameter in term.parameters()]
    viewing, val = Viewing("none", 1, seed=0), few_digits.val
    history = fit(
        new_classifier(parse("lenet"), few_digits),
        few_digits.train,
        val,
        Recipe(6, 20, "adamw", 1e-3, 0.0, 0.0),
        Objective(
            0.5,
            4.0,
            StoredTargets(ensemble, few_digits.train, viewing),
            ensemble.target(ensemble.all_logits(val)),
            features=term,
        ),
        viewing,
        seed=0,
        device=torch.device("cpu"),
    )
    losses = [row["train"]["feature_loss"] for row in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert all(one.equal(other) for one, other in zip(before, term.parameters(), strict=True))


@pytest.mark.parametrize(("second", "augment"), [("{}:vit@own", "none"), ("resnet8", "crop-flip")])
def test_stored_and_live_features_train_nearly_the_same_student(tmp_path, digits, modules, second, augment):
    """Over two epochs of two views, which are the first two of fresh ones."""
    options = {"augment": augment, "controls": "none", "feature_weight": 1, "soft_weight": 0.5, **QUICK}
    live, stored = (
        distill(
            ["lenet", second.format(modules)], "lenet", views=views, out=tmp_path / f"v{views}", **options
        )
        for views in (0, 2)
    )
    with torch.no_grad():
        probabilities = [result.student(digits.test.pixels).softmax(1) for result in (live, stored)]
    assert (probabilities[0] - probabilities[1]).abs().max() < 5e-3
    for one, other in zip(rows(live, "student"), rows(stored, "student"), strict=True):
        assert one["train"]["feature_loss"] == pytest.approx(other["train"]["feature_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("student", "options"),
    [
        ("lenet", {"combine": "entropy"}),
        ("lenet", {"combine": "best"}),
        ("lenet", {"weights": [0.3, 0.7]}),
        ("cifar-quick", {"soft_schedule": "cutoff", "soft_epochs": 1}),
        ("lenet", {"soft_weight": 0}),
        ("resnet8", {"sets": ["training.ema=0.5"]}),
    ],
    ids=str,
)
def test_features_go_with(tmp_path, modules, student, options):
    result = distill(
        ["lenet", f"{modules}:vit@own"], student, feature_weight=1, controls="none", out=tmp_path / "run",
        **{**QUICK, **options},
    )  # fmt: skip
    losses = [row["train"]["feature_loss"] for row in rows(result, "student")]
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]
    assert hooks(result.student) == 0


def test_the_teachers_count_by_their_weights(tmp_path, modules):
    """Of weight 1, the first teacher's features are all there is."""
    options = {"feature_weight": 1, "controls": "none", **QUICK}
    both = distill(["lenet", f"{modules}:vit@own"], "lenet", weights=[1, 0], out=tmp_path / "both", **options)
    alone = distill(["lenet"], "lenet", out=tmp_path / "alone", **options)
    for one, other in zip(rows(both, "student"), rows(alone, "student"), strict=True):
        assert one["train"]["feature_loss"] == pytest.approx(other["train"]["feature_loss"], rel=1e-3)


def test_features_of_unlabelled_images_count(tmp_path, few_digits, monkeypatch):
    """On images without labels, with steps of no length: the loss of all of them."""
    (tmp_path / "all").mkdir()
    for number, pixels in enumerate(few_digits.val.pixels[:40]):
        Image.fromarray(pixels[0].numpy()).save(tmp_path / "all" / f"{number:02d}.png")
    teacher = load_teacher("resnet8", few_digits, training={"epochs": 1})
    result = distill(
        [teacher], "lenet", unlabelled=tmp_path / "all", unlabelled_only=True, feature_weight=3,
        controls="none", batch_size=20, lr=1e-12, augment="none", epochs=1, limit_train=200,
        sets=["training.init=default"], out=tmp_path / "run",
    )  # fmt: skip
    images = few_digits.val[torch.arange(40)]
    student = new_classifier(parse("lenet"), few_digits, seed=0).eval()
    with FeatureTap(student, "x") as tap:
        _, own = predict_with_features(student, images, tap)
    wanted = teacher.look(images, features=True).features
    expected = reference(FeatureTerm(84, (64,), 3.0, seed=0), own, wanted, torch.ones(1))
    (row,) = rows(result, "student")
    assert row["train"]["feature_loss"] == pytest.approx(expected, rel=1e-4)


# --- What is refused -------------------------------------------------------------------------------

NO_LAYER = "it has no linear or convolutional layer"


def without_features(folder: Path, modules: str, who: str) -> None:
    teacher, student = ("lenet", "product") if who == "the student" else ("product@own", "lenet")
    teacher, student = (f"{modules}:{n}" if n.startswith("product") else n for n in (teacher, student))
    distill([teacher], student, feature_weight=1, controls="none", out=folder / "run", **QUICK)


@pytest.mark.parametrize("who", ["the student", "product"])
def test_networks_without_features_are_refused(tmp_path, modules, who):
    with refused(ModelError, f"{who!r} has no penultimate features", NO_LAYER, OTHERWISE):
        without_features(tmp_path, modules, who)


@pytest.mark.parametrize("who", ["the student", "product"])
def test_networks_without_features_are_refused_before_anything_is_trained_or_written(
    tmp_path, modules, own_cache, monkeypatch, who
):
    for module, function in ((registry, "train_on_labels"), (distillation, "fit")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(ModelError):
        without_features(tmp_path, modules, who)
    assert not (tmp_path / "run").exists()


def test_networks_without_features_teach_without_them(tmp_path, modules):
    result = distill([f"{modules}:product@own"], "lenet", controls="none", out=tmp_path / "run", **QUICK)
    assert "product" in result.metrics["models"]


def test_live_teachers_are_run_once_a_batch(few_digits):
    """Finding the last layer takes a forward pass, which must not be taken for every batch."""
    teacher = load_teacher("resnet8", few_digits, training={"epochs": 1})
    passes = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: passes.append(1) if isinstance(module, Classifier) else None
    )
    teacher.look(few_digits.val, features=True)
    set_up = len(passes)
    for _ in range(3):
        teacher.look(few_digits.val, features=True)
    handle.remove()
    assert len(passes) == set_up + 3
