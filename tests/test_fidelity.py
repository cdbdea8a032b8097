"""How near a student is to its teachers beside controls: against plain loops, scipy, and its own sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, entropy
from torch import Tensor

from ensemble_kd.analysis.fidelity import (
    Compared,
    agreement_row,
    by_class,
    columns_of,
    corrupted_verdict,
    fidelity,
    wilson,
)

ROLES = {
    "student": "student",
    "labels": "control",
    "independent": "control",
    "one": "teacher",
    "two": "teacher",
    "ensemble": "ensemble",
}


def outputs(n: int = 400, near: float = 0.3) -> tuple[dict[str, Tensor], np.ndarray]:
    """Logits by model; the student is the ensemble with a little noise, controls are on their own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (n,), generator=generator)

    def alone() -> Tensor:
        return 2 * torch.nn.functional.one_hot(labels, 5) + torch.randn(n, 5, generator=generator)

    logits = {name: alone() for name in ROLES}
    logits["ensemble"] = (logits["one"].softmax(1) / 2 + logits["two"].softmax(1) / 2).log()
    logits["student"] = logits["ensemble"] + near * torch.randn(n, 5, generator=generator)
    return logits, labels.numpy()


def test_who_is_compared_with_whom() -> None:
    run = Compared.of(ROLES)
    assert run.targets == ["ensemble", "one", "two"]
    assert run.networks == ["student", "labels", "independent"]
    assert (run.controls, run.reference, run.with_student) == (["labels", "independent"], "ensemble", True)
    models = Compared.of(dict.fromkeys("abc", "model"))
    assert (models.targets, models.networks, models.controls) == (["a"], ["b", "c"], ())
    assert (models.reference, models.with_student) == ("a", False)


def test_agreement_kl_and_gains_are_those_of_a_loop() -> None:
    logits, _ = outputs()
    found = fidelity(logits, Compared.of(ROLES))["targets"]
    z = {name: values.double().numpy() for name, values in logits.items()}
    p = {name: np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for name, v in z.items()}
    assert list(found) == ["ensemble", "one", "two"]
    for target, rows in found.items():
        assert list(rows) == ["student", "labels", "independent"]
        for name, row in rows.items():
            same = z[target].argmax(1) == z[name].argmax(1)
            assert row["agreement"]["value"] == pytest.approx(same.mean(), abs=1e-12)
            kl = entropy(p[target], p[name], axis=1).mean()
            assert row["kl"]["value"] == pytest.approx(kl, abs=1e-9)
            assert row["kl"]["low"] < kl < row["kl"]["high"]
        assert "agreement_gain" not in rows["student"]
        for name in ("labels", "independent"):
            own, best = rows[name], rows["student"]
            gain = best["agreement"]["value"] - own["agreement"]["value"]
            assert own["agreement_gain"]["value"] == pytest.approx(gain, abs=1e-12)
            gain = own["kl"]["value"] - best["kl"]["value"]
            assert own["kl_gain"]["value"] == pytest.approx(gain, abs=1e-12)


def test_gains_are_paired_by_image() -> None:
    logits, _ = outputs()
    found = fidelity(logits, Compared.of(ROLES), seed=3)["targets"]["ensemble"]["labels"]["agreement_gain"]
    answers = {name: values.argmax(1).numpy() for name, values in logits.items()}
    ours, theirs = (answers["ensemble"] == answers[name] for name in ("student", "labels"))
    generator = np.random.default_rng(5)
    taken = generator.integers(400, size=(2000, 400))
    low, high = np.percentile((ours[taken].astype(int) - theirs[taken]).mean(axis=1), [2.5, 97.5])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.01)
    logits["labels"] = logits["student"].clone()
    twin = fidelity(logits, Compared.of(ROLES))["targets"]["one"]["labels"]
    assert twin["agreement_gain"] == twin["kl_gain"] == {"value": 0, "low": 0, "high": 0}


