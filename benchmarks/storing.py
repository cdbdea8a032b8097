"""Row 7: making a view's targets against one plain online pass of the teachers over the same images.

    python -m benchmarks.storing [--quick] [--blocks 7] [--device cpu]

Ours reads each image once for all teachers, runs them folded and channels-last (and in bf16 where the device
has it), and writes half-precision logits with their checksums. The other side is what a training loop
does: teachers in eval mode and no_grad, float32, as the library made them, batch 128, on the same views.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

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
from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Images
from ensemble_kd.device import choose_device
from ensemble_kd.objective import Viewing
from ensemble_kd.teachers.building import Keeping, build, open_stores
from ensemble_kd.teachers.ensemble import Ensemble, Teacher

BATCH = 128
SETTINGS = {
    "small teachers": {"resnet18": ("timm:resnet18", "stock"), "quarter-vgg16": ("quarter-vgg16", "stock")},
    "small-image teachers": {"resnet18": ("timm:resnet18", "small"), "vgg16_bn": ("timm:vgg16_bn", "small")},
}
COUNTS = {"small teachers": 4096, "small-image teachers": 128}


def sides(teachers: dict[str, Classifier], data: Images) -> dict[str, Callable[[], float]]:
    """Seconds of a pass of either side; each stores another view, so that nothing is found."""
    views, device = itertools.count(), data.ids.device
    frozen = [Teacher.of(name, copy.deepcopy(net), "random", storable=True) for name, net in teachers.items()]
    equal = torch.full((len(frozen),), 1 / len(frozen), device=device)
    ensemble = Ensemble(frozen, equal, torch.full_like(equal, 4.0))

    def store() -> float:
        viewing = Viewing("crop-flip", 1, next(views))
        started = wait_for(device)
        build(open_stores(ensemble, data, viewing, Keeping()), ensemble, data, viewing, 1)
        return wait_for(device) - started

    @torch.no_grad()
    def online() -> float:
        viewing = Viewing("crop-flip", 1, next(views))
        started = wait_for(device)
        for batch in viewing.batches(data, torch.arange(len(data), device=device).split(BATCH), 0):
            for net in teachers.values():
                net(batch.pixels)
        return wait_for(device) - started

    return {"store": store, "online": online}


def rows(
    device: torch.device, blocks: int = 7, quick: bool = False, names: Sequence[str] = tuple(SETTINGS)
) -> list[dict[str, Any]]:
    """A row for each setting: seconds of both, and the ratio of their times."""
    found = []
    for name in names:
        networks = SETTINGS[name]
        data = random_images(COUNTS[name] // (8 if quick else 1), 32, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teachers = {label: network(arch, form).to(device) for label, (arch, form) in networks.items()}
        for net in teachers.values():
            net.freeze()
        seconds = interleave(sides(teachers, data), blocks)
        facts = {"unit": "s", "note": f"{len(data):,} images of 32×32"}
        found.append(
            compare(7, f"storing, {name}", seconds["store"], seconds["online"], seconds["online"], **facts)
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = arguments_of(__doc__)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="one of them; may be repeated")
    chosen = parser.parse_args()
    device = choose_device(chosen.device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EKD_CACHE"] = cache
        measured = rows(
            device, 2 if chosen.quick else chosen.blocks, chosen.quick, chosen.setting or list(SETTINGS)
        )
    print(as_text(measured, f"Storing; {where(device)}"))


if __name__ == "__main__":
    main()
