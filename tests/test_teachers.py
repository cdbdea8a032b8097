"""Teachers by name: trained once and kept, found again, taken from files, or refused; and the list of models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import logged, message, refused
from torch import Tensor, nn

from ensemble_kd import files
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import ModelError, WeightsError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import find, parse
from ensemble_kd.students import STUDENTS
from ensemble_kd.teachers import library, registry
from ensemble_kd.teachers.catalogue import list_models
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import can_be_trained, load_teacher
from ensemble_kd.weights import save_classifier

ONE = {"epochs": 1}


def logits(teacher: Teacher, data: Dataset) -> Tensor:
    return teacher.classifier(data.test.pixels[:16])


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would train fails the test."""
    monkeypatch.setattr(registry, "train_on_labels", lambda *_, **__: pytest.fail("a teacher was trained"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few_digits: Dataset) -> Iterator[Teacher]:
    """A LeNet trained for one epoch, kept in a library of its own that the tests of this file share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKD_CACHE", str(tmp_path_factory.mktemp("library")))
        yield load_teacher("lenet", few_digits, training=ONE)


# --- The library ---------------------------------------------------------------------------------


def test_training_is_told_and_kept(few_digits, own_cache):
    with logged() as lines:
        teacher = load_teacher("lenet", few_digits, training=ONE)
    folder = Path(teacher.origin)
    assert folder.parent == own_cache / "teachers"
    assert folder.name.startswith("lenet-digits-s0-")
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "teacher.json"]
    (row,) = library.history_of(folder)
    assert lines == [
        "INFO: teacher lenet: training on digits at 28×28, 1 epochs",
        f"INFO: teacher lenet: validation accuracy {row['val']['accuracy']:.3f}, kept in {folder}",
    ]
    facts = files.read_json(folder / "teacher.json")
    assert facts["sha256"] == files.sha256_file(folder / "model.safetensors")
    assert facts["made_from"]["recipe"]["epochs"] == 1
    assert facts["results"]["val"] == row["val"]


def test_a_trained_teacher_is_found_and_gives_the_same_logits(few_digits, trained, no_training):
    with logged() as lines:
        again = load_teacher("lenet", few_digits, training=ONE, train=False)
    assert lines == ["INFO: teacher lenet: from the library"]
    assert (again.origin, again.fingerprint) == (trained.origin, trained.fingerprint)
    assert logits(again, few_digits).equal(logits(trained, few_digits))


@pytest.mark.parametrize(
    ("name", "options"),
    [("lenet#0", {}), ("lenet#0", {"seed": 5}), ("lenet", {"augment": "none"}), ("lenet", {"size": 28})],
)
def test_saying_the_default_means_the_same_teacher(few_digits, trained, no_training, name, options):
    teacher = load_teacher(name, few_digits, training=ONE, **options)
    assert teacher.origin == trained.origin
    assert teacher.label == name


@pytest.mark.parametrize(
    ("name", "change", "options"),
    [
        ("lenet", {}, {"training": {"epochs": 2}}),
        ("lenet", {}, {"training": {"epochs": 1, "lr": 0.01}}),
        ("lenet", {}, {"seed": 1}),
        ("lenet#1", {}, {}),
        ("lenet", {}, {"augment": "crop"}),
        ("lenet", {}, {"size": 32}),
        ("resnet8", {}, {}),
        ("lenet", {"classes": tuple("abcdefghij")}, {}),
    ],
)
def test_a_teacher_made_from_anything_else_is_another(few_digits, trained, name, change, options):
    data = replace(few_digits, **change)
    with refused(
        ModelError,
        f"teacher {name!r} is not in the library for {data.name} with this recipe",
        "it may not be trained now",
        f"train it first: ekd train {name} --data {data.name}",
    ):
        load_teacher(name, data, **{"training": ONE, **options}, train=False)


def test_the_same_pixels_under_another_name_find_the_same_teacher(few_digits, trained, no_training):
    moved = load_teacher("lenet", replace(few_digits, name="numbers"), training=ONE)
    assert moved.fingerprint == trained.fingerprint


def test_a_teacher_of_other_pixels_is_another(few_digits, trained):
    pixels = few_digits.train.pixels.clone()
    pixels[0, 0, 0, 0] ^= 1
    data = replace(few_digits, train=replace(few_digits.train, pixels=pixels))
    with pytest.raises(ModelError, match="not in the library"):
        load_teacher("lenet", data, training=ONE, train=False)
    with pytest.raises(ModelError, match="not in the library"):
        load_teacher("lenet", few_digits.limit_train(150), training=ONE, train=False)


def test_the_seed_of_a_name_goes_before_the_argument(few_digits, own_cache, no_training, monkeypatch):
    def train(classifier, *_args, seed, **_options):
        return [{"val": {"accuracy": 0.5, "seed": seed}}]

    monkeypatch.setattr(registry, "train_on_labels", train)
    named = load_teacher("lenet#3", few_digits, seed=1, training=ONE)
    given = load_teacher("lenet", few_digits, seed=3, training=ONE)
    assert (named.label, given.label) == ("lenet#3", "lenet")
    assert named.origin == given.origin
    assert library.history_of(Path(named.origin))[0]["val"]["seed"] == 3
    assert named.fingerprint == new_classifier(parse("lenet"), few_digits, seed=3).fingerprint()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "harm", "warned"),
    [
        ("model.safetensors", flip_a_bit, True),
        ("model.safetensors", cut, True),
        ("model.safetensors", Path.unlink, False),
        ("teacher.json", Path.unlink, False),
        ("teacher.json", cut, True),
    ],
)
def test_a_damaged_teacher_is_noticed_and_trained_again(few_digits, own_cache, file, harm, warned):
    first = load_teacher("lenet", few_digits, training=ONE)
    harm(Path(first.origin) / file)
    with logged() as lines:
        again = load_teacher("lenet", few_digits, training=ONE)
    warning = f"WARNING: {first.origin}/{file} was changed since it was kept: the teacher is trained again"
    assert (warning in lines) == warned
    assert any("training on digits" in line for line in lines)
    assert again.fingerprint == first.fingerprint
    with logged() as lines:
        load_teacher("lenet", few_digits, training=ONE)
    assert lines == ["INFO: teacher lenet: from the library"]


def test_a_damaged_teacher_does_not_hide_the_others(few_digits, own_cache):
    teacher = load_teacher("lenet", few_digits, training=ONE)
    broken = library.library_dir() / "broken" / "teacher.json"
    broken.parent.mkdir()
    broken.write_text('{"made_')
    assert [str(row["folder"]) for row in library.kept()] == [teacher.origin]


# --- What a teacher is ---------------------------------------------------------------------------


def test_a_teacher_is_frozen(few_digits, trained):
    classifier = trained.classifier
    assert not any(module.training for module in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not logits(trained, few_digits).requires_grad
    assert trained.check_unchanged() == trained.fingerprint


def test_a_teacher_that_changed_is_noticed(few_digits):
    teacher = Teacher.of("mine", new_classifier(parse("resnet8"), few_digits), "here")
    logits(teacher, few_digits)
    teacher.check_unchanged()
    teacher.classifier.net.bn1.running_mean[0] += 1e-3
    with refused(
        ModelError,
        "teacher 'mine' changed while it taught",
        "its parameters or buffers have another hash than when it was loaded",
        "a module of your own that writes to its buffers in eval mode cannot be a teacher",
    ):
        teacher.check_unchanged()


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("lenet", True),
        ("resnet18#1", True),
        ("tv:resnet18@IMAGENET1K_V1", True),
        ("py:a.py:make", True),
        ("py:a.py:make@own", False),
        ("py:a.py:make@w.pth", False),
        ("resnet18@w.safetensors", False),
        ("some/where.safetensors", False),
    ],
)
def test_what_brings_its_weights_is_not_trained(name, possible):
    assert can_be_trained(parse(name)) is possible
    assert not can_be_trained(parse(name), Path("map.yaml"))


# --- Runs and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["run", "run/model.safetensors", "run/controls/labels.safetensors"])
def test_a_run_or_a_file_is_a_teacher_without_training(
    tmp_path, few_digits, trained, no_training, monkeypatch, where
):
    monkeypatch.chdir(tmp_path)
    inside = where if where.endswith(".safetensors") else "run/model.safetensors"
    save_classifier(tmp_path / inside, trained.classifier)
    teacher = load_teacher(where, few_digits)
    assert teacher.label == ("labels" if "labels" in where else "run")
    assert (teacher.origin, teacher.fingerprint) == (where, trained.fingerprint)
    assert not any(p.requires_grad for p in teacher.classifier.parameters())


DIGITS = ", ".join("0123456789")


@pytest.mark.parametrize(
    ("classes", "what", "listed"),
    [
        ("012345678", "'run' has 9 classes, and digits has 10", "0, 1, 2, 3, 4, 5, 6, 7, 8"),
        ("abcdefghij", "'run' has other classes than digits", "a, b, c, d, e, f, g, h, i, j"),
    ],
)
def test_a_file_of_other_classes_is_refused_with_both_lists(tmp_path, few_digits, classes, what, listed):
    classifier = new_classifier(parse("lenet"), replace(few_digits, classes=tuple(classes)))
    save_classifier(tmp_path / "run" / "student.safetensors", classifier)
    with refused(
        ModelError,
        what,
        f"its classes: {listed}; those of digits: {DIGITS}",
        "say which are which: --class-map run=FILE.yaml, or train it on digits",
    ):
        load_teacher(str(tmp_path / "run"), few_digits)


def test_the_classes_of_a_file_are_put_in_order(tmp_path, few_digits):
    classifier = new_classifier(parse("lenet"), replace(few_digits, classes=tuple("9876543210"))).eval()
    save_classifier(tmp_path / "run" / "student.safetensors", classifier)
    teacher = load_teacher(str(tmp_path / "run"), few_digits)
    with torch.no_grad():
        expected = classifier(few_digits.val.pixels).flip(1)
    torch.testing.assert_close(teacher.all_logits(few_digits.val), expected)
    assert teacher.discarded(few_digits.val) == pytest.approx(0, abs=1e-6)


def test_an_untrained_network_cannot_be_taken_as_it_is(few_digits, own_cache):
    with refused(
        ModelError,
        "'lenet' brings no weights of its own",
        "only a module of yours can: py:FILE.py:factory@own",
        "leave @own out, and it is trained",
    ):
        load_teacher("lenet@own", few_digits)


# --- Modules of the user's own -------------------------------------------------------------------

MINE = """
import torch
from torch import nn

def make(num_classes, channels):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, num_classes))
    nn.init.constant_(net[2].bias, {bias})
    return net
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace("{bias}", "1.0"))
    return path


