"""A study: its points are normal runs, none is run twice, and its numbers are those of scipy."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import seaborn
import torch
import yaml
from scipy import stats
from support import refused

import ensemble_kd
from ensemble_kd import studying as module
from ensemble_kd.analysis.intervals import t_interval
from ensemble_kd.analysis.plots_study import draw_curves
from ensemble_kd.analysis.studies import StudyResult
from ensemble_kd.analysis.study_numbers import (
    best_on_validation,
    early_and_plateau,
    effect,
    effects_of,
    sentences,
    summarise_points,
)
from ensemble_kd.errors import ConfigError, RunError
from ensemble_kd.locks import lock
from ensemble_kd.schema import DistillOptions, TrainOptions
from ensemble_kd.shared import Shared
from ensemble_kd.studying import study
from ensemble_kd.together import distill_together

SMALL: dict[str, Any] = {
    "teachers": ["lenet", "resnet8"],
    "limit_train": 100,
    "teacher_epochs": 1,
    "epochs": 2,
    "seeds": 2,
    "measures": "accuracy,nll",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> StudyResult:
    """A study of two temperatures and a baseline from two seeds."""
    return study(over={"temperature": [1, 8]}, **SMALL, out=tmp_path_factory.mktemp("studies") / "small")


def rows_of(folder: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_point_is_a_normal_run(made: StudyResult) -> None:
    rows = rows_of(made.folder)
    assert [(row["point"], row["temperature"], row["soft_weight"], row["seed"]) for row in rows] == [
        ("temperature=1", "1", "", "0"),
        ("temperature=1", "1", "", "1"),
        ("temperature=8", "8", "", "0"),
        ("temperature=8", "8", "", "1"),
        ("soft_weight=0", "", "0", "0"),
        ("soft_weight=0", "", "0", "1"),
    ]
    for row in rows:
        run = made.folder / row["run"]
        student = json.loads((run / "metrics.json").read_text())["models"]["student"]
        assert float(row["accuracy"]) == student["accuracy"]["value"]
        assert float(row["nll"]) == student["nll"]["value"]
        history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        assert float(row["val_accuracy"]) == history[-1]["val"]["accuracy"]
        assert ensemble_kd.evaluate(run)["models"][run.name]["accuracy"] == student["accuracy"]


def test_a_point_has_the_numbers_of_the_same_run_by_distill(made: StudyResult, tmp_path: Path) -> None:
    options = {k: v for k, v in SMALL.items() if k not in ("seeds", "measures")}
    alone = ensemble_kd.distill(**options, temperature=8, seed=1, controls="labels", out=tmp_path / "alone")
    rows = {row["point"]: row for row in rows_of(made.folder) if row["seed"] == "1"}
    models = alone.metrics["models"]
    assert float(rows["temperature=8"]["nll"]) == models["student"]["nll"]["value"]
    assert float(rows["soft_weight=0"]["nll"]) == models["labels"]["nll"]["value"]


def test_differences_are_scipys(made: StudyResult) -> None:
    table = pd.read_csv(made.folder / "results.csv").set_index(["point", "seed"])
    for name in ("temperature=1", "temperature=8"):
        apart = table.loc[name]["nll"] - table.loc["soft_weight=0"]["nll"]
        found = made.numbers["points"][name]["differences"]["nll"]
        test = stats.ttest_1samp(apart, 0)
        for level, keys in ((0.95, ("low", "high")), (1 - 0.05 / 2, ("all_low", "all_high"))):
            low, high = test.confidence_interval(level)
            assert [found[key] for key in keys] == pytest.approx([low, high], rel=1e-9)
        assert found["value"] == pytest.approx(apart.mean(), rel=1e-12)


def test_the_page_stands_alone_and_says_what_the_table_says(made: StudyResult) -> None:
    page = made.page.read_text()
    assert "<script" not in page
    assert page.count("<img ") == len(made.numbers["pictures"]) == 3
    for sentence in made.numbers["sentences"]:
        assert sentence.replace("&", "&amp;") in page
        assert sentence in made.table()
    for picture in made.numbers["pictures"].values():
        assert (made.folder / picture["file"]).read_bytes()[:4] == b"\x89PNG"
        assert "nan" not in picture["alt"]


def test_a_study_that_is_finished_runs_nothing_again(
    made: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "distill_with", None)
    monkeypatch.setattr(module, "go_on", None)
    before = (made.folder / "results.csv").read_bytes()
    again = study(over={"temperature": [1, 8]}, **SMALL, out=made.folder)
    assert (made.folder / "results.csv").read_bytes() == before
    assert again.numbers["points"] == made.numbers["points"]


def test_interrupted_and_started_again_it_ends_the_same(
    made: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third run is stopped in its middle; it goes on, and the two before are left as they are."""
    begun: list[Path] = []
    real = module.distill_with

    def stopped_in_the_third(options: Any, objects: Any) -> Any:
        begun.append(options.out)
        if len(begun) == 3:
            handler = logging.Handler()
            handler.emit = lambda record: (  # type: ignore[method-assign]
                os.kill(os.getpid(), signal.SIGINT) if "epoch 1/2" in record.getMessage() else None
            )
            logging.getLogger("ensemble_kd").addHandler(handler)
            try:
                return real(options, objects)
            finally:
                logging.getLogger("ensemble_kd").removeHandler(handler)
        return real(options, objects)

    monkeypatch.setattr(module, "distill_with", stopped_in_the_third)
    arguments = {"over": {"temperature": [1, 8]}, **SMALL, "out": tmp_path / "again"}
    with pytest.raises(KeyboardInterrupt):
        study(**arguments)
    stopped = json.loads((begun[2] / "status.json").read_text())
    assert stopped["state"] == "stopped"
    result = study(**arguments)
    assert len(begun) == len(set(begun)) == 6
    keep = [name for name in rows_of(made.folder)[0] if name != "seconds"]
    first, second = ([{k: row[k] for k in keep} for row in rows_of(f)] for f in (made.folder, result.folder))
    assert first == second
    assert result.numbers["sentences"] == made.numbers["sentences"]


