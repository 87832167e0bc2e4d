"""Packages whose names are imported when somebody uses them (PEP 562), so that importing the package costs nothing.

transformers' Auto classes know the thinking model, whichever of the two packages is imported first.

`AutoConfig` is told of `QuietStarConfig` as soon as the module that defines it has been imported: now, or when somebody
imports it, so that `import quietstar` need not bring transformers. `AutoModelForCausalLM` is told of the model where
that is defined, which the first `QuietStarConfig` imports: no Auto class gets at a model without one.

What is imported within another import must never wait for that one, in whatever thread: `quietstar.model.configuration`
imports nothing that imports the Auto classes.

Libraries that say more on import than their users want to read.
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


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, which has its modules as attributes too.

    Args:
        package: Its `__name__`.
        homes: Names by the module that defines them; the package's `if TYPE_CHECKING:` block says the same to a type
            checker.
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
        setattr(module, name, value)  # found without this function from now on
        return value

    return get, lambda: sorted({*vars(module), *home_of})


DEFINES_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


class _Finder(MetaPathFinder):
    """Finds the one module as everybody does, and registers when it has been run."""

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
    """Registers now, or sees to it. Calling it again changes nothing."""
    if DEFINES_AUTO_CONFIG in sys.modules:
        _register_with(import_module(DEFINES_AUTO_CONFIG))
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def without_bitsandbytes_warnings() -> Iterator[None]:
    """Without a GPU bitsandbytes warns about kernels for 4-bit models, also when it is peft that imports it."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
