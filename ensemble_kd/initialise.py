"""First weights for networks without normalisation layers, which otherwise hardly start to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD = 1.0
SHIFT = 0.5
HEAD_SPREAD = 0.1


@torch.no_grad()
def unit_variance(net: nn.Module, inputs: Tensor) -> None:
    """Scale every convolution and linear layer by what one batch does to it, in place.

    He initialisation, then as the batch passes through, each output channel gets standard deviation 1
    and mean 0.5 (the last layer 0.1 and 0), and the layers behind it see that. After Mishkin and Matas
    2016 (layer-sequential unit variance), by channel instead of by layer. The mean is not 0: a deep
    stack that is centred exactly learns its training images as fast and generalises worse.

    Args:
        net: whose layers each run once in a forward pass, the classifier last.
        inputs: a batch of preprocessed images, of 64 or more.
    """
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def rescale(layer: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        is_head = layer is layers[-1]
        channel = 1 if isinstance(layer, nn.Conv2d) else out.ndim - 1
        others = [axis for axis in range(out.ndim) if axis != channel]
        shape = [-1 if axis == channel else 1 for axis in range(out.ndim)]
        std, mean = torch.std_mean(out, others)
        std = std.clamp_min(0.1 * std.mean() + 1e-8)  # an almost constant channel is not blown up
        gain = (HEAD_SPREAD if is_head else SPREAD) / std
        shift = 0.0 if is_head else SHIFT
        layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is None:
            return out * gain.view(shape)
        layer.bias.copy_((layer.bias - mean) * gain + shift)
        return (out - mean.view(shape)) * gain.view(shape) + shift

    training = net.training
    net.eval()  # no dropout while measuring
    hooks = [layer.register_forward_hook(rescale) for layer in layers]
    try:
        net(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(training)
