"""Teachers run for targets: folded normalisation, bf16 with a float32 head, batches that fit, and what stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from support import logged
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.features import FeatureTap
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.runner import Runner, Running, folded

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = Running(precision="float32"), Running(precision="bfloat16")
FOLDING_ERROR = 2e-6
"""Of the largest logit, in float32."""


def classifier(net: nn.Module) -> Classifier:
    """8×8 grey images through `net`, frozen."""
    card = Card("lenet", "small", Preprocess(1, (8, 8), (0.3,), (0.4,)), tuple("0123456789"))
    return Classifier(net, card).freeze()


def settled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Its normalisation as after training: statistics and affine numbers away from their first values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(values: Tensor, low: float, high: float) -> None:
        values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                draw(module.running_mean, -0.5, 0.5)
                draw(module.running_var, 0.5, 2.0)
                if module.affine:
                    draw(module.weight, 0.5, 1.5)
                    draw(module.bias, -0.3, 0.3)
    return net


def conv_net(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", groups=2),
        nn.BatchNorm2d(width, eps=1e-2, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * 36, 10),
    )


class Layers(nn.Module):
    """Two convolutions with normalisation and a head; the cases differ in their use of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 10)

    def pooled(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class Residual(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.first(x)))
        y = self.second(x)  # read by its normalisation, and by the sum
        return self.pooled(F.relu(self.two(y) + y))


