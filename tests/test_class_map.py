"""Class maps: a teacher's classes reordered, grouped or partly known, and what is refused before training."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from scipy.special import log_softmax, logsumexp, softmax
from support import logged, message, refused
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision import models as tv
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import distillation
from ensemble_kd.calibration import fit_temperature
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.cli import app
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.distillation import distill
from ensemble_kd.errors import ConfigError, ModelError, WeightsError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.imagenet import aliases, class_names
from ensemble_kd.metrics import within
from ensemble_kd.models import parse
from ensemble_kd.resuming import resume
from ensemble_kd.runs import Run
from ensemble_kd.students import STUDENTS
from ensemble_kd.tables import metrics_table
from ensemble_kd.teachers import registry
from ensemble_kd.teachers.class_map import NO_VOTE, ClassMap, map_classes, read_map
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.weights import save_classifier

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOBILENET = "mobilenetv3_small_050"
SQUEEZENET = "tv:squeezenet1_1"
QUICK = {"epochs": 1, "teacher_epochs": 1, "limit_train": 200}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write(folder: Path, text: str, name: str = "map.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- The logits of the data's classes --------------------------------------------------------------

GROUPS = {
    "another order": ((2,), (0,), (3,), (1,)),
    "a part of the outputs": ((6,), (0,), (3,)),
    "groups": ((0, 3), (1,), (2, 4, 5)),
    "all outputs in groups": ((0, 7), (1, 6, 2), (5, 4, 3)),
    "some classes known": ((1,), (), (0,), ()),
    "some known by groups": ((), (1, 5), (), (0,), (2, 3, 7)),
}
OUTPUTS = dict.fromkeys(GROUPS, 8) | {"another order": 4}
SUBSETS = ("some classes known", "some known by groups")


def random_logits(name: str) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (40, OUTPUTS[name]))


def probabilities(logits: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Sums of the teacher's probabilities, and what they are of all that falls into the map."""
    p = softmax(logits, axis=1)
    sums = np.stack([p[:, list(group)].sum(axis=1) for group in groups], axis=1)
    return sums / sums.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPS)
def test_a_class_has_the_sum_of_its_groups_probability_within_the_map(name, dtype):
    groups = GROUPS[name]
    logits = random_logits(name)
    mapped = ClassMap(groups).apply(torch.tensor(logits, dtype=dtype))
    assert mapped.shape == (40, len(groups))
    assert mapped.dtype == dtype
    atol = 1e-6 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(mapped.double().softmax(1), probabilities(logits, groups), atol=atol)


@pytest.mark.parametrize("name", ["another order", "a part of the outputs"])
def test_one_output_a_class_gives_the_outputs_themselves(name):
    """To the bit, and not normalised: tempering then works as it does without a map."""
    groups = GROUPS[name]
    logits = torch.tensor(random_logits(name)).float()
    mapped = ClassMap(groups).apply(logits)
    for place, (output,) in enumerate(groups):
        assert mapped[:, place].equal(logits[:, output])


@pytest.mark.parametrize("name", ["groups", "all outputs in groups"])
def test_a_groups_logit_is_the_log_of_its_summed_exponentials(name):
    groups = GROUPS[name]
    logits = random_logits(name)
    mapped = ClassMap(groups).apply(torch.tensor(logits))
    expected = [logsumexp(logits[:, list(group)], axis=1) for group in groups]
    np.testing.assert_allclose(mapped, np.stack(expected, axis=1), atol=1e-13)


@pytest.mark.parametrize("name", SUBSETS)
def test_a_class_that_is_not_known_has_no_vote(name):
    groups = GROUPS[name]
    class_map, logits = ClassMap(groups), torch.tensor(random_logits(name))
    mapped = class_map.apply(logits)
    known = torch.tensor([len(group) > 0 for group in groups])
    assert class_map.known.equal(known)
    assert (mapped[:, ~known] == NO_VOTE).all()
    assert (mapped.softmax(1)[:, ~known] == 0).all()
    # Within the known classes these are log-probabilities, whatever the teacher says of the rest.
    torch.testing.assert_close(mapped[:, known].exp().sum(1), torch.ones(40, dtype=torch.float64))
    shifted = class_map.apply(logits + torch.randn(40, 1, dtype=torch.float64))
    torch.testing.assert_close(shifted, mapped)


@pytest.mark.parametrize("name", ["a part of the outputs", "groups", *SUBSETS])
def test_outputs_outside_the_map_move_the_discarded_mass_alone(name):
    groups = GROUPS[name]
    class_map, logits = ClassMap(groups), torch.tensor(random_logits(name))
    outside = sorted(set(range(logits.shape[1])) - {output for group in groups for output in group})
    assert outside
    louder = logits.clone()
    louder[:, outside] += 5
    assert class_map.apply(louder).equal(class_map.apply(logits))
    assert (class_map.discarded(louder) > class_map.discarded(logits)).all()


@pytest.mark.parametrize("name", GROUPS)
def test_the_discarded_mass_is_what_the_map_leaves_out(name):
    groups = GROUPS[name]
    logits = random_logits(name)
    kept = softmax(logits, axis=1)[:, [output for group in groups for output in group]].sum(axis=1)
    discarded = ClassMap(groups).discarded(torch.tensor(logits).float())
    np.testing.assert_allclose(discarded, 1 - kept, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPS)
def test_extreme_logits_stay_finite(name, dtype):
    groups = GROUPS[name]
    count = OUTPUTS[name]
    rows = torch.cat([1e4 * torch.eye(count), -1e4 * torch.eye(count), torch.zeros(1, count)])
    rows = torch.cat([rows, 2 * rows[:count] - 1e4])  # one output high, all others low
    class_map = ClassMap(groups)
    mapped = class_map.apply(rows.to(dtype))
    assert mapped.isfinite().all()
    assert mapped.log_softmax(1).isfinite().all()
    assert class_map.discarded(rows.to(dtype)).isfinite().all()
    if dtype == torch.float64:
        z = rows.double().numpy()
        expected = np.full((len(z), len(groups)), -np.inf)
        for place, group in enumerate(groups):
            if group:
                expected[:, place] = logsumexp(z[:, list(group)], axis=1)
        np.testing.assert_allclose(mapped.softmax(1), softmax(expected, axis=1), atol=1e-12)


def test_the_discarded_mass_of_extreme_logits_is_none_or_all():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 1e4], [0.0, -1e4, 0.0]])
    assert ClassMap(((0,), (1,))).discarded(logits).tolist() == [0.0, 1.0, 0.5]


# --- The file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups", "teacher_classes"),
    [
        ("cat: tabby", {"cat": ["tabby"]}, None),
        ("cat: [tabby, 282]\ndog: 207", {"cat": ["tabby", "282"], "dog": ["207"]}, None),
        ("cat:\n  - tabby\n  - tiger cat", {"cat": ["tabby", "tiger cat"]}, None),
        ("cat: tabby, tabby cat", {"cat": ["tabby, tabby cat"]}, None),
        ("cat: null\ndog:\nemu: []\nfox: ~", {"cat": [], "dog": [], "emu": [], "fox": []}, None),
        ("1: one\n2: [2, two]", {"1": ["one"], "2": ["2", "two"]}, None),
        ("cat: 'yes'\ndog: \"no\"\nemu: 'on'", {"cat": ["yes"], "dog": ["no"], "emu": ["on"]}, None),
        ("map: tabby", {"map": ["tabby"]}, None),
        ("teacher_classes: 3\nmap: {cat: 2, dog: [0, 1]}", {"cat": ["2"], "dog": ["0", "1"]}, ("0", "1", "2")),
        ("map:\n  cat: b\nteacher_classes: [a, b, 3]", {"cat": ["b"]}, ("a", "b", "3")),
    ],
)  # fmt: skip
def test_a_file_says_classes_by_the_teachers(tmp_path, text, groups, teacher_classes):
    file = read_map(write(tmp_path, text))
    assert (file.groups, file.teacher_classes) == (groups, teacher_classes)
    assert file.path == tmp_path / "map.yaml"


