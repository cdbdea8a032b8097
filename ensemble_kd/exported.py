"""Exported folders: what is in one, and the network in it as a function of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.classifier import Card, Classifier
from ensemble_kd.errors import WeightsError
from ensemble_kd.portable import Graph, onnx_graph
from ensemble_kd.weights import load_student

CONFIG, WEIGHTS, LABELS, README = "config.json", "model.safetensors", "labels.json", "README.md"
CHECK = "check.safetensors"
"""Made-up images and what the exported network said to them, to be asked again."""
ONNX, INT8, PT2 = "model.onnx", "model-int8.onnx", "model.pt2"
_OWN = "ensemble_kd"


@dataclass(frozen=True)
class Export:
    """What the config.json of an exported folder says."""

    folder: Path
    format: str
    card: Card
    shape: tuple[int, int, int]
    """(C, H, W) that images are decoded to, as they were when the network was judged."""
    inside: bool
    """Whether the preprocessing is inside the graph."""
    int8: bool
    config: dict[str, Any]


def is_export(folder: Path) -> bool:
    """Whether a folder looks like an exported one, whole or not."""
    return (folder / files.SUMS).is_file() or (folder / CHECK).is_file()


def read_export(folder: Path) -> Export:
    """Read an exported folder's config.json; nothing is compared with its checksums.

    Raises:
        WeightsError: it is missing, or not one of ours.
    """
    try:
        config = files.read_json(folder / CONFIG)
        own = config[_OWN]
        channels, height, width = map(int, own["shape"])
        return Export(
            folder,
            str(own["format"]),
            Card.from_json(own["card"]),
            (channels, height, width),
            bool(own["preprocess_inside"]),
            "int8" in own,
            config,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(
            f"{folder / CONFIG} is not that of an exported folder",
            why,
            "export the run again: ekd export RUN",
        ) from error


def on_images(graph: Graph, card: Card, inside: bool) -> Graph:
    """From uint8 images (B, C, H, W) to logits, for a graph that may want them preprocessed."""
    return graph if inside else lambda images: graph(card.preprocess(images))


def by_timm(folder: Path, card: Card) -> Classifier:
    """The network as timm reloads it from the folder, behind its preprocessing.

    Raises:
        WeightsError: timm cannot, or the file of weights is missing.
    """
    import timm

    if not (folder / WEIGHTS).is_file():  # timm would look for others, such as pickles
        raise WeightsError(
            f"no {WEIGHTS} in {folder}", "it is missing", "export the run again: ekd export RUN"
        )
    try:
        net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm raises whatever its networks raise
        why = (str(error).splitlines() or ["no message"])[0]
        raise WeightsError(
            f"timm cannot load {folder}",
            f"{type(error).__name__}: {why}",
            "see what is damaged: ekd verify PATH",
        ) from error
    return Classifier(net, card, pretrained=True).eval()


def open_network(export: Export, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """The exported network: uint8 images (B, C, H, W) to logits (B, classes).

    Onnxruntime runs ONNX, on the CPU, in eight bits where that was exported. Of a .pt2 the weights beside
    it are taken: torch reads a .pt2 by pickle, which can run code.

    Raises:
        EkdError: a file is missing or damaged, or a package is.
    """
    if export.format == "onnx":
        graph = on_images(
            onnx_graph(export.folder / (INT8 if export.int8 else ONNX)), export.card, export.inside
        )
        return lambda images: graph(images.cpu())
    if export.format == "timm":
        return by_timm(export.folder, export.card).to(device)
    return load_student(export.folder, device)
