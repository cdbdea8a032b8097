"""Networks by name: the project's own, timm's, torchvision's, the hub's, and the user's."""

from __future__ import annotations

import fnmatch
import importlib.util
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_kd.errors import ModelError, listing, nearest, nearest_path, shortened
from ensemble_kd.forms import to_small_form
from ensemble_kd.names import LIBRARIES, label_of, split_seed, split_weights
from ensemble_kd.students import STUDENTS, own_size

SMALL_IMAGE = 64
"""Up to this side in pixels, networks trained here take their small-image form."""

_LADDER = (
    8,
    12,
    16,
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    299,
    384,
    448,
    512,
)


@dataclass(frozen=True)
class ModelName:
    """A parsed name: `LIBRARY:ARCH@WEIGHTS#SEED`.

    `library` is `own`, `timm`, `tv`, `hf-hub`, `py` or `file`; `weights` is a tag, a path or None.
    """

    text: str
    library: str
    arch: str
    weights: str | None = None
    seed: int | None = None
    note: str = ""
    """What the user should know of how the name was read."""

    @property
    def canonical(self) -> str:
        """The name without weights and seed, with its library."""
        return self.arch if self.library in ("own", "file") else f"{self.library}:{self.arch}"

    @property
    def label(self) -> str:
        """A short name for tables and for options such as --temperature LABEL=2."""
        return label_of(self.text)


def parse(text: str) -> ModelName:
    """Read a model's name.

    A bare name is looked for among the project's own networks, then in timm, then in torchvision.

    Raises:
        ModelError: there is no such model; the nearest name is suggested.
    """
    body, _, digits = split_seed(text)
    seed = int(digits) if digits else None
    arch, weights = split_weights(body)
    library, colon, rest = arch.partition(":")
    if colon and library in LIBRARIES:
        name = ModelName(text, library, rest, weights or None, seed)
        _check_known(name)
        return name
    known = arch in STUDENTS or _in_a_library(arch)
    if not known and (arch.endswith(".safetensors") or Path(body).expanduser().is_dir()):
        return ModelName(text, "file", body, None, seed)
    return replace(_bare(arch), text=text, weights=weights or None, seed=seed)


def _in_a_library(arch: str) -> bool:
    import timm

    return "/" not in arch and (timm.is_model(arch) or arch in tv_names())


def check_tag(arch: str) -> None:
    """Refuse `ARCH.TAG` where timm knows no such tag.

    Raises:
        ModelError: lists the tags that it knows.
    """
    import timm

    base, dot, tag = arch.partition(".")
    known = [name.partition(".")[2] for name in timm.list_pretrained(base)]
    if dot and tag not in known:
        raise ModelError(
            f"timm has no weights {tag!r} for {base!r}",
            f"it has {listing(known)}" if known else "it has none",
            nearest(tag, known) or "name one of these",
        )


def _bare(arch: str) -> ModelName:
    if arch in STUDENTS:
        return ModelName(arch, "own", arch)
    import timm

    in_timm, in_tv = timm.is_model(arch), arch in tv_names()
    if in_timm:
        check_tag(arch)
        note = f"{arch} is in timm and in torchvision: timm's is taken (tv:{arch} names the other)"
        return ModelName(arch, "timm", arch, note=note if in_tv else "")
    if in_tv:
        return ModelName(arch, "tv", arch)
    if "/" in arch or arch.endswith((".pth", ".pt")):
        raise ModelError(
            f"no model at {arch!r}",
            "it is neither a run folder nor a .safetensors file, and no model has that name",
            nearest_path(Path(arch))
            or "name the architecture before a file of bare weights: resnet18@weights.pth",
        )
    known = [*STUDENTS, *timm.list_models(), *tv_names()]
    hint = nearest(arch, known)
    raise ModelError(
        f"no model is called {arch!r}",
        "neither this project, timm nor torchvision has it",
        hint or "list them: ekd models '*PART*'",
    )


