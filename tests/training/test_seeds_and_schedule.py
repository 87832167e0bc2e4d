"""Seeds and learning rates are pure functions of the step."""

from __future__ import annotations

import pytest

from quietstar.training.schedule import learning_rate
from quietstar.training.step import _split_mix_64, module_seed, thought_seed
from tests.training.helpers import options


def test_seeds_of_neighbouring_micro_batches_are_all_different() -> None:
    places = [(seed, step, micro) for seed in range(3) for step in range(1, 40) for micro in range(5)]
    seeds = [thought_seed(seed, step) for seed, step, micro in places if micro == 0]
    seeds += [module_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert thought_seed(1, 2) != thought_seed(2, 1)


def test_seeds_spread_over_all_bits() -> None:
    """A weak mix would leave the high bits of small inputs at zero, and generators seeded alike start alike."""
    seeds = [thought_seed(0, step) for step in range(1, 2001)]
    for bit in range(63):
        assert 850 < sum(seed >> bit & 1 for seed in seeds) < 1150, bit


def test_seeds_never_change() -> None:
    """The thoughts of a run must be reproducible with a later version: SplitMix64's published first value, and ours."""
    assert _split_mix_64(1234567) == 6457827717110365317
    assert thought_seed(0, 1) == 7557061629226788251
    assert module_seed(7, 100, 3) == 2766498200499762912


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_is_linear_and_reaches_the_peak(schedule: str) -> None:
    given = options(schedule=schedule, learning_rate=0.4, warmup_steps=4, steps=12)
    assert [learning_rate(step, given) for step in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 0.4, 0.4), ("linear", 0.22, 0.04), ("cosine", 0.22, 0.04)]
)
def test_schedule_after_the_warmup(schedule: str, middle: float, last: float) -> None:
    given = options(schedule=schedule, learning_rate=0.4, warmup_steps=4, steps=12, final_learning_rate_fraction=0.1)
    assert learning_rate(8, given) == pytest.approx(middle, rel=1e-12)
    assert learning_rate(12, given) == pytest.approx(last, rel=1e-12)
    assert learning_rate(13, given) == pytest.approx(last, rel=1e-12)
    rates = [learning_rate(step, given) for step in range(4, 13)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_flat_at_both_ends_and_linear_is_not() -> None:
    given = {"learning_rate": 1.0, "warmup_steps": 0, "steps": 100, "final_learning_rate_fraction": 0.0}
    cosine = [learning_rate(step, options(schedule="cosine", **given)) for step in (0, 1, 99, 100)]
    linear = [learning_rate(step, options(schedule="linear", **given)) for step in (0, 1, 99, 100)]
    assert linear == pytest.approx([1.0, 0.99, 0.01, 0.0])
    assert cosine[0] - cosine[1] < 1e-3
    assert cosine[2] - cosine[3] < 1e-3


def test_runs_without_warmup_and_runs_that_are_all_warmup() -> None:
    assert learning_rate(1, options(schedule="constant", learning_rate=0.4, warmup_steps=0)) == 0.4
    assert learning_rate(3, options(learning_rate=0.4, warmup_steps=6, steps=3)) == pytest.approx(0.2)
    assert learning_rate(6, options(learning_rate=0.4, warmup_steps=6, steps=6)) == pytest.approx(0.4)
