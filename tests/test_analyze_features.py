"""Layers of any network in one pass, and the analysis of a run against its stored predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from support import logged, refused, unexplained
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from ensemble_kd.analysis import features as features_module
from ensemble_kd.analysis.cka import centred_gram, debiased_cka, u_centred
from ensemble_kd.analysis.features import FeatureAnalysis, analyze_features, compare, features_of
from ensemble_kd.analysis.layers import examine, reduce
from ensemble_kd.analysis.options import FeaturesOptions
from ensemble_kd.analysis.plots_features import draw_features
from ensemble_kd.analysis.similarity import procrustes
from ensemble_kd.analysis.subjects import Subjects
from ensemble_kd.analysis.taps import Seen, look, taken
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.cli import app
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.distillation import DistillResult
from ensemble_kd.errors import ConfigError, ModelError
from ensemble_kd.files import to_json
from ensemble_kd.students import STUDENTS
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.weighting import entropy_weights

CLASSES = tuple("0123456789")


def classifier(net: nn.Module, size: int = 16, channels: int = 3) -> Classifier:
    """Any network, behind a preprocessing that only brings grey levels to [0, 1]."""
    preprocess = Preprocess(channels, (size, size), (0.0,) * channels, (1.0,) * channels)
    return Classifier(net, Card("mine", "stock", preprocess, CLASSES))


def some_images(count: int = 48, size: int = 16, channels: int = 3) -> Images:
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, torch.arange(count))


class Small(nn.Module):
    """Convolution, normalisation and an in-place ReLU that is used twice; a linear layer without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 10)
        nn.init.normal_(self.bn1.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        return self.fc(x.mean(dim=(2, 3)))


def cka_of(seen: Seen, first: tuple[str, str], second: tuple[str, str]) -> float:
    return float(seen.moments.cka()[seen.at(*first)[0], seen.at(*second)[0]])


# Which layers there are


def own(name: str) -> Callable[[], nn.Module]:
    return lambda: STUDENTS[name](10, 3, 32)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "lenet": (own("lenet"), 32, ["features.2", "features.5", "classifier.1"]),
    "resnet8": (own("resnet8"), 32, ["bn1", "blocks.0", "blocks.1", "blocks.2"]),
    "cifar-quick": (own("cifar-quick"), 32, ["features.2", "features.5", "features.8"]),
    "timm resnet": (
        lambda: timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=10),
        48,
        ["maxpool", "layer1", "layer2", "layer3", "layer4"],
    ),
    "torchvision resnet": (
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
        48,
        ["maxpool", "layer1", "layer2", "layer3", "layer4"],
    ),
    "timm vit": (
        lambda: timm.models.VisionTransformer(16, 8, embed_dim=16, depth=3, num_heads=2, num_classes=10),
        16,
        ["pos_drop", "blocks.0", "blocks.1", "blocks.2"],
    ),
    "torchvision vit": (
        lambda: VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=10),
        16,
        ["encoder.dropout", *(f"encoder.layers.encoder_layer_{k}" for k in range(3))],
    ),
    "torchvision swin": (
        lambda: SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=10),
        16,
        ["features.0", "features.1", "features.2", "features.3"],
    ),
    "wrapped": (
        lambda: nn.Sequential(nn.Identity(), STUDENTS["resnet8"](10, 3, 32)),
        32,
        ["1.bn1", "1.blocks.0", "1.blocks.1", "1.blocks.2"],
    ),
    "own module": (Small, 16, ["relu@1", "relu@2"]),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), 16, []),
    "deep": (
        lambda: nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(50)), nn.Flatten(), nn.Linear(768, 10)),
        16,
        [str(k) for k in np.linspace(0, 48, 24).round().astype(int)],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_blocks_or_layers_are_taken_in_the_order_of_execution(name: str) -> None:
    build, size, expected = ARCHITECTURES[name]
    images = some_images(20, size)
    seen = look({"net": classifier(build(), size)}, images)
    assert seen.layers["net"] == [*expected, "penultimate", "logits"]
    assert len(seen.moments.hsic) == len(expected) + 2


