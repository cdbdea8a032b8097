"""Combining through the public door: what a run fits, keeps, shows and trains on, for every combiner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.special import log_softmax, softmax
from support import refused
from torch import Tensor

from ensemble_kd.calibration import fit_temperature
from ensemble_kd.cli.distill import distill as distill_verb
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.distillation import DistillResult, distill
from ensemble_kd.errors import ConfigError, TrainingError
from ensemble_kd.losses import LOSSES
from ensemble_kd.models import user_object
from ensemble_kd.objective import Viewing
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.tables import metrics_table
from ensemble_kd.teachers import registry
from ensemble_kd.teachers.combination import Combination, describe, set_up
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets
from ensemble_kd.weighting import COMBINERS, EACH_BATCH, entropy_weights, inputs_of, learned_weights

QUICK = {"epochs": 2, "limit_train": 200, "controls": "none"}
FITTED = ("learned", "greedy", "best")
VARYING = ("entropy", "confidence", "agree", "drop")


@pytest.fixture(scope="module")
def teachers(few_digits: Dataset) -> list[Teacher]:
    """Three of unlike strength."""
    return [
        load_teacher("lenet", few_digits, training={"epochs": 4}),
        load_teacher("resnet8", few_digits, training={"epochs": 4}),
        load_teacher("cifar-quick", few_digits, training={"epochs": 1}),
    ]


def run(teachers: list[Teacher], folder: Path, **options) -> DistillResult:
    return distill(teachers, "lenet", out=folder, **{**QUICK, **options})


def stacked(teachers: list[Teacher], images) -> Tensor:
    return torch.stack([teacher.all_logits(images) for teacher in teachers])


def test_the_names_in_the_help_are_those_of_the_tables():
    fields = DistillOptions.model_fields
    for name in COMBINERS:
        assert name in fields["combine"].description
    for name in LOSSES:
        assert name in fields["loss"].description
    assert {name for name in COMBINERS if inputs_of(COMBINERS[name]) & set(EACH_BATCH)} == set(VARYING)
    assert distill_verb.__doc__


@pytest.mark.parametrize("combine", [name for name in COMBINERS if name != "fixed"])
def test_every_combiner_teaches(teachers, few_digits, tmp_path, combine):
    result = run(teachers, tmp_path / "run", combine=combine)
    report, rows = result.metrics["combination"], Run(result.folder).history()
    assert report["combine"] == combine
    assert sum(report["weights"].values()) == pytest.approx(1, abs=1e-6)
    assert report["vary"] == (combine in VARYING)
    for row in rows:
        assert np.isfinite(row["train"]["loss"])
        assert ("weights" in row) == (combine in VARYING)
        if combine in VARYING:
            assert list(row["weights"]) == [teacher.label for teacher in teachers]
            assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)
    assert (report["mean_weights"] is not None) == (combine in VARYING)
    table = metrics_table(result.metrics)
    assert ("weight" in table) == (combine != "mean")
    assert (f"Combined by {combine}, pool prob: validation NLL" in table) == (combine != "mean")
    needs = inputs_of(COMBINERS[combine]) & {"labels", "student_logits"}
    assert ("ensemble" in report["validation"]["nll"]) == (
        not needs
    )  # else it would be that of equal weights
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert all(row["before"] == row["after"] for row in manifest["teachers"])


@pytest.mark.parametrize("pool", ["prob", "logit"])
def test_learned_weights_are_kept_with_what_they_are_worth(teachers, few_digits, tmp_path, pool):
    report = run(teachers, tmp_path / "run", combine="learned", pool=pool).metrics["combination"]
    z, labels = stacked(teachers, few_digits.val), few_digits.val.known_labels
    np.testing.assert_allclose(list(report["weights"].values()), learned_weights(z, labels, pool), atol=1e-6)

    def nll(weights) -> float:
        w, logits = np.asarray(weights), z.double().numpy()
        if pool == "prob":
            p = np.einsum("k,knc->nc", w, softmax(logits, axis=2))
            return -np.log(p[np.arange(len(labels)), labels]).mean()
        return -log_softmax(np.einsum("k,knc->nc", w, logits), axis=1)[np.arange(len(labels)), labels].mean()

    judged = report["validation"]["nll"]
    assert judged["ensemble"] == pytest.approx(nll(list(report["weights"].values())), abs=1e-5)
    assert judged["uniform"] == pytest.approx(nll(np.full(3, 1 / 3)), abs=1e-5)
    best = [teacher.label for teacher in teachers].index(report["validation"]["best"])
    assert judged["best"] == pytest.approx(nll(np.eye(3)[best]), abs=1e-5)
    assert judged["ensemble"] <= min(judged["uniform"], judged["best"]) + 1e-7
    assert 0 <= report["gap"] < 1e-6


def test_nothing_is_fitted_on_training_or_test_images(teachers, few_digits):
    z, val = stacked(teachers, few_digits.val), few_digits.val
    seen = []

    def spying(val_logits, val_labels):
        seen.append((val_logits, val_labels))
        return torch.full((3,), 1 / 3)

    set_up(teachers, torch.ones(3), Combination("spying", spying), z, val.known_labels)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], z)
    assert torch.equal(seen[0][1], val.known_labels)


@pytest.mark.parametrize(
    ("combine", "weights"), [("confidence", "equal"), ("agree", "equal"), ("entropy", "own")]
)
def test_networks_are_measured_against_what_sees_no_label(teachers, few_digits, tmp_path, combine, weights):
    """The ensemble's row must not know the test labels, nor depend on the student."""
    folder = run(teachers, tmp_path / "run", combine=combine).folder
    tensors = safetensors.torch.load_file(folder / "predictions.safetensors")
    z = torch.stack([tensors[f"logits/{teacher.label}"] for teacher in teachers]).double()
    w = torch.full((3, z.shape[1]), 1 / 3) if weights == "equal" else entropy_weights(z)
    mixture = (w[:, :, None].numpy() * softmax(z.numpy(), axis=2)).sum(axis=0)
    np.testing.assert_allclose(softmax(tensors["logits/ensemble"].numpy(), axis=1), mixture, atol=1e-5)


