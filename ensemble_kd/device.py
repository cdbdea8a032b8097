"""Which device to compute on."""

from __future__ import annotations

import torch

from ensemble_kd.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """The device named, or with `auto` a CUDA GPU, Apple's MPS or the CPU, in this order.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"there is no device {wanted!r} here",
            str(error).splitlines()[0],
            "leave --device out, or say --device cpu",
        ) from error
    return device
