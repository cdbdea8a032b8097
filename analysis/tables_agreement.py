"""The numbers of `analyze-agreement` as text: first what the user came for, whether the student is nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.plots import shorten
from ensemble_kd.tables import text_table

_SENTENCES = 4
_SHARE = (100, 1, " %")
_POINTS = (100, 1, "", "+")


def agreement_table(numbers: Mapping[str, Any]) -> str:
    """Fidelity, every pair, groups, one line a corruption, and dark knowledge in words."""
    about = f"{numbers['data']}, test split, {numbers['n']:,} images; 95 % intervals over images, one seed"
    parts = [about]
    if "targets" in numbers["fidelity"]:
        verdicts = (numbers[key].get("verdict") for key in ("fidelity", "corruption"))
        parts += ["\n".join(filter(None, verdicts)), _fidelity_table(numbers)]
    parts += [_pair_table(numbers["pairs"]), *_group_lines(numbers["groups"]), _corruption_table(numbers)]
    return "\n\n".join([*parts, *_dark_lines(numbers)])


def _fidelity_table(numbers: Mapping[str, Any]) -> str:
    headers = ["", "agreement", "student's points over it", "KL", "student's KL below it"]
    rows = [
        [
            f"{_named(name, numbers)} to {shorten(target)}",
            interval(row["agreement"], *_SHARE),
            interval(row["agreement_gain"], *_POINTS) if "agreement_gain" in row else "–",
            interval(row["kl"], 1, 3),
            interval(row["kl_gain"], sign="+") if "kl_gain" in row else "–",
        ]
        for target, networks in numbers["fidelity"]["targets"].items()
        for name, row in networks.items()
    ]
    return text_table(headers, rows, "Fidelity to the teachers (KL from the teacher, in nats, temperature 1)")


def _pair_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    headers = [
        "pair",
        "agreement",
        "at least",
        "kappa",
        "error consistency",
        "JSD",
        "points of accuracy",
        "McNemar p",
        "both wrong",
        "same wrong class",
    ]
    rows = [
        [
            f"{shorten(pair['first'])} – {shorten(pair['second'])}",
            interval(pair["agreement"], *_SHARE),
            f"{100 * pair['bound']:.1f} %",
            interval(pair["kappa"], 1, 3),
            interval(pair["error_consistency"], 1, 3),
            f"{pair['jsd']['value']:.4f}",
            interval(pair["accuracy_difference"], *_POINTS),
            f"{pair['mcnemar']['p']:.2g}",
            *(f"{100 * pair['cells'][cell]['value']:.1f} %" for cell in ("both_wrong", "same_wrong")),
        ]
        for pair in pairs
    ]
    return text_table(
        headers, rows, "Pairs (at least: what both accuracies force; p is not corrected for many pairs)"
    )


def _group_lines(groups: Mapping[str, Any]) -> list[str]:
    words = {
        "teachers": "The teachers",
        "all": "All models but the ensemble" if "teachers" in groups else "All",
    }
    lines = [
        f"{words[name]}: {interval(group['disagreement'], *_SHARE)} of pairs differ in being right, interrater kappa "
        f"{interval(group['interrater_kappa'], 1, 3)}, mutual information {interval(group['mutual_information'], 1, 3)} nats."
        for name, group in groups.items()
    ]
    return ["\n".join(lines)] if lines else []


def _corruption_table(numbers: Mapping[str, Any]) -> str:
    found = numbers["corruption"]
    if "left_out" in found:
        return f"Under corruption: left out ({found['left_out']})."
    target, compared = numbers["reference"], list(found["clean"]["agreement"][numbers["reference"]])
    gains = list(found["clean"]["gain"][target])
    shown = compared[:1] if gains else compared
    headers = ["corruption", "strengths"]
    headers += [f"agreement of {_named(name, numbers)}" for name in shown]
    headers += [f"points over {_named(name, numbers)}" for name in gains]
    kinds = {
        kind: ([row["strength"] for row in own["rows"]], own["mean"]) for kind, own in found["kinds"].items()
    }
    rows = [
        [
            kind,
            ", ".join(f"{strength:g}" for strength in strengths),
            *(interval(mean["agreement"][target][name], *_SHARE) for name in shown),
            *(interval(mean["gain"][target][name], *_POINTS) for name in gains),
        ]
        for kind, (strengths, mean) in {
            "none": ([], found["clean"]),
            **kinds,
            "mean of the kinds": ([], found["overall"]),
        }.items()
    ]
    title = f"Agreement with {shorten(target)} under corruption, mean over strengths, {found['n']:,} images"
    return text_table(headers, rows, title)


def _dark_lines(numbers: Mapping[str, Any]) -> list[str]:
    dark, reference = numbers["dark"], _named(numbers["reference"], numbers)
    if not dark["words"]:
        return []
    lines = ["Wrong classes, by mean probability:"]
    lines += [f"  {row['sentence']}" for row in dark["words"][:_SENTENCES]]
    count = len(dark["words"])
    for name, same in dark["same_nearest"].items():
        gain = dark["correlation_gain"].get(name)
        over = f"; the student's is {interval(gain, 1, 2, sign='+')} above it" if gain else ""
        lines.append(
            f"  {_named(name, numbers)}: same nearest wrong class as {reference} for {same} of {count} classes, "
            f"rank correlation {interval(dark['correlation'][name], 1, 2)}{over}"
        )
    return ["\n".join(lines)]


def _named(name: str, numbers: Mapping[str, Any]) -> str:
    role = numbers["roles"][name]
    return f"{role} {shorten(name)}" if role == "control" else shorten(name)
