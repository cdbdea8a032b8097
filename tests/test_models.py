"""Networks by name: names, building, sizes, small-image forms, preprocessing and first weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support import logged, refused
from torch import Tensor, nn
from torchvision.transforms import v2

from ensemble_kd.classifier import Card, Classifier, Preprocess, fit_channels
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import ModelError
from ensemble_kd.forms import to_small_form
from ensemble_kd.fresh import for_data, new_classifier
from ensemble_kd.models import build, choose_form, choose_size, parse, smallest_input
from ensemble_kd.names import label_of
from ensemble_kd.students import STUDENTS

# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "library", "arch", "weights", "seed"),
    [
        ("lenet", "own", "lenet", None, None),
        ("cifar-quick#2", "own", "cifar-quick", None, 2),
        (" resnet20 ", "own", "resnet20", None, None),
        ("resnet18", "timm", "resnet18", None, None),
        ("alexnet", "tv", "alexnet", None, None),
        ("resnet18#12", "timm", "resnet18", None, 12),
        ("resnet18@a1_in1k#3", "timm", "resnet18", "a1_in1k", 3),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm", "vit_tiny_patch16_224.augreg_in21k", None, None),
        ("tv:vgg16@IMAGENET1K_V1", "tv", "vgg16", "IMAGENET1K_V1", None),
        ("lenet@some/where.pth", "own", "lenet", "some/where.pth", None),
        ("hf-hub:org/name", "hf-hub", "org/name", None, None),
        ("py:a/b.py:make@w.safetensors#7", "py", "a/b.py:make", "w.safetensors", 7),
        ("some/where.safetensors", "file", "some/where.safetensors", None, None),
    ],
)
def test_a_name_is_read(text, library, arch, weights, seed):
    name = parse(text)
    assert (name.library, name.arch, name.weights, name.seed) == (library, arch, weights, seed)
    assert name.text == text


@pytest.mark.parametrize("folder", ["run", "joe@lab"])
def test_a_run_folder_and_a_file_in_it_are_read_as_files(tmp_path, folder):
    run = tmp_path / folder
    run.mkdir()
    (run / "student.safetensors").touch()
    for path in (run, run / "student.safetensors"):
        name = parse(str(path))
        assert (name.library, name.arch, name.weights) == ("file", str(path), None)
        assert name.label == folder


def test_a_run_folder_may_lie_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    assert parse("~/run").library == "file"


@pytest.mark.parametrize(("text", "library"), [("lenet", "own"), ("resnet18", "timm"), ("alexnet", "tv")])
def test_a_folder_with_the_name_of_a_network_does_not_hide_it(tmp_path, monkeypatch, text, library):
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).mkdir()
    assert parse(text).library == library
    assert parse(f"./{text}").library == "file"


def test_a_name_in_both_libraries_is_timms_and_says_so():
    assert (
        parse("vgg16").note
        == "vgg16 is in timm and in torchvision: timm's is taken (tv:vgg16 names the other)"
    )
    for text in ("timm:vgg16", "tv:vgg16", "vit_tiny_patch16_224", "alexnet", "lenet"):
        assert parse(text).note == ""


@pytest.mark.parametrize(
    "text",
    ["lenet", "resnet18#1", "alexnet", "tv:resnet18@DEFAULT", "timm:vit_tiny_patch16_224.augreg_in21k",
     "hf-hub:org/name", "py:a.py:make@own", "run/student.safetensors"],
)  # fmt: skip
def test_the_canonical_name_means_the_same_network(text):
    name = parse(text)
    again = parse(name.canonical)
    assert (again.library, again.arch, again.canonical) == (name.library, name.arch, name.canonical)
    assert (again.weights, again.seed) == (None, None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("resnet18", "resnet18"),
        ("resnet18#1", "resnet18#1"),
        ("resnet18@a1_in1k#1", "resnet18#1"),
        ("tv:vgg16@IMAGENET1K_V1", "tv:vgg16"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("hf-hub:org/name", "name"),
        ("py:some/net.py:make@w.pth#2", "make#2"),
        ("runs/first", "first"),
        ("runs/first/", "first"),
        ("runs/first/student.safetensors", "first"),
        ("runs/first/model.safetensors", "first"),
        ("runs/first/controls/labels.safetensors", "labels"),
    ],
)
def test_labels_are_short(text, label):
    assert label_of(text) == label


@pytest.mark.parametrize(
    ("text", "what", "why", "fix"),
    [
        ("resnt18", "no model is called 'resnt18'", "neither this project, timm nor torchvision has it",
         "did you mean 'resnet18'?"),
        ("lenett#1", "no model is called 'lenett'", "neither this project, timm nor torchvision has it",
         "did you mean 'lenet'?"),
        ("zzzzzzz", "no model is called 'zzzzzzz'", "neither this project, timm nor torchvision has it",
         "list them: ekd models '*PART*'"),
        ("tv:resnt18", "tv has no model called 'resnt18'",
         f"it has {len(torchvision.models.list_models(module=torchvision.models))} models",
         "did you mean 'resnet18'?"),
        ("timm:resnt18", "timm has no model called 'resnt18'", f"it has {len(timm.list_models())} models",
         "did you mean 'resnet18'?"),
        ("tv:lenet_zzzz9", "tv has no model called 'lenet_zzzz9'",
         f"it has {len(torchvision.models.list_models(module=torchvision.models))} models",
         "list them: ekd models 'tv:*PART*'"),
        ("runs/gone", "no model at 'runs/gone'",
         "it is neither a run folder nor a .safetensors file, and no model has that name",
         "name the architecture before a file of bare weights: resnet18@weights.pth"),
        ("bare.pth", "no model at 'bare.pth'",
         "it is neither a run folder nor a .safetensors file, and no model has that name",
         "name the architecture before a file of bare weights: resnet18@weights.pth"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused(text, what, why, fix):
    with refused(ModelError, what, why, fix):
        parse(text)


def test_a_misspelt_run_is_told_with_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    why = "it is neither a run folder nor a .safetensors file, and no model has that name"
    with refused(ModelError, "no model at 'runs/frist'", why, "did you mean 'runs/first'?"):
        parse("runs/frist")


def test_an_unknown_pretrained_tag_of_timm_is_refused():
    known = [name.partition(".")[2] for name in timm.list_pretrained("vgg16")]
    with refused(
        ModelError,
        "timm has no weights 'tv_in1' for 'vgg16'",
        f"it has {', '.join(known)}",
        "did you mean 'tv_in1k'?",
    ):
        parse("timm:vgg16.tv_in1")


# --- The user's own modules ----------------------------------------------------------------------

MINE = """
from torch import nn

