"""Penultimate features of any classifier, and the one feature loss towards those of the teachers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ensemble_kd.classifier import Classifier
from ensemble_kd.errors import ModelError
from ensemble_kd.losses import feature_loss


class FeatureTap:
    """While entered, keeps what the last layer of a network was given, pooled to (B, D).

    Maps are averaged over positions, tokens over the sequence; so it works for convolutional
    networks and transformers alike.
    """

    def __init__(self, classifier: Classifier, label: str) -> None:
        self.label = label
        self._head = head_of(classifier, label)
        self._kept: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> FeatureTap:
        self._hook = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._kept = inputs[0]

    def take(self) -> Float[Tensor, "B D"]:
        """The features of the last forward pass, which are forgotten here.

        Raises:
            ModelError: the last layer was not run.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise _no_features(self.label, "its last layer was not part of the forward pass")
        return _pooled(kept)


def _pooled(features: Tensor) -> Tensor:
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


def head_of(classifier: Classifier, label: str) -> nn.Module:
    """The last layer: what timm calls the classifier, else the linear or convolutional one that runs last.

    Raises:
        ModelError: there is none.
    """
    get_classifier = getattr(classifier.net, "get_classifier", None)
    named = get_classifier() if callable(get_classifier) else None
    if isinstance(named, (nn.Linear, nn.Conv2d)):
        return named
    ran: list[nn.Module] = []
    layers = [module for module in classifier.net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_pre_hook(lambda module, _: ran.append(module)) for layer in layers]
    try:
        _dry_forward(classifier)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise _no_features(label, "it has no linear or convolutional layer")
    return ran[-1]


def feature_width(classifier: Classifier, label: str) -> int:
    """D of a classifier's penultimate features, found by a dry forward in eval mode."""
    with FeatureTap(classifier, label) as tap:
        _dry_forward(classifier)
        return int(tap.take().shape[1])


@torch.inference_mode()
def _dry_forward(classifier: Classifier) -> None:
    """One black image through the network in eval mode; its mode is restored."""
    pre, training = classifier.card.preprocess, classifier.training
    tensor = next(iter(classifier.net.state_dict().values()), torch.empty(0))
    try:
        classifier.eval()(torch.zeros(1, pre.channels, *pre.size, device=tensor.device))
    finally:
        classifier.train(training)


class FeatureTerm(nn.Module):
    """One linear projector a teacher, from the student's features to the teacher's width.

    Trained beside the student and left behind: the student's file does not hold it.
    """

    def __init__(self, width: int, teacher_widths: Sequence[int], weight: float, seed: int) -> None:
        super().__init__()
        self.weight = weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projectors = nn.ModuleList(nn.Linear(width, wanted) for wanted in teacher_widths)

    def forward(
        self, features: Float[Tensor, "B D"], wanted: Sequence[Tensor], weights: Tensor
    ) -> Float[Tensor, ""]:
        """The weight times Σ_k of `losses.feature_loss` with the teachers' weights (K,) or (K, B)."""
        features = features.float()
        shares = weights if weights.ndim == 2 else weights[:, None].expand(-1, len(features))
        terms = [
            feature_loss(projector(features), target, share)
            for projector, target, share in zip(self.projectors, wanted, shares, strict=True)
        ]
        return self.weight * torch.stack(terms).sum()


def _no_features(label: str, why: str) -> ModelError:
    return ModelError(
        f"{label!r} has no penultimate features", why, "leave --feature-weight out, or choose another network"
    )
