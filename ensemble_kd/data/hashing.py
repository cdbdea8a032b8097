"""Random numbers that are pure functions of (seed, view, sample), by splitmix64 (Steele, Lea and Flood 2014).

torch has no unsigned 64-bit arithmetic: two's complement gives the same bits. Every stream of draws of
one view is named here, so that no two modules take the same one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_MASK = (1 << 64) - 1

SHIFT = 0
"""Crops: top, left, mirror (0, 1, 2)."""
RESIZE = 2
"""Random-resized crops: mirror (shared with the above), area, ratio, top, left (2 … 6)."""
OPERATION = 7
"""TrivialAugment: operation, level, sign (7, 8, 9)."""
PARTNER = 10
"""Mixing: with whom (10)."""
SHARE = 11
"""Mixing: λ, then row and column of a box (11, 12, 13)."""
ORDER = -1
"""The order of samples in an epoch."""
BLOCKS = -2
"""The order of blocks of samples in an epoch."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # Logical: int64 shifts keep the sign.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """One round of splitmix64; of small batches each operation's start is the cost, so few and in place."""
    x = x + _GOLDEN
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MIX_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def _signed(part: int) -> int:
    return ((part + (1 << 63)) & _MASK) - (1 << 63)


def hash_streams(
    seed: int, view: int, sample_ids: Int[Tensor, " B"], first: int, count: int
) -> Int[Tensor, "S B"]:
    """64 well-mixed bits a sample in each of the streams first … first + count − 1."""
    state = _mix(sample_ids.long()).bitwise_xor_(_signed(seed))
    state = _mix(_mix(state).bitwise_xor_(_signed(view)))
    streams = torch.arange(first, first + count, device=state.device)
    return _mix(state ^ streams[:, None])


def hash_samples(seed: int, view: int, sample_ids: Int[Tensor, " B"], stream: int = 0) -> Int[Tensor, " B"]:
    """64 well-mixed bits a sample; `stream` tells apart the draws of one view."""
    return hash_streams(seed, view, sample_ids, stream, 1)[0]


def uniforms(
    seed: int, view: int, sample_ids: Int[Tensor, " B"], first: int, count: int
) -> Float[Tensor, "S B"]:
    """Numbers in [0, 1) a sample and stream, from the top 24 bits: exact in float32."""
    return _shift_right(hash_streams(seed, view, sample_ids, first, count), 40).float() * 2**-24


def uniform(seed: int, view: int, sample_ids: Int[Tensor, " B"], stream: int = 0) -> Float[Tensor, " B"]:
    """One number in [0, 1) a sample, from the top 24 bits: exact in float32."""
    return uniforms(seed, view, sample_ids, stream, 1)[0]


def below(numbers: Float[Tensor, "*shape"], count: int | Tensor) -> Int[Tensor, "*shape"]:
    """Integers 0 … count − 1 of numbers in [0, 1); float32 never rounds (1 − 2⁻²⁴)·count up to count."""
    return (numbers * count).long()


def order(seed: int, epoch: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of `count` samples that depends on the seed and the epoch alone."""
    return hash_samples(seed, epoch, torch.arange(count, device=device), ORDER).argsort(stable=True)


def blocked_order(
    seed: int,
    epoch: int,
    block_lengths: Int[Tensor, " M"],
    window: int,
    device: torch.device | str = "cpu",
) -> Int[Tensor, " N"]:
    """A permutation of the samples of M blocks laid end to end that goes through few blocks at a time.

    The blocks are taken in a hashed order, `window` of them together; those of one window are mixed as by
    `order`. It depends on its arguments alone, and with no more than `window` blocks it is `order`.
    """
    lengths = block_lengths.to(device)
    hashed = hash_samples(seed, epoch, torch.arange(len(lengths), device=device), BLOCKS)
    places = hashed.argsort(stable=True).argsort()
    windows = (places // window).repeat_interleave(lengths)
    mixed = order(seed, epoch, len(windows), device)
    return mixed[windows[mixed].argsort(stable=True)]
