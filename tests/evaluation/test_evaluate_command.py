"""`quietstar.evaluate` on tiny models: numbers worked out by hand, votes, going on after a kill."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch

from quietstar.evaluation.answers import AnswerFormat, load_format
from tests.evaluation.evaluated import (
    SYMBOLS,
    constant_model,
    evaluate,
    items,
    random_model,
    result,
    save,
    tokenizer,
    write_problems,
)

PROBABILITIES = {"7": 0.4, "1": 0.1, "\n": 0.2, "C": 0.15, "A": 0.05, "x": 0.1}


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(constant_model(PROBABILITIES), tmp_path_factory.mktemp("constant"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(), tmp_path_factory.mktemp("thinking"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("data"), ["77", "7", "17", "777", "1,171", "2"])


def test_soft_accuracy_by_hand(constant: Path, data: Path, tmp_path: Path) -> None:
    """Digits: 7 (0.4), 1 (0.1) and the line end (0.2) are all that is allowed and probable: of 0.7 they have 4/7, 1/7
    and 2/7. The answers 77, 7, 17, 777, 1171 and 2, each with its line end, have the probabilities below. Letters: C
    (0.15), A (0.05) and the line end (0.2) have 3/8, 1/8 and 1/2 of 0.4; the gold letters are A, B, C, D, E, A."""
    report = evaluate(constant, tmp_path, tasks="gsm8k,commonsenseqa", data=data, metrics="soft", batch_size=4)
    seven, one, end = 4 / 7, 1 / 7, 2 / 7
    numbers = [seven**2 * end, seven * end, one * seven * end, seven**3 * end, one * one * seven * one * end, 0.0]
    found = result(report, "soft accuracy", "gsm8k")
    assert found["n"] == 6
    assert found["off"]["mean"] == pytest.approx(sum(numbers) / 6, abs=1e-6)
    assert found["off"]["low"] < found["off"]["mean"] < found["off"]["high"]
    letters = [1 / 8 * 1 / 2, 0.0, 3 / 8 * 1 / 2, 0.0, 0.0, 1 / 8 * 1 / 2]
    assert result(report, "soft accuracy", "commonsenseqa")["off"]["mean"] == pytest.approx(sum(letters) / 6, abs=1e-6)
    by_id = {row["id"]: row for row in items(tmp_path) if row["task"] == "gsm8k"}
    assert [by_id[str(n + 1)]["off"] for n in range(6)] == pytest.approx(numbers, abs=1e-6)
    assert found["difference"]["mean"] == pytest.approx(0, abs=1e-6)  # this model's thoughts change nothing


def test_soft_accuracy_is_that_of_one_call_per_token(thinking: Path, data: Path, tmp_path: Path) -> None:
    """Batches, padding and anchors against the model called anew, without padding, before each token of the answer."""
    report = evaluate(thinking, tmp_path, tasks="gsm8k", data=data, metrics="soft", batch_size=4)
    model, own = random_model(), tokenizer()
    form = load_format("gsm8k", data)
    allowed = [SYMBOLS.index(character) for character in "0123456789\n"]
    expected = {}
    for problem in form.task.problems("test"):
        sides = [1.0, 1.0]
        answer = f"{problem.answer}\n"
        for place, character in enumerate(answer):
            ids = own(f"{form.prompt(problem)} {answer[:place]}", return_tensors="pt")["input_ids"]
            for side, called in enumerate((model.base, model)):
                with torch.no_grad():
                    probabilities = called(ids, logits_to_keep=1).logits[0, -1, allowed].double().softmax(-1)
                sides[side] *= float(probabilities[allowed.index(SYMBOLS.index(character))])
        expected[problem.id] = sides
    for row in items(tmp_path):
        assert [row["off"], row["on"]] == pytest.approx(expected[row["id"]], rel=1e-4)
    assert result(report, "soft accuracy", "gsm8k")["difference"]["mean"] != pytest.approx(0, abs=1e-4)


def test_exact_match_by_hand(constant: Path, data: Path, tmp_path: Path) -> None:
    """The most probable character is always 7: three tokens make 777, the answer of one problem in six."""
    report = evaluate(constant, tmp_path, tasks="gsm8k", data=data, metrics="exact", max_new_tokens=3)
    found = result(report, "exact match", "gsm8k")
    assert (found["off"]["mean"], found["on"]["mean"]) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    counts = {side: (own["tokens"], own["thought_at"]) for side, own in found["generated"].items()}
    assert counts == {"off": (18, 0), "on": (18, 1)}
    rows = items(tmp_path)
    assert {row["text"] for row in rows} == {"777"}
    assert {(row["tokens"], row["thought_at"]) for row in rows if row["thinking"] == "off"} == {(3, 0)}
    assert {(row["tokens"], row["thought_at"]) for row in rows if row["thinking"] == "on"} == {(3, 3)}


@pytest.mark.parametrize("metric", ["exact", "cot"])
def test_another_way_to_read_answers_needs_no_new_texts(
    metric: str, constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_problems(tmp_path / "data", ["77", "17", "777"])
    options = {"tasks": "gsm8k", "data": data, "metrics": metric, "max_new_tokens": 3, "votes": 1}
    evaluate(constant, tmp_path / "out", **options)
    before = items(tmp_path / "out")
    for reader in ("for_checker", "concluded"):
        monkeypatch.setattr(AnswerFormat, reader, lambda self, text: "#### 17")
    report = evaluate(constant, tmp_path / "out", **options)
    assert items(tmp_path / "out") == before
    assert report["results"][0]["off"]["mean"] == pytest.approx(1 / 3)
    file = data / "gsm8k" / "test.jsonl"
    file.write_text(file.read_text().replace("#### 777", "#### 17"))
    other_golds = evaluate(constant, tmp_path / "out", **options)
    assert items(tmp_path / "out") == before
    assert other_golds["results"][0]["off"]["mean"] == pytest.approx(2 / 3)


def test_answers_that_are_not_where_they_belong(constant: Path, tmp_path: Path) -> None:
    """Three 7s are no choice of CommonsenseQA: no completion has an answer. As the text of a choice they name it."""
    data = write_problems(tmp_path / "data", ["7", "7"])
    file = data / "commonsenseqa" / "dev_rand_split.jsonl"
    file.write_text(file.read_text().replace('"A0"', '"777"'))  # the first problem's gold choice
    options = {"tasks": "commonsenseqa", "data": data, "metrics": "exact", "max_new_tokens": 3}
    report = evaluate(constant, tmp_path / "out", **options)
    names = ("exact match", "exact match, lenient", "has an answer")
    assert [result(report, name, "commonsenseqa")["on"]["mean"] for name in names] == [0, 0.5, 0]


def test_chain_of_thought_by_hand(constant: Path, tmp_path: Path) -> None:
    """After any chain the constant model says 777777777777, which is the answer of two problems in four."""
    data = write_problems(tmp_path / "data", ["7" * 12, "2", "7" * 12, "3"])
    options = {"tasks": "gsm8k", "data": data, "metrics": "cot", "votes": 2, "max_new_tokens": 5}
    report = evaluate(constant, tmp_path / "out", **options)
    assert result(report, "chain of thought, maj@2", "gsm8k")["off"]["mean"] == 0.5
    assert result(report, "chain of thought, one sample", "gsm8k")["on"]["mean"] == 0.5
    assert result(report, "chain of thought, has an answer", "gsm8k")["on"]["mean"] == 1
    chains = {(row["id"], row["vote"], row["thinking"]): row["text"] for row in items(tmp_path / "out")}
    assert len(chains) == 4 * 2 * 2
    assert len(set(chains.values())) > 3  # sampled, with a seed of its own for each


def test_the_chains_of_a_problem_are_drawn_independently(constant: Path, tmp_path: Path) -> None:
    """Two of a problem's votes begin with the same character as often as two independent draws do, at the temperature
    that was asked for. With one seed for all votes they would be copies of one chain, and a vote of k no more than one
    sample."""
    data = write_problems(tmp_path / "data", ["7", "2", "3", "4"])
    options = {"tasks": "gsm8k", "data": data, "metrics": "cot", "votes": 16, "max_new_tokens": 1, "batch_size": 4}
    evaluate(constant, tmp_path / "out", temperature=0.5, **options)
    rows = items(tmp_path / "out")
    squares = [probability**2 for probability in PROBABILITIES.values()]  # at a temperature of a half
    by_chance = sum((square / sum(squares)) ** 2 for square in squares)
    for side in ("off", "on"):
        agreeing, pairs = 0, 0
        for name in "1234":
            texts = [row["text"] for row in rows if (row["id"], row["thinking"]) == (name, side)]
            same = [first == second for first, second in combinations(texts, 2)]
            agreeing, pairs = agreeing + sum(same), pairs + len(same)
        assert pairs == 4 * 120
        assert agreeing / pairs == pytest.approx(by_chance, abs=0.12)


def test_the_answer_after_a_chain_is_greedy_and_has_read_the_chain(thinking: Path, tmp_path: Path) -> None:
    """Each character against the model called anew on the prompt, the chain and the sentence that asks for the answer:
    the thinking model on one side, its base on the other."""
    data = write_problems(tmp_path / "data", ["7", "2"])
    options = {"tasks": "gsm8k", "data": data, "metrics": "cot", "votes": 2, "max_new_tokens": 4}
    evaluate(thinking, tmp_path / "out", **options)
    model, own = random_model(), tokenizer()
    form = load_format("gsm8k", data)
    prompts = {problem.id: form.prompt(problem) for problem in form.task.problems("test")}
    finals = {}
    for row in items(tmp_path / "out"):
        before = f"{prompts[row['id']]} Let's think step by step.{form.chain(row['text'])}{form.conclusion}"
        called = model if row["thinking"] == "on" else model.base
        assert row["final"]
        for place, character in enumerate(row["final"]):
            ids = own(before + row["final"][:place], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert int(called(ids, logits_to_keep=1).logits[0, -1].argmax()) == SYMBOLS.index(character)
        finals[row["id"], row["vote"], row["thinking"]] = row["final"]
    assert any(finals[one, vote, "on"] != finals[one, vote, "off"] for one in "12" for vote in (0, 1))


@pytest.mark.parametrize("metric", ["exact", "cot"])
def test_it_thinks_where_it_was_asked_to(metric: str, constant: Path, tmp_path: Path) -> None:
    """Before every second of three tokens: at two of them, and again at six of the twelve of a chain's answer."""
    data = write_problems(tmp_path / "data", ["77", "7"])
    options = {"tasks": "gsm8k", "data": data, "metrics": metric, "votes": 1, "max_new_tokens": 3, "think": "every:2"}
    evaluate(constant, tmp_path / "out", **options)
    counts = {row["thinking"]: (row["tokens"], row["thought_at"]) for row in items(tmp_path / "out")}
    assert counts == ({"off": (3, 0), "on": (3, 2)} if metric == "exact" else {"off": (15, 0), "on": (15, 8)})