@pytest.mark.parametrize("calibrate", ["none", "teachers", "pool", "both"])
def test_calibration_is_fitted_on_the_validation_split(teachers, few_digits, calibrate):
    z, val = stacked(teachers, few_digits.val), few_digits.val
    how = Combination("mean", COMBINERS["mean"], calibrate=calibrate)
    labels = val.known_labels
    ensemble = set_up(teachers, torch.full((3,), 4.0), how, z, labels)
    own = calibrate in ("teachers", "both")
    scales = [fit_temperature(logits, labels) if own else 1.0 for logits in z]
    p = np.mean(
        [softmax(logits.double().numpy() / s, axis=1) for logits, s in zip(z, scales, strict=True)], 0
    )
    after = fit_temperature(torch.from_numpy(np.log(p)), labels) if calibrate in ("pool", "both") else 1.0
    assert ensemble.after == pytest.approx(after, rel=1e-3)
    expected = softmax(np.log(p) / ensemble.after, axis=1)
    np.testing.assert_allclose(ensemble.target(z).plain.exp(), expected, atol=1e-5)
    report = describe(ensemble, how, z, val)
    np.testing.assert_allclose(list(report["scales"].values()), scales, rtol=1e-5)
    assert report["after"] == ensemble.after


@pytest.mark.parametrize("combine", [name for name in COMBINERS if name != "fixed"])
def test_one_teacher_is_that_teacher_whatever_combines_it(teachers, few_digits, combine):
    z, val, train = stacked(teachers[:1], few_digits.val), few_digits.val, few_digits.train
    how = Combination(combine, COMBINERS[combine])
    ensemble = set_up(teachers[:1], torch.tensor([4.0]), how, z, val.known_labels)
    index = torch.arange(16)
    student = torch.randn(16, 10)
    target = LiveTargets(ensemble)(train[index], index, 0, student)
    logits = teachers[0].all_logits(train)[index]
    torch.testing.assert_close(target.soft, torch.log_softmax(logits / 4, dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.plain, torch.log_softmax(logits, dim=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("combine", [name for name in COMBINERS if name != "fixed"])
def test_stored_and_live_teachers_are_weighed_alike(teachers, few_digits, combine):
    z = stacked(teachers, few_digits.val)
    how = Combination(combine, COMBINERS[combine])
    ensemble = set_up(teachers, torch.full((3,), 4.0), how, z, few_digits.val.known_labels, seed=5)
    viewing, index, student = Viewing("crop", 2, 3), torch.arange(40), torch.randn(40, 10)
    stored = StoredTargets(ensemble, few_digits.train, viewing)
    for epoch in (0, 3):
        batch = viewing.take(few_digits.train, index, viewing.id_of(epoch))
        kept, live = (source(batch, index, epoch, student) for source in (stored, LiveTargets(ensemble)))
        torch.testing.assert_close(kept.soft.exp(), live.soft.exp(), atol=2e-3, rtol=0)
        torch.testing.assert_close(kept.weights, live.weights, atol=2e-3, rtol=0)


def test_draws_depend_on_seed_epoch_and_sample_alone(teachers, few_digits):
    def drawn(seed: int, epoch: int, index: Tensor) -> Tensor:
        z = stacked(teachers, few_digits.val)
        how = Combination("drop", COMBINERS["drop"])
        ensemble = set_up(teachers, torch.full((3,), 4.0), how, z, few_digits.val.known_labels, seed=seed)
        student = torch.zeros(len(index), 10)
        return LiveTargets(ensemble)(few_digits.train[index], index, epoch, student).weights

    whole, turned = torch.arange(64), torch.arange(64).flip(0)
    first = drawn(0, 0, whole)
    torch.testing.assert_close(drawn(0, 0, turned).flip(1), first)
    torch.testing.assert_close(drawn(0, 0, whole[10:20]), first[:, 10:20])
    assert not torch.equal(drawn(0, 1, whole), first)
    assert not torch.equal(drawn(1, 0, whole), first)


def test_fixed_weights_are_taken_with_or_without_the_name(teachers, tmp_path):
    named = run(teachers, tmp_path / "a", combine="fixed", weights=[0.2, 0.3, 0.5])
    alone = run(teachers, tmp_path / "b", weights=[0.2, 0.3, 0.5])
    assert named.student.fingerprint() == alone.student.fingerprint()
    assert alone.metrics["combination"]["combine"] == "fixed"
    assert list(alone.metrics["combination"]["weights"].values()) == pytest.approx([0.2, 0.3, 0.5])


MINE = """
import torch

def favour_the_first(logits):
    weights = torch.zeros(logits.shape[:2])
    weights[0] = 1
    return weights

def too_much(count):
    return torch.ones(count)

def curious(logits, colour):
    return logits

def failing(student_logits):
    raise ValueError("no idea")

def flat(logits):
    return [0.5, 0.5]

def negative(count):
    return torch.tensor([2.0, -1.0] + [0.0] * (count - 2))

def both(logits, val_logits):
    return torch.ones(len(logits)) / len(logits)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_a_function_of_yours_weighs_by_file_and_by_object(teachers, tmp_path, mine):
    by_file = run(teachers, tmp_path / "a", combine=f"py:{mine}:favour_the_first")
    by_object = run(teachers, tmp_path / "b", combine=user_object(f"{mine}:favour_the_first"))
    best = run(teachers, tmp_path / "c", weights=[1, 0, 0])
    assert by_file.student.fingerprint() == by_object.student.fingerprint()
    logits = [r.student(torch.zeros(4, 1, 8, 8)) for r in (by_file, best)]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
    assert by_object.metrics["combination"]["combine"] == "python:favour_the_first"
    assert list(by_file.metrics["combination"]["mean_weights"].values()) == pytest.approx([1, 0, 0])


NO_WEIGHTS = "return non-negative weights that sum to 1 over the teachers, as a tensor"
OFFERED = (
    "count, given, val_logits, val_labels, pool, known, logits, labels, student_logits, temperatures, draws"
)


@pytest.mark.parametrize(
    ("name", "what", "why", "fix"),
    [
        ("too_much", "gave no weights", "the smallest is 1, and they sum to 3 … 3", NO_WEIGHTS),
        ("negative", "gave no weights", "the smallest is -1, and they sum to 1 … 1", NO_WEIGHTS),
        ("flat", "gave no weights", "it returned list, not (3,) or (3, 64)", NO_WEIGHTS),
        ("curious", "cannot be called", "it wants 'colour', which is not offered",
         f"give it parameters of these names: {OFFERED}"),
        ("failing", "failed: ValueError: no idea", "it was tried before anything is trained",
         "call it in a Python session to see the whole traceback"),
        ("both", "wants val_logits beside the batch",
         "weights that are fitted or given are the same for all batches",
         "name either those or the batch"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_weights_is_refused(teachers, tmp_path, mine, name, what, why, fix):
    combine = f"py:{mine}:{name}"
    with refused(ConfigError, f"combine: {combine} {what}", why, fix):
        run(teachers, tmp_path / "run", combine=combine)
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "what", "why", "fix"),
    [
        ({"combine": "lerned"}, "combine: there is no 'lerned'",
         f"known are {', '.join(COMBINERS)} and py:FILE.py:function", "did you mean 'learned'?"),
        ({"combine": "fixed"}, "combine: fixed has no weights", "none are given",
         "say --weights 0.3333333,0.3333333,0.3333333"),
        ({"combine": "learned", "weights": [0.5, 0.3, 0.2]}, "weights: learned finds its own",
         "given weights are used by --combine fixed, and by functions of yours that name `given`",
         "leave out --weights or --combine"),
        ({"loss": "kll"}, "loss: there is no 'kll'", f"known are {', '.join(LOSSES)}", "did you mean 'kl'?"),
        ({"sets": ["loss_numbers.gamma=2"]}, "loss_numbers: kl has no gamma",
         "it has no numbers of its own", "leave them out, or choose another loss"),
        ({"loss": "dist", "sets": ["loss_numbers.alpha=2"]}, "loss_numbers: dist has no alpha",
         "it has beta, gamma", "leave them out, or choose another loss"),
        ({"soft_epochs": 3}, "soft_epochs: constant has no such span",
         "only cutoff and warmup last a number of epochs",
         "say --soft-schedule cutoff or warmup, or leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(teachers, tmp_path, options, what, why, fix):
    with refused(ConfigError, what, why, fix):
        run(teachers, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_teaches_with_its_own_temperature(teachers, tmp_path, loss):
    result = run(teachers, tmp_path / "run", loss=loss, epochs=4)
    rows = Run(result.folder).history()
    assert all(np.isfinite(row["val"]["loss"]) for row in rows)
    assert rows[-1]["val"]["loss"] < rows[0]["val"]["loss"]
    config = (result.folder / "config.yaml").read_text()
    assert f"lenet: {LOSSES[loss].temperature}" in config


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"soft_schedule": "constant"}, [0.3, 0.3, 0.3, 0.3]),
        ({"soft_schedule": "linear"}, [0.3, 0.3, 0.15, 0]),
        ({"soft_schedule": "cutoff"}, [0.3, 0.3, 0, 0]),
        ({"soft_schedule": "cutoff", "soft_epochs": 1}, [0.3, 0, 0, 0]),
        ({"soft_schedule": "warmup", "soft_weight": 1.0}, [0.5, 1, 1, 1]),
    ],
)
def test_the_soft_weight_follows_its_schedule(teachers, tmp_path, options, weights):
    rows = Run(run(teachers, tmp_path / "run", epochs=4, **options).folder).history()
    assert [row["soft_weight"] for row in rows] == pytest.approx(weights)


def test_the_control_on_labels_is_the_same_whatever_combines_the_teachers(teachers, tmp_path):
    students = []
    for combine in ("mean", "agree"):
        folder = run(
            teachers, tmp_path / combine, combine=combine, controls="labels", feature_weight=1
        ).folder
        rows = [row for row in Run(folder).history() if row["network"] == "labels"]
        assert not any("weights" in row or "feature_loss" in row["train"] for row in rows)
        students.append((folder / "controls" / "labels.safetensors").read_bytes())
    assert len(set(students)) == 1


def test_the_best_teacher_alone_is_the_best_on_validation(teachers, few_digits, tmp_path):
    by_control = run(teachers, tmp_path / "a", combine="learned", controls="best-teacher")
    by_combiner = run(teachers, tmp_path / "b", combine="best")
    control = (by_control.folder / "controls" / "best-teacher.safetensors").read_bytes()
    assert control == (by_combiner.folder / "student.safetensors").read_bytes()
    weights = by_combiner.metrics["combination"]["weights"]
    accuracies = [
        float((t.all_logits(few_digits.val).argmax(1) == few_digits.val.labels).float().mean())
        for t in teachers
    ]
    assert list(weights.values()) == [float(a == max(accuracies)) for a in accuracies]


def test_a_run_with_a_fitted_combiner_is_repeated_by_its_configuration(tmp_path):
    names = ["lenet", "resnet8"]
    options = {**QUICK, "teacher_epochs": 1}
    first = distill(
        names, "lenet", combine="learned", calibrate="both", loss="dkd", out=tmp_path / "a", **options
    )
    again = distill(config_file=first.folder / "config.yaml", out=tmp_path / "b")
    assert again.student.fingerprint() == first.student.fingerprint()
    assert again.metrics["combination"] == first.metrics["combination"]


def test_weights_that_are_fitted_move_with_the_ensemble(teachers, few_digits):
    z = stacked(teachers, few_digits.val)
    labels, how = few_digits.val.known_labels, Combination("greedy", COMBINERS["greedy"])
    ensemble: Ensemble = set_up(teachers, torch.full((3,), 4.0), how, z, labels)
    assert ensemble.student_temperature == pytest.approx(4.0)
    assert ensemble.for_measuring() is ensemble
    with_batches = Ensemble(teachers, ensemble.weights, ensemble.temperatures, weigh=COMBINERS["agree"])
    assert with_batches.for_measuring().weigh is None


def test_comparisons_on_the_validation_split_are_calibrated_alike(teachers, few_digits):
    z, val = stacked(teachers, few_digits.val), few_digits.val
    for calibrate in ("none", "teachers", "pool", "both"):
        how = Combination("mean", COMBINERS["mean"], calibrate=calibrate)
        ensemble = set_up(teachers, torch.ones(3), how, z, val.known_labels)
        nll = describe(ensemble, how, z, val)["validation"]["nll"]
        assert nll["ensemble"] == pytest.approx(nll["uniform"])


def test_weights_that_are_none_in_a_later_batch_stop_training(teachers, tmp_path):
    def only_on_trial(logits):
        size = 1 / len(logits) if logits.shape[1] == 64 else 3.0
        return torch.full(logits.shape[:2], size)

    with refused(
        TrainingError,
        "epoch 1: the weights of the teachers are none",
        "some were negative, or did not sum to 1 in a batch, which changes the scale of the loss",
        "return weights that sum to 1 over the teachers for every batch",
    ):
        run(teachers, tmp_path / "run", combine=only_on_trial)


def test_weights_of_whole_numbers_are_weights(teachers, tmp_path):
    def nearest(logits):
        return torch.nn.functional.one_hot(logits.amax(dim=2).argmax(dim=0), len(logits)).T

    means = run(teachers, tmp_path / "run", combine=nearest).metrics["combination"]["mean_weights"]
    assert sum(means.values()) == pytest.approx(1)


def test_a_function_that_gives_no_weights_is_refused_before_a_teacher_is_trained(tmp_path, mine, monkeypatch):
    monkeypatch.setattr(registry, "train_on_labels", lambda *_, **__: pytest.fail("a teacher was trained"))
    for name in ("both", "too_much", "failing", "flat"):
        with pytest.raises(ConfigError, match=f"combine: .*:{name} "):
            distill(
                ["lenet", "resnet8"], "lenet", combine=f"py:{mine}:{name}", teacher_seed=7,
                out=tmp_path / "run", **QUICK,
            )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_training_does_not_reach_is_refused(teachers, tmp_path):
    with refused(
        ConfigError,
        "soft_epochs: warmup over 50 of 2 epochs",
        "training ends before the schedule does",
        "say --set soft_epochs=2 or less, or train longer",
    ):
        run(teachers, tmp_path / "run", soft_schedule="warmup", soft_epochs=50)


def test_options_by_teacher_take_the_name_as_it_was_given(tmp_path):
    options = DistillOptions(
        teachers=["tv:vgg16@IMAGENET1K_V1", "runs/mine"],
        class_map="tv:vgg16@IMAGENET1K_V1=a.yaml,mine=b.yaml",
        temperature="runs/mine=2,student=3",
    )
    assert options.class_map == {"tv:vgg16": Path("a.yaml"), "mine": Path("b.yaml")}
    assert options.temperature == {"mine": 2, "student": 3}
    assert options.cross_checks() == []


def test_a_function_of_yours_may_take_the_given_weights(teachers, tmp_path):
    def halved(given):
        return (given + 1 / len(given)) / 2

    report = run(teachers, tmp_path / "run", combine=halved, weights=[1, 0, 0]).metrics["combination"]
    assert list(report["weights"].values()) == pytest.approx([2 / 3, 1 / 6, 1 / 6])

    def mean(count):
        return torch.full((count,), 1 / count)

    with refused(
        ConfigError,
        "weights: python:mean finds its own",
        "given weights are used by --combine fixed, and by functions of yours that name `given`",
        "leave out --weights or --combine",
    ):
        run(teachers, tmp_path / "again", combine=mean, weights=[1, 0, 0])


def test_a_python_function_is_not_lost_from_the_configuration(few_digits, tmp_path):
    def mine(count):
        return torch.full((count,), 1 / count)

    options = {**QUICK, "teacher_epochs": 1, "epochs": 1}
    folder = distill(["lenet", "resnet8"], "lenet", combine=mine, out=tmp_path / "a", **options).folder
    with refused(
        ConfigError,
        "combine: python:mine is not at hand",
        "it was given as a Python function, which no file can bring back",
        "call distill with the function again, or put it into a file: py:FILE.py:function",
    ):
        distill(config_file=folder / "config.yaml", out=tmp_path / "b")


def test_options_do_not_shape_teachers_that_are_objects(teachers, tmp_path):
    for option, value in (("class_map", {"lenet": "map.yaml"}), ("teacher_size", {"lenet": 32})):
        with refused(
            ConfigError,
            f"{option}: lenet was given as an object",
            "it has its size and its classes already",
            "leave it out, and give them to load_teacher",
        ):
            run(teachers, tmp_path / "run", **{option: value})


def test_live_teachers_rest_when_the_soft_weight_is_zero(teachers, tmp_path):
    rows = Run(run(teachers, tmp_path / "run", views=0, soft_schedule="cutoff", epochs=2).folder).history()
    measured = ["teacher_student_cross_entropy" in row["train"] for row in rows]
    assert measured == [True, False]