def test_patterns_name_layers_of_any_depth() -> None:
    nets = {"a": classifier(Small()), "b": classifier(STUDENTS["resnet8"](10, 3, 32), 32)}
    seen = look(nets, some_images(), ["*bn1", "relu", "logits"])
    assert seen.layers["a"] == ["bn1", "relu@1", "relu@2", "penultimate", "logits"]
    assert seen.layers["b"] == [
        "bn1", "blocks.0.bn1", "blocks.1.bn1", "blocks.2.bn1", "penultimate", "logits",
    ]  # fmt: skip
    assert look(nets, some_images(), ["relu@2"]).layers["a"] == ["relu@2", "penultimate", "logits"]


def test_a_pattern_without_a_layer_is_refused() -> None:
    with refused(
        ConfigError,
        "layers: 'bm1' matches no layer of any model",
        "those of net are conv1, bn1, relu@1, conv2, relu@2, fc",
        "did you mean 'bn1'?",
    ):
        look({"net": classifier(Small())}, some_images(), ["relu", "bm1"])
    with refused(
        ConfigError,
        "layers: 'stage9?' matches no layer of any model",
        "those of net are conv1, bn1, relu@1, conv2, relu@2, fc",
        "give shell patterns such as 'layer?' or '*.conv1'",
    ):
        look({"net": classifier(Small())}, some_images(), ["stage9?"])


def test_a_network_without_a_last_layer_is_refused() -> None:
    with refused(
        ModelError,
        "'net' has no penultimate layer",
        "it has no linear or convolutional layer",
        "compare other networks",
    ):
        look({"net": classifier(nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10)))}, some_images())


