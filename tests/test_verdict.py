"""Sentences of the report in all their branches, on made-up numbers; runs over seeds against scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from ensemble_kd.analysis.intervals import t_interval
from ensemble_kd.analysis.likeness import MEASURES
from ensemble_kd.analysis.seeds import groups
from ensemble_kd.analysis.verdict import (
    confidence,
    fidelity,
    findings,
    gain,
    inside,
    interval,
    judge,
    left_out,
    listed,
    missing,
    over_seeds,
    points,
    ratio,
)

LEFT_OUT = {"left_out": "teacher 'a' is gone: its file is missing"}
UNKNOWN = (
    "No student taught by independent teachers was trained (--controls independent), so it is not known how much "
    "of this any good teachers would have brought."
)


def measure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    ends = (value, value) if low is None else (low, high)
    return {"value": value, "low": ends[0], "high": ends[1]}


BETTER, WORSE, UNCLEAR = measure(0.02, 0.01, 0.03), measure(-0.02, -0.03, -0.01), measure(0.01, -0.01, 0.03)


def numbers(
    teachers: int = 2, controls: tuple[str, ...] = ("labels", "best-teacher", "independent"), **parts: Any
) -> dict[str, Any]:
    """All numbers of a made-up run, in which the student is better than every control in everything."""
    names = [f"t{k}" for k in range(teachers)]
    roles = {"student": "student", **dict.fromkeys(controls, "control"), **dict.fromkeys(names, "teacher")}
    roles["ensemble"] = "ensemble"
    networks = ("student", *controls)
    nearness = {
        name: {
            "agreement": measure(0.9, 0.85, 0.95),
            **({} if name == "student" else {"agreement_gain": BETTER}),
        }
        for name in networks
    }
    gained = {"mean": dict.fromkeys(("matches", "penultimate", "logits"), BETTER)}
    row = {"ece": measure(0.05, 0.04, 0.06), "floor": measure(0.02, 0.01, 0.03)}
    return {
        "metrics": {
            "models": {name: {"role": role, "parameters": 1200} for name, role in roles.items()},
            "differences": {name: {"accuracy": BETTER} for name in controls},
            "times_smaller": 12.4,
        },
        "agreement": {
            "reference": "ensemble",
            "pairs": [{"first": "student", "second": "ensemble", "accuracy_difference": WORSE}],
            "fidelity": {"targets": {"ensemble": nearness}},
            "corruption": {
                "overall": {
                    "agreement": {"ensemble": {"student": measure(0.8, 0.7, 0.9)}},
                    "gain": {"ensemble": dict.fromkeys(controls, UNCLEAR)},
                }
            },
        },
        "surface": {
            "settings": {"triplets": 20},
            "pairs": [{"first": "student", "second": "ensemble", "reproducibility": measure(0.7, 0.6, 0.8)}],
            "gains": [{"control": c, "target": "ensemble", "gain": WORSE} for c in controls],
        },
        "features": {
            "pairs": [
                {"first": "student", "second": name, "matches": measure(0.5, 0.4, 0.6)} for name in names
            ],
            "gains": dict.fromkeys(controls, gained),
        },
        "calibration": {
            "n": 1000,
            "models": {"student": {"before": row}},
            "differences": {c: {"before": {"ece": BETTER, "nll": WORSE}} for c in controls},
        },
        "manifest": {"networks": {name: {"sha256": name} for name in networks}},
        **parts,
    }


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (BETTER, "more"),
        (WORSE, "less"),
        (UNCLEAR, "no clear difference"),
        (measure(0.01, 0.0, 0.02), "no clear difference"),
        (measure(-0.01, -0.02, 0.0), "no clear difference"),
        (measure(0.0), "no difference at all"),
        (measure(None), "it cannot be told"),
        (measure(math.nan), "it cannot be told"),
        (measure(0.3, None, None) | {"low": None, "high": None}, "it cannot be told"),
    ],
)
def test_nothing_is_claimed_beyond_an_interval(found: dict[str, Any], expected: str) -> None:
    assert judge(found, "more", "less") == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (12.4, "12 times fewer than"),
        (2.66, "2.7 times fewer than"),
        (1, "about as many as"),
        (0.5, "2.0 times more than"),
        (0.05, "20 times more than"),
    ],
)
def test_sizes_in_words(times: float, expected: str) -> None:
    assert ratio(times) == expected


def test_intervals_in_words() -> None:
    assert points(BETTER) == "+2.00 points [+1.00, +3.00]"
    assert points(measure(-1e-9)) == "+0.00 points [+0.00, +0.00]"
    assert interval(measure(0.5, 0.25, 0.75), 100, 1, " %") == "50.0 % [25.0, 75.0]"
    assert interval({**measure(0.5), "low": None, "high": math.nan}, 1, 2) == "0.50 [?, ?]"
    assert interval({**measure(None), "reason": "0/0"}) == "(unknown: 0/0)"
    assert interval(measure(math.nan)) == "(unknown: it is not defined)"
    assert [listed(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_a_run_with_everything() -> None:
    found = findings(numbers())
    assert [(one["key"], one["question"]) for one in found] == [
        ("gain", "Did distilling help?"),
        ("fidelity", "Does the student answer like its teachers?"),
        ("inside", "Is it alike inside?"),
        ("confidence", "Can its confidence be trusted?"),
    ]
    assert [one["sentences"] for one in found] == [
        [
            "Distilling helped: +2.00 points of accuracy against labels alone (95 % interval over test images +1.00 … "
            "+3.00; one seed).",
            "Against a student taught by the best teacher alone: +2.00 points [+1.00, +3.00], more accurate.",
            "The student has 1,200 parameters, 12 times fewer than the teachers together; its accuracy beside the "
            "ensemble's: -2.00 points [-3.00, -1.00], less accurate.",
        ],
        [
            "It gives the ensemble's answer on 90.0 % [85.0, 95.0] of the clean test images; against a student taught by "
            "independent teachers: +2.00 points [+1.00, +3.00], more alike.",
            "It gives the ensemble's answer on 80.0 % [70.0, 90.0] of corrupted images; against a student taught by "
            "independent teachers: +1.00 points [-1.00, +3.00], no clear difference.",
            "It gives the ensemble's answer on 70.0 % [60.0, 80.0] of the points of 20 planes between images; against a "
            "student taught by independent teachers: -2.00 points [-3.00, -1.00], less alike.",
        ],
        [
            "CKA of its layers with their best matches (the best of many, so optimistic): 0.500 [0.400, 0.600] in t0 and "
            "0.500 [0.400, 0.600] in t1.",
            "CKA against a student taught by independent teachers, mean over the teachers: best matches +0.020 [+0.010, "
            "+0.030], more alike; last layer but one +0.020 [+0.010, +0.030], more alike; logits +0.020 [+0.010, +0.030], "
            "more alike.",
        ],
        [
            "Its calibration error (ECE) is 0.050 [0.040, 0.060], more than what a perfectly calibrated model of the same "
            "confidences gets by chance on 1,000 images, 0.020 [0.010, 0.030].",
            "Against a student trained on labels alone: ECE +0.0200 [+0.0100, +0.0300], worse; NLL -0.0200 [-0.0300, "
            "-0.0100], better.",
        ],
    ]


def test_without_controls_nothing_is_said_of_them() -> None:
    made = numbers(controls=())
    assert gain(made)[:2] == [
        "No control on labels alone was trained, so nothing can be said of what distilling gained.",
        "No student taught by the best teacher alone was trained (--controls best-teacher), so it is not known what "
        "several teachers gained over the best of them.",
    ]
    assert fidelity(made) == [
        "It gives the ensemble's answer on 90.0 % [85.0, 95.0] of the clean test images.",
        "It gives the ensemble's answer on 80.0 % [70.0, 90.0] of corrupted images.",
        "It gives the ensemble's answer on 70.0 % [60.0, 80.0] of the points of 20 planes between images.",
        UNKNOWN,
    ]
    assert inside(made)[1:] == [UNKNOWN]
    assert len(confidence(made)) == 1


def test_the_next_best_control_stands_in_for_independent_teachers() -> None:
    made = numbers(controls=("labels",))
    assert all("trained on labels alone" in line for line in (*fidelity(made)[:3], inside(made)[1]))
    assert fidelity(made)[3:] == inside(made)[2:] == [UNKNOWN]
    best = numbers(controls=("best-teacher",))
    assert all(
        "by the best teacher alone" in line
        for line in (*fidelity(best)[:3], inside(best)[1], confidence(best)[1])
    )


def test_a_control_that_is_the_student_says_why() -> None:
    hashes = {"student": "a", "labels": "b", "best-teacher": "a", "independent": "c"}
    manifest = {"networks": {name: {"sha256": value} for name, value in hashes.items()}}
    said = "The student taught by the best teacher alone is this student bit for bit, as {}, so nothing can differ between them."
    assert said.format("all weight is with the best teacher") in gain(numbers(manifest=manifest))
    assert said.format("there is one teacher") in gain(numbers(teachers=1, manifest=manifest))
    assert not any("bit for bit" in line for line in gain(numbers()))


def test_teachers_without_weight_are_named() -> None:
    made = numbers(teachers=3)
    made["features"]["idle"] = ["t1"]
    assert (
        "CKA against a student taught by independent teachers, mean over the teachers but t1, without weight in the "
        "ensemble: best matches +0.020 [+0.010, +0.030], more alike;"
    ) in inside(made)[1]


def test_one_teacher() -> None:
    made = gain(numbers(teachers=1))
    assert made[1] == "There was one teacher, so nothing can be said of what several would gain."
    assert "12 times fewer than its teacher;" in made[2]
    assert inside(numbers(teachers=1))[1].startswith(
        "CKA against a student taught by independent teachers: best"
    )


def test_what_is_left_out_is_said() -> None:
    why = "(teacher 'a' is gone: its file is missing)."
    made = numbers(agreement=LEFT_OUT, surface=LEFT_OUT, features=LEFT_OUT, calibration=LEFT_OUT)
    assert gain(made)[-1] == "The student has 1,200 parameters, 12 times fewer than the teachers together."
    assert fidelity(made) == [
        f"Not measured: agreement {why}",
        f"Not measured: agreement on planes between images {why}",
    ]
    assert inside(made) == [f"Not measured: likeness of layers {why}"]
    assert confidence(made) == [f"Not measured: calibration {why}"]
    clean = numbers()
    clean["agreement"]["corruption"] = LEFT_OUT
    assert fidelity(clean)[1] == left_out("agreement under corruption", LEFT_OUT)


def test_few_planes_are_not_judged() -> None:
    made = numbers()
    made["surface"]["settings"]["triplets"] = 5
    assert fidelity(made)[2].endswith("of the points of 5 planes between images; against a student taught by independent "
                                      "teachers: -2.00 points [-3.00, -1.00], too few to judge.")  # fmt: skip


def test_an_ece_within_chance_is_no_claim() -> None:
    made = numbers()
    made["calibration"]["models"]["student"]["before"]["floor"] = measure(0.04, 0.03, 0.05)
    assert ", no more than what a perfectly calibrated model" in confidence(made)[0]


@pytest.mark.parametrize(
    ("accuracy", "judged"),
    [(BETTER, "distilling helped"), (WORSE, "distilling hurt"), (UNCLEAR, "no clear difference")],
)
def test_seeds_in_words(accuracy: dict[str, Any], judged: str) -> None:
    nothing = {key: {"left_out": "it is missing"} for key in MEASURES}
    group = {"seeds": [0, 1, 2], "differences": {"labels": {"accuracy": accuracy}}, "likeness": nothing}
    assert over_seeds(group) == [
        f"Over 3 seeds: {judged}, {points(accuracy)} of accuracy against labels alone (95 % t interval over seeds)."
    ]


def test_seeds_without_the_control() -> None:
    likeness = {"models": {"student": measure(0.5)}, "differences": {}}
    group = {"seeds": [0, 1], "differences": {}, "likeness": dict.fromkeys(MEASURES, likeness)}
    assert over_seeds(group) == [
        f"Over 2 seeds: {missing('labels')}",
        "Over 2 seeds: It gives the ensemble's answer on 50.0 % [50.0, 50.0] of corrupted images.",
        "Over 2 seeds: It gives the ensemble's answer on 50.0 % [50.0, 50.0] of the points of planes between images.",
    ]


def test_likeness_over_seeds_in_words() -> None:
    likeness = {
        "models": {"student": measure(0.5), "labels": measure(0.4)},
        "differences": {"labels": BETTER, "independent": UNCLEAR},
    }
    alike = {**dict.fromkeys(MEASURES, likeness), "logits": {"left_out": "it is missing"}}
    said = over_seeds({"seeds": [0, 1], "differences": {}, "likeness": alike})
    assert said[1] == (
        "Over 2 seeds: It gives the ensemble's answer on 50.0 % [50.0, 50.0] of corrupted images; against a student "
        "taught by independent teachers: +1.00 points [-1.00, +3.00], no clear difference."
    )
    assert said[3] == (
        "Over 2 seeds: CKA against a student taught by independent teachers, mean over the teachers: best matches "
        "+0.010 [-0.010, +0.030], no clear difference; last layer but one +0.010 [-0.010, +0.030], no clear difference."
    )


def analyses(student: float, labels: float) -> dict[str, Any]:
    """What likeness over seeds is told from: the student's numbers and those of a control."""
    networks = {"student": student, "labels": labels}
    pairs = [
        {
            "first": name,
            "second": teacher,
            "reproducibility": measure(value),
            **{key: measure(value + shift) for key in ("matches", "penultimate", "logits", "mutual_knn")},
        }
        for name, value in networks.items()
        for teacher, shift in (("a", 0.0), ("idle", 0.5), ("ensemble", 0.0))
    ]
    answers = {"ensemble": {name: measure(value) for name, value in networks.items()}}
    settings = {"settings": {"images": 9}}
    return {
        "agreement": {"reference": "ensemble", "corruption": {"overall": {"agreement": answers}}, **settings},
        "surface": {"pairs": pairs, **settings},
        "features": {"pairs": pairs, "idle": ["idle"], **settings},
    }


