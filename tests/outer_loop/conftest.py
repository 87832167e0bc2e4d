"""A base model, and a process that runs V-STaR whenever it is asked to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quietstar import star
from tests.faults.launch import REPOSITORY, Zygote
from tests.outer_loop.loops import VERIFIER, arguments, make_base


@pytest.fixture(scope="session")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_base`."""
    return make_base(tmp_path_factory.mktemp("adder"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a V-STaR run is that nothing has happened to; `zygote` makes it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture(scope="session")
def zygote(adder: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Runs V-STaR."""
    path = [str(REPOSITORY), str(REPOSITORY / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    first = arguments(adder, whole, VERIFIER, loop__rationalize="true")
    started = Zygote(tmp_path_factory.mktemp("logs"), environment, first, command="vstar")
    yield started
    started.close()


@pytest.fixture(scope="session")
def plain(adder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations as in the paper."""
    out = tmp_path_factory.mktemp("plain")
    assert star.main(arguments(adder, out, loop__iterations=2)) == 0
    return out
