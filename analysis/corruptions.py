"""Images made worse: noise, blur, contrast and brightness as pure functions of pixels, ids and a seed.

The idea is Hendrycks and Dietterich's (2019), and so are the kinds; the strengths are not theirs but our
own, and lengths are shares of an image's side, so that small and large images suffer alike. Scores
under these are no ImageNet-C scores.

Everything is computed in float64 from whole sums, image by image, and rounded to whole grey levels, so that
the pixels are the same in any batch and order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float64, Int, UInt8
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from ensemble_kd.data.dataset import Images
from ensemble_kd.data.hashing import uniforms

STRENGTHS: dict[str, tuple[float, float, float]] = {
    "noise": (0.1, 0.2, 0.4),
    "blur": (0.03, 0.06, 0.12),
    "contrast": (0.4, 0.6, 0.8),
    "brightness": (0.15, 0.3, 0.5),
}
UNITS = {
    "noise": "standard deviation, of a grey scale of 0–1",
    "blur": "standard deviation, as a share of the shorter side",
    "contrast": "share of the contrast that is taken away",
    "brightness": "added to a grey scale of 0–1",
}
_VIEW = -1  # of the hash: views that networks are trained on count from 0
_ROWS = 64


def corrupted(images: Images, kind: str, strength: float, seed: int) -> Images:
    """All of the images after `corrupt`, in memory."""
    made = [corrupt(batch.decoded, batch.ids, kind, strength, seed=seed) for batch in images.batches(_ROWS)]
    return Images(torch.cat(made), images.labels, images.ids)


def corrupt(
    pixels: UInt8[Tensor, "B C H W"], sample_ids: Int[Tensor, " B"], kind: str, strength: float, *, seed: int
) -> UInt8[Tensor, "B C H W"]:
    """The images after one kind of corruption; strength 0 leaves them as they are.

    `noise` adds independent normal noise to each value, the same pattern at each strength; `blur` is
    Gaussian, mirrored at the edges; `contrast` pulls to the image's own mean; `brightness` adds a
    constant. All are cut off at black and white.

    Args:
        pixels: images of any size.
        sample_ids: noise depends on them and on the seed, and on nothing else.
        kind: a key of `STRENGTHS`.
        strength: in the unit of `UNITS`.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown corruption {kind!r}; known: {', '.join(_KINDS)}")
    if strength == 0 or not len(pixels):
        return pixels
    changed = _KINDS[kind](pixels.double(), sample_ids, strength, seed)
    return changed.round_().clamp_(0, 255).to(torch.uint8)


def _noise(x: Float64[Tensor, "B C H W"], ids: Tensor, strength: float, seed: int) -> Tensor:
    # From the middle of each of the 2²⁴ steps, so that no number is infinite and the mean is 0.
    drawn = uniforms(seed, _VIEW, ids, 0, x[0].numel()).T.double() + 2**-25
    return torch.special.ndtri(drawn).view_as(x).mul_(255 * strength).add_(x)


def _blur(x: Float64[Tensor, "B C H W"], _ids: Tensor, strength: float, _seed: int) -> Tensor:
    height, width = x.shape[2:]
    down, across = (_blurring(side, strength * min(height, width)).to(x.device) for side in (height, width))
    return down @ x @ across.T


def _blurring(side: int, deviation: float) -> Float64[Tensor, "side side"]:
    """The matrix that blurs a column of pixels: what becomes of each single one."""
    return torch.from_numpy(gaussian_filter1d(np.eye(side), deviation, axis=0, mode="mirror"))


def _contrast(x: Float64[Tensor, "B C H W"], _ids: Tensor, strength: float, _seed: int) -> Tensor:
    mean = x.sum(dim=(1, 2, 3), keepdim=True) / x[0].numel()  # of whole numbers: exact in any order
    return mean + (1 - strength) * (x - mean)


def _brightness(x: Float64[Tensor, "B C H W"], _ids: Tensor, strength: float, _seed: int) -> Tensor:
    return x + 255 * strength


_KINDS: dict[str, Callable[[Tensor, Tensor, float, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
}