@pytest.mark.parametrize(
    "written", ["yes", "no", "on", "off", "true", "False", "010", "0x1F", "1e3", "1.50", "2020-01-31", "1_0"]
)
def test_names_are_read_as_they_are_written(tmp_path, written):
    """YAML would take them for truth values, numbers and dates: 010 is eight, and no is false."""
    assert read_map(write(tmp_path, f"cat: {written}")).groups == {"cat": [written]}
    assert read_map(write(tmp_path, f"cat: [a, {written}]")).groups == {"cat": ["a", written]}
    assert read_map(write(tmp_path, f"{written}: a")).groups == {written: ["a"]}
    text = f"teacher_classes: [{written}, a]\nmap: {{cat: {written}}}"
    assert read_map(write(tmp_path, text)).teacher_classes == (written, "a")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("cat: {a: b}", "cat", "{'a': 'b'}"),
        ("cat: [[tabby]]", "cat", "[['tabby']]"),
        ("dog: a\ncat: [b, {c: d}]", "cat", "['b', {'c': 'd'}]"),
        ("map: {cat: tabby}", "map", "{'cat': 'tabby'}"),
        ("teacher_classes: 3\nmap: {cat: 1}\nmore: 2", "map", "{'cat': '1'}"),
        ("teacher_classes: 3\nmap: {cat: [[1]]}", "cat", "[['1']]"),
    ],
)
def test_a_value_that_is_no_class_is_refused(tmp_path, text, name, value):
    path = write(tmp_path, text)
    with refused(
        ConfigError,
        f"{path}: {name!r} has {value}",
        "a class of the data takes the teacher's class, or a list of them",
        f"say {name}: [first class, second class]",
    ):
        read_map(path)


UNREADABLE = [
    ("cat: a\ncat: b", ", line 2", "the key 'cat' stands there twice"),
    ("1: a\n'1': b", ", line 2", "the key '1' stands there twice"),
    ("teacher_classes: 2\nmap:\n  cat: a\n  cat: b", ", line 4", "the key 'cat' stands there twice"),
    ("[a]: b", ", line 1", "['a'] is no key"),
    ("? {a: b}\n: c", ", line 1", "{'a': 'b'} is no key"),
    ("cat: [a", ", line 1", "expected ',' or ']', but got '<stream end>'"),
]


