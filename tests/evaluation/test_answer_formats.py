"""Prompts of the paper's evaluation, and how answers are read from what a model writes after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quietstar.evaluation.answers import load_format
from tests.evaluation.evaluated import write_problems


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("data"), ["1,080", "7"])


def test_prompts_and_answers(data: Path) -> None:
    numbers, letters = (load_format(name, data) for name in ("gsm8k", "commonsenseqa"))
    number, letter = numbers.task.problems("test")[0], letters.task.problems("test")[1]
    assert numbers.prompt(number) + f" {numbers.answer(number)}\n" == "Q: What is 0?\nA: 1080\n"
    choices = "(A) A1\n(B) B1\n(C) C1\n(D) D1\n(E) E1\n"
    assert letters.prompt(letter) + f" {letters.answer(letter)}\n" == f"Q: Where?\n{choices}A: B\n"


def test_a_file_or_a_directory_of_one_task(data: Path) -> None:
    whole = load_format("gsm8k", data).task.problems("test")
    for place in (data / "gsm8k", data / "gsm8k" / "test.jsonl"):
        assert load_format("gsm8k", place).task.problems("test") == whole


@pytest.mark.parametrize(
    ("task", "completion", "answer"),
    [
        ("gsm8k", " 1,080\nQ: next?", "1080"),
        ("gsm8k", " $1080.00\n", "1080"),
        ("gsm8k", " He has 3 * 4 = 12.\n#### 12\nQ: next?", "12"),
        ("gsm8k", " 12 and then some\nmore", None),
        ("gsm8k", " nothing\nQ: What?\nA: 5", None),
        ("commonsenseqa", " B\n", "b"),
        ("commonsenseqa", " (b).\n", "b"),
        ("commonsenseqa", " People like it. Therefore, the answer is bank (c).\n\nQ:", "c"),
        ("commonsenseqa", " Bank\n", None),
        ("commonsenseqa", " (A) bank\n(B) river\n", "a"),
        ("commonsenseqa", " a\n", None),
    ],
)
def test_final_answers(task: str, completion: str, answer: str | None, data: Path) -> None:
    form = load_format(task, data)
    assert form.task.extract(form.for_checker(completion)) == answer


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("gsm8k", " 1,080 dollars, not 7", "1080"),
        ("gsm8k", " \\boxed{72}, since 5 is too few", "72"),
        ("gsm8k", " \\boxed{72}.", "72"),
        ("gsm8k", " \\textbf{1,080} dollars", "1080"),
        ("gsm8k", " \\frac{1}{2}.", "0.5"),
        ("gsm8k", " \\boxed{5}\\boxed{6}", None),
        ("gsm8k", " \\sqrt{4}.", None),
        ("gsm8k", " {72}.", "72"),
        ("gsm8k", ": -3.50.", "-3.5"),
        ("gsm8k", " $72", "72"),
        ("gsm8k", " none\nQ: 4?", None),
        ("gsm8k", " \u22125.", "-5"),
        ("gsm8k", " \u2013$5", "-5"),
        ("gsm8k", " -\u20ac5.50", "-5.5"),
        ("gsm8k", " 1/2 of it", "0.5"),
        ("gsm8k", " 2\u00bd", "2.5"),
        ("gsm8k", " 1\u2009000 m", "1000"),
        ("gsm8k", " **72**.", "72"),
        ("gsm8k", " 6 * 12 = 72.", "72"),
        ("gsm8k", " 72 because 6 * 12 = 72", "72"),
        ("gsm8k", " 1.5 million", None),
        ("gsm8k", " 5 dozen", None),
        ("gsm8k", " 1 and a half", None),
        ("gsm8k", " 10-20", None),
        ("gsm8k", " 5 or 6", None),
        ("gsm8k", " 5:30", None),
        ("gsm8k", " 10\u2076", None),
        ("commonsenseqa", " (D) because A", "d"),
        ("commonsenseqa", " not (D)", None),
        ("commonsenseqa", " all but (D).", None),
        ("commonsenseqa", " (D) is wrong, so (E)", "e"),
        ("commonsenseqa", " (A) to (D)", None),
        ("commonsenseqa", " not (A) or (D)", None),
        ("commonsenseqa", " neither A, B nor D.", None),
        ("commonsenseqa", " not A, B or D but E", "e"),
        ("commonsenseqa", " (B, D)", None),
        ("commonsenseqa", " no longer D", None),
        ("commonsenseqa", " unclear. I don't think the answer is (D).", None),
        ("commonsenseqa", " 'D'.", "d"),
        ("commonsenseqa", " \uff24", "d"),
        ("commonsenseqa", " \\boxed{D}", "d"),
        ("commonsenseqa", " E.", "e"),
        ("commonsenseqa", " Bank", None),
        ("commonsenseqa", " the river (C).", "c"),  # not the e of `the`
        ("commonsenseqa", " a bank", None),
        ("commonsenseqa", " A river (c).", "c"),
        ("commonsenseqa", " A river", None),
        ("commonsenseqa", " A because it is near", "a"),
        ("commonsenseqa", " the E.U., so D.", "d"),
        ("commonsenseqa", ":\nB\n(A) is wrong", "b"),
    ],
)
def test_answers_after_the_conclusion(task: str, text: str, answer: str | None, data: Path) -> None:
    form = load_format(task, data)
    assert form.task.extract(form.concluded(text)) == answer


@pytest.mark.parametrize(
    ("task", "completion", "answer"),
    [
        ("gsm8k", " 3 + 4 is 7, so\nhe has 1,080, not more.\nQ: 5?", "1080"),
        ("gsm8k", " 12\nand 5 more", "12"),  # as it is read strictly
        ("gsm8k", " He has\n#### 12\n5", "12"),
        ("gsm8k", " none", None),
        ("gsm8k", " He owes money, so\nit is \u2212$7.", "-7"),
        ("gsm8k", " They\nsold 3/4.", "0.75"),
        ("gsm8k", " They\nsold 3 million.", None),  # not the 3 of it, nor a number before
        ("commonsenseqa", " They say B is right\nand C", "b"),
        ("commonsenseqa", " A man goes to the d1 shop.", "d"),
        ("commonsenseqa", " a1 or b1", None),  # two choices are named
        ("commonsenseqa", " a11", None),
    ],
)
def test_answers_that_are_not_where_they_belong(task: str, completion: str, answer: str | None, data: Path) -> None:
    form = load_format(task, data)
    assert form.task.extract(form.lenient(form.task.problems("test")[1], completion)) == answer


@pytest.mark.parametrize(
    ("task", "text", "complete"),
    [
        ("gsm8k", " 12", False),  # another digit may come
        ("gsm8k", " 12\n", True),
        ("gsm8k", " He has 12\n", False),
        ("gsm8k", " He has\n#### 12", False),
        ("gsm8k", " He has\n#### 12\n", True),
        ("gsm8k", " so\nQ:", True),
        ("commonsenseqa", " B\n", True),
        ("commonsenseqa", " (A) bank", False),
        ("commonsenseqa", " (A) bank\n", True),
        ("commonsenseqa", " (A) or (B)\n", False),
        ("commonsenseqa", " They (a) run.\n", False),
        ("commonsenseqa", " Therefore, the answer is run (a).\n", True),
    ],
)
def test_when_an_answer_is_complete(task: str, text: str, complete: bool, data: Path) -> None:
    assert load_format(task, data).is_complete(text) is complete


@pytest.mark.parametrize(
    ("task", "text", "concluded"),
    [
        ("gsm8k", " $1,08", False),  # another digit may come
        ("gsm8k", " 3.", False),  # and so may a decimal
        ("gsm8k", " 3.5 d", False),  # and so may a dozen
        ("gsm8k", " 3.5 and a h", False),
        ("gsm8k", " 3.5 dollars for each of", True),
        ("gsm8k", " 3.5 dollars\n", True),
        ("gsm8k", " no\nQ:", True),
        ("commonsenseqa", " (D", False),
        ("commonsenseqa", " (D)", True),
        ("commonsenseqa", " B, or", False),  # one in parentheses may come
        ("commonsenseqa", " B.\n", True),
    ],
)
def test_when_a_conclusion_is_complete(task: str, text: str, concluded: bool, data: Path) -> None:
    assert load_format(task, data).is_concluded(text) is concluded


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        (" 3 + 4 = 7. \n", " 3 + 4 = 7."),
        (" 3 + 4 = 7.\nTherefore, the answer (arabic numerals) is 7", " 3 + 4 = 7."),
        (" 7\nQ: next?\nTherefore, the answer (arabic numerals) is 7", " 7"),
    ],
)
def test_where_a_chain_of_thought_ends(text: str, chain: str, data: Path) -> None:
    form = load_format("gsm8k", data)
    assert form.chain(text) == chain
    assert form.is_chain_complete(text) is (chain != text.rstrip())
