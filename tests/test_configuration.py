"""Options from files, `--set`, the environment and flags: which wins, what is told, and what completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from support import refused
from typer.testing import CliRunner

import ensemble_kd
from ensemble_kd import config, configuration
from ensemble_kd.cli import VERBS, app
from ensemble_kd.cli.completion import OWN, SOURCES, offered
from ensemble_kd.data.sources import SOURCES as KNOWN_SOURCES
from ensemble_kd.errors import ConfigError
from ensemble_kd.schema import DistillOptions, EvaluateOptions, TrainOptions
from ensemble_kd.students import STUDENTS

NEEDED = {
    "train": {"model": "lenet"},
    "evaluate": {"path": "runs/a"},
    "predict": {"model": "runs/a", "images": ["a.png"]},
    "export": {"run": "runs/a"},
    "distill": {"teachers": ["lenet"]},
    "study": {"teachers": ["lenet"], "over": {"temperature": [1, 2]}},
    "analyze-teachers": {"teachers": ["lenet"]},
}


def ekd(*arguments, **env):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env)


def test_each_place_wins_over_those_before_it(tmp_path):
    """In every pair of neighbours the later one counts, whatever the key is called there."""
    file = tmp_path / "c.yaml"
    file.write_text("teachers: [lenet]\ntraining: {epochs: 1, lr: 0.1, batch_size: 8}\nseed: 1\n")
    result = ekd(
        "config", "show", "distill", "--config", file, "--set", "training.epochs=2", "--set", "lr=0.2",
        "--set", "seed=2", "--lr", "0.4", "--json", EKD_TRAINING__EPOCHS="3", EKD_LR="0.3", EKD_SEED="3",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    shown = {name: (row["value"], row["from"]) for name, row in json.loads(result.stdout)["options"].items()}
    assert shown["training.epochs"] == (3, "EKD_TRAINING__EPOCHS")
    assert shown["training.lr"] == (0.4, "flag")
    assert shown["training.batch_size"] == (8, str(file))
    assert shown["seed"] == (3, "EKD_SEED")
    assert shown["teachers"] == (["lenet"], str(file))
    assert shown["loss"] == ("kl", "default")
    without = ekd("config", "show", "--config", file, "--set", "seed=2", "--json")
    assert json.loads(without.stdout)["options"]["seed"] == {"value": 2, "from": "--set"}


def test_what_is_shown_is_a_configuration_again(tmp_path):
    arguments = [
        "--teachers",
        "a,b",
        "--temperature",
        "a=2",
        "--epochs",
        "7",
        "--set",
        "loss_numbers.alpha=1",
    ]
    text = ekd("config", "show", "distill", *arguments).stdout
    (tmp_path / "c.yaml").write_text(text)
    again = config.resolve(DistillOptions, {}, file=tmp_path / "c.yaml")
    assert (again.temperature, again.training.epochs, again.loss_numbers.alpha) == ({"a": 2.0}, 7, 1.0)
    assert "training.epochs: 7 " in text
    assert "# flag" in text


def test_the_environment_is_of_the_command_line_alone(monkeypatch):
    """A call from Python depends on its arguments; nor does resuming a run look around."""
    monkeypatch.setenv("EKD_SEED", "9")
    assert config.resolve(TrainOptions, {"model": "lenet"}).seed == 0
    assert config.resolve(TrainOptions, {"model": "lenet"}, sets=["EKD_SEED=9"]).seed == 9


def test_variables_of_other_verbs_are_left_alone_and_unknown_ones_refused():
    environment = {
        "EKD_TEMPERATURE": "2", "EKD_DATA": "digits", "EKD_DEVICE": "", "EKD_CACHE": "/x", "HOME": "/",
        "EKD_TEST_CIFAR10_JPEG": "/y", "EKD_TRIPLETS": "3",
    }  # fmt: skip
    assert configuration.from_environment(EvaluateOptions, environment) == ["EKD_DATA=digits"]
    with refused(
        ConfigError,
        "environment: EKD_TEMPRATURE is no option of any verb",
        "variables that begin with EKD_ are options: EKD_TRAINING__EPOCHS=3 is training.epochs",
        "did you mean 'EKD_TEMPERATURE'?",
    ):
        configuration.from_environment(EvaluateOptions, environment | {"EKD_TEMPRATURE": "3"})
    with refused(
        ConfigError,
        "environment: EKD_CASHE is no option of any verb",
        "variables that begin with EKD_ are options: EKD_TRAINING__EPOCHS=3 is training.epochs",
        "did you mean 'EKD_CACHE'?",
    ):
        configuration.from_environment(DistillOptions, {"EKD_CASHE": "/x"})


def test_an_option_under_two_variables_is_refused():
    with refused(
        ConfigError,
        "environment: EKD_EPOCHS and EKD_TRAINING__EPOCHS both say training.epochs",
        "one of them would be lost",
        "unset one of the two",
    ):
        configuration.from_environment(DistillOptions, {"EKD_EPOCHS": "3", "EKD_TRAINING__EPOCHS": "4"})


def test_a_wrong_variable_is_told_with_its_name():
    result = ekd("distill", "--teachers", "lenet", EKD_TEMPERATURE="-2", EKD_WEIGHTS="a")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: weights.0: 'a' cannot be used (EKD_WEIGHTS)\n"
        "  why: it should be a number\n  fix: write one, such as 0.1\n"
        "error: temperature: '-2' cannot be used (EKD_TEMPERATURE)\n"
        "  why: it should be greater than 0\n  fix: give temperature a number in that range\n"
    )


@pytest.mark.parametrize("verb", configuration.VERBS)
def test_a_template_holds_every_option_with_its_default_or_an_example(verb, tmp_path):
    text = configuration.config_template(verb)
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert configuration.validate_config(file, verb) == verb
    model, given = configuration.options_of(verb), NEEDED.get(verb, {})
    assert config.resolve(model, given, file=file) == config.resolve(model, given)
    written = config.read_yaml(file)
    for name, field in model.model_fields.items():
        assert name in written
        if not config.table_at(model, name):
            assert f"# {field.description or name}\n" in text
    tables = {name for name in written if config.table_at(model, name)}
    assert {row["option"] for row in configuration.show_config(verb, **given)} >= set(written) - tables


def test_init_writes_a_file_and_never_over_another(tmp_path):
    file = tmp_path / "sub" / "c.yaml"
    assert ekd("config", "init", "train", "--out", file).stdout == (
        f"{file}: use it with ekd train --config {file}\n"
    )
    assert file.read_text() == configuration.config_template("train")
    again = ekd("config", "init", "--out", file)
    assert again.exit_code == 2
    assert again.stderr.startswith(f"error: {file} is there already\n")
    assert ekd("config", "init", "--out", file, "--overwrite").exit_code == 0
    assert file.read_text() == configuration.config_template("distill")


def test_validate_tells_everything_at_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "teachers: [a]\nteachers: [b]\nepochs: 3\ntraining: {epochs: 2, lr: -1, lr: 0}\nsede: 3\nviews: x\n"
    )
    result = ekd("config", "validate", file)
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: cannot read {file}, line 2",
        f"error: cannot read {file}, line 4",
        f"error: {file}: 'epochs' and 'training' both say training.epochs",
        "error: training.lr: 0 cannot be used",
        "error: views: 'x' cannot be used",
        "error: unknown option 'sede'",
    ]
    assert "why: the key 'teachers' stands there twice\n" in result.stderr
    assert "why: the key 'lr' stands there twice\n" in result.stderr
    assert "fix: did you mean 'seed'?" in result.stderr


def test_validate_takes_the_verb_of_the_run(tmp_path):
    file = tmp_path / "run" / "config.yaml"
    file.parent.mkdir()
    file.write_text("model: lenet\n")
    (tmp_path / "run" / "status.json").write_text('{"verb": "train"}')
    assert ekd("config", "validate", file).stdout == f"{file}: nothing is wrong with it, for ekd train\n"
    (tmp_path / "c.yaml").write_text("model: lenet\nrole: control\n")
    assert ekd("config", "validate", tmp_path / "c.yaml", "train").exit_code == 0
    assert "unknown option 'role'" in ekd("config", "validate", tmp_path / "c.yaml").stderr
    with refused(
        ConfigError,
        "there is no verb 'distil' with options",
        f"known are {', '.join(configuration.VERBS)}",
        "did you mean 'distill'?",
    ):
        configuration.validate_config(file, "distil")


def test_a_table_in_a_later_place_leaves_the_rest_of_it(tmp_path):
    (tmp_path / "c.yaml").write_text("teachers: [lenet]\ntraining: {epochs: 4, lr: 0.1}\n")
    options = config.resolve(
        DistillOptions, {"training": {"epochs": 2}}, file=tmp_path / "c.yaml", sets=["training={lr: 0.3}"]
    )
    assert (options.training.epochs, options.training.lr) == (2, 0.3)


def _numbers(folder: Path) -> tuple[dict, list]:
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return metrics, [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def test_the_resolved_file_reruns_a_run_to_the_same_numbers(tmp_path):
    first = ensemble_kd.distill(
        ["lenet", "resnet8"], "lenet", epochs=2, teacher_epochs=1, limit_train=200, augment="crop",
        temperature="lenet=2,resnet8=3", combine="learned", soft_schedule="linear", seed=3, out=tmp_path / "a",
    )  # fmt: skip
    again = ensemble_kd.distill(config_file=first.folder / "config.yaml", out=tmp_path / "b")
    assert _numbers(again.folder) == _numbers(first.folder)
    assert (again.folder / "config.yaml").read_text() == (first.folder / "config.yaml").read_text()
    trained = ensemble_kd.train("lenet", role="control", epochs=1, limit_train=200, out=tmp_path / "c")
    twice = ensemble_kd.train(config_file=trained.folder / "config.yaml", out=tmp_path / "d")
    assert _numbers(twice.folder) == _numbers(trained.folder)


def in_process(code: str, **env: str) -> str:
    """What Python prints for `code` in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return ran.stdout


