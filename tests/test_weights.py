"""Files of weights: the same logits and the same bytes again, and nothing but one clear message otherwise."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import message, refused
from torch import nn

from ensemble_kd import files
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import WeightsError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.students import STUDENTS
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.weights import fill, load_student, read_card, save_classifier

NAMES = ("lenet", "resnet8", "timm:mobilenetv3_small_050", "tv:squeezenet1_1")


@pytest.fixture
def lenet(digits: Dataset) -> Classifier:
    return new_classifier(parse("lenet"), digits).eval()


@pytest.fixture
def lenet_file(tmp_path: Path, lenet: Classifier) -> Path:
    save_classifier(tmp_path / "lenet.safetensors", lenet)
    return tmp_path / "lenet.safetensors"


@torch.no_grad()
def digest_of_logits(classifier: Classifier, digits: Dataset) -> str:
    logits = classifier(digits.test.pixels[:8])
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


# --- The same again ------------------------------------------------------------------------------

OTHER_PROCESS = """
import hashlib, json, sys, torch
from pathlib import Path
from ensemble_kd.data import load_data
from ensemble_kd.files import sha256_file
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.weights import load_student, save_classifier

given, made = Path(sys.argv[1]), Path(sys.argv[2])
digits, found = load_data("digits"), {}
for number, name in enumerate(sys.argv[3:]):
    with torch.no_grad():
        logits = load_student(given / f"{number}.safetensors")(digits.test.pixels[:8])
    save_classifier(made / f"{number}.safetensors", new_classifier(parse(name), digits, seed=number))
    found[name] = [hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest(),
                   sha256_file(made / f"{number}.safetensors")]
print(json.dumps(found))
"""


def test_logits_and_bytes_are_the_same_here_and_in_another_process(tmp_path, digits):
    """Own networks and small-image forms of both libraries; the other process orders its sets otherwise."""
    expected = {}
    for number, name in enumerate(NAMES):
        classifier = new_classifier(parse(name), digits, seed=number).eval()
        path = tmp_path / f"{number}.safetensors"
        save_classifier(path, classifier)
        loaded = load_student(path)
        logits = digest_of_logits(classifier, digits)
        assert digest_of_logits(loaded, digits) == logits
        assert (loaded.card, loaded.training, loaded.pretrained) == (classifier.card, False, True)
        save_classifier(tmp_path / "again.safetensors", loaded)
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
        expected[name] = [logits, files.sha256_file(path)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    result = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), str(tmp_path / "made"), *NAMES],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert json.loads(result.stdout) == expected


def test_the_header_holds_the_card_and_nothing_that_changes(lenet_file, lenet):
    with safetensors.safe_open(lenet_file, framework="pt") as file:
        assert list(file.metadata()) == ["ensemble_kd"]
        assert json.loads(file.metadata()["ensemble_kd"]) == json.loads(json.dumps(lenet.card.to_json()))


@pytest.mark.parametrize(
    "name",
    [
        "tv:regnet_y_400mf",  # cannot be built without memory
        "tv:mnasnet0_5",  # looks at the version of what it loads
        "timm:levit_128s",  # has buffers that are not saved
    ],
)
def test_networks_with_ways_of_their_own_survive(tmp_path, digits, name):
    classifier = new_classifier(parse(name), digits).eval()
    save_classifier(tmp_path / "x.safetensors", classifier)
    loaded = load_student(tmp_path / "x.safetensors")
    assert digest_of_logits(loaded, digits) == digest_of_logits(classifier, digits)


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path, lenet, digits):
    """A safetensors file begins with the length of its header; one in 32 begins with 0x80."""
    path = tmp_path / "x.safetensors"
    for length in range(300):
        classifier = Classifier(lenet.net, replace(lenet.card, data="d" * length))
        save_classifier(path, classifier)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert digest_of_logits(load_student(path), digits) == digest_of_logits(lenet, digits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(tmp_path, digits, lenet, dtype):
    tensors = {key: value.to(dtype) for key, value in lenet.net.state_dict().items()}
    classifier = load_teacher(f"lenet@{bare(tmp_path / 'x.safetensors', tensors)}", digits).classifier
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    images = digits.test.pixels[:8]
    torch.testing.assert_close(classifier(images), lenet(images).detach(), atol=0.02, rtol=0.02)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_tied_weights_stay_tied(tmp_path):
    card = Card("lenet", "stock", Preprocess(1, (2, 2), (0.0,), (1.0,)), ("a", "b", "c", "d"))
    save_classifier(tmp_path / "tied.safetensors", Classifier(Tied(), card))
    tensors = safetensors.torch.load_file(tmp_path / "tied.safetensors")
    net = Tied()
    fill(net, tensors, tmp_path / "tied.safetensors")
    assert sorted(tensors) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert net.second.weight is net.first.weight
    assert net.first.weight.equal(tensors["first.weight"])


@pytest.mark.parametrize("inside", ["student.safetensors", "model.safetensors"])
def test_a_run_folder_stands_for_its_file(tmp_path, lenet, digits, inside):
    save_classifier(tmp_path / "run" / inside, lenet)
    expected = digest_of_logits(lenet, digits)
    for path in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / inside):
        assert digest_of_logits(load_student(path), digits) == expected


def test_class_names_of_any_kind_survive(tmp_path, lenet):
    names = ("[/b]", "x$\\frac$", "<script>", "猫", "y" * 200, '"', "\\", "é", "a b", "")
    save_classifier(tmp_path / "x.safetensors", Classifier(lenet.net, replace(lenet.card, classes=names)))
    assert load_student(tmp_path / "x.safetensors").classes == names


# --- Modules of the user's own -------------------------------------------------------------------

MINE = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

def make(num_classes, channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, num_classes))
"""


