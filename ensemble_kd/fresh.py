"""A classifier for a data set, before training: its form, input size, normalisation and first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemble_kd import pretrained
from ensemble_kd.classifier import Card, Classifier, Preprocess, check_channels, fit_channels
from ensemble_kd.console import log
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.errors import ModelError, listing
from ensemble_kd.models import ModelName, build, choose_form, choose_size
from ensemble_kd.weights import fill, has_card, load_classifier, read_tensors, weights_path


def is_file(weights: str | None) -> bool:
    """Whether what stands behind the @ of a name is a file rather than a tag."""
    return weights is not None and weights.endswith((".safetensors", ".pth", ".pt", ".bin"))


def new_classifier(
    name: ModelName,
    data: Dataset,
    *,
    size: int | None = None,
    stem: str = "auto",
    seed: int = 0,
    offline: bool = False,
    sketch: bool = False,
    scratch: bool = False,
) -> Classifier:
    """Build the network that `name` means for `data`; the same seed gives the same weights.

    A `sketch` has no memory for its weights where they would be fresh: it tells form, size and kind.
    `scratch` looks for no published weights, after a sketch found that there are none.

    Published weights are taken where the name asks for them. Where it does not, stock networks on
    images over 64 pixels start from them if they can be had, and say so if not.

    Raises:
        ModelError: the network cannot be built, or not for these images.
        WeightsError: a file of weights does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.library == "file":
            return for_data(load_classifier(weights_path(Path(name.arch).expanduser())), data, name.label)
        if is_file(name.weights) and has_card(file := Path(str(name.weights)).expanduser()):
            return for_data(load_classifier(file, code=name), data, name.label)
        if name.note and not sketch:
            log.info("%s", name.note)
        return _build(name, data, size, stem, offline, sketch, scratch)


def own_classifier(
    name: ModelName,
    data: Dataset,
    names: tuple[str, ...] | None = None,
    *,
    size: int | None = None,
    stem: str = "auto",
    offline: bool = False,
    sketch: bool = False,
) -> Classifier:
    """A trained network with its own classes, whatever those of `data` are.

    Args:
        names: its classes, for weights that do not name them.

    Raises:
        ModelError: it has no weights, or its classes are not known.
        WeightsError: its file is damaged or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name.library == "file":
            return load_classifier(weights_path(Path(name.arch).expanduser()))
        if is_file(name.weights) and has_card(file := Path(str(name.weights)).expanduser()):
            return load_classifier(file, code=name)
        if is_file(name.weights) or name.weights == "own":
            named = replace(data, classes=names) if names else data
            return _build(name, named, size, stem, offline, sketch, scratch=False)
        loaded = pretrained.load(name, None, 3, size, offline)
    classes = loaded.classes or names
    if classes is None or len(classes) != loaded.outputs:
        raise ModelError(
            f"the {loaded.outputs} classes of {name.label!r} are not known",
            "its weights do not name them, and they are not those of ImageNet",
            "name them all in the class map, in order: teacher_classes: [...] beside map:",
        )
    log.info("%s keeps its %d classes from %s", name.label, len(classes), loaded.origin)
    return _published_classifier(name, loaded, classes, data)


def _build(
    name: ModelName, data: Dataset, size: int | None, stem: str, offline: bool, sketch: bool, scratch: bool
) -> Classifier:
    form = choose_form(name, data.image_size, stem)
    classes, channels = len(data.classes), data.channels
    loaded = None
    if not is_file(name.weights) and name.weights != "own" and not scratch:
        loaded = _published(name, classes, channels, size, form, offline)
    if loaded is not None:
        log.info("%s starts from %s", name.label, loaded.origin)
        if not sketch:
            say_conversion(loaded.channels, data, name.label)
        return _published_classifier(name, loaded, data.classes, data)
    side = choose_size(
        name, num_classes=classes, channels=channels, image_size=data.image_size, form=form, wanted=size
    )
    empty = sketch and name.library != "py" and not is_file(name.weights)
    net = _net(name, empty, num_classes=classes, channels=channels, size=side, form=form)
    took = 3 if name.library == "tv" else channels
    mean, std = (fit_channels(values, took) for values in data.mean_and_std)
    pre = Preprocess(took, (side, side), mean, std)
    if is_file(name.weights):
        path = Path(str(name.weights)).expanduser()
        fill(net, read_tensors(path), path)
        if not sketch:
            log.warning("%s names neither classes nor normalisation: those of %s are taken", path, data.name)
    if not sketch:
        say_conversion(pre.channels, data, name.label)
    card = Card(name.canonical, form, pre, data.classes, data.name)
    return Classifier(net, card, pretrained=is_file(name.weights))


def _published_classifier(
    name: ModelName, loaded: pretrained.Pretrained, classes: tuple[str, ...], data: Dataset
) -> Classifier:
    """In its stock form, which published weights need."""
    model = name.canonical
    if name.library == "hf-hub":  # the card names what can be built without the hub
        model = f"timm:{loaded.net.pretrained_cfg['architecture']}"  # type: ignore[index]
    pre = Preprocess(loaded.channels, (loaded.size, loaded.size), loaded.mean, loaded.std)
    return Classifier(loaded.net, Card(model, "stock", pre, classes, data.name), pretrained=True)


def _net(name: ModelName, empty: bool, **facts: Any) -> nn.Module:
    """The network, without memory if it may be empty and can be."""
    if empty:
        try:
            with torch.device("meta"):
                return build(name, **facts)
        except NotImplementedError:
            pass  # a few networks compute with their first weights
    return build(name, **facts)


def _published(
    name: ModelName, classes: int, channels: int, size: int | None, form: str, offline: bool
) -> pretrained.Pretrained | None:
    wanted = pretrained.is_wanted(name)
    if not wanted and (form == "small" or name.library not in ("timm", "tv")):
        return None
    if wanted and form == "small":
        log.info("%s keeps its stock form, which its published weights need", name.label)
    try:
        return pretrained.load(name, classes, channels, size, offline)
    except ModelError as error:
        if wanted:
            raise
        log.warning("%s starts from scratch: %s", name.label, error.problems[0].why)
        return None


def for_data(classifier: Classifier, data: Dataset, label: str) -> Classifier:
    """The classifier, if its classes are those of `data` in the same order.

    Raises:
        ModelError: they are not; shows both lists.
    """
    own, wanted = classifier.classes, data.classes
    if own == wanted:
        say_conversion(classifier.card.preprocess.channels, data, label)
        return classifier
    both = f"its classes: {listing(own)}; those of {data.name}: {listing(wanted)}"
    if len(own) != len(wanted):
        what = f"{label!r} has {len(own)} classes, and {data.name} has {len(wanted)}"
    elif set(own) == set(wanted):
        what = f"{label!r} has the classes of {data.name} in another order"
    else:
        what = f"{label!r} has other classes than {data.name}"
    raise ModelError(
        what, both, f"train it on this data: ekd train {classifier.card.model} --data {data.name}"
    )


def say_conversion(takes: int, data: Dataset, label: str) -> None:
    """Log that a network which `takes` so many channels sees converted images.

    Raises:
        ModelError: they cannot be converted.
    """
    check_channels(data.channels, takes)
    if takes != data.channels:
        log.info("%s takes %s: the %s images are converted", label, _colour(takes), _colour(data.channels))


def _colour(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
