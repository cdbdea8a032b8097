"""What several runs in one process have in common: made once, then kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """Keeps what is made, by the facts that it depends on; a new one for each run shares nothing."""

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        """Whether each run draws its own curves."""
        self._kept: dict[str, Any] = {}

    def once(self, make: Callable[[], T], *facts: object) -> T:
        """What `make` gives; made again only where one of the facts prints otherwise."""
        key = repr(facts)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
