"""Published weights through timm's and torchvision's own loaders, with a head for the classes at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemble_kd.classifier import fit_channels
from ensemble_kd.errors import ModelError, WeightsError, listing, nearest
from ensemble_kd.imagenet import class_names
from ensemble_kd.models import ModelName, check_tag
from ensemble_kd.weights import read_tensors


@dataclass(frozen=True)
class Pretrained:
    """A network with published weights and a fresh head, and the input it was trained on."""

    net: nn.Module
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    outputs: int
    classes: tuple[str, ...] | None = None
    """The names of its outputs, where it keeps its own head and they are known."""


def is_wanted(name: ModelName) -> bool:
    """Whether the name asks for published weights: by a tag, or by being on the hub."""
    return (
        name.library == "hf-hub" or name.weights is not None or (name.library == "timm" and "." in name.arch)
    )


def at_hand(name: ModelName) -> str:
    """`cached`, `download` (published, not on this machine) or `none`."""
    if name.library == "timm":
        import timm
        from huggingface_hub import try_to_load_from_cache

        config = timm.get_pretrained_cfg(_timm_arch(name))
        if config is None or not config.has_weights:
            return "none"
        for file in ("model.safetensors", "pytorch_model.bin"):
            if config.hf_hub_id and isinstance(try_to_load_from_cache(config.hf_hub_id, file), str):
                return "cached"
        return "cached" if _in_torch_hub(str(config.url or "")) else "download"
    if name.library == "tv":
        weights = _tv_weights(name)
        if weights is None:
            return "none"
        return "cached" if _in_torch_hub(weights.url) else "download"
    return "download" if name.library == "hf-hub" else "none"


def check(name: ModelName, offline: bool) -> None:
    """Refuse published weights that do not exist, or that `offline` forbids to fetch.

    Raises:
        ModelError: says which.
    """
    state = at_hand(name)
    if state == "none":
        own = name.library in ("own", "py", "file")
        raise ModelError(
            f"{name.label!r} has no published weights",
            "this project publishes none" if own else f"{name.library} names none for it",
            "leave the weights out, and it is trained from scratch",
        )
    if offline and state != "cached":
        raise ModelError(
            f"the weights of {name.label!r} are not on this machine",
            "--offline forbids to download them",
            "run once without --offline, or leave the weights out and it is trained from scratch",
        )


def published_classes(name: ModelName) -> tuple[str, ...] | None:
    """The class names of the published network, as far as they can be told without fetching it."""
    if name.library == "timm":
        import timm

        config = timm.get_pretrained_cfg(_timm_arch(name))
        return class_names(config.num_classes) if config else None
    weights = _tv_weights(name) if name.library == "tv" else None
    return class_names(len(weights.meta["categories"])) if weights else None


def load(
    name: ModelName, num_classes: int | None, channels: int, size: int | None, offline: bool
) -> Pretrained:
    """Fetch the weights and put a fresh head on them; the head must be trained before use.

    With `num_classes` None the network keeps the head and the classes that it was published with.

    Raises:
        ModelError: there are none, they cannot be had, or `offline` forbids to fetch them.
    """
    check(name, offline)
    try:
        if name.library == "tv":
            return _load_tv(name, num_classes, size)
        return _load_timm(name, num_classes, channels, size)
    except ModelError:
        raise
    except Exception as error:  # the loaders raise whatever their network libraries raise
        raise _not_fetched(name, error) from error


def _not_fetched(name: ModelName, error: Exception) -> ModelError:
    if name.library == "hf-hub" and isinstance(error, KeyError) and error.args == ("architecture",):
        return ModelError(
            f"{name.canonical} names no architecture",
            "its config.json has no `architecture`, so nothing says which network its weights belong to",
            "fetch its file of weights, and name the architecture before it: resnet18@FILE.safetensors",
        )
    return ModelError(
        f"the weights of {name.label!r} could not be fetched",
        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
        "check the network, or leave the weights out and it is trained from scratch",
    )


def _load_timm(name: ModelName, num_classes: int | None, channels: int, size: int | None) -> Pretrained:
    import timm

    arch = _timm_arch(name) if name.library == "timm" else f"hf-hub:{name.arch}"
    options: dict[str, Any] = {"in_chans": channels, "pretrained": True}
    options |= {} if num_classes is None else {"num_classes": num_classes}
    config = timm.get_pretrained_cfg(arch) if name.library == "timm" else None
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size
    net = timm.create_model(arch, **options)
    facts = timm.data.resolve_model_data_config(net)
    mean, std = (fit_channels(facts[key], channels) for key in ("mean", "std"))
    named = dict(net.pretrained_cfg).get("label_names") or class_names(net.num_classes)  # type: ignore[arg-type]
    classes = tuple(named) if num_classes is None and named else None
    side, outputs = size or int(facts["input_size"][-1]), int(net.num_classes)  # type: ignore[arg-type]
    return Pretrained(net, side, channels, mean, std, arch, outputs, classes)


def _timm_arch(name: ModelName) -> str:
    """timm's name for the network with its tag, which must be a known one."""
    import timm

    arch = f"{name.arch}.{name.weights}" if name.weights else name.arch
    if timm.list_pretrained(name.arch.partition(".")[0]):
        check_tag(arch)
        return arch
    return name.arch


