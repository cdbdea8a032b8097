"""Setting an ensemble up on the validation split: calibration, weights, and what they are worth there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ensemble_kd.calibration import fit_temperature
from ensemble_kd.combine import overlap
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import ConfigError, listing, nearest
from ensemble_kd.metrics import within
from ensemble_kd.models import user_object
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.weighting import (
    COMBINERS,
    EACH_BATCH,
    ONCE,
    best_weights,
    call,
    entropy_weights,
    given_weights,
    inputs_of,
    learned_weights,
    optimality_gap,
    uniform_weights,
)

Weigh = Callable[..., Tensor]

_PARTIAL = (uniform_weights, given_weights, entropy_weights)
"""Combiners that make sense of teachers which know some classes only."""
_TRIAL = 64


@dataclass(frozen=True)
class Combination:
    """How teachers are combined, as the user said it."""

    name: str
    weigh: Weigh
    pool: str = "prob"
    calibrate: str = "none"
    given: Sequence[float] | None = None


def find_combiner(combine: str | Weigh) -> tuple[str, Weigh]:
    """A weight function by its name in `weighting.COMBINERS`, by `py:FILE.py:function`, or itself.

    Raises:
        ConfigError: there is no such function, or it wants an input that is not offered.
        ModelError: the user's file cannot be run.
    """
    if isinstance(combine, str):
        name, own = combine, combine.startswith("py:")
        found = user_object(combine.removeprefix("py:")) if own else COMBINERS.get(combine)
    else:
        table = {weigh: known for known, weigh in COMBINERS.items()}
        name, found = table.get(combine, f"python:{getattr(combine, '__name__', 'function')}"), combine
    if found is None and name.startswith("python:"):
        raise ConfigError(
            f"combine: {name} is not at hand",
            "it was given as a Python function, which no file can bring back",
            "call distill with the function again, or put it into a file: py:FILE.py:function",
        )
    if found is None:
        raise ConfigError(
            f"combine: there is no {combine!r}",
            f"known are {', '.join(COMBINERS)} and py:FILE.py:function",
            nearest(name, COMBINERS) or "name one of these",
        )
    try:
        inputs_of(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"combine: {name} cannot be called",
            str(error),
            f"give it parameters of these names: {', '.join((*ONCE, *EACH_BATCH))}",
        ) from error
    return name, found


def label_free() -> list[str]:
    """The combiners that need no labels of training images."""
    return [name for name, weigh in COMBINERS.items() if "labels" not in inputs_of(weigh)]


def set_up(
    teachers: Sequence[Teacher],
    temperatures: Tensor,
    how: Combination,
    logits: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    features: bool = False,
) -> Ensemble:
    """The ensemble, with everything fitted that is fitted on the validation split.

    Args:
        logits: of the teachers (K, N, C) for the images of the validation split, and its `labels` (N,).
        seed: of the draws of combiners that draw.
        features: whether targets shall carry the teachers' features.

    Raises:
        ConfigError: the weights are none, or the combiner does not suit the teachers.
    """
    count, device = len(teachers), logits.device
    equal, temperatures = uniform_weights(count).to(device), temperatures.to(device)
    ensemble = Ensemble(teachers, equal, temperatures, how.pool, seed=seed, features=features)
    check_known([teacher.label for teacher in teachers], ensemble.known_mask, how)
    if how.calibrate in ("teachers", "both"):
        ensemble = replace(ensemble, scales=_fit_scales(ensemble, logits, labels))
    z, fixed = ensemble.calibrated(logits), {"count": count, "pool": how.pool, "known": ensemble.known_mask}
    if inputs_of(how.weigh).isdisjoint(EACH_BATCH):
        weights = _once(how, fixed, z, labels)
        ensemble = replace(ensemble, weights=weights.float().to(device))
        numbers = list(map(str, range(logits.shape[2])))
        _check_covered(ensemble.known_mask[ensemble.weights > 0], numbers)
    else:
        _try_on_a_batch(how, fixed, ensemble.temperatures, z, labels)
        ensemble = replace(ensemble, weigh=how.weigh)
    return _calibrated_pool(ensemble, how, logits, labels)


def _calibrated_pool(ensemble: Ensemble, how: Combination, logits: Tensor, labels: Tensor) -> Ensemble:
    if how.calibrate not in ("pool", "both"):
        return ensemble
    ensemble = replace(ensemble, after=1.0)
    return replace(ensemble, after=fit_temperature(ensemble.target(logits).plain, labels))


def best_alone(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> Ensemble:
    """The same teachers with all weight on the best by their logits (K, N, C) on the validation split.

    Raises:
        ConfigError: no teacher knows all classes.
    """
    whole = ensemble.known_mask.all(dim=1).nonzero().flatten()
    if not len(whole):
        raise _no_best()
    best = whole[int(best_weights(ensemble.calibrated(logits)[whole], labels).argmax())]
    weights = torch.zeros_like(ensemble.weights)
    weights[best] = 1
    return replace(ensemble, weights=weights, weigh=None, after=1.0)


def rehearse(how: Combination, known: Tensor) -> None:
    """Try a user's weight function on made-up logits, before teachers are loaded or trained.

    Raises:
        ConfigError: it fails, or gives no weights.
    """
    if how.weigh in COMBINERS.values():
        return
    (count, classes), generator = known.shape, torch.Generator().manual_seed(0)
    logits = torch.randn(count, _TRIAL, classes, generator=generator)
    labels = torch.arange(_TRIAL) % classes
    fixed = {"count": count, "pool": how.pool, "known": known}
    if inputs_of(how.weigh).isdisjoint(EACH_BATCH):
        _once(how, fixed, logits, labels)
    else:
        _try_on_a_batch(how, fixed, torch.ones(count), logits, labels)


def check_known(
    labels: Sequence[str],
    known: Tensor,
    how: Combination,
    best: bool = False,
    classes: Sequence[str] | None = None,
) -> None:
    """Refuse teachers that know some classes only, where they cannot be combined as they should be.

    Args:
        labels: the teachers' names.
        known: which classes each knows (K, C).
        best: whether the best teacher alone is wanted too.
        classes: the names of the classes, for messages.

    Raises:
        ConfigError: says why.
    """
    partial = [label for label, mask in zip(labels, known, strict=True) if not bool(mask.all())]
    if not partial:
        return
    if how.pool == "logit":
        raise ConfigError(
            f"pool: the logits of {', '.join(partial)} cannot be pooled",
            "they know some of the classes only, and their logits have no common scale with the others'",
            "say --pool prob",
        )
    if how.weigh in COMBINERS.values() and how.weigh not in _PARTIAL:
        *others, last = [name for name, weigh in COMBINERS.items() if weigh in _PARTIAL]
        raise ConfigError(
            f"combine: {how.name} cannot weigh {', '.join(partial)}",
            "they know some of the classes only, and would be judged on all",
            f"say --combine {', '.join(others)} or {last}",
        )
    if best and len(partial) == len(labels):
        raise _no_best()
    counted = known if how.weigh is not given_weights else known[torch.tensor(how.given) > 0]
    _check_covered(counted, classes or list(map(str, range(known.shape[1]))))


def _check_covered(known: Tensor, classes: Sequence[str]) -> None:
    """The teachers that count must know all classes together, and overlap."""
    nobody, whole = overlap(known)
    if nobody:
        raise ConfigError(
            f"no teacher that counts knows {listing(classes[c] for c in nobody)}",
            "the soft target would hold nothing for them",
            "map them for a teacher, or add a teacher that knows them",
        )
    if not whole:
        raise ConfigError(
            "the teachers know separate groups of classes",
            "nothing tells how likely one group is against the other",
            "add a teacher that knows classes of both, such as one trained on this data",
        )


def _no_best() -> ConfigError:
    return ConfigError(
        "no teacher knows all classes, so none can be the best one",
        "a teacher alone must know all classes",
        "add one that does, such as one trained on this data, or leave best-teacher out of --controls",
    )


def _fit_scales(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> Tensor:
    """Each teacher's temperature, on the samples and classes that it knows."""
    pairs = zip(ensemble.known_mask, logits, strict=True)
    return torch.tensor([fit_temperature(*within(mask, own, labels)) for mask, own in pairs]).to(
        logits.device
    )


