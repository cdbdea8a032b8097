"""Fixtures: an own cache for each test session, small data, and one finished run that tests share."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries of the hub are imported

# Shapes in annotations are checked in the tests only; this must precede the first import of the modules.
jaxtyping.install_import_hook(
    [
        "ensemble_kd.losses",
        "ensemble_kd.combine",
        "ensemble_kd.weighting",
        "ensemble_kd.calibration",
        "ensemble_kd.metrics",
        "ensemble_kd.topk",
        "ensemble_kd.fused",
        "ensemble_kd.data.views",
        "ensemble_kd.data.hashing",
        "ensemble_kd.data.crops",
        "ensemble_kd.data.trivial",
        "ensemble_kd.data.mixing",
        "ensemble_kd.analysis.corruptions",
        "ensemble_kd.analysis.dark",
        "ensemble_kd.analysis.diversity",
        "ensemble_kd.analysis.planes",
        "ensemble_kd.analysis.cka",
        "ensemble_kd.analysis.similarity",
    ],
    "beartype.beartype",
)

from ensemble_kd import distillation, files, training  # noqa: E402
from ensemble_kd.curves import draw_curves  # noqa: E402
from ensemble_kd.data import load_data  # noqa: E402
from ensemble_kd.data.dataset import Dataset  # noqa: E402
from ensemble_kd.distillation import DistillResult, distill  # noqa: E402
from ensemble_kd.runs import Run  # noqa: E402
from ensemble_kd.weights import load_student  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's cache, and nothing is downloaded."""
    os.environ["EKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))
    torch.set_num_threads(1)  # small networks gain nothing from more, and wait for each other beside others
    os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start


@pytest.fixture(scope="session")
def shared_cache(_own_cache: None) -> str:
    """The cache of the session, whose teachers tests share."""
    return os.environ["EKD_CACHE"]


class Curves:
    """In place of `draw_curves`, which takes most of the time of a small run: draws where it is asked to."""

    def __init__(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (640, 48)).save(buffer, format="png")
        self.empty, self.drawn = buffer.getvalue(), False

    def __call__(self, history: Sequence[dict[str, Any]], path: Path) -> None:
        if self.drawn:
            draw_curves(history, path)
        else:
            files.write_bytes(path, self.empty)


@pytest.fixture(scope="session", autouse=True)
def curves() -> Iterator[Curves]:
    """No curves are drawn but in the run that tests share."""
    stand_in = Curves()
    with pytest.MonkeyPatch.context() as patch:
        for module in (distillation, training):
            patch.setattr(module, "draw_curves", stand_in)
        yield stand_in


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("EKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder is empty, with the cache below it; the logger of the package is left as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EKD_CACHE", "cache")
    log = logging.getLogger("ensemble_kd")
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="session")
def few_digits() -> Dataset:
    """200 training images: enough for mechanics, fast."""
    return load_data("digits", limit_train=200)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, _own_cache: None, curves: Curves) -> DistillResult:
    """A small finished run with all controls; tests read it and leave it as it is.

    Of the processes that run tests together the first that needs it makes it.
    """
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    with FileLock(f"{shared}.lock"):
        if not (shared / "made").is_file():
            shutil.rmtree(shared, ignore_errors=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("EKD_CACHE", str(shared / "cache"))
                patch.setattr(curves, "drawn", True)
                distill(
                    ["lenet", "resnet8"],
                    "lenet",
                    controls="labels,best-teacher,independent",
                    epochs=4,
                    teacher_epochs=2,
                    limit_train=400,
                    out=shared / "finished",
                )
            (shared / "made").touch()  # the run names its teachers by their place, so that is not moved
    shutil.copytree(shared / "cache", os.environ["EKD_CACHE"], dirs_exist_ok=True)  # its teachers
    folder = shared / "finished"
    return DistillResult(folder, Run.open(folder).metrics(), load_student(folder))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's own cache, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    assert tmp_path in folder.parents
    return folder


@pytest.fixture
def put_tv(checkpoints: Path) -> Callable[..., tuple[nn.Module, Path]]:
    """Put random weights of a torchvision network where its download would lie."""
    from torchvision import models

    def put(arch: str, tag: str = "IMAGENET1K_V1", **options: Any) -> tuple[nn.Module, Path]:
        net = models.get_model(arch, **options)
        path = checkpoints / models.get_model_weights(arch)[tag].url.rpartition("/")[2]
        torch.save(net.state_dict(), path)
        return net, path

    return put


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """The hub's cache, empty; the function puts random weights of a timm network into it, in its layout.

    `edit` may change the network before.
    """
    import huggingface_hub
    import timm

    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(arch: str, edit: Callable[[nn.Module], None] = lambda net: None) -> nn.Module:
        net, commit = timm.create_model(arch), "0" * 40
        edit(net)
        repository = folder / f"models--{timm.get_pretrained_cfg(arch).hf_hub_id.replace('/', '--')}"
        for part in ("refs", f"snapshots/{commit}"):
            (repository / part).mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        path = repository / "snapshots" / commit / "model.safetensors"
        safetensors.torch.save_file(net.state_dict(), path, metadata={"format": "pt"})
        return net

    return put
