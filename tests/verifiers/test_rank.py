"""The command on real files: what it writes, where it goes on, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quietstar import rank
from quietstar.verifiers.ranking import process_score
from quietstar.verifiers.verifier import Verifier
from tests.verifiers.tiny import labelled

COMPLETIONS = [one.completion for one in labelled(1)]


def write(path: Path, lines: Sequence[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def candidates(tmp_path: Path) -> str:
    listed = [{"prompt": "Q:1+1A:", "completions": COMPLETIONS, "answers": ["2", "3", "3", None, "2"]}]
    single = [
        {"id": "p", "question": "Q:2A:", "completion": text, "answer": answer} for text, answer in (("ab", 4), ("b", 5))
    ]
    return write(tmp_path / "candidates.jsonl", [single[0], *listed, "", single[1]])


def run(*arguments: str) -> int:
    return rank.main([*arguments, "--device", "cpu"])


def test_candidates_are_ranked_by_the_verifiers_scores(base: Path, candidates: str, tmp_path: Path) -> None:
    out = tmp_path / "ranked.jsonl"
    assert run("--verifier", str(base), "--candidates", candidates, "--out", str(out), "--score", "mean") == 0
    first, second = read(out)
    assert (first["id"], second["prompt"]) == ("p", "Q:1+1A:")
    expected = Verifier(base, device="cpu").score("Q:1+1A:", COMPLETIONS, "mean")
    ranked = second["ranked"]
    assert [entry["rank"] for entry in ranked] == [1, 2, 3, 4, 5]
    assert [entry["score"] for entry in ranked] == pytest.approx(sorted(expected, reverse=True), rel=1e-5)
    assert all(entry["completion"] == COMPLETIONS[entry["index"]] for entry in ranked)
    assert {entry["completion"] for entry in first["ranked"]} == {"ab", "b"}


@pytest.mark.parametrize("how", [None, "minimum"])
def test_candidates_are_ranked_by_what_their_steps_are_worth(base: Path, tmp_path: Path, how: Any) -> None:
    """A step ends where the task says, which for addition is a semicolon, or else with its line."""
    texts = ["1+1+0=20;>2.\n", "1\n2\n3", "", "=;\n=;"]
    path = write(tmp_path / "candidates.jsonl", [{"prompt": "Q:1+1A:", "completions": texts}])
    lines = [["1+1+0=20;>2.\n"], ["1\n", "2\n", "3"], [""], ["=;\n", "=;"]]
    pairs = [["1+1+0=20;", ">2.\n"], ["1\n2\n3"], [""], ["=;", "\n=;"]]
    verifier = Verifier(base, device="cpu")
    for number, (steps, task) in enumerate(((lines, ()), (pairs, ("--task", "addition")))):
        out = tmp_path / f"{number}.jsonl"
        arguments = ["--verifier", str(base), "--candidates", path, "--out", str(out), "--by", "process", *task]
        assert run(*arguments, *(() if how is None else ("--how", how))) == 0
        found = read(out)[0]["ranked"]
        expected = [verifier.score_steps("Q:1+1A:", own) for own in steps]
        scores = [process_score(own, how or "product") for own in expected]
        assert [entry["index"] for entry in found] == sorted(range(4), key=lambda place: -scores[place])
        for entry in found:
            assert entry["steps"] == pytest.approx(expected[entry["index"]], rel=1e-4)
            assert entry["score"] == pytest.approx(scores[entry["index"]], rel=1e-4)


def test_steps_are_scored_by_their_own_kinds_of_score(
    base: Path, candidates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--verifier", str(base), "--candidates", candidates]
    out = tmp_path / "ranked.jsonl"
    assert run(*arguments, "--by", "process", "--score", "ratio", "--reference", str(base), "--out", str(out)) == 0
    assert {score for line in read(out) for entry in line["ranked"] for score in entry["steps"]} == {0.5}
    assert run(*arguments, "--by", "process", "--how", "last", "--out", str(out)) == 2
    assert "ranked.jsonl:1 is not what these candidates" in capsys.readouterr().err
    for wrong, message in (
        (("--by", "process", "--score", "sum"), "score: got 'sum', but steps are scored by ratio"),
        (("--by", "process", "--score", "ratio"), "a plain model without a reference"),
        (("--how", "last"), "how: got last, but --by score has no steps"),
    ):
        assert run(*arguments, *wrong) == 2
        assert message in capsys.readouterr().err
    assert run("--candidates", candidates, "--by", "process") == 2
    assert "verifier: missing; --by process needs one" in capsys.readouterr().err


def test_a_task_whose_steps_lose_something_is_named(
    base: Path, candidates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from quietstar.tasks.addition import Addition\n"
        "class Lossy(Addition):\n"
        "    def steps(self, completion):\n"
        "        return completion.split('+')\n"
    )
    path = write(tmp_path / "more.jsonl", [{"prompt": "Q:", "completions": ["a", "1+2"]}])
    assert run("--verifier", str(base), "--candidates", path, "--by", "process", "--task", f"{own}:Lossy") == 2
    assert (
        "more.jsonl:1: the steps that the task finds, joined, are not the completion '1+2'" in capsys.readouterr().err
    )


def test_a_majority_needs_no_verifier(candidates: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--candidates", candidates, "--by", "majority") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(entry["index"], entry["votes"]) for entry in lines[1]["ranked"]] == [
        (0, 2),
        (4, 2),
        (1, 2),
        (2, 2),
        (3, 0),
    ]
    assert [entry["answer"] for entry in lines[0]["ranked"]] == ["4", "5"]


def test_a_begun_file_is_gone_on_with(base: Path, candidates: str, tmp_path: Path) -> None:
    out = tmp_path / "ranked.jsonl"
    arguments = ["--verifier", str(base), "--candidates", candidates, "--by", "weighted", "--out", str(out)]
    assert run(*arguments) == 0
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    out.write_bytes(whole[: first + 20])  # killed while the second line was written
    assert run(*arguments) == 0
    assert out.read_bytes() == whole


def test_a_file_of_something_else_is_kept(
    base: Path, candidates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ranked.jsonl"
    out.write_text('{"precious": 1}\n')
    assert run("--verifier", str(base), "--candidates", candidates, "--out", str(out)) == 2
    assert "ranked.jsonl:1 is not what these candidates" in capsys.readouterr().err
    assert out.read_text() == '{"precious": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Q:", "completions": ["a"', "candidates.jsonl:2: not valid JSON"),
        ({"completions": ["a"]}, "candidates.jsonl:2: prompt: missing or not a text"),
        ({"prompt": "Q:", "completions": []}, "candidates.jsonl:2: completions: needs a list of texts"),
        ({"prompt": "Q:", "completion": None}, "candidates.jsonl:2: completions: needs a list of texts"),
        ({"prompt": "Q:", "completions": ["a"], "answers": []}, "candidates.jsonl:2: answers: needs a list of as many"),
        (
            {"prompt": "Q:", "completions": ["a"], "tokenizer": "0" * 64},
            "candidates.jsonl:2: made for another tokenizer",
        ),
        ({"id": 1, "prompt": "Q:", "completion": "a"}, "candidates.jsonl:2: id 1 has another prompt than at "),
    ],
)
def test_wrong_lines_are_named_before_anything_is_scored(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, message: str
) -> None:
    path = write(tmp_path / "candidates.jsonl", [{"id": 1, "prompt": "A:", "completion": "a"}, line])
    out = tmp_path / "ranked.jsonl"
    assert run("--verifier", str(base), "--candidates", path, "--out", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_missing_files_and_missing_answers_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--verifier", str(base), "--candidates", str(tmp_path / "none.jsonl")) == 2
    assert "none.jsonl (No such file" in capsys.readouterr().err
    path = write(tmp_path / "candidates.jsonl", [{"prompt": "Q:", "completions": ["a"]}])
    assert run("--candidates", path) == 2
    assert "verifier: missing; --by score needs one" in capsys.readouterr().err
    assert run("--candidates", path, "--by", "majority") == 2
    assert "candidates.jsonl:1: has no answers" in capsys.readouterr().err