def test_a_module_of_yours_is_trained_once(few_digits, own_cache, mine, monkeypatch):
    name = f"py:{mine}:make"
    first = load_teacher(name, few_digits, training=ONE)
    with monkeypatch.context() as patch, logged() as lines:
        patch.setattr(registry, "train_on_labels", lambda *_, **__: pytest.fail("trained again"))
        again = load_teacher(name, few_digits, training=ONE)
    assert lines == ["INFO: teacher make: from the library"]
    assert (first.label, again.origin, again.fingerprint) == ("make", first.origin, first.fingerprint)
    mine.write_text(MINE.replace("{bias}", "2.0"))
    with pytest.raises(ModelError, match="not in the library"):
        load_teacher(name, few_digits, training=ONE, train=False)


def test_a_module_of_yours_may_lie_below_home(few_digits, own_cache, mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine.parent))
    assert load_teacher("py:~/mine.py:make", few_digits, training=ONE).label == "make"


@pytest.mark.parametrize("kind", ["card", "bare", "pth"])
def test_a_module_of_yours_takes_a_file(tmp_path, few_digits, mine, no_training, kind):
    classifier = new_classifier(parse(f"py:{mine}:make"), few_digits, seed=7)
    path = tmp_path / ("weights.pth" if kind == "pth" else "weights.safetensors")
    if kind == "card":
        save_classifier(path, classifier)
    elif kind == "bare":
        safetensors.torch.save_file(classifier.net.state_dict(), path)
    else:
        torch.save(classifier.net.state_dict(), path)
    teacher = load_teacher(f"py:{mine}:make@{path}", few_digits)
    assert teacher.fingerprint == classifier.fingerprint()
    assert (teacher.label, teacher.origin) == ("make", str(path))


