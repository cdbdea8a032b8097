"""Augmented views of images, each a pure function of (seed, view, sample).

The parameters come from a counter-based hash (see `hashing`), never from a global generator: batch size,
order, workers and restarts change nothing, and a teacher's stored output always belongs to exactly the
pixels that the student sees.
"""

from __future__ import annotations

from jaxtyping import Int, UInt8
from torch import Tensor

from ensemble_kd.data.crops import resized, shifted
from ensemble_kd.data.hashing import blocked_order, hash_samples, order, uniform
from ensemble_kd.data.mixing import MIXES, mix, partners
from ensemble_kd.data.trivial import trivial

__all__ = [
    "MIXES",
    "POLICIES",
    "VERSION",
    "blocked_order",
    "hash_samples",
    "mix",
    "order",
    "partners",
    "uniform",
    "view",
]

POLICIES = ("none", "crop", "crop-flip", "rrc", "trivial")
VERSION = 1
"""Part of the key of stored teacher outputs: to be raised whenever any pixel of a view or mixture changes."""


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
    zeros; `crop-flip` also mirrors every second one; `rrc` takes a random box, resizes it to the image's
    size and mirrors every second one; `trivial` is `crop-flip` and then one of TrivialAugment's operations.

    Raises:
        ValueError: for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if policy == "none" or not len(images):
        return images
    if policy == "rrc":
        return resized(images, sample_ids, seed=seed, view_id=view_id)
    seen = shifted(images, sample_ids, mirror=policy != "crop", seed=seed, view_id=view_id)
    return trivial(seen, sample_ids, seed=seed, view_id=view_id) if policy == "trivial" else seen
