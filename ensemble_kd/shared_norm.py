"""BatchNorm over the whole batch where several processes hold its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ensemble_kd import distributed


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; what flows back is summed likewise, as each used the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.add_up(total)
        return total


class SharedStatistics(TorchFunctionMode):
    """While entered, every BatchNorm in training mode, whosever module it is, uses the statistics of all parts.

    torch's own SyncBatchNorm needs a GPU, and modules of its class in place of a library's own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace `torch.nn.functional.batch_norm`; all else goes its way."""
        return (shared_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of the parts (n_r, C, …) of a batch, with mean and variance of all of it."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    wide = x if x.dtype == torch.float64 else x.float()
    count = wide.new_tensor([x.numel() / x.shape[1]])
    sums = _Sum.apply(torch.cat([wide.sum(dim=axes), count]))
    mean = sums[:-1] / sums[-1]
    apart = wide - mean.view(shape)
    variance = _Sum.apply(apart.square().sum(dim=axes)) / sums[-1]
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (sums[-1] / (sums[-1] - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    normalised = apart * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        normalised = normalised * weight.view(shape)
    if bias is not None:
        normalised = normalised + bias.view(shape)
    return normalised.to(x.dtype)
