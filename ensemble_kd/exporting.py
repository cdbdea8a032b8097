"""`export`: a run's network as a folder that others can load, checked before it is written."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ensemble_kd import __version__, config, files
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.deploying import ExportOptions
from ensemble_kd.errors import DataError, ModelError, RunError
from ensemble_kd.exported import (
    CHECK,
    CONFIG,
    INT8,
    LABELS,
    ONNX,
    PT2,
    README,
    WEIGHTS,
    by_timm,
    is_export,
    on_images,
)
from ensemble_kd.metrics import bootstrap_mean, correct
from ensemble_kd.model_card import card_text
from ensemble_kd.models import parse
from ensemble_kd.portable import check_extra, onnx_graph, pt2_graph, to_int8, to_onnx, to_pt2, traced
from ensemble_kd.runs import Run
from ensemble_kd.schema import DataOptions
from ensemble_kd.timm_form import timm_entry
from ensemble_kd.weights import load_student, packed

BATCHES = (1, 7, 32)
"""Sizes of the batches on which an export is held against the run's network."""
_MADE_UP = 4
_CALIBRATION = 256
_BATCH = 64
_TOLERANCE = {"safetensors": 0.0, "timm": 0.0, "torch": 1e-4, "onnx": 1e-3}
"""How far logits may be from the network's, as a share of the largest of them (or of 1)."""
_PACKAGES = {"timm": ("timm",), "onnx": ("onnx", "onnxscript", "onnxruntime")}

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportResult:
    """The folder, and its config.json as a dictionary."""

    folder: Path
    config: dict[str, Any]

    @property
    def checked(self) -> dict[str, Any]:
        """What it was held against, and how far off it was."""
        return self.config["ensemble_kd"]["checked"]


@dataclass(frozen=True)
class _Source:
    """A finished run: its network, and its images where they are at hand."""

    run: Run
    classifier: Classifier
    data: Dataset | None
    manifest: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the network was judged on."""
        if self.data is not None:
            channels, height, width = self.data.test.pixels.shape[1:]
        else:
            pre = self.classifier.card.preprocess
            channels, height, width = self.manifest["data"].get("shape") or (pre.channels, *pre.size)
        return channels, height, width


def export(
    run: str | Path | None = None,
    *,
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> ExportResult:
    """Write the student of a run of `distill`, or the network of a run of `train`, as a folder to load elsewhere.

    The folder is reloaded and held against the run's network on images of its test split before it gets its
    name; a run whose images are not at hand is checked on made-up ones, and its card says so.

    Args:
        run: the folder of a finished run.
        config_file: YAML with any of the options.
        sets: assignments such as `"format=onnx"`.
        options: the other fields of `deploying.ExportOptions`.

    Raises:
        RunError: the run is not finished or damaged, or there is something at `out`.
        ModelError: the network cannot be had in that format.
        ConfigError: an option is wrong, or a package is missing.
    """
    file = Path(config_file) if config_file else None
    chosen = config.resolve(ExportOptions, {**options, "run": run and str(run)}, file=file, sets=sets)
    opened = Run.open(Path(chosen.run))
    out = chosen.out or opened.path("export") / chosen.format
    _check_free(out, chosen.overwrite)
    if chosen.format == "onnx":
        check_extra()
    source = _source(opened, chosen)
    contents, facts = _contents(source, chosen)
    files.write_summed_folder(out, contents)
    return ExportResult(out, facts)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if overwrite and out.is_dir() and is_export(out):
        return
    raise RunError(
        f"{out} is not empty",
        "an export is a folder of its own",
        "replace it with --overwrite, or name another folder: --out PATH"
        if out.is_dir() and is_export(out)
        else "name another folder: --out PATH (what is no export is never overwritten)",
    )


def _source(run: Run, chosen: ExportOptions) -> _Source:
    status, name = run.status(), "student" if run.status()["verb"] != "train" else "model"
    run.metrics()
    kept = status["networks"].get(name)
    path = run.path(kept["file"]) if kept else run.path(f"{name}.safetensors")
    if kept is None or not path.is_file() or files.sha256_file(path) != kept["sha256"]:
        raise RunError(
            f"{path} is not what the run wrote",
            "its SHA-256 is not the one in status.json",
            f"bring it back; see what else is damaged: ekd verify {shlex.quote(str(run.folder))}",
        )
    return _Source(run, _without_places(_loaded(run, path)), _data_of(run, chosen), run.manifest())


def _loaded(run: Run, path: Path) -> Classifier:
    """A network of the run from a file; a module of the user's by the code that the run was given."""
    options = config.read_yaml(run.path("config.yaml"))
    code = str(options.get("student") or options.get("model"))
    return load_student(f"{parse(code).canonical}@{path}" if code.startswith("py:") else path)