def test_two_processes_share_the_points(
    made: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process makes nothing before the other one has begun a run."""
    real = module._finish

    def after_the_other(folder: Path, *rest: Any) -> bool:
        return any((tmp_path / "shared").glob("points/*/*/status.json")) and real(folder, *rest)

    monkeypatch.setattr(module, "_finish", after_the_other)
    result = study(over={"temperature": [1, 8]}, **SMALL, jobs=2, out=tmp_path / "shared")
    keep = ("point", "seed", "accuracy", "nll")
    first, second = ([[row[k] for k in keep] for row in rows_of(f)] for f in (made.folder, result.folder))
    assert first == second


def test_other_options_are_refused_with_the_difference_and_more_values_are_not(
    tmp_path: Path, made: StudyResult
) -> None:
    with refused(
        ConfigError,
        f"{made.folder} holds points of other options",
        "training.epochs was 2, is 3",
        "bring that back, or name another folder: --out PATH (or make all anew: --overwrite)",
    ):
        study(over={"temperature": [1, 8]}, **{**SMALL, "epochs": 3}, out=made.folder)
    shutil.copytree(made.folder, tmp_path / "more")
    more = study(over={"temperature": [1, 8]}, **{**SMALL, "seeds": 3}, out=tmp_path / "more")
    assert {tuple(point["seeds"]) for point in more.numbers["points"].values()} == {(0, 1, 2)}
    kept = [row for row in rows_of(more.folder) if row["seed"] != "2"]
    assert kept == rows_of(made.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        study(over={"temperature": [1]}, **SMALL, out=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "lock").exists()
    with refused(
        RunError,
        f"cannot write to {tmp_path / 'notes.txt'}",
        "File exists",
        "name another folder: --out PATH",
    ):
        study(over={"temperature": [1]}, **SMALL, out=tmp_path / "notes.txt")


@pytest.mark.parametrize("flies", [False, True])
def test_a_point_that_diverges_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flies: bool
) -> None:
    """Alone, or in the fleet that there would be on a GPU."""
    flown: list[int] = []

    def spied(chosen: Sequence[DistillOptions], shared: Shared) -> str:
        flown.append(len(chosen))
        return distill_together(chosen, shared)

    monkeypatch.setattr(module, "distill_together", spied)
    if flies:
        monkeypatch.setattr(module, "choose_device", lambda name: torch.device("cuda"))
    small = {**SMALL, "seeds": 1, "epochs": 1}
    result = study(over={"lr": [0.01, 1e30]}, **small, baseline="none", out=tmp_path / "wild")
    assert list(result.numbers["points"]) == ["lr=0.01"]
    assert result.numbers["missing"] == ["lr=1e+30"]
    assert flown == ([2] if flies else [])
    assert "the loss is not finite" in result.numbers["failures"]["lr=1e+30, seed 0"]
    assert "could not be finished" in result.page.read_text()
    assert result.numbers["sentences"] == [
        "One seed a point: its differences may be those of the seed, so nothing is said of them."
    ]


def test_a_study_whose_baseline_diverges_still_has_its_page(tmp_path: Path) -> None:
    small = {**SMALL, "seeds": 1, "epochs": 1, "measures": "accuracy"}
    result = study(over={"lr": [0.01]}, **small, baseline={"lr": 1e30}, out=tmp_path / "wild")
    assert list(result.numbers["points"]) == ["lr=0.01"]
    assert "lr=1e+30" in result.page.read_text()


def test_a_run_that_was_killed_as_it_began_is_made(tmp_path: Path) -> None:
    small = {**SMALL, "seeds": 1, "epochs": 1, "measures": "accuracy", "over": {"lr": [0.01]}}
    begun = tmp_path / "s" / "points" / "lr=0.01" / "seed-0"
    begun.mkdir(parents=True)
    for name in ("lock", "config.yaml", ".status.json.0a.tmp"):
        (begun / name).touch()
    (tmp_path / "s" / "study.yaml").write_text("over: {lr: [0.01]}")
    with pytest.raises(ConfigError, match="holds points of other options"):
        study(**small, baseline="none", out=tmp_path / "s")
    (tmp_path / "s" / "study.yaml").unlink()
    begun.parents[1].rename(tmp_path / "points")
    (tmp_path / "s").rmdir()
    with pytest.MonkeyPatch.context() as patch:  # stopped right after it wrote study.yaml
        patch.setattr(module, "_work", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            study(**small, baseline="none", out=tmp_path / "s")
    (tmp_path / "points").rename(tmp_path / "s" / "points")
    assert list(study(**small, baseline="none", out=tmp_path / "s").numbers["points"]) == ["lr=0.01"]


def test_fleets_are_flown_by_one_process_at_a_time_and_halved_where_memory_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flown: list[int] = []

    def fits_two(chosen: Sequence[DistillOptions], shared: Shared) -> str:
        assert lock(tmp_path / "s" / "points") is None  # a second process waits
        flown.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError
        return distill_together(chosen, shared)

    monkeypatch.setattr(module, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(module, "distill_together", fits_two)
    small = {**SMALL, "seeds": 4, "epochs": 1, "measures": "accuracy"}
    result = study(over={"temperature": [4]}, **small, baseline="none", out=tmp_path / "s")
    assert flown == [4, 2, 2]
    assert result.numbers["points"]["temperature=4"]["seeds"] == [0, 1, 2, 3]


def test_analyses_are_made_under_the_lock_of_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def analysis(folder: Path, **_: Any) -> None:
        assert lock(folder) is None  # no other process can make it too
        made.append(folder.name)
        (folder / "analysis").mkdir(exist_ok=True)
        (folder / "analysis" / "surface.json").write_text("{}")

    monkeypatch.setitem(module._ANALYSES, "surface", analysis)
    monkeypatch.setattr("ensemble_kd.analysis.studies._LIKENESS", {})
    small = {**SMALL, "epochs": 1, "measures": "accuracy", "analyses": ["surface"]}
    for _ in range(2):
        study(over={"temperature": [4]}, **small, baseline="none", out=tmp_path / "s")
    assert made == ["seed-0", "seed-1"]


def test_networks_are_trained_first_and_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    first = {"name": "weak", "model": "lenet", "training.epochs": 1, "role": "control"}
    arms = {"weak": {"teachers": ["{before}/weak"]}, "library": {"teachers": ["resnet8"]}}
    asked = {**SMALL, "before": [first], "arms": arms, "baseline": "none", "seeds": 1, "epochs": 1}
    asked["training"] = {"epochs": asked.pop("epochs")}
    asked["teacher_training"] = {"epochs": asked.pop("teacher_epochs")}
    asked["measures"] = ["accuracy"]
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    result = study(file, out=tmp_path / "mine")
    weights = (tmp_path / "mine" / "before" / "weak" / "model.safetensors").stat().st_mtime_ns
    assert list(result.numbers["points"]) == ["arm=weak", "arm=library"]
    study(file, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "before" / "weak" / "model.safetensors").stat().st_mtime_ns == weights
    asked["before"] = [{**first, "training.epochs": 2}]
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    with pytest.raises(ConfigError, match=r"before\.weak was .*'training\.epochs': 1"):
        study(file, out=tmp_path / "mine")


def test_a_network_that_another_process_just_finished_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not finished at the first look, and finished under the lock."""
    chosen = {"model": "lenet", "training": {"epochs": 1}, "limit_train": 100, "out": tmp_path / "one"}
    module._prepare(TrainOptions(**chosen))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    looks = iter([False, True])
    monkeypatch.setattr(module, "_is_finished", lambda folder: next(looks))
    module._prepare(TrainOptions(**chosen))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before


def test_a_network_that_another_process_trains_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock(tmp_path / "one")
    assert held is not None

    def freed_after_a_while(seconds: float) -> None:
        assert not (tmp_path / "one" / "status.json").exists()
        held.close()

    monkeypatch.setattr(module.time, "sleep", freed_after_a_while)
    chosen = {"model": "lenet", "data": "digits", "training": {"epochs": 1}, "out": tmp_path / "one"}
    module._prepare(TrainOptions(**chosen))
    assert held.closed
    assert ensemble_kd.load_student(tmp_path / "one").card.model == "lenet"


@pytest.mark.parametrize(
    "name",
    ["regimes", "temperature", "dark", "losses", "teachers", "unlabelled", "views", "fidelity", "smoothing"],
)
def test_shipped_studies_can_be_read(name: str) -> None:
    from ensemble_kd.config import resolve
    from ensemble_kd.grid import StudyOptions, points_of, training_before

    file = module._file(name, None)
    options = resolve(StudyOptions, {}, file=file)
    assert options.question.endswith(("?", "."))
    assert options.seeds >= 5
    assert len(points_of(options, Path("before"))) >= 4
    training_before(options, Path("before"))


def test_what_over_leaves_out_of_a_named_study_is_told(
    made: StudyResult, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="holds points of other options"):
        study("smoothing", over={"soft_weight": [0.3]}, out=made.folder)
    assert caplog.messages == [
        "--over takes the place of the study's own: it goes over soft_weight, "
        "and not over teacher_training.label_smoothing"
    ]


def test_an_unknown_study_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        study("regime")
    assert caught.value.problems[0].what == "there is no study 'regime'"
    assert caught.value.problems[0].fix == "did you mean 'regimes'?"
    with pytest.raises(ConfigError, match="measures: there is no 'acuracy'"):
        study(over={"temperature": [1]}, **{**SMALL, "measures": "acuracy"})
    with pytest.raises(ConfigError, match="agreement_over_labels needs the control labels"):
        study(over={"temperature": [1]}, **{**SMALL, "measures": "agreement_over_labels"})
    with pytest.raises(ConfigError, match="cka_over_labels needs an analysis"):
        study(over={"temperature": [1]}, controls="labels", **{**SMALL, "measures": "cka_over_labels"})


# Numbers alone.


def rows(values: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    return [
        {"point": name, "seed": seed, "accuracy": value, "val_accuracy": value, "t": name}
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]


def test_intervals_are_students_t_and_of_one_seed_none() -> None:
    values = [0.1, 0.4, 0.35, 0.8]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert list(t_interval(values).values()) == pytest.approx([np.mean(values), low, high], rel=1e-12)
    assert np.isnan([t_interval([1.0])["low"], t_interval([1.0])["high"]]).all()


def test_differences_are_paired_by_seed_where_both_have_it() -> None:
    found = summarise_points(
        rows({"a": [0.5, 0.6, 0.9], "b": [0.4, 0.4]}), {"a": "b", "b": None}, ["accuracy"]
    )
    assert found["a"]["differences"]["accuracy"]["value"] == pytest.approx(0.15)
    assert found["a"]["seeds"] == [0, 1, 2]
    assert found["b"]["differences"] == {}


def test_sentences_claim_no_more_than_intervals_that_hold_together() -> None:
    """A gain that is clear by itself, and not among many."""
    generator = np.random.default_rng(1)
    base = np.zeros(5)
    clear, weak = base + 0.05 + 0.001 * generator.standard_normal(5), [0.01, 0.014, 0.005, 0.012, 0.006]
    few = {"clear": clear, "weak": weak, "base": base}
    many = few | {f"same{n}": base + 0.001 * generator.standard_normal(5) for n in range(30)}
    for values, told in (
        (few, "2 higher (clear; weak) of 2 points"),
        (many, "1 higher (clear) of 32 points"),
    ):
        baselines = {name: None if name == "base" else "base" for name in values}
        points = summarise_points(rows(values), baselines, ["accuracy", "val_accuracy"])
        said = sentences(points, baselines, {}, "base", ["accuracy"])
        assert said[0].startswith(f"accuracy against base: {told}")
        assert said[1].startswith("Chosen on the validation split: clear.")
        assert best_on_validation(points) == "clear"


def test_a_baseline_can_be_the_best_on_validation_and_a_point_that_lost_seeds_cannot() -> None:
    values = {"a": [0.5, 0.51], "b": [0.6, 0.62], "base": [0.7, 0.72], "one": [0.9]}
    baselines = {"a": "base", "b": "base", "base": None, "one": "base"}
    points = summarise_points(rows(values), baselines, ["accuracy", "val_accuracy"])
    assert best_on_validation(points) == "base"
    said = sentences(points, baselines, {}, "labels", ["accuracy"])
    assert said[-1].startswith(
        "Chosen on the validation split: base, a baseline; of the others b. On the test split, against labels, "
        "by itself: accuracy -10.00 points"
    )


def test_an_effect_is_clear_only_if_it_holds_for_all_pairs_together() -> None:
    alone = {"seeds": range(5), "means": {"val_accuracy": {"value": 0.5}}, "differences": {}}
    generator = np.random.default_rng(0)
    noise = 0.01 * generator.standard_normal((6, 5))
    few = rows({"low": noise[0], "high": noise[1] + 0.02})
    many = few + rows({f"x{n}": noise[n] + 0.01 for n in range(2, 6)})
    found = [effects_of(table, ["t"], "accuracy")["t"] for table in (few, many)]
    assert [one["pairs"] for one in found if one] == [1, 15]
    for one in found:
        assert one is not None
        apart = np.subtract(noise[1] + 0.02, noise[0])
        test = stats.ttest_1samp(apart, 0).confidence_interval(1 - 0.05 / one["pairs"])
        assert [one["difference"][k] for k in ("all_low", "all_high")] == pytest.approx(list(test))
    said = [sentences({"a": alone}, {}, {"t": {"accuracy": one}}, "", [])[-1]
            for one in found]  # fmt: skip
    assert said[0].endswith(": a clear difference (5 seeds).")
    assert said[1].endswith(": no clear difference (5 seeds, 15 pairs of values together).")
    assert effect(rows({"a": [0.5, 0.6], "b": [0.6, 0.5]}), "t", "accuracy") is None  # equally good


def test_values_that_are_equally_good_are_rarely_called_clearly_different() -> None:
    """Best and worst are chosen on validation, which shares the noise of training with the test split."""
    generator, alone, together, studies = np.random.default_rng(0), 0, 0, 300
    for _ in range(studies):
        trained = generator.standard_normal((4, 5))
        judged = {m: trained + 0.5 * generator.standard_normal((4, 5)) for m in ("accuracy", "val_accuracy")}
        table = [
            {"t": str(value), "seed": seed, **{m: judged[m][value, seed] for m in judged}}
            for value in range(4)
            for seed in range(5)
        ]
        found = effects_of(table, ["t"], "accuracy")["t"]
        assert found is not None
        difference = found["difference"]
        alone += difference["low"] > 0 or difference["high"] < 0
        together += difference["all_low"] > 0 or difference["all_high"] < 0
    assert together / studies < 0.05 < 0.08 < alone / studies


def test_bands_are_over_seeds_also_where_lines_average_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten points, so that lines stand for values of t, whose runs with other w are no further seeds."""
    curves = [
        {"point": f"{t}{w}", "t": t, "w": str(w), "seed": seed, "step": 1, "measure": "accuracy", "percent": 10 * w + seed}
        for t in "ab" for w in range(5) for seed in range(3)
    ]  # fmt: skip
    settings = {row["point"]: {"t": row["t"], "w": row["w"]} for row in curves}
    numbers = {"points": settings, "settings": settings, "dimensions": ["t", "w"]}
    drawn: list[pd.DataFrame] = []
    monkeypatch.setattr(seaborn, "lineplot", lambda part, **_: drawn.append(part))
    draw_curves(tmp_path / "curves.png", curves, numbers)
    assert drawn[0][["t", "seed", "percent"]].to_numpy().tolist() == [
        [t, seed, 20 + seed] for t in "ab" for seed in range(3)
    ]


def test_an_interval_without_width_makes_nothing_clear() -> None:
    """Two seeds that differ by the same number have a spread of 0, which no one should believe."""
    values = {"1": [0.50, 0.40], "4": [0.48, 0.38], "base": [0.45, 0.35]}
    baselines = {"1": "base", "4": "base", "base": None}
    points = summarise_points(rows(values), baselines, ["accuracy", "val_accuracy"])
    effects = {"t": {"accuracy": effect(rows({n: values[n] for n in ("1", "4")}), "t", "accuracy")}}
    said = sentences(points, baselines, effects, "base", ["accuracy"])
    assert said[0] == (
        "accuracy: none of 2 points differs clearly from base (intervals over 2 seeds that hold together)."
    )
    assert said[-1].endswith("differs by +2.00 points [+2.00, +2.00]: no clear difference (2 seeds).")


def test_an_effect_is_averaged_over_the_rest_and_chosen_on_validation() -> None:
    table = [
        {"point": f"{t}{w}", "t": t, "w": w, "seed": s, "accuracy": a + 0.01 * s, "val_accuracy": v}
        for t, a, v in (("1", 0.5, 0.9), ("4", 0.7, 0.6))
        for w, a in (("x", a), ("y", a + 0.1))
        for s in range(3)
    ]
    found = effect(table, "t", "accuracy")
    assert found is not None
    assert (found["best"], found["worst"]) == ("1", "4")  # although it is worse on the test split
    assert found["difference"]["value"] == pytest.approx(-0.2)
    assert found["means"]["4"]["value"] == pytest.approx(0.76)
    assert effect(table[:-1], "t", "accuracy") is None  # a seed is missing


def test_early_epochs_and_plateau() -> None:
    assert early_and_plateau([0.1, 0.3, 0.5, 0.89, 0.895, 0.9]) == (pytest.approx(0.2), 4)
    assert early_and_plateau([0.7]) == (0.7, 1)
