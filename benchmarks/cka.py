"""CKA of all layers of two networks: ours against torch-cka 0.21, and what it takes in memory.

    python -m benchmarks.cka [--quick] [--device cpu]

Both sides see the same training images of digits in batches of 256, through two networks trained on them (from
the library of teachers, where they are kept), and compare every module of one with every module of the other;
ours also compares each network with itself and keeps what intervals are made of. torch-cka is given its inputs
ready-made, and run under `no_grad`, which it does not ask for itself. Sides take turns in blocks, after one that is
not counted; CPU seconds, medians with min–max, ratios of paired blocks. Errors are the largest over all pairs of layers against
float64 networks with the sums written out from equation 3 of Nguyen et al. 2021, on the same batches. The in-place
case is bn1 beside the activation that overwrites its output, in a small-form ResNet-18.

Memory is that of the whole pass over what was in use before it, in a process of its own for each number of layers
and batch; the networks are narrow, so that activations take almost nothing. Writes results/cka.json.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.blocks import (
    arguments_of,
    as_text,
    compare,
    interleave,
    network,
    random_images,
    wait_for,
    where,
)
from benchmarks.common import RESULTS, commit_now, surroundings
from benchmarks.memory import ROOT, forget_peak, peak_of, spread
from ensemble_kd import files
from ensemble_kd.analysis.taps import look
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log_to_stderr
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset, Images
from ensemble_kd.device import choose_device
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.registry import load_teacher

BATCH = 256
PAIRS = {("lenet", "resnet8"): (1024, 3), ("resnet8", "resnet20"): (512, 2)}
"""Images and blocks."""
IN_PLACE = ("resnet18", ("bn1", "act1"))
CASES = ((10, 128), (20, 128), (40, 128), (80, 128), (10, 256), (20, 256), (40, 256), (80, 256))
WIDTH = 64


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--case", help="L,B: measure the memory of one case here; prints a number")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    if arguments.case:
        print(json.dumps(peak_megabytes(*map(int, arguments.case.split(",")), device)))
        return
    log_to_stderr()
    commit, data = commit_now(), load_data("digits").to(device)
    print(where(device))
    pairs = [
        against_torch_cka(names, data, device, images, 1 if arguments.quick else blocks)
        for names, (images, blocks) in list(PAIRS.items())[: 1 if arguments.quick else None]
    ]
    in_place = where_overwritten(data, device)
    cases = CASES[:2] if arguments.quick else CASES
    memory = [memory_of(layers, batch, device, 1 if arguments.quick else 3) for layers, batch in cases]
    print(
        as_text([pair["time"] for pair in pairs]),
        error_table(pairs, in_place),
        memory_table(memory),
        sep="\n\n",
    )
    found = {"pairs": pairs, "in_place": in_place, "memory": memory}
    files.write_json(RESULTS / "cka.json", found | surroundings(commit))


def against_torch_cka(
    pair: Sequence[str], data: Dataset, device: torch.device, images: int, blocks: int
) -> dict[str, Any]:
    """Seconds of both sides, and their errors."""
    nets = [load_teacher(name, data, device=device).classifier for name in pair]
    shown = data.train[torch.arange(images, device=device)]
    names = [[name for name, _ in net.net.named_modules() if name] for net in nets]
    wanted = reference(nets, shown, names)
    kept: dict[str, np.ndarray] = {}
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: timed(lambda: kept.update(ours=own_side(nets, shown, names)), device),
        "torch-cka": lambda: timed(lambda: kept.update(theirs=their_side(nets, shown, names)), device),
    }
    seconds = interleave(sides, blocks)
    name, note = " × ".join(pair), f"{len(names[0])} × {len(names[1])} modules, {images:,} images"
    row = compare(None, name, seconds["ours"], seconds["torch-cka"], seconds["ours"], unit="s", note=note)
    errors = {side: float(np.abs(found - wanted).max()) for side, found in kept.items()}
    return {"time": row, "seconds": seconds, "errors": errors}


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds: of this process alone on a CPU, so that whatever else runs there is left out."""
    clock = time.process_time if device.type == "cpu" else lambda: wait_for(device)
    start = clock()
    work()
    return clock() - start


def own_side(nets: Sequence[Classifier], shown: Images, names: Sequence[Sequence[str]]) -> np.ndarray:
    """CKA of the modules of the first network (rows) and the second, in the order of `names`."""
    seen = look(dict(zip("ab", nets, strict=True)), shown, ["*"], batch=BATCH)
    places = [
        np.concatenate([seen.at(key, name) for name in part]) for key, part in zip("ab", names, strict=True)
    ]
    return seen.moments.cka()[np.ix_(*places)]


