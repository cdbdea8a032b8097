"""Several teachers' logits to one soft target: weights times a pool.

Shapes: `K` teachers, `B` batch, `C` classes. Weights are (K,), or (K, B) where they differ by sample;
they are non-negative and sum to 1 over the teachers. Temperatures are one a teacher.

Targets are log-probabilities: finite for finite logits, also where the probabilities underflow.

At a common temperature Σ_k w_k KL(p_k ‖ q) and KL(Σ_k w_k p_k ‖ q) differ by a constant in q, so every
scheme that weighs the teachers' divergences is a set of weights for one target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Weights = Float[Tensor, " K"] | Float[Tensor, "K B"]
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


def pool_probabilities(
    logits: Float[Tensor, "K B C"], weights: Weights, temperatures: Float[Tensor, " K"]
) -> Float[Tensor, "B C"]:
    """log Σ_k w_k softmax(z_k / T_k): the mixture that Σ_k w_k KL(p_k ‖ q) pulls the student to."""
    largest = logits.amax(dim=2, keepdim=True)  # taken away, so that large logits keep their digits
    log_p = torch.log_softmax((logits - largest) / temperatures[:, None, None], dim=2)
    return torch.logsumexp(log_p + _by_sample(weights).log(), dim=0)


def pool_logits(
    logits: Float[Tensor, "K B C"], weights: Weights, temperatures: Float[Tensor, " K"]
) -> Float[Tensor, "B C"]:
    """log softmax(Σ_k w_k z_k / T_k): the normalised geometric mean of the tempered outputs."""
    largest = logits.amax(dim=2, keepdim=True)  # taken away, so that large logits keep their digits
    scaled = (logits - largest) / temperatures[:, None, None]
    return torch.log_softmax((scaled * _by_sample(weights)).sum(dim=0), dim=1)


def pool_then_temper(
    logits: Float[Tensor, "K B C"], weights: Weights, temperatures: Float[Tensor, " K"]
) -> Float[Tensor, "B C"]:
    """log softmax(log Σ_k w_k softmax(z_k) / T), T the weighted mean of the teachers' temperatures."""
    pooled = pool_probabilities(logits, weights, torch.ones_like(temperatures))
    return temper(pooled, _mean_temperature(weights, temperatures))


POOLS: dict[str, Pool] = {
    "prob": pool_probabilities,
    "logit": pool_logits,
    "pool-then-temper": pool_then_temper,
}


