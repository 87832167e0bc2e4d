"""A tiny model directory and right and wrong completions, which the verifiers' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verifiers.tiny import write_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model directory."""
    return write_model(tmp_path_factory.mktemp("base"))
