"""torchdistill 1.1.5 on the same teachers, student, temperature, weights and batch, as its users run it.

    pip install torchdistill==1.1.5

Its DistillationBox is set up by a configuration like its own for CIFAR-10 (RandomCrop, RandomHorizontalFlip,
ToTensor, Normalize; KDLoss in a WeightedSumLoss) and driven by the loop of its example script, without that
script's meters and printing. What is done in its favour: the teachers are put into eval mode, which it leaves to
its user; SGD is fused as ours; loader workers persist; the loop never reads the loss; on a GPU it has autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler
from torchvision import transforms

from benchmarks.blocks import MEAN, SGD, SOFT_WEIGHT, STD, TEMPERATURE, wait_for
from ensemble_kd.data.dataset import Images

WORKERS = (0, 2)
"""Numbers of loader workers that are tried; the better one is its figure."""


class AveragedTeachers(nn.Module):
    """Teachers as the one module that torchdistill takes; they have equal weights.

    Its KDLoss softens what a teacher gives, softmax(z / T). So this gives T · log of the teachers' mean
    probabilities at T, logits that are softened to exactly that mean; two small operations on (B, C).
    """

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, x: Tensor) -> Tensor:
        probabilities = [torch.softmax(teacher(x) / TEMPERATURE, dim=1) for teacher in self.teachers]
        return TEMPERATURE * torch.stack(probabilities).mean(dim=0).log()


class Pictures(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10 holds its images: arrays that become a PIL image when one is asked for."""

    def __init__(self, images: Images) -> None:
        self.arrays = images.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels: list[int] = images.known_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(self.arrays.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def make_step(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    images: Images,
    *,
    batch: int,
    workers: int,
    device: torch.device,
) -> Callable[[], float]:
    """A block of torchdistill's online distillation: one epoch of `images`, which returns its seconds a step.

    The first step of an epoch is not counted, so that the loader has started; networks are copied.
    """
    from torchdistill.core.distillation import get_distillation_box

    teacher = AveragedTeachers(copy.deepcopy(list(teachers))).eval()
    data = {"random/train": Pictures(images)}
    config = configuration(batch, workers, device)
    box = get_distillation_box(teacher, copy.deepcopy(student), data, config, device, None, False, 1)

    def block() -> float:
        box.pre_epoch_process(epoch=0)
        started, steps = 0.0, 0
        for sample_batch, targets, supp_dict in box.train_data_loader:
            sample_batch, targets = sample_batch.to(device), targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = box.forward_process(sample_batch, targets, supp_dict)
            box.post_forward_process(loss=loss)
            steps += 1
            if steps == 1:
                started = wait_for(device)
        seconds = wait_for(device) - started
        box.post_epoch_process()
        return seconds / (steps - 1)

    return block


def configuration(batch: int, workers: int, device: torch.device) -> dict[str, Any]:
    """The `train` part of a torchdistill configuration, as its YAML files give it."""
    loader = {
        "batch_size": batch,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "drop_last": True,
        "pin_memory": device.type == "cuda",
    }
    criterion = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": 1 - SOFT_WEIGHT,  # of the labels' loss; the soft loss has the rest, times T²
            "reduction": "batchmean",
        },
    }
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "random/train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {}},
            "kwargs": loader,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": criterion, "weight": 1.0}}},
        },
    }
