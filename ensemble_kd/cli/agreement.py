"""`ekd analyze-agreement`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import AgreementOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = ("run", "models", "quick", "images", "corruptions", "data", "data_root", "split", "image_size", "seed",
          "device", "offline", "out")  # fmt: skip
_SWITCHES = {"corruptions": ("--no-corruptions", "clean images only: no model of the run is loaded")}


@verb(AgreementOptions, _FLAGS, arguments=["run"], switches=_SWITCHES)
def analyze_agreement(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """How near the student came to its teachers, beside controls; every pair; the same as images get worse."""
    from ensemble_kd.analysis.agreement import analyze_agreement as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(f"\nnumbers and pictures: {result.folder / 'agreement.json'}, agreement-*.png", file=sys.stderr)
