"""Which layer of another seed's network is most like a layer: the sanity test of Kornblith et al. 2019, section 6.1.

    python -m benchmarks.sanity [--seeds 5] [--epochs 12] [--quick] [--device cpu]

A plain network of seven 3×3 convolutions, 32 channels each, is trained on digits (8×8) with several seeds. For each
ordered pair of networks and each of the seven activations, the most similar activation of the other network ought to
be that of the same depth: the share of pairs and layers where it is, for debiased CKA in minibatches of 256 as
`analyze-features` measures it, for biased linear CKA on all test images at once, and for HSIC₁ without normalisation.
Beside it, how alike the last convolutions of two networks are, both trained, or one of them not. Intervals are of a t
distribution over seeds, of means by network. With other widths, strides or more epochs debiased CKA finds 0.76 to
0.83 of the layers. Writes results/sanity.json.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.blocks import arguments_of, where
from benchmarks.common import RESULTS, commit_now, surroundings, t_interval
from ensemble_kd import files
from ensemble_kd.analysis.cka import linear_cka
from ensemble_kd.analysis.taps import look
from ensemble_kd.classifier import Card, Classifier, Preprocess
from ensemble_kd.data import load_data
from ensemble_kd.data.dataset import Dataset
from ensemble_kd.device import choose_device
from ensemble_kd.fit import fit
from ensemble_kd.inference import predict
from ensemble_kd.metrics import correct
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.stepping import Recipe
from ensemble_kd.tables import text_table

CONVOLUTIONS, WIDTH, HALVED = 7, 32, (2, 4)
"""Convolutions with stride 2."""
REFERENCE = {"debiased CKA": 0.886, "HSIC₁": 0.143, "trained – trained": 0.93, "untrained – trained": 0.35}
"""What such a test gave elsewhere on digits, with seven convolutions and five seeds."""


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    seeds, epochs = (2, 2) if arguments.quick else (arguments.seeds, arguments.epochs)
    device, commit, started = choose_device(arguments.device), commit_now(), time.perf_counter()
    data = load_data("digits").to(device)
    fresh = {f"untrained {seed}": plain_net(data, seed).to(device).eval() for seed in range(seeds)}
    trained = {f"trained {seed}": taught(data, seed, epochs, device) for seed in range(seeds)}
    accuracy = [
        float(correct(predict(net, data.test), data.test.known_labels).double().mean())
        for net in trained.values()
    ]
    print(where(device))
    right, last = measure({**fresh, **trained}, list(trained), data)
    found = {
        "right": {name: t_interval(values) for name, values in right.items()},
        "last": {name: t_interval(values) for name, values in last.items()},
        "accuracy": accuracy,
        "reference": REFERENCE,
        "seeds": seeds,
        "epochs": epochs,
        "n": len(data.test),
        "seconds": time.perf_counter() - started,
    }
    print(as_text(found))
    if not arguments.quick:
        files.write_json(RESULTS / "sanity.json", found | surroundings(commit))


def plain_net(data: Dataset, seed: int) -> Classifier:
    """Seven convolutions, each with BatchNorm and ReLU, a global pool and one linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        channels = data.channels
        for k in range(CONVOLUTIONS):
            stride = 2 if k in HALVED else 1
            layers += [
                nn.Conv2d(channels, WIDTH, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(),
            ]
            channels = WIDTH
        net = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(data.classes))
        )
    mean, std = data.mean_and_std
    size = (data.image_size, data.image_size)
    return Classifier(net, Card("plain7", "stock", Preprocess(data.channels, size, mean, std), data.classes))


def taught(data: Dataset, seed: int, epochs: int, device: torch.device) -> Classifier:
    """The network after training on labels."""
    net = plain_net(data, seed)
    recipe = Recipe(epochs, 32, "sgd", lr=0.05, weight_decay=5e-4, warmup_epochs=1)
    fit(net, data.train, data.val, recipe, Objective(), Viewing("none", 1, seed), seed=seed, device=device)
    return net


def measure(
    nets: Mapping[str, Classifier], trained: Sequence[str], data: Dataset
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By measure, the share of right layers of each trained network; and the CKA of last convolutions of each.

    Args:
        nets: untrained and trained ones by name, in the same order of seeds.
        trained: the names of the latter.
    """
    relus = [str(3 * k + 2) for k in range(CONVOLUTIONS)]
    seen = look(nets, data.test, relus)
    matrices = {"debiased CKA": seen.moments.cka(), "HSIC₁": seen.moments.hsic}
    places = {name: np.concatenate([seen.at(name, relu) for relu in relus]) for name in nets}
    pairs = list(permutations(trained, 2))
    shares: dict[str, dict[str, list[float]]] = {}
    biased = whole(nets, trained, relus, data)
    for first, second in pairs:
        blocks = {key: matrix[np.ix_(places[first], places[second])] for key, matrix in matrices.items()}
        for key, block in {**blocks, "biased CKA": biased[first, second]}.items():
            hits = float((block.argmax(axis=1) == np.arange(len(relus))).mean())
            shares.setdefault(key, {}).setdefault(first, []).append(hits)
    cka, untrained = matrices["debiased CKA"], [name for name in nets if name not in trained]
    seeds = {name: k for names in (trained, untrained) for k, name in enumerate(names)}

    def last(sides: Sequence[str]) -> np.ndarray:
        return np.array(
            [
                np.mean([cka[places[a][-1], places[b][-1]] for b in trained if seeds[b] != seeds[a]])
                for a in sides
            ]
        )

    right = {key: np.array([np.mean(values) for values in by_net.values()]) for key, by_net in shares.items()}
    return right, {"trained – trained": last(trained), "untrained – trained": last(untrained)}


def whole(
    nets: Mapping[str, Classifier], names: Sequence[str], layers: Sequence[str], data: Dataset
) -> dict[tuple[str, str], np.ndarray]:
    """Biased CKA (layers × layers) of each ordered pair, on all test images at once."""
    kept: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        modules = dict(nets[name].net.named_modules())
        hooks = [
            modules[layer].register_forward_hook(
                lambda _, __, out, name=name: kept[name].append(out.flatten(1))
            )
            for layer in layers
        ]
        with torch.no_grad():
            nets[name](data.test.decoded)
        for hook in hooks:
            hook.remove()
    return {
        (a, b): np.array([[linear_cka(x, y) for y in kept[b]] for x in kept[a]])
        for a, b in permutations(names, 2)
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Both tables."""

    def cell(value: Mapping[str, float]) -> str:
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"

    rows = [
        [
            f"{what}, {name}",
            cell(value),
            f"{found['reference'][name]:.3f}" if name in found["reference"] else "–",
        ]
        for part, what in (("right", "layers found"), ("last", "CKA of the last"))
        for name, value in found[part].items()
    ]
    accuracy = np.mean(found["accuracy"])
    title = f"{found['seeds']} seeds, test accuracy {100 * accuracy:.1f} %"
    return text_table(["", "here [95 % over seeds]", "elsewhere"], rows, title)


if __name__ == "__main__":
    main()
