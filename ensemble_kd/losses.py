"""Losses on logits: pure functions, float32 or wider inside, averaged over the batch.

Shapes: `B` batch, `C` classes. KL is summed over classes and averaged over the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def kl_to_target(
    logits: Float[Tensor, "B C"], target: Float[Tensor, "B C"], temperature: float
) -> Float[Tensor, ""]:
    """T² · KL(target ‖ softmax(logits / T)), in nats.

    Hinton, Vinyals and Dean 2015, section 2. The gradient to `logits` is T(q − p)/B, so that its
    size stays about the same whatever T is.

    Args:
        logits: the student's logits.
        target: probabilities that sum to 1 over the classes; zeros are allowed.
        temperature: T, what the student's logits are divided by.
    """
    target = target.float() if target.dtype.itemsize < 4 else target
    cross_entropy = soft_cross_entropy(logits, target, temperature)
    entropy = -torch.xlogy(target, target).sum(dim=1).mean()
    return cross_entropy - temperature**2 * entropy


def soft_cross_entropy(
    logits: Float[Tensor, "B C"], target: Float[Tensor, "B C"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """−T² · Σ p log softmax(logits / T): the gradient of `kl_to_target`, without the entropy term."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    log_q = F.log_softmax(logits / temperature, dim=1)
    return -(target * log_q).sum(dim=1).mean() * temperature**2


def hard_cross_entropy(
    logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy with the labels, in nats, with optional smoothing towards uniform."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def distillation_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | None,
    target: Float[Tensor, "B C"] | None,
    *,
    soft_weight: float,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """(1 − w) · CE(labels) + w · T² · KL(target ‖ student).

    A side with weight 0 is not computed: labels may be None at w = 1, the target at w = 0.
    """
    if soft_weight == 0:
        assert labels is not None
        return hard_cross_entropy(logits, labels, label_smoothing)
    assert target is not None
    soft = kl_to_target(logits, target, temperature)
    if soft_weight == 1:
        return soft
    assert labels is not None
    return (1 - soft_weight) * hard_cross_entropy(logits, labels, label_smoothing) + soft_weight * soft
