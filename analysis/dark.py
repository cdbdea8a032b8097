"""Dark knowledge (Hinton et al. 2015): what models say of the wrong classes, by the true one.

Pure functions. Shapes: `N` samples, `C` classes, `M` classes that are looked at, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from ensemble_kd.analysis.diversity import ratio
from ensemble_kd.analysis.fidelity import NO_IMAGE, Compared
from ensemble_kd.analysis.plots import shorten
from ensemble_kd.analysis.resampling import measured
from ensemble_kd.metrics import RESAMPLES
from ensemble_kd.results import ENSEMBLE

MOST = 12
"""Classes that are looked at where there are more than `ALL`."""
ALL = 30
NO_ORDER = "there is no order of wrong classes: two classes, or all equally likely"
_ROWS = 4096


def mean_softmax(logits: Float[Tensor, "N C"], labels: Int[np.ndarray, " N"]) -> Float[np.ndarray, "C C"]:
    """The mean probabilities (columns) of the samples of each true class (rows); NaN where it has none."""
    classes = logits.shape[1]
    sums = np.zeros((classes, classes))
    for rows, own in zip(
        logits.split(_ROWS), np.split(labels, range(_ROWS, len(labels), _ROWS)), strict=True
    ):
        np.add.at(sums, own, torch.softmax(rows.double(), dim=1).cpu().numpy())
    return ratio(sums, np.bincount(labels, minlength=classes)[:, None])


def looked_at(means: Float[np.ndarray, "C C"]) -> list[int]:
    """All classes up to `ALL`; else `MOST`, those of the pairs that are confused most, in order."""
    count = len(means)
    if count <= ALL:
        return list(range(count))
    both = np.triu(np.nan_to_num(means) + np.nan_to_num(means).T, k=1)
    chosen: list[int] = []
    for place in np.argsort(-both, axis=None, kind="stable"):
        chosen += [int(c) for c in divmod(place, count) if c not in chosen]
        if len(chosen) >= MOST:
            break
    return sorted(chosen[:MOST])


def rank_correlations(
    logits: Mapping[str, Tensor], reference: str, labels: np.ndarray, classes: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """How alike each model and the reference order the wrong classes: 1 the same way, 0 unrelated.

    Spearman's ρ between the mean probabilities that both give to the C − 1 wrong classes of a true class,
    averaged over the true classes `classes`. Ranks, as a few images taken for another class would outweigh
    all small probabilities.

    Returns:
        For each model but the reference (1 + R,): of the samples as they are, then of bootstrap resamples
        within each class, the same for all models. NaN where there are two classes.
    """
    names = [reference, *(name for name in logits if name != reference)]
    wanted = [c for c in classes if (labels == c).any()]
    sums, counts = np.zeros((len(names) - 1, 1 + RESAMPLES)), np.zeros((len(names) - 1, 1 + RESAMPLES))
    for c in wanted:
        rows = torch.from_numpy(np.flatnonzero(labels == c))
        generator = np.random.default_rng([seed, c])
        drawn = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
        draws = np.vstack([np.ones(len(rows)), drawn])
        ranks = []
        for name in names:
            p = torch.softmax(logits[name][rows.to(logits[name].device)].double(), dim=1).cpu().numpy()
            ranks.append(_standard(rankdata(draws @ np.delete(p, c, axis=1), axis=1)))
        found = np.stack([(ranks[0] * own).sum(axis=1) for own in ranks[1:]])
        sums += np.nan_to_num(found)
        counts += np.isfinite(found)
    return dict(zip(names[1:], ratio(sums, counts), strict=True))


def _standard(ranks: np.ndarray) -> np.ndarray:
    """Each row with mean 0 and length 1, so that a product of two is their correlation; NaN where all tie."""
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    return ratio(centred, np.linalg.norm(centred, axis=1, keepdims=True))


def nearest(means: Float[np.ndarray, "C C"], true: int) -> tuple[int, int]:
    """The most and the least likely of the wrong classes of a true class."""
    row = means[true].copy()
    row[true] = -np.inf
    most = int(row.argmax())
    row[true] = np.inf
    return most, int(row.argmin())


def in_words(
    means: Mapping[str, np.ndarray],
    names: Sequence[str],
    classes: Sequence[int],
    reference: str,
    student: str,
) -> list[dict[str, Any]]:
    """The nearest and the farthest wrong class of each class for each model, most confused classes first.

    Returns:
        Rows with `class`, `most` and `least` by model, and a `sentence` on the reference and the student.
        None where there are two classes only, no image of a class, or no order of its wrong classes.
    """
    if len(names) < 3:
        return []
    shown = [c for c in classes if np.isfinite(means[reference][c]).all()]
    rows = []
    for c in sorted(shown, key=lambda c: means[reference][c, c]):
        found = {model: nearest(mean, c) for model, mean in means.items()}
        if any(most == least for most, least in (found[reference], found[student])):
            continue  # it does not tell the wrong classes apart
        most, least = ({model: names[pair[side]] for model, pair in found.items()} for side in (0, 1))
        rows.append(
            {
                "class": names[c],
                "most": most,
                "least": least,
                "sentence": _sentence(names[c], most, least, reference, student),
            }
        )
    return rows


def _sentence(name: str, most: Mapping[str, str], least: Mapping[str, str], first: str, second: str) -> str:
    (near, far), (its_near, its_far) = (
        [shorten(found[model]) for found in (most, least)] for model in (first, second)
    )
    who = f"to the {second}" if second == "student" else f"to {shorten(second)}"
    said = f"To {'the ' if first == ENSEMBLE else ''}{shorten(first)}, {shorten(name)} is more like {near} than {far}; {who}"
    return (
        f"{said} too."
        if (near, far) == (its_near, its_far)
        else f"{said} more like {its_near} than {its_far}."
    )


def dark_knowledge(
    logits: Mapping[str, Tensor],
    labels: Int[np.ndarray, " N"],
    names: Sequence[str],
    compared: Compared,
    seed: int = 0,
) -> dict[str, Any]:
    """What models say of the wrong classes, as numbers and in words.

    Returns:
        `classes` that are looked at (see `looked_at`), `of` how many, and `n` images of each; `undefined`:
        those without images, whose rows below are NaN; `mean`: by model the mean softmax by true class
        (rows) among these; `difference`: student − ensemble, or the second model − the first;
        `correlation`: by network `rank_correlations` with the reference; `correlation_gain`: by how much
        the student's is higher than a control's, paired; `words` (see `in_words`); `same_nearest`: for how
        many of the classes in `words` each network names the same nearest wrong class as the reference.
    """
    reference, networks = compared.reference, compared.networks
    student = networks[0]
    means = {name: mean_softmax(values, labels) for name, values in logits.items()}
    classes = looked_at(means[reference])
    words = in_words(means, names, classes, reference, student)
    part = {name: mean[np.ix_(classes, classes)] for name, mean in means.items()}
    wanted = {name: logits[name] for name in (reference, *networks)}
    draws = rank_correlations(wanted, reference, labels, classes, seed)
    return {
        "classes": [names[c] for c in classes],
        "of": len(names),
        "n": [int((labels == c).sum()) for c in classes],
        "undefined": {names[c]: NO_IMAGE for c in classes if not (labels == c).any()},
        "mean": {name: mean.tolist() for name, mean in part.items()},
        "difference": (part[student] - part[reference]).tolist(),
        "correlation": {name: measured(draws[name], NO_ORDER) for name in networks},
        "correlation_gain": {
            name: measured(draws[student] - draws[name], NO_ORDER) for name in compared.controls
        },
        "words": words,
        "same_nearest": {
            name: sum(row["most"][name] == row["most"][reference] for row in words) for name in networks
        },
    }
