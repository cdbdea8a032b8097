"""Judging a trained model on a data set."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ensemble_kd.classifier import Classifier
from ensemble_kd.config import read_yaml, resolve
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device
from ensemble_kd.errors import RunError
from ensemble_kd.fresh import for_data
from ensemble_kd.inference import predict
from ensemble_kd.metrics import measure
from ensemble_kd.names import label_of
from ensemble_kd.schema import DataOptions, EvaluateOptions
from ensemble_kd.teachers.registry import load_teacher
from ensemble_kd.weights import load_student


def evaluate(
    path: str | Path | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Accuracy, top-5, NLL and ECE of a model on a source's test split, with 95 % intervals.

    Args:
        path: a run folder, a `.safetensors` file, or the name of a teacher in the library. A run, or
            a file in its folder, is judged on the run's data and splits unless `options` say otherwise.
        config_file: YAML with any of the options.
        sets: assignments such as `"on=val"`.
        options: the other fields of `schema.EvaluateOptions`.

    Returns:
        `data`, `split`, `n`, and `models` with one row.

    Raises:
        EkdError: the model or the data cannot be used, or their classes differ.
    """
    known = {} if path is None else _data_of_run(Path(path))
    given = {**known, **{k: v for k, v in options.items() if v is not None}, "path": path and str(path)}
    chosen = resolve(EvaluateOptions, given, file=Path(config_file) if config_file else None, sets=sets)
    data, device = load_data(**chosen.load_arguments()), choose_device(chosen.device)
    classifier = load_any(chosen.path, data, device)
    split = (data.test if chosen.on == "test" else data.val).to(device)
    row = {
        "role": "model",
        "parameters": classifier.parameter_count,
        "bytes": classifier.byte_count,
        **measure(predict(classifier, split), split.known_labels),
    }
    return {"data": data.name, "split": chosen.on, "n": len(split), "models": {label_of(chosen.path): row}}


def _data_of_run(path: Path) -> dict[str, Any]:
    """The data options of a run or of the run that a file lies in, so that its test images are the same."""
    config = (path if path.is_dir() else path.parent) / "config.yaml"
    if not config.is_file():
        return {}
    return {k: v for k, v in read_yaml(config).items() if k in DataOptions.model_fields and v is not None}


def load_any(name: str, data: Dataset, device: torch.device) -> Classifier:
    """A trained classifier for `data` by run folder, file or teacher's name; nothing is trained.

    Raises:
        EkdError: it cannot be had, or its classes differ.
    """
    path = Path(name).expanduser()
    if path.exists() or (name.endswith(".safetensors") and "@" not in name):
        if path.is_dir() and not any(path.glob("*.safetensors")):
            raise RunError(
                f"{name} holds no finished network",
                "the run did not finish",
                f"go on: ekd resume {shlex.quote(name)}",
            )
        return for_data(load_student(name, device), data, label_of(name))
    return for_data(load_teacher(name, data, train=False, device=device).classifier, data, label_of(name))