def _check_known(name: ModelName) -> None:
    known: list[str] = []
    if name.library == "timm":
        import timm

        if timm.is_model(name.arch):
            check_tag(name.arch)
            return
        known = timm.list_models()
    elif name.library == "tv":
        known = tv_names()
        if name.arch in known:
            return
    else:
        return
    hint = nearest(name.arch, known)
    raise ModelError(
        f"{name.library} has no model called {name.arch!r}",
        f"it has {len(known)} models",
        hint or f"list them: ekd models '{name.library}:*PART*'",
    )


def tv_names() -> list[str]:
    """torchvision's image classifiers."""
    from torchvision import models

    return models.list_models(module=models)


def find(pattern: str) -> list[ModelName]:
    """All known models whose name matches a shell pattern, or contains it where it has no wildcard."""
    import timm

    library, _, part = pattern.rpartition(":")
    glob = part if any(c in part for c in "*?[") else f"*{part}*"
    # The project's own are registered with timm too, for exports.
    groups = {"own": list(STUDENTS), "timm": timm.list_models(exclude_filters="ekd_*"), "tv": tv_names()}
    return [
        ModelName(name, group, name)
        for group, names in groups.items()
        if library in ("", group)
        for name in fnmatch.filter(names, glob)
    ]


def build(name: ModelName, *, num_classes: int, channels: int, size: int, form: str = "stock") -> nn.Module:
    """A network with fresh weights, in `form` `small` or `stock`; `channels` may be ignored by torchvision.

    Raises:
        ModelError: the factory fails, or does not return an nn.Module.
    """
    if name.library == "own":
        return STUDENTS[name.arch](num_classes, channels, size)
    if name.library == "py":
        return _user_module(name.arch, num_classes, channels, size)
    if name.library == "tv":
        net = _build_tv(name.arch, num_classes, size)
    else:
        net = _build_timm(name, num_classes, channels, size, pretrained=False)
    if form == "small":
        to_small_form(net, num_classes)
    return net


def _build_timm(name: ModelName, num_classes: int, channels: int, size: int, pretrained: bool) -> nn.Module:
    import timm

    arch = name.arch if name.library == "timm" else f"{name.library}:{name.arch}"
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": channels}
    try:
        return timm.create_model(arch, img_size=size, **options)
    except TypeError:  # most convolutional networks take no img_size
        return timm.create_model(arch, **options)


def _build_tv(arch: str, num_classes: int, size: int, weights: str | None = None) -> nn.Module:
    from torchvision import models

    options = {"image_size": size} if arch.startswith("vit_") and weights is None else {}
    if arch in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True} if weights is None else {}
    return models.get_model(arch, weights=weights, num_classes=num_classes, **options)


def _user_module(where: str, num_classes: int, channels: int, size: int) -> nn.Module:
    factory = user_object(where)
    offered = {"num_classes": num_classes, "channels": channels, "in_chans": channels, "size": size}
    try:
        parameters = inspect.signature(factory).parameters
        net = factory(**{key: value for key, value in offered.items() if key in parameters})
    except Exception as error:
        raise ModelError(
            f"py:{where} failed: {type(error).__name__}: {error}",
            "the factory is called with those of num_classes, channels, in_chans, size that it names",
            "call it in a Python session to see the whole traceback",
        ) from error
    if not isinstance(net, nn.Module):
        raise ModelError(
            f"py:{where} returned {type(net).__name__}",
            "a factory returns an nn.Module that maps (B, channels, H, W) to logits",
            "return the module",
        )
    return net


def user_object(where: str) -> Any:
    """The object NAME of the user's file, from `FILE.py:NAME`.

    Raises:
        ModelError: the file or the name is missing, or the file cannot be run.
    """
    file, _, attribute = where.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ModelError(
            f"py:{where} names no Python file",
            f"{file!r} does not end in .py"
            if path.is_file()
            else f"there is no file {file!r}"
            if file
            else "the name of a function should stand behind the file",
            "write py:path/to/file.py:factory",
        )
    spec = importlib.util.spec_from_file_location(f"ekd_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(
            f"{path} cannot be run: {type(error).__name__}: {error}",
            "a model named by py: is Python code of yours",
            "mend the file",
        ) from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ModelError(
            f"{path} has no {attribute!r}",
            f"it has {listing(names)}",
            nearest(attribute, names) or "name one of these",
        )
    return getattr(module, attribute)


