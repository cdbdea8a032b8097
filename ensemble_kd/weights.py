"""Weights on disk: safetensors files with a card, and files of bare weights from elsewhere.

A file written here holds the tensors of one network and, as the only entry of its metadata, the card
as JSON: one entry, because several would be written in an order that changes between processes.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ensemble_kd import files
from ensemble_kd.classifier import Card, Classifier
from ensemble_kd.errors import EkdError, WeightsError, listing, nearest_path
from ensemble_kd.models import ModelName, build, parse

_METADATA = "ensemble_kd"
_RUN_FILES = ("student.safetensors", "model.safetensors")


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write the network's tensors and its card to one file: the same classifier gives the same bytes."""
    # Through our own writer: safetensors' save_file ignores the umask and does not flush.
    files.write_bytes(path, packed(classifier))


def packed(classifier: Classifier, for_others: bool = False) -> bytes:
    """The bytes of that file; `for_others` it says that it is of PyTorch, and has no card."""
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in classifier.net.state_dict().items()
    }
    card = json.dumps(classifier.card.to_json(), sort_keys=True, ensure_ascii=False)
    metadata = {"format": "pt"} if for_others else {_METADATA: card}
    return safetensors.torch.save(tensors, metadata=metadata)


def load_student(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Load a classifier from a run folder or from a `.safetensors` file written by this project.

    Args:
        path: the folder or file; `py:FILE.py:factory@FILE.safetensors` for a module of your own.
        device: where to put it.

    Returns:
        A `Classifier` in eval mode: raw images (B, C, H, W), uint8 or float in [0, 1], to logits.

    Raises:
        WeightsError: the file is missing, damaged, or does not belong to the network it names.
    """
    text = str(path)
    if text.startswith("py:"):
        name = parse(text)
        if name.weights is None:
            raise WeightsError(
                f"{text} names no weights", "only the code is named", f"say {text}@FILE.safetensors"
            )
        return load_classifier(Path(name.weights).expanduser(), code=name).to(device).eval()
    return load_classifier(weights_path(Path(text).expanduser())).to(device).eval()


def weights_path(path: Path) -> Path:
    """The file of weights that `path` means: itself, or the one of a run folder.

    Raises:
        WeightsError: there is nothing there, or the folder holds no weights.
    """
    if not path.exists():
        raise WeightsError(
            f"no run folder or file at {path}",
            "there is nothing at that path",
            nearest_path(path) or "check the path",
        )
    if not path.is_dir():
        return path
    for name in _RUN_FILES:
        if (path / name).is_file():
            return path / name
    raise WeightsError(
        f"{path} is a folder without {' or '.join(_RUN_FILES)}",
        "it is no finished run",
        "name a finished run folder, or a .safetensors file",
    )


def load_classifier(path: Path, code: ModelName | None = None) -> Classifier:
    """Build the network that the file's card names, and fill it; every key must fit.

    A card can name code of the user's, which is run only where the user names it too, as `code`.

    Raises:
        WeightsError: see `load_student`.
    """
    card = read_card(path)
    name = code or _safe_name(card, path)
    try:
        net = _empty(name, card)
    except EkdError:
        raise  # the user's own code
    except Exception as error:
        raise WeightsError(
            f"cannot build {card.model} as the card of {path} says",
            f"{type(error).__name__}: {error}",
            "the card is damaged, or timm or torchvision changed; fetch the file again",
        ) from error
    fill(net, read_tensors(path), path)
    return Classifier(net, card, pretrained=True).eval()


def _empty(name: ModelName, card: Card) -> nn.Module:
    """The network without memory for its weights, where nothing but weights is needed to fill it."""
    pre = card.preprocess
    facts = {"num_classes": len(card.classes), "channels": pre.channels, "size": pre.size[0]}
    if name.library != "py":
        try:
            with torch.device("meta"):
                net = build(name, **facts, form=card.form)
            if {key for key, _ in net.named_buffers()} <= net.state_dict().keys():
                return net
        except NotImplementedError:
            pass  # a few networks compute with their first weights
    return build(name, **facts, form=card.form)


def _safe_name(card: Card, path: Path) -> ModelName:
    if card.model.startswith("py:"):
        raise WeightsError(
            f"{path} belongs to a module of your own",
            "code is run only where you name it",
            f"name the code and the file together: {card.model}@{path}",
        )
    try:
        name = parse(card.model)
    except EkdError as error:
        raise _bad_card(path, card, error.problems[0].what) from error
    if name.library not in ("own", "timm", "tv"):
        raise _bad_card(path, card, "a file may name only networks that are on this machine")
    return name


def _bad_card(path: Path, card: Card, why: str) -> WeightsError:
    return WeightsError(
        f"cannot build {card.model} as the card of {path} says",
        why,
        "the card is damaged, or timm or torchvision changed; fetch the file again",
    )


def has_card(path: Path) -> bool:
    """Whether the file is a safetensors file that says which network it belongs to, or has an export do so."""
    return path.suffix == ".safetensors" and (
        _METADATA in _metadata(path) or _exported_card(path) is not None
    )


def _exported_card(path: Path) -> object:
    """The card in the config.json of an exported folder, for its file of weights."""
    try:
        return files.read_json(path.with_name("config.json"))[_METADATA]["card"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _metadata(path: Path) -> dict[str, str]:
    _check_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_card(path: Path) -> Card:
    """The card in the file's metadata.

    Raises:
        WeightsError: the file cannot be read, or has no card.
    """
    _check_file(path)
    metadata = {} if path.suffix in (".pth", ".pt", ".bin") else _metadata(path)
    exported = _exported_card(path) if _METADATA not in metadata else None
    if _METADATA not in metadata and exported is None:
        architecture = _of_the_hub(path)
        beside = {None: "", "": ", and config.json beside it names no architecture"}
        raise WeightsError(
            f"{path} does not say which network it belongs to",
            "it was not written by ensemble-kd" + beside.get(architecture, ""),
            f"name the architecture before it: {architecture or 'resnet18'}@{path}",
        )
    try:
        return Card.from_json(exported or json.loads(metadata[_METADATA]))  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _of_the_hub(path: Path) -> str | None:
    """The architecture in a config.json beside the file, as the hub has them; empty if it names none."""
    try:
        values = files.read_json(path.with_name("config.json"))
    except (OSError, ValueError):
        return None
    named = values.get("architecture") if isinstance(values, dict) else None
    return f"timm:{named}" if isinstance(named, str) and re.fullmatch(r"[\w.]+", named) else ""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.pth` or `.pt` file, on the CPU; no code in it is run.

    Raises:
        WeightsError: the file is missing, empty, cut off, or of another kind than its name says.
    """
    _check_file(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        _check_zip(path)
        return _state_dict(torch.load(path, map_location="cpu", weights_only=True), path)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a plain file of weights",
            "it holds Python objects other than tensors, which are never loaded",
            "save its state_dict() alone, best as safetensors",
        ) from error
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle or header raises whatever its bytes lead to
        raise _damaged(path, error) from error


def _check_zip(path: Path) -> None:
    """torch compresses nothing; who does may have made a file that is endless in memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist()):
                raise WeightsError(
                    f"{path} is compressed, which torch.save never does",
                    "it could take far more memory than its size says",
                    "load it where you trust it, and save its state_dict() again, best as safetensors",
                )


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError(
            f"{path} holds no state_dict", f"it holds a {type(loaded).__name__}", "save model.state_dict()"
        )
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(f"{path} is a folder", "a file of weights is wanted here", "name the file in it")
    if not path.is_file():
        fix = nearest_path(path) or "check the path"
        raise WeightsError(f"no file of weights at {path}", "there is nothing at that path", fix)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise WeightsError(f"{path} is empty", "a download or a copy was cut off", "fetch the file again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git-LFS pointer, not the weights",
            "the repository was cloned without its large files",
            "run `git lfs pull` in it",
        )
    # A safetensors file has the length of its header in 8 bytes, which may be any, then the header.
    is_pickle = head.startswith(b"PK\x03\x04") or head[:1] == b"\x80"
    if path.suffix == ".safetensors" and is_pickle and head[8:9] != b"{":
        raise WeightsError(
            f"{path} is a pickle under the name of a safetensors file",
            "pickles can run code, so it is not opened",
            "ask its author for a real safetensors file, or rename it to .pth (tensors alone are then read)",
        )


def _damaged(path: Path, error: Exception) -> WeightsError:
    if isinstance(error, WeightsError):
        return error
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path} is damaged or cut off", why, "fetch or make the file again")


def fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load `tensors` into `net`; every name and shape must agree.

    Raises:
        WeightsError: names or shapes differ; says whether it is another architecture, another number
            of classes, or a few keys.
    """
    own = net.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    if len(missing) > len(own) / 2 or len(shapes) > len(own) / 2:
        raise WeightsError(
            f"{path} is of another architecture than {type(net).__name__}",
            f"of {len(own)} tensors, {len(missing)} are missing and {len(shapes)} have another shape",
            "name the architecture that the file was made with",
        )
    if missing or extra:
        raise WeightsError(
            f"{path} does not fit {type(net).__name__}",
            f"missing: {listing(missing, 3) or 'none'}; not known: {listing(extra, 3) or 'none'}",
            "rename the keys, or name the architecture that the file was made with",
        )
    if shapes:
        key = sorted(shapes)[-1]
        raise WeightsError(
            f"{path} does not fit {type(net).__name__}",
            f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(own[key].shape)} in the network",
            "classes, channels or stem differ: use weights made for this data (or --stem imagenet)",
        )
    empty = any(tensor.is_meta for tensor in own.values())
    for key, tensor in tensors.items():  # in place, so that the versions of the modules stay known
        own[key] = tensor.to(own[key].dtype)
    net.load_state_dict(own, assign=empty)
