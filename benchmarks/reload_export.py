"""Load what `ekd export` made with nothing but the library of its format, in a process of its own.

    python benchmarks/reload_export.py FOLDER INPUTS.safetensors [FOLDER INPUTS.safetensors]…

INPUTS holds `inputs`, as the format wants them, and `logits` that are expected. Prints a line of JSON for each
folder: the largest difference of the logits, and whether the likeliest classes are the same.
`python -m benchmarks.exports` and the tests run it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def by_timm(folder: Path) -> Callable[[Tensor], Tensor]:
    """Networks of timm; `import ensemble_kd` before adds lenet and its like."""
    if json.loads((folder / "config.json").read_text())["architecture"].startswith("ekd_"):
        import ensemble_kd  # noqa: F401
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def by_onnxruntime(folder: Path, name: str = "model.onnx") -> Callable[[Tensor], Tensor]:
    """Any network; needs neither torch nor the code of the network."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def by_torch(folder: Path) -> Callable[[Tensor], Tensor]:
    """A .pt2, which torch reads by pickle: of people whom you trust."""
    return torch.export.load(folder / "model.pt2").module()


def by_ensemble_kd(folder: Path) -> Callable[[Tensor], Tensor]:
    """The network alone, without its preprocessing."""
    import ensemble_kd

    return ensemble_kd.load_student(folder).net


LOADERS = {"timm": by_timm, "onnx": by_onnxruntime, "torch": by_torch, "safetensors": by_ensemble_kd}


def compared(folder: Path, inputs: Path) -> dict[str, object]:
    """What the reloaded network says, held against what is expected."""
    kept = load_file(inputs)
    own = json.loads((folder / "config.json").read_text())["ensemble_kd"]
    model = LOADERS[own["format"]](folder)
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in kept["inputs"].split(own["checked"]["batches"])])
    same = bool((logits.argmax(1) == kept["logits"].argmax(1)).all())
    difference = float((logits - kept["logits"]).abs().max())
    return {"max_difference": difference, "argmax_identical": same, "images": len(logits)}


if __name__ == "__main__":
    paths = list(map(Path, sys.argv[1:]))
    for folder, inputs in zip(paths[::2], paths[1::2], strict=True):
        print(json.dumps(compared(folder, inputs)))
