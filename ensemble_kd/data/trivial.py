"""TrivialAugment (Müller and Hutter 2021) of whole batches: to each image one of 14 operations, at one strength.

The wide space with 31 levels, as in the paper and in torchvision; lengths are shares of a side, so that a
translation goes up to a whole side at any size, as the paper's 32 pixels do in CIFAR's images.

All arithmetic is in integers, or in divisions whose floor is exact, so that pixels are the same on every
device and in every batch. From torchvision's they differ by at most one grey level (brightness, contrast,
colour, sharpness, autocontrast), or at places exactly between two pixels (shears, rotations).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Int, Int32, UInt8
from torch import Tensor

from ensemble_kd.data.hashing import OPERATION, below, uniforms

LEVELS = 31
_TOP = LEVELS - 1
_POINT = 16  # bits after the point of affine maps
_ONE = 1024  # a factor of 1 in blends
_GREY = (1253678, 2462056, 478151)  # 0.2989, 0.587, 0.114 in 2⁻²²
_GREY_BIAS = 210  # half of the 1/10000 that grey values are multiples of: makes their floor exact

Settings = dict[str, int]
_NEUTRAL: Settings = {
    "stage": 0,
    "xx": 1 << _POINT,
    "xy": 0,
    "yx": 0,
    "yy": 1 << _POINT,
    "from_corner": 0,
    "right": 0,
    "down": 0,
    "colour": _ONE,
    "sharpness": _ONE,
    "tone": _ONE,
    "to_mean": 0,
    "bits": 255,
    "solarize": 512,
    "autocontrast": 0,
    "equalize": 0,
}
"""What leaves an image as it is; an operation changes some."""


def _slope(level: int) -> int:
    return round(0.99 * level / _TOP * (1 << _POINT))


def _turn(level: int) -> Settings:
    angle = math.radians(135 * level / _TOP)
    sine, cosine = round(math.sin(angle) * (1 << _POINT)), round(math.cos(angle) * (1 << _POINT))
    return {"xx": cosine, "xy": -sine, "yx": sine, "yy": cosine}


def _factor(level: int) -> int:
    return round((1 + 0.99 * level / _TOP) * _ONE)


OPERATIONS: dict[str, Callable[[int], Settings]] = {
    "identity": lambda level: {},
    "shear-x": lambda level: {"stage": 1, "xy": _slope(level), "from_corner": 1},
    "shear-y": lambda level: {"stage": 1, "yx": _slope(level), "from_corner": 1},
    "translate-x": lambda level: {"stage": 1, "right": level},
    "translate-y": lambda level: {"stage": 1, "down": level},
    "rotate": lambda level: {"stage": 1, **_turn(level)},
    "colour": lambda level: {"stage": 2, "colour": _factor(level)},
    "sharpness": lambda level: {"stage": 2, "sharpness": _factor(level)},
    "brightness": lambda level: {"stage": 3, "tone": _factor(level)},
    "contrast": lambda level: {"stage": 3, "tone": _factor(level), "to_mean": 1},
    "posterize": lambda level: {"stage": 3, "bits": 256 - (1 << round(6 * abs(level) / _TOP))},
    "solarize": lambda level: {"stage": 3, "solarize": 17 * (_TOP - abs(level))},
    "autocontrast": lambda level: {"stage": 3, "autocontrast": 1},
    "equalize": lambda level: {"stage": 3, "equalize": 1},
}
"""Each operation's settings at a level −30 … 30; those without a direction take its size."""


def trivial(
    images: UInt8[Tensor, "B C H W"], sample_ids: Int[Tensor, " B"], *, seed: int, view_id: int
) -> UInt8[Tensor, "B C H W"]:
    """Each image after one operation at one level, both drawn uniformly, and in either direction."""
    operation, level = choices(sample_ids, seed, view_id)
    return apply(images, operation, level)


