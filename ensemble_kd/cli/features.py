"""`ekd analyze-features`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import FeaturesOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = ("run", "models", "quick", "images", "layers", "pool", "neighbours", "data", "data_root", "split",
          "image_size", "seed", "device", "offline", "out")  # fmt: skip


@verb(FeaturesOptions, _FLAGS, arguments=["run"])
def analyze_features(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Compare the layers of student, controls and teachers, and say what distilling made more alike."""
    from ensemble_kd.analysis.features import analyze_features as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    files = ", ".join(row["file"] for row in result.numbers["pictures"].values())
    print(f"\nnumbers and pictures in {result.folder}: features.json, {files}", file=sys.stderr)
