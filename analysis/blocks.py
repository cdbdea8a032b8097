"""What sections of the report share: pictures of an analysis, and what stands where one is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ensemble_kd.analysis.page import Child, figure, tag

Numbers = Mapping[str, Any]
Pictures = Mapping[tuple[str, str], bytes]
"""PNG files by analysis and key."""
Rows = list[list[Child]]
POINTS = (100, 1, "", "+")
SHARE = (100, 1, " %")
"""Scale, digits, unit and sign of differences of shares, and of shares."""
_PLACED = ("cells", "corruption", "classes", "dark", "diversity")
"""Pictures of the agreement that stand in other sections than its first."""


def shown(run: Numbers, pictures: Pictures, part: str, *keys: str) -> list[Child]:
    """Pictures of an analysis in order, those without a place of their own where no key is given."""
    about = run[part]["pictures"]
    wanted = keys or [key for key in about if key not in _PLACED]
    return [
        figure(pictures[part, key], about[key]["title"], about[key]["alt"]) for key in wanted if key in about
    ]


def needs(part: str) -> Callable[[Callable[..., list[Child]]], Callable[[Numbers, Pictures], list[Child]]]:
    """A section that tells why it is empty where an analysis is left out."""

    def decorate(build: Callable[..., list[Child]]) -> Callable[[Numbers, Pictures], list[Child]]:
        def section(run: Numbers, pictures: Pictures) -> list[Child]:
            if "left_out" in run[part]:
                return [tag("p", f"Left out: {run[part]['left_out']}.", class_="note")]
            return build(run[part], run, pictures)

        return section

    return decorate
