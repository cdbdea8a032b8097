"""One optimiser step at a time: gradient, clipping, learning rate and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.guards import FiniteGuard
from ensemble_kd.profiling import span


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. All numbers are set; defaults for a case come from `recipes`."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    warmup_epochs: float
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    init: str = "default"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Stepper:
    """Takes one step for each loss; nothing in it waits for the device."""

    def __init__(self, net: nn.Module, beside: nn.Module | None, recipe: Recipe, steps_an_epoch: int) -> None:
        """`net` is trained, and averaged where the recipe says so; `beside` is trained with it."""
        self.net, self.recipe, self.steps = net, recipe, 0
        self._trained = nn.ModuleList([net] + ([beside] if beside is not None else []))
        self._scale = warmup_cosine(
            recipe.epochs * steps_an_epoch, round(recipe.warmup_epochs * steps_an_epoch)
        )
        device = next(net.parameters()).device
        # On a GPU the rate is a tensor, which a recorded step reads anew each time.
        self._rate = torch.zeros((), device=device) if device.type == "cuda" else None
        self.optimizer = make_optimizer(self._trained, recipe, self._rate)
        self.guard = FiniteGuard(device)
        self.optimizer.found_inf = self.guard.found  # type: ignore[attr-defined]
        self._average: list[Tensor] = []
        self.set_rate()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.recipe.lr * self._scale(self.steps)

    def set_rate(self) -> None:
        """Give the optimiser the rate of the next step."""
        if self._rate is not None:
            self._rate.fill_(self.rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def __call__(self, loss: Tensor) -> None:
        """Move the weights; `count` must follow."""
        self.optimizer.zero_grad(set_to_none=True)
        with span("backward"):
            loss.backward()
        with span("optimizer"):
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._trained.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
            if self.recipe.ema is not None:
                self._update_average(self.recipe.ema)

    def count(self) -> None:
        """One step was taken: go on to the next rate."""
        self.steps += 1
        self.set_rate()

    @property
    def _named(self) -> dict[str, Tensor]:
        """Parameters and buffers of all that is trained."""
        return {**dict(self._trained.named_parameters()), **dict(self._trained.named_buffers())}

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of the model, with the average, and those of the optimiser."""
        average = {f"average.{number}": tensor for number, tensor in enumerate(self._average)}
        moments = {
            f"{number}.{name}": values
            for number, parameter in enumerate(self._parameters)
            for name, values in self.optimizer.state[parameter].items()
        }
        return {**self._named, **average}, moments

    @torch.no_grad()
    def load(self, model: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int) -> None:
        """Go on where `state` was taken, after `steps` steps; tensors stay where they are."""
        for name, tensor in self._named.items():
            tensor.copy_(model[name])
        places = _tensors(self.net)
        if "average.0" in model:
            self._average = [_laid_out(model[f"average.{n}"], place) for n, place in enumerate(places)]
        for key, values in moments.items():
            number, _, name = key.partition(".")
            parameter = self._parameters[int(number)]
            self.optimizer.state[parameter][name] = _laid_out(values, parameter)
        self.steps = steps
        self.set_rate()

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        now = _tensors(self.net)
        if not self._average:
            self._average = [tensor.clone() for tensor in now]
            return
        pairs = list(zip(self._average, now, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - decay)
        for kept, tensor in pairs:
            if not kept.is_floating_point():
                kept.copy_(tensor)

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights, where they are kept, into the network."""
        for tensor, kept in zip(_tensors(self.net), self._average, strict=bool(self._average)):
            tensor.copy_(kept)


def _laid_out(values: Tensor, place: Tensor) -> Tensor:
    """A copy where `place` is, of its memory layout where they have one shape: other layouts round otherwise."""
    if values.shape != place.shape:
        return values.to(place.device)
    return torch.empty_like(place, dtype=values.dtype).copy_(values)


def _tensors(net: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*net.parameters(), *net.buffers()]


def make_optimizer(model: nn.Module, recipe: Recipe, rate: Tensor | None = None) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW; weight decay on matrices and filters only.

    With `rate`, the learning rate is read from that tensor.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    lr: float | Tensor = recipe.lr if rate is None else rate
    fused = parameters[0].device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused, capturable=rate is not None)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=fused)


def warmup_cosine(total: int, warmup: int) -> Callable[[int], float]:
    """The learning rate's factor at each step: linear up over `warmup` steps, then half a cosine to 0."""

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return scale
