"""What is wrong with problems, models and checks, inside the real commands: one line that says what, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quietstar import star, vstar
from quietstar.outer_loop.store import STORE_VERSION
from tests.outer_loop.loops import VERIFIER, arguments, manifests, rows, store_lines

GSM8K = {"question": "What is 3 + 4?", "answer": "3+4=7\n#### 7"}


def refusal(capsys: pytest.CaptureFixture[str], command: list[str], main: Any = star.main) -> str:
    """The one line on stderr that begins with `error: `, of a command that exits with status 2."""
    capsys.readouterr()
    assert main(command) == 2
    text = capsys.readouterr().err
    found = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in text
    return found[0]


def gsm8k(adder: Path, tmp_path: Path, *records: dict[str, Any], **changes: Any) -> list[str]:
    """A run on these problems."""
    for split, content in (("train", records), ("test", (GSM8K,))):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in content))
    return arguments(adder, tmp_path / "run", task="gsm8k", problems__path=tmp_path, **changes)


def test_a_missing_field(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, gsm8k(adder, tmp_path, GSM8K, {"question": "And 4 + 4?"}))
    assert f"{tmp_path / 'train.jsonl'}:2: has no field 'answer'" in text
    assert not (tmp_path / "run/iteration-00").exists()


def test_the_data_is_read_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, gsm8k(tmp_path / "no-model", tmp_path, {"question": "And 4 + 4?"}))
    assert "has no field 'answer'" in text


def test_duplicate_ids(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"question": "1+1", "answer": "2", "id": name} for name in ("a", "b", "a")]
    command = gsm8k(adder, tmp_path, *records, problems__id="id")
    command[command.index("gsm8k")] = "jsonl"
    text = refusal(capsys, command)
    assert f"{tmp_path / 'train.jsonl'}:3: the id 'a' is that of {tmp_path / 'train.jsonl'}:1 already" in text


def test_a_gold_answer_that_cannot_be_read(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, gsm8k(adder, tmp_path, GSM8K, GSM8K | {"answer": "#### seven"}))
    assert f"{tmp_path / 'train.jsonl'}:2: field 'answer' has no number to read" in text


def test_a_prompt_longer_than_the_context(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is sampled of its batch, and with its name."""
    text = refusal(capsys, arguments(adder, tmp_path, problems__digits="9", problems__per_group=6))
    assert "its prompt of 20 tokens and the 16 of sampling.max_new_tokens do not fit" in text and "problem " in text
    assert store_lines(tmp_path) == []


def test_an_example_longer_than_a_row(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, arguments(adder, tmp_path, loop__row_length=12))
    assert "error: loop.row_length: got 12, but problem " in text


def test_an_iteration_with_nothing_right(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what to do, and what has been sampled is there."""
    text = refusal(capsys, arguments(adder, tmp_path, problems__digits="3", evaluation__greedy="false"))
    assert "iteration 1: none of 48 completions has the right answer" in text
    assert "easier problems" in text and "sampling.samples" in text and "problems.few_shot_path" in text
    assert len(store_lines(tmp_path)) == 48
    assert set(manifests(tmp_path)) == {
        "iteration-00/base.json",
        *(
            f"iteration-01/{verify}{purpose}.json"
            for verify in ("", "verify_")
            for purpose in ("sample", "rationalize")
        ),
    }


def test_a_store_of_another_version(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.dumps({"kind": "header", "key": "", "version": STORE_VERSION + 1}) + "\n"
    (tmp_path / "samples.jsonl").write_text(before)
    text = refusal(capsys, arguments(adder, tmp_path))
    assert f"{tmp_path / 'samples.jsonl'}: written by version {STORE_VERSION + 1} of the store" in text
    assert (tmp_path / "samples.jsonl").read_text() == before


OWN_TASK = """
import os, sys, time
from quietstar.tasks.addition import Addition
from quietstar.tasks.task import Verdict

class Own(Addition):
    isolated = {isolated}
    def check(self, problem, completion):
        {check}

def make(options):
    return Own(options)
"""


def own_task(directory: Path, check: str, isolated: bool = True) -> str:
    """A file of the user's own with a task whose check is this."""
    (directory / "own.py").write_text(OWN_TASK.format(check=check, isolated=isolated))
    return f"{directory / 'own.py'}:make"


def test_no_human_solutions_to_begin_with(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = own_task(tmp_path, "pass", isolated=False)
    with (tmp_path / "own.py").open("a") as file:
        file.write("\nOwn.demonstrations = lambda self: []\n")
    command = arguments(adder, tmp_path / "run", task=task, loop__supervised_start="true", loop__iterations=0)
    assert "loop.supervised_start: task addition has no human-written solutions" in refusal(capsys, command)


def test_no_pairs_for_a_verifier(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a model writes, this check takes it for right; the iterations are done and stay."""
    task = own_task(tmp_path, "return Verdict('7', True)", isolated=False)
    command = arguments(adder, tmp_path / "run", VERIFIER, task=task, evaluation__greedy="false")
    text = refusal(capsys, command, vstar.main)
    assert "no problem has both a right and a wrong completion (6 problems: 6 with right ones alone" in text
    assert "sampling.samples" in text and "sampling.temperature" in text
    assert "iteration-01/train.json" in manifests(tmp_path / "run")


FAILURES = {
    "time.sleep(60)": "the check took more than 5 s and was stopped",
    "raise KeyError('of theirs')": "the check raised KeyError: 'of theirs'",
    "sys.exit(3)": "the check raised SystemExit: 3",
    "os._exit(4)": "the check ended its process with status 4",
    "os.abort()": "the check ended its process by SIGABRT",
}


def test_checks_that_hang_raise_and_exit(adder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each on the first sample of another problem: the run goes on, counts them, and warns."""
    lines = ["found = super().check(problem, completion)", f"calls = {list(FAILURES)!r}", "place = self.first(problem)"]
    check = "\n        ".join([*lines, "exec(calls[place]) if place < len(calls) else None", "return found"])
    task = own_task(tmp_path, check)
    with (tmp_path / "own.py").open("a") as file:
        file.write(FIRST)
    run = tmp_path / "run"
    options = {"evaluation__greedy": "false", "loop__rationalize": "false", "problems__timeout": 5}
    assert star.main(arguments(adder, run, task=task, **options)) == 0
    found = manifests(run)["iteration-01/verify_sample.json"]["outputs"]
    assert found["failures"] == len(FAILURES) and found["samples"] == 24 and found["correct"] > 0
    failed = {line["failure"]: line for line in store_lines(run, "verdict") if line["failure"] is not None}
    assert set(failed) == set(FAILURES.values())
    assert all(line["answer"] is None and not line["correct"] for line in failed.values())
    warning = f"iteration 1: {len(FAILURES)} answer checks did not finish"
    assert warning in json.loads((run / "summary.json").read_text())["warnings"]
    assert rows(run / "events.jsonl")[-1]["event"] == "finished"


FIRST = """
def first(self, problem):
    # a worker may be a new one: what has been called is written down beside the task
    with open(__file__ + ".calls", "a+") as file:
        file.seek(0)
        before = file.read().split()
        file.write(problem.id + "\\n")
    return 99 if problem.id in before else len(set(before))

Own.first = first
"""
