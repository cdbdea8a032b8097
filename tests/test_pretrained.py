"""Published weights: found in the caches of torch and of the hub, with a fresh head on them.

The files are made here, under the names that the libraries give them, so nothing is downloaded.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from support import logged, message, refused
from torch import nn
from torchvision import models as tv

from ensemble_kd import pretrained
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.errors import ModelError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.weights import load_student, save_classifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
V1 = "IMAGENET1K_V1"
MOBILENET = "mobilenetv3_small_050"


def random_data(channels: int, side: int) -> Dataset:
    def part(count: int, first: int) -> Images:
        pixels = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
        return Images(pixels, torch.arange(count) % 10, torch.arange(first, first + count))

    return Dataset(f"random{side}", tuple("0123456789"), part(20, 0), part(10, 20), part(10, 30))


@pytest.fixture
def colour() -> Dataset:
    return random_data(3, 8)


@pytest.fixture
def large() -> Dataset:
    """Over 64 pixels: networks keep their stock form, and start from published weights."""
    return random_data(3, 72)


def backbone(net: nn.Module, head: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in net.state_dict().items() if not key.startswith(head)}


def assert_same_backbone(net: nn.Module, other: nn.Module, head: str) -> None:
    mine, theirs = backbone(net, head), backbone(other, head)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not mine[key].equal(theirs[key])] == []


# --- What is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "head", "shape"),
    [("squeezenet1_1", "classifier.1", (10, 512, 1, 1)), ("resnet18", "fc", (10, 512))],
)
@pytest.mark.parametrize("offline", [True, False])
def test_torchvisions_weights_get_a_fresh_head(digits, put_tv, arch, head, shape, offline):
    published, _ = put_tv(arch)
    classifier = new_classifier(parse(f"tv:{arch}@{V1}"), digits, offline=offline)
    assert_same_backbone(classifier.net, published, head)
    assert classifier.net.state_dict()[f"{head}.weight"].shape == shape
    assert classifier.pretrained
    pre = classifier.card.preprocess
    assert (pre.channels, pre.size, pre.mean, pre.std) == (3, (224, 224), MEAN, STD)
    assert (classifier.card.model, classifier.card.form) == (f"tv:{arch}", "stock")
    assert classifier.eval()(digits.test.pixels[:2]).shape == (2, 10)


@pytest.mark.parametrize("name", [f"timm:{MOBILENET}.lamb_in1k", f"{MOBILENET}@lamb_in1k"])
def test_timms_weights_get_a_fresh_head(colour, hub, name):
    published = hub(MOBILENET)
    classifier = new_classifier(parse(name), colour, offline=True)
    assert_same_backbone(classifier.net, published, "classifier")
    assert classifier.net.state_dict()["classifier.weight"].shape == (10, 1024)
    pre = classifier.card.preprocess
    assert (pre.channels, pre.size, pre.mean, pre.std) == (3, (224, 224), MEAN, STD)
    assert classifier.card.form == "stock"


def test_timms_weights_take_grey_images(digits, hub):
    hub(MOBILENET)
    classifier = new_classifier(parse(f"{MOBILENET}@lamb_in1k"), digits, offline=True, size=64).eval()
    pre = classifier.card.preprocess
    assert len(pre.mean) == len(pre.std) == pre.channels
    assert classifier(digits.test.pixels[:2]).shape == (2, 10)


@pytest.mark.parametrize("name", [f"tv:squeezenet1_1@{V1}", f"tv:resnet18@{V1}", f"{MOBILENET}@lamb_in1k"])
def test_published_weights_on_small_images_survive_a_file(tmp_path, colour, put_tv, hub, name):
    """They keep the stock form, where networks from scratch take the small-image form."""
    hub(MOBILENET) if name.startswith(MOBILENET) else put_tv(parse(name).arch)
    classifier = new_classifier(parse(name), colour, offline=True, size=64).eval()
    save_classifier(tmp_path / "x.safetensors", classifier)
    loaded = load_student(tmp_path / "x.safetensors")
    with torch.no_grad():
        assert loaded(colour.test.pixels).equal(classifier(colour.test.pixels))


def test_the_seed_decides_the_head(digits, put_tv):
    put_tv("squeezenet1_1")
    name = parse(f"tv:squeezenet1_1@{V1}")
    one, same, other = (new_classifier(name, digits, seed=seed).fingerprint() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("name", [f"tv:squeezenet1_1@{V1}", f"{MOBILENET}@lamb_in1k"])
def test_a_wanted_size_is_taken(colour, put_tv, hub, name):
    hub(MOBILENET) if name.startswith(MOBILENET) else put_tv("squeezenet1_1")
    classifier = new_classifier(parse(name), colour, size=64, offline=True)
    assert classifier.card.preprocess.size == (64, 64)


def test_auxiliary_heads_are_left_out(large, put_tv):
    """inception_v3 comes with one, which in training would return a pair."""
    put_tv("inception_v3", init_weights=False)
    classifier = new_classifier(parse(f"tv:inception_v3@{V1}"), large).train()
    assert classifier.card.preprocess.size == (299, 299)
    assert isinstance(classifier(large.train.pixels[:2]), torch.Tensor)


def test_small_images_are_told_that_the_stock_form_stays(digits, put_tv):
    put_tv("squeezenet1_1")
    with logged() as lines:
        new_classifier(parse(f"tv:squeezenet1_1@{V1}"), digits)
    assert lines == [
        "INFO: tv:squeezenet1_1 keeps its stock form, which its published weights need",
        f"INFO: tv:squeezenet1_1 starts from tv:squeezenet1_1@{V1}",
        "INFO: tv:squeezenet1_1 takes RGB: the grey images are converted",
    ]


# --- Whether they are at hand --------------------------------------------------------------------

WITHOUT = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet18", False),
        ("tv:resnet18", False),
        ("lenet", False),
        ("tv:resnet18@DEFAULT", True),
        ("resnet18@a1_in1k", True),
        ("timm:resnet18.a1_in1k", True),
        ("hf-hub:org/name", True),
    ],
)
def test_a_tag_asks_for_published_weights(name, wanted):
    assert pretrained.is_wanted(parse(name)) is wanted


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("lenet", "none"),
        ("py:a.py:make", "none"),
        (f"timm:{WITHOUT}", "none"),
        (f"timm:{MOBILENET}", "download"),
        ("tv:squeezenet1_1", "download"),
        (f"tv:squeezenet1_1@{V1}", "download"),
        ("hf-hub:org/name", "download"),
    ],
)
def test_weights_that_are_not_on_this_machine(checkpoints, hub, name, state):
    assert pretrained.at_hand(parse(name)) == state


def test_weights_that_are_on_this_machine(put_tv, hub):
    put_tv("squeezenet1_1")
    hub(MOBILENET)
    for name in ("tv:squeezenet1_1", f"tv:squeezenet1_1@{V1}", f"timm:{MOBILENET}", f"{MOBILENET}@lamb_in1k"):
        assert pretrained.at_hand(parse(name)) == "cached"


def test_other_weights_of_the_same_network_are_not_at_hand(put_tv, hub):
    put_tv("mobilenet_v3_large", "IMAGENET1K_V2")
    hub("resnet18")  # of several, its first: a1_in1k
    for name, state in (
        ("tv:mobilenet_v3_large", "cached"),
        (f"tv:mobilenet_v3_large@{V1}", "download"),
        ("resnet18@a1_in1k", "cached"),
        ("resnet18@fb_swsl_ig1b_ft_in1k", "download"),
    ):
        assert pretrained.at_hand(parse(name)) == state, name


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (f"tv:squeezenet1_1@{V1}", "tv:squeezenet1_1"),
        ("tv:resnet18@DEFAULT#3", "tv:resnet18#3"),
        (f"{MOBILENET}@lamb_in1k", MOBILENET),
        (f"timm:{MOBILENET}.lamb_in1k", f"{MOBILENET}.lamb_in1k"),
        ("hf-hub:org/name", "name"),
    ],
)
def test_offline_weights_are_not_downloaded(digits, checkpoints, hub, monkeypatch, name, label):
    for module in (timm, tv):
        for function in ("create_model", "get_model"):
            monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("a loader ran"), raising=False)
    with refused(
        ModelError,
        f"the weights of {label!r} are not on this machine",
        "--offline forbids to download them",
        "run once without --offline, or leave the weights out and it is trained from scratch",
    ):
        new_classifier(parse(name), digits, offline=True)


TIMM_RESNET18 = ", ".join(name.partition(".")[2] for name in timm.list_pretrained("resnet18"))


@pytest.mark.parametrize(
    ("name", "what", "why", "fix"),
    [
        ("tv:squeezenet1_1@IMAGENET1K_V2", "torchvision has no weights 'IMAGENET1K_V2' for 'squeezenet1_1'",
         "it has IMAGENET1K_V1, DEFAULT", "did you mean 'IMAGENET1K_V1'?"),
        ("tv:resnet18@latest", "torchvision has no weights 'latest' for 'resnet18'",
         "it has IMAGENET1K_V1, DEFAULT", "name one of these"),
        ("resnet18@a1_in1", "timm has no weights 'a1_in1' for 'resnet18'", f"it has {TIMM_RESNET18}",
         "did you mean 'a1_in1k'?"),
        ("timm:resnet18.a1_in1", "timm has no weights 'a1_in1' for 'resnet18'", f"it has {TIMM_RESNET18}",
         "did you mean 'a1_in1k'?"),
    ],
)  # fmt: skip
def test_an_unknown_tag_is_refused_with_the_known_ones(digits, checkpoints, hub, name, what, why, fix):
    with refused(ModelError, what, why, fix):
        new_classifier(parse(name), digits)


def test_a_network_without_published_weights_is_refused(digits, checkpoints, hub):
    with refused(
        ModelError,
        f"{WITHOUT!r} has no published weights",
        "timm names none for it",
        "leave the weights out, and it is trained from scratch",
    ):
        new_classifier(parse(f"{WITHOUT}@in1k"), digits)


def fails(*_args, **_options):
    raise URLError("no route to host")


@pytest.mark.parametrize("name", [f"tv:squeezenet1_1@{V1}", f"{MOBILENET}@lamb_in1k", "hf-hub:org/name"])
def test_a_failing_network_is_named(digits, checkpoints, hub, monkeypatch, name):
    monkeypatch.setattr(timm, "create_model", fails)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with refused(
        ModelError,
        f"the weights of {parse(name).label!r} could not be fetched",
        "URLError: <urlopen error no route to host>",
        "check the network, or leave the weights out and it is trained from scratch",
    ):
        new_classifier(parse(name), digits)


def test_a_hub_that_cannot_be_reached_is_named(digits, hub):
    with pytest.raises(ModelError) as caught:
        new_classifier(parse(f"{MOBILENET}@lamb_in1k"), digits)
    problem = caught.value.problems[0]
    assert problem.what == f"the weights of {MOBILENET!r} could not be fetched"
    assert problem.fix == "check the network, or leave the weights out and it is trained from scratch"


def test_a_damaged_download_is_named_by_its_path(digits, put_tv):
    """The network is not to blame: the file must go before it is fetched again."""
    _, path = put_tv("squeezenet1_1")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError) as caught:
        new_classifier(parse(f"tv:squeezenet1_1@{V1}"), digits)
    assert str(path) in str(caught.value)


class Payload:
    """A pickle that runs a command when it is opened."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch '{target}'"

    def __reduce__(self):
        return (os.system, (self.command,))


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_in_the_cache_is_never_executed(tmp_path, digits, put_tv, form):
    _, path = put_tv("squeezenet1_1")
    payload = Payload(tmp_path / "ran")
    torch.save({"x": payload}, path) if form == "torch" else path.write_bytes(
        pickle.dumps(payload, protocol=2)
    )
    with pytest.raises(ModelError):
        new_classifier(parse(f"tv:squeezenet1_1@{V1}"), digits)
    assert not (tmp_path / "ran").exists()