class Fickle(Small):
    """Runs a layer for its first images only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)) if len(x) < 10 else self.conv1(x)
        return self.fc(x.mean(dim=(2, 3)))


def test_a_layer_that_does_not_always_run_is_refused() -> None:
    net = classifier(Fickle())
    with refused(
        ModelError,
        "'net' did not run its layer 'bn1'",
        "it ran for other images, so the network takes another way for each",
        "name layers that always run: --layers",
    ):
        look({"net": net}, some_images(), ["bn1"])
    assert not any(module._forward_hooks for module in net.modules())


# What is taken in


def test_an_in_place_activation_changes_nothing_of_the_layer_before_it() -> None:
    net, images = Small().eval(), some_images(64)
    seen = look({"net": classifier(net)}, images, ["bn1", "relu"], batch=64)
    with torch.no_grad():
        bn1 = net.bn1(net.conv1(images.decoded / 255))
        relu = F.relu(bn1)
    expected = debiased_cka(bn1.flatten(1), relu.flatten(1))
    assert cka_of(seen, ("net", "bn1"), ("net", "relu@1")) == pytest.approx(expected, abs=1e-5)
    assert expected < 0.97


@pytest.mark.parametrize("count", [48, 65])
def test_a_model_and_its_copy_are_the_same(count: int) -> None:
    net = Small()
    copy = Small()
    copy.load_state_dict(net.state_dict())
    seen = look({"a": classifier(net), "b": classifier(copy)}, some_images(count), ["*"], batch=24)
    block = seen.moments.cka()[np.ix_(seen.at("a"), seen.at("b"))]
    np.testing.assert_allclose(np.diag(block), 1, atol=1e-12)
    np.testing.assert_allclose(block, block.T, atol=1e-12)
    assert torch.equal(seen.features["a"], seen.features["b"])


def test_the_same_network_under_two_names() -> None:
    net = classifier(Small())
    seen = look({"a": net, "b": net}, some_images(), ["*"], batch=24)
    np.testing.assert_allclose(np.diag(seen.moments.cka()[np.ix_(seen.at("a"), seen.at("b"))]), 1, atol=1e-12)


def test_penultimate_and_logits_are_what_the_network_gives() -> None:
    net, images = Small().eval(), some_images()
    seen = look({"net": classifier(net)}, images, batch=48)
    with torch.no_grad():
        x = images.decoded / 255
        features = F.relu(net.conv2(F.relu(net.bn1(net.conv1(x))))).mean(dim=(2, 3))
        logits = net.fc(features)
    torch.testing.assert_close(seen.features["net"], features)
    found = cka_of(seen, ("net", "penultimate"), ("net", "logits"))
    assert found == pytest.approx(debiased_cka(features, logits), abs=1e-5)


def test_the_order_of_the_images_within_a_batch_changes_nothing() -> None:
    net, images = classifier(Small()), some_images()
    one, other = (
        look({"net": net}, images[order], batch=48) for order in (torch.arange(48), torch.randperm(48))
    )
    np.testing.assert_allclose(one.moments.cka(), other.moments.cka(), atol=1e-5)


def test_networks_are_left_as_they_were() -> None:
    net = classifier(Small()).train()
    net.net.bn1.eval()
    before = net.fingerprint()
    look({"net": net}, some_images(), ["*"])
    with pytest.raises(ConfigError):
        look({"net": net}, some_images(), ["nothing"])
    with pytest.raises(RuntimeError):  # of the network itself, while it is looked at
        look({"net": net, "broken": classifier(nn.Linear(3, 10))}, some_images())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in net.modules()]
    assert not any(hooks)
    assert [name for name, module in net.named_modules() if not module.training] == ["net.bn1"]
    assert net.fingerprint() == before


def test_neither_autocast_nor_tf32_is_let_in() -> None:
    net, images = classifier(Small()), some_images()
    exact = look({"net": net}, images).moments
    asked: list[tuple[str, str]] = []
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]

    def ask(*_: Any) -> None:
        asked.append((convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision))

    before = torch.get_float32_matmul_precision()
    hook = net.net.conv1.register_forward_hook(ask)
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            found = look({"net": net}, images).moments
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        hook.remove()
    np.testing.assert_array_equal(found.terms, exact.terms)
    assert set(asked) == {("ieee", "ieee")}
    assert convolutions.fp32_precision == "tf32"


def test_how_positions_are_pooled() -> None:
    maps, tokens = torch.randn(2, 5, 4, 4), torch.randn(2, 7, 5)
    assert torch.equal(reduce(maps, "flatten"), maps.flatten(1))
    assert torch.equal(reduce(maps, "gap"), maps.mean(dim=(2, 3)))
    assert torch.equal(reduce(maps, "cls"), maps.mean(dim=(2, 3)))
    last = maps.permute(0, 2, 3, 1)
    assert torch.equal(reduce(last, "gap"), last.mean(dim=(1, 2)))
    assert torch.equal(reduce(tokens, "flatten"), tokens.flatten(1))
    assert torch.equal(reduce(tokens, "gap"), tokens.mean(dim=1))
    assert torch.equal(reduce(tokens, "cls"), tokens[:, 0])
    assert torch.equal(reduce(tokens[:, 0], "gap"), tokens[:, 0])


def test_the_pool_is_that_of_all_layers() -> None:
    net, images = Small().eval(), some_images()
    with torch.no_grad():
        conv1 = net.conv1(images.decoded / 255)
        relu = F.relu(net.bn1(conv1))
    for pool, shape in {"flatten": lambda x: x.flatten(1), "gap": lambda x: x.mean(dim=(2, 3))}.items():
        seen = look({"net": classifier(net)}, images, ["conv1", "relu@1"], pool)
        expected = debiased_cka(shape(conv1), shape(relu))
        assert cka_of(seen, ("net", "conv1"), ("net", "relu@1")) == pytest.approx(expected, abs=1e-5)


class Maps(nn.Module):
    """A network whose last layer is a convolution over a map, as SqueezeNet's is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv(x))).mean(dim=(2, 3))


@pytest.mark.parametrize(("pool", "width"), [("flatten", 6 * 12 * 12), ("gap", 6), ("cls", 6)])
def test_the_pool_is_that_of_the_penultimate_layer(pool: str, width: int) -> None:
    net, images = Maps().eval(), some_images()
    seen = look({"net": classifier(net)}, images, ["conv"], pool)
    with torch.no_grad():
        maps, logits = F.relu(net.conv(images.decoded / 255)), net(images.decoded / 255)
    expected = maps.flatten(1) if pool == "flatten" else maps.mean(dim=(2, 3))
    assert seen.features["net"].shape == (48, width)
    torch.testing.assert_close(seen.features["net"], expected)
    found = cka_of(seen, ("net", "penultimate"), ("net", "logits"))
    assert found == pytest.approx(debiased_cka(expected, logits), abs=1e-5)


