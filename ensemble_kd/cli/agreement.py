"""`ekd analyze-agreement`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_kd.cli.options import emit, hint_next, verb
from ensemble_kd.schema import AgreementOptions

_FLAGS = ("run", "models", "data", "data_root", "split", "image_size", "seed", "device", "offline", "out")


@verb(AgreementOptions, _FLAGS, arguments=["run"])
def analyze_agreement(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Compare the answers of student, controls, teachers and ensemble, pair by pair."""
    from ensemble_kd.analysis.agreement import analyze_agreement as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    emit(as_json, {"folder": str(result.folder), **result.numbers}, result.table())
    hint_next(f"open {result.folder / 'agreement.png'}", f"read {result.folder / 'agreement.json'}")
