"""The measures of a run: every network against the labels and against the ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any

from torch import Tensor

from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Images
from ensemble_kd.inference import predict
from ensemble_kd.metrics import Measure, bootstrap_mean, measure, per_sample, within
from ensemble_kd.shared import Shared

ENSEMBLE = "ensemble"


def compare(
    networks: Mapping[str, Classifier],
    teachers: Mapping[str, Classifier],
    stacked: Tensor,
    ensemble_logits: Tensor,
    test: Images,
    known: Tensor | None = None,
    shared: Shared | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measures of student, controls, teachers and ensemble on one split, with 95 % intervals.

    Args:
        networks: `student` and the controls by name, in eval mode.
        teachers: by label, in the order of `stacked`.
        stacked: the teachers' logits (K, N, C).
        ensemble_logits: the log of the ensemble's probabilities (N, C).
        test: the images and labels of the split.
        known: which classes each teacher knows (K, C); None where all know all. One that does not is
            judged among its `classes`, on the `images` of these.
        shared: keeps the measures of teachers and ensemble, which several runs have in common.

    Returns:
        `models` (rows with `role`, `parameters`, `bytes` and the measures), `times_smaller` and
        `differences` (student minus each control, paired by sample); and all logits by name.
    """
    labels, target = test.known_labels, ensemble_logits.double().exp()
    shared, seen = shared or Shared(), _digest(labels, target)
    logits = {name: predict(network, test) for name, network in networks.items()}
    logits |= dict(zip(teachers, stacked, strict=True)) | {ENSEMBLE: ensemble_logits}
    rows: dict[str, dict[str, Any]] = {}
    for name, values in logits.items():
        role = _role(name, networks, teachers)
        members = list(teachers.values()) if name == ENSEMBLE else [networks.get(name) or teachers[name]]
        rows[name] = {
            "role": role,
            "parameters": sum(member.parameter_count for member in members),
            "bytes": sum(member.byte_count for member in members),
            **(
                measure(values, labels, target)
                if name in networks
                else shared.once(partial(measure, values, labels, target), "measure", seen, _digest(values))
            ),
        }
    for name, mask in zip(teachers, () if known is None else known.to(labels.device), strict=False):
        if not bool(mask.all()):
            kept = {key: rows[name][key] for key in ("role", "parameters", "bytes")}
            rows[name] = {**kept, **_among(mask, logits[name], labels)}
    differences = {
        name: paired_differences(logits["student"], logits[name], labels, target)
        for name in networks
        if name != "student"
    }
    smaller = rows[ENSEMBLE]["parameters"] / rows["student"]["parameters"]
    return {"models": rows, "times_smaller": smaller, "differences": differences}, logits


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of the values of tensors."""
    return sha256(b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def paired_differences(first: Tensor, second: Tensor, labels: Tensor, target: Tensor) -> dict[str, Measure]:
    """First minus second in every measure that is a mean over samples, with paired intervals."""
    ours, theirs = (per_sample(logits, labels, target) for logits in (first, second))
    return {name: bootstrap_mean(ours[name] - theirs[name]) for name in ours}


def _among(mask: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The measures of a model among the classes in `mask`, on the samples of these classes."""
    logits, labels = within(mask, logits, labels)
    return {"classes": int(mask.sum()), "images": len(labels), **measure(logits, labels)}


def verdict(differences: Mapping[str, Mapping[str, Measure]]) -> str:
    """In one sentence, whether the student did better than the one trained on labels alone."""
    if "labels" not in differences:
        return "No control on labels alone was trained, so nothing can be said of what distilling gained."
    accuracy = differences["labels"]["accuracy"]
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    if low > 0:
        judged = "Distilling helped"
    elif high < 0:
        judged = "Distilling hurt"
    else:
        judged = "No clear difference"
    return (
        f"{judged}: {value:+.2f} points of accuracy against labels alone "
        f"(95 % interval over test images {low:+.2f} … {high:+.2f}; one seed)."
    )


def _role(name: str, networks: Mapping[str, Classifier], teachers: Mapping[str, Classifier]) -> str:
    if name in networks:
        return "student" if name == "student" else "control"
    return "teacher" if name in teachers else "ensemble"
