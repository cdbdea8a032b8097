"""Bad input, one case after another: what is wrong and where, why, and how to mend it; exit code 2, and nothing written."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import shlex
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from spoiled import (
    PETS,
    TRIES,
    Payload,
    archive,
    bare,
    card,
    ekd,
    few,
    from_the_hub,
    idx,
    image,
    lenet,
    pets,
    stopped,
    tree,
    write,
)
from support import logged, message, refused
from torch import nn

from ensemble_kd.classifier import Preprocess
from ensemble_kd.console import progress
from ensemble_kd.data import archives, load_data
from ensemble_kd.data.folders import EXTENSIONS
from ensemble_kd.data.hashing import order
from ensemble_kd.errors import DataError, Problem
from ensemble_kd.fresh import new_classifier
from ensemble_kd.judges import build_targets
from ensemble_kd.locks import lock
from ensemble_kd.models import parse
from ensemble_kd.runs import Run
from ensemble_kd.students import STUDENTS
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.weights import load_student

pytestmark = pytest.mark.usefixtures("empty_folder")
DIGITS = ", ".join(map(str, range(10)))
NO_TIMM = "neither this project, timm nor torchvision has it"

# The table

CASES: dict[int, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


def case(number: int, words: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], None]:
    """Enter a case that the table's form does not fit."""

    def enter(check: Callable[[pytest.MonkeyPatch], None]) -> None:
        assert number not in CASES
        CASES[number] = (words, check)

    return enter


def refuses(
    number: int, words: str, command: str, what: str, why: str, fix: str, prepare: Callable[[], Any] = dict
) -> None:
    """Enter a case: `ekd COMMAND` says exactly this on stderr, exits with 2, and writes nothing."""

    def check(patch: pytest.MonkeyPatch) -> None:
        prepare()
        before = tree()
        result = ekd(*shlex.split(command))
        assert result.stderr == f"error: {message(what, why, fix)}\n"
        assert (result.exit_code, result.stdout) == (2, "")
        assert tree() == before

    case(number, words)(check)


refuses(
    1, "misspelt name", TRIES.format("resnt18"),
    "no model is called 'resnt18'", NO_TIMM, "did you mean 'resnet18'?",
)  # fmt: skip


@case(2, "name in two libraries")
def _(patch: pytest.MonkeyPatch) -> None:
    with logged() as lines:
        new_classifier(parse("resnet18"), few())
    assert lines == [
        "INFO: resnet18 is in timm and in torchvision: timm's is taken (tv:resnet18 names the other)"
    ]


refuses(
    3, "pretrained wanted but offline", "train tv:squeezenet1_1@IMAGENET1K_V1 --offline --out run",
    "the weights of 'tv:squeezenet1_1' are not on this machine", "--offline forbids to download them",
    "run once without --offline, or leave the weights out and it is trained from scratch",
)  # fmt: skip
refuses(
    4, "input too small", TRIES.format("vgg11 --teacher-size vgg11=20"),
    "'vgg11' cannot take 20×20 images", "it needs at least 32×32",
    "say --teacher-size vgg11=32 (--student-size 32; --size 32 of `ekd train`), or leave the size out and the images are resized",
)  # fmt: skip


def four_channels() -> None:
    pets()
    pre = Preprocess(4, (28, 28), (0.5,) * 4, (0.5,) * 4)
    card(net=STUDENTS["lenet"](2, 4, 28), preprocess=pre, classes=("cat", "dog"))


refuses(
    5, "channel mismatch", TRIES.format("x.safetensors --data imagefolder:pets"),
    "images with 3 channels, for a network that takes 4", "only grey ↔ RGB can be converted",
    "use a network that takes these images, or convert them first", four_channels,
)  # fmt: skip
refuses(
    6, "class-count mismatch", TRIES.format("x.safetensors"),
    "'x' has 7 classes, and digits has 10",
    f"its classes: 0, 1, 2, 3, 4, 5, 6; those of digits: {DIGITS}",
    "say which are which: --class-map x=FILE.yaml, or train it on digits",
    partial(card, net=STUDENTS["lenet"](7, 1, 28), classes=tuple("0123456")),
)  # fmt: skip


