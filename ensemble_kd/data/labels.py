"""Labels as they are written beside images, numbers or names, to classes and their indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ensemble_kd.data.folders import Folder
from ensemble_kd.data.streams import shortened
from ensemble_kd.errors import Problem, listing, nearest

Label = int | str


def enter_labels(
    labels: dict[str, list[Label]],
    folder: Folder,
    where: str,
    otherwise: str,
    named: tuple[str, Sequence[str]] | None = None,
) -> None:
    """Enter class names, and the labels of each split of `folder`: numbers where all labels are numbers, names else.

    Args:
        labels: of the images in `folder.files`, by split; the first split is the one to train on.
        where: what images are added to, in messages.
        otherwise: what else a label that only other splits have can be mended by, in messages.
        named: who names the classes, and their names in order: numbers then count from the first. Without it
            classes are the labels of the first split, sorted.
    """
    numbers = all(isinstance(label, int) for found in labels.values() for label in found)
    if not numbers:
        labels = {name: list(map(str, found)) for name, found in labels.items()}
    first = set(next(iter(labels.values())))
    known: list[Label]
    if named is None:
        known = sorted(first)
        folder.classes = tuple(map(str, known))
    else:
        folder.classes = tuple(named[1])
        known = list(range(len(folder.classes))) if numbers else list(folder.classes)
    index = {label: number for number, label in enumerate(known)}
    for name, found in labels.items():
        fix = f"add such images to the training {where}, or {otherwise}"
        folder.errors += _unknown(name, found, index, folder, named[0] if named else None, fix)
        folder.labels[name] = torch.tensor([index.get(label, -1) for label in found], dtype=torch.int64)
    if len(folder.classes) == 1:
        folder.errors.append(
            Problem(
                f"{folder.root} has one class only: {folder.classes[0]!r}",
                "there is nothing to tell apart",
                f"add {where} with a second class",
            )
        )
    absent = [cls for cls, label in zip(folder.classes, known, strict=True) if label not in first]
    if absent and named:
        folder.warnings.append(
            Problem(
                f"{folder.root}: no training image is of the classes {listing(absent)}",
                f"{named[0]} names them",
            )
        )


def _unknown(
    split: str, labels: list[Label], index: dict[Label, int], folder: Folder, namer: str | None, fix: str
) -> list[Problem]:
    """Each label that is no class, with the first image that has it."""
    if not set(labels) - index.keys():
        return []
    problems = []
    for label in dict.fromkeys(label for label in labels if label not in index):
        place = folder.root / folder.files[split].names[labels.index(label)]
        if namer is None:
            why = "no training image has that label, so a student cannot learn it"
        elif isinstance(label, int):
            why = f"{namer} names {len(index)} classes, 0…{len(index) - 1}"
            fix = "mend the label, or name the class"
        else:
            why = f"{namer} does not name it"
            fix = nearest(label, map(str, index)) or "mend the label, or name the class"
        problems.append(Problem(f"the label {label!r} of {place} is no class", why, fix))
    return shortened(problems, "labels that are no class")