def refusal(name: ModelName, *, num_classes: int, channels: int, size: int, form: str = "stock") -> str:
    """Why the network does not take square images of side `size`, or nothing: by a dry forward without memory."""
    for device in ("meta", "cpu"):
        if name.library == "py" and device == "meta":
            continue  # a user's code need not run without data
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
                net = build(name, num_classes=num_classes, channels=channels, size=size, form=form).eval()
                # torchvision's networks take three channels, whatever is asked for.
                took = 3 if name.library == "tv" else channels
                return _no_logits(net(torch.zeros(2, took, size, size)), num_classes)
        except NotImplementedError:
            continue  # an operation without a meta form: run it for real
        except ModelError:
            raise  # the user's own code cannot be built at all
        except Exception as error:  # networks refuse sizes in many ways
            return " ".join(f"{type(error).__name__}: {error}".split())
    return "it cannot be run"


def _no_logits(found: object, num_classes: int) -> str:
    """Why what a network gave for two images is not one logit a class, or nothing."""
    if not isinstance(found, Tensor):
        return f"it gave {type(found).__name__} and no tensor"
    if tuple(found.shape) != (2, num_classes):
        return f"it gave {tuple(found.shape)} for two images, which should be (2, {num_classes}): logits of {num_classes} classes"
    return ""


def smallest_input(name: ModelName, *, num_classes: int, channels: int, form: str, at_least: int = 8) -> int:
    """The smallest side, of a ladder from 8 to 512 pixels and not under `at_least`, that the network takes.

    Raises:
        ModelError: it takes none of them.
    """
    first = ""
    for size in sorted({at_least, *(step for step in _LADDER if step > at_least)}):
        why = refusal(name, num_classes=num_classes, channels=channels, size=size, form=form)
        if not why:
            return size
        first = first or why
    raise ModelError(
        f"{name.label!r} took no square image from {at_least} to {_LADDER[-1]} pixels",
        f"at {at_least} pixels: {shortened(first)}",
        "mend its code" if name.library == "py" else "choose another model: `ekd models` lists them",
    )


def choose_form(name: ModelName, image_size: int, stem: str = "auto") -> str:
    """`small` for timm and torchvision networks on images up to 64 pixels, unless `stem` is `imagenet`."""
    small = stem == "auto" and image_size <= SMALL_IMAGE and name.library in ("timm", "tv")
    return "small" if small else "stock"


def choose_size(
    name: ModelName, *, num_classes: int, channels: int, image_size: int, form: str, wanted: int | None = None
) -> int:
    """The side of the images that the network will be given.

    What is `wanted`, if it can take it; else the images' own size where it can take that, or the
    smallest size above it; stock timm and torchvision networks get their library's size.

    Raises:
        ModelError: the wanted size is too small.
    """
    facts = {"num_classes": num_classes, "channels": channels, "form": form}
    if wanted is None:
        if name.library == "own":
            return own_size(image_size)
        if form == "stock" and name.library in ("timm", "tv") and image_size > SMALL_IMAGE:
            return library_size(name)
        return smallest_input(name, at_least=image_size, **facts)  # type: ignore[arg-type]
    if not refusal(name, size=wanted, **facts):  # type: ignore[arg-type]
        return wanted
    smallest = smallest_input(name, at_least=8, **facts)  # type: ignore[arg-type]
    raise ModelError(
        f"{name.label!r} cannot take {wanted}×{wanted} images",
        f"it needs at least {smallest}×{smallest}"
        if smallest > wanted
        else "a dry forward at that size failed",
        f"say --teacher-size {name.label}={smallest} (--student-size {smallest}; --size {smallest} of `ekd train`), "
        "or leave the size out and the images are resized",
    )


def library_size(name: ModelName) -> int:
    """The input size that timm or torchvision gives for the network."""
    if name.library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name.arch)
        return int(config.input_size[-1]) if config else 224
    return 299 if name.arch == "inception_v3" else 224


def published_count(name: ModelName) -> int | None:
    """The number of parameters that torchvision publishes for its weights."""
    if name.library != "tv":
        return None
    from torchvision import models

    return next((int(w.meta["num_params"]) for w in models.get_model_weights(name.arch)), None)