def combine(
    logits: Float[Tensor, "K B C"],
    weights: Weights,
    temperatures: Float[Tensor, " K"],
    pool: str = "prob",
    *,
    known: Bool[Tensor, "K C"] | None = None,
    after: float = 1.0,
) -> Float[Tensor, "B C"]:
    """One soft target from the stacked teachers, as log-probabilities.

    Args:
        logits: of each teacher; what stands at classes that a teacher does not know is not read.
        weights: of the teachers, for all samples or for each.
        temperatures: what each teacher's logits are divided by.
        pool: a name of `POOLS`.
        known: which classes each teacher knows; None if all know all (see `pool_partial`).
        after: a temperature applied once more to the pooled target (Rahaman and Thiery 2021).

    Raises:
        ValueError: teachers that know some classes only, with the pool of logits.

    Examples:
        >>> certain, unsure = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.0]])
        >>> logits, half, at_one = torch.stack([certain, unsure]), torch.tensor([0.5, 0.5]), torch.ones(2)
        >>> [[round(p, 3) for p in combine(logits, half, at_one, pool).exp()[0].tolist()] for pool in ("prob", "logit")]
        [[0.592, 0.249, 0.16], [0.662, 0.19, 0.148]]
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    weights, temperatures = weights.to(logits), temperatures.to(logits)
    if known is None:
        pooled = POOLS[pool](logits, weights, temperatures)
    elif pool == "logit":
        raise ValueError("logits of teachers that know some classes only have no common scale")
    elif pool == "prob":
        pooled = pool_partial(logits, weights, temperatures, known)
    else:
        pooled = pool_partial(logits, weights, torch.ones_like(temperatures), known)
        pooled = temper(pooled, _mean_temperature(weights, temperatures))
    return pooled if after == 1 else temper(pooled, after)


def temper(log_p: Float[Tensor, "B C"], temperature: float | Tensor) -> Float[Tensor, "B C"]:
    """log softmax(log p / T), T one number or one a sample.

    Examples:
        >>> [round(p, 3) for p in temper(torch.tensor([[0.9, 0.1]]).log(), 2.0).exp()[0].tolist()]
        [0.75, 0.25]
    """
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature[:, None]
    return torch.log_softmax(log_p / temperature, dim=1)


def pool_partial(
    logits: Float[Tensor, "K B C"],
    weights: Weights,
    temperatures: Float[Tensor, " K"],
    known: Bool[Tensor, "K C"],
) -> Float[Tensor, "B C"]:
    """The mixture of teachers of which some know only a part S_k of the classes.

    Such a teacher says how its classes divide their mass, and nothing of how much they have: it has no
    vote on the rest. The target u is the distribution that this leaves in peace,
    u = Σ_k w_k (u(S_k) p_k on S_k, and u itself elsewhere): with teachers that know all, the mixture.
    For each class Σ_{k knows c} w_k (u(S_k) p_k(c) − u(c)) = 0, so u is linear in the K masses
    m_k = u(S_k), which solve a K×K system (`_votes`). It has one solution where the known parts overlap
    into one whole that holds every class.
    """
    missing = ~known[:, None, :]
    tempered = logits.double() / temperatures.double()[:, None, None]
    log_p = torch.log_softmax(tempered.masked_fill(missing, -torch.inf), dim=2)
    w = _by_sample(weights).double() * known[:, None, :]
    total = w.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    votes = _votes(log_p, w, known)
    mixed = torch.logsumexp(log_p + votes.T.log()[:, :, None], dim=0) - total.log()
    return mixed.clamp_min(torch.finfo(torch.float32).min).log_softmax(dim=1).to(logits.dtype)


def _votes(log_p: Tensor, w: Tensor, known: Tensor) -> Tensor:
    """w_k m_k up to a factor (B, K): the stationary distribution of a Markov chain of the teachers.

    Teacher k passes p_k(c) on to each teacher i that knows c, by its share w_i / Σ_{j knows c} w_j. Solved
    without a subtraction (Grassmann, Taksar and Heyman 1985), so that teachers that hardly meet keep
    their digits. The bounds from below serve teachers that give nothing to what they share, and weights of 0.
    """
    bounded = w.clamp_min(1e-20) * known[:, None]
    share = (bounded / bounded.sum(dim=0).clamp_min(1e-300)).expand_as(log_p)
    chain = torch.einsum("kbc,ibc->bki", log_p.exp().clamp_min(1e-30) * known[:, None], share)
    for n in range(chain.shape[1] - 1, 0, -1):
        chain[:, :n, n] /= chain[:, n, :n].sum(dim=1, keepdim=True).clamp_min(1e-100)
        chain[:, :n, :n] += chain[:, :n, n, None] * chain[:, n, None, :n]
    votes = torch.ones_like(chain[:, 0])
    for n in range(1, votes.shape[1]):
        votes[:, n] = (votes[:, :n] * chain[:, :n, n]).sum(dim=1)
        votes[:, : n + 1] /= votes[:, : n + 1].amax(dim=1, keepdim=True)
    return votes * (w.amax(dim=2) > 0).T


def overlap(known: Bool[Tensor, "K C"]) -> tuple[list[int], bool]:
    """Which classes no teacher knows, and whether the known parts hang together through shared classes."""
    nobody = (~known.any(dim=0)).nonzero().flatten().tolist()
    reached, before = known[0], torch.zeros_like(known[0])
    while not torch.equal(reached, before):
        before = reached
        reached = known[(known & reached).any(dim=1)].any(dim=0)
    return nobody, bool((reached == known.any(dim=0)).all())


def _by_sample(weights: Tensor) -> Tensor:
    """Weights (K,) or (K, B) as (K, 1, 1) or (K, B, 1)."""
    return weights[:, None, None] if weights.ndim == 1 else weights[:, :, None]


def _mean_temperature(weights: Tensor, temperatures: Tensor) -> Tensor:
    return (weights.mT if weights.ndim == 2 else weights) @ temperatures
