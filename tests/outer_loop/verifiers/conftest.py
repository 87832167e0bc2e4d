"""A tiny model directory and right and wrong completions, which the verifiers' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.outer_loop.verifiers.tiny import write_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend more time waking threads than computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model directory."""
    return write_model(tmp_path_factory.mktemp("base"))
