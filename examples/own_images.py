"""Own images in folders, and an own nn.Module as one of the teachers.

    python examples/own_images.py [FOLDER] [--fast]

FOLDER holds one subfolder a class (or train/ and test/ with such subfolders). Without it, a folder
of drawn shapes is made, so that the example runs anywhere.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import nn

import ensemble_kd
from ensemble_kd.console import log_to_stderr
from ensemble_kd.tables import metrics_table


def my_network(num_classes: int, channels: int) -> nn.Module:
    """Any function that returns a module: it is given what it names of num_classes, channels, size."""
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, num_classes),
    )  # fmt: skip


def draw_shapes(folder: Path, count: int = 80, side: int = 32) -> Path:
    """A folder of noisy discs, squares and crosses in random places and colours."""
    generator = np.random.default_rng(0)
    for shape in ("cross", "disc", "square"):
        (folder / shape).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(generator.integers(0, 90, (side, side, 3), dtype=np.uint8))
            draw, colour = ImageDraw.Draw(image), tuple(int(c) for c in generator.integers(120, 255, 3))
            x, y, r = (int(v) for v in generator.integers((10, 10, 5), (22, 22, 9)))
            if shape == "disc":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            elif shape == "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            else:
                draw.line((x - r, y, x + r, y), fill=colour, width=3)
                draw.line((x, y - r, x, y + r), fill=colour, width=3)
            image.save(folder / shape / f"{number:03}.png")
    return folder


def main(arguments: list[str]) -> None:
    log_to_stderr()
    folders = [a for a in arguments if not a.startswith("--")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(folders[0]) if folders else draw_shapes(Path(scratch) / "shapes")
        run = ensemble_kd.distill(
            teachers=[f"py:{__file__}:my_network", "resnet8"],
            student="cifar-quick",
            data=f"imagefolder:{folder}",
            controls="labels,best-teacher",
            **({"epochs": 2, "teacher_epochs": 1} if "--fast" in arguments else {}),
        )
    print(metrics_table(run.metrics))


if __name__ == "__main__":
    main(sys.argv[1:])
