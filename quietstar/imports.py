"""How the package imports: names on first use, registration with transformers without importing it, quiet libraries.

`lazy_names` makes a package import its names when they are used (PEP 562), so that importing the package costs nothing.

`register` makes the thinking model known to transformers' Auto classes, whichever package is imported first.
`AutoConfig` learns of `QuietStarConfig` as soon as the module that defines `AutoConfig` has been imported: at once, or
later, so that `import quietstar` does not import transformers. `AutoModelForCausalLM` learns of the model in
`quietstar.model.modeling`, which the first `QuietStarConfig` imports; no Auto class makes a model without one. Code
that runs within an import must not wait for that import, in any thread, so `quietstar.model.configuration` imports
nothing that imports the Auto classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

DEFINES_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the functions `__getattr__` and `__dir__` of a package, which has its modules as attributes too.

    Args:
        package: `__name__` of the package.
        homes: Names of the package by the module that defines them; the package's `if TYPE_CHECKING:` block says the
            same to a type checker.
    """
    module = sys.modules[package]
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home_of:
            value = getattr(import_module(home_of[name]), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)  # from now on found without this function
        return value

    return get, lambda: sorted({*vars(module), *home_of})


class _Finder(MetaPathFinder):
    """Finds the module that defines `AutoConfig` in the usual way, and registers after the module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DEFINES_AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register_with(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # of this loader alone
        return spec


def _register_with(module: ModuleType) -> None:
    config = import_module("quietstar.model.configuration").QuietStarConfig
    module.AutoConfig.register(config.model_type, config, exist_ok=True)


def register() -> None:
    """Registers `QuietStarConfig` now, or as soon as `AutoConfig` is defined. A second call changes nothing."""
    if DEFINES_AUTO_CONFIG in sys.modules:
        _register_with(import_module(DEFINES_AUTO_CONFIG))
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def without_bitsandbytes_warnings() -> Iterator[None]:
    """Silences bitsandbytes within this context: without a GPU it warns of kernels, even where peft imports it."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