def choices(
    sample_ids: Int[Tensor, " B"], seed: int, view_id: int
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Each sample's operation, by its place in `OPERATIONS`, and its level −30 … 30."""
    operation, level, side = uniforms(seed, view_id, sample_ids, OPERATION, 3)
    return below(operation, len(OPERATIONS)), below(level, LEVELS) * (1 - 2 * below(side, 2))


def apply(
    images: UInt8[Tensor, "B C H W"], operation: Int[Tensor, " B"], level: Int[Tensor, " B"]
) -> UInt8[Tensor, "B C H W"]:
    """Each image after its own operation at its own level."""
    settings = _settings(images.device).index_select(1, operation * (2 * LEVELS - 1) + level + _TOP)
    every = images.device.type != "cpu"
    return (_everywhere if every else _where_needed)(images, settings[:, :, None, None])


def _everywhere(images: UInt8[Tensor, "B C H W"], settings: Int32[Tensor, "_ B 1 1"]) -> Tensor:
    """All stages for all images, most of which they leave as they are: nothing waits for the device."""
    for stage in _STAGES:
        images = stage(images, _named(settings))
    return images


def _where_needed(images: UInt8[Tensor, "B C H W"], settings: Int32[Tensor, "_ B 1 1"]) -> Tensor:
    """The same pixels, and less work where asking which images a stage concerns costs nothing."""
    for number, stage in enumerate(_STAGES, start=1):
        rows = (settings[0].flatten() == number).nonzero().flatten()
        if len(rows):
            changed = stage(images.index_select(0, rows), _named(settings.index_select(1, rows)))
            images = images.index_copy(0, rows, changed)
    return images


def _named(settings: Tensor) -> dict[str, Tensor]:
    return dict(zip(_NEUTRAL, settings, strict=True))


@functools.cache
def _settings(device: torch.device) -> Int32[Tensor, "settings choices"]:
    """One column for each operation and level; made once, as a copy to the device would be waited for."""
    rows = [
        list((_NEUTRAL | operation(level)).values())
        for operation in OPERATIONS.values()
        for level in range(-_TOP, LEVELS)
    ]
    return torch.tensor(rows, dtype=torch.int32).t().contiguous().to(device)


def _moved(images: UInt8[Tensor, "B C H W"], s: dict[str, Tensor]) -> UInt8[Tensor, "B C H W"]:
    """Resampled at the nearest pixel; black from outside. Shears fix the top left corner, as AutoAugment's do."""
    height, width = images.shape[2:]
    # Twice the distance from the centre, so that it is whole in images of odd and of even sides.
    x = torch.arange(1 - width, width, 2, dtype=torch.int32, device=images.device)
    y = torch.arange(1 - height, height, 2, dtype=torch.int32, device=images.device)[:, None]
    column = s["xx"] * x + _origin(width, s["xy"] * height * s["from_corner"], s["right"]) + s["xy"] * y
    row = s["yx"] * x + _origin(height, s["yx"] * width * s["from_corner"], s["down"]) + s["yy"] * y
    # Whatever lies outside comes from a frame of zeros; a mask would take another pass.
    framed = F.pad(images, (1, 1, 1, 1)).flatten(2)
    column, row = (
        place.bitwise_right_shift_(_POINT + 1).clamp_(0, size + 1)
        for place, size in ((column, width), (row, height))
    )
    index = row.mul_(width + 2).add_(column).flatten(1)[:, None].long()
    return framed.gather(2, index.expand(-1, images.shape[1], -1)).view(images.shape)


def _origin(size: int, from_corner: Tensor, level: Tensor) -> Tensor:
    """Where the centre comes from, in half pixels from the edge of the frame."""
    pixels = torch.div(level * size, _TOP, rounding_mode="trunc")
    return from_corner + ((size + 2 - 2 * pixels) << _POINT)


def _grey(wide: Int32[Tensor, "B C H W"]) -> Int32[Tensor, "B G H W"]:
    """⌊0.2989 R + 0.587 G + 0.114 B⌋, exactly; images that are not of three channels are grey already."""
    if wide.shape[1] != 3:
        return wide
    red, green, blue = (wide[:, channel] * part for channel, part in enumerate(_GREY))
    return red.add_(green).add_(blue).add_(_GREY_BIAS).bitwise_right_shift_(22)[:, None]


def _blended(images: UInt8[Tensor, "B C H W"], s: dict[str, Tensor]) -> UInt8[Tensor, "B C H W"]:
    """Pulled from its own grey (colour) and from its blurred form (sharpness) by a factor."""
    wide = images.int()
    height, width = wide.shape[2:]
    colour, sharpness = s["colour"][..., None], s["sharpness"][..., None]
    fixed = (_grey(wide) - wide).mul_(_ONE - colour) if wide.shape[1] == 3 else torch.zeros_like(wide)
    if height > 2 and width > 2:  # the outermost pixels have no blurred form
        rows = (wide[:, :, :-2] + wide[:, :, 1:-1]).add_(wide[:, :, 2:])
        inner = wide[:, :, 1:-1, 1:-1]
        blurred = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4)
        blurred.add_(6).mul_(20165).bitwise_right_shift_(18)  # / 13, rounded: exact for sums of 13 bytes
        fixed[:, :, 1:-1, 1:-1].add_(blurred.sub_(inner).mul_(_ONE - sharpness))
    return fixed.add_(wide, alpha=_ONE).bitwise_right_shift_(10).clamp_(0, 255).to(torch.uint8)


