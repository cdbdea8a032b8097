"""Seconds a training step: on labels, with stored targets, with teachers online, and what others take.

    python -m benchmarks.steps [--quick] [--blocks 7] [--setting NAME] [--device cpu]

Sides, all in one process, in interleaved blocks:

    floor         a minimal PyTorch loop of the student on labels, without views: the least there is
    plain         our `fit` on labels
    stored        our `fit` with targets of one view that were made before
    online        our `fit` with teachers that are run on every batch
    teachers      the teachers alone as `online` runs them: BatchNorm folded, channels-last, bf16 where that is native
    as they are   the same networks in inference mode, with nothing done to them
    naive         a plain loop over our batched views that keeps the teachers' graph and goes back through it
    torchdistill  1.1.5, online, with its own loader at 0 and 2 workers (see torchdistill_side.py)

Answers rows 1, 3 and 4 of the aims. Multiply-accumulates are not time: small layers use less of a machine than
large ones, so beside the formula (3 F_s + F_t) / 3 F_s stands what the teachers' own forward pass predicts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import torchdistill_side
from benchmarks.blocks import (
    SGD,
    Stack,
    arguments_of,
    as_ensemble,
    as_text,
    compare,
    distilling,
    interleave,
    network,
    own_cache,
    random_images,
    spread,
    train,
    wait_for,
    where,
)
from ensemble_kd.classifier import Classifier
from ensemble_kd.data import views
from ensemble_kd.data.dataset import Images
from ensemble_kd.device import choose_device
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

BATCH, VIEWING = 128, Viewing("crop-flip", 1, 0)
PEER = "torchdistill, {} workers"


@dataclass(frozen=True)
class Setting:
    """Teachers and a student at 32×32, the steps of a block of its cheap and its dear sides, and the most blocks."""

    name: str
    teachers: dict[str, tuple[str, str]]
    student: str
    cheap: int
    dear: int
    most: int = 7

    def networks(self) -> tuple[dict[str, Classifier], Classifier]:
        """The teachers by name, and the student; the same weights on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teachers = {label: network(name, form) for label, (name, form) in self.teachers.items()}
            return teachers, network(self.student)


SMALL = {"resnet18": ("timm:resnet18", "stock"), "quarter-vgg16": ("quarter-vgg16", "stock")}
LARGE = {"resnet18": ("timm:resnet18", "small"), "vgg16": ("timm:vgg16", "small")}
SETTINGS = {
    "small-lenet": Setting("small teachers → LeNet", SMALL, "lenet", cheap=40, dear=10),
    "small-resnet8": Setting("small teachers → ResNet-8", SMALL, "resnet8", cheap=10, dear=5),
    "large-lenet": Setting("small-stem resnet18 + VGG16 → LeNet", LARGE, "lenet", cheap=20, dear=1, most=3),
}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="one of them; may be repeated")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    print(where(device))
    for name in arguments.setting or SETTINGS:
        setting = SETTINGS[name]
        measured = measure(setting, device, arguments.blocks, arguments.quick)
        print(sides_table(setting, measured), as_text(ratios(setting, measured)), "", sep="\n\n")


def rows(device: torch.device, blocks: int = 7, quick: bool = False) -> list[dict[str, Any]]:
    """The ratios of every setting; seconds are in milliseconds a step."""
    measured = ((setting, measure(setting, device, blocks, quick)) for setting in SETTINGS.values())
    return [row for setting, seconds in measured for row in ratios(setting, seconds)]


