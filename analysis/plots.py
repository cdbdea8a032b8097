"""Pictures: numbers in, PNG files out; nothing is computed here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_kd import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110
_MORE_SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Noto Sans JP",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)
"""Fonts for names that the usual one cannot write, where one of them is installed."""


@contextmanager
def picture(path: Path, width: float, height: float, style: str = "white") -> Iterator[Figure]:
    """An empty figure of that size in inches, written as PNG to `path` at the end of the block.

    A name such as x$\\frac$ stays text; a character that no font here can write becomes a box. No global
    state of matplotlib is touched.
    """
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    settings = {**sns.axes_style(style), "text.parse_math": False, "font.family": ["sans-serif", *_fonts()]}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI)
    files.write_bytes(path, buffer.getvalue())


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _MORE_SCRIPTS if name in installed]


def draw_heat_maps(matrices: Mapping[str, np.ndarray], names: Sequence[str], path: Path) -> None:
    """Square matrices side by side, colours fixed to 0–1, into a PNG at `path`."""
    shown = [shorten(name, 20) for name in names]
    side, margin = 0.42 * len(names) + 0.4, 0.08 * max(map(len, shown)) + 0.2
    # A title is wider than two or three squares.
    side = max(side, 0.075 * max(map(len, matrices)))
    with picture(path, len(matrices) * side + margin + 0.9, side + margin + 0.3) as figure:
        axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for axis, (title, values) in zip(axes, matrices.items(), strict=True):
            heat_map(axis, values, shown, vmin=0, vmax=1, cmap="magma", annot=True, fmt=".2f")
            axis.set_title(title, fontsize=10)
        figure.colorbar(axes[-1].collections[0], ax=axes, fraction=0.03, pad=0.01)


def heat_map(axis: Axes, values: np.ndarray, labels: Sequence[str], **options: Any) -> None:
    """A square matrix with its labels on both sides; a cell without a number is left empty."""
    import seaborn as sns

    sns.heatmap(
        values,
        square=True,
        cbar=False,
        xticklabels=labels,
        yticklabels=labels,
        annot_kws={"fontsize": 7},
        ax=axis,
        **options,
    )
    axis.tick_params(axis="x", rotation=90, labelsize=8)
    axis.tick_params(axis="y", rotation=0, labelsize=8)


def shorten(name: str, length: int = 30) -> str:
    """A name on one line, cut in the middle, so that its beginning and its end can still be told."""
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def label(name: str, roles: Mapping[str, str]) -> str:
    """The name of a model, with its role where the name does not say it."""
    return f"{roles[name]} {name}" if roles[name] in ("control", "teacher") else name
