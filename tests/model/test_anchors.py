"""Which positions think."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quietstar.errors import ConfigError, DataError
from quietstar.model.anchors import expand_anchors
from tests.model.tiny import make_ids, make_model

FULL = torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize("anchors", [None, "all"])
def test_all_positions_but_the_last(anchors: str | None) -> None:
    found = expand_anchors(anchors, FULL, None, 2)
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2


def test_a_text_of_one_token_still_has_an_anchor() -> None:
    assert expand_anchors(None, FULL[:, :1], None, 1).tolist() == [[0], [0]]


@pytest.mark.parametrize(("step", "wanted"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3]), (50, [0])])
def test_every_nth(step: int, wanted: list[int]) -> None:
    assert expand_anchors(f"every:{step}", FULL, None, 1).tolist() == [wanted] * 2


def test_every_nth_counts_from_the_text_and_not_from_the_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool()
    assert expand_anchors("every:3", mask, None, 1).tolist() == [[2, 5], [1, 4]]


@given(st.integers(2, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 6))
def test_padding_does_not_move_every_nth(length: int, left: int, right: int, step: int) -> None:
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    plain = expand_anchors(f"every:{step}", mask[:, left : left + length], None, 1)[0].tolist()
    padded = expand_anchors(f"every:{step}", mask, None, 1)[0].tolist()
    assert padded == sorted(padded)
    assert [a - left for a in padded if left <= a < left + length - 1] == plain


def test_the_most_uncertain_positions() -> None:
    entropy = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 5.0], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 5.0]])
    assert expand_anchors("entropy:3", FULL, entropy, 1).tolist() == [[1, 3, 5], [0, 1, 2]]
    assert expand_anchors("entropy:0.5", FULL, entropy, 2).tolist() == [[1, 1, 3, 3, 5, 5], [0, 0, 1, 1, 2, 2]]
    assert expand_anchors("entropy:0.01", FULL, entropy, 1).tolist() == [[1], [0]]
    assert expand_anchors("entropy:100", FULL, entropy, 1).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_uncertainty_about_padding_does_not_count() -> None:
    """The last token of a text that ends early predicts padding."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]).bool()
    entropy = torch.tensor([[0.1, 0.2, 0.3, 9.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 0.1, 0.2, 0.3, 9.0]])
    assert expand_anchors("entropy:2", mask, entropy, 1).tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize("family", ["mistral", "cohere"])
def test_entropy_is_that_of_the_base_prediction(family: str) -> None:
    model = make_model(family)
    ids = make_ids(2, 9)
    probability = model.base(ids).logits.softmax(-1)
    entropy = -(probability * probability.log()).sum(-1)[:, :-1]
    wanted = entropy.topk(3, dim=1).indices.sort(dim=1).values
    assert torch.equal(model.think(ids, anchors="entropy:3", thoughts_per_position=1).anchor.long(), wanted)


def test_given_positions_are_sorted_and_repeated() -> None:
    assert expand_anchors(torch.tensor([4, 1]), FULL, None, 2).tolist() == [[1, 1, 4, 4]] * 2
    assert expand_anchors(torch.tensor([[6, 1], [0, 0]]), FULL, None, 1).tolist() == [[1, 6], [0, 0]]


@pytest.mark.parametrize("anchors", ["", "all:", "every:0", "entropy:2.0"])
def test_what_the_options_refuse_is_refused_here(anchors: str) -> None:
    with pytest.raises(ConfigError, match=r"positions: got .*, needs all, every:N"):
        expand_anchors(anchors, FULL, None, 1)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (torch.tensor([0, 7]), r"anchors: got 0\.\.7, needs positions in the text, 0\.\.6"),
        (torch.tensor([-1, 3]), r"anchors: got -1\.\.3"),
        (torch.tensor([0.0, 1.0]), r"anchors: got torch\.float32"),
        (torch.tensor([True, False]), r"anchors: got torch\.bool"),
        (torch.zeros(3, 2, dtype=torch.int64), r"shape \[3, 2\], needs integers \[A\] or \[2, A\]"),
        (torch.tensor(3), r"shape \[\]"),
    ],
)
def test_anchors_that_do_not_fit(anchors: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_anchors(anchors, FULL, None, 1)
