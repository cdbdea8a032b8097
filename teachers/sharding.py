"""Teachers that do not fit on one device: each of several processes holds a part of every large layer.

By torch's FSDP2 (`fully_shard`): a layer is put together when it is run, and given up right after. The answers
are those of the whole network, and so is its hash.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ensemble_kd import distributed
from ensemble_kd.classifier import Classifier
from ensemble_kd.console import log
from ensemble_kd.errors import ConfigError, ModelError
from ensemble_kd.files import readable
from ensemble_kd.inference import predict_pixels
from ensemble_kd.teachers.ensemble import Teacher

LEAST = 1 << 20
"""Bytes of parameters that are put together by themselves; smaller layers join those around them."""
_APART = 1e-3
"""The largest relative change of a logit, as that of folding in `runner`."""


def check_processes(wanted: bool) -> None:
    """Refuse to share teachers among one process.

    Raises:
        ConfigError: it was not started by torchrun with several.
    """
    if wanted and not distributed.started_by_torchrun():
        raise ConfigError(
            "shard_teachers: there is one process",
            "each of several holds a part of every teacher",
            "start several: torchrun --nproc-per-node 2 -m ensemble_kd distill …, or leave it out",
        )


def sharded(teacher: Teacher, device: torch.device) -> Teacher:
    """The teacher with its parameters divided among the processes, in place; all must call it.

    Raises:
        ModelError: it cannot be divided, or answers otherwise when it is.
    """
    if teacher.sharded or distributed.size() == 1:
        return teacher
    from torch.distributed.device_mesh import init_device_mesh  # a second, which only this road should take
    from torch.distributed.fsdp import fully_shard

    classifier, probe = teacher.classifier.to("cpu"), _probe(teacher.classifier)
    wanted = predict_pixels(classifier, probe)
    mesh = init_device_mesh(device.type, (distributed.size(),))
    try:
        for module in units(classifier):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        classifier.to(device)
        got = predict_pixels(classifier, probe.to(device)).cpu()
    except Exception as error:  # of many kinds, from networks that touch parameters of other layers
        raise _cannot(teacher.label, f"{error}".partition("\n")[0] or type(error).__name__) from error
    apart = float((wanted - got).abs().amax() / wanted.abs().amax().clamp_min(1e-6))
    if not apart <= _APART:
        raise _cannot(teacher.label, f"its logits change by {apart:.1e} of the largest")
    text = "teacher %s: each of %d processes holds %s of %s"
    log.info(
        text,
        teacher.label,
        distributed.size(),
        readable(held_bytes(classifier)),
        readable(classifier.byte_count),
    )
    return replace(teacher, sharded=True)


def units(net: nn.Module) -> list[nn.Module]:
    """What is put together at a time, inner modules first: large elements of sequences, and then the rest.

    Elements of sequences are called by themselves; other modules may have their parameters read by those around.
    """
    found: list[nn.Module] = []
    lists = (nn.Sequential, nn.ModuleList)

    def left(module: nn.Module) -> int:
        """Bytes of parameters in it that belong to no unit yet."""
        count = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for child in module.children():
            inside = left(child)
            called = isinstance(module, lists) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if called and inside >= LEAST:
                found.append(child)
                inside = 0
            count += inside
        return count

    left(net)
    return [*found, net]


def held_bytes(net: nn.Module) -> int:
    """The bytes of parameters and buffers that this process holds."""
    held: dict[int, int] = {}
    for values in (*net.parameters(), *net.buffers()):
        own: Tensor = values.to_local() if hasattr(values, "to_local") else values
        storage = own.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _probe(classifier: Classifier) -> Tensor:
    pre, generator = classifier.card.preprocess, torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, pre.channels, *pre.size), dtype=torch.uint8, generator=generator)


def _cannot(label: str, why: str) -> ModelError:
    return ModelError(
        f"teacher {label!r} cannot be divided among processes",
        why,
        "leave --shard-teachers or that teacher out",
    )
