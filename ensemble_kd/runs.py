"""Run folders: made, filled step by step, found again."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ensemble_kd import __version__, files
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log, log_to_file
from ensemble_kd.errors import RunError
from ensemble_kd.models import ModelName
from ensemble_kd.weights import load_classifier, save_classifier

RUNS = Path("runs")
OBJECTS = "distill with objects"
"""The verb in the status of a run that was given Python objects, which no file can bring back."""
_OVERWRITTEN = (
    "history.jsonl",
    "metrics.json",
    "manifest.json",
    "status.json",
    "train.log",
    "curves.png",
    "student.safetensors",
    "model.safetensors",
    "predictions.safetensors",
    "profile.json",
    "trace.json",
    "controls",
    "analysis",
    "report",
)
"""What a run writes; anything else in its folder is the user's."""
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @classmethod
    def create(cls, verb: str, out: Path | None, name: str, overwrite: bool, config: str) -> Run:
        """A new run folder of `distill` or `train`, with its config.yaml.

        Raises:
            RunError: the folder holds something already, and `overwrite` is not given.
        """
        folder = out or _new_folder(name)
        run = cls(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            run._make_room(overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_text(folder / "config.yaml", config)
        except OSError as error:
            raise RunError(
                f"cannot write to {folder}", str(error.strerror), "name another folder: --out PATH"
            ) from error
        files.write_json(run.path("status.json"), {"verb": verb, "state": "running", "networks": {}})
        return run

    def _make_room(self, overwrite: bool) -> None:
        known = (self.folder / "status.json").is_file()
        if overwrite and known:
            for name in _OVERWRITTEN:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return
        status = self.status() if known else {}
        if known and status["state"] != "finished" and status["verb"] == "distill":
            fix = f"go on with it: ekd resume {self.folder}   (or replace it: --overwrite)"
        elif known:
            fix = "replace it with --overwrite, or name another folder: --out PATH"
        else:
            fix = "name another folder: --out PATH (what is no run is never overwritten)"
        raise RunError(f"{self.folder} is not empty", "a run writes to a folder of its own", fix)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run folder.

        Raises:
            RunError: it is none.
        """
        if not (folder / "status.json").is_file() or not (folder / "config.yaml").is_file():
            raise RunError(
                f"{folder} is no run folder",
                "it has no config.yaml and status.json",
                "name a folder made by `ekd distill`",
            )
        return cls(folder)

    @classmethod
    def newest(cls) -> Run:
        """The run of `distill` in `runs/` that finished last.

        Raises:
            RunError: there is none.
        """
        finished = [
            p for p in RUNS.glob("*/metrics.json") if (p.parent / "predictions.safetensors").is_file()
        ]
        if not finished:
            raise RunError(
                f"no finished run in {RUNS}/",
                "none was named, and the newest is taken from there",
                "name a run folder, or make one: ekd distill --teachers resnet18,vgg16 --student lenet",
            )
        return cls.open(max(finished, key=lambda path: path.stat().st_mtime).parent)

    def path(self, name: str) -> Path:
        """A file in the folder."""
        return self.folder / name

    def status(self) -> dict[str, Any]:
        """`verb`, `state`, and the `networks` that are finished, by name, with file and hash."""
        return files.read_json(self.path("status.json"))

    def set_state(self, state: str) -> None:
        """Note whether the run is running, stopped or finished."""
        files.write_json(self.path("status.json"), {**self.status(), "state": state})

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep train.log; note in the status whether the block ended or was stopped."""
        with log_to_file(self.path("train.log")):
            try:
                yield
            except BaseException as error:
                self.set_state("stopped")
                if isinstance(error, KeyboardInterrupt) and self.status()["verb"] == "distill":
                    log.warning("go on with it: ekd resume %s", self.folder)
                raise
        self.set_state("finished")

    def keep_network(self, name: str, classifier: Classifier, history: list[dict[str, Any]]) -> None:
        """Save a finished network and its history; a run that is resumed does not train it again."""
        file = network_file(name)
        save_classifier(self.path(file), classifier)
        others = [row for row in self.history() if row["network"] != name]
        rows = others + [{"network": name, **row} for row in history]
        files.write_text(self.path("history.jsonl"), "".join(map(files.json_line, rows)))
        status = self.status()
        status["networks"][name] = {"file": file, "sha256": files.sha256_file(self.path(file))}
        files.write_json(self.path("status.json"), status)

    def finished_network(self, name: str, code: ModelName | None = None) -> Classifier | None:
        """A network that an earlier part of this run finished; `code` is the user's own, if it is theirs."""
        kept = self.status()["networks"].get(name)
        if kept is None or not self.path(kept["file"]).is_file():
            return None
        if files.sha256_file(self.path(kept["file"])) != kept["sha256"]:
            log.warning("%s was changed since it was finished: it is trained again", self.path(kept["file"]))
            return None
        return load_classifier(self.path(kept["file"]), code)

    def history(self) -> list[dict[str, Any]]:
        """All rows of history.jsonl, of finished networks."""
        path = self.path("history.jsonl")
        return files.read_json_lines(path) if path.is_file() else []

    def metrics(self) -> dict[str, Any]:
        """metrics.json of a finished run.

        Raises:
            RunError: the run did not finish.
        """
        if not self.path("metrics.json").is_file():
            raise RunError(
                f"{self.folder} did not finish", "it has no metrics.json", f"go on: ekd resume {self.folder}"
            )
        return self._read("metrics.json")

    def manifest(self) -> dict[str, Any]:
        """manifest.json of a finished run.

        Raises:
            RunError: it is missing or damaged.
        """
        return self._read("manifest.json")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return files.read_json(self.path(name))
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> RunError:
        return RunError(
            f"cannot read {self.path(name)}",
            f"it is missing or damaged: {error}",
            "bring the file back, or distil again with --overwrite",
        )

    def keep_predictions(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Save test logits (N, C) by model, and the labels, for the analyses."""
        tensors = {f"logits/{name}": values.cpu().contiguous() for name, values in logits.items()}
        tensors["labels"] = labels.cpu()
        files.write_bytes(self.path("predictions.safetensors"), safetensors.torch.save(tensors))

    def predictions(self) -> tuple[dict[str, Tensor], Tensor]:
        """What `keep_predictions` saved.

        Raises:
            RunError: there is no such file, or it is damaged.
        """
        path = self.path("predictions.safetensors")
        if not path.is_file():
            raise RunError(
                f"{self.folder} has no predictions",
                "only `ekd distill` keeps them",
                "name a run of `ekd distill`",
            )
        try:
            tensors = safetensors.torch.load(path.read_bytes())
            labels = tensors.pop("labels")
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise self._damaged(path.name, error) from error
        return {name.removeprefix("logits/"): values for name, values in tensors.items()}, labels


def _new_folder(name: str) -> Path:
    """A folder in `runs/` that does not exist yet, with the time in its name."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")
    base = RUNS / f"{readable}-{datetime.now():%Y%m%d-%H%M%S}"
    copies = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([base], copies) if not folder.exists())


def network_file(name: str) -> str:
    """The file of a network in a run folder."""
    return f"{name}.safetensors" if name in ("student", "model") else f"controls/{name}.safetensors"


def surroundings(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its configuration: command, versions, hardware."""
    return {
        "argv": sys.argv,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {"ensemble-kd": __version__, **{name: version(name) for name in _PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


class Stopwatch:
    """Seconds by part, in the order in which the parts ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 3)
        self._last = now