class Flat(nn.Module):
    def __init__(self, num_classes, channels=1, size=8):
        super().__init__()
        self.fc = nn.Linear(channels * size * size, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Pair(Flat):
    def forward(self, x):
        return super().forward(x), x

class Raises(nn.Module):
    def forward(self, x):
        raise {error}("no")

class Seven(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :7]

def broken(num_classes):
    raise KeyError("key")

def number():
    return 3

constant = 3
"""


def mine(folder: Path, error: str = "RuntimeError") -> Path:
    path = folder / "mine.py"
    path.write_text(MINE.replace("{error}", error))
    return path


FACTS = {"num_classes": 10, "channels": 1}


def test_a_factory_gets_the_arguments_that_it_names(tmp_path):
    net = build(parse(f"py:{mine(tmp_path)}:Flat"), num_classes=7, channels=3, size=12)
    assert net(torch.zeros(2, 3, 12, 12)).shape == (2, 7)


@pytest.mark.parametrize(
    ("attribute", "what", "why", "fix"),
    [
        ("Flatt", "{path} has no 'Flatt'", "it has nn, Flat, Pair, Raises, Seven, broken, number, constant",
         "did you mean 'Flat'?"),
        ("wxyz", "{path} has no 'wxyz'", "it has nn, Flat, Pair, Raises, Seven, broken, number, constant",
         "name one of these"),
        ("broken", "py:{path}:broken failed: KeyError: 'key'",
         "the factory is called with those of num_classes, channels, in_chans, size that it names",
         "call it in a Python session to see the whole traceback"),
        ("constant", "py:{path}:constant failed: TypeError: 3 is not a callable object",
         "the factory is called with those of num_classes, channels, in_chans, size that it names",
         "call it in a Python session to see the whole traceback"),
        ("number", "py:{path}:number returned int",
         "a factory returns an nn.Module that maps (B, channels, H, W) to logits", "return the module"),
    ],
)  # fmt: skip
def test_a_factory_that_cannot_be_used_is_refused(tmp_path, attribute, what, why, fix):
    path = mine(tmp_path)
    with refused(ModelError, what.format(path=path), why, fix):
        build(parse(f"py:{path}:{attribute}"), **FACTS, size=8)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused(tmp_path, content, error):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with refused(
        ModelError,
        f"{path} cannot be run: {error}",
        "a model named by py: is Python code of yours",
        "mend the file",
    ):
        build(parse(f"py:{path}:make"), **FACTS, size=8)


@pytest.mark.parametrize(
    ("where", "file"), [("gone.py:make", "gone.py"), ("net.py", ""), ("notes.txt:make", "notes.txt")]
)
def test_a_name_without_a_python_file_is_refused(tmp_path, monkeypatch, where, file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("")
    (tmp_path / "notes.txt").write_text("make = 3")
    with pytest.raises(ModelError) as caught:
        build(parse(f"py:{where}"), **FACTS, size=8)
    problem = caught.value.problems[0]
    assert (problem.what, problem.fix) == (
        f"py:{where} names no Python file",
        "write py:path/to/file.py:factory",
    )
    assert (
        problem.why
        == {
            "gone.py": "there is no file 'gone.py'",
            "": "the name of a function should stand behind the file",
            "notes.txt": "'notes.txt' does not end in .py",
        }[file]
    )


# --- The project's own networks ------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 30, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", STUDENTS)
def test_own_networks_give_one_logit_a_class(name, channels, size):
    net = STUDENTS[name](7, channels, size).eval()
    logits = net(torch.randn(3, channels, size, size))
    assert logits.shape == (3, 7)
    assert bool(logits.isfinite().all())
    assert net(torch.zeros(1, channels, size, size)).shape == (1, 7)


def conv(inputs: int, outputs: int, kernel: int, bias: bool = True) -> int:
    return inputs * outputs * kernel**2 + outputs * bias


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def small_resnet(channels: int, blocks: int, classes: int) -> int:
    """Filters without bias, each with a batch normalisation of two numbers a channel (He et al. 2016)."""
    total, before = conv(channels, 16, 3, False) + 2 * 16, 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            total += conv(before, width, 3, False) + conv(width, width, 3, False) + 4 * width
            before = width
    return total + linear(64, classes)


LENET = conv(1, 6, 5) + conv(6, 16, 5) + linear(400, 120) + linear(120, 84) + linear(84, 10)
QUICK = conv(3, 32, 5) + conv(32, 32, 5) + conv(32, 64, 5) + linear(1024, 64) + linear(64, 10)


@pytest.mark.parametrize(
    ("name", "channels", "formula", "published"),
    [
        ("lenet", 1, LENET, 61_706),
        ("cifar-quick", 3, QUICK, 145_578),
        ("resnet8", 3, small_resnet(3, 1, 10), 75_290),
        ("resnet20", 3, small_resnet(3, 3, 10), 269_722),
    ],
)
def test_parameter_counts(name, channels, formula, published):
    net = STUDENTS[name](10, channels, 32)
    assert sum(p.numel() for p in net.parameters()) == formula == published


def test_lenet_refuses_what_would_leave_too_small_a_map():
    with pytest.raises(ValueError, match="LeNet needs at least 28×28"):
        STUDENTS["lenet"](10, 1, 27)


# --- Small-image forms ---------------------------------------------------------------------------


def kinds(net: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", ["timm:resnet18", "tv:resnet18"])
def test_small_resnets_have_a_3x3_stem_and_no_pool(name):
    net = build(parse(name), num_classes=10, channels=3, size=32, form="small").eval()
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.bias) == ((3, 3), (1, 1), None)
    assert not kinds(net, nn.MaxPool2d)
    sizes = []
    net.layer4.register_forward_hook(lambda _module, _inputs, out: sizes.append(tuple(out.shape[2:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(4, 4)]


@pytest.mark.parametrize("name", ["timm:vgg16", "tv:vgg16"])
def test_small_vggs_have_a_global_pool_and_one_linear_layer(name):
    net = build(parse(name), num_classes=10, channels=3, size=32, form="small").eval()
    (head,) = kinds(net, nn.Linear)
    assert (head.in_features, head.out_features) == (512, 10)
    features = sum(p.numel() for p in net.features.parameters())
    assert sum(p.numel() for p in net.parameters()) == features + 5130
    x = torch.randn(1, 3, 64, 64)
    expected = head(net.features(x).mean((2, 3)))
    torch.testing.assert_close(net(x), expected)


def test_a_conv_stem_keeps_the_resolution():
    stock, small = (
        build(parse("timm:mobilenetv3_small_050"), num_classes=10, channels=1, size=32, form=form)
        for form in ("stock", "small")
    )
    assert (stock.conv_stem.stride, small.conv_stem.stride) == ((2, 2), (1, 1))
    assert stock.state_dict().keys() == small.state_dict().keys()


def test_other_networks_are_left_as_they_are():
    net = torchvision.models.squeezenet1_1(num_classes=10)
    before = str(net)
    assert to_small_form(net, 10) is False
    assert str(net) == before


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "side"),
    [
        ("vgg16", "stock", 32),
        ("vgg16", "small", 32),
        ("resnet18", "small", 8),
        ("lenet", "stock", 28),
        ("vit_tiny_patch16_224", "small", 16),
    ],
)
def test_the_smallest_input_is_found_by_dry_forwards(name, form, side):
    assert smallest_input(parse(name), **FACTS, form=form) == side


@pytest.mark.parametrize(
    ("name", "wanted", "smallest"), [("vgg16", 28, 32), ("lenet", 20, 28), ("vit_tiny_patch16_224#1", 12, 16)]
)
def test_a_size_that_is_too_small_is_refused(name, wanted, smallest):
    with refused(
        ModelError,
        f"{name!r} cannot take {wanted}×{wanted} images",
        f"it needs at least {smallest}×{smallest}",
        f"say --teacher-size {name}={smallest} (--student-size {smallest}; --size {smallest} of `ekd train`), "
        "or leave the size out and the images are resized",
    ):
        choose_size(parse(name), **FACTS, image_size=wanted, form="stock", wanted=wanted)


@pytest.mark.parametrize(
    ("attribute", "error", "why"),
    [
        ("Seven", "", "it gave (2, 7) for two images, which should be (2, 10): logits of 10 classes"),
        ("Pair", "", "it gave tuple and no tensor"),
        ("Raises", "RuntimeError", "RuntimeError: no"),
        ("Raises", "KeyError", "KeyError: 'no'"),
    ],
)
def test_a_network_that_takes_no_size_is_refused(tmp_path, attribute, error, why):
    name = parse(f"py:{mine(tmp_path, error or 'RuntimeError')}:{attribute}")
    with refused(
        ModelError,
        f"{attribute!r} took no square image from 8 to 512 pixels",
        f"at 8 pixels: {why}",
        "mend its code",
    ):
        smallest_input(name, **FACTS, form="stock")


@pytest.mark.parametrize(
    ("name", "image_size", "stem", "form"),
    [
        ("resnet18", 8, "auto", "small"),
        ("tv:vgg16", 64, "auto", "small"),
        ("resnet18", 65, "auto", "stock"),
        ("resnet18", 8, "imagenet", "stock"),
        ("lenet", 8, "auto", "stock"),
        ("hf-hub:org/name", 8, "auto", "stock"),
        ("py:a.py:make", 8, "auto", "stock"),
    ],
)
def test_library_networks_take_their_small_form_on_small_images(name, image_size, stem, form):
    assert choose_form(parse(name), image_size, stem) == form


@pytest.mark.parametrize(
    ("name", "image_size", "form", "wanted", "side"),
    [
        ("lenet", 8, "stock", None, 28),
        ("lenet", 30, "stock", None, 30),
        ("lenet", 100, "stock", None, 32),
        ("lenet", 8, "stock", 40, 40),
        ("resnet18", 8, "small", None, 8),
        ("resnet18", 29, "small", None, 29),
        ("resnet18", 8, "small", 12, 12),
        ("vgg16", 8, "small", None, 32),
        ("vgg16", 48, "small", None, 48),
        ("vit_tiny_patch16_224", 8, "small", None, 16),
        ("resnet18", 64, "stock", None, 64),
        ("resnet18", 65, "stock", None, 224),
        ("tv:inception_v3", 96, "stock", None, 299),
        ("resnet18", 96, "stock", 96, 96),
    ],
)
def test_the_input_size_suits_the_network_and_the_images(name, image_size, form, wanted, side):
    found = choose_size(parse(name), **FACTS, image_size=image_size, form=form, wanted=wanted)
    assert found == side


# --- Preprocessing -------------------------------------------------------------------------------


def plain(channels: int, size: tuple[int, int]) -> Preprocess:
    """No normalisation: what comes out is the converted and resized image."""
    return Preprocess(channels, size, (0.0,) * channels, (1.0,) * channels)


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    x = torch.rand(2, 3, 5, 5)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Preprocess(3, (5, 5), mean, std)(x), expected)


@pytest.mark.parametrize("size", [(4, 4), (20, 20), (9, 30), (4, 30), (7, 11)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_resizing_agrees_with_torchvision(size, dtype):
    images = torch.randint(0, 256, (2, 3, 12, 10), dtype=torch.uint8)
    expected = v2.functional.resize(images.float() / 255, list(size), antialias=True)
    given = images if dtype == torch.uint8 else images.float() / 255
    torch.testing.assert_close(plain(3, size)(given), expected, atol=1e-6, rtol=0)


def test_shrinking_averages_rather_than_picks():
    stripes = torch.tensor([0.0, 1.0]).repeat(16).expand(1, 1, 32, 32)
    assert plain(1, (8, 8))(stripes).sub(0.5).abs().max() < 0.1


def test_grey_becomes_rgb_and_rgb_becomes_grey():
    grey, colour = torch.rand(2, 1, 6, 6), torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(plain(3, (6, 6))(grey), grey.repeat(1, 3, 1, 1))
    weights = torch.tensor([0.2989, 0.587, 0.114])  # ITU-R 601-2, as in Pillow and torchvision
    torch.testing.assert_close(plain(1, (6, 6))(colour)[:, 0], torch.einsum("bchw,c->bhw", colour, weights))


@pytest.mark.parametrize(("given", "takes"), [(5, 3), (4, 3), (2, 3), (3, 5), (5, 1), (2, 1)])
def test_other_numbers_of_channels_are_refused(given, takes):
    with refused(
        ModelError,
        f"images with {given} channels, for a network that takes {takes}",
        "only grey ↔ RGB can be converted",
        "use a network that takes these images, or convert them first",
    ):
        plain(takes, (6, 6))(torch.rand(1, given, 6, 6))


@pytest.mark.parametrize(
    ("values", "channels", "expected"),
    [((0.1, 0.2, 0.6), 3, (0.1, 0.2, 0.6)), ((0.5,), 3, (0.5,) * 3), ((0.1, 0.2, 0.6), 1, (0.3,))],
)
def test_statistics_are_fitted_to_the_channels(values, channels, expected):
    assert fit_channels(values, channels) == pytest.approx(expected)


# --- Classifiers ---------------------------------------------------------------------------------


def classifier_of(net: nn.Module, size: int = 28, classes: int = 10) -> Classifier:
    pre = Preprocess(1, (size, size), (0.3,), (0.4,))
    return Classifier(net, Card("lenet", "stock", pre, tuple(map(str, range(classes))), "made"))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-5), (torch.float16, 1e-2)]
)
def test_uint8_and_floats_in_0_to_1_give_the_same_logits(digits, dtype, tolerance):
    classifier = classifier_of(STUDENTS["lenet"](10, 1, 28)).eval()
    pixels = digits.test.pixels[:16]
    with torch.no_grad():
        logits = classifier((pixels.double() / 255).to(dtype))
        torch.testing.assert_close(logits, classifier(pixels), atol=tolerance, rtol=0)


def test_parameters_and_bytes_are_counted():
    classifier = classifier_of(STUDENTS["resnet8"](10, 1, 28))
    parameters = small_resnet(1, 1, 10)
    widths = [16, *(2 * [16]), *(2 * [32]), *(2 * [64])]  # one batch normalisation a filter
    buffers = sum(2 * width * 4 + 8 for width in widths)
    assert classifier.parameter_count == parameters
    assert classifier.byte_count == 4 * parameters + buffers
    assert classifier.classes == tuple("0123456789")


class Drifting(nn.Module):
    """Has a buffer that is not saved, but counts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("shift", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(
    ("net", "tensor"),
    [
        (lambda: STUDENTS["resnet8"](10, 1, 28), "fc.weight"),
        (lambda: STUDENTS["resnet8"](10, 1, 28), "bn1.running_var"),
        (lambda: STUDENTS["resnet8"](10, 1, 28), "blocks.2.bn2.num_batches_tracked"),
        (Drifting, "shift"),
    ],
)
def test_the_fingerprint_changes_with_each_parameter_and_buffer(net: Callable[[], nn.Module], tensor):
    classifier = classifier_of(net())
    before = classifier.fingerprint()
    path, _, attribute = tensor.rpartition(".")
    getattr(classifier.net.get_submodule(path), attribute).data.view(-1)[0] += 1
    assert classifier.fingerprint() != before


def test_the_fingerprint_depends_on_nothing_else():
    classifier = classifier_of(STUDENTS["resnet8"](10, 1, 28))
    before = classifier.fingerprint()
    classifier.freeze()(torch.rand(2, 1, 8, 8))
    classifier.to(memory_format=torch.channels_last)
    assert classifier.fingerprint() == before
    classifier.train()(torch.rand(2, 1, 8, 8))
    assert classifier.fingerprint() != before  # batch normalisation keeps running averages


def test_freezing_is_for_good():
    classifier = classifier_of(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10)))
    assert classifier.freeze() is classifier
    images = torch.rand(2, 1, 28, 28)
    logits = classifier(images)
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not logits.requires_grad
    assert logits.equal(classifier(images))


