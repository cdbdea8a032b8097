"""How much each teacher counts: functions that give weights (K,), or (K, B) where they differ by sample.

Each names the inputs that it needs, and is given those:

    count           K
    given           the user's weights (K,)
    val_logits      (K, N, C), val_labels (N,): the validation split
    pool            by which they are pooled
    known           (K, C), bool: which classes each teacher knows
    logits          (K, B, C), of the batch
    labels          (B,), of the batch
    student_logits  (B, C), without a gradient
    temperatures    (K,)
    draws           (K, B), uniform in [0, 1), a function of seed, epoch and sample

Those that name none of the last five are called once; the others may name `count`, `pool` and `known`
beside them. All weights are non-negative and sum to 1. Logits are those of the calibrated teachers,
where they are calibrated; at classes that a teacher does not know they are very low.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import lsq_linear, minimize
from scipy.special import log_softmax as np_log_softmax
from scipy.special import logsumexp
from scipy.special import softmax as np_softmax
from torch import Tensor

ONCE = ("count", "given", "val_logits", "val_labels", "pool", "known")
EACH_BATCH = ("logits", "labels", "student_logits", "temperatures", "draws")


def uniform_weights(count: int) -> Float[Tensor, " K"]:
    """The same weight for each of `count` teachers."""
    return torch.full((count,), 1.0 / count)


def given_weights(given: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """The weights that the user gave."""
    return given


def best_weights(val_logits: Float[Tensor, "K N C"], val_labels: Int[Tensor, " N"]) -> Float[Tensor, " K"]:
    """All weight on the teacher of the highest validation accuracy; in a tie, of the lowest NLL.

    Examples:
        >>> val_logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> best_weights(val_logits, torch.tensor([0, 1])).tolist()  # one of two right, two of two
        [0.0, 1.0]
    """
    accuracy = (val_logits.argmax(dim=2) == val_labels).double().mean(dim=1)
    nll = torch.from_numpy(-_label_log_probabilities(val_logits, val_labels).mean(axis=0))
    tied = accuracy.cpu() == accuracy.cpu().amax()
    return _one_hot(int(nll.masked_fill(~tied, torch.inf).argmin()), len(val_logits))


def learned_weights(
    val_logits: Float[Tensor, "K N C"], val_labels: Int[Tensor, " N"], pool: str = "prob"
) -> Float[Tensor, " K"]:
    """The weights whose pooled teachers have the lowest NLL on held-out labels, at temperature 1.

    Convex, for both pools: −mean log Σ_k w_k p_k(y), and −mean log softmax(Σ_k w_k z_k)(y). SLSQP from
    uniform weights. Held-out labels, since weights fitted to the student's own divergence would pick
    the teacher that is easiest to copy.
    """
    fitted = _minimise_nll(_objective(val_logits, val_labels, pool), len(val_logits))
    return torch.from_numpy(fitted).float()


def greedy_weights(
    val_logits: Float[Tensor, "K N C"], val_labels: Int[Tensor, " N"], pool: str = "prob", rounds: int = 50
) -> Float[Tensor, " K"]:
    """Selection with replacement (Caruana et al. 2004): `rounds` times the teacher that lowers the NLL most.

    The weights are each teacher's count, divided by `rounds`.
    """
    objective, counts = _objective(val_logits, val_labels, pool), np.zeros(len(val_logits))
    for _ in range(rounds):
        tried = counts + np.eye(len(counts))
        counts = tried[int(np.argmin([objective(row / row.sum())[0] for row in tried]))]
    return torch.from_numpy(counts / rounds).float()


def entropy_weights(
    logits: Float[Tensor, "K B C"], known: Bool[Tensor, "K C"] | None = None
) -> Float[Tensor, "K B"]:
    """w_k = (1 − H_k / Σ_j H_j) / (K − 1): surer teachers count more (Kwon et al. 2020, EBKD).

    H is the entropy at temperature 1. Where all are certain, the weights are equal. Teachers that know
    some classes only are compared by H / log of how many they know.

    Examples:
        >>> logits = torch.tensor([[[9.0, 0.0]], [[1.0, 0.0]]])  # two teachers, one image: the first is sure
        >>> [round(w, 3) for w in entropy_weights(logits)[:, 0].tolist()]
        [0.998, 0.002]
    """
    count = len(logits)
    if count == 1:
        return torch.ones(logits.shape[:2], dtype=_wide(logits), device=logits.device)
    log_p = torch.log_softmax(logits.to(_wide(logits)), dim=2)
    entropy = -(log_p.exp() * log_p).sum(dim=2)
    if known is not None:
        entropy = entropy / known.sum(dim=1, keepdim=True).to(entropy).log()
    total = entropy.sum(dim=0)
    share = torch.where(total > 0, entropy / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / count)
    return _normalised(1 - share)


def confidence_weights(logits: Float[Tensor, "K B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, "K B"]:
    """w_k = (1 − softmax_k(CE_k)) / (K − 1): teachers nearer to the label count more (CA-MKD, eq. 3).

    Zhang, Chen and Wang 2022; CE at temperature 1. A single teacher has weight 1.
    """
    if len(logits) == 1:
        return torch.ones(logits.shape[:2], dtype=_wide(logits), device=logits.device)
    log_p = torch.log_softmax(logits.to(_wide(logits)), dim=2)
    picked = labels[None, :, None].expand(len(logits), -1, 1)
    cross_entropy = -log_p.gather(2, picked).squeeze(2)
    return _normalised(1 - torch.softmax(cross_entropy, dim=0))


def agree_weights(
    logits: Float[Tensor, "K B C"],
    student_logits: Float[Tensor, "B C"],
    temperatures: Float[Tensor, " K"],
    cap: float = 0.6,
) -> Float[Tensor, " K"]:
    """The weights of the shortest combined gradient: min ‖Σ w_k g_k‖², 0 ≤ w_k ≤ cap (AE-KD, Du et al. 2020).

    g_k = T_k · mean over the batch of (q − p_k), the gradient of T²·KL to the student's logits, in closed
    form. Solved on the CPU, exactly, by bounded least squares; `cap` is at least 1 / K.
    """
    count = len(logits)
    t = temperatures.double()[:, None, None]
    gap = torch.softmax(student_logits.double() / t, dim=2) - torch.softmax(logits.double() / t, dim=2)
    gradients = (t * gap).mean(dim=1).cpu().numpy()
    return torch.from_numpy(_shortest(gradients, max(cap, 1 / count))).to(logits.device, _wide(logits))


def drop_weights(
    logits: Float[Tensor, "K B C"],
    student_logits: Float[Tensor, "B C"],
    temperatures: Float[Tensor, " K"],
    draws: Float[Tensor, "K B"],
    drop: float = 0.5,
) -> Float[Tensor, "K B"]:
    """Equal weights of the teachers kept: the one of the highest T²·KL, and each other with 1 − `drop`.

    Teacher dropping of UNIC (Sariyildiz et al. 2024), by sample.
    """
    t = temperatures[:, None, None].to(_wide(logits))
    log_p, log_q = (torch.log_softmax(z.to(t) / t, dim=2) for z in (logits, student_logits[None]))
    loss = t[:, :, 0] ** 2 * (log_p.exp() * (log_p - log_q)).sum(dim=2)
    highest = torch.arange(len(logits), device=loss.device)[:, None] == loss.argmax(dim=0)
    return _normalised((highest | (draws >= drop)).to(loss))


COMBINERS: dict[str, Callable[..., Tensor]] = {
    "mean": uniform_weights,
    "fixed": given_weights,
    "learned": learned_weights,
    "greedy": greedy_weights,
    "entropy": entropy_weights,
    "confidence": confidence_weights,
    "agree": agree_weights,
    "drop": drop_weights,
    "best": best_weights,
}


@cache
def inputs_of(weigh: Callable[..., Tensor]) -> frozenset[str]:
    """Which of `ONCE` and `EACH_BATCH` the function names.

    Raises:
        TypeError: it has a parameter without a default that is neither.
    """
    named = set()
    for name, parameter in inspect.signature(weigh).parameters.items():
        if name in (*ONCE, *EACH_BATCH):
            named.add(name)
        elif parameter.default is parameter.empty:
            raise TypeError(f"it wants {name!r}, which is not offered")
    return frozenset(named)


def call(weigh: Callable[..., Tensor], offered: dict[str, Any]) -> Any:
    """The weights, from those of the offered inputs that the function names."""
    return weigh(**{name: offered[name] for name in inputs_of(weigh) if name in offered})


def _objective(
    val_logits: Tensor, val_labels: Tensor, pool: str
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """NLL of the pooled teachers and its gradient, as a function of the weights, in float64."""
    if pool == "logit":
        z = np_log_softmax(val_logits.double().cpu().numpy(), axis=2)
        at_label = _label_log_probabilities(val_logits, val_labels)

        def of_logits(weights: np.ndarray) -> tuple[float, np.ndarray]:
            mixed = np.tensordot(weights, z, axes=1)
            expected = np.einsum("nc,knc->nk", np_softmax(mixed, axis=1), z)
            value = -np_log_softmax(mixed, axis=1)[np.arange(len(mixed)), _numpy(val_labels)].mean()
            return float(value), (expected - at_label).mean(axis=0)

        return of_logits
    log_p = _label_log_probabilities(val_logits, val_labels)

    def of_probabilities(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = logsumexp(log_p, b=weights, axis=1)
        ratio = np.exp(np.minimum(log_p - mixed[:, None], 600))  # finite also where w_k = 0 and p_k is all
        return float(-mixed.mean()), -ratio.mean(axis=0)

    return of_probabilities


def _minimise_nll(objective: Callable[[np.ndarray], tuple[float, np.ndarray]], count: int) -> np.ndarray:
    """The best point of the simplex: SLSQP's, and never worse than uniform or any single teacher."""
    uniform = np.full(count, 1 / count)
    found = minimize(
        objective,
        uniform,
        jac=True,
        method="SLSQP",
        bounds=[(1e-9, 1)] * count,  # inside the simplex, where the NLL is finite
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-15, "maxiter": 500},
    ).x
    rounded = np.where(found < 1e-7, 0, found)
    candidates = [rounded / rounded.sum(), found / found.sum(), uniform, *np.eye(count)]
    return candidates[int(np.argmin([objective(weights)[0] for weights in candidates]))]


