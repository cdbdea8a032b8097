"""How alike the layers of student, controls and teachers are, and what of it was gained by distilling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble_kd import files
from ensemble_kd.analysis.cka import SMALLEST_BATCH
from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.layers import LOGITS, PENULTIMATE
from ensemble_kd.analysis.options import FeaturesOptions
from ensemble_kd.analysis.plots_features import draw_features
from ensemble_kd.analysis.resampling import measured, resampled
from ensemble_kd.analysis.similarity import aligned, nearest, shared_neighbours, standard
from ensemble_kd.analysis.subjects import Subjects, chosen_options, subjects_of
from ensemble_kd.analysis.taps import Seen, look, taken
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import ConfigError
from ensemble_kd.inference import batch_for
from ensemble_kd.metrics import RESAMPLES
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Teacher

BATCH, SMALL_BATCH = 256, 64
"""Images that layers are compared over at once; the smaller where images are large."""
MOST_ROTATED = 1000
"""Images, and features, beyond which Procrustes takes no more images."""
ENDS = (PENULTIMATE, LOGITS)
MEASURES = (*ENDS, "matches", "mutual_knn")
_HEADERS = ("penultimate", "logits", "best matches", "neighbours")


@dataclass(frozen=True)
class FeatureAnalysis:
    """Every pair of models, layer by layer; `numbers` is what features.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """What was gained by distilling, every pair, and the best match of each layer."""
        numbers = self.numbers
        settings = numbers["settings"]
        title = (
            f"{numbers['data']}, test split, {numbers['n']:,} images; debiased linear CKA in batches of "
            f"{settings['batch']}, maps {_POOLED[settings['pool']]}; 95 % intervals over images"
        )
        parts = [title, _gain_table(numbers), _pair_table(numbers), *_match_tables(numbers)]
        missing = [
            [f"{model}, layer {layer}", reason]
            for model, layers in numbers["undefined"].items()
            for layer, reason in layers.items()
        ]
        parts += [text_table(["no numbers for", "as"], missing)] if missing else []
        return "\n\n".join(part for part in parts if part)


_POOLED = {"flatten": "whole", "gap": "averaged over positions", "cls": "averaged, of tokens the first"}


