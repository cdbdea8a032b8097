"""A plan as plain values and as a text: the networks of a run, seconds, disk and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensemble_kd.console import lasting
from ensemble_kd.files import readable
from ensemble_kd.tables import text_table

FACTOR = 3
"""Within which of the truth the seconds of training and storing are meant to be."""
METHOD = (
    "Seconds are steps and passes times the mean of some that were taken now, on labels, without the start, tables "
    f"and pictures: right within a factor of {FACTOR} where the machine is as busy later. Memory is the most that "
    "this dry run held, which loaded the same images and networks, and the targets that are held beside them."
)


@dataclass(frozen=True)
class Network:
    """A network of a run."""

    network: str
    model: str
    parameters: int
    state: str
    """`to train`, `at hand` for a teacher, or `finished` before the run was stopped."""
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    bytes: int = 0
    """Of its file."""

    @property
    def new_bytes(self) -> int:
        """Of its file, where it is not there yet."""
        return self.bytes if self.state == "to train" else 0

    @property
    def passing_bytes(self) -> int:
        """Two checkpoints while it is trained, each with two moments at most; they go afterwards."""
        return 6 * self.new_bytes


@dataclass(frozen=True)
class Targets:
    """What is stored of teachers."""

    views: int = 0
    images: int = 0
    bytes: int = 0
    missing_bytes: int = 0
    seconds: float = 0.0
    held_bytes: int = 0
    """In memory, while students train."""

    def __add__(self, other: Targets) -> Targets:
        return Targets(
            self.views,
            self.images,
            self.bytes + other.bytes,
            self.missing_bytes + other.missing_bytes,
            self.seconds + other.seconds,
            max(self.held_bytes, other.held_bytes),
        )


@dataclass(frozen=True)
class Plan:
    """What a verb would do: `facts` as plain values."""

    facts: dict[str, Any]

    def table(self) -> str:
        """The plan for people."""
        facts = self.facts
        rows = [
            [
                row["network"],
                row["model"],
                f"{row['parameters']:,}",
                row["state"],
                f"{row['epochs']:,}" if row["epochs"] else "–",
                f"{row['steps']:,}" if row["steps"] else "–",
                lasting(row["seconds"]) if row["seconds"] else "–",
            ]
            for row in facts["networks"]
        ]
        headers = ["network", "model", "parameters", "", "epochs", "steps", "takes about"]
        counts = ", ".join(f"{count:,} {split}" for split, count in facts["images"].items())
        title = f"{facts['data']}, {counts} images, on {facts['device']}"
        lines = [text_table(headers, rows, title), "", *_views(facts), *_room(facts)]
        seconds = facts["seconds"]
        parts = ", ".join(
            f"{part} {lasting(value)}" for part, value in seconds.items() if part != "all" and value
        )
        lines.append(f"time: about {lasting(seconds['all'])}{f' ({parts})' if parts else ''}")
        measured = "from some steps taken now, within a factor of"
        return "\n".join(
            [*lines, f"{measured} {FACTOR} where the machine is as busy later; nothing was written"]
        )


def _views(facts: dict[str, Any]) -> list[str]:
    targets = facts.get("targets")
    if targets is None:
        return []
    policy = facts["policy"] + ("" if facts["mix"] == "none" else f" with {facts['mix']}")
    if not targets["views"]:
        return [f"views: fresh ones by {policy}; teachers run live"]
    missing = targets["missing_bytes"]
    there = f"{readable(missing)} of them to make" if missing else "all there"
    return [f"views: {targets['views']} by {policy}; targets: {readable(targets['bytes'])}, {there}"]


def _room(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"disk: {readable(row['needed'])} needed for {row['what']} in {row['folder']}, {readable(row['free'])} free"
        for row in facts["disk"]
    ]
    memory = facts["memory"]
    free = "" if memory["free"] is None else f", {readable(memory['free'])} free"
    lines.append(f"memory: {readable(memory['needed'])} needed{free}")
    return lines if facts["enough"] else [*lines, "warning: that is not enough"]


def rows_of(networks: Sequence[Network]) -> list[dict[str, Any]]:
    """The networks as plain values."""
    return [asdict(network) for network in networks]


def seconds_of(
    teachers: Sequence[Network], targets: float, networks: Sequence[Network], test: float
) -> dict[str, float]:
    """Seconds by part, and of all."""
    parts = {
        "teachers": sum(row.seconds for row in teachers),
        "targets": targets,
        "training": sum(row.seconds for row in networks),
        "test": test,
    }
    return {**parts, "all": sum(parts.values())}


def most(networks: Sequence[Network]) -> int:
    """What passes of the networks at a time: checkpoints of the largest."""
    return max((row.passing_bytes for row in networks), default=0)
