"""The one reader of `all`, `every:N` and `entropy:K`."""

from __future__ import annotations

import pytest

from quietstar.config.options import parse_positions
from quietstar.errors import ConfigError


@pytest.mark.parametrize(
    ("positions", "rule", "number"),
    [
        ("all", "all", 1),
        ("every:1", "every", 1),
        ("every:7", "every", 7),
        ("entropy:3", "entropy", 3),
        ("entropy:0.25", "entropy", 0.25),
        ("entropy:.5", "entropy", 0.5),
        ("entropy:1e-3", "entropy", 0.001),
    ],
)
def test_rules(positions: str, rule: str, number: float) -> None:
    assert parse_positions(positions) == (rule, number)


WRONG_AMOUNTS = ["", ":", ":0", ":0.0", ":-3", ":1.0", ":1.5", ":2.0", ":20e-1", ":nan", ":inf", ":2:3", ":1_0", ":x"]


@pytest.mark.parametrize(
    "positions",
    ["", " all", "some", "some:2", "all:", "all:2", "every:0.5"]
    + [rule + amount for rule in ("every", "entropy") for amount in WRONG_AMOUNTS],
)
def test_anything_else_is_refused(positions: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_positions(positions, "model.positions")
    got = repr(positions) if positions else "an empty text"
    assert str(caught.value).startswith(f"model.positions: got {got}, needs all, every:N (N at least 1), or")
