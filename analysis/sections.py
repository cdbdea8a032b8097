"""The sections of the report: the numbers of report.json and the pictures in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_kd.analysis import likeness
from ensemble_kd.analysis.blocks import Pictures
from ensemble_kd.analysis.made import how_it_was_made
from ensemble_kd.analysis.page import Child, Html, Section, measured, number, table, tag
from ensemble_kd.analysis.parts import PARTS
from ensemble_kd.analysis.plots import label
from ensemble_kd.tables import combination_lines

Numbers = Mapping[str, Any]

MEASURES: dict[str, tuple[str, float, int, str]] = {
    "accuracy": ("accuracy", 100, 2, " %"),
    "top5": ("top-5", 100, 2, " %"),
    "nll": ("NLL", 1, 4, ""),
    "ece": ("ECE", 1, 4, ""),
    "teacher_student_cross_entropy": ("teacher–student CE", 1, 4, ""),
    "teacher_student_kl": ("teacher–student KL", 1, 4, ""),
    "agreement": ("agreement with the ensemble", 100, 2, " %"),
}
"""Title, scale, digits and unit of each measure of metrics.json."""
_OVER = "95 % intervals over test images"


def lead(numbers: Numbers) -> list[Child]:
    """What stands under the title."""
    runs = numbers["runs"]
    data = ", ".join(
        dict.fromkeys(f"{run['metrics']['data']} ({run['metrics']['n']:,} test images)" for run in runs)
    )
    many = f"{len(runs)} runs" if len(runs) > 1 else runs[0]["folder"]
    quick = (
        " A quick report: fewer images, planes and strengths, so wider intervals."
        if numbers["settings"]["quick"]
        else ""
    )
    return [tag("p", f"{many}, {data}.{quick}")]


def sections(numbers: Numbers, pictures: Sequence[Pictures]) -> list[Section]:
    """All sections in order; where there are several runs, each section shows one after another."""
    runs = numbers["runs"]
    several = len(runs) > 1
    made = []
    for key, (title, build) in {"verdict": ("In plain words", _verdict), **PARTS}.items():
        body: list[Child] = list(_side_by_side(numbers)) if several and key == "verdict" else []
        for run, own in zip(runs, pictures, strict=True):
            if several:
                body.append(tag("h3", run["name"]))
            body += build(run, own)
        made.append(Section(key, title, body))
    made.append(Section("made", "How it was made", how_it_was_made(numbers)))
    return made


def _side_by_side(numbers: Numbers) -> list[Child]:
    """The groups of runs that differ in their seed, then all runs as columns."""
    runs = numbers["runs"]
    body: list[Child] = []
    if numbers["groups"]:
        said = [tag("li", *(tag("p", line) for line in group["sentences"])) for group in numbers["groups"]]
        body.append(tag("ul", *said, class_="verdict"))
        for group in numbers["groups"]:
            body += [_group_table(group), *_likeness_over_seeds(group)]
    rows: list[list[Child]] = [
        ["data", *(run["metrics"]["data"] for run in runs)],
        ["teachers", *(", ".join(map(str, run["config"]["teachers"])) for run in runs)],
        ["student", *(str(run["config"]["student"]) for run in runs)],
        ["seed", *(str(run["config"]["seed"]) for run in runs)],
        *_measure_rows(runs, "accuracy"),
    ]
    for control in dict.fromkeys(name for run in runs for name in run["metrics"]["differences"]):
        found = [run["metrics"]["differences"].get(control, {}).get("accuracy") for run in runs]
        cells = [measured(one, 100, 2, sign="+") for one in found]
        rows.append([f"accuracy: student − {control}, points", *cells])
    smaller = [run["metrics"]["times_smaller"] for run in runs]
    rows.append(["times smaller than the teachers", *(number(times, f"{times:.1f}") for times in smaller)])
    rows += [row for measure in ("nll", "ece", "agreement") for row in _measure_rows(runs, measure)]
    rows += [row for measure in likeness.MEASURES for row in _likeness_rows(runs, measure)]
    headers = ["", *(run["name"] for run in runs)]
    return [*body, table(headers, rows, f"The runs side by side; {_OVER} or planes")]


def _measure_rows(runs: Sequence[Numbers], measure: str) -> list[list[Child]]:
    """A measure of every network that any of the runs has, with a column for each run."""
    title, scale, digits, unit = MEASURES[measure]
    return [
        [
            f"{title}: {name}",
            *(measured(_compared(run).get(name, {}).get(measure), scale, digits, unit) for run in runs),
        ]
        for name in dict.fromkeys(name for run in runs for name in _compared(run))
    ]


def _likeness_rows(runs: Sequence[Numbers], measure: str) -> list[list[Child]]:
    """What the student of each run has more of a measure of likeness than each of its controls."""
    _, title, scale, digits, unit = likeness.MEASURES[measure]
    found = [{} if likeness.why_missing(run, measure) else likeness.gains(run, measure) for run in runs]
    return [
        [
            f"{title}: student − {control}{', points' if unit else ''}",
            *(measured(own.get(control), scale, digits, sign="+") for own in found),
        ]
        for control in dict.fromkeys(control for own in found for control in own)
    ]


def _likeness_over_seeds(group: Numbers) -> list[Child]:
    """Planes, corruption and CKA over seeds, and what of them is missing."""
    found = {key: own for key, own in group["likeness"].items() if "left_out" not in own}
    notes: list[Child] = [
        tag("p", f"No interval over seeds of {likeness.MEASURES[key][1]}: {own['left_out']}.", class_="note")
        for key, own in group["likeness"].items()
        if key not in found
    ]
    if not found:
        return notes
    networks = list(next(iter(found.values()))["models"])
    shapes = {key: likeness.MEASURES[key][2:] for key in found}
    rows: list[list[Child]] = [
        [name, *(measured(own["models"][name], *shapes[key]) for key, own in found.items())]
        for name in networks
    ]
    rows += [
        [f"student − {name}"]
        + [measured(own["differences"][name], *shapes[key][:2], sign="+") for key, own in found.items()]
        for name in networks[1:]
    ]
    seeds = ", ".join(map(str, group["seeds"]))
    caption = (
        f"How alike to the ensemble and, in CKA and neighbours, to its teachers on average: means over the seeds "
        f"{seeds}, with 95 % t intervals over seeds"
    )
    return [table(["", *(likeness.MEASURES[key][1] for key in found)], rows, caption), *notes]


def _compared(run: Numbers) -> dict[str, Numbers]:
    return {name: row for name, row in run["metrics"]["models"].items() if row["role"] != "teacher"}


def _group_table(group: Numbers) -> Html:
    shown = [name for name in MEASURES if name in group["models"]["student"]]
    rows: list[list[Child]] = [
        [name, *(measured(own.get(key), *MEASURES[key][1:]) for key in shown)]
        for name, own in group["models"].items()
    ]
    rows += [
        [f"student − {name}", *(measured(own.get(key), *MEASURES[key][1:3], sign="+") for key in shown)]
        for name, own in group["differences"].items()
    ]
    seeds = ", ".join(map(str, group["seeds"]))
    caption = f"{', '.join(group['runs'])}: means over the seeds {seeds}, with 95 % t intervals over seeds"
    return table(["", *(MEASURES[key][0] for key in shown)], rows, caption)


def _verdict(run: Numbers, pictures: Pictures) -> list[Child]:
    items = [
        tag("li", tag("b", finding["question"]), *(tag("p", line) for line in finding["sentences"]))
        for finding in run["findings"]
    ]
    note = (
        "Each interval is of 95 % on its own and not corrected for how many there are; it is over test images or "
        "planes, for the networks of this one seed, and other seeds give other networks. “No clear difference” means that "
        "the interval holds 0. Resampling adds to the bias of calibration errors, and takes from rank correlations, so their "
        "intervals can lie to one side of their value."
    )
    body: list[Child] = [tag("ul", *items, class_="verdict"), tag("p", note, class_="note")]
    body += [tag("p", f"{line}.", class_="note") for line in run["fewer"]]
    body += [_summary(run), *_differences(run)]
    metrics = run["metrics"]
    if "combination" in metrics:
        body += [tag("p", line) for line in combination_lines(metrics["combination"])]
    return body


def _summary(run: Numbers) -> Html:
    rows = run["metrics"]["models"]
    roles = {name: row["role"] for name, row in rows.items()}
    shown = [key for key in MEASURES if any(key in row for row in rows.values())]
    cells: list[list[Child]] = [
        [
            label(name, roles),
            *(measured(row.get(key), *MEASURES[key][1:]) for key in shown),
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:.2f}",
        ]
        for name, row in rows.items()
    ]
    headers = ["", *(MEASURES[key][0] for key in shown), "parameters", "MB"]
    return table(headers, cells, f"All models on the test split, {run['metrics']['n']:,} images; {_OVER}")


def _differences(run: Numbers) -> list[Child]:
    found = run["metrics"]["differences"]
    if not found:
        return [
            tag("p", "No control was trained (--controls), so the student stands beside no other student.")
        ]
    shown = [key for key in MEASURES if any(key in own for own in found.values())]
    headers = [""] + [f"{MEASURES[key][0]}{', points' if MEASURES[key][3] else ''}" for key in shown]
    rows: list[list[Child]] = [
        [f"student − {name}", *(measured(own.get(key), *MEASURES[key][1:3], sign="+") for key in shown)]
        for name, own in found.items()
    ]
    return [table(headers, rows, "What the student has more than each control, paired by image")]
