"""How alike models answer: pair by pair, student to teachers beside controls, also where images get worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ensemble_kd import files
from ensemble_kd.analysis.corruptions import STRENGTHS, UNITS, corrupted
from ensemble_kd.analysis.dark import dark_knowledge
from ensemble_kd.analysis.diversity import group_diversity, information
from ensemble_kd.analysis.fidelity import (
    Compared,
    agreement_row,
    by_class,
    columns_of,
    corrupted_verdict,
    fidelity,
)
from ensemble_kd.analysis.options import AgreementOptions
from ensemble_kd.analysis.pairs import compare_pair, divergences, known, knows_as_much
from ensemble_kd.analysis.plots_agreement import draw_agreement
from ensemble_kd.analysis.resampling import measured, resampled, unknown
from ensemble_kd.analysis.subjects import FORM, Subjects, chosen_options, run_of, subjects_of
from ensemble_kd.analysis.tables_agreement import agreement_table
from ensemble_kd.console import log, progress
from ensemble_kd.data.dataset import Images
from ensemble_kd.errors import DataError, ModelError, RunError, WeightsError
from ensemble_kd.metrics import RESAMPLES
from ensemble_kd.results import ENSEMBLE
from ensemble_kd.runs import Run
from ensemble_kd.teachers.ensemble import Teacher
from ensemble_kd.teachers.layout import check_finite
from ensemble_kd.weights import read_card

NOT_ASKED = "it was not asked for"
PART_ONLY = "a model among them does not know all classes"


@dataclass(frozen=True)
class Agreement:
    """All models side by side; `numbers` is what agreement.json holds."""

    folder: Path
    numbers: dict[str, Any]

    def table(self) -> str:
        """How near the student came to its teachers; then every pair, the corruptions, and dark knowledge."""
        return agreement_table(self.numbers)


@dataclass(frozen=True)
class _Clean:
    """What the models say of the test images as they are."""

    head: dict[str, Any]
    logits: Mapping[str, Tensor]
    labels: np.ndarray


def analyze_agreement(
    run: str | Path | None = None,
    *,
    models: str | Sequence[str] | None = None,
    teachers: Sequence[Teacher] = (),
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Agreement:
    """How alike student, controls, teachers and ensemble are, or models by name, on the test split.

    Of a run the stored predictions are read. Under corruption the models are run; where those of a run
    are no longer there, that part is left out, and the numbers say why.

    Args:
        run: a run folder; the newest finished one where neither a run nor models are named.
        models: instead of a run, models by name, run folder or file, judged on `data`. All are compared
            with the first.
        teachers: of a run that was given them as objects, the same objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"seed=1"`.
        options: the other fields of `AgreementOptions`.

    Returns:
        The numbers, each with its interval: `fidelity` (see `fidelity.fidelity`), `pairs` (see
        `pairs.compare_pair`; `kl` and `jsd`, see `pairs.divergences`), `groups` (see
        `diversity.group_diversity`), `corruption` (see `under_corruption`), `by_class`, and `dark` (see
        `dark.dark_knowledge`). agreement.json and pictures are written to the run's `analysis/` folder,
        or to `out`.

    Raises:
        EkdError: run, models or data cannot be used.
    """
    chosen = chosen_options(AgreementOptions, run, models, options, config_file, sets)
    if chosen.models:
        return agreement_of(subjects_of(chosen), chosen)
    opened = run_of(chosen)
    clean, folder = _stored(opened, chosen), chosen.out or opened.path("analysis")
    return _analysis(clean, folder, _loaded(chosen, teachers), chosen)


def agreement_of(subjects: Subjects, options: AgreementOptions) -> Agreement:
    """`analyze_agreement` of models that are loaded already."""
    if subjects.ensemble is not None:
        clean = _stored(Run.open(Path(subjects.source)), options)
    else:
        images = subjects.some(options.most_images, options.seed)
        logits = subjects.logits(images)
        for name, values in logits.items():
            check_finite(name, values)
        clean = _Clean(
            subjects.head(images, **_settings(options)), _on_cpu(logits), images.known_labels.cpu().numpy()
        )
    return _analysis(clean, subjects.folder, subjects if options.corruptions else NOT_ASKED, options)


def _loaded(options: AgreementOptions, teachers: Sequence[Teacher]) -> Subjects | str:
    """The models of a run, or why they are not to be had: its predictions can be compared without them."""
    if not options.corruptions:
        return NOT_ASKED
    try:
        return subjects_of(options, teachers)
    except (RunError, ModelError, DataError, WeightsError) as error:
        if teachers:
            raise
        log.warning("agreement under corruption is left out: %s", error)
        return f"{error.problems[0].what}: {error.problems[0].why}"


def _settings(options: AgreementOptions) -> dict[str, Any]:
    return {
        "quick": options.quick,
        "images": options.most_images,
        "seed": options.seed,
        "corruptions": options.corruptions,
        "resamples": RESAMPLES,
        "temperature": 1,
    }


def _stored(run: Run, options: AgreementOptions) -> _Clean:
    """The predictions that a run has kept, of all its test images."""
    metrics = run.metrics()
    logits, labels = run.predictions()
    roles = {name: row["role"] for name, row in metrics["models"].items() if name in logits}
    head = {
        "form": FORM,
        "source": str(run.folder),
        "data": metrics["data"],
        "classes": list(read_card(run.path("student.safetensors")).classes),
        "n": len(labels),
        "roles": roles,
        "settings": _settings(options),
    }
    return _Clean(head, {name: logits[name] for name in roles}, labels.numpy())


def _on_cpu(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in logits.items()}


def _analysis(clean: _Clean, folder: Path, subjects: Subjects | str, options: AgreementOptions) -> Agreement:
    """All numbers and pictures; `subjects` are models to run on corrupted images, or why there are none."""
    roles, classes = clean.head["roles"], clean.head["classes"]
    compared, seed = Compared.of(roles), options.seed
    answers = answers_of(clean.logits)
    if "student" in roles.values():
        nearness = fidelity(clean.logits, compared, seed)
    else:
        nearness = {"left_out": "models are compared, and none of them is a student"}
    numbers = {
        **clean.head,
        "models": list(roles),
        "reference": compared.reference,
        "fidelity": nearness,
        "pairs": all_pairs(clean.logits, clean.labels, seed),
        "groups": all_groups(clean.logits, clean.labels, roles, seed),
        "corruption": {"left_out": subjects}
        if isinstance(subjects, str)
        else under_corruption(subjects, compared, options),
        "by_class": by_class(answers, clean.labels, classes, compared),
        "dark": dark_knowledge(clean.logits, clean.labels, classes, compared, seed),
    }
    numbers["pictures"] = draw_agreement(numbers, folder)
    files.write_json(folder / "agreement.json", numbers)
    return Agreement(folder, numbers)


def answers_of(logits: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The most likely class (N,) by model, from logits (N, C)."""
    return {name: values.argmax(dim=1).cpu().numpy() for name, values in logits.items()}


def all_pairs(logits: Mapping[str, Tensor], labels: np.ndarray, seed: int = 0) -> list[dict[str, Any]]:
    """Every pair of models: `compare_pair`, and `kl` in both directions and `jsd` (nats, temperature 1)."""
    answers, pairs = answers_of(logits), list(combinations(logits, 2))
    rows: list[dict[str, Any]] = []
    columns: dict[tuple[int, str], np.ndarray] = {}
    with progress("pairs", len(pairs)) as advance:
        for place, (first, second) in enumerate(pairs):
            found = compare_pair(answers[first], answers[second], labels, seed)
            rows.append({"first": first, "second": second, **found})
            per_sample = divergences(logits[first], logits[second])
            columns |= {(place, key): values for key, values in per_sample.items()}
            advance()
    draws = resampled(columns, seed)
    for place, row in enumerate(rows):
        for key, one, other in (("first_second", "first", "second"), ("second_first", "second", "first")):
            a, b = row[one], row[other]
            can = knows_as_much(logits[b], logits[a])
            row.setdefault("kl", {})[key] = (
                measured(draws[place, key]) if can else unknown(f"{b} does not know all classes of {a}")
            )
        row["jsd"] = measured(draws[place, "jsd"])
    return rows


def all_groups(
    logits: Mapping[str, Tensor], labels: np.ndarray, roles: Mapping[str, str], seed: int = 0
) -> dict[str, Any]:
    """`teachers`, where there are several, and `all` models but the ensemble, each as a group.

    Returns:
        By group `members`, the measures of `group_diversity`, and `mutual_information` (nats).
    """
    groups = {
        "teachers": [name for name in roles if roles[name] == "teacher"],
        "all": [name for name in roles if name != ENSEMBLE],
    }
    answers, found = answers_of(logits), {}
    for group, members in groups.items():
        if len(members) < 2:
            continue
        right = np.stack([answers[name] == labels for name in members])
        differ = unknown(PART_ONLY)
        if all(bool(known(logits[name]).all()) for name in members):
            values = information([logits[name].cpu().numpy() for name in members])
            differ = measured(resampled({"": values}, seed)[""])
        found[group] = {"members": members, **group_diversity(right, seed), "mutual_information": differ}
    return found


def under_corruption(subjects: Subjects, compared: Compared, options: AgreementOptions) -> dict[str, Any]:
    """Accuracy of all models and agreement of student and controls with the teachers on corrupted images.

    Returns:
        `n` images; a `verdict`; `clean`, `kinds` and `overall`: rows as of `fidelity.agreement_row`. Each
        kind has its `unit`, a row for each `strength`, and the mean over these; `overall` is the mean over
        all kinds and strengths.
    """
    chosen, seed = subjects.some(options.most_images, options.seed), options.seed
    images = Images(chosen.decoded, chosen.labels, chosen.ids)  # read once, where they are in files
    labels = images.known_labels.cpu().numpy()
    strengths = {kind: [all_of[1]] if options.quick else list(all_of) for kind, all_of in STRENGTHS.items()}
    plan = [(kind, strength) for kind, own in strengths.items() for strength in own]
    with progress("corruptions", len(plan) + 1) as advance:

        def measure(made: Images) -> dict[tuple[str, ...], np.ndarray]:
            columns = columns_of(answers_of(subjects.logits(made)), labels, compared)
            advance()
            return columns

        clean = measure(images)
        columns = {(k, s): measure(corrupted(images, k, s, seed)) for k, s in plan}
    row = partial(agreement_row, compared=compared, seed=seed)
    overall = row(_mean(list(columns.values())))
    return {
        "n": len(images),
        "verdict": corrupted_verdict(overall, compared),
        "clean": row(clean),
        "kinds": {
            kind: {
                "unit": UNITS[kind],
                "rows": [{"strength": s, **row(columns[kind, s])} for s in own],
                "mean": row(_mean([columns[kind, s] for s in own])),
            }
            for kind, own in strengths.items()
        },
        "overall": overall,
    }


def _mean(several: Sequence[Mapping[tuple[str, ...], np.ndarray]]) -> dict[tuple[str, ...], np.ndarray]:
    """The mean over conditions for each sample, so that intervals stay those over images."""
    return {key: np.mean([columns[key] for columns in several], axis=0) for key in several[0]}
