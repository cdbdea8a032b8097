"""Peak memory of training steps: on labels, with stored targets, with teachers online, and with both stacked.

    python -m benchmarks.memory [--quick] [--repeats 3] [--exact] [--scene NAME] [--device cpu]

Each case runs in a process of its own: all networks and images are made, targets are stored where the side has
them, then two steps are trained. On a CPU the peak is the process's resident memory, on a GPU what PyTorch has
allocated there, with steps that are eager, not recorded as a graph; both over what was in use before the first step.
Copies of teachers' weights, which folding BatchNorm makes, count as part of the peak. Beside it stand what no side
can do without, gradients and momentum of what is trained, and the bytes of activations that autograd keeps for one
step's backward pass; these are counted, not measured. glibc's allocator keeps part of what is freed; with --exact
it gives back every tensor of 64 KiB or more at once, so that peaks are those of live tensors and repeat to 1 %.

Sides: `plain`, our `fit` on labels; `stored` and `online`, our `fit` with either kind of target; `naive`, teachers
and student as one module in one graph and one optimiser; `mild`, the same graph, but the teachers' logits are
detached and only the student is optimised, so the teachers' activations alone are kept in vain.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.blocks import (
    CLASSES,
    SGD,
    Stack,
    arguments_of,
    as_ensemble,
    as_text,
    compare,
    distilling,
    network,
    own_cache,
    random_images,
    spread,
    train,
    where,
)
from ensemble_kd.classifier import Classifier
from ensemble_kd.data.dataset import Images
from ensemble_kd.device import choose_device
from ensemble_kd.loop import Engine
from ensemble_kd.objective import Objective, Viewing
from ensemble_kd.tables import text_table
from ensemble_kd.teachers.ensemble import Ensemble
from ensemble_kd.teachers.targets import LiveTargets, StoredTargets

ROOT = Path(__file__).parents[1]
STEPS, VIEWING = 2, Viewing("crop-flip", 1, 0)
SIDES = ("plain", "stored", "online", "mild", "naive")


@dataclass(frozen=True)
class Scene:
    """Networks as (name, form, input size), the images' side, and the batch."""

    name: str
    teachers: dict[str, tuple[str, str, int]]
    student: tuple[str, str, int]
    image_size: int
    batch: int
    sides: tuple[str, ...] = SIDES
    note: str = ""


SCENES = {
    "small": Scene(
        "small teachers → LeNet, 32 px",
        {"resnet18": ("timm:resnet18", "stock", 32), "quarter-vgg16": ("quarter-vgg16", "stock", 32)},
        ("lenet", "stock", 32),
        image_size=32,
        batch=128,
    ),
    "large": Scene(
        "small-stem resnet18 + VGG16 → LeNet, 32 px",
        {"resnet18": ("timm:resnet18", "small", 32), "vgg16": ("timm:vgg16", "small", 32)},
        ("lenet", "stock", 32),
        image_size=32,
        batch=128,
    ),
    "slides": Scene(
        "AlexNet → VGG16, 224 px",
        {"alexnet": ("tv:alexnet", "stock", 224)},
        ("tv:vgg16", "stock", 224),
        image_size=224,
        batch=20,
    ),
    "two-sizes": Scene(
        "resnet18 at 64 px → LeNet at 32 px",
        {"resnet18": ("timm:resnet18", "stock", 64)},
        ("lenet", "stock", 32),
        image_size=64,
        batch=128,
        sides=("plain", "stored", "online"),
        note="networks that are stacked naively share one input size, so there is no such case",
    ),
}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scene", choices=SCENES, action="append", help="one of them; may be repeated")
    parser.add_argument("--side", choices=SIDES, help="measure one side of the scene here; prints JSON")
    parser.add_argument("--exact", action="store_true", help="freed tensors go back to the system at once")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    names = arguments.scene or (["small"] if arguments.quick else list(SCENES))
    if arguments.side:
        print(json.dumps(measure(SCENES[names[0]], arguments.side, device)))
        return
    print(where(device))
    for name in names:
        repeats = 1 if arguments.quick else arguments.repeats
        measured = in_turn(name, device, repeats, arguments.exact)
        print(sides_table(SCENES[name], measured), as_text(ratios(SCENES[name], measured)), "", sep="\n\n")


def rows(device: torch.device, repeats: int = 3, exact: bool = False) -> list[dict[str, Any]]:
    """Row 5 of the aims for every scene; megabytes over what was in use before the first step."""
    measured = ((scene, in_turn(name, device, repeats, exact)) for name, scene in SCENES.items())
    return [row for scene, found in measured for row in ratios(scene, found)]


