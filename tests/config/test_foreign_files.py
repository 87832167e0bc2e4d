"""Files that others may have written, with one value of another type: one error that names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import QuietStarError
from quietstar.model.adapters import OPTIONS, read_adapter_options
from quietstar.reporting.comparison_report import compared_before
from quietstar.reporting.loop_files import read_summary
from quietstar.reporting.loop_report import write_loop_report
from quietstar.runs.directory import INDEX, read_index
from quietstar.verifiers.training import VERIFIER, read_description
from tests.outer_loop.loop_files import candidates, iteration, write_loop_run

DESCRIPTION = {
    "format": 1,
    "kind": "dpo",
    "score": "sum",
    "beta": 0.1,
    "files": {"a.safetensors": {"size": 1, "sha256": "0"}},
}
ADAPTERS = {"r": 8, "lora_alpha": 16.0, "target_modules": ["q"], "base_model_name_or_path": "a/b"}
COMPARISON = {"directories": {"one": "../one"}, "equal_budget": {"budget": 4.0, "asked": True}}
SUMMARY = {"task": "addition", "iterations": [iteration(1, True, ("1 digit",))], "candidates": candidates(2, 4)}
READERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "verifier": (VERIFIER, DESCRIPTION, read_description),
    "adapters": (OPTIONS, ADAPTERS, read_adapter_options),
    "comparison": ("comparison.json", COMPARISON, compared_before),
    "summary": ("summary.json", SUMMARY, read_summary),
    "index": (INDEX, {"weight_map": {"a": "a.safetensors"}}, read_index),
}


def write(place: Path, reader: str, value: Any) -> Callable[[Path], object]:
    name, _, read = READERS[reader]
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text(json.dumps(value))
    (place / "a.safetensors").write_bytes(b"")
    return read


@pytest.mark.parametrize("reader", READERS)
def test_what_was_written_is_read(reader: str, tmp_path: Path) -> None:
    assert write(tmp_path, reader, READERS[reader][1])(tmp_path)


@pytest.mark.parametrize(
    ("reader", "path", "value"),
    [
        ("verifier", "kind", ["dpo"]),
        ("verifier", "beta", "0.1"),
        ("verifier", "files", ["a"]),
        ("verifier", "files/a.safetensors/size", None),
        ("verifier", "tokenizer", "x"),
        ("verifier", "reference", {"path": 1}),
        ("verifier", "orm_loss", "l1"),
        ("adapters", "r", "eight"),
        ("adapters", "r", 1e999),
        ("adapters", "lora_alpha", None),
        ("adapters", "target_modules", "q"),
        ("adapters", "base_model_name_or_path", 3),
        ("comparison", "directories", ["../one"]),
        ("comparison", "directories.one", None),
        ("comparison", "equal_budget", 4),
        ("comparison", "equal_budget.budget", "4"),
        ("comparison", "equal_budget.asked", 1),
        ("summary", "iterations.0.iteration", "1"),
        ("summary", "iterations.0.sampled", None),
        ("summary", "iterations.0.held_out.accuracy", "0.5"),
        ("summary", "iterations.0.built.kept", {}),
        ("summary", "iterations.0.trained", 5),
        ("summary", "candidates.rows.0.k", None),
        ("summary", "candidates.rows.0.measure", "best"),
        ("summary", "candidates.discrimination", []),
        ("summary", "iterations", []),
        ("index", "weight_map", None),
        ("index", "weight_map", []),
        ("index", "weight_map.a", {}),
        ("index", "weight_map.a", "../a.safetensors"),
        ("index", "weight_map.a", "x" * 5000 + ".safetensors"),
    ],
)
def test_a_value_of_another_type_is_one_error(reader: str, path: str, value: Any, tmp_path: Path) -> None:
    """The fuzz run found `{"weight_map": null}`; the others raised KeyError, TypeError or AttributeError too."""
    content = json.loads(json.dumps(READERS[reader][1]))
    *before, last = [int(part) if part.isdecimal() else part for part in path.split("/" if "/" in path else ".")]
    inner = content
    for part in before:
        inner = inner[part]
    inner[last] = value
    read = write(tmp_path, reader, content)
    with pytest.raises(QuietStarError) as caught:
        read(tmp_path)
    message = str(caught.value)
    named = last if isinstance(last, str) else before[-1]
    assert READERS[reader][0] in message and str(named) in message and "\n" not in message


@pytest.mark.parametrize("message", ["1..2 s", "... s", f"{'9' * 400} s", "٣ s", "1e5 s", "- s"])
def test_hostile_events_and_lines_are_left_out_of_a_page(message: str, tmp_path: Path) -> None:
    run = write_loop_run(tmp_path / "run")
    with (run / "events.jsonl").open("a") as events:
        events.write(json.dumps({"step": 1, "event": "build finished", "message": message}) + "\n")
    for name in ("samples.jsonl", "iteration-03/kept.jsonl"):
        lines = (run / name).read_text().splitlines()
        keyed = [json.loads(line) for line in lines]
        broken = [{**line, "problem": ["p"]} for line in keyed] + [{"key": line.get("key")} for line in keyed]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in [*broken, *keyed, 5, "x"]))
    assert "report" in write_loop_report(run).read_text()
