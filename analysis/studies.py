"""What a study found, from its runs: one tidy table, pictures, sentences and a page."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ensemble_kd import __version__, files
from ensemble_kd.analysis.intervals import interval
from ensemble_kd.analysis.likeness import gains
from ensemble_kd.analysis.plots_study import draw_curves, draw_measure
from ensemble_kd.analysis.study_numbers import (
    MEASURES,
    best_on_validation,
    early_and_plateau,
    effects_of,
    sentences,
    summarise_points,
    told,
)
from ensemble_kd.analysis.study_page import study_page
from ensemble_kd.config import resolve
from ensemble_kd.errors import ConfigError, RunError, nearest
from ensemble_kd.grid import LABELS, Point, StudyOptions, points_of, shown
from ensemble_kd.runs import Run
from ensemble_kd.tables import text_table

_LIKENESS = {"planes": ("surface", "planes"), "cka": ("features", "penultimate")}
"""Analysis and measure of `likeness.gains`, by the name they have here."""
_CURVES = ("accuracy", "loss", "teacher_student_cross_entropy")


@dataclass(frozen=True)
class StudyResult:
    """A study that was summarised; `numbers` is what study.json holds."""

    folder: Path
    numbers: dict[str, Any]

    @property
    def page(self) -> Path:
        """The HTML file."""
        return self.folder / "index.html"

    def table(self) -> str:
        """Means over seeds by point, with what may be said of them."""
        measures, points = self.numbers["measures"], self.numbers["points"]
        against = self.numbers["against"]
        percent = {m: ", %" if MEASURES[m][1] == 100 else "" for m in measures}
        headers = ["", *(f"{m}{percent[m]}" for m in measures)]
        headers += [f"Δ {m}" for m in measures if against]
        rows = [[name, *_cells(point, measures, bool(against))] for name, point in points.items()]
        seeds = max((len(point["seeds"]) for point in points.values()), default=0)
        count = "1 seed" if seeds == 1 else f"{seeds} seeds, 95 % t intervals"
        title = f"{self.numbers['data']}, test split, {self.numbers['n']:,} images, {count}"
        bases = {name for name in self.numbers["baselines"].values() if name is not None} - {against}
        row = f" (the row {next(iter(bases))})" if len(bases) == 1 else ""
        delta = [f"Δ is the difference to {against}{row}, paired by seed."] if against else []
        return "\n".join([text_table(headers, rows, title), *delta, *self.numbers["sentences"]])


def _cells(point: Mapping[str, Any], measures: Sequence[str], compared: bool) -> list[str]:
    cells = []
    for measure in measures:
        _, scale, digits, _ = MEASURES[measure]
        mean = point["means"][measure]
        several = len(point["seeds"]) > 1
        cells.append(interval(mean, scale, digits) if several else f"{scale * mean['value']:.{digits}f}")
    if compared:
        own = point["differences"]
        cells += [told(m, own[m], whole=False) if own else "" for m in measures]
    return cells


def summarise(folder: Path, failures: Mapping[str, str] | None = None) -> StudyResult:
    """Write results.csv, curves.csv, study.json, the pictures and index.html of a study.

    Args:
        folder: with study.yaml and the runs that are finished.
        failures: runs that cannot be finished, with the reason.

    Raises:
        RunError: no run is finished.
        ConfigError: a measure that is to be pictured is not known.
    """
    options = resolve(StudyOptions, {}, file=folder / "study.yaml")
    check_measures(options)
    points = points_of(options, folder / "before")
    runs = _finished(folder, points, options.seeds)
    rows = [_row(run, point, seed, folder) for point, seed, run in runs]
    curves = [row for point, seed, run in runs for row in _curve(run, point, seed)]
    _write_csv(folder / "results.csv", rows)
    _write_csv(folder / "curves.csv", curves)
    tested = {run.metrics()["data"]: run.metrics()["n"] for _, _, run in runs}
    numbers = _numbers(options, points, rows) | {
        "data": " and ".join(tested),
        "n": sum(tested.values()),
        "failures": dict(failures or {}),
        "seconds": sum(row["seconds"] for row in rows),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "command": shlex.join(sys.argv),
        "machine": {k: runs[0][2].manifest().get(k) for k in ("device", "cpu_count", "threads", "python")},
    }
    numbers["pictures"] = _draw(folder, numbers, rows, curves)
    files.write_json(folder / "study.json", numbers)
    numbers = _in_order(files.read_json(folder / "study.json"))  # the page is made of what is in the file
    text = (folder / "study.yaml").read_text(encoding="utf-8")
    files.write_text(folder / "index.html", study_page(numbers, text, folder))
    return StudyResult(folder, numbers)


def _in_order(numbers: dict[str, Any]) -> dict[str, Any]:
    """With the points as the study has them; JSON is written in alphabetical order."""
    ordered = {name: numbers["points"][name] for name in numbers["order"]}
    return {**numbers, "points": ordered}


def check_measures(options: StudyOptions) -> None:
    """Refuse what is not measured.

    Raises:
        ConfigError: there is no measure of that name, or the study has not what it is made of.
    """
    for name in options.measures:
        if name not in MEASURES:
            raise ConfigError(
                f"measures: there is no {name!r}",
                f"known are {', '.join(MEASURES)}",
                nearest(name, MEASURES) or "name one of these",
            )
        kind, _, control = name.partition("_over_")
        analysis = _LIKENESS[kind][0] if kind in _LIKENESS else None
        if control and control not in options.controls:
            raise ConfigError(
                f"measures: {name} needs the control {control}",
                "no run has it",
                f"say --set controls={control}",
            )
        if control and analysis and analysis not in options.analyses:
            raise ConfigError(
                f"measures: {name} needs an analysis", "none is made", f"say --set analyses=[{analysis}]"
            )


def _finished(folder: Path, points: Mapping[str, Point], seeds: int) -> list[tuple[Point, int, Run]]:
    found = []
    for point in points.values():
        for seed in range(seeds):
            path = folder / "points" / point.folder / f"seed-{seed}"
            if (path / "metrics.json").is_file() and (path / "status.json").is_file():
                found.append((point, seed, Run.open(path)))
    if not found:
        raise RunError(
            f"{folder} has no finished run", "none of its points is finished", "start the study again"
        )
    return found


def _row(run: Run, point: Point, seed: int, folder: Path) -> dict[str, Any]:
    """One line of results.csv."""
    metrics = run.metrics()
    history = [row for row in run.history() if row["network"] == "student"]
    validated = [row["val"]["accuracy"] for row in history]
    early, plateau = early_and_plateau(validated)
    measured = {k: v["value"] for k, v in metrics["models"]["student"].items() if isinstance(v, Mapping)}
    last = {f"val_{name}": value for name, value in history[-1]["val"].items()}
    return {
        "point": point.name,
        "baseline": point.baseline,
        **{name: shown(value) for name, value in point.settings.items()},
        "seed": seed,
        **last,
        "early_accuracy": early,
        "plateau_epoch": plateau,
        **measured,
        **_gains(run, metrics),
        "steps": history[-1]["step"],
        "seconds": round(sum(metrics["seconds"].values()), 3),
        "run": run.folder.relative_to(folder).as_posix(),
    }


def _gains(run: Run, metrics: Mapping[str, Any]) -> dict[str, float]:
    """How much nearer to its teachers the student is than each control; see `study_numbers.GAINS`."""
    found = {f"agreement_over_{name}": d["agreement"]["value"] for name, d in metrics["differences"].items()}
    analyses = {name: run.path("analysis") / f"{name}.json" for name in ("surface", "features")}
    made = {name: files.read_json(path) for name, path in analyses.items() if path.is_file()}
    for name, (analysis, measure) in _LIKENESS.items():
        if analysis in made:
            gained = gains({"metrics": metrics, **made}, measure)
            found |= {f"{name}_over_{control}": gain["value"] for control, gain in gained.items()}
    return {name: value for name, value in found.items() if value is not None}


def _curve(run: Run, point: Point, seed: int) -> list[dict[str, Any]]:
    """Lines of curves.csv: validation measures by epoch; losses as percentages of their maximum, too."""
    history = [row for row in run.history() if row["network"] == "student"]
    rows = []
    for measure in _CURVES:
        values = [row["val"].get(measure) for row in history]
        highest = max((value for value in values if value is not None), default=1) or 1
        for row, value in zip(history, values, strict=True):
            if value is not None:
                rows.append(
                    {
                        "point": point.name,
                        **{name: shown(setting) for name, setting in point.settings.items()},
                        "seed": seed,
                        "epoch": row["epoch"],
                        "step": row["step"],
                        "measure": measure,
                        "value": value,
                        "percent": 100 * value / (1 if measure == "accuracy" else highest),
                    }
                )
    return rows


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, buffer.getvalue())


def _numbers(
    options: StudyOptions, points: Mapping[str, Point], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    baselines = {name: point.baseline for name, point in points.items()}
    known = [name for name in MEASURES if all(name in row for row in rows)]
    summary = summarise_points(rows, baselines, known)
    dimensions = list(dict.fromkeys(name for point in points.values() for name in point.settings))
    measures = [name for name in options.measures if name in known]
    lost = [name for name in options.measures if name not in known]
    asked = [row for row in rows if points[row["point"]].on_grid]
    found = {m: effects_of(asked, dimensions, m) for m in measures[:1]}
    effects = {d: {m: by_dimension[d] for m, by_dimension in found.items()} for d in dimensions}
    against = {LABELS: "labels alone", "none": ""}.get(str(options.baseline), f"{shown(options.baseline)}")
    return {
        "question": options.question,
        "against": against,
        "measures": measures,
        "dimensions": dimensions,
        "settings": {name: {k: shown(v) for k, v in p.settings.items()} for name, p in points.items()},
        "baselines": baselines,
        "order": list(summary),
        "points": summary,
        "missing": [name for name in points if name not in summary],
        "chosen": best_on_validation(summary),
        "effects": effects,
        "sentences": sentences(summary, baselines, effects, against, measures)
        + [f"{MEASURES[name][0]}: left out, as some runs have none." for name in lost],
    }


def _draw(
    folder: Path,
    numbers: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    drawn = {"curves": draw_curves(folder / "curves.png", curves, numbers)}
    for measure in numbers["measures"]:
        drawn[measure] = draw_measure(folder / f"{measure}.png", measure, numbers)
    return drawn
