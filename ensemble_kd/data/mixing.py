"""Mixtures of two images: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), λ ~ Beta(1, 1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ensemble_kd.data.crops import either
from ensemble_kd.data.hashing import PARTNER, SHARE, below, hash_samples, uniforms

MIXES = ("none", "mixup", "cutmix")


def partners(sample_ids: Int[Tensor, " B"], count: int, *, seed: int, view_id: int) -> Int[Tensor, " B"]:
    """With which of `count` training images each sample is mixed: positions 0 … count − 1, int64.

    Raises:
        ValueError: there is no image.
    """
    if count < 1:
        raise ValueError(f"no partners among {count} images")
    bits = hash_samples(seed, view_id, sample_ids, PARTNER)
    return (bits & (2**63 - 1)) % count  # no bias to speak of: count is far below 2⁶³


def mix(
    images: UInt8[Tensor, "B C H W"],
    others: UInt8[Tensor, "B C H W"],
    sample_ids: Int[Tensor, " B"],
    *,
    kind: str,
    seed: int,
    view_id: int,
) -> tuple[UInt8[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """Each image mixed with its other one, and the exact share (B,) of the first in it.

    `mixup` blends by λ in 256ths, rounded to the nearest grey level; `cutmix` puts a box of 1 − λ of the
    area, around a random pixel and clipped to the image, from the other one (sides to the nearest pixel,
    where the paper's code takes the next even number below); `none` returns the images.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in MIXES:
        raise ValueError(f"unknown mix {kind!r}; known: {', '.join(MIXES)}")
    draws = uniforms(seed, view_id, sample_ids, SHARE, 3)
    if kind == "mixup":
        return _blended(images, others, below(draws[0], 257))
    if kind == "cutmix":
        return _pasted(images, others, draws)
    return images, torch.ones_like(draws[0])


def _blended(
    images: UInt8[Tensor, "B C H W"], others: UInt8[Tensor, "B C H W"], parts: Int[Tensor, " B"]
) -> tuple[UInt8[Tensor, "B C H W"], Float[Tensor, " B"]]:
    base = others.int()
    fixed = images.int().sub_(base).mul_(parts.int()[:, None, None, None]).add_(base.mul_(256))
    return fixed.add_(128).bitwise_right_shift_(8).to(torch.uint8), parts.float() / 256


def _pasted(
    images: UInt8[Tensor, "B C H W"], others: UInt8[Tensor, "B C H W"], draws: Float[Tensor, "3 B"]
) -> tuple[UInt8[Tensor, "B C H W"], Float[Tensor, " B"]]:
    height, width = images.shape[2:]
    side = (1 - draws[0]).sqrt()
    rows, tall = _span(below(draws[1], height), side, height)
    columns, wide = _span(below(draws[2], width), side, width)
    box = rows[:, None, :, None] & columns[:, None, None, :]
    pixels = either(others, images, box)
    kept = (height * width - tall * wide).float()
    # By a tensor: a GPU divides by a number as it multiplies by its rounded inverse.
    return pixels, kept / torch.full_like(kept, height * width)


def _span(
    centre: Int[Tensor, " B"], side: Float[Tensor, " B"], size: int
) -> tuple[Bool[Tensor, "B S"], Int[Tensor, " B"]]:
    """Which of `size` places lie in a box of that share of them around a centre, and how many."""
    length = (side * size).round().long()
    first = centre - length // 2
    stop = (first + length).clamp(max=size)
    first = first.clamp(min=0)
    places = torch.arange(size, device=centre.device)
    return (places >= first[:, None]) & (places < stop[:, None]), stop - first
