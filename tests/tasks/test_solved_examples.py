"""Solved examples: those that are shipped have the format of our prompts, and show the hint alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import Problem, Task, load_task

COUNTS = {"gsm8k": 6, "commonsenseqa": 7}


def blocks(task: Task, hint: bool = False) -> list[str]:
    text = task.few_shot(hint)
    assert text.endswith("\n\n") and not text.endswith("\n\n\n")
    return text.removesuffix("\n\n").split("\n\n")


@pytest.mark.parametrize("name", COUNTS)
def test_published_examples_are_right_and_those_with_the_hint_show_the_final_answer_only(name: str) -> None:
    task = load_task(name, ProblemOptions())
    plain, hinted = blocks(task), blocks(task, hint=True)
    assert len(plain) == len(hinted) == COUNTS[name]
    for one, other in zip(plain, hinted, strict=True):
        question, _, rationale = one.removeprefix("Q: ").partition("\nA:")
        answer = task.extract(rationale)
        assert answer is not None
        problem = Problem("", question, answer)
        assert one == task.prompt(problem) + task.accepted(rationale)
        # the answer that the hint shows is STaR's, not the one that was read from the rationale
        assert other == task.prompt(problem, hint=True) + rationale
        assert not task.quotes_hint(problem, rationale)
        assert not any(stop in rationale for stop in task.stop)


def test_a_file_of_ones_own_replaces_them_and_other_tasks_have_none(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Q: 1?\nA: 1\n#### 1")
    mine = load_task("gsm8k", ProblemOptions(few_shot_path=str(tmp_path / "mine.txt")))
    assert mine.few_shot() == "Q: 1?\nA: 1\n#### 1\n\n"
    assert len(blocks(mine, hint=True)) == 6
    for name in ("addition", "math", "jsonl", "code"):
        assert load_task(name, ProblemOptions()).few_shot() == load_task(name, ProblemOptions()).few_shot(True) == ""


@pytest.mark.parametrize("name", ["addition", "jsonl"])
def test_one_path_of_two_is_refused_where_the_other_is_needed(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Q: 1?\nA: 1\n#### 1")
    plain = load_task(name, ProblemOptions(few_shot_path=str(file)))
    assert plain.few_shot() == file.read_text() + "\n\n"
    told = r"problems\.few_shot_hint_path: missing, but problems\.few_shot_path is given; needs the same with the hint"
    with pytest.raises(ConfigError, match=told):
        plain.few_shot(hint=True)
    with pytest.raises(ConfigError, match=r"problems\.few_shot_path: missing, .* needs the same with no hint"):
        load_task(name, ProblemOptions(few_shot_hint_path=str(file))).few_shot()