@pytest.mark.parametrize("count", [3, 15])
def test_a_pass_over_too_few_images_is_refused(count: int) -> None:
    with refused(
        ConfigError,
        f"{count} images are too few to compare layers on",
        "batches are of 16 or more",
        "take more images",
    ):
        look({"net": classifier(Small())}, some_images(count))


@pytest.mark.parametrize(("count", "batch", "kept"), [(48, 24, 48), (51, 24, 48), (64, 24, 64), (20, 64, 20)])
def test_a_last_batch_that_is_too_small_is_left_out_of_the_pass(count: int, batch: int, kept: int) -> None:
    with logged() as lines:
        seen = look({"net": classifier(Small())}, some_images(count), batch=batch)
    assert (taken(count, batch), len(seen), seen.moments.sizes.sum()) == (kept, kept, kept)
    assert bool(lines) == (kept < count)


# The numbers of a pair


def test_procrustes_of_wide_layers_is_of_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "MOST_ROTATED", 7)
    nets = {"a": classifier(Small()), "b": classifier(Small())}
    seen = look(nets, some_images())
    numbers = compare(seen, {"a": "model", "b": "model"}, neighbours=5, seed=0)
    assert numbers["procrustes"] == {
        "images": 7,
        "reason": "one network has 8 penultimate features, and time grows with the cube of both; neighbours are of all 48 images",
    }
    a, b = (seen.features[name][:7] for name in nets)
    assert numbers["pairs"][0]["procrustes"]["value"] == pytest.approx(procrustes(a, b), abs=1e-12)
    monkeypatch.setattr(features_module, "MOST_ROTATED", 8)
    assert compare(seen, {"a": "model", "b": "model"}, 5, 0)["procrustes"] == {"images": 48}


def test_teachers_without_weight_are_in_no_mean() -> None:
    nets = {name: classifier(Small()) for name in ("student", "labels", "a", "b", "c")}
    roles = {"student": "student", "labels": "control", "a": "teacher", "b": "teacher", "c": "teacher"}
    numbers = compare(look(nets, some_images()), roles, 5, 0, idle=["b"])
    assert numbers["idle"] == ["b"]
    found = numbers["gains"]["labels"]
    assert list(found["teachers"]) == ["a", "b", "c"]
    for key, own in found["mean"].items():
        values = [found["teachers"][name][key]["value"] for name in ("a", "c")]
        assert own["value"] == pytest.approx(np.mean(values), abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "varies", "idle"),
    [((0.0, 1.0), False, ["a"]), ((0.5, 0.5), False, []), ((0.0, 1.0), True, [])],
)
def test_who_has_no_weight(
    weights: tuple[float, float], varies: bool, idle: list[str], digits: Dataset
) -> None:
    taught = [Teacher.of(name, classifier(linear(), 8, 1), "here") for name in ("a", "b")]
    ensemble = Ensemble(
        taught, torch.tensor(weights), torch.ones(2), weigh=entropy_weights if varies else None
    )
    assert Subjects("mine", Path(), digits, {}, ensemble).idle == idle


