"""How long answers take to read: these run in the main process, on whatever a model writes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.evaluation.answers import load_format
from quietstar.tasks.commonsenseqa import CommonsenseQA
from quietstar.tasks.file_task import last_box, through_box
from quietstar.tasks.gsm8k import GSM8K
from quietstar.tasks.math_numeric import MathNumeric
from quietstar.tasks.numbers import canonical_latex, canonical_number, numbers_in, plain_expression, plain_text
from quietstar.tasks.task import Problem

NUMBER, LETTER = load_format("gsm8k", None), load_format("commonsenseqa", None)
CHOICES = Problem("1", "Where?\nAnswer Choices:\n(a) bank\n(b) sea\n(c) hill\n(d) lake\n(e) moon", "b")
READERS: dict[str, Callable[[str], object]] = {
    "canonical_number": canonical_number,
    "canonical_latex": canonical_latex,
    "plain_expression": plain_expression,
    "plain_text": plain_text,
    "numbers_in": lambda text: list(numbers_in(text)),
    "last_box": last_box,
    "through_box": through_box,
    "gsm8k": GSM8K(ProblemOptions()).extract,
    "math": MathNumeric(ProblemOptions()).extract,
    "commonsenseqa": CommonsenseQA(ProblemOptions()).extract,
    "number format": lambda text: (NUMBER.lenient(CHOICES, text), NUMBER.concluded(text), NUMBER.is_complete(text)),
    "letter format": lambda text: (LETTER.lenient(CHOICES, text), LETTER.concluded(text), LETTER.is_complete(text)),
}
FAMILIES = {
    "spaces": ("1", " ", "a"),
    "narrow and wide spaces": ("5", " \u202f", "x"),
    "lines": ("5.", "\n", "#### 5"),
    "equals signs": ("", "= ", "1x"),
    "nested boxes": ("", "\\boxed{", "5" + "}" * 500),
    "digits before a number": ("", "9999", " 1e2, 1"),
    "boxes side by side": ("", "\\boxed 5 ", ""),
    "texts in LaTeX": ("5", "\\text{a}", ""),
    "signs": ("", "- ", "5"),
    "sums": ("", "1 + ", "1"),
    "groups of digits": ("1", ",000", ",x"),
    "words": ("5 ", "ab ", "!"),
    "units": ("5 ", "apples, ", "= 3"),
    "one word": ("", "a", " 5"),
    "markers": ("", "#### ", "x"),
    "conclusions": ("", "answer is (a) ", ""),
    "brackets": ("answer is ", "(", "a"),
    "denials": ("answer is ", "not a b ", "(a)"),
    "stars": ("", "*a", "*"),
    "dollars": ("", "$ 5 ", "x"),
    "ends of text": ("", "<s>", "5"),
    "parentheses around all": ("(" * 8000, "5", ")" * 8000),
    "struck out text": ("", "<s>5", "</s>"),
    "lists of letters": ("answer is not ", "(a), ", "or (b)"),
    "doubts": ("", "I don't think the answer is ", "(a)"),
    "names": ("", "AB", " = 5"),
}


def seconds(read: Callable[[str], object], text: str) -> float:
    """Returns the least time of the processor in three tries."""
    tries = []
    for _ in range(3):
        began = time.process_time()
        read(text)
        tries.append(time.process_time() - began)
    return min(tries)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reader", READERS)
def test_four_times_the_text_takes_about_four_times_as_long(reader: str, family: str) -> None:
    """`1` and 4,000 spaces took `numbers_in` 21 s: quadratic growth would be 16 times, and cubic 64."""
    before, piece, after = FAMILIES[family]
    repeats = 4000 // len(piece)
    short, long = (seconds(READERS[reader], before + piece * count + after) for count in (repeats, 4 * repeats))
    assert long < 9 * short + 0.01