class SharedConvolution(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        return self.pooled(self.two(self.second(F.relu(self.one(self.second(x))))))


class SharedNormalisation(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(F.relu(self.one(self.second(F.relu(self.one(self.first(x)))))))


class TiedWeights(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(self.second(F.relu(self.one(self.first(x))))))
        return self.pooled(F.conv2d(x, self.second.weight))


class Reversed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.second(F.relu(self.one(self.first(x)))) + self.two(x.expand(-1, 6, -1, -1)))


class Branching(Layers):
    """Images of which the first is dark go another way: what fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x))
        return self.pooled(self.two(self.second(x)) if x.sum() > 0 else F.relu(x))


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def exact(model: Classifier, pixels: Tensor) -> Tensor:
    """The logits of the network itself in float64."""
    with torch.no_grad():
        return copy.deepcopy(model.net).double()(model.card.preprocess(pixels).double())


def apart(logits: Tensor, wanted: Tensor) -> float:
    return float((logits.double() - wanted.double()).abs().max() / wanted.abs().max())


def tensors_of(model: Classifier) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def runner(model: Classifier, running: Running = FLOAT32, own_code: bool = False) -> Runner:
    return Runner(model, "t", CPU, running, own_code=own_code)


@pytest.fixture(scope="module")
def pixels(few_digits: Dataset) -> Tensor:
    return few_digits.train.pixels[:24]


# Folding

BUILT = {
    # Normalisations before, and after folding; None where nothing can be folded.
    "resnet8": (None, 7, 0),
    "lenet": (None, 0, None),
    "timm:resnet10t": (32, 14, 0),
    "timm:mobilenetv3_small_050": (32, 34, None),  # its layers activate as well
    "tv:shufflenet_v2_x0_5": (32, 56, 0),
    "tv:squeezenet1_1": (32, 0, None),
}
WRITTEN: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "a sequence": (conv_net, 0),
    "an output that is read twice": (Residual, 1),
    "a convolution that is used twice": (SharedConvolution, 2),
    "a normalisation that is used twice": (SharedNormalisation, 1),
    "weights that are used elsewhere": (TiedWeights, None),
    "a normalisation before": (Reversed, 1),
    "another way for some images": (Branching, None),
}


@pytest.fixture(scope="module")
def build(few_digits: Dataset) -> Callable[[str], Classifier]:
    """Networks by name, each made once."""

    @cache
    def built(name: str) -> Classifier:
        model = new_classifier(parse(name), few_digits, size=BUILT[name][0]).freeze()
        settled(model.net)
        return model

    return built


@pytest.mark.parametrize("name", BUILT)
def test_built_networks_say_the_same_when_folded(
    build: Callable[[str], Classifier], pixels: Tensor, name: str
) -> None:
    _, before, after = BUILT[name]
    model = build(name)
    assert batch_norms(model) == before
    check_folding(model, pixels, after)


@pytest.mark.parametrize("case", WRITTEN)
def test_networks_of_any_shape_say_the_same_when_folded(pixels: Tensor, case: str) -> None:
    make, after = WRITTEN[case]
    check_folding(classifier(settled(make())), pixels, after)


def check_folding(model: Classifier, pixels: Tensor, after: int | None) -> None:
    """It is folded to so many normalisations, says the same, and the original stays as it was."""
    before, fingerprint, wanted = tensors_of(model), model.fingerprint(), exact(model, pixels)
    copied = folded(model)
    assert (copied is None) == (after is None)
    if copied is not None:
        assert batch_norms(copied) == after
        with torch.no_grad():
            assert apart(copied(pixels), wanted) < FOLDING_ERROR
        assert not copied.training
        assert not any(p.requires_grad for p in copied.parameters())
    run = runner(model)
    assert run.is_folded == (after is not None)
    answers = run(pixels)
    assert apart(answers.logits, wanted) < FOLDING_ERROR
    assert answers.logits.dtype == torch.float32
    assert answers.features is None
    assert model.fingerprint() == fingerprint
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert hooks(model) == 0


def test_what_is_folded_shares_nothing_with_the_original(pixels: Tensor) -> None:
    model = classifier(settled(conv_net()))
    copied = folded(model)
    assert copied is not None
    ours = {tensor.data_ptr() for tensor in model.net.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in copied.net.state_dict().values())


@pytest.mark.parametrize("training", [True, False])
def test_folding_leaves_the_mode_of_each_module(training: bool) -> None:
    model = classifier(settled(conv_net()))
    model.net[2].train(training)  # a ReLU, to which the mode means nothing
    assert folded(model) is not None
    assert model.net[2].training == training
    assert not model.net[1].training


def test_code_of_the_user_is_run_as_it_is(pixels: Tensor) -> None:
    model = classifier(settled(conv_net()))
    run = runner(model, own_code=True)
    assert not run.is_folded
    with torch.no_grad():
        assert torch.equal(run(pixels).logits, model(pixels))
    strides = {name: tensor.stride() for name, tensor in model.net.named_parameters()}
    assert strides == {name: p.contiguous().stride() for name, p in conv_net().named_parameters()}


def test_folding_that_errs_is_not_used(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier(settled(conv_net()))
    # As if the folded network were another.
    monkeypatch.setattr("ensemble_kd.teachers.runner.fuse_conv_bn_eval", lambda conv, norm: conv)
    assert folded(model) is None
    assert apart(runner(model)(pixels).logits, exact(model, pixels)) < FOLDING_ERROR


class OfThisBatch(Layers):
    """Normalised by what is in the batch: no statistics are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.BatchNorm2d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.two(self.second(F.relu(self.one(self.first(x))))))


class Parametrised(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.utils.parametrizations.weight_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.two(self.second(F.relu(self.one(self.first(x))))))


@pytest.mark.parametrize("make", [OfThisBatch, Parametrised])
def test_what_cannot_be_folded_is_run_all_the_same(pixels: Tensor, make: Callable[[], nn.Module]) -> None:
    model = classifier(make())
    assert apart(runner(model)(pixels).logits, exact(model, pixels)) < FOLDING_ERROR


# Precision


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_that_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert Running().dtype(CPU) == (torch.bfloat16 if native else torch.float32)
    assert FLOAT32.dtype(CPU) == torch.float32
    assert BFLOAT16.dtype(CPU) == torch.bfloat16


