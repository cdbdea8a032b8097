"""`ekd analyze-surface`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import SurfaceOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = (
    "run",
    "models",
    "data",
    "data_root",
    "split",
    "image_size",
    "triplets",
    "points",
    "quick",
    "seed",
    "device",
    "offline",
    "out",
)


@verb(SurfaceOptions, _FLAGS, arguments=["run"])
def analyze_surface(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Compare how student, controls, teachers and ensemble divide planes through test images."""
    from ensemble_kd.analysis.surface import analyze_surface as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    files = ", ".join(picture["file"] for picture in result.numbers["pictures"].values())
    print(f"\npictures and numbers in {result.folder}: {files}, surface.json", file=sys.stderr)
