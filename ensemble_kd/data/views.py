"""Augmented views of images, each a pure function of (seed, view, sample).

The parameters come from a counter-based hash (splitmix64; Steele, Lea and Flood 2014), never from a
global generator: batch size, order, workers and restarts change nothing, and a teacher's stored
output always belongs to exactly the pixels that the student sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

# Two's-complement forms of the constants of splitmix64; torch has no uint64 arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MASK = (1 << 64) - 1

POLICIES = ("none", "crop", "crop-flip")


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 shifts keep the sign


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hash_samples(seed: int, view: int, sample_ids: Int[Tensor, " B"], stream: int = 0) -> Int[Tensor, " B"]:
    """64 well-mixed bits a sample; `stream` tells apart the draws of one view."""
    state = sample_ids.long()
    for part in (seed, view, stream):
        signed = ((part + (1 << 63)) & _MASK) - (1 << 63)
        state = _mix(state + _GOLDEN) ^ signed
    return _mix(state + _GOLDEN)


def uniform(seed: int, view: int, sample_ids: Int[Tensor, " B"], stream: int = 0) -> Float[Tensor, " B"]:
    """One number in [0, 1) a sample, from the top 24 bits: exact in float32."""
    return _shift_right(hash_samples(seed, view, sample_ids, stream), 40).float() / (1 << 24)


def order(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of `count` samples that depends on the seed and the epoch alone."""
    return hash_samples(seed, epoch, torch.arange(count, device=device), stream=-1).argsort(stable=True)


def view(
    images: UInt8[Tensor, "B C H W"],
    sample_ids: Int[Tensor, " B"],
    *,
    policy: str,
    seed: int,
    view_id: int,
) -> UInt8[Tensor, "B C H W"]:
    """The view of each image under `policy`.

    `none` returns the images; `crop` shifts them by up to an eighth of their side over a padding of
    zeros; `crop-flip` also mirrors every second one.

    Raises:
        ValueError: for an unknown policy.
    """
    if policy == "none":
        return images
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    height, width = images.shape[2:]
    pad = max(1, min(height, width) // 8)
    top, left = ((uniform(seed, view_id, sample_ids, stream) * (2 * pad + 1)).long() for stream in (0, 1))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    if policy == "crop-flip":
        mirrored = uniform(seed, view_id, sample_ids, 2) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad))
    # One gather over flattened pixels: on a CPU five times faster than indexing by rows and columns.
    count, channels = images.shape[:2]
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, height * width)
    picked = padded.flatten(2).gather(2, pixels.expand(-1, channels, -1))
    return picked.view(count, channels, height, width)
