"""What channels last, the layout that every network gets, saves on a CPU.

    python -m benchmarks.layout [--blocks 7]

A step is forward, cross-entropy and backward of 128 random images (16 of the larger networks); a pass is a
forward pass in evaluation mode. CPU seconds of one thread, both layouts in turn; medians with min–max of the
ratios of paired blocks. Prints a table and writes benchmarks/results/layout.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import RESULTS, commit_now, surroundings
from ensemble_kd import files
from ensemble_kd.models import build, parse
from ensemble_kd.tables import text_table

CLASSES, CALLS = 10, 3
NETWORKS = {
    "lenet, 1×28×28": ("lenet", "small", (128, 1, 28, 28)),
    "lenet, 3×32×32": ("lenet", "small", (128, 3, 32, 32)),
    "cifar-quick, 3×32×32": ("cifar-quick", "small", (128, 3, 32, 32)),
    "resnet8, 3×32×32": ("resnet8", "small", (128, 3, 32, 32)),
    "mobilenetv3_small_050, 3×32×32": ("mobilenetv3_small_050", "small", (128, 3, 32, 32)),
    "resnet18, 3×64×64": ("resnet18", "stock", (16, 3, 64, 64)),
    "vgg16, 3×64×64": ("vgg16", "stock", (16, 3, 64, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=7)
    blocks = parser.parse_args().blocks
    torch.set_num_threads(1)
    torch.manual_seed(0)
    commit = commit_now()
    rows = {
        name: {kind: ratios(name, blocks, kind == "step") for kind in ("step", "pass")} for name in NETWORKS
    }
    texts = {
        name: {k: "{median:.2f} [{min:.2f}, {max:.2f}]".format(**v) for k, v in row.items()}
        for name, row in rows.items()
    }
    print(text_table(["", "step", "pass"], [[name, row["step"], row["pass"]] for name, row in texts.items()]))
    files.write_json(RESULTS / "layout.json", {"ratios": rows, "blocks": blocks, **surroundings(commit)})


def ratios(name: str, blocks: int, training: bool) -> dict[str, float]:
    """CPU seconds of the plain layout over those of channels last, by paired blocks."""
    plain, last = (work(name, training, layout) for layout in (torch.contiguous_format, torch.channels_last))
    for call in (plain, last):
        seconds(call)
    found = [seconds(plain) / seconds(last) for _ in range(blocks)]
    return {key: float(of(found)) for key, of in (("median", np.median), ("min", min), ("max", max))}


def work(name: str, training: bool, layout: torch.memory_format) -> Callable[[], None]:
    code, form, shape = NETWORKS[name]
    net: nn.Module = build(parse(code), num_classes=CLASSES, channels=shape[1], size=shape[-1], form=form)
    net.to(memory_format=layout).train(training)
    x, y = torch.randn(shape), torch.arange(shape[0]) % CLASSES

    def call() -> None:
        with torch.inference_mode(not training):
            logits = net(x.contiguous(memory_format=layout))
        if training:
            F.cross_entropy(logits, y).backward()

    return call


def seconds(call: Callable[[], None]) -> float:
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