def test_help_and_completion_import_nothing_heavy():
    code = (
        "import sys\nfrom ensemble_kd.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'rich', 'timm') if m in sys.modules])"
    )
    assert in_process(code).splitlines()[-1] == "[]"


def test_every_verb_of_the_table_is_there_with_its_help():
    text = ekd("--help").stdout
    for verb in VERBS:
        assert verb in text
        assert ekd(verb, "--help").exit_code == 0
    assert ekd("distil").exit_code == 2
    assert "No such command 'distil'. Did you mean 'distill'?" in ekd("distil").stderr
    assert ekd("xyz").stderr.endswith("Error: No such command 'xyz'.\n")


def test_names_with_a_space_between_them_are_told_how_to_be_written():
    result = ekd("distill", "--teachers", "lenet,", "resnet8", "--student", "lenet")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Nothing is to be done with 'resnet8' (names are joined by commas without spaces: a,b)\n"
    )


def test_every_verb_with_options_has_them_in_files_and_variables():
    """`targets build` takes those of `distill`."""
    root = typer.main.get_command(app)
    commands = {verb: root.get_command(None, verb) for verb in VERBS}
    assert {verb for verb, command in commands.items() if hasattr(command.callback, "read")} == set(
        configuration.VERBS
    )


def test_the_shell_is_offered_verbs_flags_models_and_choices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "status.json").write_text("{}")
    kept = tmp_path / "cache" / "teachers" / "a-1"
    kept.mkdir(parents=True)
    (kept / "teacher.json").write_text('{"made_from": {"model": "timm:vgg16"}}')

    def completed(line: str) -> list[str]:
        ran = ekd(_EKD_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1),
                  EKD_CACHE=str(tmp_path / "cache"))  # fmt: skip
        return ran.stdout.split()

    assert completed("ekd dis") == ["distill"]
    assert completed("ekd config ") == ["init", "show", "validate"]
    assert completed("ekd distill --student len") == ["lenet"]
    assert completed("ekd distill --teachers lenet,res") == ["lenet,resnet8", "lenet,resnet20"]
    assert completed("ekd distill --teachers tim") == ["timm:vgg16"]
    assert completed("ekd evaluate runs") == ["runs/mine"]
    assert completed("ekd distill --pool p") == ["prob", "pool-then-temper"]
    assert completed("ekd distill --data fash") == ["fashion-mnist"]


def test_what_completes_is_what_there_is():
    assert set(OWN) == set(STUDENTS)
    assert {name for name in SOURCES if not name.endswith(":")} <= set(KNOWN_SOURCES)
    assert offered("a,b", ["b1", "b2", "c"]) == ["a,b1", "a,b2"]


def test_flags_are_those_of_the_verb():
    wrong = ekd("config", "show", "train", "--epoch", "3")
    assert wrong.exit_code == 2
    assert "No such option: --epoch" in wrong.stderr
    assert ekd("config", "show", "distil").stderr.endswith("  fix: did you mean 'distill'?\n")
    shown = json.loads(ekd("config", "show", "train", "lenet", "--epochs", "3", "--json").stdout)
    assert shown["options"]["model"] == {"value": "lenet", "from": "flag"}
    unasked = json.loads(ekd("config", "show", "distill", "--teachers", "a", "--no-train", "--json").stdout)
    assert unasked["options"]["train_teachers"] == {"value": False, "from": "flag"}
