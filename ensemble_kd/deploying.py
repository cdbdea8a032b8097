"""The options of the verbs that take a run's network elsewhere, as `schema.py` has those of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ensemble_kd.errors import Problem
from ensemble_kd.fields import Count, Options


def _listed(value: Any) -> Any:
    """One path as a list of one; paths may hold commas, so they are not split."""
    return [str(value)] if isinstance(value, (str, Path)) else [str(item) for item in value]


Paths = Annotated[list[str], BeforeValidator(_listed)]


class ExportOptions(Options):
    """`ekd export`."""

    run: str = Field(description="folder of a finished run of distill or train", examples=["runs/NAME"])
    format: Literal["safetensors", "timm", "onnx", "torch"] = Field(
        "safetensors", description="safetensors, timm (a local-dir of timm), onnx or torch (a .pt2)"
    )
    out: Path | None = Field(None, description="folder to make; default RUN/export/FORMAT")
    with_preprocess: bool = Field(
        False, description="onnx, torch: put resizing and normalising inside the graph, which takes uint8"
    )
    int8: bool = Field(False, description="onnx: a second model in eight bits, and what it costs in accuracy")
    offline: bool = Field(False, description="never download anything")
    overwrite: bool = Field(False, description="replace an earlier export")

    def cross_checks(self) -> list[tuple[set[str], Problem]]:
        """See `Options.cross_checks`."""
        found = []
        for option, formats in (("with_preprocess", ("onnx", "torch")), ("int8", ("onnx",))):
            if getattr(self, option) and self.format not in formats:
                problem = Problem(
                    f"{option}: the format {self.format} has no such thing",
                    f"only {' and '.join(formats)} can have it",
                    f"say --format {formats[0]}, or leave it out",
                )
                found.append(({option, "format"}, problem))
        return found


class PredictOptions(Options):
    """`ekd predict`."""

    model: str = Field(description="run folder, exported folder or .safetensors file", examples=["runs/NAME"])
    images: Paths = Field(default=[], description="image files, or folders of them")
    top: Count = Field(5, description="how many classes to name for each image")
    csv: Path | None = Field(None, description="write the answers as CSV to this file")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
