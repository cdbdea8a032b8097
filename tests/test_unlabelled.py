"""Images without labels: how a folder of them is read, and what is distilled on them."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from scipy.special import log_softmax
from support import logged, refused
from torch import Tensor
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import distillation
from ensemble_kd.cli import app
from ensemble_kd.data import folders, load_data
from ensemble_kd.data.dataset import Dataset, Images, joined
from ensemble_kd.data.unlabelled import FIRST_ID, load_unlabelled
from ensemble_kd.data.views import hash_samples, uniform
from ensemble_kd.distillation import distill
from ensemble_kd.errors import ConfigError, DataError
from ensemble_kd.fresh import new_classifier
from ensemble_kd.losses import UNLABELLED
from ensemble_kd.models import parse
from ensemble_kd.resuming import resume
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import load_teacher

QUICK = {"epochs": 1, "teacher_epochs": 1, "limit_train": 200}


def save(folder: Path, pixels: Tensor, name: str = "{:04d}.png") -> Path:
    """The images (N, C, H, W) as files, in their order."""
    for number, image in enumerate(pixels):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path)
    return folder


def noise(count: int, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


@pytest.fixture
def colour(tmp_path: Path) -> Dataset:
    """RGB images of 12×10 pixels (width, height) in two classes."""
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            save(tmp_path / "colour" / split / name, noise(count, 3, 10, 12))
    return load_data(f"imagefolder:{tmp_path / 'colour'}")


# --- Reading ---------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, few_digits):
    pixels = noise(12)
    save(tmp_path / "all", pixels)
    (tmp_path / "all" / "0003.png").rename(tmp_path / "all" / "9.png")
    images = load_unlabelled(tmp_path / "all", few_digits)
    order = [*range(3), *range(4, 12), 3]
    assert images.pixels.equal(pixels[order])
    assert images.labels is None


def test_subfolders_are_read_and_their_names_mean_nothing(tmp_path, few_digits):
    pixels = noise(6)
    save(tmp_path / "all", pixels[:2], "b{}.png")
    save(tmp_path / "all" / "3", pixels[2:4])
    save(tmp_path / "all" / "c" / "deep" / "er", pixels[4:])
    images = load_unlabelled(tmp_path / "all", few_digits)
    assert images.pixels.equal(pixels[[2, 3, 0, 1, 4, 5]])
    assert images.labels is None


def test_ids_are_those_of_no_labelled_image(tmp_path, few_digits):
    images = load_unlabelled(save(tmp_path / "all", noise(7)), few_digits)
    assert images.ids.tolist() == [2**32 + number for number in range(7)]
    assert images.ids.dtype == torch.int64
    labelled = torch.cat([few_digits.train.ids, few_digits.val.ids, few_digits.test.ids])
    assert set(images.ids.tolist()).isdisjoint(labelled.tolist())


def test_views_of_unlabelled_images_are_those_of_no_labelled_one():
    """Ids that differ in their upper half alone are drawn for apart."""
    low = torch.arange(1000)
    assert (hash_samples(0, 0, low) != hash_samples(0, 0, low + FIRST_ID)).all()
    apart = (uniform(0, 0, low) - uniform(0, 0, low + FIRST_ID)).abs()
    assert apart.mean() == pytest.approx(1 / 3, abs=0.03)  # of two independent uniform numbers


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
@pytest.mark.parametrize("around", ["", "pictures/"])
def test_an_archive_is_read_as_its_folder(tmp_path, few_digits, own_cache, kind, around):
    folder = save(tmp_path / "all", noise(5), "{}/x.png")
    path = tmp_path / f"all.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, around + file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(folder, arcname=around or ".")
    images, same = (load_unlabelled(place, few_digits) for place in (path, folder))
    assert images.pixels.equal(same.pixels)
    assert images.ids.equal(same.ids)


def test_a_folder_may_lie_below_home(tmp_path, few_digits, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "all", noise(3))
    assert len(load_unlabelled(Path("~/all"), few_digits)) == 3


def test_hidden_and_other_files_are_left_out(tmp_path, few_digits):
    folder = save(tmp_path / "all", noise(3))
    for name in ("notes.txt", ".DS_Store", "._0001.png", "__MACOSX/0001.png", ".thumbs/0001.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    (folder / "folder.png").mkdir()
    assert len(load_unlabelled(folder, few_digits)) == 3


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path, few_digits, colour):
    rgb, grey = noise(4, 3, 8, 8), noise(4, 1, 10, 12)
    images = load_unlabelled(save(tmp_path / "rgb", rgb), few_digits)
    weighted = (rgb.double() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    assert images.pixels.shape == (4, 1, 8, 8)
    assert (images.pixels.double() - weighted).abs().max() <= 1
    images = load_unlabelled(save(tmp_path / "grey", grey), colour)
    assert images.pixels.equal(grey.expand(-1, 3, -1, -1))


def test_colour_and_grey_may_lie_in_one_folder(tmp_path, few_digits, colour):
    save(tmp_path / "all", noise(2, 3, 10, 12), "a{}.png")
    save(tmp_path / "all", noise(2, 1, 10, 12), "b{}.png")
    assert load_unlabelled(tmp_path / "all", few_digits).pixels.shape == (4, 1, 8, 8)
    assert load_unlabelled(tmp_path / "all", colour).pixels.shape == (4, 3, 10, 12)


@pytest.mark.parametrize(("height", "width"), [(30, 24), (10, 40), (40, 12), (5, 6), (10, 12)])
def test_images_of_other_sizes_cover_that_of_the_data(tmp_path, colour, height, width):
    """Resized until they cover it, then cut in the middle."""
    pixels = noise(2, 3, height, width)
    images = load_unlabelled(save(tmp_path / "all", pixels), colour)
    assert images.pixels.shape == (2, 3, 10, 12)
    for image, source in zip(images.pixels, pixels, strict=True):
        whole = Image.fromarray(source.permute(1, 2, 0).numpy())
        fitted = ImageOps.fit(whole, (12, 10), Image.Resampling.BILINEAR)
        assert image.equal(torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1))


def test_the_same_file_has_the_same_pixels_with_and_without_a_label(tmp_path):
    sizes = [(20, 20), (9, 14), (33, 21), (8, 8)]
    for name in ("cat", "dog"):
        for number, (height, width) in enumerate(sizes * 2):
            save(tmp_path / "all" / name, noise(1, 3, height, width), f"{number}.png")
    data = load_data(f"imagefolder:{tmp_path / 'all'}", split=0.25)
    images = load_unlabelled(tmp_path / "all", data)
    labelled = torch.cat([data.train.ids, data.val.ids, data.test.ids])
    pixels = torch.cat([data.train.pixels, data.val.pixels, data.test.pixels])
    assert images.pixels.equal(pixels[labelled.argsort()])


# --- What is refused -------------------------------------------------------------------------------


def harm(path: Path, kind: str) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "page":
        path.write_text("<!DOCTYPE html><html></html>")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "link":
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("empty", "the file is empty"),
        ("page", "it is a web page, saved under an image's name"),
        ("text", "it is no image that Pillow knows"),
        ("link", "it is a link to a file that is not there"),
    ],
)
def test_a_broken_file_is_named(tmp_path, few_digits, kind, why):
    harm(save(tmp_path / "all", noise(3)) / "0001.png", kind)
    path = tmp_path / "all" / "0001.png"
    with refused(DataError, f"cannot read {path}", why, "replace or delete the file"):
        load_unlabelled(tmp_path / "all", few_digits)


@pytest.mark.parametrize("kind", ["empty", "page", "text", "cut", "link"])
def test_a_broken_file_is_told_as_in_a_folder_with_labels(tmp_path, few_digits, kind):
    for name in ("cat", "dog"):
        save(tmp_path / "all" / name, noise(8, 1, 30, 30))
    harm(tmp_path / "all" / "dog" / "0005.png", kind)
    with pytest.raises(DataError) as labelled:
        load_data(f"imagefolder:{tmp_path / 'all'}")
    with pytest.raises(DataError) as unlabelled:
        load_unlabelled(tmp_path / "all", few_digits)
    assert str(unlabelled.value) == str(labelled.value)


def test_all_broken_files_are_told_at_once_and_many_are_counted(tmp_path, few_digits):
    save(tmp_path / "all", noise(20))
    for number in range(3, 16):
        harm(tmp_path / "all" / f"{number:04d}.png", "empty")
    with pytest.raises(DataError) as caught:
        load_unlabelled(tmp_path / "all", few_digits)
    told = [problem.what for problem in caught.value.problems]
    expected = [f"cannot read {tmp_path / 'all' / f'{number:04d}.png'}" for number in range(3, 13)]
    assert told == [*expected, "and 3 more files that cannot be read"]


@pytest.mark.parametrize("content", ["nothing", "other files"])
def test_a_folder_without_images_is_refused(tmp_path, few_digits, content):
    (tmp_path / "all").mkdir()
    if content == "other files":
        (tmp_path / "all" / "labels.csv").write_text("1")
    with refused(
        DataError,
        f"{tmp_path / 'all'} has no images",
        "known endings: .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp",
        "name a folder of images",
    ):
        load_unlabelled(tmp_path / "all", few_digits)


@pytest.mark.parametrize(
    ("name", "why"),
    [("none", "there is nothing at that path"), ("one.png", "it is a file, and no .tar or .zip")],
)
def test_a_path_that_is_no_folder_is_refused(tmp_path, few_digits, name, why):
    """And nobody is sent to sort them into classes."""
    save(tmp_path, noise(1), "one.png")
    with refused(DataError, f"no image folder at {tmp_path / name}", why, "name a folder of images"):
        load_unlabelled(tmp_path / name, few_digits)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path, few_digits, monkeypatch):
    save(tmp_path / "all", noise(5))
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    with pytest.raises(DataError) as caught:
        load_unlabelled(tmp_path / "all", few_digits, "once")
    assert caught.value.problems[0].what == f"the images of {tmp_path / 'all'} do not fit into memory"


def test_test_images_among_them_are_told(tmp_path, few_digits):
    pixels = torch.cat([few_digits.train.pixels[:5], few_digits.test.pixels[:3], few_digits.val.pixels[:2]])
    save(tmp_path / "all", pixels)
    with logged() as lines:
        load_unlabelled(tmp_path / "all", few_digits)
    assert lines == [
        f"WARNING: 3 of the images in {tmp_path / 'all'} are test images too: "
        "what is measured on them is too good"
    ]


def test_images_of_the_other_splits_are_nothing_to_tell(tmp_path, few_digits):
    save(tmp_path / "all", torch.cat([few_digits.train.pixels[:5], few_digits.val.pixels[:5]]))
    with logged() as lines:
        load_unlabelled(tmp_path / "all", few_digits)
    assert lines == []


# --- Beside the labelled images --------------------------------------------------------------------


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """120 digits, without their labels."""
    return save(tmp_path_factory.mktemp("extra"), digits.val.pixels[:120])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Images]:
    """What each network of a run is trained on, by its description."""
    noted, original = {}, distillation.fit

    def spy(model: Any, train: Images, *args: Any, **options: Any) -> Any:
        noted[options["description"]] = train
        return original(model, train, *args, **options)

    monkeypatch.setattr(distillation, "fit", spy)
    return noted


def test_the_student_sees_both_and_the_control_the_labelled_ones(tmp_path, few_digits, extra, seen):
    with logged() as lines:
        run = distill(
            "lenet", "lenet", unlabelled=extra, controls="labels,best-teacher", batch_size=32,
            out=tmp_path / "run", **QUICK,
        )  # fmt: skip
    assert "INFO: distilling on 120 unlabelled images beside 200 labelled ones" in lines
    unlabelled = load_unlabelled(extra, few_digits)
    for name in ("student", "control best-teacher"):
        images = seen[name]
        assert images.pixels.equal(torch.cat([few_digits.train.pixels, unlabelled.pixels]))
        assert images.labels[:200].equal(few_digits.train.labels)
        assert (images.labels[200:] == UNLABELLED).all()
        assert images.ids.equal(torch.cat([few_digits.train.ids, unlabelled.ids]))
    alone = seen["control labels"]
    assert alone.pixels.equal(few_digits.train.pixels)
    assert alone.labels.equal(few_digits.train.labels)
    steps = {row["network"]: row["step"] for row in Run(run.folder).history()}
    assert steps == {"student": 10, "best-teacher": 10, "labels": 6}


def test_joining_leaves_the_labels_out(few_digits):
    """Also where the second images do have labels."""
    both = joined(few_digits.train, few_digits.val)
    assert both.labels.tolist() == few_digits.train.labels.tolist() + [-1] * len(few_digits.val)
    assert both.digest != joined(few_digits.train, few_digits.test).digest


def test_the_first_loss_and_accuracy_equal_those_by_hand(tmp_path, few_digits, extra, own_cache):
    """With steps of no length: the label loss of 200 over 320 images, the soft loss of all."""
    options = ["training.init=default", "training.warmup_epochs=0"]
    run = distill(
        "lenet", "lenet", unlabelled=extra, controls="labels", batch_size=80, lr=1e-12, soft_weight=0.7,
        temperature=3, augment="none", sets=options, out=tmp_path / "run", **QUICK,
    )  # fmt: skip
    history = {row["network"]: row["train"] for row in Run(run.folder).history()}
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1}, augment="none", train=False)
    student = new_classifier(parse("lenet"), few_digits, seed=0).eval()
    pixels = torch.cat([few_digits.train.pixels, load_unlabelled(extra, few_digits).pixels])
    labels = few_digits.train.labels.numpy()
    with torch.no_grad():
        s, z = (network(pixels).double().numpy() for network in (student, teacher.classifier))
    log_q, log_p = log_softmax(s / 3, axis=1), log_softmax(z / 3, axis=1)
    soft = 9 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    hard = -log_softmax(s[:200], axis=1)[np.arange(200), labels].sum() / 320
    assert history["student"]["loss"] == pytest.approx(0.3 * hard + 0.7 * soft, rel=1e-4)
    assert history["student"]["accuracy"] == pytest.approx((s[:200].argmax(1) == labels).mean())


def test_names_of_subfolders_are_no_labels(tmp_path, digits):
    """The same images under the names of their classes, and of wrong ones, teach the same student."""
    students = []
    for name, shift in (("right", 0), ("wrong", 3)):
        for number in range(60):
            label = (int(digits.val.labels[number]) + shift) % 10
            save(tmp_path / name / f"{number:02d}" / str(label), digits.val.pixels[number : number + 1])
        run = distill(
            "lenet", "lenet", unlabelled=tmp_path / name, controls="none", out=tmp_path / f"run-{name}", **QUICK
        )  # fmt: skip
        students.append(run.student.fingerprint())
    assert students[0] == students[1]


@pytest.mark.parametrize("loss", ["reverse-kl", "hard", "dist", "mse"])
def test_losses_without_labels_take_unlabelled_images(tmp_path, extra, loss):
    run = distill(
        "lenet", "lenet", unlabelled=extra, loss=loss, controls="none", out=tmp_path / "run", **QUICK
    )
    (row,) = Run(run.folder).history()
    assert np.isfinite(row["train"]["loss"])
    assert 0 <= row["train"]["accuracy"] <= 1


@pytest.mark.parametrize("combine", ["entropy", "learned", "drop"])
def test_combiners_without_labels_take_unlabelled_images(tmp_path, extra, combine):
    run = distill(
        "lenet,resnet8", "lenet", unlabelled=extra, unlabelled_only=True, combine=combine, controls="none",
        out=tmp_path / "run", **QUICK,
    )  # fmt: skip
    assert sum(run.metrics["combination"]["weights"].values()) == pytest.approx(1)


# --- On the unlabelled images alone ----------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(digits: Dataset) -> Teacher:
    return load_teacher("lenet", digits, training={"epochs": 4})


@pytest.fixture(scope="module")
def transfer(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """All training digits, without their labels."""
    return save(tmp_path_factory.mktemp("transfer"), digits.train.pixels)


def test_a_student_learns_from_images_without_labels(tmp_path, digits, teacher, transfer, seen):
    with logged() as lines:
        run = distill(
            [teacher], "lenet", unlabelled=transfer, unlabelled_only=True, epochs=4, out=tmp_path / "run"
        )
    assert "INFO: distilling on 1,293 unlabelled images alone" in lines
    assert seen["student"].labels is None
    assert seen["student"].pixels.equal(digits.train.pixels)
    assert seen["control labels"].labels.equal(digits.train.labels)
    models = run.metrics["models"]
    assert models["student"]["accuracy"]["value"] > 0.85  # 0.1 by chance
    assert models["student"]["agreement"]["value"] > 0.85
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (config["soft_weight"], config["unlabelled_only"]) == (1.0, True)
    assert config["unlabelled"] == str(transfer)
    history = Run(run.folder).history()
    assert [row["network"] for row in history] == ["student"] * 4 + ["labels"] * 4
    for row in history:
        alone = row["network"] == "labels"
        assert ("accuracy" in row["train"]) == alone
        assert row["soft_weight"] == (0 if alone else 1)
        assert row["val"].keys() == {"accuracy", "loss", "teacher_student_cross_entropy"}


@pytest.mark.parametrize(
    ("given", "soft"),
    [
        ({}, 0.3),
        ({"unlabelled": "x"}, 0.3),
        ({"unlabelled": "x", "unlabelled_only": True}, 1.0),
        ({"unlabelled": "x", "soft_weight": 0.5}, 0.5),
        ({"unlabelled": "x", "unlabelled_only": True, "soft_weight": 1}, 1.0),
    ],
)
def test_the_soft_weight_is_one_by_default_where_no_label_is_seen(given, soft):
    assert DistillOptions(teachers=["lenet"], **given).soft == soft


def test_a_run_without_labels_is_repeated_and_resumed(tmp_path, extra, monkeypatch):
    options = {"unlabelled": extra, "unlabelled_only": True, "controls": "labels", **QUICK}
    whole = distill("lenet", "lenet", out=tmp_path / "whole", **options)
    again = distill(config_file=whole.folder / "config.yaml", controls="none", out=tmp_path / "again")
    assert again.student.fingerprint() == whole.student.fingerprint()
    original = distillation.fit

    def stop_at_the_control(*args, **kwargs):
        if kwargs["description"] == "control labels":
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "fit", stop_at_the_control)
        with pytest.raises(KeyboardInterrupt):
            distill("lenet", "lenet", out=tmp_path / "part", **options)
    resumed = resume(tmp_path / "part")
    assert resumed.metrics["models"] == whole.metrics["models"]
    assert resumed.student.fingerprint() == whole.student.fingerprint()


def test_a_run_is_not_repeated_without_its_images(tmp_path, extra):
    folder = tmp_path / "gone"
    shutil.copytree(extra, folder)
    run = distill("lenet", "lenet", unlabelled=folder, controls="none", out=tmp_path / "run", **QUICK)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"no image folder at {folder}"):
        distill(config_file=run.folder / "config.yaml", out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_fewer_images_than_a_batch_are_one_step(tmp_path, digits, seen):
    folder = save(tmp_path / "few", digits.train.pixels[:5])
    run = distill("lenet", "lenet", unlabelled=folder, unlabelled_only=True, out=tmp_path / "run", **QUICK)
    assert len(seen["student"]) == 5
    assert [row["step"] for row in Run(run.folder).history()] == [1, 40]


def test_colour_data_take_an_archive(tmp_path, colour, own_cache):
    folder = save(tmp_path / "all", noise(10, 3, 20, 20))
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", folder)
    run = distill(
        "lenet", "lenet", data=colour.name, unlabelled=archive, unlabelled_only=True, controls="none",
        epochs=1, teacher_epochs=1, out=tmp_path / "run",
    )  # fmt: skip
    assert run.metrics["models"]["student"]["role"] == "student"
    assert ensemble_kd.load_student(run.folder).card.preprocess.channels == 3


# --- What is refused before a folder is made -------------------------------------------------------

REFUSED = {
    "labels wanted": (
        {"unlabelled_only": True, "soft_weight": 0.9},
        (
            "soft_weight: 0.9 leaves 0.1 to labels",
            "the student sees no labelled image",
            "leave it out, or say --soft-weight 1",
        ),
    ),
    "only labels wanted": (
        {"unlabelled_only": True, "soft_weight": 0},
        (
            "soft_weight: 0 leaves 1 to labels",
            "the student sees no labelled image",
            "leave it out, or say --soft-weight 1",
        ),
    ),
    **{
        f"schedule {name}": (
            {"unlabelled_only": True, "soft_schedule": name},
            (
                f"soft_schedule: {name} gives epochs to labels",
                "the student sees no labelled image",
                "leave it out, or say --soft-schedule constant",
            ),
        )
        for name in ("linear", "cutoff", "warmup")
    },
    "no folder": (
        {"unlabelled_only": True, "unlabelled": None},
        ("unlabelled_only: there are no such images", "none are named", "say --unlabelled PATH"),
    ),
    **{
        f"confidence{' alone' if only else ''}": (
            {"unlabelled_only": only, "combine": "confidence"},
            (
                "combine: confidence needs the label of every training image",
                "the unlabelled ones have none",
                "choose one of mean, fixed, learned, greedy, entropy, agree, drop, best",
            ),
        )
        for only in (False, True)
    },
    **{
        f"dkd{' alone' if only else ''}": (
            {"unlabelled_only": only, "loss": "dkd"},
            (
                "loss: dkd needs the label of every training image",
                "the unlabelled ones have none",
                "choose one of kl, kl-unscaled, ce, reverse-kl, js, mse, dist, logit-std, hard",
            ),
        )
        for only in (False, True)
    },
}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "fit", lambda *_, **__: pytest.fail("something was trained"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_labels_is_refused_with_the_alternatives(tmp_path, extra, no_training, case):
    options, problem = REFUSED[case]
    with refused(ConfigError, *problem):
        distill("lenet", "lenet", out=tmp_path / "run", **{"unlabelled": extra, **QUICK, **options})
    assert not (tmp_path / "run").exists()


def test_a_function_that_wants_labels_is_refused(tmp_path, extra, no_training):
    def mine(count, labels):
        return torch.full((count, len(labels)), 1 / count)

    with refused(
        ConfigError,
        "combine: python:mine needs the label of every training image",
        "the unlabelled ones have none",
        "choose one of mean, fixed, learned, greedy, entropy, agree, drop, best",
    ):
        distill("lenet", "lenet", combine=mine, unlabelled=extra, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_everything_that_is_wrong_with_the_options_is_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        distill(
            "lenet", "lenet", unlabelled_only=True, soft_weight=0.5, soft_schedule="linear", out=tmp_path / "run"
        )  # fmt: skip
    assert [problem.what for problem in caught.value.problems] == [
        "unlabelled_only: there are no such images",
        "soft_weight: 0.5 leaves 0.5 to labels",
        "soft_schedule: linear gives epochs to labels",
    ]


def test_a_folder_that_cannot_be_read_is_told_with_the_rest_before_a_run_folder_is_made(
    tmp_path, digits, no_training
):
    harm(save(tmp_path / "all", noise(3)) / "0001.png", "text")
    with pytest.raises(ConfigError) as caught:
        distill("lenet", "vgg11", student_size=20, unlabelled=tmp_path / "all", out=tmp_path / "run", **QUICK)
    assert [problem.what for problem in caught.value.problems] == [
        f"cannot read {tmp_path / 'all' / '0001.png'}",
        "'vgg11' cannot take 20×20 images",
    ]
    assert not (tmp_path / "run").exists()


# --- The command line ------------------------------------------------------------------------------


def ekd(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_line_takes_unlabelled_images(tmp_path, extra):
    options = ["--teachers", "lenet", "--epochs", "1", "--teacher-epochs", "1", "--limit-train", "200"]
    options += ["--controls", "none", "--unlabelled", extra]
    beside = ekd("distill", *options, "--json", "--out", tmp_path / "beside")
    alone = ekd("distill", *options, "--unlabelled-only", "--json", "--out", tmp_path / "alone")
    for result, line in (
        (beside, "distilling on 120 unlabelled images beside 200 labelled ones"),
        (alone, "distilling on 120 unlabelled images alone"),
    ):
        assert result.exit_code == 0, result.stderr
        assert line in result.stderr
        assert "student" in json.loads(result.stdout)["models"]
    soft = [yaml.safe_load((tmp_path / name / "config.yaml").read_text())["soft_weight"]
            for name in ("beside", "alone")]  # fmt: skip
    assert soft == [0.3, 1.0]


def test_the_command_line_refuses_what_needs_labels(tmp_path, extra):
    result = ekd(
        "distill", "--teachers", "lenet", "--unlabelled", extra, "--loss", "dkd", "--out", tmp_path / "run"
    )
    assert result.exit_code == 2
    assert result.stderr == (
        "error: loss: dkd needs the label of every training image\n"
        "  why: the unlabelled ones have none\n"
        "  fix: choose one of kl, kl-unscaled, ce, reverse-kl, js, mse, dist, logit-std, hard\n"
    )
