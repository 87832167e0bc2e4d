"""lm-eval on our models, offline, with tasks that are defined by files of the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quietstar.evaluate import main
from tests.evaluation.evaluated import evaluate, items, random_model, result, save, tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'quietstar[eval]')")

CHOICES = ["yes", "no", "it may be"]
DOCUMENTS = [
    {"question": f"What is {n} and {n}?", "choices": CHOICES, "gold": n % 3, "sum": str(2 * n)} for n in range(6)
]


def write_task(directory: Path, name: str, **fields: Any) -> Path:
    (directory / "documents.json").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    files = {"data_files": {"test": str(directory / "documents.json")}, "cache_dir": str(directory / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump({**task, "doc_to_text": "{{question}}", **fields}))
    return directory / f"{name}.yaml"


def test_choices_and_generation(tmp_path: Path) -> None:
    """The choices with the largest log-likelihoods are those of the models called directly, thinking and not; and the
    records are used again."""
    choice = write_task(
        *(tmp_path, "choice"),
        **{"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"},
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    generate = write_task(
        *(tmp_path, "generate"),
        **{"output_type": "generate_until", "doc_to_target": "sum"},
        generation_kwargs={"until": ["\n"], "max_gen_toks": 3},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    checkpoint = save(random_model(), tmp_path / "model")
    options = {"lm_eval": f"{choice},{generate}", "batch_size": 4}
    report = evaluate(checkpoint, tmp_path / "out", **options)
    found = result(report, "acc", "choice")
    model = random_model()
    for side, called in (("off", model.base), ("on", model)):
        right = [_best(called, one["question"]) == one["gold"] for one in DOCUMENTS]
        assert found[side]["mean"] == pytest.approx(sum(right) / len(DOCUMENTS))
    assert result(report, "exact_match", "generate")["n"] == len(DOCUMENTS)
    count = len(items(tmp_path / "out"))
    again = evaluate(checkpoint, tmp_path / "out", **options)
    assert (again["results"], len(items(tmp_path / "out"))) == (report["results"], count)


def _best(called: Any, question: str) -> int:
    """lm-eval puts a space between a question and its choices."""
    own, scores = tokenizer(), []
    for text in CHOICES:
        before = own(question)["input_ids"]
        ids = torch.tensor([own(f"{question} {text}")["input_ids"]])
        with torch.no_grad():
            logprobs = called(ids).logits[0, :-1].double().log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[len(before) - 1 :]
        scores.append(float(picked.sum()))
    return max(range(len(scores)), key=scores.__getitem__)


def test_tasks_that_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--lm_eval"]
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main(["/nowhere", *out, str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file or directory" in capsys.readouterr().err
    assert main(["/nowhere", *out, str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml has no field 'task'" in capsys.readouterr().err
    checkpoint = save(random_model(), tmp_path / "model")
    wrong = write_task(tmp_path, "wrong", output_type="no_such_type", doc_to_target="sum")
    assert main([str(checkpoint), *out, str(wrong)]) == 2
    assert "lm_eval: the task" in capsys.readouterr().err
