"""Stored outputs of teachers: what a teacher said to which pixels, kept in the cache.

An entry is found by a hash of all that it depends on, so a stale one is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ensemble_kd import __version__, files
from ensemble_kd.console import log

MAX_NUMBERS = 25_000_000
"""Larger outputs (100 MB in float32) are held in memory and not written."""

_LIBRARIES = ("torch", "timm", "torchvision")


def through_store(
    depends_on: dict[str, Any] | None, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The outputs kept under `depends_on`, on the CPU; otherwise `compute` them, keep and return them.

    With None, nothing is read or kept: for teachers whose code has no hash.
    """
    if depends_on is None:
        return compute()
    facts = depends_on | {name: version(name) for name in _LIBRARIES} | {"ensemble-kd": __version__}
    path = files.cache_dir() / "outputs" / f"{files.sha256_json(facts)[:32]}.safetensors"
    if path.is_file():
        try:
            kept = safetensors.torch.load(path.read_bytes())
            if "logits" in kept:
                return kept
        except SafetensorError:
            pass
        path.unlink()  # cut off or damaged: made again
    outputs = compute()
    if sum(values.numel() for values in outputs.values()) <= MAX_NUMBERS:
        tensors = {name: values.cpu().contiguous() for name, values in outputs.items()}
        try:
            files.write_bytes(path, safetensors.torch.save(tensors))
        except OSError as error:
            log.warning("outputs of a teacher are not kept: %s (%s)", error.strerror, path.parent)
    return outputs
