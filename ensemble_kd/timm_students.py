"""The project's own networks as models of timm: `ekd_lenet`, `ekd_cifar_quick`, `ekd_resnet8`, `ekd_resnet20`.

Registered by `import ensemble_kd`, so that timm loads exported folders of them. `build_model_with_cfg` fills
them; an entry point of another kind would ignore `pretrained` and give random weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from ensemble_kd.students import STUDENTS

PREFIX = "ekd_"
_INPUT = {"input_size": (1, 28, 28), "num_classes": 10, "fixed_input_size": True}


def timm_name(student: str) -> str:
    """The name that timm knows one of `STUDENTS` by."""
    return PREFIX + student.replace("-", "_")


default_cfgs = generate_default_cfgs({timm_name(student): dict(_INPUT) for student in STUDENTS})


def _student(name: str, num_classes: int, in_chans: int, img_size: int | tuple[int, int]) -> nn.Module:
    size = img_size if isinstance(img_size, int) else img_size[0]
    net: Any = STUDENTS[name](num_classes, in_chans, size)
    net.num_classes = num_classes
    return net


def _built(student: str, pretrained: bool, **options: Any) -> nn.Module:
    make = partial(_student, student)
    return build_model_with_cfg(
        make, timm_name(student), pretrained, kwargs_filter=("global_pool",), **options
    )


@register_model
def ekd_lenet(pretrained: bool = False, **options: Any) -> nn.Module:
    """`students.LeNet`."""
    return _built("lenet", pretrained, **options)


@register_model
def ekd_cifar_quick(pretrained: bool = False, **options: Any) -> nn.Module:
    """`students.CifarQuick`."""
    return _built("cifar-quick", pretrained, **options)


@register_model
def ekd_resnet8(pretrained: bool = False, **options: Any) -> nn.Module:
    """`students.resnet8`."""
    return _built("resnet8", pretrained, **options)


@register_model
def ekd_resnet20(pretrained: bool = False, **options: Any) -> nn.Module:
    """`students.resnet20`."""
    return _built("resnet20", pretrained, **options)
