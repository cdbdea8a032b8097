"""`ekd report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import ReportOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = ("runs", "quick", "images", "seed", "device", "out")


@verb(ReportOptions, _FLAGS, arguments=["runs"])
def report(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Say in one HTML page what runs show: did it help, and how alike are student and teachers."""
    from ensemble_kd.analysis.report import report as run

    result = run(given.pop("runs", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(f"\nreport: {result.page}", file=sys.stderr)
