"""A path that the system will not look at gets one line that names it, wherever a user's path comes in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import check_input, check_model_path, path_kind
from quietstar.data.shards import find_shards, is_local, local_file, read_objects
from quietstar.data.sources import read_documents, read_text
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import CheckpointError, QuietStarError
from quietstar.evaluation.answers import load_format
from quietstar.evaluation.settings import Settings, check_settings, read_task
from quietstar.inference.loading import load_thinking
from quietstar.inference.prompts import read_prompts
from quietstar.model.adapters import absolute, is_adapter_checkpoint
from quietstar.model.authors_checkpoint import is_authors_checkpoint
from quietstar.model.loading import load_configuration
from quietstar.reporting.comparison_report import write_any_report
from quietstar.reporting.train_report import write_report
from quietstar.runs.checkpoints import checkpoint_directory, latest_checkpoint
from quietstar.runs.directory import check_model_directory, model_name, read_run, training_length
from quietstar.tasks.file_task import find_files, solved_examples
from quietstar.tasks.registry import load_task
from quietstar.verifiers.verifier import Verifier

BAD = {
    "long": "x" * 300,
    "long directory": f"{'y' * 256}/a.jsonl",
    "longer than any path": "/".join(["z" * 200] * 30),
    "NUL": "a\0b.jsonl",
    "link to itself": "loop.jsonl",
    "inside a link to itself": "loop.jsonl/a.jsonl",
    "inside a file": "file.jsonl/a.jsonl",
    "home of nobody": "~nobody-of-that-name/a.jsonl",
}
READERS: dict[str, Callable[[str], Any]] = {
    "check_model_path": lambda path: check_model_path(f"./{path}"),
    "find_shards": lambda path: find_shards(path, None, "files"),
    "find_shards of a stream": lambda path: find_shards(f"./{path}", None, "stream"),
    "local_file": local_file,
    "local_file of an option": lambda path: local_file(path, "prompts"),
    "read_objects": lambda path: list(read_objects(path, "")),
    "read_documents": lambda path: list(read_documents(path)),
    "read_text": read_text,
    "load_tokenizer": lambda path: load_tokenizer(f"./{path}"),
    "load_format": lambda path: load_format("gsm8k", Path(path)).task.problems("test"),
    "read_task": read_task,
    "load_thinking": lambda path: load_thinking(f"./{path}", device="cpu"),
    "read_prompts": lambda path: read_prompts((), path),
    "load_configuration": lambda path: load_configuration(f"./{path}"),
    "write_any_report": lambda path: write_any_report(Path(path)),
    "write_report": write_report,
    "checkpoint_directory": lambda path: checkpoint_directory(f"./{path}"),
    "read_run": lambda path: read_run(Path(path)),
    "find_files": lambda path: find_files(ProblemOptions(path=path), "train", ["train.jsonl"]),
    "find_files of the test": lambda path: find_files(ProblemOptions(path=".", test_path=path), "test", ["*.jsonl"]),
    "solved_examples": lambda path: solved_examples(ProblemOptions(few_shot_path=path), False),
    "load_task": lambda path: load_task("jsonl", ProblemOptions(path=path)).problems("train"),
    "load_task of a file": lambda path: load_task(f"{path}.py:make", ProblemOptions()),
    "Verifier": lambda path: Verifier(f"./{path}", device="cpu"),
}
"""Functions that cannot use any of these paths."""
LOOKS: dict[str, Callable[[str], Any]] = {
    "path_kind": lambda path: path_kind(path, "out"),
    "check_input": lambda path: check_input(path, "out"),
    "is_local": is_local,
    "latest_checkpoint": latest_checkpoint,
    "check_model_directory": check_model_directory,
    "absolute": absolute,
    "is_adapter_checkpoint": is_adapter_checkpoint,
    "is_authors_checkpoint": is_authors_checkpoint,
    "model_name": lambda path: model_name(Path(path)),
    "training_length": lambda path: training_length(Path(path)),
    "check_settings": lambda path: check_settings(
        Settings(checkpoint="a/b", data=Path(path), tasks=("gsm8k", "commonsenseqa"))
    ),
}
"""Functions to which a path with nothing there may be fine."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("file.jsonl").write_text('{"text": "a"}')
    os.symlink("loop.jsonl", "loop.jsonl")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BAD)
def test_a_path_that_cannot_be_read(reader: str, kind: str) -> None:
    """`Path.is_dir` raises OSError for a name that is too long, and `resolve` RuntimeError for a circle of links."""
    with pytest.raises(QuietStarError) as caught:
        READERS[reader](BAD[kind])
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", BAD)
def test_a_path_that_is_only_looked_at(look: str, kind: str) -> None:
    try:
        LOOKS[look](BAD[kind])
    except QuietStarError as error:
        assert re.search("cannot look at|is a link", str(error)) and "\0" not in str(error)


@pytest.mark.parametrize("target", ["elsewhere", ".", "nowhere", "/tmp"])
def test_checkpoints_that_are_a_link_are_refused(target: str) -> None:
    Path("elsewhere").mkdir()
    Path("run").mkdir()
    os.symlink(target if target.startswith("/") else f"../{target}", "run/checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints: is a link; needs a directory of the run's own"):
        latest_checkpoint(Path("run/checkpoints"))
