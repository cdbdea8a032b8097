"""Which device to compute on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had there without swapping, with what this process holds; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    free = available_memory()
    return None if free is None else free + pages * resource.getpagesize()


def available_memory() -> int | None:
    """Bytes of this machine that can be had without swapping; None where it does not say (Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held there so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
