"""Teachers by name: found in a file or the library, or trained now and kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ensemble_kd import distributed, files, pretrained, recipes
from ensemble_kd.classifier import Classifier, check_channels
from ensemble_kd.console import log
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ModelError, listing
from ensemble_kd.features import head_of
from ensemble_kd.fit import train_on_labels
from ensemble_kd.fresh import is_file, new_classifier, own_classifier, say_conversion
from ensemble_kd.interrupts import deferred
from ensemble_kd.loop import Engine
from ensemble_kd.models import ModelName, choose_form, choose_size, parse
from ensemble_kd.stepping import Recipe
from ensemble_kd.teachers import library
from ensemble_kd.teachers.class_map import ClassMap, MapFile, map_classes, read_map
from ensemble_kd.teachers.ensemble import Teacher


def load_teacher(
    name: str | ModelName,
    data: str | Dataset = "digits",
    *,
    size: int | None = None,
    stem: str = "auto",
    seed: int = 0,
    augment: str | None = None,
    training: Mapping[str, Any] | None = None,
    train: bool = True,
    device: str | torch.device = "auto",
    offline: bool = False,
    class_map: str | Path | None = None,
    engine: Engine | None = None,
) -> Teacher:
    """A frozen teacher that labels `data`.

    In this order: a run, a file of weights, a module that brings its own, or published weights with a
    class map; the teacher library; training now on the training split (from published weights where
    the name asks for them or they can be had), after which it is kept in the library.

    Args:
        name: see `models.parse`; a seed in the name (`resnet18#1`) goes before `seed`.
        data: a source's name, or a loaded data set.
        size: the side of its input in pixels, if not the one it would choose.
        stem: `auto`, or `imagenet` to keep the stock form on small images.
        augment: the policy of views to train with; None takes what suits the data.
        training: recipe numbers that differ from the default, such as `{"epochs": 3}`.
        train: whether it may be trained now.
        class_map: a file that says which of its classes are those of `data` (see `class_map.read_map`);
            the same names in another order need none.
        engine: how it is trained, if it is.

    Raises:
        ModelError: it cannot be had, its classes differ, or it would have to be trained and may not.
        WeightsError: its file is damaged.
    """
    model = parse(name) if isinstance(name, str) else name
    _check_own(model)
    dataset = load_data(data) if isinstance(data, str) else data
    target = device if isinstance(device, torch.device) else choose_device(device)
    seed = seed if model.seed is None else model.seed
    options: dict[str, Any] = {"size": size, "stem": stem, "offline": offline}
    if class_map is not None or _is_trained(model):
        file = read_map(Path(class_map)) if class_map is not None else None
        return _with_its_own_classes(model, dataset, file, options, target)
    options["seed"] = seed if model.seed is None else model.seed
    return _kept_or_trained(
        model, dataset, options, augment or dataset.augment, training or {}, train, target, engine
    )


def _with_its_own_classes(
    model: ModelName, dataset: Dataset, file: MapFile | None, options: dict[str, Any], device: torch.device
) -> Teacher:
    """A teacher that is trained already, whose classes are brought to those of the data."""
    names = file.teacher_classes if file else None
    classifier = own_classifier(model, dataset, names, **options)
    own = _named(model, classifier.classes, names)
    mapping = map_classes(own, dataset.classes, file, model.label, dataset.name)
    if mapping is not None:
        log.info("%s: %s", model.label, mapping.describe(own, dataset.classes))
    say_conversion(classifier.card.preprocess.channels, dataset, model.label)
    published = f"{model.canonical}@{model.weights}" if model.weights else model.canonical
    origin = str(Path(model.weights or model.arch)) if _is_trained(model) else published
    return Teacher.of(
        model.label, classifier.to(device), origin, storable=model.library != "py", class_map=mapping
    )


def check_teacher(
    name: ModelName,
    data: Dataset,
    *,
    size: int | None,
    stem: str,
    offline: bool,
    class_map: Path | None = None,
    features: bool = False,
) -> ClassMap | None:
    """Refuse what `load_teacher` would refuse, without training or fetching anything.

    With `features` also a network that has no penultimate features.

    Returns:
        The map of its classes, as far as it can be told without fetching it.

    Raises:
        ModelError, WeightsError, ConfigError: see `load_teacher`.
    """
    _check_own(name)
    known, mapping = None, None
    if class_map is not None or _is_trained(name):
        file = read_map(class_map) if class_map else None
        known, mapping = _check_classes(name, data, file, size, stem, offline)
    elif pretrained.is_wanted(name):
        pretrained.check(name, offline)
    else:
        form = choose_form(name, data.image_size, stem)
        classes, channels = len(data.classes), data.channels
        choose_size(
            name, num_classes=classes, channels=channels, image_size=data.image_size, form=form, wanted=size
        )
        if features:
            known = new_classifier(name, data, size=size, stem=stem, sketch=True, scratch=True)
    if features and known is not None:
        head_of(known, name.label)
    return mapping


def _check_published(name: ModelName) -> None:
    if pretrained.at_hand(name) == "none":
        raise ModelError(
            f"{name.label!r} has no published weights, so it has no classes of its own to map",
            "it would be trained on this data, with the classes of this data",
            f"leave {name.label} out of --class-map",
        )


def _named(name: ModelName, own: tuple[str, ...], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The teacher's classes: as the map lists them, where published weights are told by their number alone."""
    if names is None or names == own or names == tuple(map(str, range(len(own)))):
        return own
    if len(names) == len(own) and not _is_trained(name):
        return names
    raise ModelError(
        f"{name.label!r} has {len(own)} classes, and its class map names {len(names)} teacher_classes",
        f"its classes: {listing(own)}; in the map: {listing(names)}",
        "leave teacher_classes out: its weights name their classes",
    )


