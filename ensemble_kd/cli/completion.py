"""What a shell is offered after a flag; nothing heavy is imported for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin

OWN = ("lenet", "cifar-quick", "resnet8", "resnet20")
"""The project's own networks."""
SOURCES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder:")
_LISTS = {
    "teachers": "models",
    "student": "models",
    "model": "models",
    "models": "models",
    "path": "models",
    "data": "data",
}


def for_option(name: str, annotation: Any) -> Callable[[str], list[str]] | None:
    """What completes the values of an option: names of models or data, or its choices; None where neither fits."""
    if name == "track":
        return lambda incomplete: offered(incomplete, ("tensorboard", "wandb", "trackio"))
    if name in _LISTS:
        find = _models if _LISTS[name] == "models" else lambda: list(SOURCES)
        return lambda incomplete: offered(incomplete, find())
    choices = _choices(annotation)
    return (lambda incomplete: offered(incomplete, choices)) if choices else None


def offered(incomplete: str, known: Sequence[str]) -> list[str]:
    """The known names that continue what was typed; of a list with commas, its last part."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in known if name.startswith(last)]


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _models() -> list[str]:
    """Own networks, teachers of the library, and runs here."""
    from pathlib import Path

    from ensemble_kd.files import cache_dir

    found = list(OWN)
    with suppress(OSError):
        for facts in sorted((cache_dir() / "teachers").glob("*/teacher.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                found.append(str(json.loads(facts.read_text(encoding="utf-8"))["made_from"]["model"]))
        found += [str(path.parent) for path in sorted(Path("runs").glob("*/status.json"))]
    return list(dict.fromkeys(found))
