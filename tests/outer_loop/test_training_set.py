"""What is kept of the samples: right ones, with prompts that never show the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quietstar.config.loops import LoopOptions, ProblemOptions
from quietstar.errors import CheckpointError
from quietstar.outer_loop.store import Place, Sample
from quietstar.outer_loop.training_set import (
    Kept,
    demonstrations,
    describe,
    read_kept,
    right_completions,
    without_duplicates,
    write_kept,
)
from quietstar.sampling.requests import Completion
from quietstar.tasks import load_task
from quietstar.tasks.task import Problem, Task

CHOICES = [
    {"label": label, "text": text}
    for label, text in zip("ABCDE", ("ink", "desk", "pen", "blotter", "cat"), strict=True)
]
FILES = {
    "gsm8k": (
        "train.jsonl",
        {"question": "Ann has 40 eggs and buys 32. How many?", "answer": "In all: 40+32=<<40+32=72>>72\n#### 72"},
    ),
    "commonsenseqa": (
        "train_rand_split.jsonl",
        {"id": "q1", "answerKey": "D", "question": {"stem": "What dries ink?", "choices": CHOICES}},
    ),
}
RIGHT = {
    "gsm8k": " 40 and 32: 40 + 32 = 72 eggs.\n#### 72",
    "commonsenseqa": " It has to take up ink. Therefore, the answer is blotter (d).",
    "addition": "8+6+0=41;9+7+1=71;2+3+1=60;>674.",
}
HINT = {"gsm8k": "(72)", "commonsenseqa": "(CORRECT)", "addition": "?0674"}


def example(name: str, directory: Path) -> tuple[Task, Problem]:
    """A task and one of its problems, whose answer is that of `RIGHT`."""
    if name == "addition":
        return load_task(name, ProblemOptions(digits="3")), Problem("298+376", "298 + 376", "674")
    file, record = FILES[name]
    (directory / file).write_text(json.dumps(record) + "\n")
    task = load_task(name, ProblemOptions(path=str(directory)))
    return task, task.problems("train")[0]


def samples(task: Task, problem: Problem, *texts: str, hinted: bool = False) -> list[Sample]:
    """These completions of a problem, judged."""
    return [
        Sample(
            Place(2, "rationalize" if hinted else "sample", problem.id, index),
            "key",
            index,
            hinted,
            Completion(text, -1.0, 5, "stop"),
            task.check(problem, text),
        )
        for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize("name", RIGHT)
def test_no_hint_in_what_is_stored(name: str, tmp_path: Path) -> None:
    """It is in the prompt of a retry, and in nothing that is trained on."""
    task, problem = example(name, tmp_path)
    text = RIGHT[name]
    assert HINT[name] in task.prompt(problem, hint=True) and HINT[name] not in task.prompt(problem)
    made = [*samples(task, problem, text, "wrong"), *samples(task, problem, text, "wrong", hinted=True)]
    kept, _ = right_completions(task, {problem.id: problem}, made, LoopOptions())
    assert [(one.source, one.prompt, one.completion) for one in kept] == [
        (source, task.prompt(problem), text) for source in ("sample", "rationalize")
    ]
    write_kept(tmp_path / "kept.jsonl", kept)
    assert HINT[name] not in json.dumps([vars(one) for one in read_kept(tmp_path / "kept.jsonl")])


def test_the_hint_of_gsm8k_is_the_number_alone(tmp_path: Path) -> None:
    task, problem = example("gsm8k", tmp_path)
    assert task.prompt(problem, hint=True).replace(" (72)", "") == task.prompt(problem)


def test_rationales_that_speak_of_the_hint(tmp_path: Path) -> None:
    task, problem = example("gsm8k", tmp_path)
    by_id = {problem.id: problem}
    quoting, plain = " As the hint says it is 72.\n#### 72", RIGHT["gsm8k"]
    hinted, own = samples(task, problem, quoting, plain, hinted=True), samples(task, problem, quoting)
    kept, counts = right_completions(task, by_id, hinted + own, LoopOptions())
    assert [(one.source, one.index) for one in kept] == [("sample", 0), ("rationalize", 1)]
    assert counts == {"quoted_hint": 1}
    kept, counts = right_completions(task, by_id, hinted, LoopOptions(drop_hint_quotes=False))
    assert [one.index for one in kept] == [0, 1] and counts == {"quoted_hint": 1}


def test_what_follows_the_answer_is_no_part_of_it(tmp_path: Path) -> None:
    task, problem = example("gsm8k", tmp_path)
    kept, _ = right_completions(
        task, {problem.id: problem}, samples(task, problem, f"{RIGHT['gsm8k']}\n\nNext question"), LoopOptions()
    )
    assert kept[0].completion == RIGHT["gsm8k"]


def kept(problem: str, completion: str, source: str = "sample", index: int = 0) -> Kept:
    return Kept(problem, f"Q: {problem}\nA:", completion, source, 1, index)


def test_duplicates(tmp_path: Path) -> None:
    """The first stays; the same text for another problem is no duplicate; a human solution counts as seen."""
    task, _ = example("gsm8k", tmp_path)
    everything = [
        kept("a", " 1+1=2\n#### 2", "demonstration"),
        kept("a", " 1+1=2\n#### 2", "demonstration"),
        kept("a", " 1+1=2\n#### 2", index=1),
        kept("a", " One and one: 1 + 1 = 2\n#### 2", index=2),
        kept("b", " 1+1=2\n#### 2", index=3),
        kept("b", " 2-0=2\n#### 2", index=4),
        kept("b", " 2-0=2\n#### 2", "rationalize", index=5),
    ]

    def places(deduplicate: str) -> list[int]:
        options = replace(LoopOptions(), deduplicate=deduplicate)
        return [one.index for one in without_duplicates(task, everything, options, 0)]

    assert places("none") == [0, 0, 1, 2, 3, 4, 5]
    assert places("exact") == [0, 0, 2, 3, 4]
    assert places("solution") == [0, 0, 3, 4]


def test_at_most_so_many_of_a_problem(tmp_path: Path) -> None:
    """Which ones is the seed's choice; demonstrations all stay."""
    task, _ = example("gsm8k", tmp_path)
    everything = [kept("a", "d", "demonstration"), *(kept("a", str(i), index=i) for i in range(1, 9)), kept("b", "0")]
    options = LoopOptions(max_per_problem=2)
    chosen = {seed: without_duplicates(task, everything, options, seed) for seed in range(20)}
    for found in chosen.values():
        assert found[0] == everything[0] and found[-1] == everything[-1] and len(found) == 4
        assert [one.index for one in found] == [*sorted(one.index for one in found[:-1]), 0]
    assert {one.index for found in chosen.values() for one in found[1:3]} == set(range(1, 9))
    assert without_duplicates(task, everything, options, 3) == chosen[3]


