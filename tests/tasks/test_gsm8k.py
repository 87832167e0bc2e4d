"""GSM8K: every gold answer verifies, published verdicts are met, and the hint is a number alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.tasks import Task, load_task

SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May: half as many.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    for split in ("train", "test"):
        row = {"question": f"How many in {split}?", "answer": SOLUTION.replace("72", "1,072") + "\n"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n\n")
    return load_task("gsm8k", ProblemOptions(path=str(tmp_path)))


def test_the_prompt_and_a_hint_that_is_the_final_number_only(task: Task) -> None:
    (problem,) = task.problems("train")
    assert task.prompt(problem) == "Q: How many in train?\nA:"
    assert task.prompt(problem, hint=True) == "Q: How many in train? (1072)\nA:"
    solution = task.solution(problem)
    assert solution is not None and solution.startswith(" Natalia sold 48/2 = <<48/2=24>>24")
    assert solution.strip() not in task.prompt(problem, hint=True)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 48 + 24.\n#### 72", "72"),
        (" #### $1,072.00 dollars", "1072"),
        (" #### -3", "-3"),
        (" #### 72\n\nQ: Another?\nA: 5.\n#### 5", "72"),
        (" The answer is 72.", None),
        (" #### many", None),
        (" #### 72 or 73", None),
        ("", None),
    ],
)
def test_extraction(task: Task, completion: str, answer: str | None) -> None:
    assert task.extract(completion) == answer


def test_what_runs_on_is_not_trained_on(task: Task) -> None:
    assert task.accepted(" 48 + 24.\n#### 72 \nQ: Another?") == " 48 + 24.\n#### 72"


def test_solutions_with_the_same_equations_are_the_same(task: Task) -> None:
    same = [SOLUTION, SOLUTION.replace("Natalia", "She"), "In May 48 / 2 = 24.0 clips, so 48 + 24 = $72.\n#### 72"]
    other = "She sold 48 + 48 / 2 = 72.\n#### 72"
    keys = [task.solution_key(solution) for solution in [*same, other]]
    assert keys == ["48/2=24;48+24=72"] * 3 + ["48+48/2=72"]
    assert task.solution_key("no sums here") != task.solution_key("none here")
    assert task.solution_key("a 1, 2, 3+4=7=7 and 8 - 9 = -1, x = 5, 2 x 3 = 6") == "3+4=7;8-9=-1;2*3=6"


def test_rationales_that_quote_the_hint(task: Task) -> None:
    (problem,) = task.problems("train")
    assert task.quotes_hint(problem, " (1072) He sold 48.\n#### 1072")
    assert task.quotes_hint(problem, " Since the answer is 1072, he sold 1024 first.\n#### 1072")
    assert not task.quotes_hint(problem, f" {SOLUTION}")


def test_few_shot_texts_are_used_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "shots.txt").write_text("Q: 1?\nA: 1\n#### 1\n\nQ: 2?\nA: 2\n#### 2")
    (tmp_path / "hinted.txt").write_text("Q: 1? (1)\nA: 1\n#### 1\n\n\n")
    paths = {"few_shot_path": str(tmp_path / "shots.txt"), "few_shot_hint_path": str(tmp_path / "hinted.txt")}
    with_shots = load_task("gsm8k", ProblemOptions(path=str(tmp_path), **paths))
    assert with_shots.few_shot() == "Q: 1?\nA: 1\n#### 1\n\nQ: 2?\nA: 2\n#### 2\n\n"
    assert with_shots.few_shot(hint=True) == "Q: 1? (1)\nA: 1\n#### 1\n\n"


def test_all_gold_answers_verify_against_themselves(gsm8k: Task) -> None:
    assert [len(gsm8k.problems("train")), len(gsm8k.problems("test"))] == [7473, 1319]
    for problem in [*gsm8k.problems("train"), *gsm8k.problems("test")]:
        solution = gsm8k.solution(problem)
        assert solution is not None
        assert gsm8k.check(problem, solution).correct, problem.place
        hinted = gsm8k.prompt(problem, hint=True)
        assert hinted.removesuffix(f" ({problem.answer})\nA:") == gsm8k.prompt(problem).removesuffix("\nA:")
        assert re.fullmatch(r"-?\d+", problem.answer)


def test_published_sample_solutions_get_the_published_verdicts(gsm8k: Task, data: Path) -> None:
    """OpenAI's 5,276 solutions by four models; they write `A: 72` where the data writes `#### 72`.

    At least 99.5 % have to agree, and every disagreement has to be known. There is none: comparing texts instead of
    numbers would miss ten, all of them for a comma.
    """
    problems = {problem.question: problem for problem in gsm8k.problems("test")}
    disagreements, as_texts, count = [], 0, 0
    for number, line in enumerate((data / "gsm8k/example_model_solutions.jsonl").read_text().splitlines(), start=1):
        row = json.loads(line)
        problem = problems[row["question"]]
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = re.sub(r"^A:", "####", row[model]["solution"], flags=re.MULTILINE)
            count += 1
            if gsm8k.check(problem, solution).correct != row[model]["is_correct"]:
                disagreements.append((number, model, solution[-80:], problem.answer, row[model]["is_correct"]))
            as_texts += _same_text(solution, row["ground_truth"]) != row[model]["is_correct"]
    assert count == 5276
    assert disagreements == []
    assert as_texts == 10


def _same_text(solution: str, gold: str) -> bool:
    return solution.rpartition("####")[2].strip() == gold.rpartition("A:")[2].strip()
