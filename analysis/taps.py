"""One pass over the images that takes all layers of all models in, through hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ensemble_kd.analysis.cka import SMALLEST_BATCH, MinibatchCKA, Moments, centred_gram
from ensemble_kd.analysis.layers import (
    LOGITS,
    PENULTIMATE,
    Anatomy,
    Layer,
    choose,
    exactly,
    examine,
    in_eval_mode,
    reduce,
)
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import ConfigError, ModelError

_PROBES = 3
"""Images that a network is shown to find its layers."""


@dataclass
class Tap:
    """While entered, gives the Gram matrices of chosen layers; eval mode meanwhile.

    They are computed in the hooks, so that an in-place operation behind a layer changes nothing of it,
    and no activations are kept.
    """

    anatomy: Anatomy
    layers: Sequence[Layer]
    pool: str
    """`flatten`, `gap` or `cls`; see `reduce`."""
    _calls: Counter[str] = field(default_factory=Counter)
    _grams: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _features: Tensor | None = None
    _exits: ExitStack = field(default_factory=ExitStack)

    @property
    def labels(self) -> list[str]:
        """Of its layers, in the order of execution."""
        return [*(layer.label for layer in self.layers), PENULTIMATE, LOGITS]

    def __enter__(self) -> Tap:
        with ExitStack() as exits:
            exits.enter_context(in_eval_mode(self.anatomy.classifier))
            modules = dict(self.anatomy.classifier.net.named_modules())
            wanted = {(layer.module, layer.call) for layer in self.layers}
            for name in {layer.module for layer in self.layers}:
                hook = modules[name].register_forward_hook(self._hook(name, wanted))
                exits.callback(hook.remove)
            exits.callback(self.anatomy.head.register_forward_pre_hook(self._keep).remove)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def _hook(self, name: str, wanted: set[tuple[str, int]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._calls[name] += 1
            key = (name, self._calls[name])
            features = output[0] if isinstance(output, (tuple, list)) else output
            if key in wanted:
                self._grams[key] = centred_gram(reduce(features, self.pool))

        return hook

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = reduce(inputs[0], self.pool).float().clone()

    def __call__(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gram matrices (B, B) of the L layers of raw images, and their penultimate features (B, D).

        Raises:
            ModelError: a layer that ran before did not run for these images.
        """
        self._calls.clear()
        self._grams.clear()
        with exactly():
            logits = self.anatomy.classifier(images)
            missing = [layer.label for layer in self.layers if (layer.module, layer.call) not in self._grams]
            if missing or self._features is None:
                raise ModelError(
                    f"{self.anatomy.label!r} did not run its layer {(missing or [PENULTIMATE])[0]!r}",
                    "it ran for other images, so the network takes another way for each",
                    "name layers that always run: --layers",
                )
            features, self._features = self._features, None
            grams = [self._grams.pop((layer.module, layer.call)) for layer in self.layers]
            return [*grams, centred_gram(features), centred_gram(logits)], features


@dataclass(frozen=True)
class Seen:
    """What one pass over the images left of all models."""

    layers: Mapping[str, Sequence[str]]
    """By model, in the order of execution; one model after another they are the layers of `moments`."""
    moments: Moments
    features: Mapping[str, Tensor]
    """The penultimate features (N, D) by model, pooled as all layers, float32."""

    def __len__(self) -> int:
        """How many images were taken in."""
        return len(next(iter(self.features.values())))

    def at(self, model: str, layer: str | None = None) -> np.ndarray:
        """Where a layer of the model stands in `moments`, or all of them."""
        names = list(self.layers)
        start = sum(len(self.layers[name]) for name in names[: names.index(model)])
        places = start + np.arange(len(self.layers[model]))
        return places if layer is None else places[[list(self.layers[model]).index(layer)]]


def taken(count: int, batch: int) -> int:
    """How many of `count` images a pass takes in: a last batch under `SMALLEST_BATCH` is left out."""
    rest = count % batch
    return count - rest if rest < SMALLEST_BATCH and rest < count else count


def look(
    classifiers: Mapping[str, Classifier],
    images: Images,
    patterns: Sequence[str] = (),
    pool: str = "flatten",
    batch: int = 256,
) -> Seen:
    """Show the images to all models, batch by batch in their order, in one pass.

    Networks are run in eval mode and left as they were. O(L · B²) memory beside what a batch takes in
    the largest network, and the penultimate features. A last batch under `SMALLEST_BATCH` is left out.

    Args:
        patterns: of layer names, instead of the default layers; penultimate and logits are always taken.
        pool: see `layers.reduce`.

    Raises:
        ConfigError: a pattern matches no layer of any model, or there are fewer than `SMALLEST_BATCH` images.
        ModelError: a network has no last layer, or does not run the same layers for all images.
    """
    images = _enough(images, batch)
    probe = next(images.batches(_PROBES)).decoded
    anatomies = [examine(classifier, name, probe) for name, classifier in classifiers.items()]
    taps = [Tap(anatomy, layers, pool) for anatomy, layers in choose(anatomies, patterns)]
    sums = MinibatchCKA(len(images))
    kept: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    with ExitStack() as stack, progress("layers", len(images)) as advance:
        for tap in taps:
            stack.enter_context(tap)
        for shown in images.batches(batch):
            grams: list[Tensor] = []
            for tap in taps:
                own, features = tap(shown.decoded)
                grams += own
                kept[tap.anatomy.label].append(features)
            sums.add(grams)
            advance(len(shown))
    labels = {tap.anatomy.label: tap.labels for tap in taps}
    return Seen(labels, sums.finish(), {name: torch.cat(parts) for name, parts in kept.items()})


def _enough(images: Images, batch: int) -> Images:
    count, kept = len(images), taken(len(images), batch)
    if kept < SMALLEST_BATCH:
        raise ConfigError(
            f"{count} images are too few to compare layers on",
            f"batches are of {SMALLEST_BATCH} or more",
            "take more images",
        )
    if kept == count:
        return images
    log.warning(
        f"{count - kept} of {count:,} images are left out: the last batch would be smaller than {SMALLEST_BATCH}"
    )
    return images[torch.arange(kept, device=images.ids.device)]