@pytest.fixture
def mine(tmp_path: Path, digits: Dataset) -> tuple[Path, Path, Classifier]:
    """A Python file, a file of weights that belongs to it, and the classifier that was saved."""
    code, weights = tmp_path / "mine.py", tmp_path / "mine.safetensors"
    code.write_text(MINE)
    classifier = new_classifier(parse(f"py:{code}:make"), digits).eval()
    save_classifier(weights, classifier)
    (tmp_path / "ran").unlink()
    return code, weights, classifier


def test_a_file_alone_runs_no_code(tmp_path, mine):
    code, weights, _ = mine
    with refused(
        WeightsError,
        f"{weights} belongs to a module of your own",
        "code is run only where you name it",
        f"name the code and the file together: py:{code}:make@{weights}",
    ):
        load_student(weights)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("home", [False, True], ids=["absolute", "below ~"])
def test_a_file_whose_code_is_named_is_loaded(tmp_path, mine, digits, monkeypatch, home):
    code, weights, classifier = mine
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "py:~/mine.py:make@~/mine.safetensors" if home else f"py:{code}:make@{weights}"
    assert digest_of_logits(load_student(text), digits) == digest_of_logits(classifier, digits)


def test_code_without_a_file_is_refused(mine):
    text = f"py:{mine[0]}:make"
    with refused(
        WeightsError, f"{text} names no weights", "only the code is named", f"say {text}@FILE.safetensors"
    ):
        load_student(text)


