"""The points of a study: crossed, named, checked, and each with the point it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ensemble_kd.config import resolve, values_of
from ensemble_kd.errors import ConfigError
from ensemble_kd.grid import Point, StudyOptions, facts, located, points_of, to_yaml, training_before

BEFORE = Path("before")
TEACHERS = {"teachers": ["lenet", "resnet8"]}


def points(**given: Any) -> dict[str, Point]:
    return points_of(resolve(StudyOptions, {**TEACHERS, **given}), BEFORE)


def baselines(**given: Any) -> dict[str, str | None]:
    return {name: point.baseline for name, point in points(**given).items()}


def test_a_grid_is_crossed_and_compared_with_one_student_on_labels() -> None:
    found = baselines(over={"temperature": [1, 2.5], "soft_weight": [0.1, 0.9]})
    assert found == {
        "temperature=1,soft_weight=0.1": "soft_weight=0",
        "temperature=1,soft_weight=0.9": "soft_weight=0",
        "temperature=2.5,soft_weight=0.1": "soft_weight=0",
        "temperature=2.5,soft_weight=0.9": "soft_weight=0",
        "soft_weight=0": None,
    }


def test_points_become_options_of_distill() -> None:
    found = points(over={"temperature": [1, 2], "training.lr": [0.1]}, training={"epochs": 3}, lr=0.2)
    options = found["temperature=2,training.lr=0.1"].options(7, device="cpu")
    assert (options.temperature, options.training.lr, options.training.epochs) == (2.0, 0.1, 3)
    assert (options.seed, options.controls, options.teachers) == (7, [], ["lenet", "resnet8"])


def test_what_labels_do_learn_from_stays_in_their_baseline() -> None:
    found = points(over={"lr": [0.1, 0.2], "temperature": [1, 4]})
    assert {point.baseline for point in found.values()} == {
        "lr=0.1,soft_weight=0",
        "lr=0.2,soft_weight=0",
        None,
    }
    plain = found["lr=0.2,soft_weight=0"].options(0)
    assert (plain.training.lr, plain.soft_weight, plain.temperature) == (0.2, 0.0, None)


def test_a_baseline_on_the_grid_is_not_made_twice() -> None:
    assert baselines(over={"soft_weight": [0, 0.5]}) == {
        "soft_weight=0.5": "soft_weight=0",
        "soft_weight=0": None,
    }


def test_arms_are_crossed_and_may_be_the_baseline() -> None:
    arms = {"one": {"teachers": ["lenet"]}, "two": {}}
    found = baselines(arms=arms, over={"temperature": [1, 4]}, baseline={"arm": "one"})
    assert found == {
        "arm=two,temperature=1": "arm=one,temperature=1",
        "arm=two,temperature=4": "arm=one,temperature=4",
        "arm=one,temperature=1": None,
        "arm=one,temperature=4": None,
    }
    own = points(arms=arms, over={"temperature": [1]}, baseline={"arm": "one"})
    assert own["arm=one,temperature=1"].options(0).teachers == ["lenet"]
    assert own["arm=two,temperature=1"].options(0).teachers == ["lenet", "resnet8"]


def test_arms_of_soft_options_share_one_baseline_and_arms_of_teachers_do_not() -> None:
    soft = {"low": {"soft_weight": 0.1}, "high": {"soft_weight": 0.9}}
    assert set(baselines(arms=soft).values()) == {"soft_weight=0", None}
    teachers = {"one": {"teachers": ["lenet"]}, "two": {}}
    assert set(baselines(arms=teachers).values()) == {"arm=one,soft_weight=0", "arm=two,soft_weight=0", None}


def test_a_setting_can_be_the_baseline_or_nothing() -> None:
    over = {"temperature": [1, 4], "soft_weight": [0.5]}
    assert baselines(over=over, baseline="temperature=1") == {
        "temperature=4,soft_weight=0.5": "temperature=1,soft_weight=0.5",
        "temperature=1,soft_weight=0.5": None,
    }
    assert set(baselines(over=over, baseline="none").values()) == {None}


def test_names_of_points_can_be_files_and_differ() -> None:
    long = {"teachers": [["lenet", "resnet8"], ["a/b" * 60], ["a/b" * 60 + "c"]]}
    found = points(over=long, baseline="none")
    assert next(iter(found)) == "teachers=lenet+resnet8"
    names = [point.folder for point in found.values()]
    assert len(set(names)) == 3
    assert names[0] == "teachers=lenet+resnet8"
    assert all(len(name) < 120 and "/" not in name for name in names)


def test_tables_of_options_are_merged_name_by_name() -> None:
    common = {"batch_size": 32, "epochs": 3, "training": {"clip_norm": 1.0}}
    arms = {"a": {"training": {"lr": 0.1}}, "b": {"training.clip_norm": None}}
    of = {
        name: point.options(0).training
        for name, point in points(arms=arms, **common, baseline="none").items()
    }
    assert (of["arm=a"].batch_size, of["arm=a"].epochs, of["arm=a"].lr) == (32, 3, 0.1)
    assert (of["arm=a"].clip_norm, of["arm=b"].clip_norm, of["arm=b"].batch_size) == (1.0, None, 32)
    own = points(over={"training": [{"lr": 0.1}]}, **common)
    assert {point.options(0).training.batch_size for point in own.values()} == {32}


def test_a_soft_weight_of_0_keeps_its_place_so_that_it_is_its_own_baseline() -> None:
    for over in ({"soft_weight": [0, 0.5], "lr": [0.1]}, {"lr": [0.1], "soft_weight": [0, 0.5]}):
        found = points(over=over)
        assert len(found) == 2
        assert all(point.on_grid for point in found.values())
    assert [p.on_grid for p in points(over={"temperature": [1]}).values()] == [True, False]
    assert baselines(over={"temperature": [1, 4], "soft_weight": [0, 0.5]}) == {
        "temperature=1,soft_weight=0.5": "soft_weight=0",
        "temperature=4,soft_weight=0.5": "soft_weight=0",
        "soft_weight=0": None,
    }
    more = baselines(over={"feature_weight": [0.1], "soft_weight": [0]})  # which features say something at
    assert more == {"feature_weight=0.1,soft_weight=0": "soft_weight=0", "soft_weight=0": None}


def test_values_that_differ_late_are_points_of_their_own() -> None:
    assert list(points(over={"lr": [0.1234567, 0.1234568]}, baseline="none")) == [
        "lr=0.1234567",
        "lr=0.1234568",
    ]


def test_texts_of_the_command_line_become_values() -> None:
    assert values_of("1,2.5,kl") == [1, 2.5, "kl"]
    assert values_of("[[a, b], [c]]") == [["a", "b"], ["c"]]
    options = resolve(StudyOptions, {**TEACHERS, "over": ["temperature=1,2", "teachers=[[lenet],[resnet8]]"]})
    assert options.over == {"temperature": [1, 2], "teachers": [["lenet"], ["resnet8"]]}
    again = resolve(StudyOptions, {**TEACHERS, "over": ["temperature=1,2", "temperature=4"]})
    assert again.over == {"temperature": [1, 2, 4]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "over: nothing is varied"),
        ({"over": ["temperature="]}, "over: temperature has no values"),
        ({"over": {"seed": [1, 2]}}, "over: a study varies the seed itself"),
        ({"over": {"temperature": [1]}, "seed": 3}, "seed: a study varies the seed itself"),
        ({"over": {"device": ["cpu", "cuda"]}}, "over: device cannot differ by point"),
        ({"arms": {"a": {"out": "x"}}}, "arms.a: out cannot differ by point"),
        ({"over": {"temprature": [1]}}, "unknown option 'temprature'"),
        ({"over": {"temperature": [-1]}}, "temperature: -1 cannot be used"),
        ({"over": {"temperature": [1]}, "teachers": []}, "no teachers are named"),
        ({"over": {"temperature": [1]}, "baseline": {"arm": "x"}}, "baseline: there is no arm 'x'"),
        ({"over": ["temperature=[1"]}, "[1 cannot be read"),
        ({"over": {"temperature": [1]}, "baseline": "label"}, "baseline: 'label' cannot be used"),
    ],
)
def test_what_cannot_be_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        points(**given)
    assert told in str(caught.value)


def test_each_problem_of_many_points_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        points(over={"temperature": [1, 2, 3], "weights": ["0.5,0.6"]})
    assert [problem.what for problem in caught.value.problems] == ["weights: 0.5, 0.6 sum to 1.1, not to 1"]


def test_networks_trained_first_are_named_by_points() -> None:
    before = [{"name": "weak", "model": "resnet8", "training.epochs": 1}]
    arms = {
        "weak": {"teachers": ["{before}/weak"]},
        "own": {"teachers": ["py:a.py:make@{before}/weak/x.safetensors"]},
    }
    options = resolve(StudyOptions, {"arms": arms, "before": before, "limit_train": 50})
    (network,) = training_before(options, BEFORE)
    assert (network.model, network.training.epochs, network.out) == ("resnet8", 1, BEFORE / "weak")
    assert network.limit_train == 50
    found = points_of(options, BEFORE)
    assert found["arm=weak"].options(0).teachers == ["before/weak"]
    assert found["arm=own"].options(0).teachers == ["py:a.py:make@before/weak/x.safetensors"]
    twice = resolve(
        StudyOptions, {"arms": arms, "before": [{"model": "lenet"}, {"model": "lenet", "seed": 1}]}
    )
    with pytest.raises(ConfigError, match="before: lenet is there twice"):
        training_before(twice, BEFORE)


def test_files_beside_a_study_are_found_from_anywhere() -> None:
    options = resolve(StudyOptions, {"arms": {"a": {"teachers": ["py:{here}/mine.py:net"]}}})
    found = points_of(located(options, Path("/some/where")), BEFORE)
    assert found["arm=a"].options(0).teachers == ["py:/some/where/mine.py:net"]
    assert located(options, Path()).model_fields_set == options.model_fields_set


def test_a_study_is_the_same_after_its_yaml(tmp_path: Path) -> None:
    options = resolve(StudyOptions, {**TEACHERS, "over": {"temperature": [1, 4]}, "seeds": 2, "epochs": 3})
    (tmp_path / "study.yaml").write_text(to_yaml(options))
    again = resolve(StudyOptions, {}, file=tmp_path / "study.yaml")
    assert points_of(again, BEFORE) == points_of(options, BEFORE)
    assert facts(again) == facts(options) == {"teachers": ["lenet", "resnet8"], "training.epochs": 3}