def their_side(nets: Sequence[Classifier], shown: Images, names: Sequence[Sequence[str]]) -> np.ndarray:
    """The same from torch-cka; its matrix is in the order in which modules finish."""
    import torch_cka.cka as peer

    peer.tqdm = lambda batches, **_: batches
    loaders = [
        DataLoader(TensorDataset(net.card.preprocess(shown.decoded).cpu()), BATCH, shuffle=False)
        for net in nets
    ]
    device = str(shown.ids.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = [copy.deepcopy(net.net) for net in nets]  # its hooks are never removed
        cka = peer.CKA(*own, "a", "b", *(list(part) for part in names), device=device)
        cka.compare(*loaders)
        ran = [list(features) for features in (cka.model1_features, cka.model2_features)]
    rows, columns = ([order.index(name) for name in part] for order, part in zip(ran, names, strict=True))
    return cka.export()["CKA"].numpy()[np.ix_(rows, columns)]


def reference(nets: Sequence[Classifier], shown: Images, names: Sequence[Sequence[str]]) -> np.ndarray:
    """The same in float64 throughout, from sums of HSIC₁ over batches written out."""
    sums = np.zeros((3, len(names[0]), len(names[1])))
    for batch in shown.batches(BATCH):
        grams = [outputs(net, batch.decoded, part) for net, part in zip(nets, names, strict=True)]
        for i, k in enumerate(grams[0]):
            for j, m in enumerate(grams[1]):
                sums[:, i, j] += [hsic1(k, m), hsic1(k, k), hsic1(m, m)]
    return sums[0] / np.sqrt(sums[1] * sums[2])


def outputs(net: Classifier, pixels: Tensor, names: Sequence[str]) -> list[np.ndarray]:
    """Inner products of what modules give, copied before anything can write to it."""
    exact, kept = copy.deepcopy(net.net).double().eval(), {}
    for name, module in exact.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: kept.update({name: out.detach().flatten(1).clone()})
        )
    with torch.no_grad():
        exact(net.card.preprocess(pixels).double())
    return [(kept[name] @ kept[name].T).cpu().numpy() for name in names]


def hsic1(k: np.ndarray, m: np.ndarray) -> float:
    """Equation 3 of Nguyen et al. 2021."""
    n = len(k)
    k, m = (gram - np.diag(np.diag(gram)) for gram in (k, m))
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(1))
    return float(total / (n * (n - 3)))


def where_overwritten(data: Dataset, device: torch.device) -> dict[str, float]:
    """CKA of a layer and the activation that is computed in its place, of both sides and in truth."""
    name, layers = IN_PLACE
    net = load_teacher(name, data, device=device).classifier
    shown, names = data.train[torch.arange(4 * BATCH, device=device)], [[layer] for layer in layers]
    sides = {"reference": reference, "ours": own_side, "torch-cka": their_side}
    return {side: float(work([net, net], shown, names)[0, 0]) for side, work in sides.items()}


def memory_of(layers: int, batch: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """The peak of a pass, each time in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cka", "--case", f"{layers},{batch}", "--device", str(device)]
    peaks = []
    for _ in range(repeats):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    median, low, high = spread(peaks)
    stack = 8 * layers * batch**2 / 1e6
    return {"layers": layers, "batch": batch, "stack": stack, "median": median, "min": low, "max": high}


def peak_megabytes(layers: int, batch: int, device: torch.device) -> float:
    """Of one pass over four batches, with that many layers in all."""
    net = network("lenet")
    wide = [nn.Linear(WIDTH, WIDTH) for _ in range(layers - 3)]
    net.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, WIDTH), *wide, nn.Linear(WIDTH, 10)).to(
        device
    )
    shown = random_images(4 * batch, 32, device)
    patterns = ["1", *(str(k + 2) for k in range(layers - 3))]  # with penultimate and logits
    look({"net": net}, shown[torch.arange(16, device=device)], patterns, batch=16)
    before = forget_peak(device)
    seen = look({"net": net}, shown, patterns, batch=batch)
    assert len(seen.moments.hsic) == layers
    return (peak_of(device) - before) / 1e6


def error_table(pairs: Sequence[dict[str, Any]], in_place: dict[str, float]) -> str:
    name, (before, after) = IN_PLACE
    rows = [
        *(
            [
                f"{pair['time']['name']}: largest error",
                *(f"{pair['errors'][side]:.1e}" for side in ("ours", "theirs")),
                "–",
            ]
            for pair in pairs
        ),
        [
            f"{name}: {before} beside {after}",
            *(f"{in_place[k]:.4f}" for k in ("ours", "torch-cka", "reference")),
        ],
    ]
    return text_table(["", "ours", "torch-cka", "float64"], rows)


def memory_table(memory: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            f"L = {row['layers']}, B = {row['batch']}",
            f"{row['median']:.1f} [{row['min']:.1f}, {row['max']:.1f}]",
            f"{row['stack']:.1f}",
            f"{row['median'] / row['stack']:.1f}",
        ]
        for row in memory
    ]
    return text_table(["", "peak, MB", "8 · L · B², MB", "ratio"], rows)


if __name__ == "__main__":
    main()
