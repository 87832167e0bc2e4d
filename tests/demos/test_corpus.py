"""The textbook of sums: its lines are true, its split is clean, its pages start with a line."""

from __future__ import annotations

import random

import pytest

from quietstar.config.training import parse_operands
from quietstar.demos.corpus import SYMBOLS, direct_text, is_held_out, textbook_text, working
from quietstar.demos.textbook import character_tokenizer
from quietstar.errors import ConfigError


def expression(line: str) -> list[int]:
    return [int(digit) for digit in line.split("=")[0].split("+")]


def whole_lines(pages: str, length: int) -> list[str]:
    """Lines that no page break has cut."""
    return [
        line
        for start in range(0, len(pages), length)
        for line in pages[start : start + length].splitlines(keepends=True)
        if line.endswith("\n")
    ]


def test_worked_asides_hold_the_running_sums_and_every_answer_is_right() -> None:
    kinds = {"direct": 0, "worked": 0, "useless": 0}
    for line in whole_lines(textbook_text(400, 48, range(4, 5), 0.3, seed=1), 48):
        digits, rest = expression(line), line.rstrip("\n").split("=")[1]
        assert int(rest[-1]) == sum(digits) % 7
        if len(rest) == 1:
            kinds["direct"] += 1
        elif "," in rest:
            kinds["worked"] += 1
            partial = [int(digit) for digit in rest[1:-2].split(",")]
            assert partial == [sum(digits[: n + 1]) % 7 for n in range(4)]
        else:
            kinds["useless"] += 1
            assert rest[1:-2] == line.split("=")[0]
    total = sum(kinds.values())
    assert kinds["direct"] / total == pytest.approx(0.24, abs=0.05)  # short lines are cut less often than long ones
    assert kinds["worked"] / (kinds["worked"] + kinds["useless"]) == pytest.approx(0.3, abs=0.06)


def test_held_out_expressions_never_train() -> None:
    trained = whole_lines(textbook_text(300, 48, range(3, 6), 0.3, seed=0), 48)
    trained += direct_text(20_000, range(3, 6), held_out=False, seed=0).splitlines()
    assert not any(is_held_out(expression(line)) for line in trained)
    tested = direct_text(5_000, range(3, 6), held_out=True, seed=0).splitlines()
    assert all(is_held_out(expression(line)) for line in tested)


def test_a_tenth_of_the_expressions_is_held_out() -> None:
    rng = random.Random(0)
    held = sum(is_held_out([rng.randrange(7) for _ in range(4)]) for _ in range(4000))
    assert held / 4000 == pytest.approx(0.1, abs=0.02)


def test_direct_text_has_no_brackets_and_pages_start_with_a_line() -> None:
    assert not set(direct_text(2_000, range(4, 5), held_out=False, seed=3)) & set("[],")
    pages = textbook_text(50, 48, range(4, 5), 0.3, seed=0)
    assert len(pages) == 50 * 48
    for start in range(0, len(pages), 48):
        assert len(pages[start : start + 48].split("=")[0]) == len("2+6+4+3")


def test_texts_depend_on_the_seed_alone() -> None:
    first, again, other = (textbook_text(5, 48, range(4, 5), 0.3, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_working() -> None:
    assert working([2, 6, 4, 3]) == "2,1,5,1"


def test_every_character_is_one_token() -> None:
    text = textbook_text(3, 48, range(4, 5), 0.5, seed=0)
    ids = character_tokenizer()(text)["input_ids"]
    assert ids == [SYMBOLS.index(character) for character in text]
    assert character_tokenizer().decode(ids) == text


@pytest.mark.parametrize("operands", ["", "1", "four", "5-3", "3-9", "-2"])
def test_wrong_operands_are_named(operands: str) -> None:
    with pytest.raises(ConfigError, match=r"textbook\.operands: got"):
        parse_operands(operands)