def test_a_card_survives_json():
    card = Card("timm:resnet18", "small", Preprocess(3, (32, 48), (0.1,) * 3, (0.2,) * 3), ("ä", "[/b]"), "x")
    assert Card.from_json(card.to_json()) == card


# --- First weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "resnet18", "tv:squeezenet1_1"])
def test_the_seed_decides_the_first_weights_and_nothing_else_is_drawn(digits, name):
    state = torch.random.get_rng_state()
    prints = [new_classifier(parse(name), digits, seed=seed).fingerprint() for seed in (3, 3, 4)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.random.get_rng_state().equal(state)


def test_a_classifier_knows_its_data(digits):
    classifier = new_classifier(parse("resnet18#5"), digits)
    mean, std = digits.mean_and_std
    assert classifier.card == Card(
        "timm:resnet18", "small", Preprocess(1, (8, 8), mean, std), digits.classes, "digits"
    )
    assert not classifier.pretrained
    x = digits.test.pixels[:4]
    normalised = (x.float() / 255 - mean[0]) / std[0]
    with torch.no_grad():
        torch.testing.assert_close(classifier.eval()(x), classifier.net(normalised))


def test_torchvision_takes_rgb_and_says_that_grey_is_converted(digits):
    with logged() as lines:
        classifier = new_classifier(parse("tv:squeezenet1_1"), digits)
        assert new_classifier(parse("squeezenet1_1"), digits).card == classifier.card
    assert lines[0] == "INFO: tv:squeezenet1_1 takes RGB: the grey images are converted"
    pre = classifier.card.preprocess
    assert (pre.channels, pre.mean) == (3, digits.mean_and_std[0] * 3)
    assert classifier.eval()(digits.test.pixels[:2]).shape == (2, 10)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "tv:regnet_y_400mf"])
