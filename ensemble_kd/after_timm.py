"""Tell timm of the project's own networks once somebody imports it: `import ensemble_kd` alone stays light."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_MODELS = "ensemble_kd.timm_students"
"""Importing it registers them."""


class _Watch(MetaPathFinder):
    """Finds timm as others would, and has its import end in that of `_MODELS`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(_MODELS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register them now where timm is imported already, else as soon as it is."""
    if "timm" in sys.modules:
        import_module(_MODELS)
    else:
        sys.meta_path.insert(0, _Watch())