@case(7, "same classes, other order")
def _(patch: pytest.MonkeyPatch) -> None:
    card(classes=tuple("9876543210"))
    result = ekd("evaluate", "x.safetensors", "--data", "digits")
    assert result.stderr == "error: " + message(
        "'x' has the classes of digits in another order",
        f"its classes: 9, 8, 7, 6, 5, 4, 3, 2, 1, 0; those of digits: {DIGITS}",
        "train it on this data: ekd train lenet --data digits\n",
    )
    assert result.exit_code == 2
    with logged() as lines:  # a teacher's are put in order
        teacher = load_teacher("x.safetensors", few())
    assert lines == ["INFO: x: 0 ← 0, 1 ← 1, 2 ← 2, 3 ← 3, 4 ← 4, 5 ← 5, 6 ← 6, 7 ← 7, 8 ← 8, 9 ← 9"]
    raw = lenet()(few().test.pixels).detach()
    torch.testing.assert_close(teacher.all_logits(few().test), raw.flip(1))


refuses(
    8, "duplicate teacher", TRIES.format("lenet,lenet"),
    "teacher 'lenet' is named twice", "the same network twice teaches nothing new",
    "leave one out, or give each its own seed: lenet#1,lenet#2",
)  # fmt: skip


def warnings_of(student: str) -> list[str]:
    """What is said when an untrained LeNet is to teach."""
    teacher = Teacher.of("raw", lenet(), "made here", storable=True)
    with logged() as lines:
        build_targets([teacher], student=student, limit_train=64)
    return [line for line in lines if line.startswith("WARNING")]


@case(9, "student larger than the teachers")
def _(patch: pytest.MonkeyPatch) -> None:
    assert warnings_of("resnet20")[0] == "WARNING: " + message(
        "the student has 269,434 parameters, and no teacher has more than 44,426",
        "distilling is meant to make a smaller model of larger ones",
        "choose a smaller student: ekd models",
    )


@case(10, "teacher at chance")
def _(patch: pytest.MonkeyPatch) -> None:
    right = int((lenet()(few().val.pixels).argmax(dim=1) == few().val.known_labels).sum())
    count = len(few().val)
    commonest = int(few().val.known_labels.bincount().max())
    assert warnings_of("lenet") == [
        "WARNING: "
        + message(
            f"teacher 'raw' is right on {100 * right / count:.1f} % of {count} validation images",
            f"always saying the commonest class would be right on {100 * commonest / count:.1f} %",
            "train it longer, check its classes and its input, or leave it out",
        )
    ]


@case(11, "teacher gives NaN")
def _(patch: pytest.MonkeyPatch) -> None:
    broken = STUDENTS["lenet"](10, 1, 28)
    nn.init.constant_(broken.classifier[4].bias, torch.nan)
    card(net=broken)
    result = ekd(*shlex.split(TRIES.format("x.safetensors")))
    assert result.stderr == "error: " + message(
        "teacher 'x' gives NaN or infinite outputs",
        "its weights are damaged, or its input is not what it was trained on",
        "check it with `ekd evaluate`, or leave it out\n",
    )
    assert result.exit_code == 2
    assert Run(Path("run")).status()["state"] == "stopped"
    assert not list(Path("run").rglob("*.safetensors"))


