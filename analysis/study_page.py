"""The page of a study: the numbers of study.json in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.page import Child, Section, details, figure, measured, page, table, tag
from ensemble_kd.analysis.study_numbers import MEASURES

Numbers = Mapping[str, Any]


def study_page(numbers: Numbers, asked: str, folder: Path) -> str:
    """The whole document.

    Args:
        numbers: of study.json.
        asked: the study's YAML.
        folder: where its pictures lie.
    """
    runs = sum(len(point["seeds"]) for point in numbers["points"].values())
    lead: list[Child] = [
        tag(
            "p",
            f"{len(numbers['points'])} points, {runs} runs, {numbers['data']} ({numbers['n']:,} test images).",
        )
    ]
    if numbers["question"]:
        lead.insert(0, tag("p", numbers["question"]))
    sections = [
        Section("answer", "In plain words", [tag("ul", *_said(numbers), class_="verdict")]),
        Section("pictures", "Pictures", _pictures(numbers, folder)),
        Section("points", "All points", _tables(numbers)),
        Section("made", "How it was made", _made(numbers, asked)),
    ]
    foot = (
        f"Made {numbers['created']} by ensemble-kd {numbers['version']}. results.csv has a line for each run, curves.csv "
        "one for each of their epochs, study.json all numbers of this page."
    )
    return page(f"Study: {folder.resolve().name}", lead, sections, foot)


def _said(numbers: Numbers) -> list[Child]:
    return [tag("li", tag("p", sentence)) for sentence in numbers["sentences"]]


def _pictures(numbers: Numbers, folder: Path) -> list[Child]:
    return [
        figure((folder / made["file"]).read_bytes(), made["title"], made["alt"])
        for made in numbers["pictures"].values()
    ]


def _tables(numbers: Numbers) -> list[Child]:
    """Means of all points, then their differences to the baseline."""
    measures = list(dict.fromkeys([*numbers["measures"], "early_accuracy", "plateau_epoch"]))
    titles = [MEASURES[measure][0] + (", %" if MEASURES[measure][1] == 100 else "") for measure in measures]
    rows = [
        [name, str(len(point["seeds"])), *(_cell(point["means"], measure) for measure in measures)]
        for name, point in numbers["points"].items()
    ]
    made: list[Child] = [table(["", "seeds", *titles], rows, "Means over seeds, with 95 % t intervals.")]
    if numbers["against"]:
        rows = [
            [name, *(_cell(point["differences"], measure, "+") for measure in measures)]
            for name, point in numbers["points"].items()
            if point["differences"]
        ]
        caption = f"Differences to {numbers['against']}, paired by seed, with 95 % t intervals."
        made.append(table(["", *titles], rows, caption))
    if numbers["missing"]:
        made.append(tag("p", f"Not finished: {', '.join(numbers['missing'])}.", class_="note"))
    for name, why in numbers["failures"].items():
        made.append(tag("p", f"{name} could not be finished: {why}", class_="note"))
    return made


def _cell(found: Numbers, measure: str, sign: str = "") -> Child:
    _, scale, digits, _ = MEASURES[measure]
    return measured(found[measure], scale, digits, sign=sign)


def _made(numbers: Numbers, asked: str) -> list[Child]:
    machine = ", ".join(f"{name} {value}" for name, value in numbers["machine"].items())
    return [
        tag("p", f"{numbers['seconds']:,.0f} s of runs in all, on: {machine}."),
        tag(
            "p",
            "Points are chosen by the mean accuracy on the validation split, never on the test split. Intervals are over "
            "seeds, for these test images and these teachers. Those that hold together are widened for the number of points "
            "(Bonferroni).",
        ),
        tag("pre", numbers["command"]),
        details("study.yaml", tag("pre", asked)),
    ]
