"""Data sets that are not shipped, each read once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.tasks import Task, load_task


@pytest.fixture(scope="session")
def data() -> Path:
    if "QUIETSTAR_DATA" not in os.environ:
        pytest.skip("QUIETSTAR_DATA does not name the folder of data sets that are not shipped")
    return Path(os.environ["QUIETSTAR_DATA"])


@pytest.fixture(scope="session")
def gsm8k(data: Path) -> Task:
    return load_task("gsm8k", ProblemOptions(path=str(data / "gsm8k")))


@pytest.fixture(scope="session")
def commonsenseqa(data: Path) -> Task:
    return load_task("commonsenseqa", ProblemOptions(path=str(data / "commonsenseqa")))


@pytest.fixture(scope="session")
def math(data: Path) -> Task:
    return load_task("math", ProblemOptions(path=str(data / "math")))