def _toned(images: UInt8[Tensor, "B C H W"], s: dict[str, Tensor]) -> UInt8[Tensor, "B C H W"]:
    """Every grey level replaced by the one in a table of its image and channel."""
    count, channels = images.shape[:2]
    wide = images.int()
    grey = _grey(wide).flatten(1)
    mean = (grey.sum(1) * 256 // grey.shape[1]).int()
    low, high = (extreme[..., None].int() for extreme in (images.amin((2, 3)), images.amax((2, 3))))
    planes = torch.arange(0, count * channels * 256, 256, dtype=torch.int32, device=images.device)
    entries = wide.add_(planes.view(count, channels, 1, 1)).flatten()
    levels = torch.arange(256, dtype=torch.int32, device=images.device)
    mean = mean[:, None, None] * s["to_mean"]
    table = (levels * (s["tone"] * 256) + mean * (_ONE - s["tone"])) >> 18
    table.clamp_(0, 255).bitwise_and_(s["bits"])
    table ^= (2 * table >= s["solarize"]).int() * 255
    table = _stretched(table, low, high, s["autocontrast"])
    # index_add_ and index_select take 32-bit places; scatter and gather would need 64-bit ones.
    counts = torch.zeros(count * channels * 256, dtype=torch.int32, device=images.device)
    counts.index_add_(0, entries, torch.ones_like(levels[:1]).expand(len(entries)))
    equalized = _equalized(counts.view_as(table), levels, high)
    table = torch.where(s["equalize"] != 0, equalized, table).to(torch.uint8)
    return table.flatten().index_select(0, entries).view(images.shape)


def _stretched(table: Tensor, low: Tensor, high: Tensor, wanted: Tensor) -> Int32[Tensor, "B C 256"]:
    """Levels low … high spread over 0 … 255, where that is wanted and there are two levels."""
    wanted = wanted * (high > low)
    low, high = low * wanted, (high - 255) * wanted + 255
    return (table - low).mul_(255).clamp_(min=0).div((high - low).float()).int().clamp_(max=255)


def _equalized(
    counts: Int32[Tensor, "B C 256"], levels: Int32[Tensor, " 256"], high: Int32[Tensor, "B C 1"]
) -> Int32[Tensor, "B C 256"]:
    """The table of Pillow's and torchvision's equalize; where it does nothing, the levels themselves."""
    sums = counts.cumsum(2, dtype=torch.int32)
    step = (sums[..., 255:] - counts.gather(2, high.long())) // 255
    table = (sums - counts).add_(step // 2).div(step.clamp(min=1).float()).int().clamp_(max=255)
    return torch.where(step > 0, table, levels)


_STAGES = (_moved, _blended, _toned)
"""By the number in an operation's settings, from 1."""