NETS: dict[str, Callable[[], nn.Module]] = {"folded": conv_net, "branching": Branching}


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_says_nearly_the_same_and_its_last_layer_is_float32(pixels: Tensor, name: str) -> None:
    model = classifier(settled(NETS[name]()))
    narrow, wide = runner(model, BFLOAT16)(pixels, features=True), runner(model)(pixels)
    moved = (narrow.logits.softmax(1) - wide.logits.softmax(1)).abs().max()
    assert 0 < float(moved) < 1e-2
    assert narrow.logits.dtype == narrow.features.dtype == torch.float32
    # What reaches the last layer is bf16, and what it gives is not rounded to it.
    assert torch.equal(narrow.features, narrow.features.bfloat16().float())
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(narrow.logits, F.linear(narrow.features, head.weight, head.bias))
    assert float((narrow.logits != narrow.logits.bfloat16().float()).float().mean()) > 0.9


@pytest.mark.parametrize("name", ["timm:resnet10t", "tv:shufflenet_v2_x0_5"])
def test_bfloat16_of_built_networks(build: Callable[[str], Classifier], pixels: Tensor, name: str) -> None:
    narrow, wide = (runner(build(name), how)(pixels).logits for how in (BFLOAT16, FLOAT32))
    assert 1e-4 < apart(narrow, wide) < 5e-2
    assert float((narrow != narrow.bfloat16().float()).float().mean()) > 0.9


def test_a_network_without_a_last_layer_is_bfloat16_throughout(pixels: Tensor) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight

    logits = runner(classifier(Product()), BFLOAT16)(pixels).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())


class Broken(nn.Module):
    """Fails where it is told to: never, before the head, or in it."""

    class Head(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise ValueError("in the head")
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.fails = nn.Linear(64, 20), Broken.Head(20, 10), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1))
        if self.fails:
            raise ValueError("before the head")
        return self.head(F.relu(x))


@pytest.mark.parametrize("where", ["before the head", "in the head"])
@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_as_before_also_after_an_error(pixels: Tensor, where: str, outside: bool) -> None:
    net = Broken()
    model = classifier(net)
    run = runner(model, BFLOAT16, own_code=True)
    with torch.autocast("cpu", torch.float16, enabled=outside):
        wanted = run(pixels, features=True)
        assert torch.is_autocast_enabled("cpu") == outside
        broken = net if where == "before the head" else net.head
        broken.fails = True
        with pytest.raises(ValueError, match=where):
            run(pixels, features=True)
        assert torch.is_autocast_enabled("cpu") == outside
        assert hooks(model) == 0
        broken.fails = False
        again = run(pixels, features=True)
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16  # as torch begins
    assert torch.equal(again.logits, wanted.logits)
    assert torch.equal(again.features, wanted.features)


# Batches


class Narrow(nn.Module):
    """Notes how many images come at a time, and fails for more than `most`."""

    def __init__(self, most: int, error: RuntimeError) -> None:
        super().__init__()
        self.flat, self.most, self.error = nn.Linear(64, 10), most, error
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.flat(x.flatten(1))


OUT = torch.OutOfMemoryError("CUDA out of memory")
NO_ROOM = RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize("batch", [1, 7, 24, 100])
def test_images_go_through_in_batches(pixels: Tensor, batch: int) -> None:
    net = Narrow(1000, OUT)
    model = classifier(net)
    answers = runner(model, Running(batch, "float32"))(pixels, features=True)
    parts = [len(part) for part in pixels.split(batch)]
    assert net.seen[-len(parts) :] == parts
    with torch.no_grad():
        torch.testing.assert_close(answers.logits, model(pixels))
    torch.testing.assert_close(answers.features, model.card.preprocess(pixels).flatten(1))


