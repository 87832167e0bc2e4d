"""The options of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ProblemOptions:
    """The task's problems.

    Args:
        path: Training problems: a JSONL file, or a directory of the task's files. Null: its public home.
        test_path: Held-out problems; null: the task's own beside `path`.
        few_shot_path: Text file of solved examples that stand before each prompt, as they are. Null: those that STaR
            has published for gsm8k and commonsenseqa; none for other tasks.
        few_shot_hint_path: The same examples with the hint shown, for rationalisation. Null: as above; where there are
            none, rationalisation needs both paths or neither.
        question: JSONL: field of the question.
        answer: JSONL: field of the final answer.
        rationale: JSONL: field of a human-written solution; null: there is none.
        id: JSONL: field of the problem's name; null: its line number.
        limit: Training problems drawn for each iteration; null: all.
        test_limit: Held-out problems, drawn by `seed`; null: all.
        digits: Addition: how many digits the summands have, such as `1-5`.
        per_group: Addition and other made-up tasks: training problems per number of digits, or group.
        test_per_group: The same of held-out problems.
        solved: Addition: worked-out sums of each number of digits above 2 that the base model reads before the loop; of
            shorter ones it reads many.
        hinted: Addition: the same with the hint, from which it learns to rationalise.
        copied: Addition: share of the hinted ones that copy the answer from the hint and work nothing out.
        scratchpad: Addition: `local` (each line by itself, which small models learn fast) or `paper` (STaR's).
        reverse: Addition: write results least significant digit first.
        seed: Of made-up problems, and of `limit`.
        timeout: Seconds that the check of one answer may take, where it runs in a worker process.
    """

    path: str | None = None
    test_path: str | None = None
    few_shot_path: str | None = None
    few_shot_hint_path: str | None = None
    question: str = "question"
    answer: str = "answer"
    rationale: str | None = None
    id: str | None = None
    limit: int | None = None
    test_limit: int | None = None
    digits: str = "1-5"
    per_group: int = 500
    test_per_group: int = 100
    solved: int = 3
    hinted: int = 100
    copied: float = 0.0
    scratchpad: Literal["local", "paper"] = "local"
    reverse: bool = False
    seed: int = 0
    timeout: float = 5.0