# --- Bare names on large images ------------------------------------------------------------------


def test_a_bare_name_starts_from_published_weights_on_large_images(large, put_tv, hub):
    nets = {"tv:squeezenet1_1": put_tv("squeezenet1_1")[0], MOBILENET: hub(MOBILENET)}
    for name, published in nets.items():
        with logged() as lines:
            classifier = new_classifier(parse(name), large, offline=True)
        assert_same_backbone(classifier.net, published, "classifier")
        assert (classifier.pretrained, classifier.card.form) == (True, "stock")
        assert len(lines) == 1
        assert lines[0].startswith(f"INFO: {parse(name).label} starts from ")
        assert classifier.card.preprocess.size == (224, 224)


def test_a_bare_name_starts_from_scratch_on_small_images(colour, put_tv):
    put_tv("squeezenet1_1")
    classifier = new_classifier(parse("tv:squeezenet1_1"), colour)
    assert not classifier.pretrained
    assert classifier.card.preprocess.size < (224, 224)


@pytest.mark.parametrize(
    ("name", "offline", "why"),
    [
        ("tv:squeezenet1_1", True, "--offline forbids to download them"),
        ("tv:squeezenet1_1", False, "URLError: <urlopen error no route to host>"),
        (f"timm:{WITHOUT}", False, "timm names none for it"),
    ],
)
def test_a_bare_name_without_weights_starts_from_scratch_and_says_so(
    large, checkpoints, hub, monkeypatch, name, offline, why
):
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with logged() as lines:
        classifier = new_classifier(parse(name), large, offline=offline, sketch=True)
    assert lines == [f"WARNING: {parse(name).label} starts from scratch: {why}"]
    assert not classifier.pretrained
    assert classifier.card.form == "stock"
    assert classifier.card.preprocess.mean == large.mean_and_std[0]


def test_an_own_network_has_no_published_weights(digits):
    with pytest.raises(ModelError) as caught:
        new_classifier(parse("lenet@best"), digits)
    assert str(caught.value) == message(
        "'lenet' has no published weights",
        "this project publishes none",
        "leave the weights out, and it is trained from scratch",
    )