@pytest.mark.parametrize("error", [OUT, NO_ROOM])
def test_batches_are_halved_where_the_memory_does_not_suffice(pixels: Tensor, error: RuntimeError) -> None:
    net = Narrow(5, error)
    model = classifier(net)
    run = runner(model, Running(16, "float32"))
    with logged() as lines:
        logits = run(pixels).logits
    assert lines == [
        "WARNING: teacher t: 16 images at a time are too many, going on with 8",
        "WARNING: teacher t: 8 images at a time are too many, going on with 4",
    ]
    with torch.no_grad():
        torch.testing.assert_close(logits, net.flat(model.card.preprocess(pixels).flatten(1)))
    assert net.seen == [16, 8, *[4] * 6]
    net.seen.clear()
    assert torch.equal(run(pixels).logits, logits)  # and it stays so
    assert net.seen == [4] * 6


def test_fewer_images_than_a_batch_are_halved_too(pixels: Tensor) -> None:
    net = Narrow(3, OUT)
    runner(classifier(net), Running(512, "float32"))(pixels[:11])
    assert net.seen == [11, 5, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("error", [OUT, NO_ROOM])
def test_an_image_that_is_too_large_alone_is_told(pixels: Tensor, error: RuntimeError) -> None:
    net = Narrow(0, error)
    with pytest.raises(RuntimeError) as caught:
        runner(classifier(net), Running(6, "float32"))(pixels)
    assert caught.value is error
    assert net.seen == [6, 3, 1]


def test_other_errors_pass_as_they_are(pixels: Tensor) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    net = Narrow(5, error)
    with logged() as lines, pytest.raises(RuntimeError) as caught:
        runner(classifier(net), Running(16, "float32"))(pixels)
    assert caught.value is error
    assert net.seen == [16]
    assert not lines


def test_features_are_right_after_halving(pixels: Tensor) -> None:
    model = classifier(Narrow(5, OUT))
    answers = runner(model, Running(16, "float32"))(pixels, features=True)
    torch.testing.assert_close(answers.features, model.card.preprocess(pixels).flatten(1))
    assert hooks(model) == 0


# Features and teachers


@pytest.mark.parametrize(
    "name", ["resnet8", "timm:resnet10t", "timm:mobilenetv3_small_050", "tv:squeezenet1_1"]
)
def test_features_are_those_of_the_original(few_digits: Dataset, pixels: Tensor, name: str) -> None:
    model = new_classifier(parse(name), few_digits, size=None if name == "resnet8" else 32).freeze()
    settled(model.net)
    answers = runner(model, Running(7, "float32"))(pixels, features=True)
    with torch.no_grad(), FeatureTap(model, "t") as tap:
        logits, features = model(pixels), tap.take()
    assert answers.features.dtype == torch.float32
    torch.testing.assert_close(answers.features, features, rtol=1e-4, atol=1e-5 * float(features.abs().max()))
    torch.testing.assert_close(answers.logits, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert hooks(model) == 0


def teacher(**options: bool) -> Teacher:
    return Teacher.of("t", classifier(settled(conv_net())), "test", **options)


def batch_of(pixels: Tensor) -> Images:
    return Images(pixels, None, torch.arange(len(pixels)))


def test_only_teachers_that_are_not_the_users_code_are_folded(pixels: Tensor) -> None:
    assert teacher(storable=True).runner(CPU).is_folded
    assert not teacher().runner(CPU).is_folded


def test_a_teacher_is_set_up_once_and_looks_again_after_its_release(pixels: Tensor) -> None:
    one = teacher(storable=True)
    first, set_up = one.look(batch_of(pixels)).logits, one.runner(CPU)
    assert one.runner(CPU) is set_up
    one.release()
    assert all(p.device == CPU for p in one.classifier.parameters())
    assert torch.equal(one.look(batch_of(pixels)).logits, first)
    assert one.runner(CPU) is not set_up
    assert one.check_unchanged() == one.fingerprint
    assert not first.requires_grad


def test_answers_do_not_depend_on_the_images_beside(pixels: Tensor) -> None:
    run = runner(classifier(settled(conv_net())))
    whole = run(pixels).logits
    alone = torch.cat([run(part).logits for part in pixels.split(5)])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-6)
