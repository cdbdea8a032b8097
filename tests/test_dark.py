"""What models say of the wrong classes: against scipy and plain loops, and in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import spearmanr
from torch import Tensor

from ensemble_kd.analysis.dark import (
    dark_knowledge,
    in_words,
    looked_at,
    mean_softmax,
    nearest,
    rank_correlations,
)
from ensemble_kd.analysis.fidelity import Compared
from ensemble_kd.analysis.resampling import measured

ROLES = {"student": "student", "labels": "control", "one": "teacher", "ensemble": "ensemble"}


def answers(classes: int = 6, n: int = 240, seed: int = 0) -> tuple[dict[str, Tensor], np.ndarray]:
    """Logits by model; student and ensemble share what they say of wrong classes, the control does not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    kin = torch.randn(classes, classes, generator=generator)
    own = torch.randn(classes, classes, generator=generator)
    right = 3 * torch.nn.functional.one_hot(labels, classes)
    noise = {name: torch.randn(n, classes, generator=generator) for name in ROLES}
    logits = {name: right + (own if name == "labels" else kin)[labels] + noise[name] for name in ROLES}
    return logits, labels.numpy()


def test_the_mean_softmax_is_that_of_a_loop() -> None:
    logits, labels = answers(n=5000)
    found = mean_softmax(logits["ensemble"], labels)
    p = softmax(logits["ensemble"].double().numpy(), axis=1)
    for c in range(6):
        np.testing.assert_allclose(found[c], p[labels == c].mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_a_class_without_images_has_no_mean() -> None:
    logits, labels = answers()
    found = mean_softmax(logits["student"][labels != 2], labels[labels != 2])
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_of_many_classes_those_of_the_most_confused_pairs_are_looked_at() -> None:
    means = np.full((40, 40), 0.001)
    pairs = [(1, 30), (5, 6), (2, 39), (7, 1), (11, 12), (20, 21), (22, 23)]
    for place, (a, b) in enumerate(pairs):
        means[a, b] = 0.5 - 0.01 * place
    np.fill_diagonal(means, 0.9)
    assert looked_at(means) == [1, 2, 5, 6, 7, 11, 12, 20, 21, 22, 30, 39]
    means[0] = np.nan
    assert 0 not in looked_at(means)
    assert looked_at(means[:30, :30]) == list(range(30))


def test_rank_correlations_are_scipys() -> None:
    logits, labels = answers()
    draws = rank_correlations(logits, "ensemble", labels, range(6))
    assert set(draws) == {"student", "labels", "one"}
    p = {name: softmax(values.double().numpy(), axis=1) for name, values in logits.items()}
    for name, values in draws.items():
        expected = []
        for c in range(6):
            first, second = (np.delete(p[m][labels == c].mean(axis=0), c) for m in (name, "ensemble"))
            expected.append(spearmanr(first, second).statistic)
        assert values[0] == pytest.approx(np.mean(expected), abs=1e-12)
    assert draws["student"][0] > 0.8 > 0.4 > draws["labels"][0]


def test_resamples_are_drawn_within_classes_and_alike_for_all_models() -> None:
    logits, labels = answers()
    logits["twin"] = logits["student"] + 5  # a shift of logits changes nothing
    draws = rank_correlations(logits, "ensemble", labels, range(6), seed=1)
    np.testing.assert_allclose(draws["twin"], draws["student"], atol=1e-9)
    found = measured(draws["student"])
    assert 0 < found["high"] - found["low"] < 0.4
    again = rank_correlations({k: logits[k] for k in ("ensemble", "one")}, "ensemble", labels, range(6), 1)
    np.testing.assert_array_equal(again["one"], draws["one"])
    other = rank_correlations(logits, "ensemble", labels, range(6), seed=2)
    assert other["one"][0] == draws["one"][0]
    assert not np.array_equal(other["one"], draws["one"])


def test_a_model_orders_classes_as_itself() -> None:
    logits, labels = answers()
    draws = rank_correlations(
        {"a": logits["one"], "b": logits["one"].clone()}, "a", labels[labels >= 0], range(6)
    )
    np.testing.assert_allclose(draws["b"], 1, atol=1e-12)


def test_two_classes_have_no_order() -> None:
    logits, labels = answers(classes=2)
    found = dark_knowledge(logits, labels, ["a", "b"], Compared.of(ROLES))
    assert np.isnan(found["correlation"]["student"]["value"])
    assert found["correlation"]["student"]["reason"].startswith("there is no order of wrong classes")
    assert found["words"] == []
    assert found["same_nearest"] == {"student": 0, "labels": 0}


def test_the_nearest_and_the_farthest_wrong_class() -> None:
    means = np.array([[0.9, 0.07, 0.02, 0.01], [0.3, 0.1, 0.4, 0.2], [0, 0, 1, 0], [0.2, 0.1, 0.3, 0.4]])
    assert [nearest(means, c) for c in range(4)] == [(1, 3), (2, 3), (0, 0), (2, 1)]


def test_in_words() -> None:
    names = ["panther", "cat", "truck"]
    teacher = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.05, 0.85]])
    student = np.array([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.1, 0.02, 0.88]])
    means = {"ensemble": teacher, "student": student}
    rows = in_words(means, names, range(3), "ensemble", "student")
    assert [row["sentence"] for row in rows] == [  # the class that the ensemble is least sure of first
        "To the ensemble, cat is more like panther than truck; to the student more like truck than panther.",
        "To the ensemble, panther is more like cat than truck; to the student too.",
        "To the ensemble, truck is more like panther than cat; to the student too.",
    ]
    assert rows[0]["most"] == {"ensemble": "panther", "student": "truck"}
    assert rows[0]["least"] == {"ensemble": "truck", "student": "panther"}
    named = in_words({"a": teacher, "b": teacher}, ["x" * 200, "猫", "[/b]"], [0], "a", "b")
    assert named[0]["sentence"] == f"To a, {'x' * 14}…{'x' * 14} is more like 猫 than [/b]; to b too."
    teacher[1] = np.nan
    assert [row["class"] for row in in_words(means, names, range(3), "ensemble", "student")] == [
        "panther", "truck",
    ]  # fmt: skip


