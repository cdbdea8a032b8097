"""How long things take here: a few real training steps, and a pass through a network."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Images
from ensemble_kd.inference import batch_for, predict
from ensemble_kd.loop import Engine, Loop
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.stepping import Recipe

_SECONDS = 0.5
"""About how long steps are timed, two of them at least."""
_MOST = 200
_FEW = 16


def seconds_a_step(
    network: Classifier, images: Images, recipe: Recipe, viewing: Viewing, engine: Engine
) -> float:
    """The mean of some training steps on labels of a copy of `network`, after others that set things up.

    `images` are those it would be trained on, of which the first are taken. Nothing is compiled for this.
    """
    device = images.ids.device
    size = min(recipe.batch_size, len(images))
    engine = replace(engine, trace=None, compile=False)
    model = copy.deepcopy(network).requires_grad_(True).to(device)

    def loop_of(steps: int) -> Loop:
        part = images[torch.arange(min(steps * size, len(images)), device=device)]
        return Loop(model, part, recipe, Objective(), viewing, 0, engine, lambda *_, **__: None)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        few = loop_of(2)
        few.epoch(0)
        spent = _timed(lambda: few.epoch(1), device) / few.steps
        many = loop_of(max(2, min(_MOST, int(_SECONDS / spent))))
        if device.type == "cuda":
            many.epoch(0)  # it records the steps
        return _timed(lambda: many.epoch(1), device) / many.steps


def seconds_an_image(network: Classifier, images: Images) -> float:
    """The time of one image in a pass through a network in eval mode, in batches as they are made."""
    return _an_image(lambda part: predict(network, part), images, network)


def seconds_a_view(
    runners: Sequence[Callable[[Tensor], object]], images: Images, viewing: Viewing, network: Classifier
) -> float:
    """The time to make a view of an image and to run teachers on it, in batches as for `network`."""

    def look(part: Images) -> None:
        batch = viewing.take(part, torch.arange(len(part), device=part.ids.device), 0)
        for runner in runners:
            runner(batch.decoded)

    return _an_image(look, images, network)


def _an_image(work: Callable[[Images], object], images: Images, network: Classifier) -> float:
    device = images.ids.device
    most = min(len(images), batch_for(network.card.preprocess.size, device))
    few, many = (images[torch.arange(min(count, most), device=device)] for count in (_FEW, most))
    work(few)
    spent = _timed(lambda: work(few), device) / len(few)
    return spent if spent * most > _SECONDS else _timed(lambda: work(many), device) / most


def _timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - started, 1e-6)