def measure(setting: Setting, device: torch.device, blocks: int, quick: bool) -> dict[str, list[float]]:
    """Milliseconds a step of each side, block by block."""
    shorter, longer = (4 if quick else 1), (5 if device.type == "cuda" else 1)
    cheap, dear = (max(1, steps * longer // shorter) for steps in (setting.cheap, setting.dear))
    with own_cache():
        sides = make_sides(setting, device, cheap, dear)
        in_ms = {name: partial(_milliseconds, side) for name, side in sides.items()}
        return interleave(in_ms, 2 if quick else min(blocks, setting.most))


def _milliseconds(side: Callable[[], float]) -> float:
    return 1000 * side()


def make_sides(
    setting: Setting, device: torch.device, cheap: int, dear: int
) -> dict[str, Callable[[], float]]:
    """A block of each side, which returns its seconds a step; each has a student of its own."""
    teachers, student = setting.networks()
    ensemble = as_ensemble(copy.deepcopy(teachers), device)
    many, few = (random_images(steps * BATCH, 32, device) for steps in (cheap, dear))
    stored, live = StoredTargets(ensemble, many, VIEWING), LiveTargets(ensemble)
    nets = [model.to(device).eval() for model in teachers.values()]
    student.to(device)

    def ours(data: Images, objective: Objective) -> Callable[[], float]:
        steps, model = len(data) // BATCH, copy.deepcopy(student)
        return lambda: train(model, data, VIEWING, BATCH, objective) / steps

    sides = {
        "floor": floor(copy.deepcopy(student), many),
        "plain": ours(many, Objective()),
        "stored": ours(many, distilling(stored, ensemble, many)),
        "online": ours(few, distilling(live, ensemble, few)),
        "teachers": forward(ensemble.look, few),
        "as they are": forward(lambda batch: [net(batch.pixels) for net in nets], few),
        "naive": naive(copy.deepcopy(nets), copy.deepcopy(student), few),
    }
    if find_spec("torchdistill") is not None:
        data = random_images((dear + 1) * BATCH, 32, device)
        for workers in torchdistill_side.WORKERS:
            sides[PEER.format(workers)] = torchdistill_side.make_step(
                [net.net for net in nets], student.net, data, batch=BATCH, workers=workers, device=device
            )
    return sides


def floor(model: Classifier, data: Images) -> Callable[[], float]:
    """Index, normalise, forward, cross-entropy, backward, step; nothing else."""
    device = data.pixels.device
    optimizer = torch.optim.SGD(model.train().parameters(), **SGD)

    def block() -> float:
        started = wait_for(device)
        for index in torch.randperm(len(data), device=device).split(BATCH):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(data.pixels[index])
            loss = F.cross_entropy(logits.float(), data.known_labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return (wait_for(device) - started) / (len(data) // BATCH)

    return block


def forward(look: Callable[[Images], object], data: Images) -> Callable[[], float]:
    """Teachers on batch after batch."""
    device = data.pixels.device

    @torch.inference_mode()
    def block() -> float:
        started = wait_for(device)
        for batch in data.batches(BATCH):
            look(batch)
        return (wait_for(device) - started) / (len(data) // BATCH)

    return block


def naive(teachers: list[Classifier], student: Classifier, data: Images) -> Callable[[], float]:
    """The stack of `blocks.Stack`, on our views; the optimiser has the student alone."""
    device, stack = data.pixels.device, Stack(teachers, student)
    optimizer = torch.optim.SGD(stack.student.parameters(), **SGD)

    def block() -> float:
        started = wait_for(device)
        for index in torch.randperm(len(data), device=device).split(BATCH):
            batch = data[index]
            pixels = views.view(batch.pixels, batch.ids, policy=VIEWING.policy, seed=0, view_id=0)
            stack.step(optimizer, pixels, batch.known_labels, detached=False)
        return (wait_for(device) - started) / (len(data) // BATCH)

    return block


def macs(net: nn.Module) -> float:
    """Multiply-accumulates of one 32×32 image through `net`, forward, in millions."""
    weight = next(net.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net.eval()(torch.zeros(1, 3, 32, 32, device=weight.device, dtype=weight.dtype))
    return counter.get_total_flops() / 2e6


def ratios(setting: Setting, ms: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The rows of the table of aims, and three that tell what they stand on."""
    plain, stored, online = ms["plain"], ms["stored"], ms["online"]
    unit, name = {"unit": "ms"}, setting.name
    result = [
        compare(None, f"{name}: plain / floor", plain, ms["floor"], ms["floor"], **unit),
        compare(1, f"{name}: stored / plain", stored, plain, plain, **unit),
        compare(None, f"{name}: naive / online", online, ms["naive"], online, **unit),
    ]
    peers = {key: values for key, values in ms.items() if key.startswith("torchdistill")}
    if peers:
        best = min(peers, key=lambda key: spread(peers[key])[0])
        for side in ("online", "stored"):
            row = compare(3, f"{name}: torchdistill online / {side}", ms[side], peers[best], ms[side], **unit)
            result.append(row | {"note": f"the best of its settings: {best}"})
    predicted = [a + b for a, b in zip(ms["teachers"], stored, strict=True)]
    by_time = compare(None, f"{name}: online / (stored + teachers)", online, predicted, predicted, **unit)
    row = compare(4, f"{name}: online / stored", stored, online, stored, **unit)
    return [*result, row | {"note": formula_note(setting, row["ratio"])}, by_time]


def formula_note(setting: Setting, ratio: float) -> str:
    """What the count of multiply-accumulates predicts, and how far from it the measured ratio is."""
    teachers, student = setting.networks()
    own, theirs = macs(student.net), sum(macs(model.net) for model in teachers.values())
    predicted = (3 * own + theirs) / (3 * own)
    return (
        f"F_s {own:.3g} M, F_t {theirs:.4g} M multiply-accumulates an image, so the formula says {predicted:.3g}; "
        f"measured is {ratio / predicted:.2g} of it"
    )


def sides_table(setting: Setting, measured: dict[str, list[float]]) -> str:
    """Every side's milliseconds a step."""
    cells = [
        [name, f"{median:.4g}", f"[{low:.4g}, {high:.4g}]"]
        for name, (median, low, high) in ((name, spread(values)) for name, values in measured.items())
    ]
    title = f"{setting.name}, B={BATCH}, {len(next(iter(measured.values())))} blocks"
    return text_table(["", "ms a step", "[min, max]"], cells, title)


if __name__ == "__main__":
    main()
