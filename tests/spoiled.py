"""Things to go wrong with: files, folders and runs that are not as they should be, made in the current folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from ensemble_kd.classifier import Classifier
from ensemble_kd.cli import app
from ensemble_kd.config import to_yaml
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.fresh import new_classifier
from ensemble_kd.models import parse
from ensemble_kd.runs import Run
from ensemble_kd.schema import DistillOptions
from ensemble_kd.weights import save_classifier

TRIES = "distill --teachers {} --out run"
PETS = "train lenet --data imagefolder:pets --out run"


def ekd(*arguments: str) -> Any:
    """Run `ekd` in this process; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, [*arguments, "--quiet"])


def tree() -> dict[str, str]:
    """Every file here with the hash of its content."""
    files = sorted(path for path in Path().rglob("*") if path.is_file() or path.is_symlink())
    return {str(path): path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Things to go wrong with


@cache
def few() -> Dataset:
    return load_data("digits", limit_train=64)


@cache
def lenet() -> Classifier:
    return new_classifier(parse("lenet"), few()).eval()


def card(path: str = "x.safetensors", net: nn.Module | None = None, **changes: Any) -> None:
    """A file of ours whose card differs from that of a LeNet for digits."""
    save_classifier(Path(path), Classifier(net or lenet().net, replace(lenet().card, **changes)))


def bare(path: str, net: nn.Module | None = None, **changes: torch.Tensor | None) -> None:
    """A file of weights without a card."""
    tensors = {**(net or lenet().net).state_dict(), **changes}
    tensors = {key: value.contiguous() for key, value in tensors.items() if value is not None}
    if path.endswith(".pth"):
        torch.save(tensors, path)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(safetensors.torch.save(tensors))


def write(path: str, content: str | bytes = b"") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def image(path: str, size: tuple[int, int] = (32, 32), mode: str = "RGB", **options: Any) -> None:
    """A noisy picture, another one for each path."""
    noise = np.random.default_rng(list(path.encode())).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path, **options)


def pets(layout: str = "train/cat:4 train/dog:4 test/cat:2 test/dog:2", **options: Any) -> None:
    """A folder of images with so many a class."""
    for part in layout.split():
        folder, _, count = part.partition(":")
        Path("pets", folder).mkdir(parents=True, exist_ok=True)
        for number in range(int(count)):
            image(f"pets/{folder}/{number}.png", **options)


def idx(labels: list[int]) -> None:
    """A data set in LeCun's format with these training labels."""
    for stem, values in (
        ("train-images-idx3", np.zeros((len(labels), 28, 28))),
        ("train-labels-idx1", np.array(labels)),
        ("t10k-images-idx3", np.zeros((20, 28, 28))),
        ("t10k-labels-idx1", np.arange(20) % 10),
    ):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        write(f"idx/{stem}-ubyte", head + values.astype(np.uint8).tobytes())


def stopped(state: str = "stopped", **options: Any) -> Run:
    """The folder of a run that did not finish."""
    text = to_yaml(DistillOptions(teachers=["lenet"], **options))
    run = Run.create("distill", Path("run"), "run", False, text)
    run.set_state(state)
    run.unlock()
    return run


def archive(ending: str, name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 4) -> None:
    """An archive with one member."""
    if ending == "zip":
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if kind == tarfile.SYMTYPE else 0o100644) << 16
        with zipfile.ZipFile("evil.zip", "w") as file:
            file.writestr(info, target.encode() or bytes(size), zipfile.ZIP_DEFLATED)
    else:
        with tarfile.open(f"evil.{ending}", "w:gz" if ending.endswith("gz") else "w") as file:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = size if kind == tarfile.REGTYPE else 0
            file.addfile(member, io.BytesIO(bytes(member.size)))


def from_the_hub() -> None:
    bare("net/model.safetensors")
    write("net/config.json", json.dumps({"num_classes": 10}))


class Payload:
    """A pickle that runs a command when it is opened: it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch ran",))
