"""The points of a study: which settings of `distill` are compared, and with which each is compared."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from ensemble_kd.config import SHORT, Merged, flat, resolve, values_of
from ensemble_kd.errors import ConfigError, Problem
from ensemble_kd.fields import Count, Names
from ensemble_kd.schema import DistillOptions, TrainOptions

SOFT = (
    "soft_weight", "temperature", "loss", "loss_numbers", "soft_schedule", "soft_epochs", "feature_weight",
    "unlabelled", "unlabelled_only",
)  # fmt: skip
"""Options that say how soft targets are learned from: without soft targets they say nothing."""
_IDLE = ("temperature", "loss", "loss_numbers", "soft_schedule", "soft_epochs")
"""Those that say nothing at soft weight 0, whatever else is learned from."""
ARM, LABELS = "arm", "labels"
_OWN = ("seed", "out", "overwrite", "device")
"""Options of distill that a study sets itself, at every point."""
_LONGEST = 100


def _table(value: Any) -> Any:
    """`a=1,2` texts, as `--over` gives them, to a table of lists; an option that is named again gets more values."""
    if not isinstance(value, (list, tuple)):
        return value
    table: dict[str, list[Any]] = {}
    for item in value:
        name, _, text = str(item).partition("=")
        table.setdefault(name.strip(), []).extend(values_of(text))
    return table


def _options(value: Any) -> Any:
    """`a=1,b=2`, as `--baseline` gives it, to a table."""
    if not isinstance(value, str) or "=" not in value:
        return value
    pairs = (part.partition("=") for part in value.split(","))
    return {name.strip(): values_of(text)[0] for name, _, text in pairs}


class StudyOptions(DistillOptions):
    """`ekd study`: options of `distill` that all points share, and those in which they differ."""

    study: str | None = Field(None, description="a study's file, or its name in examples/studies")
    over: Annotated[dict[str, list[Any]], BeforeValidator(_table)] = Field(
        {},
        description="NAME=A,B,...: an option of distill and the values it takes; repeatable",
        examples=[{"temperature": [1, 4]}],
    )
    arms: dict[str, dict[str, Any]] = Field(
        {}, description="named sets of options, each crossed with the values of over"
    )
    seeds: Count = Field(3, description="seeds of each point: 0, 1, ...")
    baseline: Annotated[Literal["labels", "none"] | dict[str, Any], BeforeValidator(_options)] = Field(
        "labels", description="labels (the same student on labels alone), none, or options of a point"
    )
    before: list[dict[str, Any]] = Field([], description="networks that `ekd train` makes first")
    question: str = Field("", description="what the study asks, in words")
    measures: Names = Field(["accuracy", "agreement", "nll"], description="measures that are pictured")
    controls: Names = Field([], description="of each point; the study has a baseline of its own")
    analyses: list[Literal["features", "surface"]] = Field(
        [], description="made of every run, beside its controls: features, surface"
    )
    jobs: Count = Field(1, description="processes that share the points")
    fleet: bool = Field(True, description="train points that differ in numbers only together, on a GPU")

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """See `Options.cross_checks`; the options of distill are checked point by point."""
        if not self.over and not self.arms:
            problem = Problem(
                "over: nothing is varied",
                "a study compares settings",
                "say --over temperature=1,2,4, or name arms in its file",
            )
            return [({"over", "arms"}, problem)]
        if "seed" in self.over or self.seed != type(self).model_fields["seed"].default:
            place = "over" if "seed" in self.over else "seed"
            problem = Problem(
                f"{place}: a study varies the seed itself", "each point has seeds 0, 1, …", "say --seeds N"
            )
            return [({place}, problem)]
        named = {"over": self.over, **{f"arms.{arm}": given for arm, given in self.arms.items()}}
        own = [(place, name) for place, given in named.items() for name in given if name in _OWN]
        found = [
            Problem(f"{place}: {name} cannot differ by point", "a study sets it itself", "leave it out")
            for place, name in own
        ]
        empty = [name for name, values in self.over.items() if not values]
        found += [Problem(f"over: {name} has no values", "", f"say --over {name}=A,B") for name in empty]
        return [({"over", "arms"}, problem) for problem in found]


@dataclass(frozen=True)
class Point:
    """One setting of a study, which is trained from several seeds."""

    name: str
    """Its settings as text."""
    settings: Mapping[str, Any]
    """Values by dimension, in their order; a baseline on labels has none where they say nothing."""
    given: Mapping[str, Any]
    """Options of `distill`, without a seed."""
    baseline: str | None
    """The point that it is compared with; None for a baseline itself."""
    on_grid: bool = False
    """Whether it is one of the points that were asked for."""

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", self.name)
        if name == self.name and len(name) <= _LONGEST:
            return name
        return f"{name[:_LONGEST]}-{sha256(self.name.encode()).hexdigest()[:8]}"

    def options(self, seed: int, **more: Any) -> DistillOptions:
        """The options of one run.

        Raises:
            ConfigError: they do not go together.
        """
        return resolve(DistillOptions, {**self.given, "seed": seed, **more})


def points_of(options: StudyOptions, before: Path) -> dict[str, Point]:
    """All points by name: first those of the grid, then the baselines that are not on it.

    Args:
        before: the folder of the networks that are trained first, which `{before}` stands for.

    Raises:
        ConfigError: an option is unknown, or a point cannot be; everything that is wrong, at once.
    """
    options = options.model_copy(update={"arms": _filled(options.arms, "{before}", before)})
    shared = _filled(_shared(options), "{before}", before)
    points: dict[str, Point] = {}
    for settings, given in _grid(options, shared):
        partner = _partner(options, settings, given, shared)
        own = replace(_point(settings, given), on_grid=True)
        other = _point(*partner) if partner else own
        if options.baseline == LABELS and other.name != own.name and _same(own.given, other.given):
            points.setdefault(other.name, other)  # one student on labels will do for all temperatures
            continue
        points[own.name] = replace(own, baseline=other.name) if other.name != own.name else own
        points.setdefault(other.name, other)
    ordered = sorted(points.values(), key=lambda point: point.baseline is None and options.baseline != "none")
    _check(ordered)
    return {point.name: point for point in ordered}


def training_before(options: StudyOptions, before: Path) -> list[TrainOptions]:
    """The networks that are trained first, each into a folder of its `name` in `before`.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    known = set(TrainOptions.model_fields) - {"training", "out", "seed"}
    shared = {name: value for name, value in _shared(options).items() if name in known}
    made = []
    for given in options.before:
        rest = {option: value for option, value in given.items() if option != "name"}
        made.append(resolve(TrainOptions, {**shared, **rest, "out": before / _name_of(given)}))
    names = [_name_of(given) for given in options.before]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(
            f"before: {', '.join(twice)} is there twice",
            "a network is kept under its name",
            "give each a name: {name: weak, model: …}",
        )
    return made


