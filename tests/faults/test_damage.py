"""A checkpoint that is not as it was written is named and passed over; nothing is overwritten where none is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import Runs, assert_same_end, events, happened, newest, state, steps


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """The last byte of a file."""
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    """All of a file."""
    file.write_bytes(b"")


def link(file: Path) -> None:
    """A file that lies elsewhere."""
    elsewhere = file.parents[2] / file.name
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


def add(file: Path) -> None:
    """A file too many."""
    file.write_text("not ours")


Damage = tuple[Callable[[Path], None], str]
DAMAGE: tuple[tuple[Damage, Damage, Damage], ...] = (
    ((flip, "model.safetensors"), (truncate, "model.safetensors"), (empty, "model.safetensors")),
    ((Path.unlink, "model.safetensors"), (flip, "optimizer.safetensors"), (truncate, "optimizer.safetensors")),
    ((Path.unlink, "optimizer.safetensors"), (flip, "state.json"), (empty, "state.json")),
    ((Path.unlink, "state.json"), (empty, "MANIFEST.json"), (Path.unlink, "MANIFEST.json")),
    ((flip, "config.json"), (link, "tokenizer.json"), (add, "optimizer.pt")),
)
"""Of steps 4, 3 and 2: each run meets three of them, and goes on from step 1."""


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _content(directory: Path) -> dict[str, bytes]:
    ours = {path for path in directory.rglob("*") if path.is_file() and path.name not in (".lock", "environment.json")}
    return {str(path.relative_to(directory)): path.read_bytes() for path in ours}


@pytest.mark.parametrize(
    "damage", DAMAGE, ids=lambda kinds: ",".join(f"{kind.__name__}-{name}" for kind, name in kinds)
)
def test_damaged_checkpoints_are_named_and_the_newest_whole_one_is_used(
    runs: Runs, tmp_path: Path, damage: tuple[Damage, ...]
) -> None:
    run = runs.stopped_after(4, tmp_path / "run")
    for step, (kind, name) in zip((4, 3, 2), damage, strict=True):
        kind(_checkpoint(run, step) / name)
    text = runs.run(run)
    for step, (_, name) in zip((4, 3, 2), damage, strict=True):
        (line,) = [line for line in text.splitlines() if f"damaged checkpoint: {_checkpoint(run, step)}" in line]
        assert name in line and f"using {_checkpoint(run, 1)}" in line
    assert (1, "resumed") in [(event["step"], event["event"]) for event in events(run)]
    assert_same_end(run, runs.whole())
    assert steps(run) == [6, 8]


def test_without_a_whole_checkpoint_nothing_is_overwritten(runs: Runs, tmp_path: Path) -> None:
    run = runs.stopped_after(3, tmp_path / "run")
    for step, (kind, name) in zip((1, 2, 3), DAMAGE[1], strict=True):
        kind(_checkpoint(run, step) / name)
    before = _content(run)
    text = runs.run(run, expect=2)
    assert "error: " in text and "no checkpoint is whole" in text and "Traceback" not in text
    for step, (_, name) in zip((1, 2, 3), DAMAGE[1], strict=True):
        assert f"{_checkpoint(run, step)}: " in text and name in text
    assert _content(run) == before


@pytest.mark.parametrize(
    "names", [("optimizer.safetensors",), ("state.json",), ("optimizer.safetensors", "state.json")]
)
def test_a_missing_part_is_refused_and_allowed_on_request(runs: Runs, tmp_path: Path, names: tuple[str, ...]) -> None:
    run = runs.stopped_after(1, tmp_path / "run")
    for name in names:
        (_checkpoint(run, 1) / name).unlink()
    text = runs.run(run, expect=2)
    assert f"{names[0]} is missing" in text and "--training.allow_partial true" in text
    text = runs.run(run, training__allow_partial="true")
    assert f"without {' and '.join(names)}, which start afresh" in text
    assert state(newest(run))["step"] == 8 and steps(run) == [6, 8]
    same = (newest(run) / "model.safetensors").read_bytes() == (newest(runs.whole()) / "model.safetensors").read_bytes()
    assert same == (names == ("state.json",))  # which for texts in memory holds no more than reports need


def test_a_truncated_line_of_metrics_is_written_again(runs: Runs, tmp_path: Path) -> None:
    run = runs.stopped_after(4, tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-100])
    runs.run(run)
    assert_same_end(run, runs.whole())
    assert happened(run) == []
