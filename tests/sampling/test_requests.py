"""Seeds, batches and the limits of a prompt."""

from __future__ import annotations

import pytest

from quietstar.errors import DataError
from quietstar.sampling.requests import Request, batches_by_length, check_lengths, sample_seed


def test_every_sample_has_a_seed_of_its_own() -> None:
    parts = [
        (seed, iteration, problem, sample, hinted)
        for seed in (0, 1)
        for iteration in (1, 11)
        for problem in ("1", "11", "1,1", 1)
        for sample in range(12)
        for hinted in (False, True)
    ]
    seeds = [sample_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [sample_seed(*part) for part in parts]


def test_a_seed_stays_what_it_is() -> None:
    """Stored samples name their seeds: another way to derive them would make all of them wrong."""
    assert sample_seed(0, 1, "gsm8k-7", 3, True) == 6978394797832992589


def test_batches_hold_prompts_of_similar_length_and_equal_ones_together() -> None:
    prompts = [(1, 2), (1,), (1, 3), (1, 2), (4, 5, 6), (1, 3)]
    assert batches_by_length(prompts, 4) == [[1, 0, 3, 2], [5, 4]]


def test_a_prompt_that_just_fits_and_one_that_does_not() -> None:
    request = Request("...", 0, "problem 7")
    check_lengths([request], [range(54)], 10, 64)
    check_lengths([request], [range(1000)], 10, None)
    with pytest.raises(DataError, match=r"problem 7: its prompt of 55 tokens and the 10 of .* context of 64"):
        check_lengths([request], [range(55)], 10, 64)
    with pytest.raises(DataError, match="problem 7: the prompt has no tokens"):
        check_lengths([request], [[]], 10, 64)
