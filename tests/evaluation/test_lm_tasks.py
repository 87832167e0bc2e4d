"""lm-eval on our models, offline, with tasks that are defined by files of the test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quietstar.evaluate import main
from quietstar.evaluation.lm_tasks import comparisons, measured
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


def test_numbers_that_are_no_means_over_documents(tmp_path: Path) -> None:
    """Perplexities against those of the models called directly, and a correlation over all choices."""
    roll = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    names = ("word_perplexity", "bits_per_byte")
    rolling = write_task(tmp_path, "rolling", **roll, metric_list=[{"metric": name} for name in names])
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    whole = write_task(tmp_path, "whole", **choice, metric_list=[{"metric": "mcc"}, {"metric": "brier_score"}])
    checkpoint = save(random_model(), tmp_path / "model")
    report = evaluate(checkpoint, tmp_path / "out", lm_eval=f"{rolling},{whole}")
    model, words, sums = random_model(), 5 * len(DOCUMENTS), {}
    for side, called in (("off", model.base), ("on", model)):
        sums[side] = sum(_log_likelihood(called, one["question"]) for one in DOCUMENTS)
        found = result(report, "word_perplexity", "rolling")[side]
        assert found["mean"] == pytest.approx(math.exp(-sums[side] / words), rel=1e-3)
        assert found["low"] < found["mean"] < found["high"]
    size = sum(len(one["question"]) for one in DOCUMENTS)
    bits = result(report, "bits_per_byte", "rolling")
    assert bits["difference"]["mean"] == pytest.approx((sums["off"] - sums["on"]) / size / math.log(2), rel=1e-3)
    assert (bits["higher_is_better"], bits["resampled"], bits["n"]) == (False, "documents", 6)
    assert "lm-eval's bits_per_byte" in bits["statement"]
    for name in ("mcc", "brier_score"):
        found = result(report, name, "whole")["difference"]
        assert found["low"] <= found["mean"] <= found["high"]


def test_groups_own_aggregations_and_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A group's number and one that none of lm-eval's functions gives have no interval; NaN is named; documents without
    a number on a side are left out."""

    def side(values: list[float], largest: float, of_group: float) -> dict[str, Any]:
        metrics = {"acc": values, "largest": values, "none": [math.nan] * 4, "perplexity": [-1e4] * 4}
        samples = [
            {"doc_id": n, "filter": "none", "metrics": list(metrics), **{name: own[n] for name, own in metrics.items()}}
            for n in range(4)
        ]
        scores = {
            "acc,none": math.nan,
            "largest,none": largest,
            "none,none": math.nan,
            "perplexity,none": math.inf,
            "acc_stderr,none": "N/A",
        }
        results = {
            "results": {"part": {"sample_len": 4, **scores}, "all": {"acc,none": of_group}},
            "samples": {"part": samples},
            "configs": {"part": {"output_type": "multiple_choice"}},
            "group_subtasks": {"all": ["part"]},
            "higher_is_better": {"part": {"acc": True, "largest": False}},
            "n-shot": {"part": 2},
        }
        kept: dict[str, Any] = json.loads(json.dumps(measured(results) | {"seconds": 1.0}))
        return kept

    off, on = side([1.0, 0.0, math.nan, 0.5], 0.9, 0.5), side([1.0, 1.0, 1.0, 0.0], 0.7, 0.75)
    found = {(one.metric, one.of): one for one in comparisons(off, on, "always", 0)}
    told = capsys.readouterr().err
    assert "none of part is left out" in told and "perplexity of part is left out" in told
    assert list(found) == [("acc", "part"), ("largest", "part"), ("acc", "all")]
    acc, largest, group = found.values()
    assert (acc.n, acc.skipped, acc.off.mean, acc.on.mean) == (3, 1, 0.5, pytest.approx(2 / 3))
    assert acc.off.low is not None and "with 2 examples, mean over documents" in acc.statement
    assert (largest.difference.mean, largest.difference.low) == (pytest.approx(-0.2), None)
    assert "leaves no interval" in largest.statement and largest.higher_is_better is False
    assert (group.n, group.on.mean, group.on.low, group.higher_is_better) == (4, 0.75, None, None)


def test_a_task_without_a_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"output_type": "generate_until", "doc_to_target": "sum", "generation_kwargs": {"max_gen_toks": 2}}
    bypass = write_task(tmp_path, "none", **fields, metric_list=[{"metric": "bypass"}])
    checkpoint = save(random_model(), tmp_path / "model")
    arguments = [str(checkpoint), "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--lm_eval", str(bypass)]
    assert main(arguments) == 2
    assert "has no metric with a finite number" in capsys.readouterr().err


def _log_likelihood(called: Any, text: str) -> float:
    """Of all characters, the first after the end-of-sequence token, as lm-eval begins a text."""
    own = tokenizer()
    ids = torch.tensor([[own.eos_token_id, *own(text)["input_ids"]]])
    with torch.no_grad():
        logprobs = called(ids).logits[0, :-1].double().log_softmax(-1)
    return float(logprobs.gather(1, ids[0, 1:, None]).sum())


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
