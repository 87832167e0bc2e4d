"""What is measured is what it says: held against models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from quietstar.demos.corpus import SYMBOLS, direct_text, working
from quietstar.demos.measure import (
    _correct,
    _kinds,
    find_answers,
    measure_answers,
    measure_characters,
    sample_thoughts,
    to_text,
)
from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.thoughts import Thoughts


def tokens(text: str, length: int) -> torch.Tensor:
    ids = torch.tensor([SYMBOLS.index(character) for character in text])
    return ids[: len(ids) // length * length].view(-1, length)


def model(**options: object) -> QuietStarForCausalLM:
    thinking = {"start_text": "[", "end_text": "]", "thought_length": 8, "lookahead": 1}
    return QuietStarForCausalLM.from_base(character_model(0), character_tokenizer(), **thinking, **options)


def test_answers_are_found_where_the_whole_expression_is_in_the_text() -> None:
    found = find_answers(tokens("1+2=3\n4+4+4=5\n0+1=1\n2+2=4\n", 13))
    assert found.expressions == [[[1, 2], [4, 4, 4]], [[0, 1], [2, 2]]]  # "1+2=3\n4+4+4=5", "\n0+1=1\n2+2=4"
    assert found.anchors.tolist() == [[3, 11], [4, 10]]
    cut = find_answers(tokens("1+2=3\n4+4+4=5\n0+1=1\n2+2=", 8))
    # "1+2=3\n4+", "4+4=5\n0+", "1=1\n2+2=": the second and third begin inside a line, the last answer is cut off.
    assert cut.expressions == [[[1, 2]], [], []]
    assert cut.counted.tolist() == [[True], [False], [False]]


def test_kinds_of_characters() -> None:
    names = ("operand", "+", "=", "answer", "newline")
    kinds = [names[kind] for kind in _kinds(tokens("1+2=3\n", 6))[0].tolist()]
    assert kinds == ["operand", "+", "operand", "=", "answer", "newline"]


def test_an_untrained_model_is_at_chance_and_a_thought_changes_nothing_at_weight_zero() -> None:
    rows = tokens(direct_text(40 * 8, range(4, 5), held_out=True, seed=0), 40)
    measured = measure_answers(model(initial_mixing_weight=None), rows)
    assert measured.nll_base == pytest.approx(math.log(7), abs=0.2)
    assert measured.nll_talk == pytest.approx(measured.nll_base, abs=1e-5)
    assert measured.scrambled_nll == pytest.approx(measured.nll_base, abs=1e-5)
    assert measured.mixing_weight == 0
    assert measured.correct_workings == 0


def test_characters_gain_nothing_at_weight_zero_and_something_else_otherwise() -> None:
    rows = tokens(direct_text(40 * 4, range(4, 5), held_out=True, seed=0), 40)
    still = measure_characters(model(initial_mixing_weight=None), rows)
    moved = measure_characters(model(initial_mixing_weight=0.5), rows)
    assert still["base"] == pytest.approx(still["talk"], abs=1e-5)
    assert moved["base"] == pytest.approx(still["base"], abs=1e-5)
    assert abs(moved["talk"] - moved["base"]) > 1e-4


def test_sampled_thoughts_come_with_their_line() -> None:
    rows = tokens(direct_text(40 * 3, range(4, 5), held_out=True, seed=0), 40)
    pairs = sample_thoughts(model(), rows, 3)
    assert [text for text, _ in pairs] == [to_text(row[:8]) for row in rows.tolist()]
    assert all(len(thought) == 8 for _, thought in pairs)


def test_correct_workings_are_counted() -> None:
    """A thought counts when it begins with the running sums, whatever follows."""
    right = [SYMBOLS.index(character) for character in working([2, 6, 4, 3]) + "]"]
    wrong = [SYMBOLS.index(character) for character in "2,1,5,2]"]
    anchor = torch.tensor([[7, 7]], dtype=torch.int32)
    thoughts = Thoughts(torch.tensor([[right, wrong]]), anchor, torch.zeros(1, 2, 8), 2)
    assert _correct(thoughts, [[[2, 6, 4, 3]]]).tolist() == [[1.0, 0.0]]