def test_a_module_of_yours_is_taken_as_it_is(few_digits, mine, no_training):
    teacher = load_teacher(f"py:{mine}:make@own", few_digits)
    assert teacher.classifier.net[2].bias.tolist() == [1.0] * 10
    assert teacher.label == "make"


def test_weights_of_another_module_are_refused(tmp_path, few_digits, mine):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(10, 16)}, path)
    with refused(
        WeightsError,
        f"{path} is of another architecture than Sequential",
        "of 2 tensors, 2 are missing and 0 have another shape",
        "name the architecture that the file was made with",
    ):
        load_teacher(f"py:{mine}:make@{path}", few_digits)


# --- The list of models --------------------------------------------------------------------------


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_models_whose_name_contains_a_part_are_listed(own_cache):
    found = list_models("lenet", limit=1)
    assert found["models"] == [
        {
            "name": "lenet",
            "parameters": parameters(STUDENTS["lenet"](10, 3, 32)),
            "input_size": [3, 32, 32],
            "weights": "none",
        }
    ]
    assert found["matches"] == len(find("lenet")) > 10  # mobilenets and googlenet contain it
    assert found["trained"] == []


def test_models_that_match_a_pattern_are_listed_with_published_counts(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = list_models("tv:squeezenet*")
    assert found["matches"] == 2
    assert [list(row.values()) for row in found["models"]] == [
        ["tv:squeezenet1_0", 1_248_424, [3, 224, 224], "download"],
        ["tv:squeezenet1_1", 1_235_496, [3, 224, 224], "download"],
    ]


@pytest.mark.parametrize("name", ["tv:regnet_y_400mf", "tv:inception_v3", "timm:vit_tiny_patch16_224"])
def test_every_model_has_a_count(own_cache, name):
    known = {
        "tv:regnet_y_400mf": 4_344_144,
        "tv:inception_v3": 23_834_568,  # without the auxiliary head
        "timm:vit_tiny_patch16_224": 5_717_416,
    }
    (row,) = list_models(name.replace("400mf", "400m?"), limit=1)["models"]
    assert (row["name"], row["parameters"]) == (name, known[name])


def test_without_a_pattern_own_networks_and_trained_teachers_are_listed(few_digits, trained):
    found = list_models()
    assert [row["name"] for row in found["models"]] == list(STUDENTS)
    (row,) = found["trained"]
    assert (row["name"], row["data"], row["seed"], row["folder"]) == ("lenet", "digits", 0, trained.origin)
    assert 0 <= row["val_accuracy"] <= 1
    assert list_models("resnet8", limit=1)["trained"] == []


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("lenett", "did you mean 'lenet'?"),
        ("tv:resnett18", "did you mean 'tv:resnet18'?"),
        ("qqqqqqqq", "try a shorter part of the name"),
    ],
)
def test_a_pattern_without_a_match_is_refused(own_cache, pattern, fix):
    with pytest.raises(ModelError) as caught:
        list_models(pattern)
    assert str(caught.value) == message(
        f"no model matches {pattern!r}", "neither this project, timm nor torchvision has one", fix
    )


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("own:*", ["lenet", "cifar-quick", "resnet8", "resnet20"]),
        ("tv:squeeze", ["tv:squeezenet1_0", "tv:squeezenet1_1"]),
        ("tv:vgg1[16]", ["tv:vgg11", "tv:vgg16"]),
        ("tv:vgg?9", ["tv:vgg19"]),
        ("nothing-of-that-name", []),
    ],
)
def test_patterns_are_those_of_the_shell(pattern, names):
    assert [name.canonical for name in find(pattern)] == names
