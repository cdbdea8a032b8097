"""Losses on logits: pure functions, float32 or wider inside, averaged over the batch.

Shapes: `B` batch, `C` classes, `D` features. Targets are log-probabilities at the temperature, −∞
where they are zero. What is called the target's logits is T · log p, which for a single teacher are its
own logits but for a constant. Sums over classes, one mean over the batch, T² once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Number = float | int | Tensor
"""A tensor without dimensions where many students are trained at once."""
UNLABELLED = -1
"""The label of a sample that has none: it counts in the soft loss alone."""


class Mixed(NamedTuple):
    """What was mixed into a batch: the labels (B,) of the second images, and the share (B,) of the first."""

    labels: Tensor
    share: Tensor


def kl_to_target(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """T² · KL(target ‖ softmax(logits / T)), in nats.

    Hinton, Vinyals and Dean 2015, section 2. The gradient to `logits` is T(q − p)/B, so that its
    size stays about the same whatever T is.

    Args:
        logits: the student's logits.
        log_target: log-probabilities of the target.
        temperature: T, what the student's logits are divided by.

    Examples:
        >>> teacher, student = torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> [round(kl_to_target(student, (teacher / t).log_softmax(dim=1), t).item(), 3) for t in (1, 4, 20)]
        [0.241, 0.976, 1.118]
        >>> kl_to_target(teacher, teacher.log_softmax(dim=1), 1.0).item()
        0.0
    """
    p = _wide(log_target).exp()
    entropy = -torch.xlogy(p, p).sum(dim=1).mean()
    return soft_cross_entropy(logits, log_target, temperature) - temperature**2 * entropy


def soft_cross_entropy(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number = 1.0
) -> Float[Tensor, ""]:
    """−T² · Σ p log softmax(logits / T): the gradient of `kl_to_target`, without the entropy term."""
    plain = not isinstance(temperature, Tensor) and temperature == 1
    scaled = _wide(logits) if plain else _wide(logits) / temperature
    log_q = F.log_softmax(scaled, dim=1)
    return (_wide(log_target).exp() * log_q).sum() * (-(temperature**2) / len(logits))


def unscaled_kl(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """KL(target ‖ softmax(logits / T)) without T²: its gradient shrinks as T grows."""
    return kl_to_target(logits, log_target, temperature) / temperature**2


def reverse_kl(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """T² · KL(softmax(logits / T) ‖ target), in nats; infinite where the target has a zero."""
    log_q = F.log_softmax(_wide(logits) / temperature, dim=1)
    apart = log_q - _wide(log_target)
    terms = torch.where(apart.isposinf(), apart, log_q.exp() * apart)  # also where q underflows
    return terms.sum(dim=1).mean() * temperature**2


def jensen_shannon(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """T² · JS(target, softmax(logits / T)), JS ≤ log 2 nats."""
    log_q, log_p = F.log_softmax(_wide(logits) / temperature, dim=1), _wide(log_target)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    to_p = torch.xlogy(p, p) - torch.where(p > 0, p * log_m, 0)  # 0 · −∞ is 0 here
    return (to_p + q * (log_q - log_m)).sum(dim=1).mean() * (temperature**2 / 2)


def logit_mse(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """Mean of (s − z)² over batch and classes, both centred over the classes; z the target's logits."""
    return (_centred(_wide(logits)) - _centred(temperature * _wide(log_target))).square().mean()