def _without_places(classifier: Classifier) -> Classifier:
    """With a card that names no folder of this machine."""
    card = classifier.card
    named = replace(card, model=_without_folders(card.model), data=_without_folders(card.data))
    return Classifier(classifier.net, named, pretrained=True).eval()


def _without_folders(value: Any) -> Any:
    """Options as they are, of paths the last part alone."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and not _is_on_the_hub(value):
        return re.sub(r"[^:@,=]*/(?=[^/])", "", value.rstrip("/"))
    return value


def _is_on_the_hub(value: str) -> bool:
    """Whether a name is one of the hub, and no folder of this machine."""
    kind, _, place = value.partition(":")
    named = re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+(:[\w.-]+)?", place)
    return kind == "hf-hub" or (kind == "hf" and named is not None and not Path(place).exists())


def _data_of(run: Run, chosen: ExportOptions) -> Dataset | None:
    """The run's images; None, with a warning, where they are not at hand, unless eight bits need them."""
    options = config.read_yaml(run.path("config.yaml"))
    given = {k: v for k, v in options.items() if k in DataOptions.model_fields and v is not None}
    given["offline"] = chosen.offline or bool(given.get("offline"))
    try:
        data = load_data(**DataOptions(**given).load_arguments())
        why = "they are others than those that it was trained on"
        if data.fingerprint() == run.manifest()["data"]["fingerprint"]:
            return data
    except DataError as error:
        why = error.problems[0].what
    if chosen.int8:
        raise RunError(
            f"int8: the images of {run.folder} cannot be had", why, "bring them back, or leave int8 out"
        )
    log.warning("the export is checked on made-up images, as those of the run cannot be had: %s", why)
    return None


def _contents(source: _Source, chosen: ExportOptions) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of the folder by name, checked; and its config.json as a dictionary."""
    classifier, inside = source.classifier, chosen.with_preprocess
    facts = _config(source, chosen)
    contents = {WEIGHTS: packed(classifier, for_others=chosen.format == "timm")}
    contents[LABELS] = (files.to_json(list(classifier.classes)) + "\n").encode()
    own = facts["ensemble_kd"]
    if chosen.format == "onnx":
        contents[ONNX] = to_onnx(_program(source, inside))
    elif chosen.format == "torch":
        contents[PT2] = to_pt2(_program(source, inside))
    logits = _reloaded(contents, facts, chosen, classifier)
    own["checked"] = _checked(source, logits, chosen.format)
    if chosen.int8:
        logits, own["int8"] = _int8(source, contents, logits, inside)
    check = _made_up(source.shape)
    contents[CHECK] = safetensors.torch.save({"images": check, "logits": logits(check).contiguous()})
    contents[CONFIG] = (files.to_json(facts) + "\n").encode()
    sizes = {name: len(data) for name, data in contents.items()}
    text = card_text(facts, source.run.metrics(), source.manifest, sizes)
    return contents | {README: text.encode()}, facts


def _program(source: _Source, inside: bool) -> Any:
    """The network as a graph, with its preprocessing `inside` or without."""
    classifier, pre = source.classifier, source.classifier.card.preprocess
    if inside:
        return traced(classifier, _made_up(source.shape))
    return traced(classifier.net, _made_up((pre.channels, *pre.size)).float())


def _config(source: _Source, chosen: ExportOptions) -> dict[str, Any]:
    """config.json but for what is found when the export is checked."""
    card = source.classifier.card
    entry: dict[str, Any] = {"architecture": card.model, "pretrained_cfg": {}}
    if chosen.format == "timm":
        entry = timm_entry(card)
    pre = card.preprocess
    entry["pretrained_cfg"] |= {
        "input_size": [pre.channels, *pre.size],
        "num_classes": len(card.classes),
        "mean": list(pre.mean),
        "std": list(pre.std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    options = {k: v for k, v in config.read_yaml(source.run.path("config.yaml")).items() if v is not None}
    packages = ("torch", *_PACKAGES.get(chosen.format, ()))
    return {
        **entry,
        "num_classes": len(card.classes),
        "label_names": list(card.classes),
        "ensemble_kd": {
            "version": __version__,
            "format": chosen.format,
            "shape": list(source.shape),
            "preprocess_inside": chosen.with_preprocess,
            "card": card.to_json(),
            "run": {
                "verb": source.run.status()["verb"],
                "data_fingerprint": source.manifest["data"]["fingerprint"],
                "config": _without_folders(options),
            },
            "versions": {name: version(name) for name in packages},
        },
    }


def _made_up(shape: Sequence[int], count: int = _MADE_UP) -> Tensor:
    """Images of noise, uint8 (count, C, H, W): always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def _reloaded(
    contents: Mapping[str, bytes], facts: dict[str, Any], chosen: ExportOptions, classifier: Classifier
) -> Logits:
    """What was made, read again as its user will read it."""
    card, inside = classifier.card, chosen.with_preprocess
    if chosen.format == "onnx":
        return on_images(onnx_graph(contents[ONNX]), card, inside)
    if chosen.format == "torch":
        return on_images(pt2_graph(contents[PT2]), card, inside)
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / CONFIG).write_text(json.dumps(facts))
        (folder / WEIGHTS).write_bytes(contents[WEIGHTS])
        run = Run(Path(chosen.run))
        network = by_timm(folder, card) if chosen.format == "timm" else _loaded(run, folder / WEIGHTS)
    return torch.inference_mode()(network)


