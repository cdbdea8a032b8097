"""The command line: what is printed where, exit codes, and every message about options."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ensemble_kd import __version__
from ensemble_kd.cli import app

QUICK = ["--student", "lenet", "--epochs", "1", "--teacher-epochs", "1", "--limit-train", "200"]


def ekd(*arguments):
    """Run `ekd` in this process; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def shell(*arguments, cwd=None, **env):
    """Run `ekd` as a user would, in a process of its own."""
    command = [sys.executable, "-m", "ensemble_kd", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env})


def test_version_and_help():
    assert ekd("--version").stdout.strip() == __version__
    text = ekd("--help").stdout
    for verb in ("distill", "resume", "train", "evaluate", "analyze-agreement", "models", "data"):
        assert verb in text


@pytest.mark.parametrize("verb", ["distill", "train", "evaluate", "analyze-agreement", "data"])
def test_every_flag_has_a_help_text(verb):
    lines = ekd(verb, "--help", "--help").stdout.splitlines()
    flags = [line for line in lines if line.strip().startswith("--")]
    assert len(flags) >= 8
    assert all(len(line.split()) >= 3 for line in flags), flags


def test_the_main_road_as_a_user_walks_it(tmp_path, monkeypatch):
    """distill, then the newest run is analysed, the student judged, and everything is JSON on demand."""
    run = tmp_path / "runs" / "mine"
    made = shell("distill", "--teachers", "lenet,resnet8", *QUICK, "--out", run, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "control labels" in made.stdout
    for command in (f"report {run} --quick", f"predict {run} IMAGE.jpg", f"export {run}"):
        assert f"  ekd {command}\n" in made.stderr
    assert "Traceback" not in made.stderr

    monkeypatch.chdir(tmp_path)
    agreement = ekd("analyze-agreement", "--json")
    assert agreement.exit_code == 0, agreement.stderr
    assert json.loads(agreement.stdout)["models"] == ["student", "labels", "lenet", "resnet8", "ensemble"]
    assert (run / "analysis" / "agreement-pairs.png").is_file()

    judged = ekd("evaluate", run / "student.safetensors", "--data", "digits", "--json")
    row = json.loads(judged.stdout)["models"]["mine"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert row["accuracy"] == metrics["models"]["student"]["accuracy"]
    assert row["nll"] == metrics["models"]["student"]["nll"]


def test_json_is_one_object_and_nothing_else_on_stdout(tmp_path):
    result = ekd(
        "distill", "--teachers", "lenet", *QUICK, "--controls", "none", "--json", "--out", tmp_path / "r"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["run"] == str(tmp_path / "r")


def test_quiet_says_nothing_but_the_result(tmp_path):
    result = ekd("distill", "--teachers", "lenet", *QUICK, "--quiet", "--out", tmp_path / "r")
    assert "epoch" not in result.stderr
    assert "teacher lenet" in result.stdout


def test_repeated_teachers_are_the_same_as_commas(tmp_path):
    both = [
        ekd("distill", *names, *QUICK, "--controls", "none", "--json", "--out", tmp_path / str(i))
        for i, names in enumerate(
            (["--teachers", "lenet,resnet8"], ["--teachers", "lenet", "--teachers", "resnet8"])
        )
    ]
    first, second = (json.loads(result.stdout)["models"] for result in both)
    assert first == second


def test_train_makes_a_teacher_that_distill_takes(tmp_path):
    run = tmp_path / "teacher"
    options = ["--epochs", "1", "--limit-train", "200"]
    made = ekd("train", "lenet", *options, "--out", run, "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["models"]["lenet"]["role"] == "teacher"
    assert (run / "model.safetensors").is_file()
    assert (run / "history.jsonl").is_file()
    taught = ekd("distill", "--teachers", run, *QUICK, "--no-train", "--out", tmp_path / "run", "--json")
    assert taught.exit_code == 0, taught.stderr
    assert "teacher" in json.loads(taught.stdout)["models"]
    again = ekd("train", run, *options, "--out", tmp_path / "again")
    assert again.exit_code == 2
    assert "is trained already" in again.stderr
    control = ekd("train", "lenet", "--role", "control", *options, "--out", tmp_path / "control", "--json")
    assert json.loads(control.stdout)["models"]["lenet"]["role"] == "control"


def test_models_lists_and_finds(tmp_path):
    own = ekd("models")
    assert "cifar-quick" in own.stdout
    assert "in timm" in own.stdout
    found = json.loads(ekd("models", "tv:squeezenet1_*", "--json").stdout)
    assert [row["name"] for row in found["models"]] == ["tv:squeezenet1_0", "tv:squeezenet1_1"]
    assert found["models"][1]["parameters"] == 1_235_496


def test_a_configuration_file_then_set_then_flags(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "teachers: [lenet]\nlimit_train: 200\ntraining: {epochs: 5, lr: 0.01}\nteacher_training: {epochs: 1}\n"
    )
    result = ekd(
        "distill", "--config", tmp_path / "c.yaml", "--set", "training.epochs=3", "--set", "training.lr=0.02",
        "--epochs", "1", "--out", tmp_path / "r", "--controls", "none",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "r" / "config.yaml").read_text()
    assert "epochs: 1\n" in text
    assert "lr: 0.02\n" in text


WRONG = {
    "no teachers": (
        [],
        "error: no teachers are named\n  why: there is nothing to distil from\n  fix: say --teachers resnet18,vgg16\n",
    ),
    "duplicate teacher": (
        ["--teachers", "resnet18,resnet18"],
        "error: teacher 'resnet18' is named twice\n  why: the same network twice teaches nothing new\n"
        "  fix: leave one out, or give each its own seed: resnet18#1,resnet18#2\n",
    ),
    "two runs of one name": (
        ["--teachers", "a/run,b/run"],
        "error: two teachers are called 'run'\n  why: tables and options tell teachers apart by that name\n"
        "  fix: rename one of the folders or files\n",
    ),
    "a teacher under a name of ours": (
        ["--teachers", "runs/student"],
        "error: a teacher cannot be called 'student'\n  why: tables and files of the run use that name\n"
        "  fix: rename its folder or file\n",
    ),
    "temperature not positive": (
        ["--teachers", "lenet", "--temperature", "0"],
        "error: temperature: '0' cannot be used\n  why: it should be greater than 0\n"
        "  fix: give temperature a number in that range\n",
    ),
    "negative temperature of one teacher": (
        ["--teachers", "lenet,resnet8", "--temperature", "lenet=2,resnet8=-1"],
        "error: temperature.resnet8: '-1' cannot be used\n  why: it should be greater than 0\n"
        "  fix: give temperature.resnet8 a number in that range\n",
    ),
    "temperature of a stranger": (
        ["--teachers", "lenet", "--temperature", "lenat=2"],
        "error: temperature: there is no teacher 'lenat'\n  why: the teachers are lenet\n  fix: did you mean 'lenet'?\n",
    ),
    "weights that do not sum to 1": (
        ["--teachers", "lenet,resnet8", "--weights", "0.5,0.7"],
        "error: weights: 0.5, 0.7 sum to 1.2, not to 1\n  why: other sums would change the scale of the loss\n"
        "  fix: say --weights 0.4166667,0.5833333\n",
    ),
    "number of weights": (
        ["--teachers", "lenet,resnet8", "--weights", "1"],
        "error: weights: 1 number(s) for 2 teacher(s)\n  why: the teachers are lenet, resnet8\n"
        "  fix: give one weight a teacher, in their order\n",
    ),
    "learning rate nan": (
        ["--teachers", "lenet", "--lr", "nan"],
        "error: training.lr: 'nan' cannot be used\n  why: it should be a finite number\n"
        "  fix: give training.lr a number in that range\n",
    ),
    "learning rate negative": (
        ["--teachers", "lenet", "--lr", "-0.1"],
        "error: training.lr: '-0.1' cannot be used\n  why: it should be greater than 0\n"
        "  fix: give training.lr a number in that range\n",
    ),
    "unknown control": (
        ["--teachers", "lenet", "--controls", "label"],
        "error: controls: there is no 'label'\n  why: known are labels, best-teacher, independent and none\n"
        "  fix: did you mean 'labels'?\n",
    ),
    "misspelt teacher": (
        ["--teachers", "resnt18"],
        "error: no model is called 'resnt18'\n  why: neither this project, timm nor torchvision has it\n"
        "  fix: did you mean 'resnet18'?\n",
    ),
    "misspelt data": (
        ["--teachers", "lenet", "--data", "digit"],
        "error: unknown data source 'digit'\n"
        "  why: known are digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:PATH, tars:PATH, csv:FILE and hf:NAME\n"
        "  fix: did you mean 'digits'?\n",
    ),
    "teacher size too small": (
        ["--teachers", "vgg16", "--teacher-size", "vgg16=28"],
        "error: 'vgg16' cannot take 28×28 images\n  why: it needs at least 32×32\n"
        "  fix: say --teacher-size vgg16=32 (--student-size 32; --size 32 of `ekd train`), "
        "or leave the size out and the images are resized\n",
    ),
    "no such device": (
        ["--teachers", "lenet", "--device", "tpu9"],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_end_in_three_lines_and_exit_2(case, tmp_path):
    arguments, expected = WRONG[case]
    result = ekd("distill", *arguments, "--quiet", "--out", tmp_path / "r")
    assert result.exit_code == 2
    assert result.stdout == ""
    if expected is None:
        assert result.stderr.startswith("error: there is no device 'tpu9' here\n  why: ")
    else:
        assert result.stderr == expected
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r" / "student.safetensors").exists()


def test_short_names_work_in_files_and_assignments_too(tmp_path):
    (tmp_path / "c.yaml").write_text("teachers: [lenet]\nepochs: 7\nlimit_train: 200\nteacher_epochs: 1\n")
    folder = tmp_path / "r"
    result = ekd(
        "distill", "--config", tmp_path / "c.yaml", "--set", "epochs=1", "--controls", "none", "--out", folder
    )
    assert result.exit_code == 0, result.stderr
    assert "epochs: 1\n" in (folder / "config.yaml").read_text()


def test_an_unknown_option_is_told_exactly(tmp_path):
    result = ekd("evaluate", "x", "--set", "devise=cpu")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: unknown option 'devise'\n  why: no option has that name\n  fix: did you mean 'device'?\n"
    )


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("temprature: 3\ntraining: {lr: .nan, epoch: 4}\n")
    result = ekd(
        "distill", "--config", tmp_path / "c.yaml", "--teachers", "lenet,lenet", "--weights", "1,1,1",
        "--soft-weight", "2", "--set", "seed",
    )  # fmt: skip
    assert result.exit_code == 2
    first_lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sorted(first_lines) == sorted([
        "error: --set seed assigns nothing",
        "error: unknown option 'temprature'",
        "error: unknown option 'training.epoch'",
        "error: training.lr: nan cannot be used",
        "error: soft_weight: '2' cannot be used",
        "error: teacher 'lenet' is named twice",
        "error: weights: 3 number(s) for 2 teacher(s)",
    ])  # fmt: skip
    assert "fix: did you mean 'temperature'?" in result.stderr
    assert "fix: did you mean 'training.epochs'?" in result.stderr


YAML = {
    "duplicate key": ("seed: 1\nseed: 2\n", "the key 'seed' stands there twice"),
    "python tag": ("seed: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "no table": ("- a\n- b\n", "it should be a table of key: value lines"),
    "broken": ("seed: [1\n", "expected ',' or ']'"),
}


@pytest.mark.parametrize("case", YAML)
def test_a_configuration_file_that_cannot_be_used(case, tmp_path):
    text, why = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    result = ekd("distill", "--config", tmp_path / "c.yaml", "--teachers", "lenet")
    assert result.exit_code == 2
    assert f"  why: {why}" in result.stderr


def test_a_missing_configuration_file(tmp_path):
    result = ekd("distill", "--config", tmp_path / "none.yaml")
    assert result.stderr == (
        f"error: cannot read {tmp_path / 'none.yaml'}\n  why: No such file or directory\n"
        "  fix: check the path of --config\n"
    )


def test_analyze_agreement_without_a_run(tmp_path):
    result = shell("analyze-agreement", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: no finished run in runs/\n"
        "  why: none was named, and the newest is taken from there\n"
        "  fix: name a run folder, or make one: ekd distill --teachers resnet18,vgg16 --student lenet\n"
    )


def test_an_unexpected_error_is_one_message_unless_debug_is_given(monkeypatch, tmp_path):
    import ensemble_kd.distillation

    def fail(**_):
        raise OSError(28, "No space left on device", "/full/disk")

    monkeypatch.setattr(ensemble_kd.distillation, "distill", fail)
    result = ekd("distill", "--teachers", "lenet")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: OSError (/full/disk)\n  why: No space left on device\n  fix: see more with --debug\n"
    )
    assert isinstance(ekd("distill", "--teachers", "lenet", "--debug").exception, OSError)


def test_ctrl_c_ends_with_75(monkeypatch):
    import ensemble_kd.distillation

    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ensemble_kd.distillation, "distill", stop)
    result = ekd("distill", "--teachers", "lenet")
    assert result.exit_code == 75
    assert result.stderr == "stopped: what was finished is kept\n"