def _name_of(network: Mapping[str, Any]) -> str:
    """The name of a network of `before`, which is that of its folder."""
    return str(network.get("name", network.get("model", "")))


def located(options: StudyOptions, home: Path) -> StudyOptions:
    """The same, with `{here}` replaced by `home`, the folder of the study's file."""
    given = {name: getattr(options, name) for name in options.model_fields_set & {"arms", "before", "over"}}
    return options.model_copy(update=_filled(given, "{here}", home))


def _filled(value: Any, name: str, path: Path) -> Any:
    """The value with a path in place of its name in all texts."""
    if isinstance(value, str):
        return value.replace(name, str(path))
    if isinstance(value, Mapping):
        return {key: _filled(inner, name, path) for key, inner in value.items()}
    return [_filled(inner, name, path) for inner in value] if isinstance(value, (list, tuple)) else value


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of distill from several places, each name of a table by itself; the last counts."""
    merged = Merged(DistillOptions)
    for layer in layers:
        for name, value in layer.items():
            merged.assign(SHORT.get(name, name), value, "")
    return merged.values


def _shared(options: StudyOptions) -> dict[str, Any]:
    """What all points share, of what was given."""
    own = set(StudyOptions.model_fields) - set(DistillOptions.model_fields)
    given = options.model_dump(exclude_unset=True, exclude={*own, "seed", "out", "overwrite"})
    return {"controls": ["none"], **given}


def _grid(
    options: StudyOptions, shared: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings and options of each point of the grid."""
    arms: Mapping[str, Mapping[str, Any]] = options.arms or {"": {}}
    for (arm, more), values in itertools.product(arms.items(), itertools.product(*options.over.values())):
        varied = dict(zip(options.over, values, strict=True))
        settings = ({ARM: arm} if options.arms else {}) | varied
        yield settings, _merged(shared, more, varied)


