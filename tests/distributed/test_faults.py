"""What happens to one rank happens to all: no rank waits for another that has gone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from quietstar.config.commands import parse_train_config
from quietstar.errors import ConfigError
from quietstar.training.metrics import read_metrics
from tests.distributed.launch import launch, once
from tests.distributed.runs import metrics_of, train
from tests.distributed.steps import TEXTS

RUNS = "tests.distributed.runs"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    directory = once(tmp_path_factory, "undisturbed", lambda to: train(to, 4))
    return [metrics_of(line) for line in read_metrics(directory / "metrics.jsonl")]


def steps_of(directory: Path) -> list[int]:
    return [line["step"] for line in read_metrics(directory / "metrics.jsonl", "train")]


def events_of(directory: Path) -> dict[str, str]:
    lines = map(json.loads, (directory / "events.jsonl").read_text().splitlines())
    return {line["event"]: line["message"] for line in lines}


def test_nan_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    done = launch(2, RUNS, f"{tmp_path}:4:nan")
    assert done.returncode == 0, done.stdout[-3000:]
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    skipped = events_of(tmp_path)["skipped"]
    assert skipped.startswith("step 3: loss is nan (micro-batch 1 of the step) for text ")
    (file,) = (tmp_path / "non_finite").glob("*.json")
    assert len(json.loads(file.read_text())["texts"]) == TEXTS  # all of the step


@pytest.mark.parametrize("fault", ["memory", "error"])
def test_an_error_of_one_rank_ends_all(fault: str, tmp_path: Path) -> None:
    """Within the 30 s that torchrun gives the others; what is saved is whole."""
    done = launch(2, RUNS, f"{tmp_path}:4:{fault}")
    assert done.returncode != 0
    wanted = "OutOfMemoryError: out of memory at step 3" if fault == "memory" else "the third step does not work"
    assert wanted in done.stdout
    assert steps_of(tmp_path) == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*[0-9]")] == ["step-00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_stops_all(
    number: signal.Signals, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    done = launch(2, RUNS, f"{tmp_path}:4:{number.name}")
    assert done.returncode != 0
    assert f"{number.name}: step 3 is saved in" in events_of(tmp_path)["interrupted"]
    assert (tmp_path / "checkpoints" / "step-00000003" / "training" / "shard-00001.safetensors").is_file()
    train(tmp_path, 4)  # to the end, on one rank
    found = [metrics_of(line) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in undisturbed]


def test_a_killed_rank_is_started_again(tmp_path: Path, undisturbed: list[dict[str, float]]) -> None:
    done = launch(2, RUNS, f"{tmp_path}:4:SIGKILL", restarts=1)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "resumed" in events_of(tmp_path)
    found = [metrics_of(line) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in undisturbed]


REFUSED = [
    ("--training.batch_size 8", 3, "training.batch_size: got 8, which does not divide among the 3 ranks"),
    ("--training.batch_size 9", 2, "training.batch_size: got 9, which does not divide among the 2 ranks"),
    ("--distributed.shard 3 --training.batch_size 8", 4, "distributed.shard: got 3, which does not divide the 4 ranks"),
    ("--distributed.shard 8 --training.batch_size 8", 4, "distributed.shard: got 8, which does not divide the 4 ranks"),
    ("--training.device cuda:1 --training.batch_size 8", 2, "training.device: got cuda:1, .* needs cuda"),
    (
        "--training.optimizer adamw_8bit --training.batch_size 8",
        2,
        "training.optimizer: got adamw_8bit, .* needs adamw",
    ),
    ("--training.fused_layers liger --training.batch_size 8", 2, r"training\.fused_layers: got liger, .* needs none"),
    ("--training.replay auto --training.batch_size 8", 2, r"training\.replay: got auto, .* needs a stage"),
    ("--distributed.shard 0 --training.batch_size 8", 2, "distributed.shard: got 0"),
]


@pytest.mark.parametrize(("arguments", "ranks", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(
    arguments: str, ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=message):
        parse_train_config(["--model.path", "m", "--data.path", "t.txt", *arguments.split()])


def test_the_textbook_trains_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"preset: textbook .* start it without torchrun"):
        parse_train_config(["--training.batch_size", "8"])