@pytest.mark.parametrize(("text", "where", "why"), UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(tmp_path, text, where, why):
    path = write(tmp_path, text)
    with refused(ConfigError, f"cannot read {path}{where}", why, "mend that line"):
        read_map(path)


@pytest.mark.parametrize("text", ["- cat", "", "cat"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = write(tmp_path, text)
    with refused(
        ConfigError,
        f"{path} holds no table",
        "it should be a table of key: value lines",
        "write such lines, or check the path of --class-map",
    ):
        read_map(path)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    fix = "check the path of --class-map"
    with refused(ConfigError, f"cannot read {tmp_path}/none.yaml", "No such file or directory", fix):
        read_map(tmp_path / "none.yaml")
    path = tmp_path / "weights.pth"  # the weights themselves, in the map's place
    torch.save({"x": torch.zeros(3)}, path)
    with refused(ConfigError, f"cannot read {path}", "it is no text", fix):
        read_map(path)


def test_a_tag_in_a_file_runs_nothing(tmp_path):
    target = tmp_path / "made"
    path = write(
        tmp_path, f"cat: !!python/object/apply:os.mkdir ['{target}']\ndog: !!python/name:os.system ''"
    )
    assert read_map(path).groups == {"cat": [str(target)], "dog": []}
    assert not target.exists()


@pytest.mark.parametrize(
    ("listed", "value"),
    [
        ("cats", "'cats'"),
        ("2.5", "'2.5'"),
        ("-2", "'-2'"),
        ("²", "'²'"),
        ("true", "'true'"),
        ("null", "'null'"),
        ("", "''"),
        ("{a: b}", "{'a': 'b'}"),
        ("[a, [b]]", "['a', ['b']]"),
    ],
)
def test_teacher_classes_are_a_list_or_a_number(tmp_path, listed, value):
    path = write(tmp_path, f"teacher_classes: {listed}\nmap: {{cat: a, dog: c}}")
    with refused(
        ConfigError,
        f"{path}: teacher_classes is {value}",
        "it should be the list of the teacher's classes in order, or how many there are",
        "say teacher_classes: [first, second, third]",
    ):
        read_map(path)


def test_a_file_may_lie_below_home(tmp_path, few_digits, words, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, yaml.safe_dump({"0": "zero", "1": "one"}))
    assert load_teacher(str(words), few_digits, class_map="~/map.yaml").class_map is not None


# --- From names to outputs -------------------------------------------------------------------------

DATA = ("cat", "dog", "emu")
OWN = ("Lion", "wolf", "bird", "Tiger", "fox", "tree")


def mapped(path: Path, text: str, own: Sequence[str] = OWN, wanted: Sequence[str] = DATA) -> ClassMap | None:
    return map_classes(own, wanted, read_map(write(path, text)), "zoo", "photos")


@pytest.mark.parametrize(
    ("text", "own", "groups"),
    [
        ("cat: [Lion, Tiger]\ndog: [wolf, fox]\nemu: bird", OWN, ((0, 3), (1, 4), (2,))),
        ("dog: [wolf, fox]\ncat: [LION, tiger]", OWN, ((0, 3), (1, 4), ())),
        ("cat: 0\ndog: '1'\nemu: [5, 2]", OWN, ((0,), (1,), (5, 2))),
        ("cat: [Lion, 3]\nemu: bird\ndog:", OWN, ((0, 3), (), (2,))),
        ("cat: 0\ndog: 1\nemu: 2", ("2", "0", "1"), ((1,), (2,), (0,))),
        ("cat: 1\ndog: 2\nemu: 3", ("1", "a", "b", "c"), ((0,), (2,), (3,))),
    ],
)
def test_names_and_numbers_find_their_outputs(tmp_path, text, own, groups):
    """A name goes before a number: 1 is the class of that name, where there is one."""
    assert mapped(tmp_path, text, own).groups == groups


def test_a_name_and_a_number_of_the_same_output_clash(tmp_path):
    with refused(
        ConfigError,
        f"{tmp_path / 'map.yaml'}: the teacher's class '1' stands there twice, under 'cat' and 'dog'",
        "its probability would count twice",
        "leave one out",
    ):
        mapped(tmp_path, "cat: 0\ndog: 1", ("1", "a", "b"))


THEIRS, OURS = f"'zoo' has the classes {', '.join(OWN)}", "photos has the classes cat, dog, emu"
ONE_CLASS = (
    "{path} maps fewer than two classes of photos",
    "a teacher of one class has nothing to tell",
    "map classes of photos: cat, dog, emu",
)


def unknown(name: str, why: str, fix: str = "name one of these") -> tuple[str, str, str]:
    return (f"{{path}}: there is no class {name!r}", why, fix)


def twice(name: str, where: str) -> tuple[str, str, str]:
    what = f"{{path}}: the teacher's class {name!r} stands there twice, under {where}"
    return (what, "its probability would count twice", "leave one out")


REFUSED = [
    ("cot: Lion\ndog: wolf", unknown("cot", OURS, "did you mean 'cat'?")),
    ("Dog: wolf\ncat: Lion", unknown("Dog", OURS, "did you mean 'dog'?")),
    ("whale: Lion\ndog: wolf", unknown("whale", OURS)),
    ("cat: Lyon\ndog: wolf", unknown("Lyon", THEIRS, "did you mean 'Lion'?")),
    ("cat: [Lion, submarine]\ndog: wolf", unknown("submarine", THEIRS)),
    ("cat: 6\ndog: 5", unknown("6", THEIRS)),
    ("cat: -1\ndog: 5", unknown("-1", THEIRS)),
    ("cat: [Lion, fox]\ndog: fox", twice("fox", "'cat' and 'dog'")),
    ("cat: [Lion, 0]\ndog: fox", twice("0", "'cat'")),
    ("cat: [Lion, lion]\ndog: fox", twice("lion", "'cat'")),
    ("cat: [Lion, Tiger]\ndog:", ONE_CLASS),
    ("cat: []", ONE_CLASS),
    ("{}", ONE_CLASS),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_a_map_that_does_not_fit_is_refused(tmp_path, text, problem):
    what, why, fix = problem
    with refused(ConfigError, what.format(path=tmp_path / "map.yaml"), why, fix):
        mapped(tmp_path, text)


def test_all_that_is_wrong_with_a_map_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        mapped(tmp_path, "cot: Lion\ncat: [wolf, Lyon]\ndog: wolf")
    problems = (
        unknown("cot", OURS, "did you mean 'cat'?"),
        unknown("Lyon", THEIRS, "did you mean 'Lion'?"),
        twice("wolf", "'cat' and 'dog'"),
    )
    told = "\n".join(message(*problem) for problem in problems)
    assert str(caught.value) == told.replace("{path}", str(tmp_path / "map.yaml"))


def test_a_digit_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no class '²'"):
        mapped(tmp_path, "cat: '²'\ndog: wolf")


def test_names_that_differ_in_their_letters_alone_can_be_told_apart(tmp_path):
    """As the letters of EMNIST."""
    assert mapped(tmp_path, "cat: a\ndog: A\nemu: b", ("A", "a", "b")).groups == ((1,), (0,), (2,))


def test_a_name_that_two_classes_have_is_refused(tmp_path):
    own = ("bank", "tree", "bank")
    with refused(
        ConfigError,
        f"{tmp_path / 'map.yaml'}: 'bank' is the name of 2 classes",
        "they are bank, bank",
        "name it in full, or by its number",
    ):
        mapped(tmp_path, "cat: bank\ndog: tree", own)
    assert mapped(tmp_path, "cat: 2\ndog: tree\nemu: 0", own).groups == ((2,), (1,), (0,))


# --- Without a file --------------------------------------------------------------------------------


def test_the_same_classes_need_no_map():
    assert map_classes(DATA, DATA, None, "zoo", "photos") is None


def test_the_same_classes_in_another_order_are_put_in_order():
    assert map_classes(("emu", "cat", "dog"), DATA, None, "zoo", "photos") == ClassMap(((1,), (2,), (0,)))


@pytest.mark.parametrize(
    ("own", "what"),
    [
        (("cat", "dog"), "'zoo' has 2 classes, and photos has 3"),
        (("cat", "dog", "emu", "fox"), "'zoo' has 4 classes, and photos has 3"),
        (("cat", "dog", "gnu"), "'zoo' has other classes than photos"),
        (("cat", "cat", "dog"), "'zoo' has other classes than photos"),
        (("Cat", "dog", "emu"), "'zoo' has other classes than photos"),
    ],
)
def test_other_classes_without_a_map_are_refused_with_both_lists(own, what):
    with refused(
        ModelError,
        what,
        f"its classes: {', '.join(own)}; those of photos: cat, dog, emu",
        "say which are which: --class-map zoo=FILE.yaml, or train it on photos",
    ):
        map_classes(own, DATA, None, "zoo", "photos")


def test_names_that_two_classes_have_are_not_put_in_order():
    own = ("cat", "cat", "dog")
    with pytest.raises(ModelError, match="'zoo' has other classes than photos"):
        map_classes(own, ("cat", "dog", "cat"), None, "zoo", "photos")


def test_long_lists_are_cut():
    with refused(
        ModelError,
        "'zoo' has 1000 classes, and photos has 3",
        f"its classes: {', '.join(map(str, range(10)))} … and 990 more; those of photos: cat, dog, emu",
        "say which are which: --class-map zoo=FILE.yaml, or train it on photos",
    ):
        map_classes(tuple(map(str, range(1000))), DATA, None, "zoo", "photos")


# --- ImageNet --------------------------------------------------------------------------------------

IMAGENET = ImageNetInfo("imagenet-1k")
SYNSETS = IMAGENET.label_names()
LEMMAS = [IMAGENET.label_name_to_description(synset).split(", ") for synset in SYNSETS]


def outputs_of(path: Path, names: Sequence[str]) -> list[int]:
    """The outputs of an ImageNet teacher that `names` mean, all in one map."""
    wanted = tuple(f"c{number}" for number in range(len(names)))
    file = write(path, yaml.safe_dump(dict(zip(wanted, names, strict=True))))
    found = map_classes(class_names(1000), wanted, read_map(file), "net", "photos")
    return [output for (output,) in found.groups]


def test_the_names_of_imagenet_are_unique_and_in_the_order_of_the_outputs():
    names = class_names(1000)
    assert len(set(names)) == len({name.lower() for name in names}) == 1000
    others = tv.AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    apart = [number for number in range(1000) if others[number] not in LEMMAS[number]]
    # torchvision tells its two cranes and its two maillots apart by names of its own.
    assert [others[number] for number in apart] == ["crane bird", "maillot tank suit"]
    assert [names[number] for number in apart] == ["crane (n02012849)", "maillot, tank suit"]


@pytest.mark.parametrize("kind", ["name", "capitals", "synset", "number", "padded number"])
def test_every_class_of_imagenet_is_found_by(tmp_path, kind):
    names = {
        "name": class_names(1000),
        "capitals": [name.upper() for name in class_names(1000)],
        "synset": SYNSETS,
        "number": range(1000),
        "padded number": [f"{number:04d}" for number in range(1000)],
    }[kind]
    assert outputs_of(tmp_path, list(names)) == list(range(1000))


def test_every_lemma_of_one_class_of_imagenet_is_found(tmp_path):
    owners = defaultdict(set)
    for number, lemmas in enumerate(LEMMAS):
        for lemma in lemmas:
            owners[lemma.lower()].add(number)
    own = {lemma: min(numbers) for lemma, numbers in owners.items() if len(numbers) == 1}
    assert len(own) > 1800
    found = aliases(class_names(1000))
    assert {lemma: found[lemma] for lemma in own} == {lemma: [number] for lemma, number in own.items()}
    some = {number: lemma for lemma, number in own.items()}
    assert len(some) > 990
    assert outputs_of(tmp_path, list(some.values())) == list(some)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("crane", "crane (n02012849), crane (n03126707)"),
        ("Crane", "crane (n02012849), crane (n03126707)"),
        ("grass snake", "green snake, grass snake, garter snake, grass snake"),
        ("panther", f"{', '.join(LEMMAS[286])}, {', '.join(LEMMAS[290])}"),
    ],
)
def test_a_lemma_of_two_classes_of_imagenet_is_refused(tmp_path, name, meant):
    with refused(
        ConfigError,
        f"{tmp_path / 'map.yaml'}: {name!r} is the name of 2 classes",
        f"they are {meant}",
        "name it in full, or by its number",
    ):
        outputs_of(tmp_path, [name, "goldfish"])


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("maillot", 638),
        ("partridge", 86),
        ("cardigan", 474),
        ("harp", 594),
        ("missile", 657),
        ("crane (n02012849)", 134),
        ("crane (N03126707)", 517),
    ],
)
def test_a_whole_name_goes_before_a_lemma_of_another_class(tmp_path, name, output):
    assert outputs_of(tmp_path, [name, "goldfish"]) == [output, 1]


def test_the_larger_imagenets_have_unique_names_too():
    for count, first in ((11821, "benthos"), (21843, "organism, being")):
        names = class_names(count)
        assert len(set(names)) == len(names) == count
        assert names[0] == first


def test_other_classes_have_no_names_of_imagenet(tmp_path):
    assert class_names(10) is None
    own = tuple(f"class {number}" for number in range(1000))
    assert aliases(own) == aliases(DATA) == {}
    with pytest.raises(ConfigError, match="there is no class 'goldfish'"):
        mapped(tmp_path, "cat: goldfish\ndog: class 1", own)


