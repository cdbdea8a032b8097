"""Whether timm can build a classifier's network, and what its config.json must say to have it do so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ensemble_kd.classifier import Card
from ensemble_kd.errors import ModelError
from ensemble_kd.forms import to_small_form
from ensemble_kd.models import ModelName, parse

_KEPT = ("classifier", "first_conv", "fixed_input_size")
"""What timm must know of an architecture to load weights into it, whatever they were trained on."""


def timm_entry(card: Card) -> dict[str, Any]:
    """`architecture`, `model_args` and `pretrained_cfg` (without preprocessing) for timm's config.json.

    Raises:
        ModelError: timm does not register this network, or only in another form.
    """
    if card.model.startswith("py:"):
        raise _refused(card.model, "it is code of your own, which timm does not register")
    name = parse(card.model)
    if name.library == "own":
        from ensemble_kd.timm_students import timm_name

        return {
            "architecture": timm_name(name.arch),
            "model_args": {},
            "pretrained_cfg": {"fixed_input_size": True},
        }
    if name.library != "timm":
        raise _refused(card.model, "it is torchvision's own network, which timm does not register")
    return _registered(name, card)


def _registered(name: ModelName, card: Card) -> dict[str, Any]:
    import timm

    arch, pre = name.arch.partition(".")[0], card.preprocess
    arguments: dict[str, Any] = {"in_chans": pre.channels, "img_size": pre.size[0]}
    try:
        net = _empty(arch, num_classes=len(card.classes), **arguments)
    except TypeError:  # most convolutional networks take no img_size
        arguments.pop("img_size")
        net = _empty(arch, num_classes=len(card.classes), **arguments)
    if card.form == "small" and to_small_form(net, len(card.classes)):
        raise _refused(
            f"{arch} in its small-image form",
            "timm registers the stock form alone, and would build another network",
            "; or train it in that form: --stem imagenet",
        )
    config = timm.get_pretrained_cfg(arch)
    known = config.to_dict(remove_source=True, remove_null=True) if config else {}
    kept = {key: known[key] for key in _KEPT if key in known}
    return {"architecture": arch, "model_args": arguments, "pretrained_cfg": kept}


def _empty(arch: str, **arguments: Any) -> nn.Module:
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(arch, **arguments)
    except NotImplementedError:  # a few networks compute with their first weights
        return timm.create_model(arch, **arguments)


def _refused(what: str, why: str, more: str = "") -> ModelError:
    return ModelError(f"timm cannot load {what}", why, f"say --format safetensors, onnx or torch{more}")
