"""The last section of the report: how everything in it was made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from ensemble_kd.analysis.page import Child, details, number, table, tag

Numbers = Mapping[str, Any]
_ANALYSES = ("agreement", "calibration", "features", "surface")


def how_it_was_made(numbers: Numbers) -> list[Child]:
    """Of each run commands, data, seeds, teachers with hashes, versions, seconds and the whole configuration."""
    runs = numbers["runs"]
    body: list[Child] = [tag("p", "This report: ", tag("code", numbers["command"]))]
    if len(runs) > 1:
        body.append(_unlike(runs))
    for run in runs:
        if len(runs) > 1:
            body.append(tag("h3", run["name"]))
        body += [_facts(run), _teachers(run), *_versions(run), _seconds(run), _settings(run)]
        config = yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True, width=100)
        body.append(details("config.yaml", tag("pre", config)))
    return body


def _unlike(runs: list[Numbers]) -> Child:
    """The options in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    rows = [
        [key, *(_text(run["config"].get(key)) for run in runs)]
        for key in keys
        if len({_text(run["config"].get(key)) for run in runs}) > 1
    ]
    headers = ["option", *(run["name"] for run in runs)]
    return table(headers, rows, "Options in which the runs differ", words=range(1, len(headers)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(run: Numbers) -> Child:
    manifest, config = run["manifest"], run["config"]
    data = manifest["data"]
    counts = ", ".join(f"{count:,} {split}" for split, count in data["images"].items())
    facts = {
        "folder": run["folder"],
        "command": shlex.join(map(str, manifest["argv"])),
        "finished": manifest["created"],
        "data": f"{data['name']}: {counts} images; fingerprint {data['fingerprint']}",
        "seeds": f"run {config['seed']}, split {config['split_seed']}, teachers {config['teacher_seed']}",
        "device": f"{manifest['device']}; threads {manifest['threads']}, CPUs {manifest['cpu_count']}",
    }
    rows = [[name, fact] for name, fact in facts.items()]
    return table(["", run["name"]], rows, "The run", words=[1])


def _teachers(run: Numbers) -> Child:
    rows = [
        [
            teacher["label"],
            teacher["origin"],
            teacher["after"],
            _recipe(teacher["recipe"]),
            _recipe(teacher["preprocess"]),
        ]
        for teacher in run["manifest"]["teachers"]
    ]
    headers = ["teacher", "weights from", "SHA-256 of its tensors", "trained by", "sees"]
    caption = "Teachers; their tensors are the same after the run as before it"
    return table(headers, rows, caption, words=[1, 2, 3, 4])


def _recipe(values: Mapping[str, Any] | None) -> str:
    given = {name: value for name, value in (values or {}).items() if value is not None}
    return ", ".join(f"{name} {_text(value)}" for name, value in given.items()) or "not trained here"


def _versions(run: Numbers) -> list[Child]:
    manifest = run["manifest"]
    found = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    networks = [[name, row["file"], row["sha256"]] for name, row in manifest["networks"].items()]
    return [
        tag("p", f"Python {manifest['python']}, {found}."),
        details(
            "Hashes of the trained networks",
            table(["network", "file", "SHA-256"], networks, "Networks of the run", words=[1, 2]),
        ),
    ]


def _seconds(run: Numbers) -> Child:
    rows = [[part, number(value, f"{value:.1f}")] for part, value in run["metrics"]["seconds"].items()]
    return details("Seconds by part", table(["part", "seconds"], rows, "Where the time of the run went"))


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """The flags that give these settings, whatever the defaults are."""
    flags = ["--quick"] if settings["quick"] else []
    if settings.get("corruptions") is False:
        flags.append("--no-corruptions")
    for name in ("images", "triplets", "points", "pool", "neighbours", "bins", "seed"):
        flags += [f"--{name}", str(settings[name])] if name in settings else []
    for pattern in settings.get("layers", []):
        flags += ["--layers", pattern]
    return flags


def _settings(run: Numbers) -> Child:
    """What each analysis was made with, as a command that makes it again."""
    rows = []
    for name in _ANALYSES:
        if "left_out" in run[name]:
            continue
        settings = run[name]["settings"]
        command = ["ekd", f"analyze-{name}", run["folder"], *_flags(settings)]
        rows.append([name, shlex.join(command), _recipe(settings)])
    return table(["analysis", "command", "settings"], rows, "The analyses", words=[1, 2])
