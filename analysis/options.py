"""The options of the analyses, each described once (see `schema`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ensemble_kd.fields import Count, Names
from ensemble_kd.schema import DataOptions


class AnalysisOptions(DataOptions):
    """What all analyses have in common. What is left out depends on `quick`."""

    run: Path | None = Field(None, description="run folder; the newest finished one where none is named")
    models: Names = Field([], description="instead of a run: models by name, run folder or file")
    images: Count | None = Field(
        None, description="most test images that models are run on; default 2000, quick 500"
    )
    quick: bool = Field(False, description="fewer images, planes and strengths: a first look")
    seed: int = Field(0, ge=0, description="of the bootstrap, and of which images are taken")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    out: Path | None = Field(
        None, description="folder for numbers and pictures; default analysis/ in the run"
    )

    @property
    def most_images(self) -> int:
        """`images`, as given or by default."""
        return self.images or (500 if self.quick else 2000)


class AgreementOptions(AnalysisOptions):
    """`ekd analyze-agreement`."""

    corruptions: bool = Field(True, description="also under noise, blur, contrast and brightness")


class FeaturesOptions(AnalysisOptions):
    """`ekd analyze-features`."""

    layers: Names = Field(
        [], description="patterns of layer names; default stage or block outputs, penultimate and logits"
    )
    pool: Literal["flatten", "gap", "cls"] = Field(
        "flatten", description="of maps and tokens: flatten, gap (mean over positions) or cls (first token)"
    )
    neighbours: Count = Field(10, description="k of the mutual nearest neighbours")


class SurfaceOptions(AnalysisOptions):
    """`ekd analyze-surface`."""

    triplets: Count | None = Field(None, description="planes, each through three images; default 20, quick 3")
    points: Count | None = Field(None, ge=2, description="along each side of a plane; default 50, quick 20")


class CalibrationOptions(AnalysisOptions):
    """`ekd analyze-calibration`."""

    bins: Count = Field(15, description="of the calibration errors and diagrams")


class ReportOptions(AnalysisOptions):
    """`ekd report`."""

    run: None = None
    models: list[str] = Field([], max_length=0)
    runs: list[Path] = Field([], description="run folders, side by side; the newest where none is named")
    out: Path | None = Field(
        None, description="folder for page, numbers and missing analyses; default report/ in the run"
    )