# --- What is refused -----------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class Payload:
    """A pickle that runs a command when it is opened."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch '{target}'"

    def __reduce__(self):
        return (os.system, (self.command,))


def test_a_missing_path_is_refused(tmp_path):
    path = tmp_path / "gone"
    with refused(
        WeightsError, f"no run folder or file at {path}", "there is nothing at that path", "check the path"
    ):
        load_student(path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with refused(
        WeightsError,
        f"{tmp_path} is a folder without student.safetensors or model.safetensors",
        "it is no finished run",
        "name a finished run folder, or a .safetensors file",
    ):
        load_student(tmp_path)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_folder_is_no_file_of_weights(tmp_path, digits, ending):
    path = tmp_path / f"folder.{ending}"
    path.mkdir()
    with refused(
        WeightsError, f"{path} is a folder", "a file of weights is wanted here", "name the file in it"
    ):
        load_teacher(f"lenet@{path}", digits)


def test_a_missing_file_of_weights_is_refused(tmp_path, digits):
    path = tmp_path / "gone.pth"
    with refused(
        WeightsError, f"no file of weights at {path}", "there is nothing at that path", "check the path"
    ):
        load_teacher(f"lenet@{path}", digits)


PICKLE = pickle.dumps({"a": 1})
DAMAGES = {
    "empty": (b"", "{} is empty", "a download or a copy was cut off", "fetch the file again"),
    "lfs": (
        LFS,
        "{} is a Git-LFS pointer, not the weights",
        "the repository was cloned without its large files",
        "run `git lfs pull` in it",
    ),
    "pickle": (
        PICKLE,
        "{} is a pickle under the name of a safetensors file",
        "pickles can run code, so it is not opened",
        "ask its author for a real safetensors file, or rename it to .pth (tensors alone are then read)",
    ),
    "zip": (
        b"PK\x03\x04" + bytes(60),
        "{} is a pickle under the name of a safetensors file",
        "pickles can run code, so it is not opened",
        "ask its author for a real safetensors file, or rename it to .pth (tensors alone are then read)",
    ),
}


@pytest.mark.parametrize("way", ["{}", "lenet@{}"], ids=["alone", "named"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_of_another_kind_is_refused(tmp_path, digits, damage, way):
    content, what, why, fix = DAMAGES[damage]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with refused(WeightsError, what.format(path), why, fix):
        load_teacher(way.format(path), digits)


@pytest.mark.parametrize("damage", ["empty", "lfs"])
def test_a_pth_file_of_another_kind_is_refused(tmp_path, digits, damage):
    content, what, why, fix = DAMAGES[damage]
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with refused(WeightsError, what.format(path), why, fix):
        load_teacher(f"lenet@{path}", digits)


@pytest.mark.parametrize("length", [4, 100, -1])
def test_a_truncated_file_is_refused(lenet_file, length):
    lenet_file.write_bytes(lenet_file.read_bytes()[:length])
    with pytest.raises(WeightsError) as caught:
        load_student(lenet_file)
    problem = caught.value.problems[0]
    assert problem.what == f"{lenet_file} is damaged or cut off"
    assert problem.why.startswith("Error while deserializing header")
    assert problem.fix == "fetch or make the file again"


@pytest.mark.parametrize("form", ["pickle", "torch", "torch in a dictionary"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_malicious_pickle_is_never_executed(tmp_path, digits, form, ending):
    path, mark = tmp_path / f"evil.{ending}", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark), protocol=2))
    else:
        torch.save(Payload(mark) if form == "torch" else {"state_dict": {"x": Payload(mark)}}, path)
    for load in (load_student, lambda p: load_teacher(f"lenet@{p}", digits)):
        with pytest.raises(WeightsError):
            load(path)
    assert not mark.exists()
    with path.open("rb") as file:  # the payload works: the test would notice
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)  # noqa: S301
    assert mark.exists()


def test_a_pickle_of_objects_is_refused_with_the_way_out(tmp_path, digits):
    path = tmp_path / "whole.pth"
    torch.save(STUDENTS["lenet"](10, 1, 28), path)
    with refused(
        WeightsError,
        f"{path} is not a plain file of weights",
        "it holds Python objects other than tensors, which are never loaded",
        "save its state_dict() alone, best as safetensors",
    ):
        load_teacher(f"lenet@{path}", digits)


@pytest.mark.parametrize(
    ("content", "kind"), [([torch.zeros(2)], "list"), ({"a": 1}, "dict"), (torch.zeros(2), "Tensor")]
)
def test_a_pth_without_a_state_dict_is_refused(tmp_path, digits, content, kind):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with refused(
        WeightsError, f"{path} holds no state_dict", f"it holds a {kind}", "save model.state_dict()"
    ):
        load_teacher(f"lenet@{path}", digits)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_under_the_usual_names(tmp_path, digits, lenet, nested, prefix):
    tensors = {prefix + key: value for key, value in lenet.net.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({nested: tensors, "epoch": 3} if nested else tensors, path)
    teacher = load_teacher(f"lenet@{path}", digits)
    assert teacher.classifier.fingerprint() == lenet.fingerprint()


def bare(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A safetensors file without a card."""
    safetensors.torch.save_file(tensors, path)
    return path


def test_bare_safetensors_need_a_name(tmp_path, digits, lenet):
    path = bare(tmp_path / "bare.safetensors", lenet.net.state_dict())
    with refused(
        WeightsError,
        f"{path} does not say which network it belongs to",
        "it was not written by ensemble-kd",
        f"name the architecture before it: resnet18@{path}",
    ):
        load_student(path)
    assert load_teacher(f"lenet@{path}", digits).classifier.fingerprint() == lenet.fingerprint()


def test_a_pth_file_needs_a_name(tmp_path, lenet):
    path = tmp_path / "weights.pth"
    torch.save(lenet.net.state_dict(), path)
    with refused(
        WeightsError,
        f"{path} does not say which network it belongs to",
        "it was not written by ensemble-kd",
        f"name the architecture before it: resnet18@{path}",
    ):
        load_student(path)


