"""Layers of any network: found by running it, and chosen by default or by pattern.

A layer is one call of a module: a ReLU that is used twice makes two layers. Names are those of
`named_modules`; the second call of `relu` is `relu@2`. Two more stand at the end of every network:
`penultimate`, what the last layer was given, and `logits`, what the network returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from ensemble_kd.classifier import Classifier
from ensemble_kd.errors import ConfigError, ModelError, listing, nearest
from ensemble_kd.features import head_of

PENULTIMATE, LOGITS = "penultimate", "logits"
FEWEST, MOST = 4, 24
"""Of the layers that are taken by default, beside penultimate and logits."""


class Layer(NamedTuple):
    """One call of a module; `seen` tells whether two layers hold the same numbers."""

    module: str
    call: int
    label: str
    seen: tuple[float, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """A network's layers in the order in which they finish."""

    label: str
    classifier: Classifier
    head: nn.Module
    """Whose input is the penultimate layer."""
    layers: Sequence[Layer]
    ends: Sequence[tuple[float, ...]]
    """`Layer.seen` of the penultimate layer and of the logits."""

    def by_default(self) -> list[Layer]:
        """The outputs of stages or blocks, or of single layers where there are none.

        Modules at the smallest depth at which at least four follow each other; a convolution or linear
        layer stands for itself and the normalisation, activation and pooling behind it, and gives what
        the last of these gave. Of more than 24, every second, third, … is taken.
        """
        modules = dict(self.classifier.net.named_modules())
        layers = list(takewhile(lambda layer: modules[layer.module] is not self.head, self.layers))
        for depth in range(1, max(name.count(".") for name in modules) + 2):
            units = list(_units(layers, modules, depth))
            if len(units) >= FEWEST:
                break
        units = [unit for unit in units if unit.seen not in self.ends]
        if len(units) <= MOST:
            return units
        return [units[i] for i in np.linspace(0, len(units) - 1, MOST).round().astype(int)]

    def matching(self, patterns: Sequence[str]) -> list[Layer]:
        """The layers whose name, with or without the number of the call, matches a shell pattern."""
        return [
            layer
            for layer in self.layers
            if any(fnmatchcase(name, p) for name in (layer.module, layer.label) for p in patterns)
        ]


def _units(layers: Sequence[Layer], modules: dict[str, nn.Module], depth: int) -> Iterator[Layer]:
    """Modules with weights at that depth, or shallower where they have no parts, as they ran."""
    called = {layer.module for layer in layers}
    group: Layer | None = None  # a convolution or linear layer, with what has followed it so far
    for layer in layers:
        if not _stands(layer.module, modules, called, depth):
            continue
        module = modules[layer.module]
        if any(p.ndim > 1 for p in module.parameters()):
            if group:
                yield group
            group = None
            if _has_parts(module):
                yield layer
            else:
                group = layer
        elif group and group.seen != layer.seen:
            group = layer
    if group:
        yield group


def _stands(name: str, modules: dict[str, nn.Module], called: set[str], depth: int) -> bool:
    """Whether the module is a unit at that depth: not inside another unit, and not to be opened."""
    if not name:
        return False
    parts = name.split(".")
    # Parts of a list that is itself never called take its place.
    above = [".".join(parts[:k]) for k in range(depth, len(parts))]
    opened = len(parts) >= depth or not _has_parts(modules[name])
    return opened and not any(parent in called for parent in above)


