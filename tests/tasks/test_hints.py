"""Rationales that speak of the hint."""

from __future__ import annotations

import pytest

from quietstar.tasks.file_task import begins_with_hint, speaks_of_hint


@pytest.mark.parametrize(
    "completion",
    [
        "It is marked (CORRECT), so it is blotter (e).",
        "The hint says 72.",
        "Given the answer, she must have sold 24.",
        "Since the answer is 72, she sold 24 in May.",
        "because the correct\nanswer is 72",
        "The answer was already given as 72.",
        "We know that the answer is 72.",
        "The number in parentheses is 72.",
        "Blotter is marked as correct.",
    ],
)
def test_rationales_that_make_no_sense_without_the_hint(completion: str) -> None:
    assert speaks_of_hint(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "Therefore, the answer is blotter (e).",
        "She was given 24 clips, so the answer is 72.",
        "The correct change is 5. She knows the shop.",
        "",
    ],
)
def test_ordinary_rationales(completion: str) -> None:
    assert not speaks_of_hint(completion)


def test_a_repeated_hint_is_found_on_the_first_line_only() -> None:
    assert begins_with_hint("\n (72) She sold", "72")
    assert not begins_with_hint("She sold\n(72)", "72")
    assert not begins_with_hint("She sold 72", "72")
