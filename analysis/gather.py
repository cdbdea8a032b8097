"""What the report tells of one run: its files, its analyses, and those that are made now as they are missing."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ensemble_kd import files
from ensemble_kd.analysis.agreement import agreement_of, analyze_agreement
from ensemble_kd.analysis.calibration import calibration_of
from ensemble_kd.analysis.features import features_of
from ensemble_kd.analysis.options import (
    AgreementOptions,
    AnalysisOptions,
    CalibrationOptions,
    FeaturesOptions,
    ReportOptions,
    SurfaceOptions,
)
from ensemble_kd.analysis.subjects import FORM, Subjects, subjects_of
from ensemble_kd.analysis.surface import surface_of
from ensemble_kd.analysis.verdict import findings
from ensemble_kd.config import read_yaml
from ensemble_kd.console import log
from ensemble_kd.errors import EkdError, RunError
from ensemble_kd.runs import Run
from ensemble_kd.teachers.ensemble import Teacher

Numbers = Mapping[str, Any]
Pictures = dict[tuple[str, str], bytes]
"""PNG files by analysis and key."""

ANALYSES: dict[str, tuple[type[AnalysisOptions], Callable[..., Any]]] = {
    "agreement": (AgreementOptions, agreement_of),
    "calibration": (CalibrationOptions, calibration_of),
    "features": (FeaturesOptions, features_of),
    "surface": (SurfaceOptions, surface_of),
}
"""The analyses: the options of each, and what makes it of models that are loaded already."""


@dataclass
class Gathering:
    """One run and what is told of it; analyses that are missing are made in `folder`."""

    run: Run
    name: str
    options: ReportOptions
    folder: Path
    teachers: Sequence[Teacher] = ()
    pictures: Pictures = field(default_factory=dict)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json of a run of `distill`.

        Raises:
            RunError: the run did not finish, or is another.
        """
        metrics = self.run.metrics()
        if "student" not in metrics["models"]:
            raise RunError(
                f"{self.run.folder} is no run of `ekd distill`",
                "it has no student and no teachers",
                f"judge it by: ekd evaluate {shlex.quote(str(self.run.folder))}",
            )
        return metrics

    def numbers(self, advance: Callable[..., None]) -> dict[str, Any]:
        """All numbers of the run; `advance` is called after each analysis."""
        found: dict[str, Any] = {
            "name": self.name,
            "folder": str(self.run.folder),
            "metrics": self.metrics,
            "config": read_yaml(self.run.path("config.yaml")),
            "manifest": self.run.manifest(),
            "training": training(self.run.history()),
        }
        for part in ANALYSES:
            found[part] = self._part(part)
            advance()
        curves = self.run.path("curves.png")
        if curves.is_file():
            self.pictures["curves", "curves"] = curves.read_bytes()
        found["fewer"] = [f"{part}: {line}" for part in ANALYSES if (line := self._fewer(found[part]))]
        return {**found, "findings": findings(found)}

    def _fewer(self, numbers: Numbers) -> str:
        """Where an analysis that was there is of fewer images than one made now would be, that it is."""
        images, wanted = numbers.get("settings", {}).get("images"), self.options.most_images
        if images is None or images >= min(wanted, self.metrics["n"]):
            return ""
        return f"made before, on {images:,} images; --images {wanted} makes it anew on more"

    def _part(self, part: str) -> dict[str, Any]:
        """An analysis that is there and fits, or one made now, or why it cannot be made."""
        for place in (self.run.path("analysis"), self.folder):
            numbers = self._read(part, place)
            if numbers is not None:
                if fewer := self._fewer(numbers):
                    log.warning("%s: %s: %s", self.name, part, fewer)
                return numbers
        start = time.perf_counter()
        try:
            self._make(part)
        except EkdError as error:
            problem = error.problems[0]
            log.warning("%s: %s is left out: %s", self.name, part, problem.what)
            return {"left_out": f"{problem.what}: {problem.why}" if problem.why else problem.what}
        log.info("%s: %s analysed in %.1f s", self.name, part, time.perf_counter() - start)
        numbers = files.read_json(self.folder / f"{part}.json")
        self._take_pictures(part, numbers, self.folder)
        return numbers

    def _read(self, part: str, place: Path) -> dict[str, Any] | None:
        """The numbers of an analysis with its pictures, if it is all there and fits."""
        path = place / f"{part}.json"
        foreign = place != self.run.path("analysis")
        try:
            numbers = files.read_json(path)
            if foreign and not self._is_of_this_run(numbers, path):
                return None
            if not fits(numbers, self.options, list(self.metrics["models"])):
                return None
            self._take_pictures(part, numbers, place)
        except (OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of an older version
            return None
        return numbers

    def _is_of_this_run(self, numbers: Numbers, path: Path) -> bool:
        """In a folder of the user's another run may have been analysed, or this one before it was replaced."""
        same = Path(numbers["source"]).resolve() == self.run.folder.resolve()
        return same and path.stat().st_mtime >= self.run.path("metrics.json").stat().st_mtime

    def _take_pictures(self, part: str, numbers: Numbers, place: Path) -> None:
        found = {
            (part, key): (place / about["file"]).read_bytes() for key, about in numbers["pictures"].items()
        }
        self.pictures |= found

    def _make(self, part: str) -> None:
        kind, make = ANALYSES[part]
        options = kind(
            run=self.run.folder,
            quick=self.options.quick,
            images=self.options.images,
            seed=self.options.seed,
            device=self.options.device,
            out=self.folder,
        )
        if isinstance(self._subjects, Subjects):
            make(self._subjects, options)
        elif part == "agreement":  # of which most is told from the predictions that the run has kept
            analyze_agreement(**{name: getattr(options, name) for name in options.model_fields_set})
        else:
            raise self._subjects

    @cached_property
    def _subjects(self) -> Subjects | EkdError:
        """The models of the run, loaded once for all analyses, or why they cannot be had."""
        try:
            options = AnalysisOptions(run=self.run.folder, device=self.options.device, out=self.folder)
            return subjects_of(options, self.teachers)
        except EkdError as error:
            return error


def fits(numbers: Numbers, options: ReportOptions, models: Sequence[str]) -> bool:
    """Whether an analysis that was made before will do for a report.

    A quick one will do for a quick report only, and `images` and `seed` must be those of the report where
    it was given any. Other settings are the user's choice, and stay.
    """
    settings = numbers["settings"]
    given = {name: getattr(options, name) for name in ("images", "seed") if name in options.model_fields_set}
    return (
        numbers.get("form") == FORM
        and list(numbers["roles"]) == list(models)
        and (options.quick or not settings["quick"])
        and all(settings.get(name, value) == value for name, value in given.items())
        and "left_out" not in numbers.get("corruption", {})
    )


def training(history: Sequence[Numbers]) -> list[dict[str, Any]]:
    """How each network was trained: `epochs`, `steps`, `seconds`, and the last `train` and `val` measures."""
    rows: dict[str, dict[str, Any]] = {}
    for row in history:
        own = rows.setdefault(row["network"], {"network": row["network"], "seconds": 0.0})
        own |= {"epochs": row["epoch"], "steps": row["step"], "train": row["train"], "val": row["val"]}
        own["seconds"] += row["seconds"]
    return list(rows.values())