refuses(
    12, "checkpoint of another architecture", TRIES.format("resnet8@x.safetensors"),
    "x.safetensors is of another architecture than SmallResNet",
    "of 44 tensors, 44 are missing and 0 have another shape",
    "name the architecture that the file was made with", partial(bare, "x.safetensors"),
)  # fmt: skip
refuses(
    13, "pickle renamed .safetensors", TRIES.format("x.safetensors"),
    "x.safetensors is a pickle under the name of a safetensors file", "pickles can run code, so it is not opened",
    "ask its author for a real safetensors file, or rename it to .pth (tensors alone are then read)",
    partial(write, "x.safetensors", pickle.dumps({"a": 1})),
)  # fmt: skip
refuses(
    14, "Git-LFS pointer", TRIES.format("lenet@x.pth"),
    "x.pth is a Git-LFS pointer, not the weights", "the repository was cloned without its large files",
    "run `git lfs pull` in it",
    partial(write, "x.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
)  # fmt: skip


@case(15, "truncated or empty file")
def _(patch: pytest.MonkeyPatch) -> None:
    card()
    whole, before = Path("x.safetensors").read_bytes(), None
    for content, what, why, fix in (
        (b"", "x.safetensors is empty", "a download or a copy was cut off", "fetch the file again"),
        (
            whole[:-1],
            "x.safetensors is damaged or cut off",
            "Error while deserializing header: incomplete metadata, file not fully covered",
            "fetch or make the file again",
        ),
    ):
        write("x.safetensors", content)
        before = tree()
        result = ekd("evaluate", "x.safetensors")
        assert result.stderr == f"error: {message(what, why, fix)}\n"
        assert (result.exit_code, result.stdout, tree()) == (2, "", before)


refuses(
    16, "folder for a file", TRIES.format("lenet@x.pth"),
    "x.pth is a folder", "a file of weights is wanted here", "name the file in it", partial(os.mkdir, "x.pth"),
)  # fmt: skip
refuses(
    17, "missing, extra or renamed keys", TRIES.format("lenet@x.safetensors"),
    "x.safetensors does not fit LeNet", "missing: features.0.bias; not known: features.0.b, head",
    "rename the keys, or name the architecture that the file was made with",
    lambda: bare(
        "x.safetensors", **{"features.0.bias": None, "features.0.b": torch.zeros(6), "head": torch.zeros(1)}
    ),
)  # fmt: skip


refuses(
    18, "malicious pickle", TRIES.format("lenet@x.pth"),
    "x.pth is not a plain file of weights",
    "it holds Python objects other than tensors, which are never loaded",
    "save its state_dict() alone, best as safetensors",
    lambda: torch.save({"state_dict": {"x": Payload()}}, "x.pth"),
)  # fmt: skip


refuses(
    19, "config.json without architecture", TRIES.format("./net"),
    "net/model.safetensors does not say which network it belongs to",
    "it was not written by ensemble-kd, and config.json beside it names no architecture",
    "name the architecture before it: resnet18@net/model.safetensors", from_the_hub,
)  # fmt: skip


def unreadable(number: int, words: str, name: str, why: str, spoil: Callable[[], Any]) -> None:
    """Enter a case: one of the images cannot be read."""

    def prepare() -> None:
        pets()
        spoil()

    refuses(
        number, words, PETS, f"cannot read pets/train/cat/{name}", why, "replace or delete the file", prepare
    )


refuses(
    20, "missing root", PETS, "no image folder at pets", "there is nothing at that path",
    "name a folder with one subfolder a class",
)  # fmt: skip
refuses(
    21, "no class folders", PETS, "pets has no class folders", "images are expected as CLASS/NAME.jpg",
    "make one subfolder a class, or name the folder above", partial(image, "pets/0.png"),
)  # fmt: skip
refuses(
    22, "empty class", PETS, "class 'dog' in pets has no images",
    f"known endings: {', '.join(sorted(EXTENSIONS))}", "add images, or remove the folder",
    partial(pets, "cat:4 dog:0"),
)  # fmt: skip


@case(23, "hidden folder taken for a class")
def _(patch: pytest.MonkeyPatch) -> None:
    pets("train/cat:4 train/dog:4 train/.ipynb_checkpoints:2 test/cat:2 test/dog:2 test/__MACOSX:1")
    with logged() as lines:
        data = load_data("imagefolder:pets")
    why = "hidden folders are not classes"
    assert lines == [
        f"WARNING: pets/train: left out .ipynb_checkpoints\n  why: {why}",
        f"WARNING: pets/test: left out __MACOSX\n  why: {why}",
    ]
    assert (data.classes, len(data.train) + len(data.val), len(data.test)) == (("cat", "dog"), 8, 4)


@case(24, "val lacks a class, so indices shift")
def _(patch: pytest.MonkeyPatch) -> None:
    pets("train/cat:4 train/dog:4 train/emu:4 val/dog:2 val/emu:2")
    with logged() as lines:
        data = load_data("imagefolder:pets")
    assert lines == [
        "WARNING: pets/val lacks the classes cat\n"
        "  why: labels follow the names in train/, so the other classes keep theirs"
    ]
    assert data.test.known_labels.tolist() == [1, 1, 2, 2]


def cut_off() -> None:
    image("pets/train/cat/half.jpg", (64, 64))
    write("pets/train/cat/half.jpg", Path("pets/train/cat/half.jpg").read_bytes()[:-500])


@case(25, "truncated image")
def _(patch: pytest.MonkeyPatch) -> None:
    pets()
    cut_off()
    before = tree()
    with Image.open("pets/train/cat/half.jpg") as half, pytest.raises(OSError, match="truncated") as caught:
        half.load()
    result = ekd(*shlex.split(PETS))
    assert result.stderr == "error: " + message(
        "cannot read pets/train/cat/half.jpg", str(caught.value), "replace or delete the file\n"
    )
    assert (result.exit_code, tree()) == (2, before)


unreadable(
    26, "HTML saved as .jpg", "x.jpg", "it is a web page, saved under an image's name",
    partial(write, "pets/train/cat/x.jpg", "<!DOCTYPE html><html>404</html>"),
)  # fmt: skip
unreadable(27, "zero bytes", "x.png", "the file is empty", partial(write, "pets/train/cat/x.png"))
unreadable(
    28, "broken link", "x.png", "it is a link to a file that is not there",
    lambda: Path("pets/train/cat/x.png").symlink_to("gone.png"),
)  # fmt: skip


def bomb() -> None:
    """A small PNG of a billion pixels."""
    image("pets/train/cat/bomb.png", (8, 8), "1")
    content = bytearray(Path("pets/train/cat/bomb.png").read_bytes())
    content[16:24] = (32768).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    write("pets/train/cat/bomb.png", bytes(content))


unreadable(
    29, "decompression bomb", "bomb.png", "it has so many pixels that it could exhaust the memory", bomb
)


@case(30, "16-bit grey clipped silently by PIL")
def _(patch: pytest.MonkeyPatch) -> None:
    pets("cat:2 dog:2", mode="L")
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    for name in ("a.png", "b.tif", "c.pgm"):
        Image.fromarray(values).save(f"pets/cat/{name}")
    for name in ("a.png", "b.tif", "c.pgm"):
        shutil.move(f"pets/cat/{name}", f"pets/dog/{name}")
        data = load_data("imagefolder:pets", split=0.4)
        shutil.move(f"pets/dog/{name}", f"pets/cat/{name}")
        pixels = torch.cat([part.decoded for part in (data.train, data.val, data.test)])
        assert data.channels == 1
        scaled = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
        assert sum(bool(one[0].equal(scaled)) for one in pixels) == 3
    write("pets/cat/a.tif", Path("pets/cat/b.tif").read_bytes())
    Image.fromarray(values.astype(np.float32)).save("pets/cat/deep.tif")
    with refused(
        DataError, "cannot read pets/cat/deep.tif",
        "its grey has 32 bits, of which none is known to be white: save it with 8 or 16", "replace or delete the file",
    ):  # fmt: skip
        load_data("imagefolder:pets")


@case(31, "EXIF rotation")
def _(patch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    pets(size=(12, 6), exif=exif)
    with Image.open("pets/train/cat/0.png") as stored:
        upright = np.rot90(np.asarray(stored), -1)
    data = load_data("imagefolder:pets")
    pixels = torch.cat([data.train.decoded, data.val.decoded]).permute(0, 2, 3, 1).numpy()
    assert any(np.array_equal(one, upright) for one in pixels)


@case(32, "train/val duplicates")
def _(patch: pytest.MonkeyPatch) -> None:
    pets("train/cat:8 train/dog:8 val/cat:3 val/dog:3 test/cat:3 test/dog:3")
    for name in ("val/cat/0.png", "test/dog/1.png", "test/cat/renamed.png"):
        shutil.copy(f"pets/train/{Path(name).parent.name}/5.png", f"pets/{name}")
    end = "networks have seen them, so what is measured on them is too good"
    fix = "remove the copies, or keep all copies of an image in one split"
    expected = [
        "WARNING: " + message(f"{count} of the {all_} {name} images of imagefolder:pets are training images too", end, fix)
        for count, all_, name in ((1, 6, "validation"), (2, 7, "test"))
    ]  # fmt: skip
    for decode in ("once", "always"):
        with logged() as lines:
            load_data("imagefolder:pets", decode=decode)
        assert lines == expected
    shown = ekd("data", "imagefolder:pets", "--sheet", "sheet.png")
    assert shown.exit_code == 0
    assert all(line.replace("WARNING", "warning") in shown.stdout for line in expected)


refuses(
    33, "one class", PETS, "pets has one class only: 'cat'", "there is nothing to tell apart",
    "add a second class folder, or name the folder above", partial(pets, "cat:4"),
)  # fmt: skip
refuses(
    34, "fewer samples than a batch", "train lenet --batch-size 4096 --out run",
    "batch_size: 4096 is more than the 1293 training images", "an epoch would have no step", "say --batch-size 32",
)  # fmt: skip
refuses(
    35, "label out of range", "train lenet --data mnist --data-root idx --offline --out run",
    "mnist, train: 2 label(s) outside 0…9, the first is 10 at image 10", "the data has 10 classes",
    "mend the labels, or name all the classes", partial(idx, [*range(12), *range(10)]),
)  # fmt: skip


@case(36, "archive with .. members")
def _(patch: pytest.MonkeyPatch) -> None:
    members = [
        (ending, name, tarfile.REGTYPE, "", f"{name!r} would be written outside the folder")
        for ending in ("tar.gz", "zip")
        for name in ("../evil.png", "cat/../../evil.png", "/tmp/evil.png", "..\\evil.png")
    ]
    odd = {
        "link": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "pipe": tarfile.FIFOTYPE,
    }
    members += [
        ("tar", f"cat/{name}", kind, "x.png", f"'cat/{name}' is neither a file nor a folder")
        for name, kind in odd.items()
    ]
    members.append(("zip", "cat/link", tarfile.SYMTYPE, "../x", "'cat/link' is neither a file nor a folder"))
    members.append(("zip", "", tarfile.REGTYPE, "", "it has no name"))
    for ending, name, kind, target, why in members:
        archive(ending, name, kind, target)
        before = tree()
        result = ekd("train", "lenet", "--data", f"imagefolder:evil.{ending}", "--out", "run")
        assert result.stderr == "error: " + message(
            f"evil.{ending} has a member that does not belong in it",
            why.replace("'..\\evil.png'", repr("..\\evil.png")),
            "unpack only archives that you trust, by hand, and name the folder\n",
        )
        assert (result.exit_code, tree()) == (2, before)


CONFIG = "distill --config c.yaml --teachers lenet --out run"

refuses(
    37, "unknown key", "evaluate x --set devise=cpu", "unknown option 'devise'",
    "no option has that name", "did you mean 'device'?",
)  # fmt: skip
refuses(
    38, "duplicate YAML key", CONFIG, "cannot read c.yaml, line 2", "the key 'seed' stands there twice",
    "mend that line", partial(write, "c.yaml", "seed: 1\nseed: 2\n"),
)  # fmt: skip
refuses(
    39, "!!python tag", CONFIG, "cannot read c.yaml, line 1",
    "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    "mend that line", partial(write, "c.yaml", "seed: !!python/object/apply:os.system ['touch ran']\n"),
)  # fmt: skip


@case(40, "NaN or negative lr")
def _(patch: pytest.MonkeyPatch) -> None:
    for value, why in (("nan", "it should be a finite number"), ("-0.1", "it should be greater than 0"),
                       ("0", "it should be greater than 0"), ("inf", "it should be a finite number")):  # fmt: skip
        result = ekd("train", "lenet", "--lr", value, "--out", "run")
        assert result.stderr == "error: " + message(
            f"training.lr: {value!r} cannot be used", why, "give training.lr a number in that range\n"
        )
        assert (result.exit_code, tree()) == (2, {})


refuses(
    41, "temperature not positive", TRIES.format("lenet --temperature 0"), "temperature: '0' cannot be used",
    "it should be greater than 0", "give temperature a number in that range",
)  # fmt: skip
refuses(
    42, "weights that do not sum to 1", TRIES.format("lenet,resnet8 --weights 0.5,0.7"),
    "weights: 0.5, 0.7 sum to 1.2, not to 1", "other sums would change the scale of the loss",
    "say --weights 0.4166667,0.5833333",
)  # fmt: skip
refuses(
    43, "number of weights", TRIES.format("lenet,resnet8 --weights 1"), "weights: 1 number(s) for 2 teacher(s)",
    "the teachers are lenet, resnet8", "give one weight a teacher, in their order",
)  # fmt: skip
refuses(
    44, "no teachers", "distill --out run", "no teachers are named", "there is nothing to distil from",
    "say --teachers resnet18,vgg16",
)  # fmt: skip
refuses(
    45, "output folder not empty", "distill --teachers lenet --out 'my run'", "my run is not empty",
    "a run writes to a folder of its own",
    "go on with it: ekd resume 'my run'   (or replace it: --overwrite)",
    lambda: (stopped(), Path("run").rename("my run")),
)  # fmt: skip


def changed() -> None:
    stopped()
    path = Path("run/config.yaml")
    path.write_text(path.read_text().replace("\nseed: 0\n", "\nseed: 3\n").replace("loss: kl", "loss: js"))


@case(46, "resume with a changed config")
def _(patch: pytest.MonkeyPatch) -> None:
    changed()
    result = ekd("resume", "run")
    assert result.stderr == "error: " + message(
        "run cannot go on: its configuration changed",
        "seed was 0, is 3; loss was kl, is js",
        "bring that back, or start anew: ekd distill --config run/config.yaml --out PATH\n",
    )
    assert result.exit_code == 2
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml", "status.json", "train.log"}


@case(47, "disk full")
def _(patch: pytest.MonkeyPatch) -> None:
    write("old.png", "old")
    before = tree()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.context() as broken:
        broken.setattr(os, "fsync", full)
        broken.setattr("ensemble_kd.files.free_at", lambda path: 300)
        result = ekd("data", "digits", "--sheet", "old.png")
    where = Path("old.png").absolute()
    first, *rest = result.stderr.splitlines()
    assert first.startswith(f"error: no room for {where}: ")
    assert first.endswith(" kB are needed, 300 B are free")
    assert rest == [
        "  why: No space left on device",
        "  fix: make room, or name another folder; what was there before is there still",
    ]
    assert (result.exit_code, result.stdout, tree()) == (2, "", before)


@case(48, "read-only folder")
def _(patch: pytest.MonkeyPatch) -> None:
    Path("ro").mkdir()
    original = os.mkdir

    def mkdir(path: Any, *rest: Any, **options: Any) -> None:
        if "ro/" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        original(path, *rest, **options)

    patch.setattr(os, "mkdir", mkdir)
    result = ekd("distill", "--teachers", "lenet", "--out", "ro/run")
    why = "Read-only file system"
    assert result.stderr == "error: " + message(
        "cannot write to ro/run", why, "name another folder: --out PATH\n"
    )
    sheet = ekd("data", "digits", "--sheet", "ro/deep/sheet.png")
    where = Path("ro/deep/sheet.png").absolute()
    assert sheet.stderr == "error: " + message(
        f"cannot write {where}", why, "make it writable, or name another folder\n"
    )
    pets()
    archives.shutil.make_archive("pets", "zip", "pets")
    patch.setenv("EKD_CACHE", "ro/cache")
    unpacked = ekd("train", "lenet", "--data", "imagefolder:pets.zip", "--out", "run")
    assert unpacked.stderr == "error: " + message(
        "cannot unpack pets.zip into ro/cache/archives", why, "unpack it elsewhere: EKD_CACHE=PATH\n"
    )
    assert {result.exit_code, sheet.exit_code, unpacked.exit_code} == {2}
    assert list(Path("ro").iterdir()) == []


@case(49, "run locked by another process")
def _(patch: pytest.MonkeyPatch) -> None:
    stopped()
    with lock(Path("run")) or pytest.fail("nothing else holds it"):
        before = tree()
        for command in ("resume run", "distill --teachers lenet --out run --overwrite"):
            result = ekd(*shlex.split(command))
            assert result.stderr == "error: " + message(
                "run is in use", "another process writes to it", "wait for it, or name another: --out PATH\n"
            )
            assert (result.exit_code, tree()) == (2, before)


@case(50, "fewer devices than processes")
def _(patch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        patch.setenv(name, value)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    result = ekd("distill", "--teachers", "lenet", "--out", "run")
    assert result.stderr == "error: " + message(
        "2 processes for 1 GPU(s)",
        "each process needs a GPU of its own",
        "say torchrun --nproc-per-node 1, or --device cpu\n",
    )
    assert (result.exit_code, tree()) == (2, {})


refuses(
    51, "worker killed: what it left can go on", "distill --teachers lenet --out run", "run is not empty",
    "a run writes to a folder of its own", "go on with it: ekd resume run   (or replace it: --overwrite)",
    partial(stopped, "running"),  # as kill -9 leaves it; tests/test_distributed.py kills one of two processes
)  # fmt: skip


@case(52, "NaN loss")
def _(patch: pytest.MonkeyPatch) -> None:
    card()
    flags = "--limit-train 64 --epochs 1 --batch-size 16 --controls none --lr 1e30"
    sets = "--set training.clip_norm=1e30 --set training.warmup_epochs=0"
    result = ekd(*shlex.split(f"{TRIES.format('x.safetensors')} {flags} {sets}"))
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: teacher 'x'")]
    images = few().train.ids[order(0, 0, 64)][16:21].tolist()
    assert lines[-3:] == [
        "error: student: the loss is not finite in epoch 1, step 2 of 4",
        f"  why: what the network says is not, for the batch of the images {', '.join(map(str, images))} "
        "… and 11 more; no such step was taken",
        "  fix: try --lr 3e+29, or --set training.clip_norm=1",
    ]
    assert result.exit_code == 2
    assert Run(Path("run")).status()["state"] == "stopped"
    assert not list(Path("run").rglob("*.safetensors"))


@case(53, "missing extra")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ensemble_kd.trackers.find_spec", lambda name: None)
    before = tree()
    result = ekd("train", "lenet", "--track", "wandb")
    fix = "pip install 'ensemble-kd[wandb]', or leave it out"
    assert result.stderr == f"error: {message('track: wandb is not installed', 'it is an extra', fix)}\n"
    assert (result.exit_code, tree()) == (2, before)
    patch.setitem(sys.modules, "datasets", None)
    result = ekd("data", "hf:x")
    what = message("hf:x cannot be read", "datasets is not installed", "pip install 'ensemble-kd[hf]'")
    assert (result.exit_code, result.stderr, tree()) == (2, f"error: {what}\n", before)


# Class names as attack

LONG = "y" * 200


def shown_as(names: tuple[str, ...]) -> str:
    """The names in a table, on a progress bar, in a log line and in an error, each as it is."""
    table = text_table(["class", "n"], [[name, "1"] for name in names], names[0])
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr("ensemble_kd.console._stderr.level", logging.INFO)
        with progress(names[0][:30], 1) as advance:
            advance(1, note=names[0][:30])
    assert terminal.getvalue().count(names[0][:20]) >= 2  # a narrow terminal shows less beside a rate
    with logged() as lines:
        logging.getLogger("ensemble_kd").info("%s", names[0])
    assert lines == [f"INFO: {names[0]}"]
    assert str(Problem(names[0])) == names[0]
    return table


def drawn(names: tuple[str, ...]) -> None:
    """A picture that shows them; warnings are errors."""
    from ensemble_kd.analysis.plots import draw_heat_maps

    draw_heat_maps({"agreement": np.eye(len(names))}, names, Path("heat.png"))
    with Image.open("heat.png") as picture:
        assert picture.format == "PNG"


def kept(name: str) -> None:
    """The name survives a file of weights, and is shown in `ekd data` as the folder is called."""
    card(classes=(name, *"123456789"))
    assert load_student("x.safetensors").classes[0] == name
    if "/" not in name:
        pets(f"{name}:3 dog:3")
        result = ekd("data", "imagefolder:pets", "--sheet", "sheet.png")
        assert result.exit_code == 0
        assert any(line.split()[0] == name for line in result.stdout.splitlines() if line.split())


def hostile(number: int, words: str, name: str) -> None:
    """Enter a case: a class of that name is shown as it is, everywhere."""

    def check(patch: pytest.MonkeyPatch) -> None:
        assert name in shown_as((name, "dog"))
        kept(name)
        drawn((name, "dog"))

    case(number, words)(check)


hostile(54, "[/b] (breaks Rich)", "[/b]")
hostile(55, "x$frac$ (breaks matplotlib)", "x$\\frac$")


@case(56, "<script> in the report")
def _(patch: pytest.MonkeyPatch) -> None:
    from ensemble_kd.analysis.page import tag, text

    assert text("<script>\"&'") == "&lt;script&gt;&quot;&amp;&#x27;"
    assert tag("td", "<script>", title='"><script>').markup.count("<script>") == 0
    kept("<script>")  # a whole report with such names: tests/test_report.py


hostile(57, "CJK", "猫")
hostile(58, "200 characters", LONG)


@pytest.mark.parametrize("number", sorted(CASES), ids=lambda number: f"{number} {CASES[number][0]}")
def test_bad_input(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[number][1](monkeypatch)
    assert not Path("ran").exists()


def test_the_list_is_complete() -> None:
    assert sorted(CASES) == list(range(1, 59))