# --- Teachers with published weights ---------------------------------------------------------------

CATS, DOGS, EMUS = (281, 282, 285), (207, 208), (9,)
PHOTO_MAP = "cat: [tabby, 282, n02124075]\ndog: [207, Labrador retriever]\nemu: ostrich"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would train fails the test."""
    for module, function in ((registry, "train_on_labels"), (distillation, "fit")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("something was trained"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small RGB images of three classes."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for shade, name in enumerate(DATA):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(60 * shade, 60 * shade + 120, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def photo_data(photos: Path) -> Dataset:
    return load_data(f"imagefolder:{photos}")


def loud(net: nn.Module) -> None:
    """An untrained network whose logits differ enough to be told apart in float32."""
    net.classifier.weight.data.mul_(2000)


def by_hand(net: nn.Module, images: Images, side: int) -> np.ndarray:
    """The raw network's logits, with the preprocessing of ImageNet, in steps of their own."""
    x = images.pixels.double() / 255
    x = torch.cat([x] * 3, dim=1) if x.shape[1] == 1 else x
    x = F.interpolate(x, (side, side), mode="bilinear").float()
    x = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        return net.eval()(x).double().numpy()


def grouped(logits: np.ndarray, *groups: Sequence[int]) -> np.ndarray:
    return np.stack([logsumexp(logits[:, list(group)], axis=1) for group in groups], axis=1)


def fingerprint(net: nn.Module) -> str:
    card = Card("any", "stock", Preprocess(3, (32, 32), (0.0,) * 3, (1.0,) * 3), ())
    return Classifier(net, card).fingerprint()


PUBLISHED = [
    f"timm:{MOBILENET}.lamb_in1k",
    f"{MOBILENET}@lamb_in1k",
    MOBILENET,
    f"{SQUEEZENET}@IMAGENET1K_V1",
    SQUEEZENET,
]


def put(name: str, put_tv: Callable, hub: Callable) -> nn.Module:
    return put_tv("squeezenet1_1")[0] if name.startswith("tv:") else hub(MOBILENET, edit=loud)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_keep_their_own_head_and_are_grouped(
    tmp_path, photo_data, put_tv, hub, no_training, name
):
    net = put(name, put_tv, hub)
    with logged() as lines:
        teacher = load_teacher(
            name, photo_data, class_map=write(tmp_path, PHOTO_MAP), size=64, offline=True, train=False
        )
    label = parse(name).label
    assert len(lines) == 2
    assert lines[0].startswith(f"INFO: {label} keeps its 1000 classes from ")
    assert lines[1].startswith(f"INFO: {label}: cat ← tabby, tabby cat + tiger cat + Egyptian cat, dog ← ")
    assert teacher.fingerprint == fingerprint(net)
    assert teacher.class_map.groups == (CATS, DOGS, EMUS)
    assert teacher.classifier.classes == class_names(1000)
    pre = teacher.classifier.card.preprocess
    assert (pre.channels, pre.size, pre.mean, pre.std) == (3, (64, 64), MEAN, STD)
    raw = by_hand(net, photo_data.test, 64)
    assert raw.std(axis=1).min() > 0.03  # the groups' logits do differ
    expected = grouped(raw, CATS, DOGS, EMUS)
    np.testing.assert_allclose(teacher.all_logits(photo_data.test), expected, atol=1e-4)
    mass = softmax(raw, axis=1)[:, [*CATS, *DOGS, *EMUS]].sum(axis=1).mean()
    assert teacher.discarded(photo_data.test) == pytest.approx(1 - mass, abs=1e-6)
    assert teacher.discarded(photo_data.test) > 0.9


def test_grey_images_are_shown_to_published_weights_in_three_channels(tmp_path, few_digits, put_tv):
    net, _ = put_tv("squeezenet1_1")
    path = write(tmp_path, "'0': [tench, goldfish]\n'1': 2\n'7': n01494475")
    with logged() as lines:
        teacher = load_teacher(SQUEEZENET, few_digits, class_map=path, size=64)
    assert lines[2:] == ["INFO: tv:squeezenet1_1 takes RGB: the grey images are converted"]
    images = few_digits.val[torch.arange(20)]
    expected = grouped(by_hand(net, images, 64), (0, 1), (2,), (4,))
    logits = teacher.all_logits(images)
    np.testing.assert_allclose(
        logits[:, [0, 1, 7]].softmax(1), softmax(expected, axis=1), atol=1e-5
    )  # no vote on the seven others
    others = [2, 3, 4, 5, 6, 8, 9]
    assert (logits[:, others] == NO_VOTE).all()


@pytest.mark.parametrize("name", [MOBILENET, SQUEEZENET])
def test_published_weights_keep_their_own_size_if_none_is_wanted(tmp_path, photo_data, put_tv, hub, name):
    put(name, put_tv, hub)
    teacher = load_teacher(name, photo_data, class_map=write(tmp_path, PHOTO_MAP))
    assert teacher.classifier.card.preprocess.size == (224, 224)


def test_a_batch_is_mapped_as_the_whole_split_is(tmp_path, photo_data, hub):
    """Live teachers look at batches; stored ones have seen the split."""
    hub(MOBILENET, edit=loud)
    teacher = load_teacher(MOBILENET, photo_data, class_map=write(tmp_path, PHOTO_MAP), size=64)
    torch.testing.assert_close(teacher.look(photo_data.val).logits, teacher.all_logits(photo_data.val))


def test_two_maps_of_one_network_share_no_stored_logits(tmp_path, photo_data, hub):
    hub(MOBILENET, edit=loud)
    first, second = (
        load_teacher(MOBILENET, photo_data, class_map=write(tmp_path, text), size=64).all_logits(
            photo_data.test
        )
        for text in (PHOTO_MAP, "cat: [207, 208]\ndog: [281, 282, 285]\nemu: 9")
    )
    assert not first.equal(second)
    torch.testing.assert_close(first[:, [1, 0, 2]], second)


TEN = f"{', '.join(class_names(1000)[:10])} … and 990 more"


@pytest.mark.parametrize(
    ("listed", "count", "names"),
    [
        ("5", 5, "0, 1, 2, 3, 4"),
        ("2000", 2000, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 … and 1990 more"),
        ("[a, b, c]", 3, "a, b, c"),
        ("0", 0, ""),
        ("[]", 0, ""),
    ],
)
def test_published_weights_under_other_names_than_their_own_are_refused(
    tmp_path, photos, photo_data, put_tv, no_training, listed, count, names
):
    """Names for five of a thousand outputs would give the teacher's probabilities to wrong classes."""
    put_tv("squeezenet1_1")
    path = write(tmp_path, f"teacher_classes: {listed}\nmap: {{cat: 0, dog: 2}}")
    problem = (
        f"'tv:squeezenet1_1' has 1000 classes, and its class map names {count} teacher_classes",
        f"its classes: {TEN}; in the map: {names}",
        "leave teacher_classes out: its weights name their classes",
    )
    with refused(ModelError, *problem):
        load_teacher(SQUEEZENET, photo_data, class_map=path, size=64)
    with refused(ModelError, *problem):
        distill(
            [SQUEEZENET], data=f"imagefolder:{photos}", class_map={SQUEEZENET: path}, out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("listed", "cat", "output"), [("1000", "goldfish", 1), ([f"c{k}" for k in range(1000)], "c7", 7)]
)
def test_as_many_names_as_published_weights_have_are_taken(
    tmp_path, photo_data, put_tv, no_training, listed, cat, output
):
    """A network of a thousand outputs need not be ImageNet's; a number says only how many there are."""
    put_tv("squeezenet1_1")
    path = write(tmp_path, yaml.safe_dump({"teacher_classes": listed, "map": {"cat": cat, "dog": "300"}}))
    teacher = load_teacher(SQUEEZENET, photo_data, class_map=path, size=64)
    groups = dict(zip(photo_data.classes, teacher.class_map.groups, strict=True))
    assert (groups["cat"], groups["dog"]) == ((output,), (300,))


def test_a_run_under_other_names_than_its_own_is_refused(tmp_path, few_digits, part):
    path = write(tmp_path, "teacher_classes: [one, two, three, seven]\nmap: {'1': one, '2': two}")
    with refused(
        ModelError,
        "'part' has 4 classes, and its class map names 4 teacher_classes",
        "its classes: seven, three, one, two; in the map: one, two, three, seven",
        "leave teacher_classes out: its weights name their classes",
    ):
        load_teacher(str(part), few_digits, class_map=path)
    path = write(tmp_path, "teacher_classes: [seven, three, one, two]\nmap: {'1': one, '2': two}")
    assert load_teacher(str(part), few_digits, class_map=path).class_map.groups[:3] == ((), (2,), (3,))


def put_on_hub(folder: Path, name: str, net: nn.Module, **facts) -> None:
    """A repository of the user's own on the hub, as it lies in the cache."""
    commit = "0" * 40
    repository = folder / "hub" / f"models--{name.replace('/', '--')}"
    for part in ("refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    config = {
        "architecture": MOBILENET,
        "num_classes": net.num_classes,
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": MEAN, "std": STD, "num_classes": net.num_classes,
            "first_conv": "conv_stem", "classifier": "classifier",
        },
        **facts,
    }  # fmt: skip
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(config))
    weights = repository / "snapshots" / commit / "model.safetensors"
    safetensors.torch.save_file(net.state_dict(), weights, metadata={"format": "pt"})


