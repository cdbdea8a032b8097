"""The examples run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from support import draw_nothing

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWS = {
    "quickstart.py": ["control labels", "the first five test images are", "student – ensemble"],
    "combine_teachers.py": [
        "NLL lost without it",
        "Combined by learned",
        "Combined by python:sharpest",
        "mean 0.",
    ],
    "own_images.py": ["teacher my_network", "control best-teacher", "student"],
    "several_machines.py": [
        "machine 1: python -m torch.distributed.run",
        "runs/together: nothing is damaged",
    ],
    "compress_for_deployment.py": ["onnxruntime alone: {", "run deploy: ", " 0 damaged", "export onnx: "],
    "study_a_student.py": ["temperature=4", "Chosen on the validation split", "agreement-pairs.png"],
    "toy_surface.py": ["student says the same on the grid as teacher relu", "control on labels says"],
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
@pytest.mark.usefixtures("empty_folder")
def test_example(name, shared_cache, monkeypatch, capsys):
    if name != "toy_surface.py":
        draw_nothing(monkeypatch)  # what pictures show is for other tests
    monkeypatch.setenv("EKD_CACHE", shared_cache)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), "--fast"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    shown = capsys.readouterr().out
    for text in SHOWS[name]:
        assert text in shown
