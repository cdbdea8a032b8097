"""Stored targets against float64 and live teachers, what is run again and what is not, and what is never kept."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax, xlogy
from support import logged, refused
from torch import Tensor, nn

from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.data.views import MIXES, POLICIES
from ensemble_kd.errors import ModelError
from ensemble_kd.objective import Target, TargetSource, Viewing
from ensemble_kd.teachers import targets as looking_up
from ensemble_kd.teachers.building import Keeping
from ensemble_kd.teachers.class_map import ClassMap
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.teachers.runner import Answers, Runner, Running
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets
from ensemble_kd.weighting import agree_weights, confidence_weights, drop_weights, entropy_weights

CPU = torch.device("cpu")
TEMPERATURES = (4.0, 2.0)
ROUNDING = 2e-3
"""Of probabilities, by half precision."""
VIEWING = Viewing("crop", 2, 0)
DIGITS = tuple("0123456789")


def net(seed: int, width: int = 8, outputs: int = 10) -> nn.Module:
    """Untrained, with statistics and logits as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 36, outputs),
        )
        made[1].running_mean.uniform_(-0.5, 0.5)
        made[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        made[4].weight.mul_(8)
    return made


def teacher(
    seed: int,
    label: str | None = None,
    *,
    outputs: int = 10,
    groups: tuple[tuple[int, ...], ...] | None = None,
    storable: bool = True,
    made: nn.Module | None = None,
    **running: Any,
) -> Teacher:
    classes = DIGITS if outputs == 10 else tuple(f"own {number}" for number in range(outputs))
    card = Card("lenet", "small", Preprocess(1, (8, 8), (0.3,), (0.4,)), classes)
    model = Classifier(made or net(seed, 8 + 4 * (seed % 2), outputs), card)
    one = Teacher.of(label or f"t{seed}", model, "here", storable, ClassMap(groups) if groups else None)
    return replace(one, running=Running(**running))


def ensemble(*teachers: Teacher, **options: Any) -> Ensemble:
    listed = teachers or (teacher(1), teacher(2))
    weights = torch.tensor((0.3, 0.7)[: len(listed)]) if len(listed) == 2 else torch.ones(1)
    return Ensemble(listed, weights, torch.tensor(TEMPERATURES[: len(listed)]), **options)


def stored(together: Ensemble, data: Dataset, viewing: Viewing = VIEWING, **keeping: Any) -> StoredTargets:
    return StoredTargets(together, data.train, viewing, Keeping("digits", **keeping))


INDEX = torch.tensor([3, 199, 0, 7, *range(100, 140)])
STUDENT = 2 * torch.randn(len(INDEX), 10, generator=torch.Generator().manual_seed(1))


def said(source: TargetSource, data: Dataset, viewing: Viewing = VIEWING, view_id: int = 0) -> Target:
    batch = viewing.take(data.train, INDEX, view_id)
    return source(batch, INDEX, view_id, STUDENT)


def apart(one: Tensor, other: Tensor | np.ndarray) -> float:
    """The largest difference of probabilities."""
    other = other.double().exp().numpy() if isinstance(other, Tensor) else other
    return float(np.abs(one.double().exp().numpy() - other).max())


def alike(one: Target, other: Target, error: float = ROUNDING) -> bool:
    close = apart(one.soft, other.soft) <= error and apart(one.plain, other.plain) <= error
    return close and bool(((one.weights - other.weights).abs() <= error).all())


@contextmanager
def watched(before: Callable[[str], None] = lambda label: None) -> Iterator[Counter[str]]:
    """How many images run through each teacher; `before` is called before each batch."""
    seen: Counter[str] = Counter()
    run = Runner.__call__

    def counted(self: Runner, pixels: Tensor, features: bool = False) -> Answers:
        before(self._label)
        seen[self._label] += len(pixels)
        return run(self, pixels, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "__call__", counted)
        yield seen


@pytest.fixture(autouse=True)
def _own_folders(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


# By hand, in float64


def logits_of(one: Teacher, pixels: Tensor) -> np.ndarray:
    """What the network itself says, in the classes of the data; −∞ at those it does not know."""
    with torch.no_grad():
        inputs = one.classifier.card.preprocess(pixels).double()
        z = copy.deepcopy(one.classifier.net).double()(inputs).numpy()
    if one.class_map is None:
        return z
    groups = one.class_map.groups
    columns = [logsumexp(z[:, list(g)], axis=1) if g else np.full(len(z), -np.inf) for g in groups]
    return np.stack(columns, axis=1)


def kept_of(p: np.ndarray, k: int | None) -> np.ndarray:
    """The k largest, and what is missing evenly on the other classes that are not known to be nothing."""
    if k is None:
        return p
    order = np.argsort(-p, axis=1)
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order[:, :k], np.take_along_axis(p, order[:, :k], axis=1), axis=1)
    rest = (kept == 0) & (p > 0)
    missing = 1 - kept.sum(axis=1, keepdims=True)
    return kept + np.where(rest, missing / np.maximum(rest.sum(axis=1, keepdims=True), 1), 0)


def by_hand(
    together: Ensemble, data: Dataset, viewing: Viewing = VIEWING, view_id: int = 0, k: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The soft and the plain target of teachers that all know all classes."""
    pixels = viewing.take(data.train, INDEX, view_id).decoded
    scales = [1.0] * len(together.teachers) if together.scales is None else together.scales.tolist()
    z = [logits_of(one, pixels) / scale for one, scale in zip(together.teachers, scales, strict=True)]
    plain = [kept_of(softmax(own, axis=1), k) for own in z]
    soft = [kept_of(softmax(own / t, axis=1), k) for own, t in zip(z, TEMPERATURES, strict=False)]
    weights = np.tile(together.weights.double().numpy()[:, None], len(INDEX))
    if together.weigh is entropy_weights:
        entropies = np.stack([-xlogy(p, p).sum(axis=1) for p in plain])
        weights = (1 - entropies / entropies.sum(axis=0)) / (len(z) - 1)
    return tuple((np.stack(p) * weights[:, :, None]).sum(axis=0) for p in (soft, plain))  # type: ignore[return-value]


@pytest.mark.parametrize(("policy", "mix"), list(itertools.product(POLICIES, MIXES)))
def test_stored_targets_are_those_of_the_teachers(few_digits: Dataset, policy: str, mix: str) -> None:
    viewing = Viewing(policy, 2, 4, mix)
    # Made in small batches, and used beside large ones.
    small, large = (ensemble(*(teacher(seed, batch=size) for seed in (1, 2))) for size in (64, 512))
    kept = stored(small, few_digits, viewing)
    for view_id in (1, 0):
        target, live = (said(source, few_digits, viewing, view_id) for source in (kept, LiveTargets(large)))
        soft, plain = by_hand(small, few_digits, viewing, view_id)
        assert apart(live.soft, soft) < 1e-5
        assert apart(live.plain, plain) < 1e-5
        assert apart(target.soft, soft) <= ROUNDING
        assert apart(target.plain, plain) <= ROUNDING
        assert alike(target, live)


def test_stored_targets_in_bfloat16_are_the_live_ones(few_digits: Dataset) -> None:
    small, large, exact = (
        ensemble(*(teacher(seed, batch=size, precision=precision) for seed in (1, 2)))
        for size, precision in ((64, "bfloat16"), (512, "bfloat16"), (512, "float32"))
    )
    kept = said(stored(small, few_digits), few_digits)
    assert alike(kept, said(LiveTargets(large), few_digits))
    moved = apart(kept.soft, said(LiveTargets(exact), few_digits).soft)
    assert 1e-4 < moved < 2e-2


def test_a_target_is_that_of_its_view_and_stays_so(few_digits: Dataset) -> None:
    kept = stored(ensemble(), few_digits)
    first = said(kept, few_digits)
    copied = [values.clone() for values in (first.soft, first.plain, first.weights)]
    second = said(kept, few_digits, view_id=1)
    assert apart(first.soft, second.soft) > 0.05
    assert all(map(torch.equal, copied, (first.soft, first.plain, first.weights)))
    again = said(kept, few_digits)
    assert torch.equal(again.soft, first.soft)


# The largest k


SCALES = [None, (1.7, 0.6)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("weigh", [None, entropy_weights])
@pytest.mark.parametrize("k", [1, 3, 9, 10, 50])
def test_the_largest_k_are_exact_and_the_rest_is_even(
    few_digits: Dataset, k: int, weigh: Any, scales: tuple[float, ...] | None
) -> None:
    options = {"weigh": weigh, "scales": None if scales is None else torch.tensor(scales)}
    together = ensemble(**options)
    kept = stored(together, few_digits, top_k=k)
    target = said(kept, few_digits)
    soft, plain = by_hand(together, few_digits, k=min(k, 10))
    assert apart(target.soft, soft) <= ROUNDING
    assert apart(target.plain, plain) <= ROUNDING
    assert {store.layout.top_k for store in kept.stores} == {min(k, 10)}
    if k < 9:
        whole = by_hand(together, few_digits)[0]
        assert apart(target.soft, whole) > 0.01


@pytest.mark.parametrize("scales", SCALES)
def test_one_teacher_with_the_largest_three(few_digits: Dataset, scales: tuple[float, ...] | None) -> None:
    together = ensemble(teacher(1), scales=None if scales is None else torch.tensor(scales[:1]))
    target = said(stored(together, few_digits, top_k=3), few_digits)
    scale = scales[0] if scales else 1.0
    z = logits_of(together.teachers[0], VIEWING.take(few_digits.train, INDEX, 0).decoded)
    for found, temperature in ((target.soft, 4 * scale), (target.plain, scale)):
        p, q = softmax(z / temperature, axis=1), found.double().exp().numpy()
        largest = np.argsort(-p, axis=1)
        top, rest = (np.take_along_axis(q, part, axis=1) for part in (largest[:, :3], largest[:, 3:]))
        np.testing.assert_allclose(top, np.take_along_axis(p, largest[:, :3], axis=1), rtol=2e-3)
        np.testing.assert_allclose(rest, np.broadcast_to(rest[:, :1], rest.shape), rtol=1e-5)
        np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-6)


def test_the_largest_k_of_other_temperatures_are_another_store(few_digits: Dataset) -> None:
    with watched() as seen:
        for temperatures in ((4.0, 2.0), (4.0, 3.0), (4.0, 2.0)):
            together = replace(ensemble(), temperatures=torch.tensor(temperatures))
            stored(together, few_digits, top_k=3).build(1)
    assert seen == {"t1": 200, "t2": 400}


# What is run, and what is not


def test_what_is_stored_is_not_run_again(few_digits: Dataset, own_cache: Path) -> None:
    with watched() as seen, logged() as lines:
        made = said(stored(ensemble(), few_digits), few_digits)
    assert seen == {"t1": 200, "t2": 200}  # the view that was asked for
    assert lines == ["INFO: storing targets of t1, t2: 200 views of images, 8.0 kB"]
    with watched() as seen, logged() as lines:
        stored(ensemble(), few_digits).build()
        assert seen == {"t1": 200, "t2": 200}  # the other one
        again = stored(ensemble(), few_digits)
        again.build()
        found = said(again, few_digits)
    assert seen == {"t1": 200, "t2": 200}
    assert len(lines) == 1
    assert torch.equal(found.soft, made.soft)
    assert [store.views for store in again.stores] == [2, 2]
    assert len(list((own_cache / "targets").iterdir())) == 2


def test_views_grow(few_digits: Dataset) -> None:
    stored(ensemble(), few_digits).build()
    more = Viewing("crop", 5, 0)
    with watched() as seen:
        grown = stored(ensemble(), few_digits, more)
        grown.build()
    assert seen == {"t1": 600, "t2": 600}
    for view_id in range(5):
        soft, _ = by_hand(grown.ensemble, few_digits, more, view_id)
        assert apart(said(grown, few_digits, more, view_id).soft, soft) <= ROUNDING


def test_a_teacher_that_joins_is_run_alone(few_digits: Dataset) -> None:
    stored(ensemble(teacher(1)), few_digits).build()
    with watched() as seen:
        both = stored(ensemble(), few_digits)
        both.build()
    assert seen == {"t2": 400}
    assert apart(said(both, few_digits).soft, by_hand(both.ensemble, few_digits)[0]) <= ROUNDING


def test_two_teachers_of_the_same_weights(few_digits: Dataset) -> None:
    twins = ensemble(teacher(1, "a"), teacher(1, "b"))
    target = said(stored(twins, few_digits), few_digits)
    assert apart(target.soft, by_hand(twins, few_digits)[0]) <= ROUNDING


def test_what_another_run_made_meanwhile_is_not_made_again(few_digits: Dataset) -> None:
    waiting, other = stored(ensemble(), few_digits), stored(ensemble(), few_digits)
    waiting.build(0)  # opens its stores, and finds them empty
    assert len(waiting.stores) == 2
    other.build()
    with watched() as seen, logged() as lines:
        waiting.build()
        target = said(waiting, few_digits)
    assert not seen
    assert not lines
    assert torch.equal(target.soft, said(other, few_digits).soft)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("features", [False, True])
def test_an_interrupted_build_goes_on_where_it_was(
    few_digits: Dataset, own_cache: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | None,
    features: bool,
) -> None:  # fmt: skip
    """Teachers of 10 and of 14 outputs: their shards end at different rows."""
    widest = 10 + (432 if features else 0)
    monkeypatch.setattr("ensemble_kd.teachers.layout.SHARD_BYTES", 50 * 4 * widest)
    groups = tuple((digit, *((digit + 10,) if digit < 4 else ())) for digit in range(10))
    together = ensemble(teacher(1), teacher(2, outputs=14, groups=groups), features=features)
    batches: list[str] = []
    stop_at = 0

    def stop(label: str) -> None:
        batches.append(label)
        if len(batches) == stop_at:
            raise KeyboardInterrupt

    with watched(stop) as whole:
        made = stored(together, few_digits, top_k=top_k)
        made.build()
    assert whole == {"t1": 400, "t2": 400}
    wanted = [said(made, few_digits, view_id=view_id) for view_id in (0, 1)]
    # In the middle of view 1, within a shard of one of them.
    count = len(batches)
    monkeypatch.setenv("EKD_CACHE", str(own_cache / "other"))
    batches.clear()
    stop_at = count * 3 // 4
    with watched(stop) as first, pytest.raises(KeyboardInterrupt):
        stored(together, few_digits, top_k=top_k).build()
    stop_at = 0
    held = stored(together, few_digits, top_k=top_k)
    held.build(1)  # which is there
    missing = [sum(map(len, store.missing(1))) for store in held.stores]
    assert all(0 < left < 200 for left in missing)
    with watched(stop) as second, logged() as lines:
        found = stored(together, few_digits, top_k=top_k)
        found.build()
    assert [second["t1"], second["t2"]] == missing
    assert (
        sum(first.values()) + sum(second.values()) <= 800 + 2 * 50
    )  # no more than the shards that were begun
    assert len(lines) == 1
    for view_id, target in enumerate(wanted):
        again = said(found, few_digits, view_id=view_id)
        assert torch.equal(again.soft, target.soft)
        assert torch.equal(again.plain, target.plain)
        assert all(map(torch.equal, again.features, target.features))


OTHERS: dict[str, tuple[Viewing, str, str]] = {
    "seed": (replace(VIEWING, seed=1), "float32", "view seed 0 → 1"),
    "policy": (replace(VIEWING, policy="rrc"), "float32", "view policy crop → rrc"),
    "mix": (replace(VIEWING, mix="cutmix"), "float32", "mixing none → cutmix"),
    "precision": (VIEWING, "bfloat16", "precision float32 → bfloat16"),
    "images as they are": (
        Viewing("none", 1, 0), "float32", "view policy crop → none, view seed 0 → none, version of views 1 → none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_stored_views_of_another_kind_are_not_taken(few_digits: Dataset, name: str) -> None:
    other, precision, told = OTHERS[name]
    stored(ensemble(teacher(1, precision="float32")), few_digits).build(1)
    with watched() as seen, logged() as lines:
        one = stored(ensemble(teacher(1, precision=precision)), few_digits, other)
        one.build(1)
    assert seen == {"t1": 200}
    assert lines == [
        f"INFO: stored targets of t1 for digits are made anew: {told}",
        "INFO: storing targets of t1: 200 views of images, 4.0 kB",
    ]
    assert alike(said(one, few_digits, other), said(LiveTargets(one.ensemble), few_digits, other))
    with watched() as seen, logged() as lines:  # and the first one is still there
        stored(ensemble(teacher(1, precision="float32")), few_digits).build(1)
    assert not seen
    assert not lines


def test_weights_images_and_the_version_of_views_tell_stores_apart(
    few_digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(ensemble(teacher(1)), few_digits).build(1)
    turned = replace(few_digits, train=few_digits.train[torch.arange(199, -1, -1)])
    with watched() as seen:
        stored(ensemble(teacher(3, "t1")), few_digits).build(1)
        stored(ensemble(teacher(1)), turned).build(1)
        monkeypatch.setattr(views, "VERSION", views.VERSION + 1)
        stored(ensemble(teacher(1)), few_digits).build(1)
    assert seen == {"t1": 600}


def test_of_images_as_they_are_the_seed_means_nothing(few_digits: Dataset) -> None:
    stored(ensemble(teacher(1)), few_digits, Viewing("none", 1, 0)).build()
    with watched() as seen:
        stored(ensemble(teacher(1, "renamed")), few_digits, Viewing("none", 1, 9)).build()
    assert not seen
    mixed = Viewing("none", 1, 0, "mixup")
    with watched() as seen:
        stored(ensemble(teacher(1)), few_digits, mixed).build()
        stored(ensemble(teacher(1)), few_digits, replace(mixed, seed=9)).build()
    assert seen == {"t1": 400}


def test_the_batch_size_means_nothing(few_digits: Dataset) -> None:
    stored(ensemble(teacher(1, batch=64)), few_digits).build()
    with watched() as seen:
        stored(ensemble(teacher(1, batch=7)), few_digits).build()
    assert not seen


def test_much_work_is_told_with_its_time(few_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_kd.teachers.building._batch", lambda train: 5)
    with logged() as lines:
        kept = stored(ensemble(), few_digits)
        kept.build()
    (line,) = lines
    assert re.fullmatch(r"INFO: storing targets of t1, t2: 400 views of images, 16\.0 kB, about \d+ s", line)
    assert apart(said(kept, few_digits).soft, by_hand(kept.ensemble, few_digits)[0]) <= ROUNDING


# Class maps, features, other weights

MAPS: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {
    "another order": (10, tuple((9 - digit,) for digit in range(10))),
    "more outputs": (14, tuple((digit + 3,) for digit in range(10))),
    "groups": (14, tuple((digit, *((digit + 10,) if digit < 4 else ())) for digit in range(10))),
}


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("name", MAPS)
def test_mapped_teachers(few_digits: Dataset, name: str, k: int | None) -> None:
    outputs, groups = MAPS[name]
    together = ensemble(teacher(1, outputs=outputs, groups=groups), teacher(2))
    kept = stored(together, few_digits, top_k=k)
    target = said(kept, few_digits)
    for found, wanted in zip((target.soft, target.plain), by_hand(together, few_digits, k=k), strict=True):
        assert apart(found, wanted) <= ROUNDING
    # All outputs are kept, so that another map finds them; of the largest k of the data's classes none does.
    assert kept.stores[0].layout.classes == (outputs if k is None else 10)
    other = tuple(groups[digit] for digit in (1, 0, *range(2, 10)))
    with watched() as seen:
        again = ensemble(teacher(1, outputs=outputs, groups=other), teacher(2))
        swapped = said(stored(again, few_digits, top_k=k), few_digits)
    assert seen == ({} if k is None else {"t1": 200})
    assert apart(swapped.soft, by_hand(again, few_digits, k=k)[0]) <= ROUNDING


@pytest.mark.parametrize("k", [None, 9, 6])
def test_a_teacher_that_knows_some_classes_only(few_digits: Dataset, k: int | None) -> None:
    """All that it knows is kept."""
    groups = tuple((digit,) if digit % 2 else () for digit in range(10))
    partial, whole = teacher(1, groups=groups), teacher(2)
    together = ensemble(partial, whole)
    target = said(stored(together, few_digits, top_k=k), few_digits)
    pixels = VIEWING.take(few_digits.train, INDEX, 0).decoded
    for found, temperatures in ((target.soft, TEMPERATURES), (target.plain, (1.0, 1.0))):
        first, second = (
            kept_of(softmax(logits_of(one, pixels) / t, axis=1), k)
            for one, t in zip((partial, whole), temperatures, strict=True)
        )
        # What the partial one leaves in peace: u = Σ w (its share of u's mass on the odd classes, or u).
        odd, u = np.arange(10) % 2 == 1, second.copy()
        for _ in range(300):
            mass = u[:, odd].sum(axis=1, keepdims=True)
            u = 0.3 * np.where(odd, mass * first, u) + 0.7 * second
        assert apart(found, u) <= ROUNDING


@pytest.mark.parametrize("k", [None, 3])
def test_features_come_along(few_digits: Dataset, k: int | None) -> None:
    together = ensemble(features=True)
    kept, live = (
        said(source, few_digits) for source in (stored(together, few_digits, top_k=k), LiveTargets(together))
    )
    assert [tuple(values.shape) for values in kept.features] == [(44, 432), (44, 288)]
    for ours, wanted, one in zip(kept.features, live.features, together.teachers, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
        pixels = VIEWING.take(few_digits.train, INDEX, 0).decoded
        with torch.no_grad():
            exact = one.classifier.net[:4](one.classifier.card.preprocess(pixels))
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)
    assert not said(stored(ensemble(), few_digits), few_digits).features


WEIGHS: dict[str, tuple[Any, bool]] = {
    "none": (None, True),
    "entropy": (entropy_weights, True),
    "agree": (agree_weights, False),
    "drop": (drop_weights, False),
    "confidence": (confidence_weights, False),
}


@pytest.mark.parametrize("held", ["a table", "in blocks", "row by row"])
@pytest.mark.parametrize("name", WEIGHS)
def test_weights_by_sample_are_the_live_ones(
    few_digits: Dataset, name: str, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh, fixed = WEIGHS[name]
    if held != "a table":
        monkeypatch.setattr(looking_up, "_BLOCK", 64)
    if held == "row by row":
        monkeypatch.setattr(looking_up, "HELD_BYTES", 100)
    together = ensemble(weigh=weigh, features=True, seed=3)
    kept = stored(together, few_digits)
    assert kept.fixed == (fixed and held != "row by row")
    for view_id in (0, 1):
        ours, live = (said(source, few_digits, view_id=view_id) for source in (kept, LiveTargets(together)))
        # Combiners that choose are moved by rounding where teachers are nearly equal; these are not.
        assert alike(ours, live, 5e-3 if name in ("agree", "confidence") else ROUNDING)
        assert ours.weights.shape == live.weights.shape
        for one, other in zip(ours.features, live.features, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    if weigh is entropy_weights:
        assert apart(ours.soft, by_hand(together, few_digits, view_id=1)[0]) <= ROUNDING


@pytest.mark.parametrize("top_k", [None, 3])
def test_blocks_and_rows_are_to_the_bit_what_is_held(
    few_digits: Dataset, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for block, most in ((8192, 1 << 30), (64, 1 << 30), (8192, 0)):
        monkeypatch.setattr(looking_up, "_BLOCK", block)
        monkeypatch.setattr(looking_up, "HELD_BYTES", most)
        found.append(said(stored(ensemble(weigh=entropy_weights), few_digits, top_k=top_k), few_digits))
    for other in found[1:]:
        assert all(map(torch.equal, found[0][:3], other[:3]))


def test_tables_are_filled_where_they_are(few_digits: Dataset) -> None:
    """A recorded step reads them there."""
    kept = stored(ensemble(weigh=entropy_weights, features=True), few_digits)
    kept.begin(0)
    before = [values.data_ptr() for values in (*kept._table[:3], *kept._table.features)]
    kept.begin(1)
    assert [values.data_ptr() for values in (*kept._table[:3], *kept._table.features)] == before


def test_the_weights_of_the_ensemble_are_left_alone(few_digits: Dataset) -> None:
    together = ensemble()
    kept = stored(together, few_digits)
    for view_id in (0, 1, 0):
        said(kept, few_digits, view_id=view_id)
    assert together.weights.tolist() == pytest.approx([0.3, 0.7])
    assert together.temperatures.tolist() == [4.0, 2.0]


# What is never kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_named(few_digits: Dataset, own_cache: Path, value: float) -> None:
    broken = net(2)
    with torch.no_grad():
        broken[4].bias[3] = value
    kept = stored(ensemble(teacher(1), teacher(2, "bad", made=broken)), few_digits)
    with refused(
        ModelError,
        "teacher 'bad' gives NaN or infinite outputs",
        "its weights are damaged, or its input is not what it was trained on",
        "check it with `ekd evaluate`, or leave it out",
    ):
        kept.build()
    good, bad = kept.stores
    assert bad.views == 0
    assert good.missing(0) == []  # what the other said is not lost
    with watched() as seen:
        stored(ensemble(teacher(1)), few_digits).build(1)
    assert not seen


def test_teachers_that_are_not_storable_leave_nothing(
    few_digits: Dataset, own_cache: Path, tmp_path: Path
) -> None:
    together = ensemble(teacher(1, storable=False), teacher(2, storable=False))
    with watched() as seen:
        kept = stored(together, few_digits)
        target = said(kept, few_digits)
        said(kept, few_digits)
    assert seen == {"t1": 200, "t2": 200}
    assert apart(target.soft, by_hand(together, few_digits)[0]) <= ROUNDING
    assert not (own_cache / "targets").exists()
    assert len(list((tmp_path / "tmp").iterdir())) == 2
    del kept
    assert not list((tmp_path / "tmp").iterdir())
    with watched() as seen:
        said(stored(together, few_digits), few_digits)
    assert seen == {"t1": 200, "t2": 200}


def test_teachers_stay_as_they_were(few_digits: Dataset) -> None:
    together = ensemble(features=True)
    kept = stored(together, few_digits)
    kept.build()
    together.release()
    said(kept, few_digits)
    assert [one.check_unchanged() for one in together.teachers] == [t.fingerprint for t in together.teachers]
    assert not any(module.training for t in together.teachers for module in t.classifier.modules())
