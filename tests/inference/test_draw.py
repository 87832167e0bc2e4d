"""Random streams and the tokens that they pick."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.model.draw import draw, likeliest, uniforms

MASK = 2**64 - 1


def splitmix(bits: int) -> int:
    """The finalizer in plain integers."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 40))
def test_a_stream_is_splitmix_in_exact_integers(seed: int, index: int) -> None:
    bits = splitmix((splitmix(seed) + (index + 1) * 0x9E3779B97F4A7C15) & MASK)
    assert float(uniforms([7, seed], 41)[1, index]) == (bits >> 11) / 2**53


def test_streams_of_neighbouring_seeds_are_uniform_and_unrelated() -> None:
    numbers = uniforms(range(200), 500)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 86  # 99.9 % of chi-squared with 49 degrees of freedom
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.25  # 5.6 standard deviations of one of 20,000
    assert numbers.flatten().unique().numel() == numbers.numel()


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 2.0])
    count = 20_000
    token, logprob = draw(logits.expand(count, -1), uniforms(range(count), 1)[:, 0], temperature=2.0)
    found = token.bincount(minlength=5) / count
    torch.testing.assert_close(found, torch.softmax(logits / 2, -1), atol=0.012, rtol=0)
    assert found[3] == 0
    torch.testing.assert_close(logprob, torch.log_softmax(logits, -1)[token])  # of the model itself, not tempered


def test_the_ends_of_the_stream_pick_the_ends_of_the_distribution() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    token, _ = draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), temperature=1.0)
    assert token.tolist() == [1, 2]


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    token, logprob = draw(logits, torch.zeros(4, dtype=torch.float64), temperature=0.0)
    assert torch.equal(token, logits.argmax(-1))
    assert logprob.dtype == torch.float32


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.501, 2), (0.75, 2), (0.875, 3)])
def test_a_share_that_is_reached_exactly_needs_no_more_tokens(top_p: float, kept: int) -> None:
    filtered = likeliest(torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]]), 0, top_p)
    assert int((filtered > 0).sum()) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 1.0, 5), (2, 1.0, 2), (9, 1.0, 5), (0, 0.5, 2), (0, 0.39, 1), (0, 1e-9, 1), (3, 0.7, 2), (0, 0.96, 5)],
)
def test_filters(top_k: int, top_p: float, kept: int) -> None:
    probability = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.4, 0.1, 0.2, 0.25, 0.05]])
    filtered = likeliest(probability, top_k, top_p)
    for row, before in zip(filtered, probability, strict=True):
        survivors = set(before.argsort(descending=True)[:kept].tolist())
        assert set(row.nonzero().flatten().tolist()) == survivors
    assert torch.equal(filtered[filtered > 0], probability[filtered > 0])