def _tried(how: Combination, offered: Mapping[str, Any], *shapes: tuple[int, ...]) -> Tensor:
    """The function's weights, which must be weights of one of the shapes."""
    fix = "return non-negative weights that sum to 1 over the teachers, as a tensor"
    try:
        weights = call(how.weigh, dict(offered))
    except Exception as error:
        raise ConfigError(
            f"combine: {how.name} failed: {type(error).__name__}: {error}",
            "it was tried before anything is trained",
            "call it in a Python session to see the whole traceback",
        ) from error
    what = f"combine: {how.name} gave no weights"
    if not isinstance(weights, Tensor) or tuple(weights.shape) not in shapes:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ConfigError(what, f"it returned {got}, not {' or '.join(map(str, shapes))}", fix)
    sums = weights.double().sum(dim=0)
    if not bool(((sums - 1).abs() < 1e-4).all() and (weights >= 0).all()):
        lowest, low, high = (float(v) for v in (weights.min(), sums.min(), sums.max()))
        raise ConfigError(what, f"the smallest is {lowest:g}, and they sum to {low:g} … {high:g}", fix)
    return weights


def _once(how: Combination, fixed: Mapping[str, Any], logits: Tensor, labels: Tensor) -> Tensor:
    """Weights (K,) that are the same for all batches."""
    given = torch.tensor(how.given) if how.given else None
    offered = {**fixed, "given": given, "val_logits": logits, "val_labels": labels}
    return _tried(how, offered, (len(logits),))


