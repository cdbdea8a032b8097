"""The k largest logits of each sample, with what makes their probabilities exact at chosen temperatures.

Shapes: `N` samples, `C` classes, `k` kept, `T` temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ensemble_kd.errors import ConfigError


class TopK(NamedTuple):
    """What is kept of logits (N, C); the largest logit of each sample is 0."""

    classes: Int[Tensor, "N k"]
    """Those that are kept, the likeliest first."""
    values: Float[Tensor, "N k"]
    """Their logits, less the largest of the sample."""
    logsumexp: Float[Tensor, "N T"]
    """log Σ exp(z / T) over all classes, of the same logits, for each temperature."""
    temperatures: tuple[float, ...]
    """Those of `logsumexp`; the logits can be used at these alone."""


def below_largest(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Logits less the largest of their sample, so that it is 0 and all others are below.

    A constant added to all logits of a sample changes nothing; half precision is finest around 0.
    """
    return logits - logits.amax(dim=1, keepdim=True)


def compress(logits: Float[Tensor, "N C"], k: int, temperatures: Sequence[float]) -> TopK:
    """Keep the k largest logits of each sample, and the exact logsumexp for each of the temperatures.

    The sum is taken in float64: the mass outside the k is what is left of 1, and may be small.

    Examples:
        >>> kept = compress(torch.tensor([[5.0, 1.0, 4.0, 0.0]]), k=2, temperatures=[1.0])
        >>> kept.classes.tolist(), kept.values.tolist()
        ([[0, 2]], [[0.0, -1.0]])
        >>> [round(p, 4) for p in expand(kept, 1.0, classes=4).softmax(dim=1)[0].tolist()]  # the rest is shared
        [0.7179, 0.009, 0.2641, 0.009]
    """
    below = below_largest(logits.float())
    values, index = below.topk(k, dim=1)
    wide = below.double()
    sums = [(wide / temperature).logsumexp(dim=1) for temperature in temperatures]
    return TopK(index, values, torch.stack(sums, dim=1).float(), tuple(temperatures))


def expand(kept: TopK, temperature: float, classes: int) -> Float[Tensor, "N C"]:
    """Logits (N, C) in float32 whose softmax(· / temperature) is the distribution that was kept.

    Each kept class has its own probability, exp(z/T − logsumexp). The mass m that is missing is spread
    evenly over the other classes, so that KL(original ‖ this) ≤ m · log(C − k) nats; scaling the kept
    ones up to 1 instead would give them m too much, and the others nothing.

    Raises:
        ConfigError: the logsumexp at this temperature was not kept.
    """
    if temperature not in kept.temperatures:
        known = ", ".join(f"{kept_at:g}" for kept_at in kept.temperatures)
        raise ConfigError(
            f"top-k targets kept for temperature {known} cannot be used at {temperature:g}",
            "how much probability lies outside the k largest logits is known only there",
            "keep them for this temperature as well, or keep all logits: leave top_k out",
        )
    logsumexp = kept.logsumexp[:, kept.temperatures.index(temperature), None]
    log_p = kept.values.float() / temperature - logsumexp
    # Rounded logits may sum to more than 1: what cannot be told from 0 becomes float32's smallest step.
    missing = (1 - log_p.exp().sum(dim=1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
    others = max(classes - kept.classes.shape[1], 1)
    tail = temperature * (missing / others).log()
    return tail.expand(-1, classes).clone().scatter_(1, kept.classes, temperature * log_p)
