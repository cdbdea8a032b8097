"""`ekd analyze-calibration`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import CalibrationOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = ("run", "models", "quick", "images", "bins", "data", "data_root", "split", "image_size", "seed",
          "device", "offline", "out")  # fmt: skip


@verb(CalibrationOptions, _FLAGS, arguments=["run"])
def analyze_calibration(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Compare how well the confidence of student, controls, teachers and ensemble can be trusted."""
    from ensemble_kd.analysis.calibration import analyze_calibration as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(
        f"\npicture and numbers: {result.folder / 'calibration-reliability.png'}, calibration.json",
        file=sys.stderr,
    )