def test_a_sketch_tells_all_but_the_weights(digits, name):
    sketch, whole = (new_classifier(parse(name), digits, sketch=sketch) for sketch in (True, False))
    assert sketch.card == whole.card
    assert sketch.parameter_count == whole.parameter_count
    assert sketch.byte_count == whole.byte_count


def test_networks_that_take_grey_convert_nothing_and_only_say_which_library_was_taken(digits):
    with logged() as lines:
        new_classifier(parse("lenet"), digits)
        new_classifier(parse("timm:resnet18"), digits)
        new_classifier(parse("resnet18"), digits)
    assert lines == [
        "INFO: resnet18 is in timm and in torchvision: timm's is taken (tv:resnet18 names the other)"
    ]


def named(data: Dataset, classes: tuple[str, ...]) -> Dataset:
    return replace(data, name="photos", classes=classes)


def test_a_classifier_of_the_same_classes_is_taken(digits):
    classifier = new_classifier(parse("lenet"), digits)
    assert for_data(classifier, digits, "lenet") is classifier


DIGITS = ", ".join("0123456789")


@pytest.mark.parametrize(
    ("classes", "what", "listed"),
    [
        (tuple("012345678"), "'mine' has 10 classes, and photos has 9", "0, 1, 2, 3, 4, 5, 6, 7, 8"),
        (tuple("9876543210"), "'mine' has the classes of photos in another order",
         "9, 8, 7, 6, 5, 4, 3, 2, 1, 0"),
        (tuple("abcdefghij"), "'mine' has other classes than photos", "a, b, c, d, e, f, g, h, i, j"),
        (tuple("abcdefghijkl"), "'mine' has 10 classes, and photos has 12",
         "a, b, c, d, e, f, g, h, i, j … and 2 more"),
    ],
)  # fmt: skip
def test_a_classifier_of_other_classes_is_refused_with_both_lists(digits, classes, what, listed):
    classifier = new_classifier(parse("lenet"), digits)
    with refused(
        ModelError,
        what,
        f"its classes: {DIGITS}; those of photos: {listed}",
        "train it on this data: ekd train lenet --data photos",
    ):
        for_data(classifier, named(digits, classes), "mine")


def test_the_logits_are_those_of_the_network_alone(digits):
    """A reference without any of the project's code between the pixels and the network."""
    classifier = new_classifier(parse("lenet"), digits).eval()
    (mean,), (std,) = digits.mean_and_std
    x = F.interpolate(digits.test.pixels[:8].float() / 255, (28, 28), mode="bilinear")
    with torch.no_grad():
        expected: Tensor = classifier.net((x - mean) / std)
        torch.testing.assert_close(classifier(digits.test.pixels[:8]), expected, atol=1e-6, rtol=1e-5)