def _load_tv(name: ModelName, num_classes: int | None, wanted: int | None) -> Pretrained:
    weights = _tv_weights(name)
    assert weights is not None
    net = _fill_tv(name.arch, weights)
    classes = None
    if num_classes is None:
        classes = class_names(len(weights.meta["categories"]))
    else:
        _replace_head(net, num_classes)
    facts = weights.transforms()
    size = facts.crop_size[0] if isinstance(facts.crop_size, (list, tuple)) else facts.crop_size
    origin = f"tv:{name.arch}@{weights.name}"
    outputs = num_classes or len(weights.meta["categories"])
    return Pretrained(
        net, wanted or int(size), 3, tuple(facts.mean), tuple(facts.std), origin, outputs, classes
    )


def _fill_tv(arch: str, weights: Any) -> nn.Module:
    """The network with its weights; torchvision's own loader would open any pickle in the cache."""
    from torchvision import models

    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(weights.url, str(path), digest, progress=False)
    options: dict[str, Any] = {"transform_input": True} if arch in ("googlenet", "inception_v3") else {}
    options |= {"init_weights": False} if options else {}
    net = models.get_model(arch, num_classes=len(weights.meta["categories"]), **options)
    try:
        net.load_state_dict(read_tensors(path))
    except WeightsError as error:
        raise ModelError(
            error.problems[0].what, error.problems[0].why, f"delete {path}, and it is fetched again"
        ) from error
    if hasattr(net, "aux_logits"):
        net.aux_logits = False
        for part in ("AuxLogits", "aux1", "aux2"):
            if hasattr(net, part):
                setattr(net, part, None)
    return net


def _tv_weights(name: ModelName) -> Any:
    from torchvision import models

    known = models.get_model_weights(name.arch)
    tag = name.weights or "DEFAULT"
    if tag != "DEFAULT" and tag not in known.__members__:
        raise ModelError(
            f"torchvision has no weights {tag!r} for {name.arch!r}",
            f"it has {listing(known.__members__)}",
            nearest(tag, known.__members__) or "name one of these",
        )
    return known[tag] if len(known) else None


def _replace_head(net: nn.Module, num_classes: int) -> None:
    """Put a fresh last layer (linear, or squeezenet's 1×1 convolution) into a torchvision network."""
    for path, module in reversed(list(net.named_modules())):
        if isinstance(module, nn.Linear):
            fresh: nn.Module = nn.Linear(module.in_features, num_classes)
        elif isinstance(module, nn.Conv2d):
            fresh = nn.Conv2d(module.in_channels, num_classes, module.kernel_size)  # type: ignore[arg-type]
        else:
            continue
        parent, _, attribute = path.rpartition(".")
        setattr(net.get_submodule(parent), attribute, fresh)
        return


def _in_torch_hub(url: str) -> bool:
    name = url.rpartition("/")[2]
    return bool(name) and (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()