def test_a_network_of_the_hub_brings_the_names_of_its_classes(tmp_path, photo_data, hub, no_training):
    import timm

    net = timm.create_model(MOBILENET, num_classes=4)
    loud(net)
    put_on_hub(tmp_path, "me/farm", net, label_names=["ox", "hen", "cat", "dog"])
    put_on_hub(tmp_path, "me/nameless", net)
    path = write(tmp_path, "cat: cat\ndog: dog\nemu: [hen, ox]")
    teacher = load_teacher("hf-hub:me/farm", photo_data, class_map=path)
    expected = grouped(by_hand(net, photo_data.test, 32), (2,), (3,), (1, 0))
    np.testing.assert_allclose(teacher.all_logits(photo_data.test), expected, atol=1e-4)
    with refused(
        ModelError,
        "the 4 classes of 'nameless' are not known",
        "its weights do not name them, and they are not those of ImageNet",
        "name them all in the class map, in order: teacher_classes: [...] beside map:",
    ):
        load_teacher("hf-hub:me/nameless", photo_data, class_map=path)
    few = write(tmp_path, "teacher_classes: [ox, c, d]\nmap: {cat: c, dog: d}")
    with pytest.raises(ModelError, match="the 4 classes of 'nameless' are not known"):
        load_teacher("hf-hub:me/nameless", photo_data, class_map=few)
    named = write(tmp_path, "teacher_classes: [ox, hen, c, d]\nmap: {cat: c, dog: d, emu: [hen, ox]}")
    teacher = load_teacher("hf-hub:me/nameless", photo_data, class_map=named)
    np.testing.assert_allclose(teacher.all_logits(photo_data.test), expected, atol=1e-4)


def test_weights_that_cannot_be_had_are_refused(tmp_path, photo_data, checkpoints, hub):
    path = write(tmp_path, PHOTO_MAP)
    for name in (SQUEEZENET, MOBILENET):
        with refused(
            ModelError,
            f"the weights of {name!r} are not on this machine",
            "--offline forbids to download them",
            "run once without --offline, or leave the weights out and it is trained from scratch",
        ):
            load_teacher(name, photo_data, class_map=path, offline=True)