def test_another_architecture_is_refused(tmp_path, digits, lenet):
    path = bare(tmp_path / "x.safetensors", lenet.net.state_dict())
    count = len(STUDENTS["resnet8"](10, 1, 28).state_dict())
    with refused(
        WeightsError,
        f"{path} is of another architecture than SmallResNet",
        f"of {count} tensors, {count} are missing and 0 have another shape",
        "name the architecture that the file was made with",
    ):
        load_teacher(f"resnet8@{path}", digits)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"features.0.bias": None}, "missing: features.0.bias; not known: none"),
        ({"head.weight": torch.zeros(1)}, "missing: none; not known: head.weight"),
        (
            {"features.0.bias": None, "features.3.bias": None, "features.0.b": torch.zeros(6)},
            "missing: features.0.bias, features.3.bias; not known: features.0.b",
        ),
        (
            {f"extra{number}": torch.zeros(1) for number in range(5)},
            "missing: none; not known: extra0, extra1, extra2 … and 2 more",
        ),
    ],
)
def test_missing_and_unknown_keys_are_listed(tmp_path, digits, lenet, changes, why):
    tensors = {**lenet.net.state_dict(), **changes}
    path = bare(tmp_path / "x.safetensors", {k: v for k, v in tensors.items() if v is not None})
    with refused(
        WeightsError,
        f"{path} does not fit LeNet",
        why,
        "rename the keys, or name the architecture that the file was made with",
    ):
        load_teacher(f"lenet@{path}", digits)


def test_another_number_of_classes_is_refused(tmp_path, digits):
    path = bare(tmp_path / "x.safetensors", STUDENTS["lenet"](7, 1, 28).state_dict())
    with refused(
        WeightsError,
        f"{path} does not fit LeNet",
        "classifier.4.weight is (7, 84) in the file and (10, 84) in the network",
        "classes, channels or stem differ: use weights made for this data (or --stem imagenet)",
    ):
        load_teacher(f"lenet@{path}", digits)


def with_card(path: Path, lenet: Classifier, card: str) -> Path:
    path.write_bytes(safetensors.torch.save(lenet.net.state_dict(), metadata={"ensemble_kd": card}))
    return path


@pytest.mark.parametrize(
    "damage", ["{", "[]", "null", "{}", '"lenet"', "no classes", "no preprocess", "no model"]
)
def test_a_damaged_card_is_refused(tmp_path, lenet, damage):
    card = damage
    if damage.startswith("no "):
        values = lenet.card.to_json()
        del values[damage.removeprefix("no ")]
        card = json.dumps(values)
    path = with_card(tmp_path / "x.safetensors", lenet, card)
    with pytest.raises(WeightsError) as caught:
        read_card(path)
    problem = caught.value.problems[0]
    assert (problem.what, problem.fix) == (f"{path} is damaged or cut off", "fetch or make the file again")


@pytest.mark.parametrize(
    "values",
    [
        {"model": "lanet"},
        {"model": "tv:lanet"},
        {"model": "/some/where.safetensors"},
        {"model": 3},
        {"model": "timm:resnet18.no_such_tag"},
        {"classes": ["a", "b"]},
        {"preprocess": {"channels": 1, "size": [12, 12], "mean": [0.3], "std": [0.4]}},
        {"preprocess": {"channels": "x", "size": [28, 28], "mean": [0.3], "std": [0.4]}},
        {"preprocess": {"channels": 1, "size": [], "mean": [0.3], "std": [0.4]}},
        {"preprocess": {"channels": 1, "size": [28, 28], "mean": [0.3, 0.3], "std": [0.4]}},
        {"preprocess": {"channels": 1, "size": [28, 28], "mean": ["x"], "std": [0.4]}},
        {"preprocess": 5},
    ],
    ids=str,
)
def test_a_card_with_impossible_values_is_refused(tmp_path, lenet, values):
    path = with_card(tmp_path / "x.safetensors", lenet, json.dumps({**lenet.card.to_json(), **values}))
    with pytest.raises(WeightsError):
        load_student(path)


def test_a_card_fetches_nothing(tmp_path, lenet, monkeypatch):
    """A file can name a network on the hub, but opening a file is no reason to go there."""
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("the hub was asked"))
    values = {**lenet.card.to_json(), "model": "hf-hub:some/where"}
    with pytest.raises(WeightsError):
        load_student(with_card(tmp_path / "x.safetensors", lenet, json.dumps(values)))


# --- Random damage -------------------------------------------------------------------------------