def _has_parts(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def examine(classifier: Classifier, label: str, images: Tensor) -> Anatomy:
    """Run a few raw images through a network, and note every call of every module.

    Raises:
        ModelError: it has no linear or convolutional layer that could be its last.
    """
    layers: list[Layer] = []
    calls: Counter[str] = Counter()
    ends: dict[str, tuple[float, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] += 1
            features = _tensor(output, len(images))
            if features is not None:
                layers.append(Layer(name, calls[name], "", _seen(features)))

        return hook

    def note_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ends[PENULTIMATE] = _seen(inputs[0])

    with in_eval_mode(classifier), exactly(), ExitStack() as hooks:
        head = _head(classifier, label)
        for name, module in classifier.net.named_modules():
            hooks.callback(module.register_forward_hook(note(name)).remove)
        hooks.callback(head.register_forward_pre_hook(note_input).remove)
        ends[LOGITS] = _seen(classifier(images))
    named = [
        layer._replace(label=f"{layer.module}@{layer.call}" if calls[layer.module] > 1 else layer.module)
        for layer in layers
        if layer.module
    ]
    return Anatomy(label, classifier, head, named, (ends[PENULTIMATE], ends[LOGITS]))


def _head(classifier: Classifier, label: str) -> nn.Module:
    try:
        return head_of(classifier, label)
    except ModelError as error:
        why = error.problems[0].why
        raise ModelError(f"{label!r} has no penultimate layer", why, "compare other networks") from error


def _seen(features: Tensor) -> tuple[float, ...]:
    x = features.flatten(1)
    weights = torch.linspace(0.5, 1.5, x.shape[1], dtype=torch.float64, device=x.device)
    return (x.shape[1], *(x.double() @ weights).tolist())


def _tensor(output: Any, count: int) -> Tensor | None:
    """The features of `count` samples in what a module returned: itself, or the first of several."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    usable = isinstance(first, Tensor) and first.ndim > 1 and first.is_floating_point()
    return first if usable and len(first) == count and first.numel() else None


def choose(anatomies: Sequence[Anatomy], patterns: Sequence[str]) -> list[tuple[Anatomy, list[Layer]]]:
    """Each network with its default layers, or with those that match a pattern, which may be none.

    Raises:
        ConfigError: a pattern matches no layer of any network.
    """
    if not patterns:
        return [(anatomy, anatomy.by_default()) for anatomy in anatomies]
    for pattern in patterns:
        if pattern in (PENULTIMATE, LOGITS) or any(anatomy.matching([pattern]) for anatomy in anatomies):
            continue
        longest = max(anatomies, key=lambda anatomy: len(anatomy.layers))
        names = [layer.label for layer in longest.layers]
        plain = not any(character in pattern for character in "*?[")
        every = [layer.label for anatomy in anatomies for layer in anatomy.layers]
        suggestion = nearest(pattern, every) if plain else ""
        raise ConfigError(
            f"layers: {pattern!r} matches no layer of any model",
            f"those of {longest.label} are {listing(names)}",
            suggestion or "give shell patterns such as 'layer?' or '*.conv1'",
        )
    return [(anatomy, anatomy.matching(patterns)) for anatomy in anatomies]


def reduce(features: Tensor, pool: str) -> Tensor:
    """Features (B, …) to (B, P).

    Args:
        features: maps (B, C, H, W), or (B, H, W, C) where H = W and these are not the last two; tokens
            (B, T, C); or anything else, which is only flattened.
        pool: `gap` averages maps and tokens over positions; `cls` takes the first token, and averages
            maps, which have none; `flatten` keeps every position.
    """
    if pool == "flatten" or features.ndim not in (3, 4):
        return features.flatten(1)
    if features.ndim == 3:
        return features[:, 0] if pool == "cls" else features.mean(dim=1)
    _, a, b, c = features.shape
    return features.mean(dim=(1, 2) if a == b != c else (2, 3))


@contextmanager
def in_eval_mode(classifier: nn.Module) -> Iterator[None]:
    """Every module in eval mode; each gets its own mode back."""
    modes = [(module, module.training) for module in classifier.modules()]
    try:
        classifier.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def exactly() -> Iterator[None]:
    """No gradients, no autocast, and no TF32, which keeps ten bits of the mantissa."""
    backends: list[Any] = [getattr(cudnn, "conv"), torch.backends.cuda.matmul]  # noqa: B009 - torch's types
    kept = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, kept, strict=True):
                backend.fp32_precision = precision
