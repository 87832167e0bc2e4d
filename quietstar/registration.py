"""transformers' Auto classes know the thinking model, whichever of the two packages is imported first.

`AutoConfig.register` needs our configuration's class, and so transformers: `quietstar.model.configuration` calls it,
and is imported as soon as the module of transformers that defines `AutoConfig` has been, now or later. This relies on
no more than that module's name and on its being a file. The model's class is registered when there is a configuration:
whoever looks for the one has the other. It could not be earlier, because transformers imports its Auto classes in the
middle of modules that ours import, and ours would then be half imported themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

THEIRS = "transformers.models.auto.configuration_auto"
OURS = "quietstar.model.configuration"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import_module(OURS)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != THEIRS:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(fullname, found.loader.path)
        return found


def register() -> None:
    """Registers now if that is possible, or else sees to it. Calling it again changes nothing."""
    if THEIRS in sys.modules:
        import_module(OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
