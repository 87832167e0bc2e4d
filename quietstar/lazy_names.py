"""Packages whose names are imported when somebody uses them (PEP 562), so that importing the package costs nothing."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    What they import from where is read from the package's own `if TYPE_CHECKING:` block, which a type checker reads
    too: it is said once.

    Args:
        package: Its `__name__`.
    """
    module = sys.modules[package]
    homes = {
        name.name: statement.module
        for block in ast.parse(inspect.getsource(module)).body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module is not None
        for name in statement.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)  # found without this function from now on
        return value

    return get, lambda: sorted({*vars(module), *homes})
