"""Which device to compute on."""

from __future__ import annotations

import torch

from ensemble_kd import distributed
from ensemble_kd.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """The CPU or the CUDA GPU named; with `auto` a GPU where there is one.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if wanted == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Of several processes each has a GPU of its own (see `distributed.joined`).
        return (
            torch.device("cuda", torch.cuda.current_device())
            if distributed.size() > 1
            else torch.device("cuda")
        )
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"only cpu and cuda are known, not {device.type}")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"there is no device {wanted!r} here",
            str(error).splitlines()[0],
            "leave --device out, or say --device cpu",
        ) from error
    return device
