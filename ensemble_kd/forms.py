"""Small-image forms: what the CIFAR literature does to networks that were drawn for 224 pixels."""

from __future__ import annotations

from torch import nn


def to_small_form(net: nn.Module, num_classes: int) -> bool:
    """Change `net` in place into its small-image form; says whether there was one.

    ResNets get a 3×3 stem of stride 1 and no max-pool (He et al. 2016, section 4.2); VGGs a global
    pool and one linear layer instead of three; networks with a `conv_stem` a stem of stride 1.
    Works for timm's and torchvision's layouts; others are left as they are.
    """
    conv1, maxpool = getattr(net, "conv1", None), getattr(net, "maxpool", None)
    if isinstance(conv1, nn.Conv2d) and isinstance(maxpool, nn.Module):
        net.conv1 = nn.Conv2d(
            conv1.in_channels, conv1.out_channels, 3, padding=1, bias=conv1.bias is not None
        )
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
        return True
    if hasattr(net, "pre_logits") and isinstance(getattr(net, "features", None), nn.Sequential):
        from timm.layers import ClassifierHead

        width = _last_width(net)
        net.pre_logits = nn.Identity()
        net.head = ClassifierHead(width, num_classes, pool_type="avg")
        return True
    if type(net).__name__ == "VGG" and isinstance(getattr(net, "classifier", None), nn.Sequential):
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Linear(_last_width(net), num_classes)
        return True
    stem = getattr(net, "conv_stem", None)
    if isinstance(stem, nn.Conv2d):
        stem.stride = (1, 1)
        return True
    return False


def _last_width(net: nn.Module) -> int:
    features = net.get_submodule("features")
    return [module for module in features.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
