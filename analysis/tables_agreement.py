"""The numbers of `analyze-agreement` as text: first what the user came for, whether the student is nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_kd.analysis.plots import shorten
from ensemble_kd.tables import text_table

_SENTENCES = 4


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
            percent(row["agreement"]),
            signed(row["agreement_gain"], 100, 1) if "agreement_gain" in row else "–",
            number(row["kl"]),
            signed(row["kl_gain"]) if "kl_gain" in row else "–",
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
            percent(pair["agreement"]),
            f"{100 * pair['bound']:.1f} %",
            number(pair["kappa"]),
            number(pair["error_consistency"]),
            f"{pair['jsd']['value']:.4f}",
            signed(pair["accuracy_difference"], 100, 1),
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
        f"{words[name]}: {percent(group['disagreement'])} of pairs differ in being right, interrater kappa "
        f"{number(group['interrater_kappa'])}, mutual information {number(group['mutual_information'])} nats."
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
            *(percent(mean["agreement"][target][name]) for name in shown),
            *(signed(mean["gain"][target][name], 100, 1) for name in gains),
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
        over = f"; the student's is {signed(gain, 1, 2)} above it" if gain else ""
        lines.append(
            f"  {_named(name, numbers)}: same nearest wrong class as {reference} for {same} of {count} classes, "
            f"rank correlation {number(dark['correlation'][name], 2)}{over}"
        )
    return ["\n".join(lines)]


def _named(name: str, numbers: Mapping[str, Any]) -> str:
    role = numbers["roles"][name]
    return f"{role} {shorten(name)}" if role == "control" else shorten(name)


def percent(share: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return _interval(share, "{:.1f}", 100, " %")


def number(measure: Mapping[str, float], digits: int = 3) -> str:
    """A number with its interval."""
    return _interval(measure, f"{{:.{digits}f}}", 1, "")


def signed(measure: Mapping[str, float], scale: float = 1, digits: int = 4) -> str:
    """A difference with its interval; a zero has no sign of its own."""
    return _interval(measure, f"{{:+.{digits}f}}", scale, "")


def _interval(measure: Mapping[str, float], form: str, scale: float, unit: str) -> str:
    if measure["value"] != measure["value"]:
        return "–"
    digits = int(form[form.index(".") + 1])
    value, low, high = (
        form.format(round(scale * measure[key], digits) + 0.0) for key in ("value", "low", "high")
    )
    return f"{value}{unit} [{low}, {high}]"
