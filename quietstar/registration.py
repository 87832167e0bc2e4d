"""transformers' Auto classes know the thinking model, whichever of the two packages is imported first.

`AutoConfig` is told of `QuietStarConfig` as soon as the module that defines it has been imported: now, or when somebody
imports it, so that `import quietstar` need not bring transformers. `AutoModelForCausalLM` is told of the model where
that is defined, which the first `QuietStarConfig` imports: no Auto class gets at a model without one.

What is imported within another import must never wait for that one, in whatever thread: `quietstar.model.configuration`
imports nothing that imports the Auto classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

DEFINES_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register_with(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DEFINES_AUTO_CONFIG:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(fullname, found.loader.path)
        return found


def _register_with(module: ModuleType) -> None:
    config = import_module("quietstar.model.configuration").QuietStarConfig
    module.AutoConfig.register(config.model_type, config, exist_ok=True)


def register() -> None:
    """Registers now, or sees to it. Calling it again changes nothing."""
    if DEFINES_AUTO_CONFIG in sys.modules:
        _register_with(import_module(DEFINES_AUTO_CONFIG))
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