def analyze_features(
    run: str | Path | None = None,
    *,
    models: str | Sequence[str] | None = None,
    teachers: Sequence[Teacher] = (),
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> FeatureAnalysis:
    """CKA of all layers of all models, nearest neighbours and Procrustes of what their last layers see.

    Args:
        run: a run folder; the newest finished one where neither a run nor models are named.
        models: instead of a run, models by name, run folder or file, on `data`.
        teachers: of a run that was given them as objects, the same objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"pool=gap"`.
        options: the other fields of `FeaturesOptions`.

    Returns:
        The numbers: `layers` of each model in order of execution, `self` (CKA within each), `pairs` (see
        `compare`), `gains` of a run (see `gained`), `undefined` layers with a reason, and `chance`.
        features.json and pictures are written to the run's `analysis/` folder, or to `out`.

    Raises:
        EkdError: run, models or data cannot be used, or a pattern matches no layer.
    """
    chosen = chosen_options(FeaturesOptions, run, models, options, config_file, sets)
    return features_of(subjects_of(chosen, teachers), chosen)


def features_of(subjects: Subjects, options: FeaturesOptions) -> FeatureAnalysis:
    """`analyze_features` of models that are loaded already."""
    images = subjects.some(options.most_images, options.seed)
    batch = _batch_size(subjects.classifiers.values(), images)
    if taken(len(images), batch) <= max(options.neighbours, SMALLEST_BATCH - 1):
        raise ConfigError(
            f"{len(images)} images are too few to compare layers on",
            f"batches are of {SMALLEST_BATCH} or more, and each image has {options.neighbours} neighbours",
            "take more images, or a smaller --neighbours",
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    images = images[order.to(images.ids.device)]
    seen = look(subjects.classifiers, images, options.layers, options.pool, batch)
    images = images[torch.arange(len(seen), device=images.ids.device)]
    settings = {key: getattr(options, key) for key in ("quick", "seed", "layers", "pool", "neighbours")}
    numbers = {
        **subjects.head(images, **settings, images=options.most_images, batch=batch),
        **compare(seen, subjects.roles, options.neighbours, options.seed, subjects.idle),
    }
    numbers["pictures"] = draw_features(numbers, subjects.folder)
    files.write_json(subjects.folder / "features.json", numbers)
    return FeatureAnalysis(subjects.folder, numbers)


def _batch_size(classifiers: Iterable[Classifier], images: Images) -> int:
    fitting = min(batch_for(c.card.preprocess.size, images.ids.device) for c in classifiers)
    return max(SMALL_BATCH, min(BATCH, fitting))


def compare(
    seen: Seen, roles: Mapping[str, str], neighbours: int, seed: int, idle: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything in features.json that comes from one pass.

    Returns:
        `layers`, `self`, `undefined` (layers without numbers, and why), `chance`, `gains` (see `gained`),
        `idle`, `procrustes` (of how many images), and `pairs`, each with `first`, `second`; `cka`
        (layers of the first × layers of the second); `best`: for both sides the other's most similar
        layer by layer; `penultimate`, `logits` and `matches` (the mean over the layers of the first
        of their best match), CKA with intervals; `mutual_knn` with its interval; `procrustes`: its `value`
        and that by `chance`, with the images of one side in another order.
    """
    cka, undefined = seen.moments.cka(), _undefined(seen)
    blocks = {pair: cka[np.ix_(seen.at(pair[0]), seen.at(pair[1]))] for pair in combinations(seen.layers, 2)}
    draws = {pair: _draws(seen, pair, block, seed) for pair, block in blocks.items()}
    for pair, shared in _shared(seen, neighbours, undefined, seed).items():
        draws[pair]["mutual_knn"] = shared
    rotated, about = _rotations(seen, undefined, seed)
    pairs = [
        {
            "first": pair[0],
            "second": pair[1],
            "cka": block.tolist(),
            "best": _best(seen, pair, block, undefined),
            **{key: measured(values, _reason(undefined, pair, key)) for key, values in draws[pair].items()},
            "procrustes": rotated[pair],
        }
        for pair, block in blocks.items()
    ]
    return {
        "layers": {name: list(labels) for name, labels in seen.layers.items()},
        "self": {name: cka[np.ix_(seen.at(name), seen.at(name))].tolist() for name in seen.layers},
        "undefined": undefined,
        "chance": {"mutual_knn": neighbours / (len(seen) - 1)},
        "pairs": pairs,
        "procrustes": about,
        "idle": list(idle),
        "gains": gained(roles, draws, undefined, idle),
    }


def _undefined(seen: Seen) -> dict[str, dict[str, str]]:
    """Why a layer has no CKA, of those that have none."""
    own = np.diag(seen.moments.hsic)
    reasons = {
        name: {
            label: "it gave values that are not finite"
            if np.isnan(value)
            else "it is the same for all images"
            for label, value in zip(labels, own[seen.at(name)], strict=True)
            if not value > 0
        }
        for name, labels in seen.layers.items()
    }
    return {name: layers for name, layers in reasons.items() if layers}


def _reason(undefined: Mapping[str, Mapping[str, str]], models: Sequence[str], measure: str) -> str:
    """Why a measure of some of the models is NaN, where it is."""
    layer = PENULTIMATE if measure == "mutual_knn" else measure
    for name in models:
        if layer in undefined.get(name, {}):
            return f"{layer} of {name} has none: {undefined[name][layer]}"
    return "no layer of one of them varies over the images"


def _draws(seen: Seen, pair: tuple[str, str], block: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """CKA of penultimate layers, logits and best matches: as it is, then in each bootstrap sample."""
    first, second = pair
    found = {
        end: seen.moments.resampled(seen.at(first, end), seen.at(second, end), seed)[:, 0] for end in ENDS
    }
    known = np.flatnonzero(np.isfinite(block).any(axis=1))
    if not len(known):
        return found | {"matches": np.full_like(found[LOGITS], np.nan)}
    # Which layers match is held fixed: looked for anew, the best of many would always gain by chance.
    rows, columns = seen.at(first)[known], seen.at(second)[np.nanargmax(block[known], axis=1)]
    return found | {"matches": seen.moments.resampled(rows, columns, seed).mean(axis=1)}


def _shared(
    seen: Seen, neighbours: int, undefined: Mapping[str, Mapping[str, str]], seed: int
) -> dict[tuple[str, str], np.ndarray]:
    """Shared neighbours of the penultimate features of each pair: as they are, then in bootstrap samples."""
    near = {
        name: nearest(features, neighbours)
        for name, features in seen.features.items()
        if PENULTIMATE not in undefined.get(name, {})
    }
    shares = {
        (first, second): shared_neighbours(near[first], near[second]).cpu().numpy()
        for first, second in combinations(near, 2)
    }
    nothing = np.full(1 + RESAMPLES, np.nan)
    return dict.fromkeys(combinations(seen.layers, 2), nothing) | resampled(shares, seed)


def _best(
    seen: Seen, pair: tuple[str, str], block: np.ndarray, undefined: Mapping[str, Mapping[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """For each layer of either side the most similar one of the other; undefined layers have a reason instead."""
    sides = {}
    for side, name, other, values in (("first", *pair, block), ("second", *pair[::-1], block.T)):
        none = f"no layer of {other} has any"
        reasons = undefined.get(name, {})
        sides[side] = [
            {"layer": label, "match": "", "cka": float("nan"), "reason": reasons.get(label, none)}
            if np.isnan(row).all()
            else {
                "layer": label,
                "match": seen.layers[other][int(np.nanargmax(row))],
                "cka": float(np.nanmax(row)),
            }
            for label, row in zip(seen.layers[name], values, strict=True)
        ]
    return sides


def _rotations(
    seen: Seen, undefined: Mapping[str, Mapping[str, str]], seed: int
) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, Any]]:
    """Procrustes of the penultimate features of each pair with that by chance, and of how many images it is."""
    widest = max(features.shape[1] for features in seen.features.values())
    count = len(seen)
    about: dict[str, Any] = {"images": count}
    if count > MOST_ROTATED and widest > MOST_ROTATED:
        count = MOST_ROTATED
        why = f"one network has {widest:,} penultimate features, and time grows with the cube of both"
        about = {"images": count, "reason": f"{why}; neighbours are of all {len(seen):,} images"}
    sides = {
        name: None if PENULTIMATE in undefined.get(name, {}) else standard(features[:count])
        for name, features in seen.features.items()
    }
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = {}
    pairs = list(combinations(seen.layers, 2))
    with progress("procrustes", len(pairs)) as advance:
        for pair in pairs:
            first, second = (sides[name] for name in pair)
            if first is None or second is None:
                reason = _reason(undefined, pair, PENULTIMATE)
                found[pair] = {"value": float("nan"), "chance": float("nan"), "reason": reason}
            else:
                chance = aligned(first, second[order.to(second.device)])
                found[pair] = {"value": aligned(first, second), "chance": chance}
            advance()
    return found, about


def gained(
    roles: Mapping[str, str],
    draws: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
    undefined: Mapping[str, Mapping[str, str]],
    idle: Sequence[str] = (),
) -> dict[str, Any]:
    """How much more alike a teacher the student is than a control is, with paired intervals over images.

    Args:
        roles: by model.
        draws: of each pair the measures, as they are and in each bootstrap sample (1 + R,).
        undefined: by model, the layers without CKA, and why.
        idle: teachers without weight in the ensemble, who taught nothing.

    Returns:
        By control: `teachers`, and of each `penultimate`, `logits`, `matches` (the mean over the layers of
        their best match) and `mutual_knn`; `mean`, the same on average over the teachers with weight.
        Empty without controls.
    """
    teachers = [name for name, role in roles.items() if role == "teacher"]
    weighty = [k for k, teacher in enumerate(teachers) if teacher not in idle]
    gains = {}
    for control in (name for name, role in roles.items() if role == "control"):
        moved = {
            key: [draws["student", teacher][key] - draws[control, teacher][key] for teacher in teachers]
            for key in MEASURES
        }
        why = {key: _reason(undefined, ["student", control, *teachers], key) for key in MEASURES}
        gains[control] = {
            "teachers": {
                teacher: {key: measured(values[k], why[key]) for key, values in moved.items()}
                for k, teacher in enumerate(teachers)
            },
            "mean": {
                key: measured(np.mean([values[k] for k in weighty], axis=0), why[key])
                for key, values in moved.items()
            },
        }
    return gains


def _gain_table(numbers: Mapping[str, Any]) -> str:
    rows = []
    everyone = "teachers with weight, on average" if numbers["idle"] else "all teachers, on average"
    for control, found in numbers["gains"].items():
        by_teacher = found["teachers"] if len(found["teachers"]) > 1 else {}
        for teacher, row in [*by_teacher.items(), (everyone, found["mean"])]:
            rows.append(
                [f"over {control}, to {teacher}", *(interval(row[key], 1, 3, sign="+") for key in MEASURES)]
            )
    title = "Similarity to the teachers that was gained by distilling: student minus control"
    return text_table(["", *_HEADERS], rows, title) if rows else ""


def _pair_table(numbers: Mapping[str, Any]) -> str:
    chance = numbers["chance"]["mutual_knn"]
    headers = ["", *_HEADERS, "Procrustes", "by chance"]
    rows = [
        [
            f"{pair['first']} – {pair['second']}",
            *(interval(pair[key], 1, 3) for key in MEASURES),
            *(_plain(pair["procrustes"][key]) for key in ("value", "chance")),
        ]
        for pair in numbers["pairs"]
    ]
    title = (
        f"Similarity: CKA, the share of {numbers['settings']['neighbours']} nearest neighbours in common (by "
        f"chance {chance:.3f}), and Procrustes"
    )
    return text_table(headers, rows, title)


def _match_tables(numbers: Mapping[str, Any]) -> list[str]:
    """For each layer of the student, or of the first model, the most similar layer of the others."""
    first = next(iter(numbers["layers"]))
    others = [
        name for name, role in numbers["roles"].items() if role in ("teacher", "model") and name != first
    ]
    found = {pair["second"]: pair["best"]["first"] for pair in numbers["pairs"] if pair["first"] == first}
    rows = [
        [label, *(_match(found[other][k]) for other in others)]
        for k, label in enumerate(numbers["layers"][first])
    ]
    title = f"The most similar layer for each of {first}, by CKA"
    return [text_table(["", *others], rows, title)] if others else []


def _match(best: Mapping[str, Any]) -> str:
    return "–" if "reason" in best else f"{best['match']} {best['cka']:.3f}"


def _plain(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
