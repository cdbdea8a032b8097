"""Which device to compute on."""

from __future__ import annotations

import torch

from ensemble_kd.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """The CPU or the CUDA GPU named; with `auto` a GPU where there is one.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