def test_dark_knowledge_of_all_models() -> None:
    logits, labels = answers()
    names = [f"class {c}" for c in range(6)]
    found = dark_knowledge(logits, labels, names, Compared.of(ROLES))
    assert found["classes"] == names
    assert (found["of"], found["n"]) == (6, [40] * 6)
    assert list(found["mean"]) == list(ROLES)
    np.testing.assert_allclose(found["mean"]["one"], mean_softmax(logits["one"], labels))
    expected = mean_softmax(logits["student"], labels) - mean_softmax(logits["ensemble"], labels)
    np.testing.assert_allclose(found["difference"], expected)
    gain = found["correlation_gain"]["labels"]
    own, other = (found["correlation"][name]["value"] for name in ("student", "labels"))
    assert gain["value"] == pytest.approx(own - other)
    assert 0 < gain["low"] < gain["value"]
    same = [row["most"]["student"] == row["most"]["ensemble"] for row in found["words"]]
    assert found["same_nearest"]["student"] == sum(same) >= 4


def test_of_many_classes_a_part_is_shown_and_all_are_asked() -> None:
    logits, labels = answers(classes=40, n=400)
    found = dark_knowledge(logits, labels, [str(c) for c in range(40)], Compared.of(ROLES))
    assert len(found["classes"]) == len(found["words"]) == 12
    assert np.shape(found["difference"]) == (12, 12)
    assert found["of"] == 40
    everywhere = mean_softmax(logits["ensemble"], labels)
    for row in found["words"]:
        assert row["most"]["ensemble"] == str(nearest(everywhere, int(row["class"]))[0])
