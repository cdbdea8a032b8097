"""The README.md of an exported folder: a model card made of what the run measured, and of nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ensemble_kd.errors import printable
from ensemble_kd.exported import INT8, ONNX, PT2, README
from ensemble_kd.files import readable
from ensemble_kd.names import label_of
from ensemble_kd.results import verdict
from ensemble_kd.students import STUDENTS

_MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
_CLASSES = 20


def card_text(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    manifest: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        config: config.json of the folder.
        metrics: metrics.json of the run.
        manifest: manifest.json of the run.
        sizes: bytes of each file in the folder.
    """
    own = config["ensemble_kd"]
    parts = [
        _front(config, manifest),
        f"# {_md(own['card']['model'])} on {_md(own['card']['data'])}",
        _summary(own, metrics),
        "## Data\n" + _data(config, metrics, manifest),
        "## Measured\n" + _measured(metrics),
        "## Load it\n" + _loading(config),
        "## Checked\n" + _checks(own),
        "## Limits\n" + _limits(config, metrics),
        "## Files\n" + _files(sizes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(text: object) -> str:
    """A name as Markdown shows it: on one line, and neither markup nor HTML."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(printable(str(text)), quote=False))


def _front(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    own = config["ensemble_kd"]
    values: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "library_name": "timm" if own["format"] == "timm" else "ensemble-kd",
        "tags": ["image-classification", "knowledge-distillation", "ensemble-kd"],
    }
    options = own["run"]["config"]
    started = {row["label"] for row in manifest.get("teachers", []) if row.get("published")}
    names = [*_teachers(own), str(options.get("student") or options.get("model"))]
    found = [_hub_id(name, label_of(name) in started) for name in names]
    if bases := list(dict.fromkeys(filter(None, found))):
        values["base_model"] = bases
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _teachers(own: Mapping[str, Any]) -> list[str]:
    return list(own["run"]["config"].get("teachers", []))


def _hub_id(network: str, started: bool = False) -> str:
    """The repository on the hub whose weights a name asks for, or `started` from; empty where there is none."""
    if network.startswith("hf-hub:"):
        return network.removeprefix("hf-hub:").partition("#")[0]
    name = network.removeprefix("timm:").partition("#")[0]
    if not ("." in name or started) or ":" in name or "@" in name or "/" in name:
        return ""
    import timm

    published = timm.get_pretrained_cfg(name)
    return (published.hf_hub_id or "") if published else ""


def _summary(own: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    made = f"Exported as {own['format']} by ensemble-kd {own['version']}."
    teachers = _teachers(own)
    if not teachers:
        return f"An image classifier trained on labels. {made}"
    names = ", ".join(map(_md, teachers))
    times = metrics["times_smaller"]
    size = f"{times:.3g} times smaller" if times >= 1 else f"{1 / times:.3g} times larger"
    return f"An image classifier taught by {names}, {size} than these together. {made}"


def _data(config: Mapping[str, Any], metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    own, names = config["ensemble_kd"], config["label_names"]
    images = manifest["data"].get("images", {"test": metrics["n"]})
    counts = ", ".join(f"{part} {count:,}" for part, count in images.items())
    more = f" … and {len(names) - _CLASSES} more (labels.json)" if len(names) > _CLASSES else ""
    channels, height, width = own["shape"]
    lines = [
        f"- {_md(own['card']['data'])}: {counts} images of {channels}×{height}×{width}",
        f"- {len(names)} classes: {', '.join(map(_md, names[:_CLASSES]))}{more}",
        f"- SHA-256 of the data: {own['run']['data_fingerprint']}",
        *(
            f"- teacher {_md(row['label'])}: SHA-256 of its weights {row['after']}"
            for row in manifest.get("teachers", [])
        ),
    ]
    return "\n".join(lines)


def _measured(metrics: Mapping[str, Any]) -> str:
    heads = ["", *_MEASURES.values(), "parameters"]
    rows = [
        [
            _md(name if row["role"] in ("student", "ensemble") else f"{row['role']} {name}"),
            *(_cell(name, row.get(name)) for name in _MEASURES),
            f"{row['parameters']:,}",
        ]
        for name, row in metrics["models"].items()
    ]
    lines = [
        f"On the {metrics['n']:,} images of the {metrics['split']} split, with 95 % intervals over these images:\n",
        _table(heads, rows),
    ]
    if "differences" in metrics:
        lines.append("\n" + verdict(metrics["differences"]))
    return "\n".join(lines)


def _cell(name: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    if name == "accuracy":
        return _share(value)
    return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def _share(value: Mapping[str, float]) -> str:
    return f"{100 * value['value']:.2f} % [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _loading(config: Mapping[str, Any]) -> str:
    own = config["ensemble_kd"]
    code = own["card"]["model"] if own["card"]["model"].startswith("py:") else ""
    named = f"{code}@PATH/model.safetensors" if code else "PATH"
    ours = _fenced(
        "import ensemble_kd",
        "",
        f'model = ensemble_kd.load_student("{named}")  # uint8 images (B, C, H, W) of any size to logits',
    )
    parts = [_OWN_WORDS[own["format"]](own), "With ensemble-kd:", ours]
    if not code or own["format"] == "onnx":
        parts.append(_fenced("ekd predict PATH image.jpg more-images/", language="sh"))
    return "\n\n".join(part for part in parts if part)


def _fenced(*lines: str, language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _by_timm(own: Mapping[str, Any]) -> str:
    first = (
        ["import ensemble_kd  # registers its networks with timm"] if own["card"]["model"] in STUDENTS else []
    )
    code = _fenced(
        *first,
        "import timm",
        "",
        'model = timm.create_model("local-dir:PATH", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    )
    return f"With timm:\n\n{code}\n\n**Without `pretrained=True` timm silently gives random weights.**"


def _graph_input(own: Mapping[str, Any]) -> str:
    pre = own["card"]["preprocess"]
    if own["preprocess_inside"]:
        channels, height, width = own["shape"]
        return f"uint8 (B, {channels}, {height}, {width}): resizing and normalising are inside the graph"
    height, width = pre["size"]
    resized = (
        ""
        if own["shape"][1:] == pre["size"]
        else f", of images resized to {height}×{width} (bilinear, antialiased)"
    )
    return f"float32 (B, {pre['channels']}, {height}, {width}): (images / 255 - mean) / std of config.json{resized}"


def _by_onnx(own: Mapping[str, Any]) -> str:
    code = _fenced(
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("PATH/{ONNX}")',
        f'(logits,) = session.run(["logits"], {{"images": images}})  # {_graph_input(own)}',
    )
    eight = f"\n\n`{INT8}` is the same in eight bits." if "int8" in own else ""
    return f"With onnxruntime:\n\n{code}{eight}"


def _by_torch(own: Mapping[str, Any]) -> str:
    code = _fenced(
        "import torch",
        "",
        f'model = torch.export.load("PATH/{PT2}").module()',
        f"logits = model(images)  # {_graph_input(own)}",
    )
    return f"With torch alone:\n\n{code}\n\n**A .pt2 is read by pickle, which can run code: load one where you trust its author.**"


_OWN_WORDS = {"safetensors": lambda own: "", "timm": _by_timm, "onnx": _by_onnx, "torch": _by_torch}


def _checks(own: Mapping[str, Any]) -> str:
    checked = own["checked"]
    batches = ", ".join(map(str, checked["batches"]))
    identical = "the same for all" if checked["argmax_identical"] else "NOT the same for all"
    packages = ", ".join(f"{name} {number}" for name, number in own["versions"].items())
    lines = [
        f"Reloaded and held against the run's network on {checked['images']} {checked['of']}, in batches of {batches}: "
        f"logits differ by at most {checked['max_difference']:g}, the likeliest class is {identical}. ({packages})"
    ]
    if int8 := own.get("int8"):
        points = {key: 100 * int8["difference"][key] for key in ("value", "low", "high")}
        lines.append(
            f"\nIn eight bits, calibrated on {int8['calibration_images']} training images: accuracy on the "
            f"{int8['test_images']:,} images of the test split {_share(int8['accuracy_before'])} before, "
            f"{_share(int8['accuracy_after'])} after ({points['value']:+.2f} points, 95 % interval "
            f"{points['low']:+.2f} … {points['high']:+.2f}); {100 * int8['same_answer']:.2f} % of the answers are the same."
        )
    return "\n".join(lines)


def _limits(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    own = config["ensemble_kd"]
    _, height, width = own["shape"]
    lines = [
        f"- It names one of its {config['num_classes']} classes for any image, also where none of them is in it.",
        f"- It was measured on {_md(own['card']['data'])} alone, with one seed; elsewhere it may do worse.",
        f"- Images of other sizes: `ekd predict` decodes them to {height}×{width} first, as they were when it was judged; "
        "who resizes them otherwise sees other probabilities.",
        "- The licences of the data and of the teachers' weights are not known here, and none is given.",
    ]
    if "ece" in next(iter(metrics["models"].values())):
        lines.append("- Its probabilities are as far from its accuracy as the ECE above says.")
    return "\n".join(lines)


def _files(sizes: Mapping[str, int]) -> str:
    rows = [[f"`{name}`", readable(size)] for name, size in sorted(sizes.items())]
    return (
        _table(["file", "size"], rows)
        + f"\n\n`SHA256SUMS` has the hashes of these and of `{README}`: `sha256sum -c SHA256SUMS`, or `ekd verify`."
    )
