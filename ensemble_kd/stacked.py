"""Networks of one kind side by side: stacked parameters, and an optimiser with a learning rate for each."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ensemble_kd.stepping import Recipe

_MOMENTUM = 0.9
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Stack:
    """S networks as one function; their own parameters and buffers become views of the stacked ones."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        self.parameters = self._stacked([dict(net.named_parameters()) for net in nets])
        self.buffers = self._stacked([dict(net.named_buffers()) for net in nets])
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self._skeleton = copy.deepcopy(nets[0]).to("meta").train()
        self._forward = vmap(self._one, randomness="error")

    @staticmethod
    def _stacked(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        made = {}
        for name in tensors[0]:
            made[name] = torch.stack([own[name].detach() for own in tensors])
            for own, view in zip(tensors, made[name], strict=True):
                own[name].data = view
        return made

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self._skeleton, (parameters, buffers), (x,))

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs (S, B, ...) to logits (S, B, C), in training mode; BatchNorm's buffers are updated.

        Raises:
            RuntimeError: the network draws random numbers, or does what cannot be done for many at once.
        """
        return self._forward(self.parameters, self.buffers, x)


class StackedStepper:
    """`stepping.Stepper` for a stack: the same formulas, with clipping and learning rates by network."""

    def __init__(self, stack: Stack, recipe: Recipe) -> None:
        self._stack, self._recipe, self._steps = stack, recipe, 0
        self._values = list(stack.parameters.values())
        self._first = [torch.zeros_like(p) for p in self._values]
        self._second = [torch.zeros_like(p) for p in self._values] if recipe.optimizer == "adamw" else []
        # As for one network: on matrices and filters only, which here have one more dimension.
        self._decay = [recipe.weight_decay if p.ndim > 2 else 0.0 for p in self._values]
        self._average: dict[str, Tensor] = {}
        self._corrections = torch.ones(2, dtype=self._values[0].dtype, device=self._values[0].device)

    def prepare(self) -> None:
        """Set what the next step needs and a recorded step cannot compute."""
        self._steps += 1
        if self._second:
            first, second = (1 - beta**self._steps for beta in _BETAS)
            self._corrections.copy_(torch.tensor([first, second**0.5], dtype=torch.float64))

    @torch.no_grad()
    def __call__(self, losses: Tensor, rates: Tensor) -> None:
        """Move all networks; `losses` and learning `rates` are (S,)."""
        with torch.enable_grad():
            own = torch.autograd.grad(losses.sum(), self._values)
        gradients = self._clipped(own)
        for number, (p, g) in enumerate(zip(self._values, gradients, strict=True)):
            rate = rates.view(-1, *[1] * (p.ndim - 1))
            if self._second:
                self._adamw(number, p, g, rate)
            else:
                self._sgd(number, p, g, rate)
        if self._recipe.ema is not None:
            self._update_average(self._recipe.ema)

    def _clipped(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._recipe.clip_norm is None:
            return gradients
        squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
        factor = (self._recipe.clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        return [g * factor.view(-1, *[1] * (g.ndim - 1)) for g in gradients]

    def _sgd(self, number: int, p: Tensor, g: Tensor, rate: Tensor) -> None:
        """With Nesterov momentum, as torch.optim.SGD."""
        if self._decay[number]:
            g = g + self._decay[number] * p
        momentum = self._first[number].mul_(_MOMENTUM).add_(g)
        p.sub_(rate * (g + _MOMENTUM * momentum))

    def _adamw(self, number: int, p: Tensor, g: Tensor, rate: Tensor) -> None:
        """As torch.optim.AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
        first = self._first[number].lerp_(g, 1 - _BETAS[0])
        second = self._second[number].mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        p.mul_(1 - rate * self._decay[number])
        spread = second.sqrt() / self._corrections[1] + _EPSILON
        p.sub_(rate / self._corrections[0] * first / spread)

    def _update_average(self, decay: float) -> None:
        now = {**self._stack.parameters, **self._stack.buffers}
        if not self._average:
            self._average = {name: tensor.detach().clone() for name, tensor in now.items()}
            return
        for name, tensor in now.items():
            if tensor.is_floating_point():
                self._average[name].lerp_(tensor, 1 - decay)
            else:
                self._average[name].copy_(tensor)

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights, where they are kept, into the networks."""
        for name, tensor in {**self._stack.parameters, **self._stack.buffers}.items():
            if self._average:
                tensor.copy_(self._average[name])
