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
from ensemble_kd.models import user_object
from ensemble_kd.teachers.ensemble import Ensemble, Teacher
from ensemble_kd.weighting import (
    COMBINERS,
    EACH_BATCH,
    best_weights,
    call,
    inputs_of,
    learned_weights,
    optimality_gap,
    uniform_weights,
)

Weigh = Callable[..., Tensor]

PARTIAL = ("mean", "fixed", "entropy")
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
        name, found = getattr(combine, "__name__", "a function"), combine
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
            f"give it parameters of these names: {', '.join(('count', 'val_logits', 'val_labels', *EACH_BATCH))}",
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
    val: Images,
    *,
    seed: int = 0,
    features: bool = False,
) -> Ensemble:
    """The ensemble, with everything fitted that is fitted on the validation split.

    Args:
        logits: of the teachers (K, N, C) for the images of the validation split `val`.
        seed: of the draws of combiners that draw.
        features: whether targets shall carry the teachers' features.

    Raises:
        ConfigError: the weights are none, or the combiner does not suit the teachers.
    """
    count, labels = len(teachers), val.known_labels
    plain = Ensemble(teachers, uniform_weights(count), temperatures, how.pool, seed=seed, features=features)
    _check_known(plain, how)
    if how.calibrate in ("teachers", "both"):
        plain = replace(plain, scales=_fit_scales(plain, logits, labels))
    z = plain.calibrated(logits)
    if inputs_of(how.weigh).isdisjoint(EACH_BATCH):
        given = torch.tensor(how.given) if how.given else None
        once = {"count": count, "given": given, "val_logits": z, "val_labels": labels, "pool": how.pool}
        weights = _tried(how, once, (count,)).float().to(z.device)
        ensemble = replace(plain, weights=weights)
    else:
        _try_on_a_batch(how, plain, z, val)
        ensemble = replace(plain, weigh=how.weigh)
    if how.calibrate in ("pool", "both"):
        ensemble = replace(ensemble, after=fit_temperature(ensemble.target(logits).plain, labels))
    return ensemble


