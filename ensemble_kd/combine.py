"""Several teachers' logits to one soft target: weights times a pool.

Shapes: `K` teachers, `B` batch, `C` classes; weights are non-negative and sum to 1 over `K`.
Temperatures are one a teacher, so every pool tempers first. For probabilities the order matters
(tempering the mean is something else); for logits it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


def uniform_weights(count: int) -> Float[Tensor, " K"]:
    """The same weight for each of `count` teachers."""
    return torch.full((count,), 1.0 / count)


def pool_probabilities(
    logits: Float[Tensor, "K B C"], weights: Float[Tensor, " K"], temperatures: Float[Tensor, " K"]
) -> Float[Tensor, "B C"]:
    """Σ_k w_k softmax(z_k / T_k): the mixture that Σ_k w_k KL(p_k ‖ q) pulls the student to."""
    probabilities = torch.softmax(logits / temperatures[:, None, None], dim=2)
    return torch.einsum("k,kbc->bc", weights, probabilities)


def pool_logits(
    logits: Float[Tensor, "K B C"], weights: Float[Tensor, " K"], temperatures: Float[Tensor, " K"]
) -> Float[Tensor, "B C"]:
    """softmax(Σ_k w_k z_k / T_k): the normalised geometric mean of the tempered outputs."""
    return torch.softmax(torch.einsum("k,kbc->bc", weights / temperatures, logits), dim=1)


POOLS: dict[str, Pool] = {"prob": pool_probabilities, "logit": pool_logits}


def combine(
    logits: Float[Tensor, "K B C"],
    weights: Float[Tensor, " K"],
    temperatures: Float[Tensor, " K"],
    pool: str = "prob",
) -> Float[Tensor, "B C"]:
    """One soft target from the stacked teachers, by the `pool` of that name (see `POOLS`)."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    weights, temperatures = weights.to(logits), temperatures.to(logits)
    return POOLS[pool](logits, weights, temperatures)