def _check_classes(
    name: ModelName, data: Dataset, file: MapFile | None, size: int | None, stem: str, offline: bool
) -> tuple[Classifier | None, ClassMap | None]:
    """The network, where it need not be fetched, and the map of its classes, where they are known."""
    names, known = file.teacher_classes if file else None, None
    if _is_trained(name):
        known = own_classifier(name, data, names, size=size, stem=stem, offline=offline, sketch=True)
        check_channels(data.channels, known.card.preprocess.channels)
        own: tuple[str, ...] | None = known.classes
    else:
        _check_published(name)
        pretrained.check(name, offline)
        own = pretrained.published_classes(name) or names
    own = own and _named(name, own, names)
    if own is None:  # a network on the hub says its classes when it is fetched
        return known, None
    return known, map_classes(own, data.classes, file, name.label, data.name)


def _check_own(name: ModelName) -> None:
    if name.weights == "own" and name.library != "py":
        raise ModelError(
            f"{name.label!r} brings no weights of its own",
            "only a module of yours can: py:FILE.py:factory@own",
            "leave @own out, and it is trained",
        )


def _kept_or_trained(
    model: ModelName,
    dataset: Dataset,
    options: dict[str, Any],
    policy: str,
    training: Mapping[str, Any],
    train: bool,
    device: torch.device,
    engine: Engine | None,
) -> Teacher:
    """From the library, or trained now and kept; what it is made from is told from a sketch."""
    wanted = _wanted(model, dataset, options, policy, training, train)
    sketch, recipe, made_from = wanted.sketch, wanted.recipe, wanted.made_from
    storable = model.library != "py"
    kept = _find(made_from, None if storable else model)
    if kept is not None:
        log.info("teacher %s: from the library", model.label)
        return Teacher.of(model.label, kept.to(device), str(library.folder_of(made_from)), storable)
    if not train:
        raise ModelError(
            f"teacher {model.label!r} is not in the library for {dataset.name} with this recipe",
            "it may not be trained now",
            f"train it first: ekd train {model.text} --data {dataset.name}",
        )
    with library.locked(made_from, model.label):
        # Another process may have trained it while this one waited.
        if (kept := _find(made_from, None if storable else model)) is not None:
            return Teacher.of(model.label, kept.to(device), str(library.folder_of(made_from)), storable)
        classifier = sketch if sketch.pretrained else new_classifier(model, dataset, **options, scratch=True)
        folder = _train_and_keep(model.label, classifier, dataset, recipe, policy, device, made_from, engine)
    return Teacher.of(model.label, classifier, str(folder), storable)


