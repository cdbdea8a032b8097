"""Crops of whole batches: shifted over a padding, or a random box resized; both also mirrored.

All that decides about a pixel is integer or correctly rounded arithmetic without sums over a batch, so
pixels are the same on every device and in every batch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ensemble_kd.data.hashing import RESIZE, SHIFT, below, uniforms

SMALLEST_AREA = 0.08
WIDEST_RATIO = 4 / 3
_RATIOS = 1024
_BITS = 11  # of a weight in bilinear sampling: 8 + 11 + 11 bits fit into int32, within 1/8 of a grey level


def shifted(
    images: UInt8[Tensor, "B C H W"],
    sample_ids: Int[Tensor, " B"],
    *,
    mirror: bool,
    seed: int,
    view_id: int,
) -> UInt8[Tensor, "B C H W"]:
    """Each image shifted by up to an eighth of its shorter side over zeros; with `mirror` every second is mirrored."""
    count, channels, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    draws = uniforms(seed, view_id, sample_ids, SHIFT, 3)
    top, left = below(draws[:2], 2 * pad + 1)
    # A row of a view is a run of the padded pixels, which index_select copies whole: on a CPU five times as
    # fast as a gather of single pixels, whose indices are eight times as large as what they fetch.
    runs = F.pad(images, (pad, pad, pad, pad)).flatten().unfold(0, width, 1)
    line, plane = width + 2 * pad, (width + 2 * pad) * (height + 2 * pad)
    planes = torch.arange(0, count * channels * plane, plane, device=images.device)
    lines = torch.arange(0, height * line, line, device=images.device)
    starts = planes.view(count, channels, 1) + (top * line + left)[:, None, None] + lines
    cropped = runs.index_select(0, starts.flatten()).view(images.shape)
    return either(cropped.flip(3), cropped, (draws[2] < 0.5)[:, None, None, None]) if mirror else cropped


def either(
    first: UInt8[Tensor, "B C H W"], second: UInt8[Tensor, "B C H W"], where: Bool[Tensor, "B _ _ _"]
) -> UInt8[Tensor, "B C H W"]:
    """The first one's pixels where that is true, else the second one's."""
    # On bytes of all ones or none: torch.where decides each byte by itself, which is many times slower on a CPU.
    return (first ^ second).bitwise_and_(-where.to(torch.uint8)).bitwise_xor_(second)


def resized(
    images: UInt8[Tensor, "B C H W"], sample_ids: Int[Tensor, " B"], *, seed: int, view_id: int
) -> UInt8[Tensor, "B C H W"]:
    """A random box of each image, resized to the image's size; every second is mirrored.

    The boxes of Szegedy et al. (2015), as torchvision's RandomResizedCrop takes them: 8 % to 100 % of the
    area, ratio of sides log-uniform in 3/4 … 4/3. A box that is longer than the image is clipped to it,
    where torchvision draws anew. Bilinear, sampled within the box as if it had been cut out.
    """
    height, width = images.shape[2:]
    top, tall, left, wide, mirrored = boxes(height, width, sample_ids, seed, view_id)
    across = torch.arange(width, device=images.device).expand(len(images), -1)
    across = across + mirrored[:, None] * (width - 1 - 2 * across)
    down = torch.arange(height, device=images.device).expand(len(images), -1)
    return _resampled(images, _taps(top, tall, down), _taps(left, wide, across))


def boxes(
    height: int, width: int, sample_ids: Int[Tensor, " B"], seed: int, view_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Top, height, left and width in whole pixels, and whether mirrored: each (B,)."""
    mirrored, area, ratio, top, left = uniforms(seed, view_id, sample_ids, RESIZE, 5)
    pixels = (area * (1 - SMALLEST_AREA) + SMALLEST_AREA) * (height * width)
    ratio = _ratios(area.device).index_select(0, below(ratio, _RATIOS))
    tall = (pixels / ratio).sqrt().round().clamp(1, height)
    wide = (pixels * ratio).sqrt().round().clamp(1, width)
    top, left = below(top, height - tall + 1), below(left, width - wide + 1)
    return top, tall.long(), left, wide.long(), mirrored < 0.5


@functools.cache
def _ratios(device: torch.device) -> Float[Tensor, " R"]:
    """Log-uniform; a table, as an exponential is rounded differently on different devices."""
    steps = [WIDEST_RATIO ** (2 * step / (_RATIOS - 1) - 1) for step in range(_RATIOS)]
    return torch.tensor(steps, device=device)


def _taps(
    start: Int[Tensor, " B"], length: Int[Tensor, " B"], places: Int[Tensor, "B S"]
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """For each place of a side that a box is resized to: both neighbours, and the weight of the second.

    The place (p + ½)·length/S − ½ of Pillow and torch, clamped to the box, as an exact fraction of 2S.
    """
    size, start, length = places.shape[1], start[:, None], length[:, None]
    place = ((2 * places + 1) * length - size).clamp(min=0)
    first = place // (2 * size)
    rest = place - first * (2 * size)
    weight = ((rest << _BITS) + size) // (2 * size)
    return start + first, start + torch.minimum(first + 1, length - 1), weight.int()


def _resampled(
    images: UInt8[Tensor, "B C H W"],
    down: tuple[Tensor, Tensor, Tensor],
    across: tuple[Tensor, Tensor, Tensor],
) -> UInt8[Tensor, "B C H W"]:
    shape = images.shape
    # Rows first: whole rows are copied from bytes, and only the second step must pick single integers.
    planes = torch.arange(shape[0] * shape[1], device=images.device).view(shape[0], shape[1], 1) * shape[2]
    rows = images.reshape(-1, shape[3])
    upper, lower = (
        rows.index_select(0, (planes + place[:, None]).flatten()).view(shape).int() for place in down[:2]
    )
    lines = _between(upper, lower, down[2][:, None, :, None])
    left, right = (lines.gather(3, place[:, None, None].expand(shape)) for place in across[:2])
    fixed = _between(left, right, across[2][:, None, None])
    return fixed.add_(1 << (2 * _BITS - 1)).bitwise_right_shift_(2 * _BITS).to(torch.uint8)


def _between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """first · (1 − weight) + second · weight, with `_BITS` more bits after the point; overwrites both."""
    return second.sub_(first).mul_(weight).add_(first.bitwise_left_shift_(_BITS))
