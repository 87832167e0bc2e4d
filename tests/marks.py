"""A mark for single cases of a parametrised test."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that .ci/run tests, and `pytest` alone does not: others of its kind are enough to see that it works."""
    return pytest.param(*values, marks=pytest.mark.slow)
