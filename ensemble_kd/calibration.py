"""Temperature scaling on held-out labels (Guo et al. 2017)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

LOWEST, HIGHEST = 0.05, 20.0
"""A model without an error on the split has no best temperature but 0, so the search is bounded."""


def fit_temperature(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """The temperature in [0.05, 20] at which softmax(z / τ) has the lowest NLL.

    The NLL is convex in 1 / τ, so the bounded search over log τ finds its one minimum.
    """
    z, y = logits.double().cpu().numpy(), labels.cpu().numpy()
    z = z - z.max(axis=1, keepdims=True)
    rows = np.arange(len(y))

    def nll(log_temperature: float) -> float:
        return float(-log_softmax(z / math.exp(log_temperature), axis=1)[rows, y].mean())

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(min((0.0, *bounds, float(found.x)), key=nll))
