"""From a teacher's classes to those of the data: reordered, grouped, or a part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ensemble_kd.errors import ConfigError, ModelError, Problem, listing, nearest, shortened
from ensemble_kd.imagenet import aliases
from ensemble_kd.yamls import read_names

NO_VOTE = -1e4
"""The logit of a class that a teacher does not know: no probability, and finite in any precision."""
_DIGITS = 6
"""Of numbers of classes: no teacher has a million."""


@dataclass(frozen=True)
class ClassMap:
    """`groups[c]` holds the teacher's outputs that together are class c of the data; none if it knows none."""

    groups: tuple[tuple[int, ...], ...]

    @cached_property
    def known(self) -> Bool[Tensor, " C"]:
        """Which classes of the data the teacher knows."""
        return torch.tensor([bool(group) for group in self.groups])

    @cached_property
    def _index(self) -> Tensor:
        """Outputs by class (C, M), padded with −1."""
        width = max(map(len, self.groups))
        return torch.tensor([[*group, *[-1] * (width - len(group))] for group in self.groups])

    def apply(self, logits: Float[Tensor, "N outputs"]) -> Float[Tensor, "N C"]:
        """The logits of the data's classes: log of each group's probability, at temperature 1.

        Where each class is one output, these are the outputs themselves, whatever lies beside them.
        """
        index = self._index.to(logits.device)
        if index.shape[1] == 1:
            picked = logits[:, index[:, 0].clamp_min(0)]
        else:
            padded = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=1)
            picked = padded[:, index].logsumexp(dim=2)  # −1 picks the padding
        if all(self.groups):
            return picked
        known = self.known.to(logits.device)
        inside = torch.log_softmax(picked.masked_fill(~known, -torch.inf), dim=1)
        return inside.masked_fill(~known, NO_VOTE)

    def describe(self, own: Sequence[str], wanted: Sequence[str]) -> str:
        """Which of the teacher's classes `own` became which of the data's, in words."""
        pairs = zip(wanted, self.groups, strict=True)
        named = [f"{name} ← {' + '.join(own[k] for k in group) or 'not known'}" for name, group in pairs]
        return listing(named)

    def discarded(self, logits: Float[Tensor, "N outputs"]) -> Float[Tensor, " N"]:
        """The probability that the teacher gives to outputs outside the map, at temperature 1."""
        kept = sorted(output for group in self.groups for output in group)
        return 1 - torch.softmax(logits.double(), dim=1)[:, kept].sum(dim=1)


@dataclass(frozen=True)
class MapFile:
    """What a class map says: classes of the data by the teacher's, and perhaps the teacher's own list."""

    path: Path
    groups: Mapping[str, Sequence[str]]
    teacher_classes: tuple[str, ...] | None = None


def read_map(path: Path) -> MapFile:
    """Read a class map.

    YAML: each class of the data with the teacher's class, or a list of them, by name or by number.
    Or, for weights that do not name their classes, `teacher_classes:` (a list of names, or how many)
    beside `map:` with that table.

    Raises:
        ConfigError: the file is no class map.
    """
    table: Any = read_names(path.expanduser(), "--class-map")
    names = None
    if set(table) == {"teacher_classes", "map"} and isinstance(table["map"], dict):
        names, table = _listed(path, table["teacher_classes"]), table["map"]
    groups = {}
    for name, group in table.items():
        members = group if isinstance(group, list) else [group] if group not in ("", "~", "null") else []
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(
                f"{path}: {name!r} has {shortened(repr(group))}",
                "a class of the data takes the teacher's class, or a list of them",
                f"say {name}: [first class, second class]",
            )
        groups[str(name)] = members
    return MapFile(path, groups, names)


