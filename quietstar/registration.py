"""transformers' Auto classes know the thinking model, whichever of the two packages is imported first.

`AutoConfig.register` and `AutoModelForCausalLM.register` need our classes, and so torch and transformers. Each is
called by the module of ours that defines the class, which is imported as soon as the module of transformers that
defines the Auto class has been: now, or when somebody imports it. This relies on no more than the names of those two
modules, and on their being files. `quietstar.model` imports the later one before any module of its own, so that it is
never imported, and ours with it, while one of ours is half imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

FOLLOWERS = {
    "transformers.models.auto.configuration_auto": "quietstar.model.configuration",
    "transformers.models.auto.modeling_auto": "quietstar.model.modeling",
}
"""The module that registers, by the one that it registers with."""


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        import_module(FOLLOWERS[module.__name__])


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FOLLOWERS:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(fullname, found.loader.path)
        return found


def register() -> None:
    """Registers what can be registered now, and sees to the rest. Calling it again changes nothing."""
    for module, follower in FOLLOWERS.items():
        if module in sys.modules:
            import_module(follower)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