def test_what_does_not_vary_has_a_reason(tmp_path: Path) -> None:
    dead, broken, lost = Small(), Small(), Small()
    nn.init.zeros_(dead.conv2.weight)
    nn.init.constant_(broken.fc.bias, torch.nan)
    nn.init.constant_(lost.conv2.bias, torch.inf)
    nets = {"student": Small(), "a": dead, "b": broken, "c": lost}
    seen = look({name: classifier(net) for name, net in nets.items()}, some_images())
    roles = {"student": "student", "a": "control", "b": "teacher", "c": "teacher"}
    numbers = compare(seen, roles, neighbours=5, seed=0)
    same, infinite = "it is the same for all images", "it gave values that are not finite"
    assert numbers["undefined"] == {
        "a": {"relu@2": same, "penultimate": same, "logits": same},
        "b": {"logits": infinite},
        "c": {"conv2": infinite, "penultimate": infinite, "logits": infinite},
    }
    student_a, student_b, student_c, *_ = numbers["pairs"]
    assert student_a["penultimate"]["reason"] == f"penultimate of a has none: {same}"
    assert student_a["mutual_knn"]["reason"] == f"penultimate of a has none: {same}"
    assert student_b["logits"]["reason"] == f"logits of b has none: {infinite}"
    assert student_c["procrustes"] == pytest.approx(
        {"value": np.nan, "chance": np.nan, "reason": f"penultimate of c has none: {infinite}"}, nan_ok=True
    )
    assert student_a["best"]["second"][-1] == pytest.approx(
        {"layer": "logits", "match": "", "cka": np.nan, "reason": same}, nan_ok=True
    )
    known = json.loads(to_json(numbers))
    assert known["pairs"][0]["cka"][0][-1] is None
    assert unexplained(known) == []
    assert unexplained({**known, "undefined": {}})
    assert np.isfinite(student_a["matches"]["value"])
    gain = numbers["gains"]["a"]["mean"]
    assert gain["penultimate"]["reason"] == f"penultimate of a has none: {same}"
    assert np.isfinite(gain["matches"]["low"])
    numbers |= {"roles": roles, "data": "mine", "n": 48}
    numbers["settings"] = {"batch": 48, "pool": "flatten", "neighbours": 5}
    table = FeatureAnalysis(tmp_path, numbers).table()
    assert (
        f"a, layer relu@2 {same} a, layer penultimate {same} a, layer logits {same} b, layer logits {infinite}"
        in " ".join(table.split())
    )
    shown = f"{student_b['penultimate']['value']:.2f}"
    assert draw_features(numbers, tmp_path)["teachers"]["alt"].endswith(f"CKA is {shown}.")


NAMES = ["student", "<script>alert(1)</script>", "[/b] x$\\frac$", "类别" * 100]


def test_hostile_names_stand_in_tables_and_pictures_as_they_are(tmp_path: Path) -> None:
    nets = {name: classifier(Small()) for name in NAMES}
    roles = dict(zip(NAMES, ("student", "control", "teacher", "teacher"), strict=True))
    numbers = compare(look(nets, some_images()), roles, 5, 0)
    numbers |= {"roles": roles, "data": "[/b]", "n": 48}
    numbers["settings"] = {"batch": 48, "pool": "gap", "neighbours": 5}
    table = FeatureAnalysis(tmp_path, numbers).table()
    for name in NAMES:
        assert name in table
    pictures = draw_features(numbers, tmp_path)
    assert list(pictures) == ["teachers", "controls", "self", "between", "gains"]
    for row in pictures.values():
        with Image.open(tmp_path / row["file"]) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert max(picture.size) < 3000


# The analysis of a run


@pytest.fixture(scope="module")
def analyzed(finished: DistillResult, tmp_path_factory: pytest.TempPathFactory) -> FeatureAnalysis:
    return analyze_features(finished.folder, out=tmp_path_factory.mktemp("features"), seed=3)


def test_logits_are_those_of_the_runs_predictions(finished: DistillResult, analyzed: FeatureAnalysis) -> None:
    tensors = safetensors.torch.load_file(finished.folder / "predictions.safetensors")
    order = torch.randperm(360, generator=torch.Generator().manual_seed(3))
    for pair in analyzed.numbers["pairs"]:
        sides = [tensors[f"logits/{pair[side]}"][order].double() for side in ("first", "second")]
        sums = torch.zeros(2, 2, dtype=torch.float64)
        for batch in (slice(0, 256), slice(256, 360)):
            flat = u_centred(torch.stack([centred_gram(side[batch]) for side in sides])).flatten(1)
            sums += flat @ flat.T / (len(sides[0][batch]) - 3)
        expected = sums[0, 1] / (sums[0, 0] * sums[1, 1]).sqrt()
        assert pair["logits"]["value"] == pytest.approx(float(expected), abs=1e-5)
        assert pair["cka"][-1][-1] == pytest.approx(pair["logits"]["value"], abs=1e-12)


