"""Whether two mathematical expressions are the same, decided by math-verify where it is installed."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def can_compare() -> bool:
    """Whether math-verify is installed (`pip install 'quietstar[eval]'`)."""
    return find_spec("math_verify") is not None


def same_expression(gold: str, answer: str) -> bool:
    """Whether an answer equals the gold one, both in LaTeX or as plain expressions; False without math-verify.

    There is no time limit: `2003^{2002^{2001}}` takes for ever. Call it in a process that can be ended.
    """
    if not can_compare():
        return False
    math_verify: Any = import_module("math_verify")  # optional, and sympy takes a second to load
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits, by signals, are off
    expressions = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return all(expressions) and bool(math_verify.verify(*expressions, timeout_seconds=None))
