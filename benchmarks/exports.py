"""Exports of four students in every format that can have them, each reloaded in a process of its own.

    python -m benchmarks.exports [--out benchmarks/results/exports.json]

The students are trained for a few epochs on scikit-learn's digits; what is measured is whether the reloaded network
says what the run's network says to images of the test split, in batches of 1, 7 and 32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import ensemble_kd
from benchmarks.common import commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.errors import EkdError
from ensemble_kd.tables import text_table

MODELS: dict[str, dict[str, Any]] = {
    "lenet": {},
    "timm:mobilenetv3_small_050": {"size": 32, "stem": "imagenet"},
    "timm:test_vit": {"size": 32},
    "tv:squeezenet1_1": {
        "size": 32,
        "sets": ["training.init=unit-variance"],
    },  # else it learns nothing so soon
}
FORMATS: dict[str, dict[str, Any]] = {
    "safetensors": {"format": "safetensors"},
    "timm": {"format": "timm"},
    "torch": {"format": "torch"},
    "torch, preprocessing inside": {"format": "torch", "with_preprocess": True},
    "onnx": {"format": "onnx"},
    "onnx, preprocessing inside": {"format": "onnx", "with_preprocess": True},
}
GRAPHS = {"torch": "model.pt2", "onnx": "model.onnx"}
RELOAD = Path(__file__).parent / "reload_export.py"
COUNT = 40


def measured(
    run: Path, images: torch.Tensor, place: Path, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Export, reload in another process, and compare on `images`; or why there is no such export."""
    student = ensemble_kd.load_student(run)
    try:
        made = ensemble_kd.export(run, out=place / "export", overwrite=True, **options)
    except EkdError as error:
        return {"format": name, "refused": error.problems[0].why}
    inside = bool(options.get("with_preprocess"))
    inputs = images if inside else student.card.preprocess(images)
    with torch.no_grad():
        logits = torch.cat([student(batch) for batch in images.split([1, 7, 32])])
    safetensors.torch.save_file({"inputs": inputs, "logits": logits}, place / "inputs.safetensors")
    command = [sys.executable, str(RELOAD), str(made.folder), str(place / "inputs.safetensors")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
    graph = made.folder / GRAPHS.get(str(options["format"]), "model.safetensors")
    return {"format": name, **json.loads(result.stdout), "bytes": graph.stat().st_size}


def eight_bits(run: Path, place: Path) -> dict[str, Any]:
    """What eight bits cost on the test split."""
    made = ensemble_kd.export(run, out=place / "export", overwrite=True, format="onnx", int8=True)
    size = (made.folder / "model-int8.onnx").stat().st_size
    return {**made.config["ensemble_kd"]["int8"], "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of these alone")
    chosen = parser.parse_args()
    commit = commit_now()
    test = ensemble_kd.load_data("digits").test
    images = test[torch.arange(COUNT) * len(test) // COUNT].decoded
    rows, eight = [], []
    for model in chosen.models:
        options = MODELS[model]
        with tempfile.TemporaryDirectory() as root:
            place = Path(root)
            run = ensemble_kd.train(
                model, role="control", epochs=5, offline=True, out=place / "run", **options
            ).folder
            rows += [{"model": model, **measured(run, images, place, *entry)} for entry in FORMATS.items()]
            eight.append({"model": model, **eight_bits(run, place)})
            print(f"{model} is done", file=sys.stderr)
    print(
        text_table(["model", "format", "largest difference", "same argmax", "size"], list(map(_cells, rows)))
    )
    heads = ["model, int8", "accuracy before", "after", "same answers", "size"]
    print("\n" + text_table(heads, list(map(_int8_cells, eight))))
    if chosen.out:
        files.write_json(chosen.out, {**surroundings(commit), "rows": rows, "int8": eight})


def _cells(row: dict[str, Any]) -> list[str]:
    if "refused" in row:
        return [row["model"], row["format"], f"refused: {row['refused']}", "", ""]
    same = "yes" if row["argmax_identical"] else "NO"
    return [row["model"], row["format"], f"{row['max_difference']:.1e}", same, files.readable(row["bytes"])]


def _int8_cells(row: dict[str, Any]) -> list[str]:
    before, after = (
        f"{100 * m['value']:.2f} % [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
        for m in (row["accuracy_before"], row["accuracy_after"])
    )
    return [row["model"], before, after, f"{100 * row['same_answer']:.1f} %", files.readable(row["bytes"])]


if __name__ == "__main__":
    main()
