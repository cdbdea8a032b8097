"""What the report shows of the layers, and of the planes between images."""

from __future__ import annotations

from ensemble_kd.analysis.blocks import POINTS, SHARE, Numbers, Pictures, Rows, needs, shown
from ensemble_kd.analysis.page import Child, details, join, measured, number, table, tag
from ensemble_kd.analysis.plots import label


@needs("features")
def features(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """CKA of layers, and what distilling gained of it."""
    measures = {"penultimate": "CKA, penultimate", "logits": "CKA, logits", "matches": "CKA, best matches"}
    measures["mutual_knn"] = f"{numbers['settings']['neighbours']} neighbours in common"
    roles, idle = numbers["roles"], numbers["idle"]
    everyone = "teachers with weight, mean" if idle else "all teachers, mean"
    rows: Rows = [
        [f"student − {control}, to {teacher}", *(measured(row[key], 1, 3, sign="+") for key in measures)]
        for control, found in numbers["gains"].items()
        for teacher, row in [*found["teachers"].items(), (everyone, found["mean"])]
    ]
    alike: Rows = [
        [f"{label(pair['first'], roles)} – {label(pair['second'], roles)}"]
        + [measured(pair[key], 1, 3) for key in measures]
        + [_plain(pair["procrustes"], key) for key in ("value", "chance")]
        for pair in numbers["pairs"]
    ]
    chance = numbers["chance"]["mutual_knn"]
    caption = (
        f"How alike layers are: debiased linear CKA, neighbours in common (by chance {chance:.3f}), and Procrustes of the "
        f"penultimate layers on {numbers['procrustes']['images']:,} images, with what other images give by chance"
    )
    first = [key for key in ("teachers", "gains") if key in numbers["pictures"]]
    rest = [key for key in numbers["pictures"] if key not in first]
    body = shown(run, pictures, "features", *first)
    if rows:
        title = "What the student has more of likeness to the teachers than each control, paired by image"
        body.append(table(["", *measures.values()], rows, title))
    body.append(
        details(
            f"All {len(alike)} pairs in numbers",
            table(["", *measures.values(), "Procrustes", "by chance"], alike, caption),
        )
    )
    body += _matches(numbers)
    if rest:
        body.append(details("Controls and single networks", *shown(run, pictures, "features", *rest)))
    reasons = [
        f"{model}, layer {layer}: no numbers, as {reason}."
        for model, layers in numbers["undefined"].items()
        for layer, reason in layers.items()
    ]
    reasons += [f"{name} has no weight in the ensemble, so no mean counts it." for name in idle]
    if reason := numbers["procrustes"].get("reason"):
        reasons.append(f"Procrustes is of {numbers['procrustes']['images']:,} images, as {reason}.")
    return body + [tag("p", reason, class_="note") for reason in reasons]


def _plain(found: Numbers, key: str) -> Child:
    """A number without an interval, or `–` with the reason."""
    value = found[key]
    return tag("span", "–", title=found.get("reason")) if value is None else number(value, f"{value:.3f}")


def _matches(numbers: Numbers) -> list[Child]:
    """For each layer of the student the most similar one of each teacher."""
    best = {
        pair["second"]: pair["best"]["first"]
        for pair in numbers["pairs"]
        if pair["first"] == "student" and numbers["roles"][pair["second"]] == "teacher"
    }
    if not best:
        return []
    rows: Rows = [
        [layer, *(_match(own[place]) for own in best.values())]
        for place, layer in enumerate(numbers["layers"]["student"])
    ]
    caption = (
        "The most similar layer of each teacher for each of the student, by CKA. One-sided and optimistic: the best of "
        "many, so some of it is chance, and the same layer may stand in several rows."
    )
    made = table(["layer of the student", *best], rows, caption, words=range(1, 1 + len(best)))
    return [details("Best-matching layers", made)]


def _match(best: Numbers) -> Child:
    if best["cka"] is None:
        return tag("span", "–", title=best.get("reason"))
    return join([f"{best['match']} ", number(best["cka"], f"{best['cka']:.3f}")])


@needs("surface")
def planes(numbers: Numbers, run: Numbers, pictures: Pictures) -> list[Child]:
    """Planes through three images, who says the same on them, and the shape of the regions."""
    roles, settings = numbers["roles"], numbers["settings"]
    taught = [name for role in ("ensemble", "teacher") for name in roles if roles[name] == role]
    alike = {frozenset((pair["first"], pair["second"])): pair["reproducibility"] for pair in numbers["pairs"]}
    rows: Rows = [
        [label(name, roles), *(_spread(alike.get(frozenset((name, other)))) for other in taught)]
        for name in roles
    ]
    gains = {(row["control"], row["target"]): row["gain"] for row in numbers["gains"]}
    rows += [
        [f"student − {control}, points", *(measured(gains[control, other], *POINTS) for other in taught)]
        for control in dict.fromkeys(control for control, _ in gains)
    ]
    size = f"{settings['triplets']:,} planes of {settings['points']}×{settings['points']} points"
    caption = f"How often two models say the same on {size}: mean, 95 % interval and ± standard deviation over planes"
    shapes: Rows = [
        [
            label(name, roles),
            *(measured(own[key], 1, 2) for key in ("regions", "per_class")),
            *(measured(numbers["margins"][name][key], 1, 3) for key in ("median", "mean")),
        ]
        for name, own in numbers["fragmentation"].items()
    ]
    columns = ["", "regions a plane", "a class", "median distance to the boundary", "mean distance"]
    about = "Connected regions of one class, and how far the images are from the boundary, along the plane"
    return [
        *shown(run, pictures, "surface"),
        table(["", *(label(name, roles) for name in taught)], rows, caption),
        details("The shape of the regions in numbers", table(columns, shapes, about)),
    ]


def _spread(alike: Numbers | None) -> Child:
    """A share with its interval and its standard deviation over planes."""
    if alike is None or alike["sd"] is None:
        return measured(alike, *SHARE)
    return join([measured(alike, *SHARE), " ± ", number(alike["sd"], f"{100 * alike['sd']:.1f}")])