def _partner(
    options: StudyOptions, settings: Mapping[str, Any], given: Mapping[str, Any], shared: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and options of the point that this one is compared with."""
    if options.baseline == "none":
        return None
    if options.baseline == LABELS:
        soft = {ARM} if all(_is_soft(name) for arm in options.arms.values() for name in arm) else set()
        plain = {name: value for name, value in given.items() if not _is_soft(name)}
        kept = [name for name in settings if name == "soft_weight" or not (_is_soft(name) or name in soft)]
        return {**{name: settings[name] for name in kept}, "soft_weight": 0.0}, {**plain, "soft_weight": 0.0}
    assert isinstance(options.baseline, dict)
    changed = dict(options.baseline)
    arm = changed.pop(ARM, None)
    if arm is not None and arm not in options.arms:
        raise ConfigError(
            f"baseline: there is no arm {arm!r}",
            f"the arms are {', '.join(options.arms) or 'none'}",
            "name one of these",
        )
    over = {name: value for name, value in settings.items() if name != ARM}
    chosen = options.arms.get(arm or settings.get(ARM, ""), {})
    named = {ARM: arm} if arm is not None else {}
    return {**settings, **named, **changed}, _merged(shared, chosen, over, changed)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two sets of options with no soft weight train the same student."""
    first, second = ({n: v for n, v in given.items() if n not in _IDLE} for given in (one, other))
    return first == second


def _is_soft(name: str) -> bool:
    return SHORT.get(name, name).partition(".")[0] in SOFT


def _point(settings: Mapping[str, Any], given: Mapping[str, Any]) -> Point:
    name = ",".join(f"{name}={shown(value)}" for name, value in settings.items())
    return Point(name, dict(settings), dict(given), None)


def shown(value: Any) -> str:
    """A value of a setting as text."""
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(shown, value))
    if isinstance(value, Mapping):
        return "+".join(f"{name}:{shown(inner)}" for name, inner in value.items())
    return str(value)


def _check(points: list[Point]) -> None:
    problems: list[Problem] = []
    for point in points:
        try:
            point.options(0)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)


def facts(options: StudyOptions) -> dict[str, Any]:
    """What all points of a study depend on, besides their own settings."""
    free = {
        "analyses",
        "seed",
        "device",
        "over",
        "seeds",
        "baseline",
        "question",
        "measures",
        "fleet",
        "arms",
        "before",
    }
    shared = json.loads(StudyOptions.model_dump_json(options, exclude_unset=True))
    left_out = free | {"study", "out", "overwrite", "jobs"}
    kept = {name: value for name, value in shared.items() if name not in left_out}
    first = {f"before.{_name_of(given)}": given for given in shared.get("before", [])}
    return flat(kept) | {f"arms.{name}": arm for name, arm in shared.get("arms", {}).items()} | first


def to_yaml(options: StudyOptions) -> str:
    """The study as YAML, as it was given, so that it can be run again."""
    left_out = {"study", "out", "overwrite", "jobs"}
    values = options.model_dump(mode="json", exclude_unset=True, exclude=left_out)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