def best_alone(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> Ensemble:
    """The same teachers with all weight on the best by their logits (K, N, C) on the validation split.

    Raises:
        ConfigError: no teacher knows all classes.
    """
    whole = _whole(ensemble)
    if not whole:
        raise ConfigError(
            "no teacher knows all classes, so none can be the best one",
            "a teacher alone must know all classes",
            "leave that control or combiner out: --controls labels",
        )
    best = whole[int(best_weights(ensemble.calibrated(logits)[whole], labels).argmax())]
    weights = torch.zeros(len(ensemble.teachers))
    weights[best] = 1
    return replace(ensemble, weights=weights, weigh=None, after=1.0)


def _whole(ensemble: Ensemble) -> list[int]:
    """The teachers that know all classes."""
    known = ensemble.known
    everyone = range(len(ensemble.teachers))
    return list(everyone) if known is None else [k for k in everyone if bool(known[k].all())]


def _check_known(ensemble: Ensemble, how: Combination) -> None:
    known = ensemble.known
    if known is None:
        return
    partial = [t.label for t, mask in zip(ensemble.teachers, known, strict=True) if not bool(mask.all())]
    if how.pool == "logit":
        raise ConfigError(
            f"pool: the logits of {', '.join(partial)} cannot be pooled",
            "they know some of the classes only, and their logits have no common scale with the others'",
            "say --pool prob",
        )
    if how.name in COMBINERS and how.name not in PARTIAL:
        raise ConfigError(
            f"combine: {how.name} cannot weigh {', '.join(partial)}",
            "they know some of the classes only, and would be judged on all",
            f"say --combine {', '.join(PARTIAL[:-1])} or {PARTIAL[-1]}",
        )
    nobody, whole = overlap(known)
    if nobody:
        raise ConfigError(
            f"{len(nobody)} classes are known by no teacher: the numbers {listing(nobody)}",
            "the soft target would hold nothing for them",
            "map them for a teacher, or add a teacher that knows them",
        )
    if not whole:
        raise ConfigError(
            "the teachers know separate groups of classes",
            "nothing tells how likely one group is against the other",
            "add a teacher that knows classes of both, such as one trained on this data",
        )


def _fit_scales(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> Tensor:
    """Each teacher's temperature, on the samples and classes that it knows."""
    known = ensemble.known
    scales = []
    for k, own in enumerate(logits):
        mask = torch.ones(own.shape[1], dtype=torch.bool) if known is None else known[k]
        mask = mask.to(labels.device)
        rows = mask[labels]
        places = mask.cumsum(0) - 1
        scales.append(fit_temperature(own[rows][:, mask], places[labels[rows]]))
    return torch.tensor(scales)


def _tried(how: Combination, offered: Mapping[str, Any], *shapes: tuple[int, ...]) -> Tensor:
    """The function's weights, which must be weights of one of the shapes."""
    fix = "return non-negative weights that sum to 1 over the teachers, as a tensor"
    try:
        weights = call(how.weigh, dict(offered))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"combine: {how.name} failed: {type(error).__name__}: {error}",
            "it was called with the validation split",
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


def _try_on_a_batch(how: Combination, ensemble: Ensemble, z: Tensor, val: Images) -> None:
    """Before anything is trained, with the mean of the teachers in the student's place."""
    z = z[:, :_TRIAL]
    count, batch = z.shape[:2]
    offered = {
        "count": count,
        "pool": ensemble.pool,
        "logits": z,
        "labels": val.known_labels[:_TRIAL],
        "student_logits": z.mean(dim=0),
        "temperatures": ensemble.temperatures.to(z.device),
        "draws": torch.full((count, batch), 0.5, device=z.device),
    }
    missing = inputs_of(how.weigh) - offered.keys()
    if missing:
        raise ConfigError(
            f"combine: {how.name} wants {', '.join(sorted(missing))} beside the batch",
            "what is fitted on the validation split is fitted once, and cannot differ by batch",
            "name either the validation split or the batch",
        )
    _tried(how, offered, (count,), (count, batch))


def describe(ensemble: Ensemble, how: Combination, logits: Tensor, val: Images) -> dict[str, Any]:
    """What `set_up` made of its arguments, and what it is worth on the validation split.

    Returns:
        `combine`, `pool`, `weights` by teacher (those that evaluation uses), whether they `vary` by
        batch, `scales` and `after` (temperatures of the calibration), `discarded` (the probability
        outside the class maps), `known` (how many classes teachers know that do not know all),
        `validation` (`n`, and `nll` of the `ensemble`, of `uniform` weights and of the `best` teacher,
        at temperature 1), and for `learned` the `gap`, by how much at most the NLL of the weights lies
        above the lowest.
    """
    labels, names = val.known_labels, [teacher.label for teacher in ensemble.teachers]
    uniform = replace(ensemble, weights=uniform_weights(len(names)), weigh=None, after=1.0)
    nll = {"ensemble": _nll(ensemble, logits, labels), "uniform": _nll(uniform, logits, labels)}
    best = best_alone(uniform, logits, labels) if _whole(ensemble) else None
    if best is not None:
        nll["best"] = _nll(best, logits, labels)
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
        "known": _known_names(ensemble),
        "validation": {
            "n": len(labels),
            "nll": nll,
            "best": names[int(best.weights.argmax())] if best is not None else None,
        },
        **gap,
    }


def _nll(ensemble: Ensemble, logits: Tensor, labels: Tensor) -> float:
    return float(-ensemble.target(logits).plain.double().gather(1, labels[:, None]).mean())


def _known_names(ensemble: Ensemble) -> dict[str, int]:
    """How many classes each teacher knows that does not know all."""
    known = ensemble.known
    if known is None:
        return {}
    pairs = zip(ensemble.teachers, known.sum(dim=1).tolist(), strict=True)
    return {teacher.label: count for teacher, count in pairs if count < known.shape[1]}
