"""`ekd analyze-agreement`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ensemble_kd.analysis.options import AgreementOptions
from ensemble_kd.cli.options import emit, verb

_FLAGS = ("run", "models", "data", "data_root", "split", "image_size", "seed", "device", "offline", "out")


@verb(AgreementOptions, _FLAGS, arguments=["run"])
def analyze_agreement(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Compare the answers of student, controls, teachers and ensemble, pair by pair."""
    from ensemble_kd.analysis.agreement import analyze_agreement as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    print(f"\npicture and numbers: {result.folder / 'agreement.png'}, agreement.json", file=sys.stderr)