def _listed(path: Path, listed: Any) -> tuple[str, ...]:
    """The teacher's own classes: a list of names, or how many there are."""
    if isinstance(listed, str) and _is_number(listed):
        return tuple(map(str, range(int(listed))))
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(
            f"{path}: teacher_classes is {shortened(repr(listed))}",
            "it should be the list of the teacher's classes in order, or how many there are",
            "say teacher_classes: [first, second, third]",
        )
    return tuple(listed)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS


def map_classes(
    own: Sequence[str], wanted: Sequence[str], file: MapFile | None, label: str, data: str
) -> ClassMap | None:
    """How a teacher's classes become the data's; None where they are the same in the same order.

    Without a file, equal names in another order are put in order.

    Raises:
        ModelError: the names differ and there is no file; shows both lists.
        ConfigError: with all that is wrong with the file.
    """
    if file is not None:
        return _by_file(own, wanted, file, label, data)
    if tuple(own) == tuple(wanted):
        return None
    if sorted(own) == sorted(wanted) and len(set(own)) == len(own):
        return ClassMap(tuple((own.index(name),) for name in wanted))
    if len(own) != len(wanted):
        what = f"{label!r} has {len(own)} classes, and {data} has {len(wanted)}"
    else:
        what = f"{label!r} has other classes than {data}"
    raise ModelError(
        what,
        f"its classes: {listing(own)}; those of {data}: {listing(wanted)}",
        f"say which are which: --class-map {label}=FILE.yaml, or train it on {data}",
    )


def _by_file(own: Sequence[str], wanted: Sequence[str], file: MapFile, label: str, data: str) -> ClassMap:
    found = _names_of(own)
    problems, used = [], dict[int, str]()
    groups: dict[str, list[int]] = {name: [] for name in wanted}
    for name, members in file.groups.items():
        if name not in groups:
            problems.append(_unknown(file, name, f"{data} has the classes", wanted))
            continue
        for member in members:
            outputs = [own.index(member)] if own.count(member) == 1 else found.get(member.lower(), [])
            if not outputs and _is_number(member) and int(member) < len(own):
                outputs = [int(member)]
            if len(outputs) != 1:
                problems.append(
                    _unknown(file, member, f"{label!r} has the classes", own)
                    if not outputs
                    else _ambiguous(file, member, [own[i] for i in outputs])
                )
            elif outputs[0] in used:
                problems.append(_twice(file, member, used[outputs[0]], name))
            else:
                used[outputs[0]] = name
                groups[name].append(outputs[0])
    if not problems and sum(map(bool, groups.values())) < 2:
        problems.append(
            Problem(
                f"{file.path} maps fewer than two classes of {data}",
                "a teacher of one class has nothing to tell",
                f"map classes of {data}: {listing(wanted)}",
            )
        )
    if problems:
        raise ConfigError(problems)
    return ClassMap(tuple(tuple(groups[name]) for name in wanted))


def _names_of(own: Sequence[str]) -> dict[str, list[int]]:
    """Every name under which a class may be called, in lower case, with its outputs."""
    found: dict[str, list[int]] = {}
    for output, name in enumerate(own):
        found.setdefault(name.lower(), []).append(output)
    for name, outputs in aliases(tuple(own)).items():
        found.setdefault(name, outputs)
    return found


def _unknown(file: MapFile, name: str, whose: str, known: Sequence[str]) -> Problem:
    return Problem(
        f"{file.path}: there is no class {name!r}",
        f"{whose} {listing(known)}",
        nearest(name, known) or "name one of these",
    )


def _ambiguous(file: MapFile, name: str, meant: Sequence[str]) -> Problem:
    return Problem(
        f"{file.path}: {name!r} is the name of {len(meant)} classes",
        f"they are {listing(meant)}",
        "name it in full, or by its number",
    )


def _twice(file: MapFile, member: str, first: str, second: str) -> Problem:
    where = f"under {first!r} and {second!r}" if first != second else f"under {first!r}"
    return Problem(
        f"{file.path}: the teacher's class {member!r} stands there twice, {where}",
        "its probability would count twice",
        "leave one out",
    )
