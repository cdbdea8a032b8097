"""A network together with what it needs to label raw images: its preprocessing and its class names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd import distributed
from ensemble_kd.errors import ModelError


@dataclass(frozen=True)
class Preprocess:
    """From raw images to a network's input: channels, size, then mean and standard deviation."""

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float in [0, 1], to float (B, channels, *size), normalised."""
        scale, shift = (values.to(images.device) for values in self.affine())
        return torch.addcmul(shift, self.fitted(images), scale)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (channels, 1, 1) from grey levels of 0 … 255 to normalised input."""
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (self.mean, self.std))
        return (1 / (255 * std)).float(), (-mean / std).float()

    def fitted(self, images: Tensor) -> Tensor:
        """Images in the channels and size of the network, as float grey levels of 0 … 255."""
        x = images.float() if images.dtype == torch.uint8 else images.float() * 255
        x = _convert_channels(x, self.channels)
        if tuple(x.shape[2:]) != self.size:
            shrinks = x.shape[2] > self.size[0] or x.shape[3] > self.size[1]
            x = F.interpolate(x, self.size, mode="bilinear", antialias=shrinks)
        return x


def _convert_channels(x: Tensor, channels: int) -> Tensor:
    check_channels(x.shape[1], channels)
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    return rgb_to_grayscale(x)


def check_channels(given: int, taken: int) -> None:
    """Refuse images with `given` channels for a network that takes others.

    Raises:
        ModelError: they cannot be converted.
    """
    if given not in (1, taken) and (given, taken) != (3, 1):
        raise ModelError(
            f"images with {given} channels, for a network that takes {taken}",
            "only grey ↔ RGB can be converted",
            "use a network that takes these images, or convert them first",
        )


def fit_channels(values: Iterable[float], channels: int) -> tuple[float, ...]:
    """Means or deviations for `channels` channels: as they are, or their average for each."""
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


@dataclass(frozen=True)
class Card:
    """What is needed to build a classifier again, apart from its weights."""

    model: str
    """The network's name, as `models.parse` takes it."""
    form: str
    """`small` for the small-image form of a network, `stock` for the library's own."""
    preprocess: Preprocess
    classes: tuple[str, ...]
    data: str = ""
    """The source of its training images."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Card:
        """The card whose `to_json` gave `values`.

        Raises:
            ValueError, KeyError, TypeError: they are no card's.
        """
        pre = values["preprocess"]
        channels, (height, width) = int(pre["channels"]), pre["size"]
        mean, std = (tuple(float(value) for value in pre[key]) for key in ("mean", "std"))
        if len(mean) != channels or len(std) != channels or not all(std):
            raise ValueError(f"{len(mean)} means and {len(std)} deviations for {channels} channels")
        preprocess = Preprocess(channels, (int(height), int(width)), mean, std)
        rest = {key: str(values[key]) for key in ("model", "form", "data")}
        return cls(**rest, preprocess=preprocess, classes=tuple(map(str, values["classes"])))


class Classifier(nn.Module):
    """Raw images in, logits out: `net` behind its own preprocessing, with a `card` that says what it is."""

    def __init__(self, net: nn.Module, card: Card, pretrained: bool = False) -> None:
        super().__init__()
        self.net, self.card = net, card
        self.pretrained = pretrained
        """Whether its weights were learned before, so that training goes on rather than starts."""
        # Kept on the network's device, so that a forward pass copies nothing there.
        self._scale: Tensor
        self._shift: Tensor
        for name, values in zip(("_scale", "_shift"), card.preprocess.affine(), strict=True):
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float in [0, 1], of any size, to logits (B, classes)."""
        x = self.fitted(images)
        if x.device.type == "cuda" and not self.is_own_code:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x)

    def fitted(self, images: Tensor) -> Tensor:
        """What the network itself is given: (B, channels, *size), normalised."""
        x = self.card.preprocess.fitted(images)
        return torch.addcmul(self._shift.to(x.device), x, self._scale.to(x.device))

    @property
    def is_own_code(self) -> bool:
        """Whether the user wrote the network: it may take views that only the usual layout has."""
        return self.card.model.startswith("py:")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return self.card.classes

    @property
    def parameter_count(self) -> int:
        """How many parameters the network has."""
        return sum(p.numel() for p in self.net.parameters())

    @property
    def byte_count(self) -> int:
        """The bytes of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in self.net.state_dict().values())

    def freeze(self) -> Classifier:
        """Eval mode and no gradients, for good; returns itself."""
        self.requires_grad_(False)
        return self.eval()

    def fingerprint(self) -> str:
        """SHA-256 of all parameters and buffers with their names, also of buffers that are not saved."""
        digest = hashlib.sha256()
        named = {**dict(self.net.named_buffers()), **self.net.state_dict()}
        for name, tensor in sorted(named.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = distributed.whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        return digest.hexdigest()
