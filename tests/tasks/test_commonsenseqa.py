"""CommonsenseQA: STaR's prompts, answers found in conclusions, and both layouts of the data."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.tasks import Task
from quietstar.tasks.commonsenseqa import CommonsenseQA

TEXTS = ["shirt pocket", "calligrapher's hand", "inkwell", "desk drawer", "blotter"]
STEM = "What do people use to absorb extra ink from a fountain pen?"
PROMPT = f"""Q: {STEM}
Answer Choices:
(a) shirt pocket
(b) calligrapher's hand
(c) inkwell
(d) desk drawer
(e) blotter
A:"""


@pytest.fixture
def task(tmp_path: Path) -> CommonsenseQA:
    choices = [{"label": label, "text": text} for label, text in zip("ABCDE", TEXTS, strict=True)]
    own = {"answerKey": "E", "id": "ink", "question": {"stem": STEM, "choices": choices}}
    hub = {"answerKey": "E", "id": "ink", "question": STEM, "choices": {"label": list("ABCDE"), "text": TEXTS}}
    (tmp_path / "train_rand_split.jsonl").write_text(json.dumps(own))
    (tmp_path / "dev_rand_split.jsonl").write_text(json.dumps(hub))
    return CommonsenseQA(ProblemOptions(path=str(tmp_path)))


def test_the_published_prompt_and_hint_from_either_layout(task: CommonsenseQA) -> None:
    (problem,), (same,) = task.problems("train"), task.problems("test")
    assert task.prompt(problem) == task.prompt(same) == PROMPT
    assert task.prompt(problem, hint=True) == PROMPT.replace("(e) blotter", "(e) blotter (CORRECT)")
    assert task.solution(problem) is None
    assert task.demonstrations() == []


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" Blotters absorb liquids. Therefore, the answer is blotter (e).", "e"),
        (" The answer must absorb ink, not hold it (c). Therefore, the answer is blotter (E)", "e"),
        (" It is not\n(a) shirt pocket\nThe answer is blotter (e).\n\nQ: What?\nA: the answer is (b).", "e"),
        (" The answer is blotter (e).\nThe answer is not inkwell (c).", "e"),
        (" The answer could be (a) or (b). It is (b)\nTherefore, the answer is blotter (e).", "e"),
        (" The answer is not inkwell (c).\nThe answer is blotter (e).", "e"),
        (" The answer must be blotter (e).\nNot (a).", "e"),
        (" (e).", "e"),
        (" Blotter (e)\n\n(a) is wrong", "e"),
        (" The answer is E.", "e"),
        (" Answer: E", "e"),
        (" The answer is **E**.", "e"),
        (" The answer is option e.", "e"),
        (" The answer is [e].", "e"),
        (" The answer is vitamin C (e).", "e"),
        (" The answer is (e), not (b).", "e"),
        (" The answer is blotter (e) rather than (b).", "e"),
        (" The answer is (e) because (b) is wrong.", "e"),
        (" The answer is not (b) but (e).", "e"),
        (" The answer isn't (b); it is (e).", "e"),
        (" The answer is (a) or (e).", None),
        (" The answer is A and E.", None),
        (" The answer is not (e).", None),
        (" The answer is a blotter.", None),
        (" Blotter.", None),
        (" The answer is blotter (f).", None),
        ("", None),
    ],
)
def test_extraction(task: CommonsenseQA, completion: str, answer: str | None) -> None:
    assert task.extract(completion) == answer
    assert task.extract(task.accepted(completion)) == answer


@pytest.mark.parametrize(
    "completion",
    [
        " The answer cannot be (e).",
        " (e) is the wrong answer.",
        " All but (e).",
        " The answer is anything but (e).",
        " The answer is all of (a) to (e).",
        " The answer is (d) through (e).",
        " The answer is (d)-(e).",
        " The answer is (d) (e).",
        " The answer is D E.",
        " The answer is both (d) and (e).",
        " The answer is not only (d) but also (e).",
        " The answer is (d) as well as (e).",
        " The answer can't be (e).",
        " The answer should not be (e).",
        " The incorrect answer is (e).",
        " Every option except (e)",
        " The answer is never (e).",
        " The answer is anything other than (e).",
        " We can rule out (e).",
        " (e) can't be right.",
        " (e) was ruled out.",
        " The answer is (e)?",
        " The answer is (d)/(e).",
        " The answer is D to E.",
        " The answer is not (d) or (e).",
        " The answer is neither (c), (d) nor (e).",
        " The answer isn't (d), (a) or (e), sadly.",
        " The answer is no longer (e).",
        " The answer is unlikely to be (e).",
        " The answer is not necessarily E.",
        " The answer is hardly (e).",
        " The answer isn't blotter (e).",
        " I do not believe that the answer is (e).",
        " We doubt the answer is E.",
        " It is not true that the correct answer is (e).",
        " The weakest answer is (e).",
        " The least sensible choice is (e).",
        " The answer is (d, e).",
        " The answer is [D/E].",
        " The answer is E) or D)",
        " It is not likely that the answer is (e).",
        " The answer is (c, d or e).",
        " The answer is (d) and perhaps (e).",
        " The answer is <s>(e)</s>.",
        " THE ANSWER IS A LARGE POOL.",
    ],
)
def test_what_is_denied_excluded_or_one_of_several_is_no_answer(task: CommonsenseQA, completion: str) -> None:
    """`All but (e)` was e, `(e) is the wrong answer` too, `(d) (e)` was d, and `not (d) or (e)` was e."""
    assert task.extract(completion) is None


@pytest.mark.parametrize(
    "completion",
    [
        " The answer is 'E'.",
        " The answer is \u2018E\u2019.",
        ' The answer is "E".',
        " The answer is \uff25.",
        " The answer is \uff08\uff45\uff09.",
        " \\boxed{E}",
        " $\\boxed{\\text{E}}$",
        " The answer is \\boxed{E}.",
        " The answer is \\textbf{E}.",
        " The answer is (e\u200b).",
        " The answer is `E`.",
        " The answer is (e), not (d).",
        " The answer is (e) rather than (d).",
        " The answer cannot be (d), so the answer is (e).",
        " (d) is wrong. The answer is (e).",
        " The answer is (e), because (d) is the wrong answer.",
        " The answer is (d)? No, (e).",
        " The answer is everything must go (e).",
        " The answer is should not (e).",
        " The answer is incorrect (e).",
        " The answer is rejected (e).",
        " The answer is not A, C or D but E.",
        " The answer is not (a) or (b). It is (e).",
        " The answer isn't hand (b) but blotter (e).",
        " The worst answer is (c). The answer is (e).",
        " I don't think the answer is (d). The answer is (e).",
        " Neither (a) nor (b) absorbs ink, so the answer is (e).",
        " The best choice is E.",
        " (a) and (b) are wrong. It is (e).",
        " (d) or (c) don't absorb. (e) does.",
        " The correct option is (e).",
        " The answer is:\n\n(e)",
        " The answer is\n\n**E**",
        " The answer is unlikely (e).",
        " The answer is no longer exist (e).",
    ],
)
def test_an_answer_in_other_writing_or_beside_a_denial_is_read(task: CommonsenseQA, completion: str) -> None:
    assert task.extract(completion) == "e"
    assert task.extract(task.accepted(completion)) == "e"


def test_what_runs_on_is_not_trained_on(task: CommonsenseQA) -> None:
    right = " It absorbs.\nTherefore, the answer is blotter (e)."
    assert task.accepted(f"{right}\nThe answer is also (a).\n\nQ: Another?") == right


def test_rationales_that_quote_the_hint(task: CommonsenseQA) -> None:
    (problem,) = task.problems("train")
    assert task.quotes_hint(problem, " It is marked (CORRECT). Therefore, the answer is blotter (e).")
    assert not task.quotes_hint(problem, task.conclusion(problem))
    assert not task.quotes_hint(problem, task.direct(problem))


def test_all_gold_answers_verify_against_themselves(commonsenseqa: Task) -> None:
    assert isinstance(commonsenseqa, CommonsenseQA)
    assert [len(commonsenseqa.problems("train")), len(commonsenseqa.problems("test"))] == [9741, 1221]
    for problem in [*commonsenseqa.problems("train"), *commonsenseqa.problems("test")]:
        assert commonsenseqa.check(problem, commonsenseqa.conclusion(problem)).correct, problem.place
        assert commonsenseqa.check(problem, commonsenseqa.direct(problem)).correct, problem.place
        assert commonsenseqa.prompt(problem, hint=True).count(" (CORRECT)") == 1


@pytest.mark.parametrize("piece", ["[", "(", "[(", "( ", "not (", "answer is (", "(!", "((b", "n't [", "(a"])
def test_many_brackets_take_no_time(piece: str) -> None:
    """Twelve thousand brackets took 20 s: each of them was tried with all that follow it."""
    text = "The answer is " + piece * (12_000 // len(piece))
    began = time.process_time()
    CommonsenseQA(ProblemOptions()).extract(text)
    assert time.process_time() - began < 2