def _try_on_a_batch(
    how: Combination, fixed: Mapping[str, Any], temperatures: Tensor, z: Tensor, labels: Tensor
) -> None:
    """Before anything is trained, with the mean of the teachers in the student's place."""
    z = z[:, :_TRIAL]
    count, batch = z.shape[:2]
    offered = {
        **fixed,
        "logits": z,
        "labels": labels[:_TRIAL],
        "student_logits": z.mean(dim=0),
        "temperatures": temperatures,
        "draws": torch.full((count, batch), 0.5, device=z.device),
    }
    missing = inputs_of(how.weigh) - offered.keys()
    if missing:
        raise ConfigError(
            f"combine: {how.name} wants {', '.join(sorted(missing))} beside the batch",
            "weights that are fitted or given are the same for all batches",
            "name either those or the batch",
        )
    _tried(how, offered, (count,), (count, batch))


def describe(ensemble: Ensemble, how: Combination, logits: Tensor, val: Images) -> dict[str, Any]:
    """What `set_up` made of its arguments, and what it is worth on the validation split.

    Returns:
        `combine`, `pool`, `weights` by teacher (those that evaluation uses), whether they `vary` by
        batch, `scales` and `after` (temperatures of the calibration), `discarded` (the probability
        outside the class maps), `known` (how many classes teachers know that do not know all),
        `validation` (`n`, and at temperature 1 the `nll` of `uniform` weights, of the `best` teacher,
        and of the `ensemble` where it needs neither labels nor a student; each calibrated alike), and for
        `learned` the `gap`, by how much at most the NLL of the weights lies above the lowest.
    """
    labels, names = val.known_labels, [teacher.label for teacher in ensemble.teachers]
    uniform = replace(ensemble, weights=torch.full_like(ensemble.weights, 1 / len(names)), weigh=None)
    compared = {"uniform": _calibrated_pool(uniform, how, logits, labels)}
    if bool(ensemble.known_mask.all(dim=1).any()):
        best = best_alone(ensemble, logits, labels)
        compared["best"] = _calibrated_pool(best, how, logits, labels)
    if ensemble.for_measuring() is ensemble:
        compared["ensemble"] = ensemble
    gap = {}
    if how.weigh is learned_weights:
        gap["gap"] = optimality_gap(ensemble.weights, ensemble.calibrated(logits), labels, how.pool)
    scales = [1.0] * len(names) if ensemble.scales is None else ensemble.scales.tolist()
    return {
        "combine": how.name,
        "pool": how.pool,
        "weights": dict(zip(names, ensemble.weights.tolist(), strict=True)),
        "vary": ensemble.weigh is not None,
        "scales": dict(zip(names, scales, strict=True)),
        "after": ensemble.after,
        "discarded": {t.label: t.discarded(val) for t in ensemble.teachers if t.class_map},
        "known": {
            name: int(mask.sum())
            for name, mask in zip(names, ensemble.known_mask, strict=True)
            if not bool(mask.all())
        },
        "validation": {
            "n": len(labels),
            "nll": {name: _nll(one, logits, labels) for name, one in compared.items()},
            "best": names[int(compared["best"].weights.argmax())] if "best" in compared else None,
        },
        **gap,
    }


def _nll(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> float:
    return float(-ensemble.target(logits).plain.double().gather(1, labels[:, None]).mean())
