"""The project's own small networks; each takes the number of classes, channels and the input size.

Sources: LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; `cifar_quick` after Caffe's
cifar10_quick; ResNets for small images (He et al. 2016, section 4.2), 6n + 2 layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5×5 convolutions and three linear layers; 61,706 parameters at 1×32×32 and 10 classes."""

    def __init__(self, num_classes: int, channels: int, size: int) -> None:
        super().__init__()
        map_size = ((size - 4) // 2 - 4) // 2
        if map_size < 4:
            raise ValueError("LeNet needs at least 28×28")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * map_size**2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class CifarQuick(nn.Module):
    """Three 5×5 convolutions with overlapping 3/2 pools, then two linear layers."""

    def __init__(self, num_classes: int, channels: int, size: int) -> None:
        super().__init__()
        map_size = size
        for _ in range(3):
            map_size = -(-(map_size - 3) // 2) + 1  # ceil mode, as Caffe pools
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(3, 2, ceil_mode=True),
        )
        self.classifier = nn.Sequential(nn.Linear(64 * map_size**2, 64), nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class _Block(nn.Module):
    """Two 3×3 convolutions; the shortcut pads with zero channels (option A of He et al.)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.new_channels = stride, width - width_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + shortcut)


class SmallResNet(nn.Module):
    """3×3 stem, three stages of 16, 32 and 64 channels with `blocks` blocks each, global pool."""

    def __init__(self, num_classes: int, channels: int, size: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        width_in = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_Block(width_in, width, stride))
                width_in = width
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet8(num_classes: int, channels: int, size: int) -> nn.Module:
    """ResNet with one block a stage."""
    return SmallResNet(num_classes, channels, size, blocks=1)


def resnet20(num_classes: int, channels: int, size: int) -> nn.Module:
    """ResNet with three blocks a stage."""
    return SmallResNet(num_classes, channels, size, blocks=3)


STUDENTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": LeNet,
    "cifar-quick": CifarQuick,
    "resnet8": resnet8,
    "resnet20": resnet20,
}


def own_size(image_size: int) -> int:
    """The input size that these networks take: the images' own between 28 and 32, else the nearer."""
    return min(max(image_size, 28), 32)
