"""One process per run directory, and one configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quietstar.demos.corpus import SYMBOLS
from tests.faults.runs import Runs, assert_same_end, happened, newest


def test_a_second_process_is_refused_until_the_first_is_gone(runs: Runs, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    first = runs.launch(run, ("pause", 5, str(gate)))
    first.until(gate.exists)
    before = (run / "metrics.jsonl").read_bytes()
    text = runs.run(run, expect=2)
    assert f"error: output_dir: {run} is in use by process {first.pid} on " in text and "Traceback" not in text
    assert (run / "metrics.jsonl").read_bytes() == before and not first.ended
    first.send("SIGKILL")
    assert first.wait() == -9
    runs.run(run)
    assert_same_end(run, runs.whole())


def test_a_stopped_process_keeps_its_run(runs: Runs, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    first = runs.launch(run, ("pause", 5, str(gate)))
    first.until(gate.exists)
    first.send("SIGSTOP")
    gate.unlink()
    assert "is in use by" in runs.run(run, expect=2)
    first.send("SIGCONT")
    assert first.wait() == 0
    assert_same_end(run, runs.whole())


def test_a_lock_that_is_a_link_is_not_followed(runs: Runs, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.write_text("precious")
    (run / ".lock").symlink_to(elsewhere)
    text = runs.run(run, expect=2)
    assert "error: output_dir: " in text and str(run / ".lock") in text and "Traceback" not in text
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"model__thought_length": 3, "training__learning_rate": 1e-3},
            ("model.thought_length was 2 and is 3", "training.learning_rate was 0.01 and is 0.001"),
        ),
        ({"training__batch_size": 2, "training__seed": 1}, ("training.batch_size was 4", "training.seed was 0")),
        ({"data__packing": "separate"}, ("data.packing was 'joined' and is 'separate'",)),
        ({"objective__preset": "paper"}, ("objective.preset was 'default' and is 'paper'",)),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_options_are_listed_and_refused(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], messages: tuple[str, ...]
) -> None:
    run = runs.stopped_after(4, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    text = runs.run(run, expect=2, **changes)
    assert "belongs to another run: " in text and "--training.override true" in text
    assert all(message in text for message in messages)
    assert (run / "metrics.jsonl").read_bytes() == before
    runs.run(run)
    assert_same_end(run, runs.whole())


def test_override(runs: Runs, tmp_path: Path) -> None:
    run = runs.stopped_after(4, tmp_path / "run")
    text = runs.run(run, training__learning_rate=1e-3, training__override="true")
    assert "resumed although training.learning_rate was 0.01 and is 0.001" in text
    assert happened(run) == [(4, "override")]
    assert (newest(run) / "model.safetensors").read_bytes() != (newest(runs.whole()) / "model.safetensors").read_bytes()


def test_a_text_that_has_changed(runs: Runs, tmp_path: Path) -> None:
    text, run = tmp_path / "text.jsonl", tmp_path / "run"
    shutil.copy(runs.inputs / "text.jsonl", text)
    runs.run(run, ("send", 9, "SIGTERM"), expect=143, data__path=text)
    first, *rest = text.read_text().splitlines()
    text.write_text("\n".join([json.dumps({"text": json.loads(first)["text"][::-1]}), *rest]) + "\n")
    assert "the training data's sha256 was" in runs.run(run, expect=2, data__path=text)


def test_a_tokenizer_that_has_changed(runs: Runs, tmp_path: Path) -> None:
    """A token more, which is in no training text."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(runs.inputs / "model", model)
    runs.run(run, ("send", 9, "SIGTERM"), expect=143, model__path=model)
    vocabulary = {symbol: index for index, symbol in enumerate([*SYMBOLS, "@"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    text = runs.run(run, expect=2, model__path=model)
    assert "belongs to another run: " in text and "tokenizer." in text


def test_a_vocabulary_that_has_changed(runs: Runs, tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(runs.inputs / "model", model)
    runs.run(run, ("send", 9, "SIGTERM"), expect=143, model__path=model)
    larger = AutoModelForCausalLM.from_pretrained(model)
    larger.resize_token_embeddings(20)
    larger.save_pretrained(model)
    text = runs.run(run, expect=2, model__path=model)
    assert "error: " in text and "Traceback" not in text and "[14, 16]" in text and "[20, 16]" in text
