"""Tiny runs of the real command, and what they leave on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quietstar.runs.checkpoints import list_checkpoints
from quietstar.training.metrics import read_metrics
from tests.faults.launch import Process, Zygote

CLOCKS = ("seconds", "tokens_per_second")
"""Metrics that no two runs have in common."""

STEPS = 8
MICRO_BATCHES = 2
"""Of a step."""

OPTIONS: dict[str, Any] = {
    "model.thought_length": 2,
    "model.lookahead": 2,
    "model.start_text": "[",
    "model.end_text": "]",
    "data.length": 12,
    "data.append_eos": "false",
    "data.validation_fraction": 0.1,
    "training.steps": STEPS,
    "training.batch_size": 4,
    "training.micro_batch_size": 4 // MICRO_BATCHES,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 2,
    "training.eval_every": 4,
    "training.eval_batches": 1,
    "training.log_every": 3,
    "training.save_every": 2,
    "training.keep_best": "false",
    "training.report": "false",
    "training.device": "cpu",
    "training.threads": 1,
}


def arguments(inputs: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The command line of a run, `changes` by dotted key with `__` for the dot."""
    options = {
        "model.path": inputs / "model",
        "data.path": inputs / "text.jsonl",
        "output_dir": output_dir,
        **OPTIONS,
    }
    options |= {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


class Runs:
    """Runs on one tiny model and text.

    Args:
        zygote: Who runs them.
        inputs: Directory with `model/` and the texts.
        outputs: For the runs that others are compared with.
    """

    def __init__(self, zygote: Zygote, inputs: Path, outputs: Path) -> None:
        self.zygote = zygote
        self.inputs = inputs
        self._outputs = outputs
        self._references: dict[str, Path] = {}

    def launch(self, output_dir: Path, *faults: Sequence[object], **changes: Any) -> Process:
        """Starts one."""
        return self.zygote.launch(arguments(self.inputs, output_dir, **changes), *faults)

    def run(self, output_dir: Path, *faults: Sequence[object], expect: int = 0, **changes: Any) -> str:
        """Runs one to its end, which must have this exit status; returns what it has written."""
        return self.zygote.run(arguments(self.inputs, output_dir, **changes), *faults, expect=expect)

    def whole(self, **changes: Any) -> Path:
        """The output directory of a run with these options that nothing has happened to."""
        key = json.dumps(changes, default=str, sort_keys=True)
        if key not in self._references:
            self._references[key] = self._outputs / f"whole-{len(self._references)}"
            self.run(self._references[key], **changes)
        return self._references[key]

    def stopped_after(self, step: int, output_dir: Path, **changes: Any) -> Path:
        """What a run leaves that ends with its checkpoint of a step, in the middle of the next one."""
        whole = self.whole(**changes, training__save_every=1, training__keep_checkpoints=STEPS)
        shutil.copytree(whole, output_dir)
        for later, path in list_checkpoints(output_dir / "checkpoints"):
            if later > step:
                shutil.rmtree(path)
        return output_dir


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its clocks; NaN as None, which equals itself."""
    return [
        {key: None if value != value else value for key, value in line.items() if key not in CLOCKS}
        for line in read_metrics(output_dir / "metrics.jsonl")
    ]


def events(output_dir: Path) -> list[dict[str, Any]]:
    """events.jsonl."""
    file = output_dir / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def happened(output_dir: Path) -> list[tuple[int, str]]:
    """(step, event) of what is not the usual course of a run."""
    usual = ("started", "resumed", "finished")
    return [(event["step"], event["event"]) for event in events(output_dir) if event["event"] not in usual]


def steps(output_dir: Path) -> list[int]:
    """The steps of the checkpoints."""
    return [step for step, _ in list_checkpoints(output_dir / "checkpoints")]


def newest(output_dir: Path) -> Path:
    """The newest checkpoint."""
    return list_checkpoints(output_dir / "checkpoints")[-1][1]


def state(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint without its clocks."""
    value = json.loads((checkpoint / "state.json").read_text())
    record = {
        key: {name: number for name, number in entry.items() if name not in CLOCKS}
        if isinstance(entry, dict)
        else entry
        for key, entry in value["record"].items()
        if key not in CLOCKS
    }
    return value | {"record": record}


def assert_same_end(output_dir: Path, whole: Path, *, same_micro_batches: bool = True) -> None:
    """Bitwise the same weights and optimizer, the same metrics, and the same place in the data."""
    ours, theirs = newest(output_dir), newest(whole)
    assert ours.name == theirs.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    assert lines(output_dir) == lines(whole)
    assert state(ours)["position"] == state(theirs)["position"]
    assert state(ours)["record"] == state(theirs)["record"]
    whole_names = {f"step-{step:08d}" for step in steps(output_dir)}
    assert {path.name for path in (output_dir / "checkpoints").iterdir()} == whole_names