def test_a_network_that_would_be_trained_has_nothing_to_map(tmp_path, photos, no_training):
    with refused(
        ModelError,
        "'lenet' has no published weights, so it has no classes of its own to map",
        "it would be trained on this data, with the classes of this data",
        "leave lenet out of --class-map",
    ):
        distill(
            ["lenet"],
            data=f"imagefolder:{photos}",
            class_map={"lenet": write(tmp_path, PHOTO_MAP)},
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


# --- Never a random head without a word ------------------------------------------------------------


def test_published_weights_without_a_map_are_trained_and_say_so(photo_data, hub, own_cache):
    """timm gives a network of 1000 classes a random head for 3 without a word, and it would teach."""
    hub(MOBILENET)
    name = f"{MOBILENET}@lamb_in1k"
    with logged() as lines:
        teacher = load_teacher(name, photo_data, size=32, training={"epochs": 1})
    assert f"INFO: {MOBILENET} starts from {MOBILENET}.lamb_in1k" in lines
    assert f"INFO: teacher {MOBILENET}: training on {photo_data.name} at 32×32, 1 epochs" in lines
    fresh = new_classifier(parse(name), photo_data, size=32)
    assert not teacher.classifier.net.classifier.weight.equal(fresh.net.classifier.weight)
    assert teacher.class_map is None


def test_published_weights_without_a_map_are_refused_if_nothing_may_be_trained(
    photo_data, hub, own_cache, no_training
):
    hub(MOBILENET)
    with refused(
        ModelError,
        f"teacher '{MOBILENET}' is not in the library for {photo_data.name} with this recipe",
        "it may not be trained now",
        f"train it first: ekd train {MOBILENET}@lamb_in1k --data {photo_data.name}",
    ):
        load_teacher(f"{MOBILENET}@lamb_in1k", photo_data, size=32, train=False)


def test_a_file_of_a_thousand_classes_is_refused_without_a_map(tmp_path, few_digits, no_training):
    thousand = replace(few_digits, classes=tuple(class_names(1000)))
    classifier = new_classifier(parse("lenet"), thousand)
    save_classifier(tmp_path / "net.safetensors", classifier)
    with refused(
        ModelError,
        "'net' has 1000 classes, and digits has 10",
        f"its classes: {', '.join(class_names(1000)[:10])} … and 990 more; "
        "those of digits: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "say which are which: --class-map net=FILE.yaml, or train it on digits",
    ):
        load_teacher(str(tmp_path / "net.safetensors"), few_digits)
    torch.save(classifier.net.state_dict(), tmp_path / "net.pth")
    with refused(
        WeightsError,
        f"{tmp_path / 'net.pth'} does not fit LeNet",
        "classifier.4.weight is (1000, 84) in the file and (10, 84) in the network",
        "classes, channels or stem differ: use weights made for this data (or --stem imagenet)",
    ):
        load_teacher(f"lenet@{tmp_path / 'net.pth'}", few_digits)


# --- Files, runs and modules -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("listed", ["[a, b, c, d, e]", "5"])
def test_bare_weights_have_the_classes_that_the_map_lists(tmp_path, few_digits, no_training, kind, listed):
    net = STUDENTS["lenet"](5, 1, 28)
    net.classifier[4].weight.data.mul_(20)
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(net.state_dict(), path)
    else:
        safetensors.torch.save_file(net.state_dict(), path)
    first, second, third = ("b", "a", "e") if "a" in listed else (1, 0, 4)
    text = f"teacher_classes: {listed}\nmap: {{'3': {first}, '8': [{second}, {third}]}}"
    teacher = load_teacher(f"lenet@{path}", few_digits, class_map=write(tmp_path, text))
    assert (teacher.label, teacher.origin, teacher.fingerprint) == ("lenet", str(path), fingerprint(net))
    mean, std = few_digits.mean_and_std
    x = F.interpolate(few_digits.val.pixels.float() / 255, (28, 28), mode="bilinear")
    with torch.no_grad():
        raw = net.eval()((x - mean[0]) / std[0]).double().numpy()
    logits = teacher.all_logits(few_digits.val)
    expected = log_softmax(grouped(raw, (1,), (0, 4)), axis=1)
    np.testing.assert_allclose(logits[:, [3, 8]], expected, atol=1e-5)
    assert teacher.class_map.known.nonzero().flatten().tolist() == [3, 8]


MODULE = """
import torch
from torch import nn

def make(num_classes, channels):
    torch.manual_seed(3)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, num_classes))

def five(channels):
    return make(5, channels)
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    return write(tmp_path, MODULE, "mine.py")


@pytest.mark.parametrize("factory", ["make", "five"])
def test_a_module_has_the_classes_that_the_map_lists(tmp_path, few_digits, module, no_training, factory):
    path = write(tmp_path, "teacher_classes: [a, b, c, d, e]\nmap: {'0': e, '1': [a, b], '2': c}")
    name = f"py:{module}:{factory}@own"
    teacher = load_teacher(name, few_digits, class_map=path)
    assert teacher.classifier.classes == ("a", "b", "c", "d", "e")
    assert not teacher.storable
    with torch.no_grad():
        raw = teacher.classifier(few_digits.val.pixels).double().numpy()
    assert raw.shape == (len(few_digits.val), 5)
    expected = log_softmax(grouped(raw, (4,), (0, 1), (2,)), axis=1)
    np.testing.assert_allclose(teacher.all_logits(few_digits.val)[:, :3], expected, atol=1e-5)
    if factory == "make":
        assert load_teacher(name, few_digits).class_map is None


@pytest.mark.parametrize("listed", ["3", "12"])
def test_a_module_of_other_outputs_than_listed_is_refused(tmp_path, few_digits, module, listed):
    path = write(tmp_path, f"teacher_classes: {listed}\nmap: {{'0': 0, '1': 2}}")
    with pytest.raises(ModelError):
        load_teacher(f"py:{module}:five@own", few_digits, class_map=path)


def train_words(digits: Dataset, folder: Path, labels: Sequence[int], names: Sequence[str]) -> Path:
    """A run of a LeNet that was trained on some digits, under names of its own in an order of its own."""
    place = {label: number for number, label in enumerate(labels)}

    def part(images: Images) -> Images:
        kept = torch.tensor([int(label) in place for label in images.known_labels])
        new = torch.tensor([place[int(label)] for label in images.known_labels[kept]])
        return Images(images.pixels[kept], new, images.ids[kept])

    data = Dataset("words", tuple(names), part(digits.train), part(digits.val), part(digits.test))
    teacher = load_teacher("lenet", data, training={"epochs": 4})
    save_classifier(folder / "model.safetensors", teacher.classifier)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """All digits, by words, from nine down to zero."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    return train_words(digits, folder, range(9, -1, -1), WORDS[::-1])


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """Four digits, of which `part_map` takes three."""
    folder = tmp_path_factory.mktemp("runs") / "part"
    return train_words(digits, folder, (7, 3, 1, 2), ("seven", "three", "one", "two"))


@pytest.fixture
def part_map(tmp_path: Path) -> Path:
    return write(tmp_path, "'1': one\n'2': two\n'3': three", "part.yaml")


@pytest.fixture
def words_map(tmp_path: Path) -> Path:
    table = {str(digit): word for digit, word in enumerate(WORDS)}
    return write(tmp_path, yaml.safe_dump(table), "words.yaml")


def accuracy(logits: Tensor, images: Images) -> float:
    return float((logits.argmax(1) == images.labels).float().mean())


def test_a_run_on_other_class_names_labels_the_data_by_its_map(digits, words, words_map, no_training):
    teacher = load_teacher(str(words), digits, class_map=words_map)
    logits = teacher.all_logits(digits.test)
    with torch.no_grad():
        assert logits.equal(teacher.classifier(digits.test.pixels).flip(1))
    assert accuracy(logits, digits.test) > 0.9
    assert teacher.discarded(digits.test) == pytest.approx(0, abs=1e-9)


def test_a_run_can_be_a_teacher_of_coarser_classes(tmp_path, digits, words, no_training):
    """Even and odd digits by a teacher of all ten."""
    halves = (digits.test.labels % 2).long()
    data = replace(digits, classes=("even", "odd"), test=replace(digits.test, labels=halves))
    text = yaml.safe_dump({"even": list(WORDS[::2]), "odd": list(WORDS[1::2])})
    teacher = load_teacher(str(words), data, class_map=write(tmp_path, text))
    assert accuracy(teacher.all_logits(data.test), data.test) > 0.9


@pytest.mark.parametrize("kind", ["file", "run", "object"])
def test_classes_in_another_order_are_put_in_order_without_a_file(tmp_path, few_digits, words, kind):
    """Whatever the teacher is, its logits are permuted; a teacher taken as it is would be always wrong."""
    classifier = ensemble_kd.load_student(words)
    card = replace(classifier.card, classes=tuple("9876543210"))
    classifier = Classifier(classifier.net, card)
    path = tmp_path / ("net.safetensors" if kind == "file" else "net/student.safetensors")
    save_classifier(path, classifier)
    teacher = Teacher.of("net", classifier, "here") if kind == "object" else str(tmp_path / path.parts[-2])
    teacher = str(path) if kind == "file" else str(path.parent) if kind == "run" else teacher
    run = distill([teacher], "lenet", controls="none", out=tmp_path / "run", **QUICK)
    assert run.metrics["models"]["net"]["accuracy"]["value"] > 0.9
    logits, _ = Run(run.folder).predictions()
    with torch.no_grad():
        assert logits["net"].equal(classifier.eval()(few_digits.test.pixels).flip(1))
    (facts,) = json.loads((run.folder / "manifest.json").read_text())["teachers"]
    assert facts["class_map"] == [[9 - digit] for digit in range(10)]


# --- A teacher of some classes beside one of all ---------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, words: Path, part: Path) -> distillation.DistillResult:
    """A finished run of both; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("mixed")
    maps = {
        "part": write(folder, "'1': one\n'2': two\n'3': three", "part.yaml"),
        "words": write(folder, yaml.safe_dump(dict(zip(map(str, range(10)), WORDS, strict=True)))),
    }
    return distill(
        [str(part), str(words)],
        "lenet",
        class_map=maps,
        controls="labels,best-teacher",
        epochs=3,
        out=folder / "run",
    )


def test_the_row_of_a_partial_teacher_is_among_its_classes(mixed, digits):
    row = mixed.metrics["models"]["part"]
    known = (digits.test.labels >= 1) & (digits.test.labels <= 3)
    assert (row["role"], row["classes"], row["images"]) == ("teacher", 3, int(known.sum()))
    logits, labels = Run(mixed.folder).predictions()
    z, y = logits["part"][known][:, 1:4].double().numpy(), labels[known].numpy() - 1
    assert row["accuracy"]["value"] == pytest.approx((z.argmax(1) == y).mean())
    assert row["accuracy"]["value"] > 0.9
    nll = -log_softmax(z, axis=1)[np.arange(len(y)), y].mean()
    assert row["nll"]["value"] == pytest.approx(nll, rel=1e-5)
    # Against the ensemble, which answers for all classes, it cannot be measured.
    assert row.keys().isdisjoint({"teacher_student_cross_entropy", "teacher_student_kl", "agreement"})
    assert (logits["part"][:, [0, 4, 5, 6, 7, 8, 9]] == NO_VOTE).all()


def test_every_other_row_is_over_all_classes(mixed, digits):
    logits, labels = Run(mixed.folder).predictions()
    for name in ("student", "labels", "best-teacher", "words", "ensemble"):
        row = mixed.metrics["models"][name]
        assert row.keys().isdisjoint({"classes", "images"})
        assert row["accuracy"]["value"] == pytest.approx(accuracy(logits[name], digits.test))
        assert row["agreement"]["value"] <= 1
    assert mixed.metrics["n"] == len(labels) == len(digits.test)
    assert mixed.metrics["models"]["words"]["accuracy"]["value"] > 0.9


def test_the_ensemble_gives_the_partial_teacher_a_vote_on_its_classes_alone(mixed):
    """By hand for equal weights: f elsewhere, and half of f and half of f(S) · p on S."""
    logits, _ = Run(mixed.folder).predictions()
    full, some = (softmax(logits[name].double().numpy(), axis=1) for name in ("words", "part"))
    mass = full[:, 1:4].sum(axis=1, keepdims=True)
    expected = full.copy()
    expected[:, 1:4] = full[:, 1:4] / 2 + mass * some[:, 1:4] / 2
    np.testing.assert_allclose(softmax(logits["ensemble"].double().numpy(), axis=1), expected, atol=1e-6)


def test_the_metrics_and_the_table_say_what_is_known_and_discarded(mixed, digits, part):
    combination = mixed.metrics["combination"]
    assert combination["known"] == {"part": 3}
    raw = ensemble_kd.load_student(part)
    with torch.no_grad():
        outside = raw(digits.val.pixels).double().softmax(1)[:, 0].mean()
    assert combination["discarded"]["part"] == pytest.approx(float(outside), abs=1e-6)
    assert combination["discarded"]["part"] > 0.01
    assert combination["discarded"]["words"] == pytest.approx(0, abs=1e-9)
    lines = metrics_table(mixed.metrics).splitlines()
    assert f"Teacher part gives {100 * outside:.1f} % of its probability to classes outside the map." in lines
    assert "Teacher part knows 3 classes, and is judged among these, on their images." in lines
    assert not any(line.startswith("Teacher words knows") for line in lines)
    (row,) = (line for line in lines if line.split()[:2] == ["teacher", "part"])
    assert row.count("–") == 4  # top-5 and the three measures against the ensemble


def test_the_best_teacher_is_one_that_knows_all_classes(mixed):
    log = (mixed.folder / "train.log").read_text()
    assert "best teacher on the validation split: words" in log
    assert mixed.metrics["combination"]["validation"]["best"] == "words"


def test_teachers_with_a_map_are_not_changed(mixed, part, words):
    manifest = json.loads((mixed.folder / "manifest.json").read_text())
    for facts, folder in zip(manifest["teachers"], (part, words), strict=True):
        assert facts["before"] == facts["after"] == ensemble_kd.load_student(folder).fingerprint()
        assert facts["origin"] == str(folder)
    assert manifest["teachers"][0]["class_map"] == [[], [2], [3], [1], [], [], [], [], [], []]


def test_a_run_with_maps_is_repeated_by_its_configuration(mixed, tmp_path):
    again = distill(config_file=mixed.folder / "config.yaml", controls="none", out=tmp_path / "again")
    assert again.student.fingerprint() == mixed.student.fingerprint()


def test_a_stopped_run_with_maps_is_resumed(mixed, tmp_path, monkeypatch):
    original, calls = distillation.fit, []

    def stop_at_the_second(*args, **kwargs):
        calls.append(kwargs["description"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(distillation, "fit", stop_at_the_second)
    options = {"config_file": mixed.folder / "config.yaml", "controls": "labels"}
    with pytest.raises(KeyboardInterrupt):
        distill(out=tmp_path / "part", **options)
    resumed = resume(tmp_path / "part")
    assert calls == ["student", "control labels", "control labels"]
    for name in ("student", "part", "words", "ensemble"):
        assert resumed.metrics["models"][name] == mixed.metrics["models"][name]


def test_partial_teachers_are_calibrated_on_what_they_know(tmp_path, digits, part, part_map, words):
    options = {"combine": "entropy", "calibrate": "both", "pool": "pool-then-temper", "controls": "none"}
    run = distill(
        [str(part), "lenet"], "lenet", class_map={"part": part_map}, out=tmp_path / "run", **options, **QUICK
    )
    combination = run.metrics["combination"]
    val = load_data("digits", limit_train=200).val
    known = (val.labels >= 1) & (val.labels <= 3)
    own = load_teacher(str(part), digits, class_map=part_map).all_logits(val)[known][:, 1:4]
    expected = fit_temperature(own, val.labels[known] - 1)
    assert combination["scales"]["part"] == pytest.approx(expected, rel=1e-3)
    assert 0 < combination["mean_weights"]["part"] < 1
    assert np.isfinite(combination["validation"]["nll"]["ensemble"])


def test_a_part_is_measured_on_its_samples_and_among_its_classes():
    logits = torch.randn(50, 6)
    labels, mask = torch.arange(50) % 6, torch.tensor([True, False, True, True, False, False])
    rows = [number for number in range(50) if number % 6 in (0, 2, 3)]
    own, places = within(mask, logits, labels)
    assert own.equal(logits[rows][:, [0, 2, 3]])
    assert places.tolist() == [{0: 0, 2: 1, 3: 2}[number % 6] for number in rows]


# --- Distilling with published weights -------------------------------------------------------------


def ekd(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_published_weights_teach_by_the_command_line(tmp_path, photos, photo_data, hub, own_cache):
    net = hub(MOBILENET, edit=loud)
    path, run = write(tmp_path, PHOTO_MAP), tmp_path / "run"
    options = [
        "--data", f"imagefolder:{photos}", "--teachers", f"{MOBILENET}@lamb_in1k,lenet", "--offline",
        "--class-map", f"{MOBILENET}={path}", "--teacher-size", f"{MOBILENET}=32",
        "--epochs", "1", "--teacher-epochs", "1", "--controls", "labels", "--out", run,
    ]  # fmt: skip
    made = ekd("distill", *options)
    assert made.exit_code == 0, made.stderr
    assert f"{MOBILENET} keeps its 1000 classes from {MOBILENET}.lamb_in1k" in made.stderr
    assert f"Teacher {MOBILENET} gives " in made.stdout
    assert "is judged among these" not in made.stdout  # it knows all three
    (kept,) = (own_cache / "teachers").iterdir()
    assert kept.name.startswith("lenet-")
    manifest = json.loads((run / "manifest.json").read_text())
    facts = manifest["teachers"][0]
    assert facts["before"] == facts["after"] == fingerprint(net)
    assert facts["class_map"] == [list(CATS), list(DOGS), list(EMUS)]
    logits, _ = Run(run).predictions()
    expected = grouped(by_hand(net, photo_data.test, 32), CATS, DOGS, EMUS)
    np.testing.assert_allclose(logits[MOBILENET], expected, atol=1e-4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["class_map"] == {MOBILENET: str(path)}
    again = distill(config_file=run / "config.yaml", controls="none", out=tmp_path / "again")
    assert again.student.fingerprint() == ensemble_kd.load_student(run).fingerprint()


def test_one_lemma_wrong_is_told_before_anything_is_loaded(tmp_path, photos, hub, no_training):
    hub(MOBILENET)
    path = write(tmp_path, "cat: tabby\ndog: crane\nemu: ostrich")
    made = ekd(
        "distill", "--data", f"imagefolder:{photos}", "--teachers", f"{MOBILENET},lenet",
        "--class-map", f"{MOBILENET}={path}", "--offline", "--out", tmp_path / "run",
    )  # fmt: skip
    assert made.exit_code == 2
    assert made.stderr == (
        f"error: {path}: 'crane' is the name of 2 classes\n"
        "  why: they are crane (n02012849), crane (n03126707)\n"
        "  fix: name it in full, or by its number\n"
    )
    assert not (tmp_path / "run").exists()


# --- What is refused before anything is trained or written -----------------------------------------

NUMBERS = ", ".join("0123456789")
PART_ONLY = "they know some of the classes only, and would be judged on all"
EARLY = {
    "a stranger": (
        {"class_map": "prat=MAP"},
        ("class_map: there is no teacher 'prat'", "the teachers are part, words", "did you mean 'part'?"),
    ),
    "nothing like any teacher": (
        {"class_map": "part=MAP,resnet50=MAP"},
        ("class_map: there is no teacher 'resnet50'", "the teachers are part, words", "name one of these"),
    ),
    "no name": (
        {"class_map": "MAP"},
        ("class_map: 'MAP' names no teacher", "it is given by teacher", "say --class-map NAME=MAP"),
    ),
    "other teachers of seeds of their own": (
        {"controls": "labels,independent", "class_map": "part=MAP,words=WORDS"},
        (
            "controls: independent teachers cannot be made for part, words",
            "they come with trained weights, so there is no other seed to train",
            "leave that control out: --controls labels,best-teacher",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_a_map_that_cannot_be_placed_is_refused_before_a_folder_is_made(
    tmp_path, part, words, part_map, words_map, no_training, case
):
    options, (what, why, fix) = EARLY[case]
    options = {
        key: value.replace("MAP", str(part_map)).replace("WORDS", str(words_map))
        for key, value in options.items()
    }
    what, fix = (text.replace("MAP", str(part_map)) for text in (what, fix))
    with refused(ConfigError, what, why, fix):
        distill([str(part), str(words)], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_map_for_a_stranger_is_told_on_the_command_line(tmp_path, part, part_map):
    made = ekd(
        "distill", "--teachers", f"{part},lenet", "--class-map", f"lenat={part_map}", "--out", tmp_path / "run"
    )  # fmt: skip
    assert made.exit_code == 2
    assert made.stderr == (
        "error: class_map: there is no teacher 'lenat'\n  why: the teachers are part, lenet\n"
        "  fix: did you mean 'lenet'?\n"
    )


def test_teachers_of_other_seeds_cannot_be_made_of_published_weights_with_a_map(tmp_path, photos, hub):
    hub(MOBILENET)
    with refused(
        ConfigError,
        f"controls: independent teachers cannot be made for {MOBILENET}",
        "they come with trained weights, so there is no other seed to train",
        "leave that control out: --controls labels,best-teacher",
    ):
        distill(
            [MOBILENET, "lenet"],
            data=f"imagefolder:{photos}",
            class_map={MOBILENET: write(tmp_path, PHOTO_MAP)},
            controls="independent",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_every_map_that_is_wrong_is_told_at_once(tmp_path, part, words, no_training):
    maps = {
        "part": write(tmp_path, "'1': ene\n'2': two", "part.yaml"),
        "words": tmp_path / "none.yaml",
    }
    with pytest.raises(ConfigError) as caught:
        distill(
            [str(part), str(words)], "lenet", class_map=maps, unlabelled=tmp_path / "x", out=tmp_path / "run"
        )
    assert {problem.what for problem in caught.value.problems} == {
        f"{maps['part']}: there is no class 'ene'",
        f"cannot read {maps['words']}",
        f"no image folder at {tmp_path / 'x'}",
    }
    assert not (tmp_path / "run").exists()


def test_other_classes_without_a_map_are_refused_before_a_folder_is_made(tmp_path, part, no_training):
    with refused(
        ModelError,
        "'part' has 4 classes, and digits has 10",
        f"its classes: seven, three, one, two; those of digits: {NUMBERS}",
        "say which are which: --class-map part=FILE.yaml, or train it on digits",
    ):
        distill([str(part), "lenet"], "lenet", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


COMBINED = {
    "pool logit": (
        {"pool": "logit"},
        (
            "pool: the logits of part cannot be pooled",
            "they know some of the classes only, and their logits have no common scale with the others'",
            "say --pool prob",
        ),
    ),
    **{
        f"combine {name}": (
            {"combine": name},
            (f"combine: {name} cannot weigh part", PART_ONLY, "say --combine mean, fixed or entropy"),
        )
        for name in ("learned", "greedy", "confidence", "agree", "drop", "best")
    },
    "classes that nobody knows": (
        {"words": "0123456"},
        (
            "no teacher that counts knows 7, 8, 9",
            "the soft target would hold nothing for them",
            "map them for a teacher, or add a teacher that knows them",
        ),
    ),
    "separate groups": (
        {"words": "0456789"},
        (
            "the teachers know separate groups of classes",
            "nothing tells how likely one group is against the other",
            "add a teacher that knows classes of both, such as one trained on this data",
        ),
    ),
    "the best of none": (
        {"words": "03456789", "controls": "best-teacher"},
        (
            "no teacher knows all classes, so none can be the best one",
            "a teacher alone must know all classes",
            "add one that does, such as one trained on this data, or leave best-teacher out of --controls",
        ),
    ),
}


def combined(folder: Path, part: Path, part_map: Path, words: Path, case: str) -> None:
    """Distil from the partial teacher and one of the digits in `words`; all if none are named."""
    options = dict(COMBINED[case][0])
    known = options.pop("words", "0123456789")
    table = yaml.safe_dump({digit: WORDS[int(digit)] for digit in known})
    maps = {"part": part_map, "words": write(folder, table, "words.yaml")}
    distill([str(part), str(words)], "lenet", class_map=maps, out=folder / "run", **{**QUICK, **options})


@pytest.mark.parametrize("case", COMBINED)
def test_what_a_partial_teacher_cannot_do_is_refused_before_a_folder_is_made(
    tmp_path, part, part_map, words, no_training, case
):
    """The maps of teachers that are trained already say what they know."""
    with refused(ConfigError, *COMBINED[case][1]):
        combined(tmp_path, part, part_map, words, case)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"pool": "logit"}, {"combine": "learned"}, {"combine": "best"}])
def test_what_a_partial_teacher_cannot_do_is_refused_before_another_is_trained(
    tmp_path, part, part_map, own_cache, no_training, options
):
    with pytest.raises(ConfigError):
        distill([str(part), "lenet"], "lenet", class_map={"part": part_map}, out=tmp_path / "run", **options)


def test_without_a_teacher_of_all_classes_the_labels_are_a_control(tmp_path, part, part_map, words):
    """Both know the class 3, which joins them."""
    COMBINED_MAP = {digit: WORDS[int(digit)] for digit in "03456789"}
    maps = {"part": part_map, "words": write(tmp_path, yaml.safe_dump(COMBINED_MAP), "words.yaml")}
    run = distill([str(part), str(words)], "lenet", class_map=maps, out=tmp_path / "run", **QUICK)
    assert run.metrics["combination"]["known"] == {"part": 3, "words": 8}
    assert "best" not in run.metrics["combination"]["validation"]["nll"]
    assert {row.get("classes") for row in run.metrics["models"].values()} == {None, 3, 8}


# --- Teachers given as objects ---------------------------------------------------------------------


def test_an_object_brings_its_map(tmp_path, few_digits, part, part_map, words, words_map):
    some = load_teacher(str(part), few_digits, class_map=part_map)
    run = distill([some, str(words)], "lenet", class_map={"words": words_map}, out=tmp_path / "run", **QUICK)
    assert run.metrics["models"]["part"]["classes"] == 3
    assert run.metrics["combination"]["known"] == {"part": 3}


def test_an_object_of_other_classes_is_refused_with_both_lists(tmp_path, part):
    stranger = Teacher.of("stranger", ensemble_kd.load_student(part), "here")
    with refused(
        ModelError,
        "'stranger' has 4 classes, and digits has 10",
        f"its classes: seven, three, one, two; those of digits: {NUMBERS}",
        "say which are which: --class-map stranger=FILE.yaml, or train it on digits",
    ):
        distill([stranger, "lenet"], "lenet", out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_map_for_an_object_is_refused_not_passed_over(tmp_path, words, words_map, no_training):
    mine = Teacher.of("mine", ensemble_kd.load_student(words), "here")
    with refused(
        ConfigError,
        "class_map: mine was given as an object",
        "it has its size and its classes already",
        "leave it out, and give them to load_teacher",
    ):
        distill([mine], "lenet", class_map={"mine": words_map}, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_map_of_other_data_is_refused(few_digits, photo_data, words, words_map):
    teacher = load_teacher(str(words), few_digits, class_map=words_map)
    assert teacher.for_data(few_digits) is teacher
    with refused(
        ModelError,
        f"the class map of 'words' has 10 classes, and {photo_data.name} has 3",
        "it has one group of the teacher's classes for each class of the data",
        "make it with class_map.map_classes for this data",
    ):
        teacher.for_data(photo_data)
