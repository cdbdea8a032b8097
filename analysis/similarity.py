"""How alike two sets of features of the same images are: pure functions of tensors.

Shapes: `N` images, `P` and `Q` features of two models, `K` neighbours. Both measures are blind to a shift,
a rotation and a common scale of either side.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 512
"""Rows of the N × N distances that are held at once."""


def nearest(features: Float[Tensor, "N P"], k: int) -> Int[Tensor, "N K"]:
    """The k nearest other images of each one, by Euclidean distance in float64.

    Raises:
        ValueError: there are no k others.
    """
    if k >= len(features):
        raise ValueError(f"{k} neighbours among {len(features)} images")
    x = features.double()
    x = x - x.mean(dim=0)
    squares = x.square().sum(dim=1)
    found = []
    for start in range(0, len(x), _BLOCK):
        rows = x[start : start + _BLOCK]
        distances = squares - 2 * rows @ x.T  # less each row's own square, which changes no order
        own = torch.arange(len(rows), device=x.device)
        distances[own, start + own] = float("inf")
        found.append(distances.topk(k, largest=False).indices)
    return torch.cat(found)


def shared_neighbours(first: Int[Tensor, "N K"], second: Int[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """The share of each image's neighbours that are the same on both sides (Huh et al. 2024).

    Of unrelated features it is K / (N − 1) on average.
    """
    same = (first[:, :, None] == second[:, None, :]).any(dim=2)
    return same.double().mean(dim=1)


def procrustes(x: Float[Tensor, "N P"], y: Float[Tensor, "N Q"]) -> float:
    """`aligned` of features as they are, NaN where a side does not vary, or is not finite."""
    first, second = standard(x), standard(y)
    return float("nan") if first is None or second is None else aligned(first, second)


def aligned(x: Float[Tensor, "N P"], y: Float[Tensor, "N Q"]) -> float:
    """‖XᵀY‖_* of features that `standard` gave, in float64: 1 where a rotation makes both the same.

    The orthogonal Procrustes distance is d² = 2 − 2 of this (Ding et al. 2021). Unrelated
    features are not at 0, and the less so the more of them there are for N: compare it with what the
    images of one side in another order give.
    """
    return float(torch.linalg.matrix_norm(x.T @ y, "nuc"))


def standard(features: Float[Tensor, "N P"]) -> Float[Tensor, "N P2"] | None:
    """Centred features of norm 1, rotated into at most N of them, which changes no singular value; float64.

    None where they do not vary, or are not finite.
    """
    wide = features.double()
    centred = wide - wide.mean(dim=0)
    norm = float(centred.norm())
    if not 1e-12 * float(wide.norm()) < norm < float("inf"):
        return None
    n, width = centred.shape
    unit = centred / norm
    return torch.linalg.qr(unit.T, mode="r").R.T if width > n else unit
