"""From teachers to a folder that needs neither torch nor this package: distil, report, export, predict, verify.

    python examples/compress_for_deployment.py [--fast]

Needs the extra `onnx`. Writes runs/deploy and, beside it, runs/photos.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import ensemble_kd
from ensemble_kd.console import log_to_stderr
from ensemble_kd.tables import metrics_table

FORMATS = ("PNG", "JPEG")
"""An application opens what it expects, and nothing else."""
FAST = {"epochs": 2, "teacher_epochs": 1, "limit_train": 300}


def save_photos(folder: Path, count: int = 4) -> Path:
    """The first test images as files, which stand for what an application would be given."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(ensemble_kd.load_data("digits").test.pixels[:count]):
        Image.fromarray(pixels[0].numpy()).save(folder / f"{number}.png")
    return folder


def label(exported: Path, image: Path) -> str:
    """The likeliest class by onnxruntime, NumPy and Pillow alone, as an application would do it."""
    names = json.loads((exported / "labels.json").read_text())
    pixels = np.asarray(Image.open(image, formats=FORMATS).convert("L"))
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (logits,) = session.run(["logits"], {"images": pixels[None, None]})
    return names[int(logits.argmax())]


def main(fast: bool = "--fast" in sys.argv) -> None:
    log_to_stderr()
    run = ensemble_kd.distill(
        ["resnet8", "cifar-quick"], "lenet", data="digits", out="runs/deploy", **(FAST if fast else {})
    )
    print(metrics_table(run.metrics))

    page = ensemble_kd.report(run.folder, quick=True, **({"images": 60} if fast else {}))
    print(page.table())

    exported = ensemble_kd.export(run.folder, format="onnx", with_preprocess=True, int8=True)
    eight = exported.config["ensemble_kd"]["int8"]
    before, after = (eight[f"accuracy_{when}"]["value"] for when in ("before", "after"))
    print(f"onnxruntime's logits are within {exported.checked['max_difference']:g} of the student's")
    print(f"accuracy {before:.4f}, in eight bits {after:.4f}")
    photos = save_photos(run.folder.parent / "photos")
    print(ensemble_kd.predict_images(exported.folder, photos, top=3).table())
    answers = {path.name: label(exported.folder, path) for path in sorted(photos.iterdir())}
    print("onnxruntime alone:", answers)

    for folder in (run.folder, exported.folder):
        found = ensemble_kd.verify(folder)
        print(f"{found.kind} {folder.name}: {len(found.findings)} looked at, {len(found.damaged)} damaged")


if __name__ == "__main__":
    main()
