"""The main road through its public door: what a run computes, leaves behind, and repeats."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from support import refused

import ensemble_kd
from ensemble_kd import distillation
from ensemble_kd.classifier import Classifier
from ensemble_kd.distillation import distill
from ensemble_kd.errors import ConfigError, ModelError, RunError, TrainingError
from ensemble_kd.results import verdict
from ensemble_kd.resuming import resume
from ensemble_kd.runs import Run
from ensemble_kd.tables import metrics_table
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.registry import load_teacher

QUICK = {"epochs": 2, "teacher_epochs": 1, "limit_train": 200}
MEASURES = {
    "accuracy", "top5", "nll", "ece", "teacher_student_cross_entropy", "teacher_student_kl", "agreement",
}  # fmt: skip


def test_a_run_leaves_what_the_design_names(finished):
    names = {p.relative_to(finished.folder).as_posix() for p in finished.folder.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml", "manifest.json", "status.json", "history.jsonl", "metrics.json", "curves.png",
        "train.log", "student.safetensors", "predictions.safetensors", "controls/labels.safetensors",
        "controls/best-teacher.safetensors", "controls/independent.safetensors",
    }  # fmt: skip
    assert json.loads((finished.folder / "status.json").read_text())["state"] == "finished"
    with Image.open(finished.folder / "curves.png") as curves:
        assert curves.size[0] > 1000


def test_metrics_hold_every_measure_for_every_model_with_an_interval(finished):
    models = finished.metrics["models"]
    assert {name: row["role"] for name, row in models.items()} == {
        "student": "student", "labels": "control", "best-teacher": "control", "independent": "control",
        "lenet": "teacher", "resnet8": "teacher", "ensemble": "ensemble",
    }  # fmt: skip
    for row in models.values():
        assert row.keys() >= MEASURES
        for name in MEASURES:
            measure = row[name]
            assert measure["low"] <= measure["value"] + 1e-9
            if name != "ece":  # its bootstrap is biased upwards, as the measure itself is
                assert measure["value"] <= measure["high"] + 1e-9
    assert models["ensemble"]["agreement"]["value"] == 1
    assert models["ensemble"]["teacher_student_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert models["ensemble"]["parameters"] == models["lenet"]["parameters"] + models["resnet8"]["parameters"]


def test_metrics_agree_with_the_stored_predictions(finished):
    tensors = safetensors.torch.load_file(finished.folder / "predictions.safetensors")
    logits = {
        name.removeprefix("logits/"): t.double().numpy() for name, t in tensors.items() if name != "labels"
    }
    labels = tensors["labels"].numpy()
    softmax = {k: np.exp(z - z.max(1, keepdims=True)) for k, z in logits.items()}
    p = {k: e / e.sum(1, keepdims=True) for k, e in softmax.items()}
    mixture = (p["lenet"] + p["resnet8"]) / 2
    np.testing.assert_allclose(p["ensemble"], mixture, atol=1e-6)
    row = finished.metrics["models"]["student"]
    assert row["accuracy"]["value"] == pytest.approx((logits["student"].argmax(1) == labels).mean())
    nll = -np.log(p["student"][np.arange(len(labels)), labels]).mean()
    assert row["nll"]["value"] == pytest.approx(nll)
    cross_entropy = -(mixture * np.log(p["student"])).sum(1).mean()
    assert row["teacher_student_cross_entropy"]["value"] == pytest.approx(cross_entropy, abs=1e-5)
    gain = (logits["student"].argmax(1) == labels).mean() - (logits["labels"].argmax(1) == labels).mean()
    assert finished.metrics["differences"]["labels"]["accuracy"]["value"] == pytest.approx(gain)


def test_the_table_names_every_model_and_column(finished):
    table = metrics_table(finished.metrics)
    for text in ("student", "control labels", "control independent", "teacher resnet8", "ensemble",
                 "accuracy", "top-5", "NLL", "ECE", "t–s CE", "t–s KL", "agreement", "parameters", "MB",
                 "digits, test split, 360 images", "times smaller"):  # fmt: skip
        assert text in table
    assert verdict(finished.metrics["differences"]) in table


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.01, 0.03, "helped"), (-0.03, -0.01, "hurt"), (-0.01, 0.01, "No clear")]
)
def test_the_verdict_claims_no_more_than_its_interval(low, high, words):
    accuracy = {"value": (low + high) / 2, "low": low, "high": high}
    assert words in verdict({"labels": {"accuracy": accuracy}})


def test_the_history_has_the_three_measures_on_both_splits(finished):
    rows = Run(finished.folder).history()
    assert {row["network"] for row in rows} == {"student", "labels", "best-teacher", "independent"}
    student = [row for row in rows if row["network"] == "student"]
    assert [row["epoch"] for row in student] == [1, 2, 3, 4]
    for row in rows:
        for split in ("train", "val"):
            assert row[split].keys() == {"accuracy", "loss", "teacher_student_cross_entropy"}
    assert student[-1]["val"]["loss"] < student[0]["val"]["loss"]


def test_teachers_are_the_same_before_and_after(finished):
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert [teacher["label"] for teacher in manifest["teachers"]] == ["lenet", "resnet8"]
    for teacher in manifest["teachers"]:
        assert teacher["before"] == teacher["after"]
        assert ensemble_kd.load_student(teacher["origin"]).fingerprint() == teacher["after"]


def test_the_resolved_configuration_gives_the_same_student(finished, tmp_path):
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert config["training"]["epochs"] == 4
    assert config["views"] == 1
    again = distill(config_file=finished.folder / "config.yaml", controls="none", out=tmp_path / "again")
    assert again.student.fingerprint() == finished.student.fingerprint()
    first = {k: v["value"] for k, v in finished.metrics["models"]["student"].items() if k in MEASURES}
    second = {k: v["value"] for k, v in again.metrics["models"]["student"].items() if k in MEASURES}
    assert first == second


def test_another_seed_gives_another_student_but_the_same_teachers(finished, tmp_path):
    other = distill(
        config_file=finished.folder / "config.yaml", controls="none", seed=1, out=tmp_path / "other"
    )
    assert other.student.fingerprint() != finished.student.fingerprint()
    first, second = (
        json.loads((r.folder / "manifest.json").read_text())["teachers"] for r in (finished, other)
    )
    for one, another in zip(first, second, strict=True):  # each process has a copy of the library
        assert Path(one.pop("origin")).name == Path(another.pop("origin")).name
    assert first == second


def test_independent_teachers_are_others(finished, own_cache):
    log = (finished.folder / "train.log").read_text()
    assert "lenet-digits-s1000-" in log
    assert "resnet8-digits-s1000-" in log


def test_soft_weight_one_reads_no_training_label(tmp_path, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append(args[1])
        return original(*args, **kwargs)

    original = distillation.fit
    load_teacher("lenet", ensemble_kd.load_data("digits", limit_train=200), training={"epochs": 1})
    monkeypatch.setattr(distillation, "fit", spy)
    run = distill("lenet", "lenet", soft_weight=1, controls="none", out=tmp_path / "soft", **QUICK)
    assert len(seen) == 1
    rows = Run(run.folder).history()
    assert all("accuracy" not in row["train"] for row in rows)
    assert all(math.isfinite(row["train"]["loss"]) for row in rows)


def test_weights_and_temperatures_shape_the_target(tmp_path):
    common = {"controls": "none", **QUICK}
    alone = distill("lenet", "lenet", temperature=2, out=tmp_path / "alone", **common)
    weighted = distill(
        ["lenet", "resnet8"], "lenet", weights=[1, 0], temperature="lenet=2,resnet8=7",
        out=tmp_path / "weighted", **common,
    )  # fmt: skip
    assert weighted.student.fingerprint() == alone.student.fingerprint()
    own = distill(["lenet"], "lenet", temperature={"lenet": 2, "student": 5}, out=tmp_path / "own", **common)
    assert own.student.fingerprint() != alone.student.fingerprint()


def test_the_pools_differ(tmp_path):
    students = [
        distill("lenet,resnet8", "lenet", pool=pool, controls="none", out=tmp_path / pool, **QUICK).student
        for pool in ("prob", "logit")
    ]
    assert students[0].fingerprint() != students[1].fingerprint()


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_live_and_stored_targets_train_nearly_the_same_student(tmp_path, augment):
    options = {"augment": augment, "controls": "none", "soft_weight": 1, **QUICK, "epochs": 1}
    live, stored = (
        distill("lenet", "lenet", views=views, out=tmp_path / f"v{views}", **options) for views in (0, 1)
    )
    images = ensemble_kd.load_data("digits").test.pixels
    with torch.no_grad():
        gap = (live.student(images).softmax(1) - stored.student(images).softmax(1)).abs().max()
    assert gap < 2e-3


def test_teacher_objects_and_a_student_object_are_taken(tmp_path, few_digits):
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1})
    mine = Teacher.of("mine", teacher.classifier, "made here")
    run = distill([mine, "lenet"], "lenet", controls="none", out=tmp_path / "objects", **QUICK)
    assert list(run.metrics["models"]) == ["student", "mine", "lenet", "ensemble"]
    named = distill(["lenet"], "lenet", controls="none", out=tmp_path / "named", **QUICK)
    # Both teachers are the same network, so their mean is that network but for rounding.
    with torch.no_grad():
        apart = (named.student(few_digits.test.pixels) - run.student(few_digits.test.pixels)).abs().max()
    assert float(apart) < 1e-3


def test_the_student_reloads_bit_equal(finished):
    images = ensemble_kd.load_data("digits").test.pixels
    with torch.no_grad():
        expected = finished.student(images)
        for path in (finished.folder, finished.folder / "student.safetensors"):
            torch.testing.assert_close(ensemble_kd.load_student(path)(images), expected, rtol=0, atol=0)


def test_a_stopped_run_is_resumed_without_training_finished_networks_again(tmp_path, monkeypatch):
    whole = distill("lenet", "lenet", controls="labels,best-teacher", out=tmp_path / "whole", **QUICK)
    original, calls = distillation.fit, []

    def stop_at_the_second(*args, **kwargs):
        calls.append(kwargs["description"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(distillation, "fit", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        distill("lenet", "lenet", controls="labels,best-teacher", out=tmp_path / "part", **QUICK)
    assert Run(tmp_path / "part").status()["state"] == "stopped"
    with pytest.raises(RunError) as error:
        distill("lenet", "lenet", out=tmp_path / "part", **QUICK)
    assert str(error.value) == (
        f"{tmp_path / 'part'} is not empty\n"
        "  why: a run writes to a folder of its own\n"
        f"  fix: go on with it: ekd resume {tmp_path / 'part'}   (or replace it: --overwrite)"
    )
    resumed = resume(tmp_path / "part")
    assert calls == ["student", "control labels", "control labels", "control best-teacher"]
    assert resumed.metrics["models"] == whole.metrics["models"]
    assert len(Run(tmp_path / "part").history()) == len(Run(tmp_path / "whole").history())
    with pytest.raises(RunError, match="is finished"):
        resume(tmp_path / "part")


def test_a_finished_run_of_train_is_not_resumed(tmp_path):
    folder = ensemble_kd.train("lenet", epochs=1, limit_train=200, out=tmp_path / "t").folder
    with pytest.raises(RunError) as error:
        resume(folder)
    assert str(error.value) == (
        f"{folder} is finished\n  why: there is nothing left to do\n  fix: look at it: ekd evaluate {folder}"
    )


def test_everything_that_is_wrong_is_told_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError) as error:
        distill("resnt18,vgg61", "lenett", data="digitss", device="tpu", out=tmp_path / "x")
    assert [problem.what for problem in error.value.problems] == [
        "no model is called 'resnt18'",
        "no model is called 'vgg61'",
        "no model is called 'lenett'",
        "there is no device 'tpu' here",
        "unknown data source 'digitss'",
    ]
    with pytest.raises(ConfigError) as error:
        distill("vgg16,vgg11", "lenet", teacher_size="vgg16=28,vgg11=20", student_size=20, out=tmp_path / "x")
    assert [problem.what for problem in error.value.problems] == [
        "'vgg16' cannot take 28×28 images",
        "'vgg11' cannot take 20×20 images",
        "'lenet' cannot take 20×20 images",
    ]
    assert not (tmp_path / "x").exists()


def test_objects_must_know_the_classes_and_cannot_be_resumed(tmp_path, few_digits, monkeypatch):
    teacher = load_teacher("lenet", few_digits, training={"epochs": 1})
    card = dataclasses.replace(teacher.classifier.card, classes=tuple("abcdefghij"))
    other = Teacher.of("mine", Classifier(teacher.classifier.net, card), "made here")
    with pytest.raises(ModelError, match="'mine' has other classes than digits"):
        distill([other], "lenet", out=tmp_path / "x", **QUICK)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "fit", stop)
    mine = Teacher.of("mine", teacher.classifier, "made here")
    with pytest.raises(KeyboardInterrupt):
        distill([mine], "lenet", out=tmp_path / "y", **QUICK)
    with pytest.raises(RunError) as error:
        resume(tmp_path / "y")
    assert str(error.value) == (
        f"{tmp_path / 'y'} cannot be resumed\n"
        "  why: it was given teachers, a student or a function as Python objects, which are not in the folder\n"
        "  fix: call distill again with the same objects and overwrite=True"
    )


def test_overwriting_leaves_nothing_of_the_run_before(tmp_path, monkeypatch):
    folder = distill("lenet", "lenet", out=tmp_path / "r", **QUICK).folder
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(distillation, "fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill("lenet", "lenet", out=folder, overwrite=True, **QUICK)
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.yaml", "status.json", "train.log", "notes.txt"}


def test_a_run_is_judged_on_its_own_test_images(finished):
    data = ensemble_kd.load_data("digits", limit_train=600)
    row = ensemble_kd.evaluate(finished.folder)["models"]["finished"]
    assert row["accuracy"] == finished.metrics["models"]["student"]["accuracy"]
    by_file = ensemble_kd.evaluate(finished.folder / "student.safetensors")["models"]["finished"]
    assert by_file == row
    on_val = ensemble_kd.evaluate(finished.folder, on="val")
    assert on_val["n"] == len(data.val)


def test_a_full_folder_is_refused_and_kept(finished, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RunError) as error:
        distill("lenet", "lenet", out=tmp_path / "photos", overwrite=True, **QUICK)
    assert str(error.value) == (
        f"{tmp_path / 'photos'} is not empty\n"
        "  why: a run writes to a folder of its own\n"
        "  fix: name another folder: --out PATH (what is no run is never overwritten)"
    )
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    with pytest.raises(RunError) as error:
        distill("lenet", "lenet", out=finished.folder, **QUICK)
    assert str(error.value) == (
        f"{finished.folder} is not empty\n"
        "  why: a run writes to a folder of its own\n"
        "  fix: replace it with --overwrite, or name another folder: --out PATH"
    )


def test_independent_teachers_need_something_to_train(finished, tmp_path):
    with pytest.raises(ConfigError) as error:
        distill(str(finished.folder), "lenet", controls="independent", out=tmp_path / "x")
    assert str(error.value) == (
        "controls: independent teachers cannot be made for finished\n"
        "  why: they come with trained weights, so there is no other seed to train\n"
        "  fix: leave that control out: --controls labels,best-teacher"
    )


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        distill("lenet", "lenet", batch_size=4096, out=tmp_path / "x")
    assert str(error.value) == (
        "batch_size: 4096 is more than the 1293 training images\n"
        "  why: an epoch would have no step\n"
        "  fix: say --batch-size 32"
    )


def test_a_batch_of_the_teachers_larger_than_the_data_is_told_before_anything_is_made(tmp_path):
    sets = ["teacher_training.batch_size=4096"]
    with refused(
        ConfigError,
        "teacher_training.batch_size: 4096 is more than the 1293 training images",
        "an epoch would have no step",
        "say --set teacher_training.batch_size=32",
    ):
        distill("lenet", "lenet", sets=sets, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_diverging_run_says_so_and_keeps_no_student(tmp_path):
    options = {"controls": "none", **QUICK, "lr": 1e9, "sets": ["training.clip_norm=1e9"]}
    with pytest.raises(TrainingError, match=r"student: the loss is not finite in epoch \d"):
        distill("lenet", "lenet", out=tmp_path / "x", **options)
    assert not (tmp_path / "x" / "student.safetensors").exists()


def test_a_teacher_that_writes_to_its_buffers_is_caught(tmp_path, few_digits):
    class Counting(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    honest = load_teacher("lenet", few_digits, training={"epochs": 1}).classifier
    restless = Teacher.of("restless", Classifier(Counting(honest.net), honest.card), "made here")
    with pytest.raises(ModelError, match="teacher 'restless' changed while it taught"):
        distill([restless], "lenet", controls="none", out=tmp_path / "x", **QUICK)
