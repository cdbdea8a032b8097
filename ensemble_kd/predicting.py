"""`predict_images`: what a trained network says to image files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.classifier import Card
from ensemble_kd.config import resolve
from ensemble_kd.console import progress
from ensemble_kd.data.folders import EXTENSIONS, image_names
from ensemble_kd.data.streams import Files, decoders
from ensemble_kd.deploying import PredictOptions
from ensemble_kd.device import choose_device
from ensemble_kd.errors import ConfigError, DataError, Problem
from ensemble_kd.exported import is_export, open_network, read_export
from ensemble_kd.inference import batch_for
from ensemble_kd.tables import text_table
from ensemble_kd.weights import load_student


class Answer(NamedTuple):
    """The likeliest classes of an image, the first one first, with their probabilities."""

    image: str
    classes: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Predictions:
    """Answers in the order of the images, and what is wrong with those that have none."""

    answers: list[Answer]
    failed: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        failed = [{"what": problem.what, "why": problem.why} for problem in self.failed]
        return {"predictions": [answer._asdict() for answer in self.answers], "failed": failed}

    def table(self) -> str:
        """One line an image."""
        most = max((len(answer.classes) for answer in self.answers), default=0)
        rows = [
            [answer.image, *(f"{name} {100 * p:.1f} %" for name, p in zip(*answer[1:], strict=True))]
            for answer in self.answers
        ]
        return text_table(["image", *(f"{place}." for place in range(1, most + 1))], rows)

    def csv(self) -> str:
        """One line an image: `image`, then `class_1`, `probability_1`, …"""
        most = max((len(answer.classes) for answer in self.answers), default=0)
        heads = [f"{what}_{place}" for place in range(1, most + 1) for what in ("class", "probability")]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["image", *heads])
        for answer in self.answers:
            pairs = zip(*answer[1:], strict=True)
            writer.writerow([answer.image, *(cell for name, p in pairs for cell in (name, f"{p:.6f}"))])
        return buffer.getvalue()


class _Network(NamedTuple):
    logits: Callable[[Tensor], Tensor]
    card: Card
    shape: tuple[int, int, int]
    """(C, H, W) that files are decoded to before the network's own preprocessing."""


def predict_images(
    model: str | Path | None = None,
    images: str | Path | Sequence[str | Path] = (),
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Predictions:
    """Name the likeliest classes of image files, which are decoded as the images of the run were.

    Args:
        model: a finished run, an exported folder of any format, a `.safetensors` file, or
            `py:FILE.py:factory@FILE.safetensors`.
        images: files, and folders whose images at any depth are taken.
        config_file: YAML with any of the options.
        sets: assignments such as `"top=3"`.
        options: the other fields of `deploying.PredictOptions`.

    Returns:
        An answer for each image that can be read, and a problem for each that cannot.

    Raises:
        EkdError: the model cannot be loaded, or no images are named.
    """
    given = {**options, "model": model and str(model), "images": images or None}
    chosen = resolve(PredictOptions, given, file=Path(config_file) if config_file else None, sets=sets)
    if not chosen.images:
        raise ConfigError(
            "no images are named", "there is nothing to look at", "name image files, or a folder"
        )
    device = choose_device(chosen.device)
    network = _network(chosen.model, device)
    result = Predictions(*_looked_at(network, chosen, device))
    if chosen.csv:
        files.write_text(chosen.csv, result.csv())
    return result


def _looked_at(
    network: _Network, chosen: PredictOptions, device: torch.device
) -> tuple[list[Answer], list[Problem]]:
    answers: list[Answer] = []
    found, failed = _files(chosen.images)
    size = batch_for(network.card.preprocess.size, device)
    with progress("predicting", len(found)) as advance:
        for names, pixels, problems in _decoded(found, network.shape, size):
            failed += problems
            if names:
                answers += _answers(network, names, torch.from_numpy(pixels).to(device), chosen.top)
            advance(len(names) + len(problems))
    return answers, failed


def _network(model: str, device: torch.device) -> _Network:
    path = Path(model).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and is_export(path):
        export = read_export(path)
        return _Network(open_network(export, device), export.card, export.shape)
    classifier = load_student(model, device)
    pre = classifier.card.preprocess
    shape = _judged_on(Path(model.rpartition("@")[2]).parent if model.startswith("py:") else folder)
    return _Network(torch.inference_mode()(classifier), classifier.card, shape or (pre.channels, *pre.size))


def _judged_on(folder: Path) -> tuple[int, int, int] | None:
    """(C, H, W) of the images of the run or export that a file lies in; None where nothing tells."""
    for name, keys in (("manifest.json", ("data", "shape")), ("config.json", ("ensemble_kd", "shape"))):
        try:
            value = files.read_json(folder / name)
            channels, height, width = map(int, value[keys[0]][keys[1]])
            return channels, height, width
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _files(named: Sequence[str]) -> tuple[list[tuple[Files, int]], list[Problem]]:
    """Each image as a list of files and a place in it; and what cannot be found."""
    found: list[tuple[Files, int]] = []
    failed: list[Problem] = []
    for name in named:
        path = Path(name).expanduser()
        if not path.is_dir():
            below, inside = path.parent, [path.name]
        else:
            try:
                below, inside = path, list(image_names(path))
            except DataError as error:
                failed += error.problems
                continue
        if not inside:
            known = f"known endings: {', '.join(sorted(EXTENSIONS))}"
            failed.append(Problem(f"no images in {path}", known, "name another folder"))
        listed = Files.of(below, inside)
        if path.is_dir() or path.exists() or path.is_symlink():
            found += [(listed, place) for place in range(len(inside))]
        else:
            failed.append(Problem(f"cannot read {path}", "there is nothing at that path", "check the path"))
    return found, failed


def _decoded(
    found: Sequence[tuple[Files, int]], shape: tuple[int, int, int], size: int
) -> Iterator[tuple[list[str], np.ndarray[Any, Any], list[Problem]]]:
    """Names and pixels (B, C, H, W) of the images that can be read, `size` files at a time; and the problems."""
    with decoders() as pool:
        for start in range(0, len(found), size):
            part = found[start : start + size]
            pixels = np.empty((len(part), *shape), dtype=np.uint8)

            def read(row: int, part: Sequence[tuple[Files, int]] = part, out: Any = pixels) -> Problem | None:
                listed, place = part[row]
                return listed.read(place, out[row])

            problems = list(pool.map(read, range(len(part))))
            good = [row for row, problem in enumerate(problems) if problem is None]
            names = [str(part[row][0].root / part[row][0].names[part[row][1]]) for row in good]
            yield names, pixels[good], [problem for problem in problems if problem]


def _answers(network: _Network, names: Sequence[str], pixels: Tensor, top: int) -> list[Answer]:
    shares = torch.softmax(network.logits(pixels).double(), dim=1).cpu()
    order = shares.argsort(dim=1, descending=True, stable=True)[:, :top]
    classes = network.card.classes
    return [
        Answer(name, [classes[index] for index in places], row[places].tolist())
        for name, places, row in zip(names, order.tolist(), shares, strict=True)
    ]