def in_turn(name: str, device: torch.device, repeats: int, exact: bool) -> dict[str, list[dict[str, float]]]:
    """What `measure` says of each side of a scene, each time in a fresh process; the sides take turns."""
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SCENES[name].sides}
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if exact else {})}
    for _ in range(repeats):
        for side, found in measured.items():
            command = [sys.executable, "-m", "benchmarks.memory", "--scene", name, "--side", side]
            command += ["--device", str(device)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return measured


def measure(scene: Scene, side: str, device: torch.device) -> dict[str, float]:
    """Megabytes of one side: `weights`, `copies` of them, `trained` and `kept` as counted, and the `peak`."""
    torch.manual_seed(0)
    teachers = {label: network(*spec).to(device) for label, spec in scene.teachers.items()}
    student = network(*scene.student).to(device)
    data = random_images(STEPS * scene.batch, scene.image_size, device)
    models = nn.ModuleList([*teachers.values(), student])
    weights = [*models.parameters(), *models.buffers()]
    trained = list((models if side == "naive" else student).parameters())
    with own_cache():
        run = make_side(side, as_ensemble(teachers, device), student, data, scene.batch)
        # Once on a few images, so that the libraries' own memory is in every base alike.
        run(data[torch.arange(CLASSES, device=device)])
        models.zero_grad(set_to_none=True)
        copies = held_by_modules() - size_of(weights)
        before = forget_peak(device)
        run(data)
        peak = copies + peak_of(device) - before
        kept = kept_by_autograd(lambda: run(data[torch.arange(scene.batch, device=device)]), weights)
    found = {"weights": size_of(weights), "copies": copies, "trained": 2 * size_of(trained)}
    return {name: size / 1e6 for name, size in (found | {"kept": kept, "peak": peak}).items()}


def held_by_modules() -> int:
    """Bytes of the parameters and buffers of all modules that are alive."""
    gc.collect()
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    tensors = [
        tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    return size_of(list({tensor.data_ptr(): tensor for tensor in tensors}.values()))


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_side(
    side: str, ensemble: Ensemble, student: Classifier, data: Images, batch: int
) -> Callable[[Images], None]:
    """What trains one epoch of the images that it is given; targets of `data` are stored before."""
    if side in ("naive", "mild"):
        stack = Stack([teacher.classifier for teacher in ensemble.teachers], student)
        return lambda images: stacked_epoch(stack, images, batch, detached=side == "mild")
    objective = Objective()
    if side == "stored":
        stored = StoredTargets(ensemble, data, VIEWING)
        stored.build()
        objective = distilling(stored, ensemble, data)
        ensemble.release()
    if side == "online":
        objective = distilling(LiveTargets(ensemble), ensemble, data)

    def run(images: Images) -> None:
        train(student, images, VIEWING, batch, objective, Engine(graph=False))

    return run


def stacked_epoch(stack: Stack, data: Images, batch: int, detached: bool) -> None:
    """The plain loop; with `detached` the optimiser has the student alone."""
    trained = stack.student if detached else stack
    optimizer = torch.optim.SGD(trained.parameters(), **SGD)
    for index in torch.arange(len(data), device=data.pixels.device).split(batch):
        stack.step(optimizer, data.pixels[index], data.known_labels[index], detached)


def forget_peak(device: torch.device) -> int:
    """Give back what is free, and forget the peak so far, of making the networks; returns the bytes in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # of glibc
    Path("/proc/self/clear_refs").write_text("5")  # of Linux: VmHWM begins anew
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(device: torch.device) -> int:
    """The most bytes that were in use at once since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would also count what a large parent had in use when it started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def kept_by_autograd(step: Callable[[], None], weights: Sequence[Tensor]) -> int:
    """Bytes, other than weights, that autograd keeps for the backward pass of one step.

    Storages are told apart by address: what is kept is not freed before the backward pass.
    """
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def ratios(scene: Scene, measured: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """The rows of the table of aims, on peaks; what has none is of interest."""
    peaks = {side: [found["peak"] for found in values] for side, values in measured.items()}
    plain, online = peaks["plain"], peaks["online"]
    unit = {"unit": "MB"}
    result = [
        compare(5, f"{scene.name}: stored / plain", peaks["stored"], plain, plain, **unit),
        compare(None, f"{scene.name}: online / plain", online, plain, plain, **unit, note=scene.note),
    ]
    for side in ("mild", "naive"):
        if side in peaks:
            row = 5 if side == "naive" else None
            name = f"{scene.name}: online / {side} stacking"
            result.append(compare(row, name, online, peaks[side], peaks[side], **unit))
    if "naive" in peaks:
        ours, theirs = (
            [a - b for a, b in zip(peaks[side], plain, strict=True)] for side in ("online", "naive")
        )
        name = f"{scene.name}: what online adds to plain / what naive stacking adds"
        result.append(compare(None, name, ours, theirs, theirs, **unit))
    return result


def sides_table(scene: Scene, measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Every side's parts, and its peak over plain training."""
    plain = spread([found["peak"] for found in measured["plain"]])[0]
    cells = []
    for side, values in measured.items():
        peak, low, high = spread([found["peak"] for found in values])
        counted = [f"{values[0][part]:.1f}" for part in ("weights", "copies", "trained", "kept")]
        cells.append([side, *counted, f"{peak:.1f} [{low:.1f}, {high:.1f}]", f"{peak - plain:+.1f}"])
    headers = [
        "MB",
        "weights",
        "copies",
        "grads + momentum",
        "activations kept",
        "peak over base",
        "over plain",
    ]
    return text_table(headers, cells, f"{scene.name}, B={scene.batch}")


if __name__ == "__main__":
    main()
