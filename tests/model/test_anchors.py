"""Which positions think."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quietstar.errors import ConfigError, DataError
from quietstar.model.padding import Padding, read_padding
from quietstar.model.thoughts import expand_anchors
from tests.model.tiny import make_ids, make_model


def rows(*masks: list[int]) -> Padding:
    """Texts with these attention masks."""
    mask = torch.tensor(masks)
    return read_padding(torch.zeros_like(mask), mask)


FULL = rows([1] * 7, [1] * 7)


@pytest.mark.parametrize("anchors", [None, "all"])
def test_all_positions_but_the_last(anchors: str | None) -> None:
    found = expand_anchors(anchors, FULL, None, 2)
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 2


def test_a_text_of_one_token_still_has_an_anchor() -> None:
    assert expand_anchors(None, rows([1], [1]), None, 1).tolist() == [[0], [0]]


@pytest.mark.parametrize(("step", "wanted"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3]), (50, [0])])
def test_every_nth(step: int, wanted: list[int]) -> None:
    assert expand_anchors(f"every:{step}", FULL, None, 1).tolist() == [wanted] * 2


def test_every_nth_counts_from_the_text_and_not_from_the_padding() -> None:
    padding = rows([0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1])
    assert expand_anchors("every:3", padding, None, 1).tolist() == [[2, 5], [1, 4]]


@given(st.integers(2, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 6))
def test_padding_does_not_move_every_nth(length: int, left: int, right: int, step: int) -> None:
    plain = expand_anchors(f"every:{step}", rows([1] * length), None, 1)[0].tolist()
    padded = expand_anchors(f"every:{step}", rows([0] * left + [1] * length + [0] * right), None, 1)[0].tolist()
    assert padded == sorted(padded)
    assert [a - left for a in padded if left <= a < left + length - 1] == plain


def test_every_nth_counts_from_the_start_of_each_document() -> None:
    padding = rows([1, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 5, 5, 0], [0, 1, 1, 1, 1, 1, 1, 1])
    assert expand_anchors("every:2", padding, None, 1).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [1, 3, 5, 7]]
    assert expand_anchors("every:3", padding, None, 2)[1].tolist() == [1, 1, 5, 5, 7, 7], "rows filled behind"


@given(st.lists(st.integers(1, 7), min_size=2, max_size=6), st.integers(2, 4), st.integers(0, 2))
def test_every_nth_of_documents_is_that_of_each_alone_as_far_as_there_is_room(
    lengths: list[int], step: int, left: int
) -> None:
    numbers = [0] * left + [number + 1 for number, length in enumerate(lengths) for _ in range(length)]
    found = expand_anchors(f"every:{step}", rows(numbers), None, 1)[0].tolist()
    assert len(found) == len(range(0, len(numbers) - 1, step)), "as many as in a row of one document"
    wanted, start = [], left
    for length in lengths:
        wanted += [start + position for position in range(0, length - 1, step)]
        start += length
    learning = [anchor for anchor in found if anchor + 1 < len(numbers) and numbers[anchor] == numbers[anchor + 1] > 0]
    if len(wanted) <= len(found):
        assert learning == wanted and all(anchor == len(numbers) - 1 for anchor in found[len(wanted) :])
    else:
        gaps = [wanted.index(b) - wanted.index(a) for a, b in pairwise(found)]
        assert learning == found and found[0] == wanted[0]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1, "evenly"


def test_the_most_uncertain_positions() -> None:
    entropy = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 5.0], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 5.0]])
    assert expand_anchors("entropy:3", FULL, entropy, 1).tolist() == [[1, 3, 5], [0, 1, 2]]
    assert expand_anchors("entropy:0.5", FULL, entropy, 2).tolist() == [[1, 1, 3, 3, 5, 5], [0, 0, 1, 1, 2, 2]]
    assert expand_anchors("entropy:0.01", FULL, entropy, 1).tolist() == [[1], [0]]
    assert expand_anchors("entropy:100", FULL, entropy, 1).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_uncertainty_about_padding_does_not_count() -> None:
    """The last token of a text that ends early predicts padding."""
    padding = rows([1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1])
    entropy = torch.tensor([[0.1, 0.2, 0.3, 9.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 0.1, 0.2, 0.3, 9.0]])
    assert expand_anchors("entropy:2", padding, entropy, 1).tolist() == [[1, 2], [4, 5]]


def test_uncertainty_about_the_next_document_does_not_count() -> None:
    padding = rows([1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 3, 4, 5, 5])
    entropy = torch.tensor([[0.1, 0.3, 9.0, 0.2, 0.1, 0.4, 9.0], [9.0, 9.0, 0.1, 9.0, 9.0, 0.2, 9.0]])
    assert expand_anchors("entropy:3", padding, entropy, 1)[0].tolist() == [1, 3, 5]
    assert {2, 5} < set(expand_anchors("entropy:3", padding, entropy, 1)[1].tolist())


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
