"""What this machine has for the toolkit, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ensemble_kd import __version__
from ensemble_kd.configuration import from_environment
from ensemble_kd.data import load_data
from ensemble_kd.data.sources import SOURCES
from ensemble_kd.device import free_memory
from ensemble_kd.errors import EkdError, Problem
from ensemble_kd.files import cache_dir, free_at, readable
from ensemble_kd.locks import lock
from ensemble_kd.schema import DistillOptions
from ensemble_kd.teachers.library import library_dir
from ensemble_kd.teachers.runner import Running
from ensemble_kd.teachers.store import targets_dir

_SHOWN = ("torch", "torchvision", "timm", "safetensors")
_FOR_DEVELOPERS = {"dev", "bench", "docs"}
_UNSAFE = "earlier ones can be made to run code by a file of weights (CVE-2025-32434, CVE-2026-24747)"
_LITTLE = 1_000_000_000
"""Bytes of disk or memory below which a warning is given."""


def doctor() -> dict[str, Any]:
    """Look at versions, devices, caches, extras and data; nothing is downloaded or kept.

    Returns:
        `usable`; `problems` that keep it from working and `warnings`, each with `what`, `why` and `fix`;
        `versions`; `devices` with `memory` and `free` bytes, `bfloat16` (native) and `cuda_graphs`; `threads`;
        `caches` with `folder`, `bytes` and `free`; `extras` with what is `missing` and the `command` that
        gets it; `data` with whether each named source is `at_hand`.
    """
    devices, caches, versions = _devices(), _caches(), _versions()
    problems = [*_wrong_versions(), *_cache_problems(), *_variables()]
    warnings = list(_shortages(devices, caches))
    return {
        "usable": not problems,
        "problems": [_plain(problem) for problem in problems],
        "warnings": [_plain(problem) for problem in warnings],
        "versions": versions,
        "devices": devices,
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "caches": caches,
        "extras": _extras(),
        "data": [{"source": name, "at_hand": _at_hand(name)} for name in SOURCES],
    }


def _plain(problem: Problem) -> dict[str, str]:
    return {"what": problem.what, "why": problem.why, "fix": problem.fix}


def _versions() -> dict[str, str | None]:
    found = {name: _installed(name) for name in _SHOWN}
    cuda = {"CUDA of torch": torch.version.cuda} if torch.version.cuda else {}
    return {"ensemble-kd": __version__, "python": platform.python_version(), **found, **cuda}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What the installed package asks for; nothing where it is run from a folder without being installed."""
    try:
        return [Requirement(text) for text in metadata.requires("ensemble-kd") or ()]
    except metadata.PackageNotFoundError:
        return []


def _unmet(requirement: Requirement, extra: str = "") -> bool:
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return False
    version = _installed(requirement.name)
    return version is None or not requirement.specifier.contains(Version(version), prereleases=True)


def _wrong_versions() -> Iterator[Problem]:
    for requirement in _requirements():
        if not _unmet(requirement):
            continue
        name, version = requirement.name, _installed(requirement.name)
        what = f"{name} {version} is too old" if version else f"{name} is not installed"
        why = _UNSAFE if name == "torch" and version else f"{requirement} is needed"
        yield Problem(what, why, f"pip install '{name}{requirement.specifier}'")


def _extras() -> list[dict[str, Any]]:
    rows = []
    requirements = _requirements()
    names = sorted({_extra_of(requirement) for requirement in requirements} - _FOR_DEVELOPERS - {""})
    for extra in names:
        own = [requirement for requirement in requirements if _extra_of(requirement) == extra]
        missing = [requirement.name for requirement in own if _unmet(requirement, extra)]
        command = f"pip install 'ensemble-kd[{extra}]'"
        rows.append({"extra": extra, "at_hand": not missing, "missing": missing, "command": command})
    return rows


def _extra_of(requirement: Requirement) -> str:
    """The extra that a requirement belongs to."""
    text = str(requirement.marker or "")
    return text.partition('extra == "')[2].partition('"')[0]