def run(name: str, seed: int, student: float, labels: float, **config: Any) -> dict[str, Any]:
    rows = {"student": ("student", student), "labels": ("control", labels)}
    rows |= {"a": ("teacher", 1.0), "idle": ("teacher", 1.0)}
    models = {
        key: {"role": role, "parameters": 3, "accuracy": measure(value)}
        for key, (role, value) in rows.items()
    }
    return {
        "name": name,
        "config": {"seed": seed, "lr": 1, "out": name, **config},
        "metrics": {"models": models},
        **analyses(student, labels),
    }


def test_runs_that_differ_in_their_seed_are_one_group() -> None:
    students, labels = [0.9, 0.92, 0.97], [0.89, 0.93, 0.9]
    runs = [run(f"r{seed}", seed, *pair) for seed, pair in enumerate(zip(students, labels, strict=True))]
    others = [run("other", 3, 0.1, 0.1, lr=2), run("again", 0, 0.5, 0.5)]
    (group,) = groups([*runs, *others])
    assert (group["runs"], group["seeds"]) == (["r0", "r1", "r2"], [0, 1, 2])
    assert list(group["models"]) == ["student", "labels"]
    one = stats.ttest_1samp(students, 0).confidence_interval()
    assert group["models"]["student"]["accuracy"] == pytest.approx(
        measure(sum(students) / 3, one.low, one.high)
    )
    paired = stats.ttest_rel(students, labels).confidence_interval()
    found = group["differences"]["labels"]["accuracy"]
    assert (found["low"], found["high"]) == pytest.approx((paired.low, paired.high))
    assert found["value"] == pytest.approx(sum(students) / 3 - sum(labels) / 3)


