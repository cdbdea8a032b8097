"""Pictures: numbers in, PNG files out; nothing is computed here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble_kd import files

if TYPE_CHECKING:
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
    import seaborn as sns

    shown = [shorten(name) for name in names]
    side = 1.8 + 0.75 * len(names) + 0.08 * max(map(len, shown))
    with picture(path, side * len(matrices) + 1, side) as figure:
        axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axis, (title, values) in zip(axes, matrices.items(), strict=True):
            sns.heatmap(
                values,
                vmin=0,
                vmax=1,
                cmap="magma",
                annot=True,
                fmt=".2f",
                square=True,
                xticklabels=shown,
                yticklabels=shown,
                ax=axis,
            )
            axis.set_title(title)
            axis.tick_params(axis="x", rotation=45)


def shorten(name: str, length: int = 30) -> str:
    """A name on one line, cut in the middle, so that its beginning and its end can still be told."""
    name = "".join(character if character.isprintable() else "\ufffd" for character in name)
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


def label(name: str, roles: Mapping[str, str]) -> str:
    """The name of a model, with its role where the name does not say it."""
    return f"{roles[name]} {name}" if roles[name] in ("control", "teacher") else name