def test_the_file_holds_the_numbers(finished: DistillResult, analyzed: FeatureAnalysis) -> None:
    numbers = json.loads((analyzed.folder / "features.json").read_text())
    assert numbers == analyzed.numbers
    assert {key: numbers[key] for key in ("source", "data", "n")} == {
        "source": str(finished.folder), "data": "digits", "n": 360,
    }  # fmt: skip
    assert numbers["settings"] == {
        "quick": False, "seed": 3, "layers": [], "pool": "flatten", "neighbours": 10, "images": 2000, "batch": 256,
    }  # fmt: skip
    lenet, resnet8 = ([*ARCHITECTURES[name][2], "penultimate", "logits"] for name in ("lenet", "resnet8"))
    names = ["student", "labels", "best-teacher", "independent", "lenet", "resnet8"]
    assert numbers["layers"] == {name: resnet8 if name == "resnet8" else lenet for name in names}
    assert numbers["undefined"] == {}
    assert numbers["chance"] == {"mutual_knn": 10 / 359}
    assert [(p["first"], p["second"]) for p in numbers["pairs"]] == list(combinations(names, 2))
    for name in names:
        square = np.array(numbers["self"][name])
        np.testing.assert_allclose(square, square.T, atol=1e-12)
        np.testing.assert_allclose(np.diag(square), 1, atol=1e-12)


def test_every_pair_is_told_from_its_matrix(analyzed: FeatureAnalysis) -> None:
    layers = analyzed.numbers["layers"]
    for pair in analyzed.numbers["pairs"]:
        block = np.array(pair["cka"])
        first, second = (layers[pair[side]] for side in ("first", "second"))
        assert block.shape == (len(first), len(second))
        assert pair["penultimate"]["value"] == pytest.approx(block[-2, -2], abs=1e-12)
        assert pair["matches"]["value"] == pytest.approx(block.max(axis=1).mean(), abs=1e-12)
        for side, values, own, other in (("first", block, first, second), ("second", block.T, second, first)):
            assert [row["layer"] for row in pair["best"][side]] == own
            assert [row["match"] for row in pair["best"][side]] == [other[k] for k in values.argmax(axis=1)]
            np.testing.assert_allclose([row["cka"] for row in pair["best"][side]], values.max(axis=1))
        for key in ("penultimate", "logits", "matches", "mutual_knn"):
            assert pair[key]["low"] < pair[key]["value"] < pair[key]["high"]
            assert pair[key]["high"] - pair[key]["low"] < 0.25
        assert 0 < pair["procrustes"]["chance"] < pair["procrustes"]["value"] <= 1
    assert analyzed.numbers["procrustes"] == {"images": 360}
    assert analyzed.numbers["idle"] == []


def test_what_is_gained_is_student_minus_control(analyzed: FeatureAnalysis) -> None:
    values = {(p["first"], p["second"]): p for p in analyzed.numbers["pairs"]}
    gains = analyzed.numbers["gains"]
    assert list(gains) == ["labels", "best-teacher", "independent"]
    for control, found in gains.items():
        assert list(found["teachers"]) == ["lenet", "resnet8"]
        for key in ("penultimate", "logits", "matches", "mutual_knn"):
            differences = []
            for teacher, row in found["teachers"].items():
                taught, untaught = values["student", teacher][key], values[control, teacher][key]
                differences.append(taught["value"] - untaught["value"])
                assert row[key]["value"] == pytest.approx(differences[-1], abs=1e-12)
                assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
                # Paired by image: not as wide as if both were drawn apart.
                widths = [m["high"] - m["low"] for m in (taught, untaught)]
                assert row[key]["high"] - row[key]["low"] < 1.1 * np.hypot(*widths)
            assert found["mean"][key]["value"] == pytest.approx(np.mean(differences), abs=1e-12)


def test_the_table_says_what_was_gained_and_which_layers_match(analyzed: FeatureAnalysis) -> None:
    table, numbers = analyzed.table(), analyzed.numbers
    assert table.splitlines()[0] == (
        "digits, test split, 360 images; debiased linear CKA in batches of 256, maps whole; "
        "95 % intervals over images"
    )
    gain = numbers["gains"]["labels"]["mean"]["penultimate"]
    (row,) = (line for line in table.splitlines() if "over labels, to all teachers, on average" in line)
    assert f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in row
    assert "(by chance 0.028)" in table
    pair = next(p for p in numbers["pairs"] if (p["first"], p["second"]) == ("student", "resnet8"))
    best = pair["best"]["first"][0]
    (row,) = (line for line in table.splitlines() if line.strip().startswith("features.2 "))
    assert f"{best['match']} {best['cka']:.3f}" in row


