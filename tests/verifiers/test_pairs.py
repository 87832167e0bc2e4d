"""Pairs are of one problem, drawn once each; a row holds both, each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quietstar.errors import DataError
from quietstar.verifiers.pairs import Labelled, Pair, encode_pairs, make_pairs, rows_of
from tests.verifiers.tiny import END, labelled, tokenizer


def product(problem: str) -> set[Pair]:
    own = [one for one in labelled() if one.problem == problem]
    return {
        Pair(problem, right.prompt, right.completion, wrong.completion)
        for right in own
        for wrong in own
        if right.correct and not wrong.correct
    }


def test_pairs_are_drawn_without_replacement_from_each_problems_product() -> None:
    every = make_pairs(labelled(), 100, seed=0)
    assert len(every) == len(set(every)) == 6 * 2 * 3
    assert set(every) == set().union(*(product(f"p{number}") for number in range(6)))
    some = make_pairs(labelled(), 4, seed=0)
    assert [pair.problem for pair in some] == [f"p{number}" for number in range(6) for _ in range(4)]
    assert len(set(some)) == 24 and set(some) <= set(every)


def test_the_draw_depends_on_the_seed_and_the_problems_own_completions_alone() -> None:
    drawn = make_pairs(labelled(), 2, seed=1)
    assert drawn == make_pairs(labelled(), 2, seed=1)
    assert drawn != make_pairs(labelled(), 2, seed=2)
    alone = [one for one in labelled() if one.problem == "p4"]
    assert make_pairs(alone, 2, seed=1) == [pair for pair in drawn if pair.problem == "p4"]


def test_equal_texts_count_once() -> None:
    twice = [one for one in labelled(1) for _ in range(3)]
    assert make_pairs(twice, 100, seed=0) == make_pairs(labelled(1), 100, seed=0)


def test_without_a_pair_the_error_says_what_to_do() -> None:
    all_right = [replace(one, correct=True) for one in labelled(2)]
    all_wrong = [replace(one, problem="other", correct=False) for one in labelled(1)]
    with pytest.raises(DataError, match=r"3 problems: 2 with right ones alone, 1 with .*sampling.temperature.*harder"):
        make_pairs([*all_right, *all_wrong], 4, seed=0)
    with pytest.raises(DataError, match="no problem has both"):
        make_pairs([], 4, seed=0)


def test_a_row_is_learned_from_the_end_of_the_prompt_to_the_end_of_sequence() -> None:
    own = tokenizer()
    pair = make_pairs([Labelled("p", "Q:1", "A: b=", True), Labelled("p", "Q:1", "-", False)], 1, seed=0)
    rows = rows_of([*encode_pairs(own, pair), *encode_pairs(own, [Pair("q", "Q:", "a=", "0")])])
    names = own.convert_ids_to_tokens(rows.tokens[0].tolist())
    assert "".join(names) == f"Q:1A: b={END}Q:1-{END}"
    learned = [name for name, counts in zip(names, rows.loss_mask[0].tolist(), strict=True) if counts]
    assert "".join(learned) == f"A: b={END}-{END}"
    assert rows.attention_mask.tolist() == [[1] * 9 + [2] * 5, [1] * 5 + [2] * 4 + [0] * 5]