def _checked(source: _Source, logits: Logits, kind: str) -> dict[str, Any]:
    """How far the export is from the run's network, on batches of several sizes.

    Raises:
        ModelError: too far.
    """
    count = sum(BATCHES)
    if source.data is None:
        images, place = _made_up(source.shape, count), "made-up images"
    else:
        test = source.data.test
        images, place = test[torch.arange(count) * len(test) // count].decoded, "images of the test split"
    with torch.inference_mode():
        pairs = [(source.classifier(batch), logits(batch)) for batch in images.split(list(BATCHES))]
    ours, theirs = (torch.cat(list(parts)) for parts in zip(*pairs, strict=True))
    off = float((ours - theirs).abs().max())
    largest = max(1.0, float(ours.abs().max()))
    if not off <= _TOLERANCE[kind] * largest:
        raise ModelError(
            f"the export as {kind} says something else than the network: logits differ by up to {off:.2g}",
            f"they may differ by {_TOLERANCE[kind] * largest:.2g}; one of its operations is exported wrong",
            "say another --format",
        )
    return {
        "images": count if source.data is None else min(count, len(source.data.test)),
        "of": place,
        "batches": list(BATCHES),
        "max_difference": float(f"{off:.2g}"),
        "argmax_identical": bool((ours.argmax(1) == theirs.argmax(1)).all()),
    }


def _int8(
    source: _Source, contents: dict[str, bytes], before: Logits, inside: bool
) -> tuple[Logits, dict[str, Any]]:
    """Quantise into `contents`; the network in eight bits, and what that costs on the test split."""
    assert source.data is not None
    train, test, card = source.data.train, source.data.test, source.classifier.card
    count = min(_CALIBRATION, len(train))
    seen = train[torch.arange(count) * len(train) // count]
    batches = [batch.decoded if inside else card.preprocess(batch.decoded) for batch in seen.batches(_BATCH)]
    contents[INT8] = to_int8(contents[ONNX], batches)
    after = on_images(onnx_graph(contents[INT8]), card, inside)
    answers = [(before(b.decoded), after(b.decoded)) for b in test.batches(_BATCH)]
    full, small = (torch.cat(list(parts)) for parts in zip(*answers, strict=True))
    was, now = (correct(values, test.known_labels).double() for values in (full, small))
    return after, {
        "file": INT8,
        "calibration_images": count,
        "test_images": len(test),
        "accuracy_before": bootstrap_mean(was),
        "accuracy_after": bootstrap_mean(now),
        "difference": bootstrap_mean(now - was),
        "same_answer": float((full.argmax(1) == small.argmax(1)).double().mean()),
    }