def test_a_student_that_is_its_ensemble() -> None:
    logits, _ = outputs(near=0)
    logits["student"] = logits["student"] + 7  # a shift changes nothing
    found = fidelity(logits, Compared.of(ROLES))["targets"]["ensemble"]["student"]
    assert found["agreement"] == {"value": 1, "low": 1, "high": 1}
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-9)
    logits["student"] = logits["student"] * 3  # a scale changes KL, not agreement
    scaled = fidelity(logits, Compared.of(ROLES))["targets"]["ensemble"]["student"]
    assert scaled["agreement"] == found["agreement"]
    assert scaled["kl"]["value"] > 0.1


def test_the_verdict_claims_no_more_than_its_interval() -> None:
    logits, labels = outputs()
    compared = Compared.of(ROLES)
    found = fidelity(logits, compared)
    rows = found["targets"]["ensemble"]
    share, gain = rows["student"]["agreement"], rows["independent"]["agreement_gain"]
    expected = (
        f"The student gives its ensemble's answer on {100 * share['value']:.1f} % "
        f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}] of the images, more often than a student of "
        f"independent teachers ({100 * gain['value']:+.1f} points [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}])."
    )
    assert found["verdict"] == expected
    swapped = {**logits, "student": logits["independent"], "independent": logits["student"]}
    assert ", less often than a student of" in fidelity(swapped, compared)["verdict"]
    same = {**logits, "independent": logits["student"]}
    assert ", not clearly more often than a student of" in fidelity(same, compared)["verdict"]
    alone = {name: role for name, role in ROLES.items() if role != "control"}
    assert fidelity(logits, Compared.of(alone))["verdict"] == (
        f"The student gives its ensemble's answer on {100 * share['value']:.1f} % "
        f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}] of the images; how often by chance, a control of "
        "independent teachers would show (--controls independent)."
    )
    answers = {name: values.argmax(1).numpy() for name, values in logits.items()}
    row = agreement_row(columns_of(answers, labels, compared), compared)
    said = expected.replace("The student gives its ensemble's answer", "Under corruption it does so")
    assert corrupted_verdict(row, compared) == said
    assert corrupted_verdict(row, Compared.of({"a": "model", "b": "model"})) == ""


def test_rows_of_means_and_means_of_several_conditions() -> None:
    logits, labels = outputs()
    compared = Compared.of(ROLES)
    answers = {name: values.argmax(1).numpy() for name, values in logits.items()}
    row = agreement_row(columns_of(answers, labels, compared), compared)
    clean = fidelity(logits, compared)["targets"]
    for target, networks in row["agreement"].items():
        for name, measure in networks.items():
            assert measure == pytest.approx(clean[target][name]["agreement"])
    for target, gains in row["gain"].items():
        for name, measure in gains.items():
            assert measure == pytest.approx(clean[target][name]["agreement_gain"])
    for name, measure in row["accuracy"].items():
        assert measure["value"] == pytest.approx((answers[name] == labels).mean())


def test_classes_equal_plain_counts() -> None:
    logits, labels = outputs()
    labels[labels == 3] = 2  # a class without images
    answers = {name: values.argmax(1).numpy() for name, values in logits.items()}
    rows = by_class(answers, labels, list("vwxyz"), Compared.of(ROLES))
    assert [row["class"] for row in rows] == list("vwxyz")
    assert sum(row["n"] for row in rows) == 400
    for number, row in enumerate(rows):
        mask = labels == number
        assert row["n"] == mask.sum()
        if number == 3:
            assert row["accuracy"]["student"]["reason"] == "no image of this class"
            continue
        for name in ROLES:
            hits = int((answers[name][mask] == number).sum())
            assert row["accuracy"][name] == pytest.approx(wilson(hits, row["n"]))
        assert list(row["agreement"]) == ["student", "labels", "independent"]
        same = (answers["student"] == answers["ensemble"])[mask].mean()
        assert row["agreement"]["student"]["value"] == pytest.approx(same)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 36), (36, 36), (35, 36), (500, 1000)])
def test_wilsons_interval_is_scipys(hits: int, count: int) -> None:
    theirs = binomtest(hits, count).proportion_ci(method="wilson")
    expected = {"value": hits / count, "low": theirs.low, "high": theirs.high}
    assert wilson(hits, count) == pytest.approx(expected, abs=1e-9)
