"""The table of a mixed state's rounding says what rounding does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import mixed_rounding


def part(row: dict[str, object], name: str) -> float:
    return float(str(row[name]).rstrip("%"))


def test_rewards_grow_with_the_weight_and_rounding_does_not() -> None:
    rows = mixed_rounding.measure(rows=64, width=128, vocabulary=200)
    assert [row["weight"] for row in rows] == list(mixed_rounding.WEIGHTS)
    rewards = [part(row, "reward") for row in rows]
    assert rewards == sorted(rewards)
    # a bfloat16 number has 8 bits, so that an element is off by up to 1/512 of itself, whatever the weight
    errors = [part(row, "error, one") for row in rows]
    assert max(errors) < 10 * min(errors) and min(errors) > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_two_products_keep_what_one_loses(seed: int) -> None:
    for row in mixed_rounding.measure(rows=64, width=128, vocabulary=200, seed=seed):
        assert part(row, "error, two") < 0.05 * part(row, "error, one")
        assert part(row, "of the reward, two") < 2 and part(row, "wrong sign, two") < 5


def test_the_script_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed_rounding.main(["--quick", "--out", str(tmp_path / "table")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv"}
    assert "of the reward, one" in capsys.readouterr().out