def test_votes_are_counted_as_written_down(thinking: Path, tmp_path: Path) -> None:
    data = write_problems(tmp_path / "data", [str(digit) for digit in range(8)])
    options = {"tasks": "gsm8k", "data": data, "metrics": "cot", "votes": 3, "max_new_tokens": 2}
    report = evaluate(thinking, tmp_path / "out", **options)
    rows = items(tmp_path / "out")
    golds = {str(n + 1): str(n) for n in range(8)}
    for side in ("off", "on"):
        own = [row for row in rows if row["thinking"] == side]
        for row in own:
            number = re.search(r"\d+", row["final"])
            if number and not re.match(r"[\s.,]|$", row["final"][number.end() :]):
                number = None  # `7k` cannot be read whole
            row["answer"] = None if number is None else str(int(number[0]))
        shares = []
        for name, gold in golds.items():
            votes = Counter(row["answer"] for row in own if row["id"] == name and row["answer"] is not None)
            leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
            shares.append((gold in leaders) / len(leaders) if leaders else 0.0)
        assert result(report, "chain of thought, maj@3", "gsm8k")[side]["mean"] == pytest.approx(sum(shares) / 8)
        single = sum(row["answer"] == golds[row["id"]] for row in own) / 24
        assert result(report, "chain of thought, one sample", "gsm8k")[side]["mean"] == pytest.approx(single)


