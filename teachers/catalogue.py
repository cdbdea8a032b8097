"""What models there are: size, input, and whether weights are at hand."""

from __future__ import annotations

from typing import Any

import torch

from ensemble_kd import models, pretrained
from ensemble_kd.console import progress
from ensemble_kd.errors import ModelError, nearest
from ensemble_kd.students import STUDENTS
from ensemble_kd.teachers import library

_OWN_SIZE = 32


def list_models(pattern: str | None = None, limit: int = 40) -> dict[str, Any]:
    """Models whose name contains `pattern` or matches it as a shell pattern.

    Without a pattern the project's own networks are listed, and the others counted.

    Returns:
        `models`: rows of `name`, `parameters`, `input_size` (C, H, W) and `weights` (`cached`,
        `download`, `none`), the stock form for 1000 classes, own networks for 10; `matches`: how many
        there are in all; `trained`: teachers in the library.

    Raises:
        ModelError: nothing matches.
    """
    found = [models.parse(name) for name in STUDENTS] if pattern is None else models.find(pattern)
    trained = [
        {
            "name": kept["made_from"]["model"],
            "data": kept["made_from"]["data"],
            "seed": kept["made_from"]["seed"],
            "val_accuracy": kept["results"]["val"]["accuracy"],
            "folder": str(kept["folder"]),
        }
        for kept in library.kept()
        if pattern is None or any(kept["made_from"]["model"] == name.canonical for name in found)
    ]
    if not found:
        library_named, colon, part = str(pattern).rpartition(":")
        hint = nearest(
            str(pattern) if colon else part,
            [name.canonical if colon else name.arch for name in models.find(f"{library_named}{colon}*")],
        )
        raise ModelError(
            f"no model matches {pattern!r}",
            "neither this project, timm nor torchvision has one",
            hint or "try a shorter part of the name",
        )
    rows = []
    with progress("looking", min(limit, len(found))) as advance:
        for name in found[:limit]:
            rows.append(_row(name))
            advance(1)
    return {"matches": len(found), "models": rows, "trained": trained}


def _row(name: models.ModelName) -> dict[str, Any]:
    own = name.library == "own"
    size, classes = (_OWN_SIZE, 10) if own else (models.library_size(name), 1000)
    try:
        with torch.device("meta"):
            net = models.build(name, num_classes=classes, channels=3, size=size)
        parameters: int | None = sum(p.numel() for p in net.parameters())
    except (RuntimeError, NotImplementedError):  # a few networks cannot be built without memory
        parameters = models.published_count(name)
    return {
        "name": name.canonical,
        "parameters": parameters,
        "input_size": [3, size, size],
        "weights": pretrained.at_hand(name),
    }
