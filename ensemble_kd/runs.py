"""Run folders: made, filled step by step, found again."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from ensemble_kd import __version__, distributed, files
from ensemble_kd.checkpoints import Checkpoints
from ensemble_kd.classifier import Classifier
from ensemble_kd.config import flat
from ensemble_kd.console import log, log_to_file
from ensemble_kd.errors import RunError, nearest_path
from ensemble_kd.locks import lock
from ensemble_kd.models import ModelName
from ensemble_kd.weights import load_classifier, save_classifier

RUNS = Path("runs")
OBJECTS = "distill with objects"
"""The verb in the status of a run that was given Python objects, which no file can bring back."""
_OVERWRITTEN = (
    "history.jsonl", "metrics.json", "manifest.json", "status.json", "train.log", "curves.png",
    "student.safetensors", "model.safetensors", "predictions.safetensors", "profile.json", "trace.json",
    "controls", "checkpoints", "analysis", "report", "export", "tracking",
)  # fmt: skip
"""What a run writes; anything else in its folder is the user's."""
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
_version = cache(metadata.version)  # reading them takes a while


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    held: BinaryIO | None = None
    """The lock of the folder, while this process writes to it; of several processes the first does."""

    @classmethod
    def create(cls, verb: str, out: Path | None, name: str, overwrite: bool, config: str) -> Run:
        """A new run folder of `distill` or `train`, with its config.yaml; it is locked until it is worked on.

        Raises:
            RunError: the folder holds something already, and `overwrite` is not given; or it is in use.
        """
        folder = distributed.told(out or _new_folder(name))
        created = distributed.by_first(lambda: cls._create(verb, folder, overwrite, config))
        return created or cls(folder)

    @classmethod
    def _create(cls, verb: str, folder: Path, overwrite: bool, config: str) -> Run:
        run = cls(folder)
        run._check_free(overwrite)
        try:
            run = run._locked()
            run._make_room(overwrite)
            files.write_text(folder / "config.yaml", config)
            facts = {"configuration": flat(yaml.safe_load(config))}
            status = {"verb": verb, "state": "running", "networks": {}, "facts": facts}
            run.write_json("status.json", status)
        except OSError as error:
            run.unlock()
            if error.errno in files.FULL:
                raise
            raise RunError(
                f"cannot write to {folder}", str(error.strerror), "name another folder: --out PATH"
            ) from error
        except RunError:
            run.unlock()
            raise
        except BaseException:
            if run.held is not None and not run.path("status.json").is_file():
                run.path("config.yaml").unlink(missing_ok=True)
            run.unlock()
            raise
        return run

    def locked(self) -> Run:
        """The same run, held against other processes.

        Raises:
            RunError: another one writes to it.
            OSError: it cannot be written to.
        """
        return distributed.by_first(self._locked) or self

    def _locked(self) -> Run:
        held = lock(self.folder)
        if held is None:
            raise RunError(
                f"{self.folder} is in use",
                "another process writes to it",
                "wait for it, or name another: --out PATH",
            )
        return replace(self, held=held)

    def unlock(self) -> None:
        """Let other processes write to it again."""
        if self.held is not None:
            self.path("lock").unlink(missing_ok=True)
            self.held.close()

    def _make_room(self, overwrite: bool) -> None:
        """Remove an earlier run; looked at again, as another process may have been faster."""
        self._check_free(overwrite)
        for name in _OVERWRITTEN:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _check_free(self, overwrite: bool) -> None:
        if not self.folder.exists():
            return
        found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {""}
        found = {name for name in found if not (name.startswith(".") and name.endswith(".tmp"))}
        # With a lock and no status.json, config.yaml is that of a run which was killed as it began.
        if found <= {"lock"} or found == {"lock", "config.yaml"}:
            return
        known = self.path("status.json").is_file()
        if overwrite and known:
            return
        status = self.status() if known else {}
        if known and status["state"] != "finished" and status["verb"] != OBJECTS:
            fix = f"go on with it: {self._resume}   (or replace it: --overwrite)"
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
                "it has no config.yaml and status.json"
                if folder.exists()
                else "there is nothing at that path",
                nearest_path(folder) or "name a folder made by `ekd distill`",
            )
        return cls(folder)

    @classmethod
    def newest(cls) -> Run:
        """The run of `distill` in `runs/` that finished last.

        Raises:
            RunError: there is none.
        """
        named = RUNS.glob("*/predictions.safetensors")
        finished = [path for p in named if (path := p.with_name("metrics.json")).is_file()]
        if not finished:
            raise RunError(
                f"no finished run in {RUNS}/",
                "none was named, and the newest is taken from there",
                "name a run folder, or make one: ekd distill --teachers resnet18,vgg16 --student lenet",
            )
        return cls.open(max(finished, key=lambda path: path.stat().st_mtime).parent)

    @property
    def _resume(self) -> str:
        """The command that goes on with it."""
        return f"ekd resume {shlex.quote(str(self.folder))}"

    def path(self, name: str) -> Path:
        """A file in the folder."""
        return self.folder / name

    def status(self) -> dict[str, Any]:
        """`verb`, `state`, and the `networks` that are finished, by name, with file and hash.

        Raises:
            RunError: it cannot be read.
        """
        return self._read("status.json", "verb", "state", "networks")

    def _read(self, name: str, *keys: str) -> dict[str, Any]:
        """A table of the run, with at least these keys."""
        try:
            values = files.read_json(self.path(name))
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error
        if not isinstance(values, dict) or not values.keys() >= set(keys):
            raise self._damaged(name, f"it should be a table with {', '.join(keys) or 'names'}")
        return values

    def _damaged(self, name: str, why: object) -> RunError:
        return RunError(
            f"cannot read {self.path(name)}",
            str(why),
            f"bring it back, or make the run again: --config {self.path('config.yaml')} --out PATH",
        )

    def set_state(self, state: str) -> None:
        """Note whether the run is running, stopped or finished; then also the SHA-256 of what it left."""
        status = {**self.status(), "state": state}
        if state == "finished" and distributed.first():
            paths = [self.path(name) for name in ("config.yaml", *_OVERWRITTEN) if name != "status.json"]
            status["files"] = {path.name: files.sha256_file(path) for path in paths if path.is_file()}
        self.write_json("status.json", status)

    def write_json(self, name: str, value: Any) -> None:
        """Write a file of the run; of several processes the first does."""
        if distributed.first():
            (files.write_sealed if name == "status.json" else files.write_json)(self.path(name), value)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep train.log; note in the status whether the block ended or was stopped, and unlock the folder."""
        try:
            with log_to_file(self.path("train.log")) if distributed.first() else nullcontext():
                try:
                    yield
                except BaseException as error:
                    with suppress(OSError):  # a full disk is no reason to hide the error
                        self.set_state("stopped")
                    if isinstance(error, KeyboardInterrupt) and self.status()["verb"] != OBJECTS:
                        log.warning("go on with it: %s", self._resume)
                    raise
            self.set_state("finished")
        finally:
            self.unlock()

    def must_match(self, what: str, facts: Mapping[str, Any]) -> None:
        """Keep what the run depends on; a run that is resumed is held against what was kept.

        Raises:
            RunError: something changed; it says what.
        """
        distributed.by_first(lambda: self._must_match(what, facts))

    def _must_match(self, what: str, facts: Mapping[str, Any]) -> None:
        status = self.status()
        kept = status.setdefault("facts", {}).get(what)
        if kept is None:
            status["facts"][what] = dict(facts)
            self.write_json("status.json", status)
            return
        names = [name for name in {**kept, **facts} if kept.get(name) != facts.get(name)]
        if names:
            changes = "; ".join(f"{name} was {kept.get(name)}, is {facts.get(name)}" for name in names)
            raise RunError(
                f"{self.folder} cannot go on: its {what} changed",
                changes,
                f"bring that back, or start anew: ekd {status['verb']} --config {self.path('config.yaml')} --out PATH",
            )

    def checkpoints(self, name: str) -> Checkpoints:
        """Where the training of a network is saved; it belongs to the facts that the run was held against."""
        facts = {"network": name, **self.status().get("facts", {})}
        return Checkpoints(self.path("checkpoints") / name, facts)

    def keep_network(self, name: str, classifier: Classifier, history: list[dict[str, Any]]) -> None:
        """Save a finished network and its history; a run that is resumed does not train it again."""
        if not distributed.first():
            distributed.wait()
            return
        file = network_file(name)
        save_classifier(self.path(file), classifier)
        others = [row for row in self.history() if row["network"] != name]
        rows = others + [{"network": name, **row} for row in history]
        files.write_text(self.path("history.jsonl"), "".join(map(files.json_line, rows)))
        status = self.status()
        status["networks"][name] = {"file": file, "sha256": files.sha256_file(self.path(file))}
        files.write_sealed(self.path("status.json"), status)
        Checkpoints(self.path("checkpoints") / name, {}).clear()
        distributed.wait()

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
        try:
            return files.read_json_lines(path) if path.is_file() else []
        except (OSError, ValueError) as error:
            raise self._damaged("history.jsonl", error) from error

    def metrics(self) -> dict[str, Any]:
        """metrics.json of a finished run.

        Raises:
            RunError: the run did not finish.
        """
        if not self.path("metrics.json").is_file():
            raise RunError(
                f"{self.folder} did not finish", "it has no metrics.json", f"go on: {self._resume}"
            )
        return self._read("metrics.json", "models")

    def manifest(self) -> dict[str, Any]:
        """manifest.json of a finished run."""
        return self._read("manifest.json")

    def keep_predictions(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """Save test logits (N, C) by model, and the labels, for the analyses."""
        if not distributed.first():
            return
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
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise self._damaged("predictions.safetensors", error) from error
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
        "versions": {"ensemble-kd": __version__, **{name: _version(name) for name in _PACKAGES}},
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
