"""Tables as plain text: the same on a terminal, in a file and from Python."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ensemble_kd.errors import printable
from ensemble_kd.results import verdict

_COLUMNS = {
    "accuracy": "accuracy",
    "top5": "top-5",
    "nll": "NLL",
    "ece": "ECE",
    "teacher_student_cross_entropy": "t–s CE",
    "teacher_student_kl": "t–s KL",
    "agreement": "agreement",
}
_SHARES = ("accuracy", "top5", "agreement")


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Left-aligned first column, right-aligned others, as wide as it needs to be."""
    table = Table(
        title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for number, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=1000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n")


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _plain(cell: str) -> Text:
    """Text, so that a name is never read as markup, and on one line whatever is in it."""
    return Text(printable(cell))


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The table of a run (see `results.compare`), its sizes and its verdict."""
    models: Mapping[str, Mapping[str, Any]] = metrics["models"]
    measured = [name for name in _COLUMNS if any(name in row for row in models.values())]
    weights = _weights(metrics.get("combination"))
    headers = [
        "",
        *(_COLUMNS[name] for name in measured),
        *(["weight"] if weights else []),
        "parameters",
        "MB",
    ]
    rows = [
        [
            name if row["role"] in ("student", "ensemble") else f"{row['role']} {name}",
            *(_cell(name, row.get(name)) for name in measured),
            *([weights.get(name, "")] if weights else []),
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.2f}",
        ]
        for name, row in models.items()
    ]
    title = f"{metrics['data']}, {metrics['split']} split, {metrics['n']:,} images"
    parts = [text_table(headers, rows, title)]
    if "times_smaller" in metrics:
        times = metrics["times_smaller"]
        sizes = f"{_ratio(times)} times smaller" if times >= 1 else f"{_ratio(1 / times)} times larger"
        parts.append(f"The student is {sizes} than the teachers together.")
        parts.append(verdict(metrics["differences"]))
    parts += _training_lines(metrics.get("training", {}))
    if "combination" in metrics:
        parts += combination_lines(metrics["combination"])
    return "\n".join(parts)


def _weights(combination: Mapping[str, Any] | None) -> dict[str, str]:
    """The teachers' weights, as they are shown; none where they are simply equal."""
    if combination is None or combination["combine"] == "mean":
        return {}
    if combination["vary"]:
        means = combination["mean_weights"] or {}
        return {name: f"mean {weight:.2f}" for name, weight in means.items()}
    return {name: f"{weight:.2f}" for name, weight in combination["weights"].items()}


def _training_lines(training: Mapping[str, Mapping[str, int]]) -> list[str]:
    """How unlike student and control were trained, if they were."""
    student, control = training.get("student"), training.get("labels")
    if student is None or control is None or student == control:
        return []
    return [
        f"The student took {student['steps']:,} steps on {student['images']:,} images, the control on labels "
        f"{control['steps']:,} on {control['images']:,}."
    ]


def combination_lines(combination: Mapping[str, Any]) -> list[str]:
    """What was fitted on the validation split, and what it is worth there."""
    lines = []
    how, validation = combination["combine"], combination["validation"]
    nll = {name: f"{value:.4f}" for name, value in validation["nll"].items()}
    if how != "mean" or combination["pool"] != "prob" or _calibrated(combination):
        own = f"{nll['ensemble']}, of" if "ensemble" in nll else "of"
        best = f", of the best teacher {validation['best']} {nll['best']}" if "best" in nll else ""
        lines.append(
            f"Combined by {how}, pool {combination['pool']}: validation NLL {own} "
            f"equal weights {nll['uniform']}{best}."
        )
    if _calibrated(combination):
        scales = ", ".join(f"{name} {scale:.2f}" for name, scale in combination["scales"].items())
        lines.append(f"Temperatures fitted there: {scales}; of the pool {combination['after']:.2f}.")
    for name, mass in combination["discarded"].items():
        lines.append(
            f"Teacher {name} gives {100 * mass:.1f} % of its probability to classes outside the map."
        )
    for name, count in combination["known"].items():
        lines.append(f"Teacher {name} knows {count} classes, and is judged among these, on their images.")
    return lines


def _calibrated(combination: Mapping[str, Any]) -> bool:
    return combination["after"] != 1 or any(scale != 1 for scale in combination["scales"].values())


def _cell(name: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "–"
    if name == "accuracy":
        return f"{100 * value['value']:.2f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return f"{100 * value['value']:.1f} %" if name in _SHARES else f"{abs(value['value']):.4f}"