def test_a_killed_evaluation_goes_on(thinking: Path, data: Path, tmp_path: Path) -> None:
    """What a kill leaves: some whole lines and a torn one. Nothing whole is computed again, and the result is that of
    an evaluation that was not interrupted."""
    (tmp_path / "text.txt").write_text("The cat sat on 12 mats.\n" * 3)
    options = {
        "tasks": "gsm8k",
        "data": data,
        "metrics": "soft,exact,cot",
        "votes": 1,
        "max_new_tokens": 2,
        "batch_size": 2,
        "problems": 3,
        "text": tmp_path / "text.txt",
        "length": 24,
    }
    whole = evaluate(thinking, tmp_path / "whole", **options)
    lines = (tmp_path / "whole" / "evaluation_items.jsonl").read_text().splitlines(keepends=True)
    kept = len(lines) * 2 // 3
    (tmp_path / "killed").mkdir()
    file = tmp_path / "killed" / "evaluation_items.jsonl"
    file.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    again = evaluate(thinking, tmp_path / "killed", **options)
    read = file.read_text().splitlines()
    assert read[:kept] == [line.rstrip("\n") for line in lines[:kept]]
    keys = [json.loads(line)["key"] for line in read[:kept] + read[kept + 1 :]]
    assert sorted(keys) == sorted(json.loads(line)["key"] for line in lines)
    for before, after in zip(whole["results"], again["results"], strict=True):
        for sides in (before["generated"], after["generated"]):
            assert all(own.pop("tokens_per_second") > 0 for own in sides.values())
        assert {**before, "seconds": {}} == {**after, "seconds": {}}


def test_a_smaller_number_of_problems_draws_some_of_the_same(constant: Path, data: Path, tmp_path: Path) -> None:
    evaluate(constant, tmp_path / "four", tasks="gsm8k", data=data, metrics="soft", problems=4)
    evaluate(constant, tmp_path / "two", tasks="gsm8k", data=data, metrics="soft", problems=2)
    four, two = ({row["id"] for row in items(tmp_path / name)} for name in ("four", "two"))
    assert len(four) == 4 and len(two) == 2 and two < four


def test_problems_too_long_for_the_context_are_counted(constant: Path, tmp_path: Path) -> None:
    data = write_problems(tmp_path / "data", ["7", "7"])
    rows = [{"question": "long " * 200, "answer": "#### 7"}, {"question": "short?", "answer": "#### 7"}]
    (data / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(
        constant, tmp_path / "out", tasks="gsm8k", data=data, metrics="soft,exact,cot", votes=1, max_new_tokens=3
    )
    assert {(row["n"], row["skipped"]) for row in report["results"]} == {(1, 1)}