def test_pictures_are_told_of_and_can_be_opened(analyzed: FeatureAnalysis) -> None:
    pictures = analyzed.numbers["pictures"]
    assert list(pictures) == ["teachers", "controls", "self", "between", "gains"]
    written = sorted(path.name for path in analyzed.folder.glob("*.png"))
    assert written == sorted(row["file"] for row in pictures.values())
    for row in pictures.values():
        assert set(row) == {"file", "title", "alt"}
        with Image.open(analyzed.folder / row["file"]) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or ()) > 20
    pair = next(p for p in analyzed.numbers["pairs"] if (p["first"], p["second"]) == ("student", "lenet"))
    assert pictures["teachers"]["alt"].endswith(
        f"Between the penultimate layers of student and lenet CKA is {pair['penultimate']['value']:.2f}."
    )


# Models instead of a run, and what is refused


def subjects(data: Dataset, folder: Path, **networks: nn.Module) -> Subjects:
    nets = {name: classifier(net, 8, 1) for name, net in networks.items()}
    return Subjects("mine", folder, data, nets)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def test_models_are_compared_without_gains(digits: Dataset, tmp_path: Path) -> None:
    found = features_of(
        subjects(digits, tmp_path, a=linear(), b=linear(), c=linear()), FeaturesOptions(images=64)
    )
    numbers = found.numbers
    assert numbers["roles"] == {"a": "model", "b": "model", "c": "model"}
    assert numbers["gains"] == {}
    assert list(numbers["pictures"]) == ["models"]
    assert "gained" not in found.table()
    assert "The most similar layer for each of a" in found.table()


@pytest.mark.parametrize(("images", "kept"), [(64, 64), (256, 256), (271, 256), (272, 272), (300, 300)])
def test_a_last_batch_under_sixteen_is_left_out(
    digits: Dataset, tmp_path: Path, images: int, kept: int
) -> None:
    with logged() as lines:
        found = features_of(
            subjects(digits, tmp_path, a=linear(), b=linear()), FeaturesOptions(images=images)
        )
    warning = "WARNING: 15 of 271 images are left out: the last batch would be smaller than 16"
    assert lines == ([warning] if kept < images else [])
    assert found.numbers["n"] == kept


@pytest.mark.parametrize(("images", "neighbours"), [(15, 3), (20, 20)])
def test_too_few_images_are_refused(digits: Dataset, tmp_path: Path, images: int, neighbours: int) -> None:
    with refused(
        ConfigError,
        f"{images} images are too few to compare layers on",
        f"batches are of 16 or more, and each image has {neighbours} neighbours",
        "take more images, or a smaller --neighbours",
    ):
        features_of(
            subjects(digits, tmp_path, a=linear(), b=linear()),
            FeaturesOptions(images=images, neighbours=neighbours),
        )
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(finished: DistillResult, analyzed: FeatureAnalysis, tmp_path: Path) -> None:
    command = [
        "analyze-features",
        str(finished.folder),
        "--seed",
        "3",
        "--layers",
        "features.2",
        "--pool",
        "gap",
    ]
    result = CliRunner().invoke(app, [*command, "--images", "300", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert numbers == {"folder": str(tmp_path), **json.loads((tmp_path / "features.json").read_text())}
    assert numbers["settings"] == {
        **analyzed.numbers["settings"],
        "layers": ["features.2"],
        "pool": "gap",
        "images": 300,
    }
    assert numbers["layers"]["student"] == ["features.2", "penultimate", "logits"]
    assert f"numbers and pictures in {tmp_path}: features.json, features-teachers.png" in result.stderr


def test_a_user_reads_what_is_wrong_with_a_pattern(finished: DistillResult, tmp_path: Path) -> None:
    command = ["analyze-features", str(finished.folder), "--layers", "logits,block.?", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "error: layers: 'block.?' matches no layer of any model" in result.stderr
    assert "fix: give shell patterns such as 'layer?' or '*.conv1'" in result.stderr


def test_the_last_layer_of_a_network_is_found_by_what_ran() -> None:
    anatomy = examine(classifier(Small()), "net", some_images(3).decoded)
    assert isinstance(anatomy.head, nn.Linear)
    assert [layer.label for layer in anatomy.layers] == ["conv1", "bn1", "relu@1", "conv2", "relu@2", "fc"]
