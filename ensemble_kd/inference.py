"""What a classifier in eval mode says to whole splits, in float32 and in batches that fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.backends import cudnn

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Images
from ensemble_kd.features import FeatureTap

EVAL_BATCH = 512
_GPU_FACTOR = 4


def predict(model: Classifier, images: Images) -> Tensor:
    """Logits (N, C), float32, of all images in order; the model must be in eval mode.

    Several processes share the images, and all have all of the answers.
    """
    return distributed.gathered(torch.cat(list(_logits(model, _share(images)))), len(images))


def predict_with_features(model: Classifier, images: Images, tap: FeatureTap) -> tuple[Tensor, Tensor]:
    """`predict`, with the penultimate features (N, D), float32, from an entered `tap` on the model."""
    pairs = [(logits, tap.take().float()) for logits in _logits(model, _share(images))]
    logits, features = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return distributed.gathered(logits, len(images)), distributed.gathered(features, len(images))


def _share(images: Images) -> Images:
    if distributed.size() == 1:
        return images
    return images[distributed.own_part(torch.arange(len(images), device=images.ids.device))]


def batch_for(size: tuple[int, int], device: torch.device) -> int:
    """How many images of that input size go through a network at once, so that activations stay small."""
    height, width = size
    fitting = max(8, min(EVAL_BATCH, EVAL_BATCH * 64**2 // (height * width)))
    return _GPU_FACTOR * fitting if device.type == "cuda" else fitting


@torch.inference_mode()
def predict_pixels(model: Classifier, pixels: Tensor) -> Tensor:
    """Logits (B, C), float32, of images (B, C, H, W) at once, in this process alone."""
    with _whole_mantissa():
        return model(pixels).float()


def _logits(model: Classifier, images: Images) -> Iterator[Tensor]:
    for batch in images.batches(batch_for(model.card.preprocess.size, images.ids.device)):
        yield predict_pixels(model, batch.decoded)


@contextmanager
def _whole_mantissa() -> Iterator[None]:
    """Convolutions on a GPU keep ten bits of it otherwise (TF32)."""
    convolutions: Any = getattr(cudnn, "conv")  # noqa: B009 - torch's types do not know it
    kept = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = kept
