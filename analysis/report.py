"""One page that says what a run shows, with every number and picture of its analyses."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ensemble_kd import __version__, files
from ensemble_kd.analysis.gather import ANALYSES, Gathering, Pictures
from ensemble_kd.analysis.options import ReportOptions
from ensemble_kd.analysis.page import page
from ensemble_kd.analysis.sections import lead, sections
from ensemble_kd.analysis.seeds import groups
from ensemble_kd.analysis.studies import StudyResult, summarise
from ensemble_kd.analysis.verdict import over_seeds
from ensemble_kd.config import resolve
from ensemble_kd.console import progress
from ensemble_kd.errors import ConfigError, RunError
from ensemble_kd.runs import RUNS, Run
from ensemble_kd.teachers.ensemble import Teacher


@dataclass(frozen=True)
class Report:
    """A report that was written; `numbers` is what report.json holds."""

    folder: Path
    numbers: dict[str, Any]

    @property
    def page(self) -> Path:
        """The HTML file."""
        return self.folder / "index.html"

    def table(self) -> str:
        """What the report says first, in plain words."""
        lines = []
        for run in self.numbers["runs"]:
            lines.append(f"{run['name']}: {run['metrics']['data']}, {run['metrics']['n']:,} test images")
            for finding in run["findings"]:
                lines += [f"  {finding['question']}", *(f"    {line}" for line in finding["sentences"])]
            lines.append("")
        said = [line for group in self.numbers["groups"] for line in group["sentences"]]
        return "\n".join([*lines, *said]).strip()


def report(
    runs: str | Path | Sequence[str | Path] | None = None,
    *,
    teachers: Sequence[Teacher] = (),
    config_file: str | Path | None = None,
    sets: Sequence[str] = (),
    **options: Any,
) -> Report | StudyResult:
    """Write a report on one run, on several side by side, or on a study: one HTML file that needs nothing else.

    Analyses that are missing are made first. One that is there is read, unless it is a quick one and this
    report is not, or was made with other `images` or another `seed` than are given here. What cannot be
    made is left out, and the report says why.

    Args:
        runs: run folders, or one folder of a study; the newest finished run where none is named.
        teachers: of runs that were given them as objects, the same objects.
        config_file: YAML with any of the options.
        sets: assignments such as `"quick=true"`.
        options: the other fields of `ReportOptions`.

    Returns:
        Folder and numbers. index.html, and report.json with all numbers of the page, are written to
        `report/` in the run, to a new folder in runs/ for several runs, or to `out`.

    Raises:
        RunError: a run is missing, did not finish, or is none of `ekd distill`; or nothing can be written.
        ConfigError: a run is named twice.
    """
    named = [runs] if isinstance(runs, (str, Path)) else runs
    given = {**options, "runs": None if named is None else [str(run) for run in named]}
    chosen = resolve(ReportOptions, given, file=Path(config_file) if config_file else None, sets=sets)
    if len(chosen.runs) == 1 and (chosen.runs[0] / "study.yaml").is_file():
        return summarise(chosen.runs[0])  # what a study can say lies in its runs
    opened = _opened(chosen.runs)
    folder = chosen.out or _folder_for(opened)
    gatherings = [
        Gathering(run, name, chosen, _analyses(run, chosen, number if len(opened) > 1 else 0), teachers)
        for number, (name, run) in enumerate(opened.items(), start=1)
    ]
    for place in (folder, *(gathering.folder for gathering in gatherings)):
        _make_folder(place)
    with progress("report", len(gatherings) * len(ANALYSES)) as advance:
        told = [gathering.numbers(advance) for gathering in gatherings]
    return _write(folder, told, [gathering.pictures for gathering in gatherings], chosen)


def _write(
    folder: Path, told: Sequence[dict[str, Any]], pictures: Sequence[Pictures], options: ReportOptions
) -> Report:
    """report.json and the page, from what is told of each run."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(
        folder / "report.json",
        {
            "created": created,
            "version": __version__,
            "command": shlex.join(sys.argv),
            "settings": {"quick": options.quick, "images": options.images, "seed": options.seed},
            "runs": told,
            "groups": [{**group, "sentences": over_seeds(group)} for group in groups(told)],
        },
    )
    # The page is made of what is in the file, so that the two cannot differ.
    numbers = files.read_json(folder / "report.json")
    title = f"Distillation report: {', '.join(run['name'] for run in numbers['runs'])}"
    foot = f"Made {created} by ensemble-kd {__version__}. report.json beside this page holds all its numbers."
    files.write_text(folder / "index.html", page(title, lead(numbers), sections(numbers, pictures), foot))
    return Report(folder, numbers)


def _opened(folders: Sequence[Path]) -> dict[str, Run]:
    """The runs by name: that of the folder, or its path where two have the same name."""
    if not folders:
        newest = Run.newest()
        return {newest.folder.name: newest}
    for path, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            raise ConfigError(
                f"runs: {path} is named {count} times", "each run is one column", "name it once"
            )
    runs = [Run.open(folder) for folder in folders]
    names = Counter(run.folder.resolve().name for run in runs)
    return {
        str(run.folder) if names[run.folder.resolve().name] > 1 else run.folder.resolve().name: run
        for run in runs
    }


def _folder_for(runs: dict[str, Run]) -> Path:
    if len(runs) > 1:
        return RUNS / f"report-{datetime.now():%Y%m%d-%H%M%S}"
    return next(iter(runs.values())).path("report")


def _analyses(run: Run, options: ReportOptions, number: int) -> Path:
    """Where analyses that are missing are made: with the run, or all in the folder that the user named."""
    if options.out is None:
        return run.path("analysis")
    return options.out / (f"analysis-{number}" if number else "analysis")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}", str(error.strerror), "name another folder: --out PATH"
        ) from error
    if not os.access(folder, os.W_OK):
        raise RunError(f"cannot write to {folder}", "it is read-only", "name another folder: --out PATH")
