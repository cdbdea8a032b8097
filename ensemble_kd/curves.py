"""The curves of a run: accuracy, and the two losses as percentages of their maximum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble_kd import files

_PANELS = {
    "accuracy": "accuracy",
    "loss": "loss, % of its maximum",
    "teacher_student_cross_entropy": "teacher–student CE, % of its maximum",
}


def curve_table(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `network`, `split`, `step`, `measure`, `value`; losses as percentages of their maximum.

    The maximum is taken over one network's curve on one split.
    """
    rows = [
        {
            "network": row["network"],
            "split": split,
            "step": row["step"],
            "measure": name,
            "value": row[split][name],
        }
        for row in history
        for split in ("train", "val")
        for name in _PANELS
        if name in row[split]
    ]
    highest: dict[tuple[Any, ...], float] = {}
    for row in rows:
        curve = (row["network"], row["split"], row["measure"])
        highest[curve] = max(highest.get(curve, 0.0), row["value"])
    for row in rows:
        maximum = highest[row["network"], row["split"], row["measure"]]
        row["percent"] = row["value"] if row["measure"] == "accuracy" else 100 * row["value"] / (maximum or 1)
    return rows


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the curves of all networks in `history` into a PNG at `path`."""
    import io

    import matplotlib as mpl
    import pandas as pd
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = pd.DataFrame(curve_table(history))
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    with mpl.rc_context({**sns.axes_style("whitegrid"), "text.parse_math": False}):
        for axis, (name, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
            part = table[table["measure"] == name]
            if not part.empty:
                sns.lineplot(part, x="step", y="percent", hue="network", style="split", ax=axis)
            axis.set(title=title, xlabel="iterations", ylabel="")
            if name != "accuracy" and axis.get_legend():
                axis.get_legend().remove()  # one legend serves all panels
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    files.write_bytes(path, buffer.getvalue())
