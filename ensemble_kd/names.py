"""Names of models as text: what can be read from them without loading anything."""

from __future__ import annotations

import re
from pathlib import Path

LIBRARIES = ("timm", "tv", "hf-hub", "py")
"""What may stand before the colon of a model's name."""


def label_of(text: str) -> str:
    """The short name of a model, from its text alone: architecture, factory, file or run, and seed.

    Examples:
        >>> [label_of(name) for name in ("timm:resnet18.a1_in1k#2", "tv:vgg16@IMAGENET1K_V1", "py:mine.py:make", "runs/a")]
        ['resnet18.a1_in1k#2', 'tv:vgg16', 'make', 'a']
    """
    body, _, seed = split_seed(text)
    arch = split_weights(body)[0]
    library, colon, rest = arch.partition(":")
    if colon and library == "py":
        base = rest.rpartition(":")[2]
    elif colon and library in LIBRARIES:
        base = arch if library == "tv" else rest.rpartition("/")[2]
    else:
        path = Path(arch)
        inside = path.suffix == ".safetensors" and path.stem in ("student", "model")
        base = path.parent.name if inside else path.name.removesuffix(".safetensors")
    return f"{base}#{seed}" if seed else base


def split_seed(text: str) -> tuple[str, str, str]:
    """`resnet18#1` to its name, `#` and `1`; without a seed of 64 bits the last two are empty."""
    match = re.fullmatch(r"(.+)#([0-9]{1,18})", text.strip())
    return (match[1], "#", match[2]) if match else (text.strip(), "", "")


def split_weights(body: str) -> tuple[str, str]:
    """`resnet18@file.pth` to its two parts; an @ in the path of a run or file belongs to the path."""
    arch, _, weights = body.partition("@")
    library, colon, _ = arch.partition(":")
    is_path = "/" in arch and not (colon and library in LIBRARIES)
    return (body, "") if is_path else (arch, weights)