def test_counts() -> None:
    ones = [
        replace(kept("a", "x", source), right_inside=inside)
        for source, inside in (
            ("sample", True),
            ("sample", False),
            ("sample", None),
            ("rationalize", False),
            ("demonstration", None),
        )
    ]
    assert describe(ones) == {
        "kept": 5,
        "problems": 1,
        "hinted": 1,
        "right_inside_sample": 0.5,
        "right_inside_rationalize": 0.0,
    }


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    ours = [kept("a", "line\u2028separators\x85 and \ud800 halves\n"), replace(kept("b", ""), right_inside=True)]
    write_kept(file, ours)
    assert read_kept(file) == ours
    file.write_text(file.read_text() + '{"problem": "c"}\n')
    with pytest.raises(CheckpointError, match=r"kept\.jsonl:3: damaged .*delete build\.json"):
        read_kept(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"kept\.jsonl: cannot be read .*delete build\.json"):
        read_kept(file)


def test_human_solutions(tmp_path: Path) -> None:
    task, problem = example("gsm8k", tmp_path)
    (one,) = demonstrations(task)
    assert (one.problem, one.prompt, one.source) == (problem.id, task.prompt(problem), "demonstration")
    assert one.completion == f" {FILES['gsm8k'][1]['answer']}"
    assert demonstrations(example("commonsenseqa", tmp_path)[0]) == []