class Wanted(NamedTuple):
    """A teacher that is in the library or would be trained: its form, how it is trained, what it is made from."""

    sketch: Classifier
    recipe: Recipe
    made_from: dict[str, Any]


def _wanted(
    model: ModelName,
    dataset: Dataset,
    options: dict[str, Any],
    policy: str,
    training: Mapping[str, Any],
    train: bool,
) -> Wanted:
    offline = options["offline"] or not train
    sketch = new_classifier(model, dataset, **{**options, "offline": offline}, sketch=True)
    recipe = recipes.teacher_recipe(sketch, len(dataset.train), training)
    made_from = _made_from(model, sketch, dataset, recipe, policy, options["seed"])
    return Wanted(sketch, recipe, made_from)


def look_up(
    model: ModelName,
    data: Dataset,
    *,
    size: int | None,
    stem: str,
    seed: int,
    augment: str | None,
    training: Mapping[str, Any],
    device: torch.device,
) -> tuple[Teacher, Recipe | None]:
    """The teacher as `load_teacher` would give it; one that would have to be trained is untrained, with its recipe.

    Nothing is fetched, trained or written. For teachers that come without a class map and without weights.
    """
    seed = seed if model.seed is None else model.seed
    options: dict[str, Any] = {"size": size, "stem": stem, "seed": seed, "offline": True}
    wanted, storable = (
        _wanted(model, data, options, augment or data.augment, training, True),
        model.library != "py",
    )
    kept = _find(wanted.made_from, None if storable else model)
    if kept is not None:
        folder = str(library.folder_of(wanted.made_from))
        return Teacher.of(model.label, kept.to(device), folder, storable), None
    fresh = (
        wanted.sketch if wanted.sketch.pretrained else new_classifier(model, data, **options, scratch=True)
    )
    return Teacher.of(model.label, fresh.to(device), "untrained", storable), wanted.recipe


def _find(made_from: dict[str, Any], code: ModelName | None) -> Classifier | None:
    """From the library, in all processes or in none."""
    if not distributed.first():
        return library.find(made_from, code) if distributed.told(False) else None
    kept = library.find(made_from, code)
    distributed.told(kept is not None)
    return kept


def _is_trained(name: ModelName) -> bool:
    return name.library == "file" or is_file(name.weights) or name.weights == "own"


def _made_from(
    name: ModelName, classifier: Classifier, data: Dataset, recipe: Recipe, policy: str, seed: int
) -> dict[str, Any]:
    """All that a trained teacher depends on; equal facts mean the same teacher."""
    return {
        "model": name.canonical,
        "code": files.sha256_file(Path(name.arch.rpartition(":")[0]).expanduser())
        if name.library == "py"
        else None,
        "published": classifier.pretrained and classifier.fingerprint(),
        "card": classifier.card.to_json() | {"data": None},
        "data": data.name,
        "pixels": data.fingerprint(),
        "recipe": recipe.to_json(),
        "augment": policy,
        "seed": seed,
    }


def _train_and_keep(
    label: str,
    classifier: Classifier,
    data: Dataset,
    recipe: Recipe,
    policy: str,
    device: torch.device,
    made_from: dict[str, Any],
    engine: Engine | None,
) -> Path:
    pre = classifier.card.preprocess
    log.info(
        "teacher %s: training on %s at %d×%d, %d epochs",
        label,
        data.name,
        pre.size[0],
        pre.size[1],
        recipe.epochs,
    )
    with deferred():  # who asks to stop at the very end finds the teacher kept
        checkpoints = library.checkpoints(made_from)
        history = train_on_labels(
            classifier,
            data,
            recipe,
            policy,
            seed=made_from["seed"],
            device=device,
            description=f"teacher {label}",
            engine=engine,
            checkpoints=checkpoints,
        )
        rows = [{key: value for key, value in row.items() if key != "profile"} for row in history]
        folder = library.keep(classifier, made_from, {"val": history[-1]["val"], "history": rows})
        checkpoints.clear()
    log.info(
        "teacher %s: validation accuracy %.3f, kept in %s", label, history[-1]["val"]["accuracy"], folder
    )
    return folder


def can_be_trained(name: ModelName, class_map: Path | None = None) -> bool:
    """Whether it is trained here, so that another seed gives another."""
    return not _is_trained(name) and class_map is None
