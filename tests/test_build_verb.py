"""`ekd targets build` and what `distill` makes of it; options that cannot go together; a run with all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from support import logged, message, refused
from torch import Tensor
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import build_targets, distill, distillation, list_targets, load_teacher, verify_targets
from ensemble_kd.cli import app
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import ConfigError
from ensemble_kd.runs import Run
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.runner import Answers, Runner, Running
from ensemble_kd.weights import save_classifier

QUICK: dict[str, Any] = {"epochs": 2, "teacher_epochs": 1, "limit_train": 100, "augment": "crop", "views": 2}
FLAGS = ["--epochs", 2, "--teacher-epochs", 1, "--limit-train", 100]
ALONE = {"controls": "none", "student": "lenet"}


def ekd(*arguments: object) -> Result:
    """Run `ekd` in this process; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """How many images run through each teacher for targets."""
    seen: Counter[str] = Counter()
    run = Runner.__call__

    def counted(self: Runner, pixels: Tensor, features: bool = False) -> Answers:
        seen[self._label] += len(pixels)
        return run(self, pixels, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "__call__", counted)
        yield seen


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with their student: what it is worth, and pictures, would take most of the time."""
    monkeypatch.setattr(distillation, "_conclude", lambda *_: {})


@pytest.fixture(autouse=True)
def _own_folders(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


# Build, then distil

SAME: dict[str, dict[str, Any]] = {
    "mixed, of the largest three": {"augment": "trivial", "mix": "cutmix", "top_k": 3, "temperature": 2},
    "calibrated": {"calibrate": "teachers", "top_k": 5, "temperature": "lenet=3,cifar-quick=5"},
    "features": {"feature_weight": 0.5, "augment": "none", "views": 1},
    "another seed, in bf16": {
        "seed": 3, "teacher_batch": 33, "teacher_precision": "bfloat16", "limit_train": 60, "batch_size": 20,
    },
    "chosen views": {"views": None},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_distill_with_the_same_options_runs_no_teacher(tmp_path: Path, unmeasured: None, name: str) -> None:
    options = QUICK | SAME[name]
    with watched() as seen:
        made = build_targets(["lenet", "cifar-quick"], **options)
    images = made["images"] * made["views"]
    assert seen == {"lenet": images, "cifar-quick": images}
    with watched() as seen, logged() as lines:
        run = distill(["lenet", "cifar-quick"], **options, **ALONE, out=tmp_path / "run")
    assert not seen
    assert not [line for line in lines if "storing targets" in line or "made anew" in line]
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["views"] == made["views"]
    assert not any(row["damaged"] for row in verify_targets())
    with watched() as seen:  # and it is built once
        assert build_targets(["lenet", "cifar-quick"], **options) == made
    assert not seen


@pytest.mark.parametrize("views", [0, 1])
def test_teachers_are_run_as_the_options_say(
    tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    runnings: list[Running] = []
    init = Runner.__init__

    def noted(
        self: Runner, classifier: Any, label: str, device: Any, running: Running, **options: Any
    ) -> None:
        runnings.append(running)
        init(self, classifier, label, device, running, **options)

    monkeypatch.setattr(Runner, "__init__", noted)
    options = QUICK | {"views": views, "epochs": 1, "teacher_batch": 33, "teacher_precision": "bfloat16"}
    distill("lenet", **options, **ALONE, out=tmp_path / "run")
    assert runnings == [Running(33, "bfloat16")]
    precisions = [
        json.loads((Path(row["folder"]) / "store.json").read_text())["facts"]["precision"]
        for row in list_targets()
        if row["policy"] == "crop"
    ]
    assert precisions == ["bfloat16"] * views


def test_distill_of_more_views_runs_those_alone(tmp_path: Path, unmeasured: None) -> None:
    build_targets("lenet", **QUICK)
    with watched() as seen:
        distill("lenet", **(QUICK | {"views": 3}), **ALONE, out=tmp_path / "run")
    assert seen == {"lenet": 100}


def test_what_is_built_is_told(own_cache: Path) -> None:
    arguments = ["--teachers", "lenet", *FLAGS, "--augment", "crop-flip", "--mix", "mixup", "--views", 3]
    told = ekd("targets", "build", *arguments, "--json")
    assert told.exit_code == 0, told.stderr
    made = json.loads(told.stdout)
    (row,) = made.pop("teachers")
    assert made == {"data": "digits", "images": 100, "policy": "crop-flip", "mix": "mixup", "views": 3}
    folder = Path(row["folder"])
    assert row == {"teacher": "lenet", "folder": str(folder), "bytes": 3 * 100 * 10 * 2}
    assert folder.parent == own_cache / "targets"
    assert sum(path.stat().st_size for path in folder.glob("*.bin")) == row["bytes"]
    (kept,) = [one for one in list_targets() if one["policy"] == "crop-flip"]
    assert (kept["folder"], kept["teacher"], kept["data"], kept["views"]) == (
        str(folder),
        "lenet",
        "digits",
        3,
    )
    shown = ekd("targets", "build", *arguments)
    assert shown.exit_code == 0
    title, *table = [line for line in shown.stdout.splitlines() if line.strip()]
    assert title == "digits: 3 views of 100 images by crop-flip with mixup"
    assert table[0].split() == ["teacher", "size", "folder"]
    assert table[-1].split() == ["lenet", "6.0", "kB", str(folder)]
    assert "storing targets" not in shown.stderr


def test_build_reads_a_configuration(tmp_path: Path, unmeasured: None) -> None:
    run = distill("lenet", **QUICK, **ALONE, out=tmp_path / "run")
    with watched() as seen:
        made = build_targets(config_file=run.folder / "config.yaml")
        grown = ekd("targets", "build", "--config", run.folder / "config.yaml", "--set", "views=4", "--json")
    assert made["views"] == 2
    assert json.loads(grown.stdout)["views"] == 4
    assert seen == {"lenet": 200}


def test_targets_of_unlabelled_images(tmp_path: Path, unmeasured: None) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    for number, pixels in enumerate(torch.randint(0, 256, (30, 8, 8), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    for only, count in ((False, 130), (True, 30)):
        options = QUICK | {"unlabelled": folder, "unlabelled_only": only, "batch_size": 30, "epochs": 1}
        assert build_targets("lenet", **options)["images"] == count
        with watched() as seen:
            distill("lenet", **options, **ALONE, out=tmp_path / f"run-{only}")
        assert not seen


def test_every_flag_of_build_is_explained() -> None:
    lines = ekd("targets", "build", "--help").stdout.splitlines()
    flags = [line.split() for line in lines if line.strip().startswith("--")]
    assert {"--teachers", "--views", "--mix", "--top-k", "--teacher-batch", "--no-train"} <= {
        f[0] for f in flags
    }
    assert all(len(words) >= 3 for words in flags), flags


# What is refused


def test_no_views_are_nothing_to_build() -> None:
    problem = ("views: 0 stores nothing", "fresh views are seen once", "say --views 1 or more")
    with refused(ConfigError, *problem):
        build_targets("lenet", **(QUICK | {"views": 0}))
    result = ekd("targets", "build", "--teachers", "lenet", *FLAGS, "--views", 0, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"error: {message(*problem)}\n" in result.stderr


def test_teachers_of_the_users_code_cannot_be_built_for(few_digits: Dataset, tmp_path: Path) -> None:
    """Nothing says when such code changes, so that nothing of it is kept."""
    mine = Teacher.of("mine", load_teacher("lenet", few_digits, training={"epochs": 1}).classifier, "here")
    with (
        watched() as seen,
        refused(
            ConfigError,
            "teachers: the outputs of mine are not kept",
            "it is code of your own, and nothing tells when that changes",
            "leave it out: `ekd distill` runs it once a view and keeps that for the run",
        ),
    ):
        build_targets(["lenet", mine], **QUICK)
    assert not seen


TOP_K = "top_k: the largest logits alone do not do"
POOLED = (
    TOP_K,
    "the pooled target would be tempered, or logits averaged, and the rest of them is not known",
    "leave --top-k out, or say --pool prob --calibrate none or teachers",
)
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    **{
        f"top-k of {loss}": (
            {"top_k": 3, "loss": loss},
            (
                TOP_K, f"the loss {loss} reads those of unlikely classes too",
                "leave --top-k out, or say --loss kl, kl-unscaled, ce, dkd, dist or hard",
            ),
        )
        for loss in ("reverse-kl", "js", "mse", "logit-std")
    },
    "top-k of pooled logits": ({"top_k": 3, "pool": "logit"}, POOLED),
    "top-k of a tempered pool": ({"top_k": 3, "pool": "pool-then-temper"}, POOLED),
    "top-k of a calibrated pool": ({"top_k": 3, "calibrate": "pool"}, POOLED),
    "top-k of both calibrated": ({"top_k": 3, "calibrate": "both"}, POOLED),
    "top-k of no views": (
        {"top_k": 3, "views": 0},
        ("top_k: nothing is stored", "with --views 0 the teachers run live", "leave one of them out"),
    ),
    **{
        f"top-k of {combine}": (
            {"top_k": 3, "combine": combine},
            (
                f"combine: {combine} tempers logits itself",
                "with --top-k the rest of them is not known at other temperatures",
                "leave --top-k out, or choose another combiner",
            ),
        )
        for combine in ("agree", "drop")
    },
    "mix with dkd": (
        {"mix": "mixup", "loss": "dkd"},
        ("mix: dkd needs one label an image", "a mixed image has two", "leave --mix out, or choose another loss"),
    ),
    "mix with confidence": (
        {"mix": "cutmix", "combine": "confidence"},
        (
            "combine: confidence needs one label an image", "with --mix cutmix each has two",
            "choose one of mean, fixed, learned, greedy, entropy, agree, drop, best",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_together(tmp_path: Path, own_cache: Path, name: str) -> None:
    options, problem = REFUSED[name]
    with refused(ConfigError, *problem):
        distill(["lenet", "cifar-quick"], **(QUICK | options), **ALONE, out=tmp_path / "run")
    with refused(ConfigError, *problem):
        build_targets(["lenet", "cifar-quick"], **(QUICK | options))
    assert not (tmp_path / "run").exists()
    assert not own_cache.exists()


def test_the_largest_k_of_a_teacher_that_knows_some_classes_only(few_digits: Dataset, tmp_path: Path) -> None:
    own = load_teacher("lenet", few_digits, training={"epochs": 1}).classifier
    save_classifier(tmp_path / "some.safetensors", own)
    table = tmp_path / "map.yaml"
    table.write_text("".join(f"{digit}: {digit if digit < 6 else 'null'}\n" for digit in range(10)))
    options = QUICK | {"class_map": {"some": table}, "top_k": 3}
    with refused(
        ConfigError,
        "top_k: some knows some of the classes only",
        "the rest of its logits is spread over all classes, and would be cut away again",
        "leave --top-k out, or that teacher",
    ):
        build_targets([str(tmp_path / "some.safetensors"), "lenet"], **options)
    build_targets([str(tmp_path / "some.safetensors"), "lenet"], **(options | {"top_k": None}))


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    arguments = [
        "--top-k",
        3,
        "--mix",
        "mixup",
        "--loss",
        "dkd",
        "--pool",
        "logit",
        "--out",
        tmp_path / "run",
    ]
    result = ekd("distill", "--teachers", "lenet", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("error: ") == 2
    assert f"error: {message(*POOLED)}\n" in result.stderr
    assert f"error: {message(*REFUSED['mix with dkd'][1])}\n" in result.stderr


@pytest.mark.parametrize("options", [
    {"top_k": 0}, {"top_k": -1}, {"teacher_batch": 0}, {"mix": "mixing"}, {"teacher_precision": "float16"},
    {"augment": "rand"}, {"views": -1},
])  # fmt: skip
def test_values_that_are_none(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError) as caught:
        distill("lenet", **(QUICK | options), **ALONE, out=tmp_path / "run")
    (problem,) = caught.value.problems
    assert problem.what.startswith(name)


def test_more_of_the_largest_than_there_are_classes_are_all(tmp_path: Path, unmeasured: None) -> None:
    dense, whole = (
        distill("lenet", **QUICK, **ALONE, top_k=top_k, out=tmp_path / str(top_k)) for top_k in (None, 1000)
    )
    one, other = (dict(run.student.net.state_dict()) for run in (dense, whole))
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=0, atol=1e-3)


# All of it


def test_a_run_with_all_of_it_is_repeated_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    result = ekd(
        "distill", "--teachers", "lenet,cifar-quick", "--student", "lenet", "--limit-train", 200,
        "--epochs", 1, "--teacher-epochs", 1, "--batch-size", 8, "--views", 1,
        "--mix", "mixup", "--augment", "trivial", "--top-k", 3, "--teacher-batch", 7,
        "--profile", "--controls", "none", "--out", run, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert metrics["models"]["student"]["accuracy"]["value"] > 0.1
    profile = json.loads((run / "profile.json").read_text())["milliseconds"]
    assert profile.keys() == {"views", "forward", "targets", "loss", "backward", "optimizer", "other", "step"}
    assert profile["step"] == pytest.approx(sum(profile.values()) / 2)
    assert "traceEvents" in json.loads((run / "trace.json").read_text())
    assert f"a training step takes {profile['step']:.2f} ms" in result.stderr
    history = Run(run).history()
    assert [row.get("profile") for row in history] == [profile]
    assert all("teacher_student_cross_entropy" in row["train"] for row in history)
    config = yaml.safe_load((run / "config.yaml").read_text())
    told = {name: config[name] for name in ("mix", "augment", "top_k", "teacher_batch", "profile", "views")}
    assert told == {
        "mix": "mixup",
        "augment": "trivial",
        "top_k": 3,
        "teacher_batch": 7,
        "profile": True,
        "views": 1,
    }
    monkeypatch.setattr(distillation, "_conclude", lambda *_: {})
    with watched() as seen:
        again = distill(
            config_file=run / "config.yaml", profile=False, controls="none", out=tmp_path / "again"
        )
    assert not seen
    assert again.student.fingerprint() == ensemble_kd.load_student(run).fingerprint()


def test_profiling_is_left_out_where_it_is_not_wanted(tmp_path: Path, unmeasured: None) -> None:
    options = QUICK | {"epochs": 1, "batch_size": 4, "augment": "none", "views": 1}
    profiled = distill("lenet", **options, **ALONE, profile=True, out=tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("profile.json", "trace.json")]
    assert all(path.is_file() for path in files)
    plain = distill("lenet", **options, **ALONE, overwrite=True, out=tmp_path / "run")
    assert not any(path.exists() for path in files)
    assert plain.student.fingerprint() == profiled.student.fingerprint()


def test_training_a_teacher_is_profiled_where_it_is_trained(tmp_path: Path) -> None:
    options = ["--epochs", 1, "--limit-train", 100, "--batch-size", 4, "--profile"]
    first, second = (ekd("train", "lenet", *options, "--out", tmp_path / name) for name in ("one", "two"))
    assert first.exit_code == second.exit_code == 0, first.stderr
    profile = json.loads((tmp_path / "one" / "profile.json").read_text())["milliseconds"]
    assert profile.keys() == {"views", "forward", "loss", "backward", "optimizer", "other", "step"}
    assert (tmp_path / "one" / "trace.json").is_file()
    assert "teacher lenet: from the library" in second.stderr
    assert not any((tmp_path / "two" / name).exists() for name in ("profile.json", "trace.json"))


def test_a_stopped_run_goes_on_without_running_teachers_again(
    tmp_path: Path, unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = distillation.fit

    def stop_at_the_control(*arguments: Any, **options: Any) -> Any:
        if options["description"] != "student":
            raise KeyboardInterrupt
        return original(*arguments, **options)

    options = QUICK | {"top_k": 3, "mix": "cutmix", "controls": "best-teacher", "calibrate": "teachers"}
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "fit", stop_at_the_control)
        with watched() as seen, pytest.raises(KeyboardInterrupt):
            distill("lenet,cifar-quick", "lenet", **options, out=tmp_path / "run")
    assert seen == {"lenet": 200, "cifar-quick": 200}
    with watched() as seen:
        ensemble_kd.resume(tmp_path / "run")
    assert not seen
    assert {row["network"] for row in Run(tmp_path / "run").history()} == {"student", "best-teacher"}
