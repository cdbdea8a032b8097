"""What the report shows of each analysis: pictures first, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ensemble_kd.analysis.blocks import POINTS, SHARE, Numbers, Pictures, Rows, needs, shown
from ensemble_kd.analysis.page import Child, details, figure, measured, number, table, tag
from ensemble_kd.analysis.parts_inside import features, planes
from ensemble_kd.analysis.plots import label


@needs("agreement")
def pairs(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """Heat maps of all pairs, and their table."""
    headers = [
        "",
        "same answer",
        "at least",
        "κ",
        "error consistency",
        "JSD, nats",
        "KL from the first, nats",
        "from the second",
        "accuracy, points",
        "McNemar p",
    ]
    rows: Rows = [
        [
            f"{pair['first']} – {pair['second']}",
            measured(pair["agreement"], *SHARE),
            number(pair["bound"], f"{100 * pair['bound']:.1f} %"),
            measured(pair["kappa"], 1, 3),
            measured(pair["error_consistency"], 1, 3),
            measured(pair["jsd"], 1, 4),
            *(measured(pair["kl"][way], 1, 4) for way in ("first_second", "second_first")),
            measured(pair["accuracy_difference"], *POINTS),
            number(pair["mcnemar"]["p"], f"{pair['mcnemar']['p']:.2g}"),
        ]
        for pair in numbers["pairs"]
    ]
    caption = (
        "Every pair. At least: what both accuracies force. KL from the first: KL(first‖second), at temperature 1. "
        "Accuracy: first minus second. McNemar: the exact test of it, not corrected for how many pairs there are."
    )
    return [
        *shown(run, pictures, "agreement"),
        details(f"All {len(rows)} pairs in numbers", table(headers, rows, caption)),
    ]


@needs("agreement")
def cells(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """Who is right, how near the student is to each teacher, corrupted images, and class by class."""
    roles = numbers["roles"]
    body = shown(run, pictures, "agreement", "cells")
    rows: Rows = [
        [
            f"{label(name, roles)} to {label(target, roles)}",
            measured(row["agreement"], *SHARE),
            measured(row.get("agreement_gain"), *POINTS),
            measured(row["kl"], 1, 4),
            measured(row.get("kl_gain"), 1, 4, sign="+"),
        ]
        for target, networks in numbers["fidelity"]["targets"].items()
        for name, row in networks.items()
    ]
    headers = [
        "",
        "agreement",
        "student's points over it",
        "KL from the teacher, nats",
        "student's KL below it",
    ]
    body.append(table(headers, rows, "How near student and controls are to the ensemble and each teacher"))
    body += _corruption(numbers, run, pictures)
    return [*body, *shown(run, pictures, "agreement", "classes"), *_by_class(numbers)]


def _corruption(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    found, reference = numbers["corruption"], numbers["reference"]
    if "left_out" in found:
        return [tag("p", f"Agreement under corruption is left out: {found['left_out']}.", class_="note")]
    lines = {"none": found["clean"]}
    lines |= {kind: own["mean"] for kind, own in found["kinds"].items()}
    lines["mean of the kinds"] = found["overall"]
    gains = list(found["clean"]["gain"][reference])
    rows: Rows = [
        [
            kind,
            measured(row["agreement"][reference]["student"], *SHARE),
            *(measured(row["gain"][reference][name], *POINTS) for name in gains),
            measured(row["accuracy"]["student"], *SHARE),
            measured(row["accuracy"][reference], *SHARE),
        ]
        for kind, row in lines.items()
    ]
    headers = ["", "student's agreement", *(f"points over {name}" for name in gains)]
    headers += ["student's accuracy", "ensemble's accuracy"]
    caption = f"Agreement with the ensemble as images get worse: mean over strengths, {found['n']:,} images"
    return [*shown(run, pictures, "agreement", "corruption"), table(headers, rows, caption)]


def _by_class(numbers: Numbers) -> list[Child]:
    found = numbers["by_class"]
    models, networks = (list(found[0][key]) for key in ("accuracy", "agreement"))
    headers = ["class", "images", *(f"accuracy, {name}" for name in models)]
    headers += [f"agreement, {name}" for name in networks]
    rows: Rows = [
        [
            row["class"],
            str(row["n"]),
            *(measured(row["accuracy"][name], 100, 0, " %") for name in models),
            *(measured(row["agreement"][name], 100, 0, " %") for name in networks),
        ]
        for row in found
    ]
    made = table(
        headers, rows, "By true class, with Wilson's intervals of 95 %; agreement is with the ensemble"
    )
    return [details(f"All {len(rows)} classes", made)]


@needs("calibration")
def calibration(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """Reliability, errors beside their floor, and what the student has more than each control."""
    roles = numbers["roles"]
    headers = [
        "",
        "ECE",
        "ECE if perfect",
        "temperature",
        "ECE after",
        "adaptive ECE",
        "MCE",
        "Brier",
        "NLL",
        "NLL after",
    ]
    rows: Rows = [
        [
            label(name, roles),
            measured(row["before"]["ece"]),
            measured(row["before"]["floor"]),
            number(row["temperature"], f"{row['temperature']:.2f}{'*' if row['remark'] else ''}"),
            measured(row["after"]["ece"]),
            *(measured(row["before"][key]) for key in ("adaptive_ece", "mce", "brier", "nll")),
            measured(row["after"]["nll"]),
        ]
        for name, row in numbers["models"].items()
    ]
    caption = (
        f"Calibration before and after a temperature fitted on {numbers['validation']:,} validation images. ECE if "
        "perfect: what chance alone gives a perfectly calibrated model with the same confidences, with 95 % of the draws. "
        "Adaptive ECE, MCE and Brier are before."
    )
    remarks = [f"* {name}: {row['remark']}." for name, row in numbers["models"].items() if row["remark"]]
    body = [*shown(run, pictures, "calibration"), table(headers, rows, caption)]
    if numbers["differences"]:
        measures = [(stage, key) for stage in ("before", "after") for key in ("ece", "nll", "brier")]
        differences: Rows = [
            [f"student − {name}", *(measured(own[stage][key], sign="+") for stage, key in measures)]
            for name, own in numbers["differences"].items()
        ]
        titles = {"ece": "ECE", "nll": "NLL", "brier": "Brier"}
        columns = ["", *(f"{titles[key]} {stage}" for stage, key in measures)]
        body.append(
            table(columns, differences, "What the student has more than each control, paired by image")
        )
    return body + [tag("p", remark, class_="note") for remark in remarks]


@needs("agreement")
def dark(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """What models say of the wrong classes, in a picture, in words and in numbers."""
    found, roles = numbers["dark"], numbers["roles"]
    if not found["words"]:
        return [tag("p", "With two classes there is one wrong class, and nothing to compare.", class_="note")]
    count = len(found["words"])
    rows: Rows = [
        [
            label(name, roles),
            measured(found["correlation"][name], 1, 3),
            measured(found["correlation_gain"].get(name), 1, 3, sign="+"),
            f"{found['same_nearest'][name]} of {count}",
        ]
        for name in found["correlation"]
    ]
    headers = ["", "rank correlation", "student's above it", "same nearest wrong class"]
    caption = "How alike the ensemble and each network order the wrong classes; 95 % intervals over images"
    return [
        *shown(run, pictures, "agreement", "dark"),
        _list([row["sentence"] for row in found["words"][:_SAID]]),
        table(headers, rows, caption),
    ]


_SAID = 6


def _list(lines: Iterable[str]) -> Child:
    return tag("ul", *(tag("li", line) for line in lines))


@needs("agreement")
def diversity(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """How unlike the models are in their errors."""
    words = {"teachers": "the teachers", "all": "all but the ensemble"}
    keys = ("disagreement", "kohavi_wolpert", "interrater_kappa", "mutual_information")
    rows: Rows = [
        [words.get(name, name), *(measured(group[key], 1, 3) for key in keys)]
        for name, group in numbers["groups"].items()
    ]
    headers = ["", "pairs that differ in being right", "KW", "interrater κ", "mutual information, nats"]
    one = [] if "teachers" in numbers["groups"] else ["There is one teacher, so teachers have no diversity."]
    measures = {
        "disagreement": "one right, one wrong",
        "double_fault": "both wrong",
        "q": "Q",
        "correlation": "ρ",
    }
    own: Rows = [
        [f"{pair['first']} – {pair['second']}", *(measured(pair[key], 1, 3) for key in measures)]
        for pair in numbers["pairs"]
    ]
    return [
        *shown(run, pictures, "agreement", "diversity"),
        *(tag("p", line, class_="note") for line in one),
        table(headers, rows, "Groups of models; 95 % intervals over images"),
        details(
            f"All {len(own)} pairs in numbers",
            table(["", *measures.values()], own, "Diversity of every pair"),
        ),
    ]


def curves(run: Numbers, pictures: Pictures) -> list[Child]:
    """How the networks of the run were trained."""
    rows: Rows = [
        [
            row["network"],
            str(row["epochs"]),
            f"{row['steps']:,}",
            number(row["train"]["accuracy"], f"{100 * row['train']['accuracy']:.1f} %"),
            number(row["val"]["accuracy"], f"{100 * row['val']['accuracy']:.1f} %"),
            number(row["seconds"], f"{row['seconds']:.1f}"),
        ]
        for row in run["training"]
    ]
    headers = ["", "epochs", "steps", "training accuracy", "validation accuracy", "seconds"]
    body: list[Child] = []
    if ("curves", "curves") in pictures:
        student = next(row for row in run["training"] if row["network"] == "student")
        alt = (
            "Accuracy, loss and teacher–student cross-entropy of student and controls on training and validation "
            f"images, step by step. The student ends at {100 * student['val']['accuracy']:.1f} % of the validation images."
        )
        body.append(figure(pictures["curves", "curves"], "Curves, losses in percent of their maximum", alt))
    else:
        body.append(tag("p", "Left out: the run has no curves.png.", class_="note"))
    return [*body, table(headers, rows, "Networks trained in the run, as of their last epoch")]


PARTS: dict[str, tuple[str, Callable[[Numbers, Pictures], Sequence[Child]]]] = {
    "pairs": ("Every pair of models", pairs),
    "cells": ("Who is right, and what happens as images get worse", cells),
    "calibration": ("How far confidence can be trusted", calibration),
    "features": ("How alike the layers are", features),
    "planes": ("What is said between the images", planes),
    "dark": ("What is said of the wrong classes", dark),
    "diversity": ("How unlike the models are in their errors", diversity),
    "curves": ("Training", curves),
}
"""The sections between verdict and `made`, in order: title, and what builds it of a run and its pictures."""
