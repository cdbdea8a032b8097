"""Checkpoints of a training: safetensors and JSON in a folder each, whole or not there, never pickled.

`FOLDER/step-00000120/` holds model, optimizer and rng as safetensors, state.json, and manifest.json with the
SHA-256 of each. The two newest are kept; one that is damaged is passed over, and the one before it is taken.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ensemble_kd import distributed, files
from ensemble_kd.console import log

SECONDS = 60.0
"""Between two checkpoints, unless a training stops."""
_KEPT = 2
_FORMAT = 1
_PARTS = ("model", "optimizer", "rng")


@dataclass(frozen=True)
class Snapshot:
    """All that a training in progress consists of."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]
    """Plain values: where the data stand, the steps taken, and the rows of the epochs that ended."""


class Checkpoints:
    """The checkpoints of one training; written now and then, found again by one with the same `facts`."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], seconds: float = SECONDS) -> None:
        """`facts` are all that the training depends on: with others it would not go on but be another."""
        self.folder, self.seconds = folder, seconds
        self._key = files.sha256_json(facts)
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one is old enough."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write the snapshot of a step; older ones go once it is on the disk."""
        path = self.folder / f"step-{step:08d}"
        state = {"format": _FORMAT, "key": self._key, "threads": torch.get_num_threads(), **snapshot.state}
        contents = {f"{part}.safetensors": _packed(getattr(snapshot, part)) for part in _PARTS}
        files.sweep(self.folder)
        if path.exists():  # from before a fall back to an earlier one
            shutil.rmtree(path)
        files.write_folder(path, {**contents, "state.json": json.dumps(state).encode()})
        self._last = time.monotonic()
        for old in self._steps()[_KEPT:]:
            shutil.rmtree(old)

    def latest(self) -> Snapshot | None:
        """The newest whole checkpoint of this training, or None."""
        if distributed.first():
            found = next(((path.name, kept) for path in self._steps() if (kept := self._read(path))), None)
            distributed.told(found and found[0])
            return found and found[1]
        name = distributed.told(None)
        return None if name is None else self._read(self.folder / name)

    def _read(self, path: Path) -> Snapshot | None:
        try:
            contents = files.read_folder(path)
            state = json.loads(contents.pop("state.json"))
            of_this = state.get("format") == _FORMAT and state.get("key") == self._key
            threads = state["threads"] if of_this else None
            model, optimizer, rng = (
                safetensors.torch.load(contents[f"{part}.safetensors"]) for part in _PARTS
            )
        except (
            OSError,
            ValueError,
            LookupError,
            AttributeError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            log.warning("checkpoint %s is damaged and is passed over: %s", path, error)
            return None
        if not of_this:
            log.warning("checkpoint %s is of another training and is passed over", path)
            return None
        if threads != torch.get_num_threads():
            log.warning(
                "%d threads, and the checkpoint was made with %s: sums may differ in their last bits",
                torch.get_num_threads(),
                threads,
            )
        return Snapshot(model, optimizer, rng, state)

    def clear(self) -> None:
        """Remove all of them: the training is finished."""
        if distributed.first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: values.cpu().contiguous() for name, values in tensors.items()})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that a training on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators into states that `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
