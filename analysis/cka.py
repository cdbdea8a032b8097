"""Centred kernel alignment of layers, debiased and summed over batches: pure functions of tensors.

Shapes: `B` samples of a batch, `P` features of a layer, `L` layers, `G` groups of samples. Sources: Kornblith
et al. 2019 (linear CKA), Song et al. 2012 (HSIC₁), Nguyen et al. 2021 (minibatches, equations 2 and 3),
Székely and Rizzo 2014 (U-centring, by which HSIC₁ becomes an inner product).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ensemble_kd.metrics import RESAMPLES

SMALLEST_BATCH = 16
"""A last batch below this is left out: its estimate is unbiased, but mostly noise."""
GROUPS = 250
"""About how many groups the samples are put into for the intervals."""
_ROUNDING = 16
"""How many units in the last place a layer may vary and still count as constant."""
_PARTS = 4
"""Of a symmetric product: more save no more time, as they get small."""


def centred_gram(features: Float[Tensor, "B ..."]) -> Float[Tensor, "B B"]:
    """Inner products of the samples' features after their mean is taken off.

    In float32, or float64 for float64 features. Features that vary by no more than rounding give zeros.
    """
    x = features.detach().flatten(1)
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(dim=0)
    # Centred before the product: afterwards, a large mean would have eaten the digits that count.
    gram = _products(x - mean)
    size = gram.trace() + len(x) * mean.square().sum()
    return gram * (gram.trace() > (_ROUNDING * torch.finfo(x.dtype).eps) ** 2 * size)


def _products(z: Tensor) -> Tensor:
    """z zᵀ, of which a CPU computes little more than one half."""
    n = len(z)
    gram = z.new_empty(n, n)
    step = -(-n // (_PARTS if z.device.type == "cpu" else 1))
    for start in range(0, n, step):
        columns = slice(start, start + step)
        products = z[start:] @ z[columns].T
        gram[start:, columns] = products
        gram[columns, start:] = products.T
    return gram


def u_centred(grams: Float[Tensor, "L B B"]) -> Float[Tensor, "L B B"]:
    """Symmetric matrices with zero diagonals whose rows sum to zero (Székely and Rizzo 2014, definition 2)."""
    n, centred = grams.shape[-1], grams.clone()
    diagonal = centred.diagonal(dim1=1, dim2=2)
    diagonal.zero_()
    means = centred.sum(dim=-1) / (n - 2)
    means -= means.sum(dim=-1, keepdim=True) / (2 * (n - 1))
    # In place, as this is the largest part of what a pass takes in memory.
    centred -= means[:, :, None]
    centred -= means[:, None, :]
    diagonal.zero_()
    return centred


def hsic0(x: Float[Tensor, "B P"], y: Float[Tensor, "B Q"]) -> float:
    """The biased HSIC with linear kernels, tr(K H L H) / (n − 1)² (Gretton et al. 2005), in float64."""
    return float((centred_gram(x.double()) * centred_gram(y.double())).sum() / (len(x) - 1) ** 2)


def hsic1(x: Float[Tensor, "B P"], y: Float[Tensor, "B Q"]) -> float:
    """The unbiased HSIC with linear kernels, in float64; it can be negative. At least 4 samples."""
    first, second = u_centred(torch.stack([centred_gram(x.double()), centred_gram(y.double())]))
    return float((first * second).sum() / (len(x) * (len(x) - 3)))


def linear_cka(x: Float[Tensor, "B P"], y: Float[Tensor, "B Q"]) -> float:
    """Biased linear CKA of two layers seen whole, in float64; close to 1 for any layers where P, Q ≫ B.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> turned = 5 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + 7  # scale, rotation and shift do not count
        >>> round(linear_cka(x, turned), 6), round(linear_cka(x, x[:, :1] ** 2), 4)
        (1.0, 0.8824)
    """
    return _ratio(hsic0(x, y), hsic0(x, x), hsic0(y, y))


def debiased_cka(x: Float[Tensor, "B P"], y: Float[Tensor, "B Q"]) -> float:
    """Linear CKA of HSIC₁ of two layers seen whole, in float64; NaN where a layer does not vary."""
    return _ratio(hsic1(x, y), hsic1(x, x), hsic1(y, y))


def _ratio(both: float, first: float, second: float) -> float:
    return both / (first * second) ** 0.5 if first * second > 0 else float("nan")


@dataclass(frozen=True)
class Moments:
    """What the sums of HSIC₁ over batches are made of; everything about CKA is told from it."""

    terms: Float[np.ndarray, "G L L"]
    """Of each group of samples i of a batch of n: Σ_i Σ_j K̃_ij L̃_ij / (n − 3), of every pair of layers."""
    sizes: Float[np.ndarray, " G"]
    """How many samples each group has."""

    @property
    def hsic(self) -> Float[np.ndarray, "L L"]:
        """HSIC₁ of every pair of layers: the mean over batches, weighted by their sizes."""
        total: np.ndarray = self.terms.sum(axis=0) / self.sizes.sum()
        return total

    def cka(self) -> Float[np.ndarray, "L L"]:
        """CKA of every pair of layers: a ratio of sums over batches, not a mean of ratios, and not clamped.

        NaN for layers that do not vary or are not finite.
        """
        return _normalised(self.hsic, *np.indices(self.terms.shape[1:]))

    def resampled(
        self,
        first: np.ndarray | Sequence[int],
        second: np.ndarray | Sequence[int],
        seed: int,
        resamples: int = RESAMPLES,
    ) -> Float[np.ndarray, "R M"]:
        """CKA of M pairs of layers, first as it is and then in `resamples` bootstrap samples of the images.

        The groups are drawn with replacement, the same for all pairs, so that differences keep what
        the pairs have in common. HSIC is linearised: drawing sample i more often changes it by twice
        Σ_j K̃_ij L̃_ij / (n − 3) less its mean, the influence of one point on ∫∫ k̃ l̃ (both kernels
        are centred, so the change of their centring adds nothing). For independent layers, where that
        is almost zero, the rest of it makes the intervals wider than they need be.
        """
        counts = np.random.default_rng(seed).multinomial(
            len(self.sizes), np.full(len(self.sizes), 1 / len(self.sizes)), size=resamples
        )
        shares = counts / (counts @ self.sizes)[:, None]
        hsic = self.hsic

        def drawn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            moved = 2 * (shares @ self.terms[:, a, b]) - hsic[a, b]
            return np.vstack([hsic[a, b], moved])

        a, b = np.asarray(first, dtype=int), np.asarray(second, dtype=int)
        return _divided(drawn(a, b), drawn(a, a), drawn(b, b))


@dataclass
class MinibatchCKA:
    """Adds up HSIC₁ of every pair of L layers, batch by batch; O(L · B² + G · L²) memory.

    Args:
        images: about how many samples there will be; it sets the size of the groups for the intervals.
    """

    images: int
    _terms: list[Tensor] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def add(self, grams: Sequence[Float[Tensor, "B B"]]) -> None:
        """Take in the centred Gram matrices of L layers (see `centred_gram`) for one batch; sums are in float64.

        Raises:
            ValueError: fewer than 4 samples.
        """
        n = len(grams[0])
        if n < 4:
            raise ValueError(f"{n} samples, and HSIC₁ takes at least 4")
        centred = u_centred(torch.stack([gram.double() for gram in grams]))
        for rows in centred.split(max(1, -(-self.images // GROUPS)), dim=1):
            flat = rows.flatten(1)
            self._terms.append((flat @ flat.T / (n - 3)).cpu())
            self._sizes.append(rows.shape[1])

    def finish(self) -> Moments:
        """What was added up."""
        return Moments(torch.stack(self._terms).numpy(), np.array(self._sizes, dtype=np.float64))


def _normalised(hsic: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return _divided(hsic[rows, columns], hsic[rows, rows], hsic[columns, columns])


def _divided(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """both / √(first · second), NaN where these are not both positive."""
    varies = (first > 0) & (second > 0)
    # The product of two roots, as a product of small numbers may be zero.
    scale = np.sqrt(np.where(varies, first, 1)) * np.sqrt(np.where(varies, second, 1))
    return np.where(varies, both / scale, np.nan)
