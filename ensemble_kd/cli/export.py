"""`ekd export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_kd.cli.options import emit, hint_next, verb
from ensemble_kd.deploying import ExportOptions

_FLAGS = ("run", "format", "out", "with_preprocess", "int8", "offline", "overwrite")


@verb(ExportOptions, _FLAGS, arguments=["run"])
def export(given: dict[str, Any], config: Path | None, sets: list[str], as_json: bool) -> None:
    """Write a run's student as a folder that others can load, with a model card, checked before it is written."""
    from ensemble_kd.exporting import export as run

    result = run(given.pop("run", None), config_file=config, sets=sets, **given)
    checked = result.checked
    same = "the same" if checked["argmax_identical"] else "NOT the same"
    text = (
        f"{result.folder}\n{checked['images']} {checked['of']}: logits differ by at most "
        f"{checked['max_difference']:g}, the likeliest class is {same}"
    )
    if eight := result.config["ensemble_kd"].get("int8"):
        before, after = (100 * eight[f"accuracy_{when}"]["value"] for when in ("before", "after"))
        text += f"\nin eight bits: accuracy {after:.2f} %, before {before:.2f} %"
    emit(as_json, {"folder": str(result.folder), **result.config["ensemble_kd"]}, text)
    hint_next(["ekd", "predict", result.folder, "IMAGE.jpg"], ["ekd", "verify", result.folder])