def _devices() -> list[dict[str, Any]]:
    found = [torch.device("cpu")] + [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    return [
        {
            "device": str(device),
            "name": _name_of(device),
            "memory": _memory_of(device),
            "free": free_memory(device),
            "bfloat16": Running().dtype(device) == torch.bfloat16,
            "cuda_graphs": device.type == "cuda" and _records(device),
        }
        for device in found
    ]


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _records(device: torch.device) -> bool:
    """Whether steps can be recorded as a CUDA graph, by recording one."""
    try:
        with torch.cuda.device(device):
            values, graph = torch.zeros(8, device=device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                values += 1
            graph.replay()
            return bool((values == 1).all())
    except RuntimeError:
        return False


def _caches() -> list[dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders: dict[str, Path] = {
        "teachers": library_dir(),
        "targets": targets_dir(),
        "archives": cache_dir() / "archives",
        "data": cache_dir() / "data",
        "torch's weights": Path(torch.hub.get_dir()) / "checkpoints",
        "Hugging Face": Path(HF_HUB_CACHE),
    }
    return [
        {"what": what, "folder": str(folder), "bytes": _bytes_in(folder), "free": free_at(folder)}
        for what, folder in folders.items()
    ]


def _bytes_in(folder: Path) -> int:
    """What the files below a folder take on the disk; links count for nothing."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += 512 * os.lstat(os.path.join(where, name)).st_blocks
    return total


def _cache_problems() -> Iterator[Problem]:
    """Whether files can be made and locked in the cache, tried in a folder that goes again."""
    home = cache_dir()
    probe, new = home / f".doctor-{secrets.token_hex(4)}", not home.exists()
    fix = "keep trained teachers and targets elsewhere: EKD_CACHE=PATH"
    try:
        held = lock(probe)
        again = lock(probe)
        if again is not None:
            again.close()
            why = "two processes could write to one store; network file systems may lack flock"
            yield Problem(f"files in {home} cannot be locked", why, fix)
        if held is not None:
            held.close()
    except OSError as error:
        yield Problem(f"{home} cannot be written", error.strerror or str(error), fix)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        if new:
            with suppress(OSError):
                home.rmdir()


def _variables() -> list[Problem]:
    try:
        from_environment(DistillOptions, os.environ)
    except EkdError as error:
        return list(error.problems)
    return []


def _shortages(devices: list[dict[str, Any]], caches: list[dict[str, Any]]) -> Iterator[Problem]:
    if torch.version.cuda and not torch.cuda.is_available() and Path("/proc/driver/nvidia").exists():
        why = f"torch was built for CUDA {torch.version.cuda}, and cannot use the driver"
        yield Problem(
            "there is a GPU, and torch does not find it", why, "compare nvidia-smi with https://pytorch.org"
        )
    for row in devices:
        if row["free"] is not None and row["free"] < _LITTLE:
            what = f"{row['device']} has {readable(row['free'])} of memory free"
            yield Problem(
                what, "other programs hold the rest", "end them, or train with a smaller --batch-size"
            )
    if (free := caches[0]["free"]) < _LITTLE:
        what = f"the disk of {cache_dir()} has {readable(free)} free"
        yield Problem(
            what,
            "teachers and targets are kept there",
            "ekd targets prune --older-than 30, or EKD_CACHE=PATH",
        )


def _at_hand(source: str) -> bool:
    try:
        load_data(source, offline=True)
    except EkdError:
        return False
    return True


def described(facts: dict[str, Any]) -> str:
    """What `doctor` found, for people."""
    lines = ["versions"]
    lines += [f"  {name:<16} {version or 'missing'}" for name, version in facts["versions"].items()]
    lines += ["devices", *(f"  {_device_line(row)}" for row in facts["devices"])]
    threads = facts["threads"]
    lines.append(f"  {threads['torch']} thread(s) on {threads['cpus']} CPU(s)")
    lines.append("caches")
    lines += [f"  {row['what']:<16} {readable(row['bytes']):>9}  {row['folder']}" for row in facts["caches"]]
    lines.append(f"  {readable(facts['caches'][0]['free'])} free on the disk of the first")
    lines.append("extras")
    lines += [
        f"  {row['extra']:<16} {'at hand' if row['at_hand'] else 'missing: ' + row['command']}"
        for row in facts["extras"]
    ]
    if not facts["extras"]:
        lines.append("  not known: it runs from a folder, and is not installed (pip install .)")
    lines.append("data")
    lines += [
        f"  {row['source']:<16} {'at hand' if row['at_hand'] else 'downloaded when it is used first, or --data-root'}"
        for row in facts["data"]
    ]
    for kind, rows in (("error", facts["problems"]), ("warning", facts["warnings"])):
        lines += [f"{kind}: {Problem(**row)}" for row in rows]
    return "\n".join(
        [*lines, "", "nothing is in the way" if facts["usable"] else "it cannot be used like this"]
    )


def _device_line(row: dict[str, Any]) -> str:
    memory = ", ".join(
        f"{readable(row[key])} {label}" for key, label in (("memory", "memory"), ("free", "free")) if row[key]
    )
    kinds = ["bfloat16 native" if row["bfloat16"] else "no native bfloat16"]
    kinds += ["steps as CUDA graphs"] if row["cuda_graphs"] else []
    return f"{row['device']:<16} {row['name']}; {memory}; {', '.join(kinds)}"