def decoupled_kl(
    logits: Float[Tensor, "B C"],
    log_target: Float[Tensor, "B C"],
    temperature: Number,
    labels: Int[Tensor, " B"],
    alpha: Number = 1.0,
    beta: Number = 8.0,
) -> Float[Tensor, ""]:
    """T² · (α · TCKD + β · NCKD), the two parts of KL (Zhao et al. 2022, DKD, equation 7).

    TCKD is the KL of (p_y, 1 − p_y), NCKD that of the distributions over the other classes;
    KL = TCKD + (1 − p_y) · NCKD. Their paper warms the loss up over 20 epochs.
    """
    at, true = labels[:, None], F.one_hot(labels, logits.shape[1]).bool()
    log_q, log_p = F.log_softmax(_wide(logits) / temperature, dim=1), _wide(log_target)
    p_in, q_in = (values.gather(1, at).squeeze(1) for values in (log_p, log_q))
    p_out, q_out = (values.masked_fill(true, -torch.inf).logsumexp(dim=1) for values in (log_p, log_q))
    tckd = _cross(p_in, q_in) + _cross(p_out, q_out)
    # Where the target gives nothing to the other classes, they say nothing of each other.
    silent = torch.isneginf(p_out)[:, None]
    others_p = (log_p - p_out[:, None]).masked_fill(true | silent, -torch.inf)
    nckd = _cross(others_p, log_q - q_out[:, None]).sum(dim=1)
    return (alpha * tckd + beta * nckd).mean() * temperature**2