def test_likeness_over_seeds_is_paired_and_counts_teachers_with_weight() -> None:
    students, labels = [0.5, 0.52, 0.57], [0.49, 0.43, 0.5]
    runs = [run(f"r{seed}", seed, *pair) for seed, pair in enumerate(zip(students, labels, strict=True))]
    (group,) = groups(runs)
    paired = stats.ttest_rel(students, labels).confidence_interval()
    one = stats.ttest_1samp(labels, 0).confidence_interval()
    for key in MEASURES:
        found = group["likeness"][key]
        gain, own = found["differences"]["labels"], found["models"]["labels"]
        assert (gain["low"], gain["high"]) == pytest.approx((paired.low, paired.high))
        assert (own["low"], own["high"]) == pytest.approx((one.low, one.high))


@pytest.mark.parametrize(
    ("part", "change", "key", "reason"),
    [
        ("surface", {"left_out": "a teacher is gone"}, "planes", "r1: a teacher is gone"),
        ("features", {"settings": {"images": 8}}, "matches", "the runs were analysed with other settings"),
        ("surface", None, "planes", "it is not defined for labels in every run"),
        ("agreement", {"corruption": {"left_out": "not asked"}}, "corruption", "r1: not asked"),
    ],
)
def test_likeness_over_seeds_says_why_it_is_missing(
    part: str, change: dict[str, Any] | None, key: str, reason: str
) -> None:
    runs = [run(f"r{seed}", seed, 0.5, 0.4) for seed in range(2)]
    if change is None:
        next(
            pair
            for pair in runs[1][part]["pairs"]
            if pair["first"] == "labels" and pair["second"] == "ensemble"
        )["reproducibility"]["value"] = None
    else:
        runs[1][part] |= change
    (group,) = groups(runs)
    assert group["likeness"][key] == {"left_out": reason}
    assert "models" in group["likeness"]["planes" if key != "planes" else "matches"]


def test_no_group_of_one_seed_or_of_unlike_runs() -> None:
    assert groups([run("a", 0, 1, 1), run("b", 0, 1, 1)]) == []
    assert groups([run("a", 0, 1, 1), run("b", 1, 1, 1, lr=2)]) == []
    assert groups([run("a", 0, 1, 1)]) == []
    assert [
        len(group["runs"]) for group in groups([run("a", 0, 1, 1), run("b", 1, 1, 1, device="cuda")])
    ] == [2]


def test_an_interval_of_equal_values_is_a_point() -> None:
    assert t_interval([0.5, 0.5]) == measure(0.5)