def optimality_gap(
    weights: Float[Tensor, " K"],
    val_logits: Float[Tensor, "K N C"],
    val_labels: Int[Tensor, " N"],
    pool: str = "prob",
) -> float:
    """By how much at most the NLL of `weights` lies above the lowest: the Frank–Wolfe gap, in nats."""
    w = weights.double().cpu().numpy()
    gradient = _objective(val_logits, val_labels, pool)(w)[1]
    return float(gradient @ w - gradient.min())


def _shortest(vectors: np.ndarray, cap: float) -> np.ndarray:
    """argmin ‖Σ w_k v_k‖ over 0 ≤ w_k ≤ cap, Σ w_k = 1, for `vectors` (K, C); scale-free."""
    count, longest = len(vectors), np.linalg.norm(vectors, axis=1).max()
    if count * cap <= 1 + 1e-9 or longest < 1e-150:
        return np.full(count, 1 / count)
    heavy = 1e4  # weight of the row that makes them sum to 1; the rest is divided away below
    rows = np.vstack([vectors.T / longest, np.full((1, count), heavy)])
    right = np.zeros(len(rows))
    right[-1] = heavy
    steps = 100 * count  # scipy's default is K, and too few
    found = lsq_linear(rows, right, bounds=(0, cap), method="bvls", tol=1e-15, max_iter=steps).x
    weights = np.clip(found, 0, cap)
    return weights / weights.sum()


def _label_log_probabilities(logits: Tensor, labels: Tensor) -> np.ndarray:
    """log p_k(y) of each sample (N, K), in float64."""
    log_p = np_log_softmax(logits.double().cpu().numpy(), axis=2)
    return log_p[:, np.arange(log_p.shape[1]), _numpy(labels)].T


def _numpy(labels: Tensor) -> np.ndarray:
    return labels.cpu().numpy()


def _one_hot(index: int, count: int) -> Tensor:
    weights = torch.zeros(count)
    weights[index] = 1
    return weights


def _normalised(raw: Tensor) -> Tensor:
    return raw / raw.sum(dim=0)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype.itemsize < 4 else logits.dtype