def mutants(data: bytes, count: int, head: int) -> list[bytes]:
    """Copies of `data` that are cut off, or have one or two bits of their first `head` bytes flipped."""
    rng, made = random.Random(0), []
    for number in range(count):
        copy = bytearray(data[: rng.randrange(len(data))] if number % 4 == 0 else data)
        for _ in range(min(2, number % 4)):
            copy[rng.randrange(head)] ^= 1 << rng.randrange(8)
        made.append(bytes(copy))
    return made


def outcomes(path: Path, content: bytes, load, head: int) -> list[str]:
    """What became of 300 mutants: `loaded`, `refused`, or the type and text of any other error."""
    found = []
    for mutant in mutants(content, 300, head):
        path.write_bytes(mutant)
        try:
            load(path)
            found.append("loaded")
        except WeightsError:
            found.append("refused")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_damaged_file_loads_with_the_same_keys_or_is_refused(lenet_file, lenet):
    content, keys = lenet_file.read_bytes(), lenet.net.state_dict().keys()
    (header,) = struct.unpack("<Q", content[:8])

    def load(path: Path) -> None:
        assert load_student(path).net.state_dict().keys() == keys

    found = outcomes(lenet_file, content, load, 8 + header)
    assert set(found) <= {"loaded", "refused"}
    assert found.count("refused") > 200


def test_a_damaged_bare_file_loads_with_the_same_keys_or_is_refused(tmp_path, digits, lenet):
    """Without a card between: names, shapes and types of the tensors themselves are hit."""
    path = bare(tmp_path / "x.safetensors", lenet.net.state_dict())
    content, name = path.read_bytes(), f"lenet@{path}"
    (header,) = struct.unpack("<Q", content[:8])
    found = outcomes(path, content, lambda _: load_teacher(name, digits), 8 + header)
    assert set(found) <= {"loaded", "refused"}
    assert found.count("refused") > 200


@pytest.mark.filterwarnings("ignore")  # torch warns of pickles in a form that it does not expect
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_pth_file_loads_or_is_refused(tmp_path, digits, zipped):
    path = tmp_path / "x.pth"
    net = nn.Linear(4, 2)
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()

    def load(path: Path) -> None:
        from ensemble_kd.weights import read_tensors

        fill(nn.Linear(4, 2), read_tensors(path), path)

    found = outcomes(path, content, load, len(content) // 2)
    assert set(found) <= {"loaded", "refused"}
    assert found.count("refused") > 100


# --- Writing files -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["replace", "fsync", "open", "fdopen"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_symbolic_link_is_followed_not_replaced(tmp_path):
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    files.write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_write_makes_its_folder(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "c.txt", "ä")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "ä".encode()


def test_json_has_null_for_what_json_cannot_say(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, 2)], 3: {"c": Path("x/y")}, "d": "nan"}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} was written")) == {
        "a": None,
        "b": [1.5, None, [None, 2]],
        "3": {"c": "x/y"},
        "d": "nan",
    }
    assert text.endswith("}\n")
    assert files.read_json(tmp_path / "x.json")["b"][0] == 1.5


def test_json_lines_are_written_and_read(tmp_path):
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": math.nan}]
    files.write_text(tmp_path / "x.jsonl", "".join(map(files.json_line, rows)))
    assert files.read_json_lines(tmp_path / "x.jsonl") == [rows[0], {"epoch": 2, "loss": None}]


def test_the_hash_of_a_value_does_not_depend_on_the_order_of_keys():
    one, other = {"a": 1, "b": {"c": [1, 2], "d": 3}}, {"b": {"d": 3, "c": [1, 2]}, "a": 1}
    assert files.sha256_json(one) == files.sha256_json(other)
    assert files.sha256_json(one) == hashlib.sha256(b'{"a":1,"b":{"c":[1,2],"d":3}}').hexdigest()
    assert files.sha256_json({**one, "a": 2}) != files.sha256_json(one)
    assert files.sha256_json({"a": [1, 2]}) != files.sha256_json({"a": [2, 1]})


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/some/cache", "/xdg", "/some/cache"),
        ("~/mine", "/xdg", "/home/someone/mine"),
        (None, "/xdg", "/xdg/ensemble-kd"),
        ("", "/xdg", "/xdg/ensemble-kd"),
        (None, None, "/home/someone/.cache/ensemble-kd"),
        (None, "", "/home/someone/.cache/ensemble-kd"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, own, xdg, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("EKD_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert files.cache_dir() == Path(expected)


def test_a_message_has_three_lines():
    error = WeightsError("what", "why", "fix")
    assert str(error) == message("what", "why", "fix")
