"""The usual distillation loss in one step: its value and its gradient together, without a graph between.

(1 − w) · CE(labels) + w · T² · KL(target ‖ student) has the gradient
((1 − w)(softmax(s) · Σy − y) + w · T (softmax(s / T) − p)) / B, so that both softmaxes are computed once and
nothing but the gradient is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ensemble_kd.losses import UNLABELLED, Mixed


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor | None,
        truth: Tensor | None,
        log_target: Tensor,
        weight: float,
        temperature: float,
    ) -> Tensor:
        batch, hard, p = len(logits), 1 - weight, log_target.exp()
        log_q = torch.log_softmax(logits / temperature, dim=1)
        loss = (torch.xlogy(p, p) - p * log_q).sum() * (weight * temperature**2 / batch)
        grad = (log_q.exp() - p) * (weight * temperature / batch)
        if labels is not None:
            log_q = torch.log_softmax(logits, dim=1)
            loss = torch.add(loss, F.nll_loss(log_q, labels), alpha=hard)
            at_label = torch.full_like(logits[:, :1], -1.0)
            grad.add_(log_q.exp().scatter_add_(1, labels[:, None], at_label), alpha=hard / batch)
        elif truth is not None:
            log_q = torch.log_softmax(logits, dim=1)
            loss = torch.sub(loss, (truth * log_q).sum(), alpha=hard / batch)
            grad.add_(log_q.exp() * truth.sum(dim=1, keepdim=True) - truth, alpha=hard / batch)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return upstream * grad, None, None, None, None, None


def fused_kd(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | None,
    log_target: Float[Tensor, "B C"],
    *,
    soft_weight: float,
    temperature: float,
    label_smoothing: float = 0.0,
    mixed: Mixed | None = None,
    unlabelled: bool = True,
) -> Float[Tensor, ""]:
    """The same number and gradient as `losses.distillation_loss` with `kl`, in half the operations.

    Its gradient cannot be differentiated again. Labels may be None at soft weight 1.

    Args:
        unlabelled: whether some labels may be `losses.UNLABELLED`; False saves looking.
    """
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    plain, truth = None, None
    if soft_weight < 1:
        assert labels is not None
        if unlabelled or label_smoothing or mixed is not None:
            truth = truth_of(labels, wide, label_smoothing, mixed)
        else:
            plain = labels
    loss: Tensor = _Fused.apply(wide, plain, truth, log_target.to(wide), soft_weight, temperature)
    return loss


def truth_of(
    labels: Tensor, like: Tensor, label_smoothing: float = 0.0, mixed: Mixed | None = None
) -> Tensor:
    """The labels as distributions (B, C), smoothed and mixed; all zero where there is no label."""
    truth = torch.zeros_like(like)
    shares = [(labels, None)] if mixed is None else [(labels, mixed.share), (mixed.labels, 1 - mixed.share)]
    for part, share in shares:
        known = (part != UNLABELLED).to(like)
        counted = known if share is None else known * share
        truth.scatter_add_(1, part.clamp_min(0)[:, None], counted[:, None])
    if label_smoothing:
        uniform = truth.sum(dim=1, keepdim=True) / like.shape[1]
        truth = (1 - label_smoothing) * truth + label_smoothing * uniform
    return truth