def _cross(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p · (log p − log q) by element, 0 where p is."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p.clamp_min(torch.finfo(p.dtype).min) - log_q), 0)


def relations(
    logits: Float[Tensor, "B C"],
    log_target: Float[Tensor, "B C"],
    temperature: Number,
    beta: Number = 1.0,
    gamma: Number = 1.0,
) -> Float[Tensor, ""]:
    """β · (1 − ρ over classes) + γ · (1 − ρ over the batch), ρ Pearson's (Huang et al. 2022, DIST)."""
    p, q = _wide(log_target).exp(), F.softmax(_wide(logits) / temperature, dim=1)
    between, within = (1 - _pearson(a, b).mean() for a, b in ((p, q), (p.T, q.T)))
    return beta * between + gamma * within


def standardised_kl(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """T² · KL of both sides' logits after z-scoring each sample's (Sun et al. 2024, logit standardisation)."""
    student, teacher = (_standardised(z) for z in (_wide(logits), temperature * _wide(log_target)))
    return kl_to_target(student, F.log_softmax(teacher / temperature, dim=1), temperature)


def hard_target(
    logits: Float[Tensor, "B C"], log_target: Float[Tensor, "B C"], temperature: Number
) -> Float[Tensor, ""]:
    """Cross-entropy with the target's likeliest class at temperature 1 (Touvron et al. 2021, DeiT)."""
    return F.cross_entropy(_wide(logits), log_target.argmax(dim=1))


@dataclass(frozen=True)
class SoftLoss:
    """A loss towards the soft target: its function, and the temperature that its authors use."""

    compute: Callable[..., Tensor]
    temperature: float = 4.0
    needs_labels: bool = False
    needs_all: bool = False
    """Whether it reads the logits of unlikely classes, which a store of the top k does not hold."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Its own numbers and their defaults."""


LOSSES: dict[str, SoftLoss] = {
    "kl": SoftLoss(kl_to_target),
    "kl-unscaled": SoftLoss(unscaled_kl),
    "ce": SoftLoss(soft_cross_entropy),
    "reverse-kl": SoftLoss(reverse_kl, needs_all=True),
    "js": SoftLoss(jensen_shannon, needs_all=True),
    "mse": SoftLoss(logit_mse, needs_all=True),
    "dkd": SoftLoss(decoupled_kl, needs_labels=True, numbers={"alpha": 1.0, "beta": 8.0}),
    "dist": SoftLoss(relations, temperature=1.0, numbers={"beta": 1.0, "gamma": 1.0}),
    "logit-std": SoftLoss(standardised_kl, temperature=2.0, needs_all=True),
    "hard": SoftLoss(hard_target),
}


def hard_cross_entropy(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    label_smoothing: float = 0.0,
    mixed: Mixed | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, in nats, with optional smoothing towards uniform.

    Divided by the whole batch: a labelled sample counts the same, however many have no label. Of mixed
    images each label counts by its share (Zhang et al. 2018, mixup; Yun et al. 2019, CutMix).
    """
    wide, options = _wide(logits), {"label_smoothing": label_smoothing, "ignore_index": UNLABELLED}
    if mixed is None:
        return F.cross_entropy(wide, labels, reduction="sum", **options) / len(logits)  # type: ignore[arg-type]
    first, second = (
        F.cross_entropy(wide, part, reduction="none", **options)  # type: ignore[arg-type]
        for part in (labels, mixed.labels)
    )
    return (mixed.share * first + (1 - mixed.share) * second).mean()


def distillation_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | None,
    log_target: Float[Tensor, "B C"] | None,
    *,
    soft_weight: float,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    loss: str = "kl",
    numbers: Mapping[str, float] | None = None,
    mixed: Mixed | None = None,
) -> Float[Tensor, ""]:
    """(1 − w) · CE(labels) + w · soft loss, which for `kl` is T² · KL(target ‖ student).

    A side with weight 0 is not computed: labels may be None at w = 1, the target at w = 0.

    Args:
        loss: a name of `LOSSES`.
        numbers: the loss's own numbers, where they are not its defaults.
        mixed: what was mixed into the images; losses that need labels cannot tell what a mixture is.

    Examples:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> log_target = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
        >>> round(distillation_loss(logits, labels, log_target, soft_weight=0.9).item(), 4)
        0.1051
        >>> round(distillation_loss(logits, labels, None, soft_weight=0.0).item(), 4)  # labels alone
        0.2201
    """
    if soft_weight == 0:
        assert labels is not None
        return hard_cross_entropy(logits, labels, label_smoothing, mixed)
    assert log_target is not None
    chosen, more = LOSSES[loss], dict(numbers or {})
    if chosen.needs_labels:
        assert labels is not None
        more["labels"] = labels  # type: ignore[assignment]
    soft = chosen.compute(logits, log_target, temperature, **more)
    if soft_weight == 1:
        return soft
    assert labels is not None
    hard = hard_cross_entropy(logits, labels, label_smoothing, mixed)
    return (1 - soft_weight) * hard + soft_weight * soft


def feature_loss(
    projected: Float[Tensor, "B D"], features: Float[Tensor, "B D"], weights: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """Mean over the batch of w · (1 − cosine + smooth-L1) to a teacher's standardised features.

    Features are standardised by sample, so that teachers of any width and scale count alike.

    Args:
        projected: the student's pooled penultimate features, brought to the teacher's width.
        features: the teacher's.
        weights: of this teacher, for each sample.
    """
    wanted = F.layer_norm(_wide(features), features.shape[1:])
    ours = _wide(projected)
    apart = 1 - F.cosine_similarity(ours, wanted, dim=1)
    return (weights * (apart + F.smooth_l1_loss(ours, wanted, reduction="none").mean(dim=1))).mean()


def soft_weight_at(schedule: str, weight: float, epoch: int, epochs: int, span: int | None = None) -> float:
    """The soft weight in an epoch (from 0) of `epochs`.

    `constant`; `linear`: falls over the second half, to 0 in the last epoch; `cutoff`: 0 after the first `span` epochs;
    `warmup`: rises over the first `span` epochs. The span is half of the epochs if it is None.

    Examples:
        >>> [round(soft_weight_at("linear", 0.9, epoch, 8), 3) for epoch in range(8)]
        [0.9, 0.9, 0.9, 0.9, 0.675, 0.45, 0.225, 0.0]
    """
    half = epochs / 2
    length = half if span is None else float(span)
    factor = {
        "constant": 1.0,
        "linear": min(1.0, (epochs - 1 - epoch) / half) if epochs > 1 else 1.0,
        "cutoff": 1.0 if epoch < length else 0.0,
        "warmup": min(1.0, (epoch + 1) / max(length, 1.0)),
    }
    return weight * factor[schedule]


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _standardised(values: Tensor) -> Tensor:
    centred = _centred(values)
    return centred / (centred.std(dim=1, keepdim=True) + 1e-7)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row; 0 for a constant row."""
    return F.cosine_similarity(_centred(a), _centred(b), dim=1, eps=1e-8)
