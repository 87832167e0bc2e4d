"""TensorBoard and W&B get every line once, and cannot stop a run."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.training import LOGGERS
from quietstar.errors import ConfigError
from quietstar.training.loggers import TRACKERS, WANDB_RUN_ID, Loggers, make_loggers


class Broken:
    """A back-end that loses its connection."""

    def __init__(self, works_until: int) -> None:
        self.works_until = works_until
        self.written: list[int] = []

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if step > self.works_until:
            raise ConnectionError("the server\nis gone")
        self.written.append(step)

    def close(self) -> None:
        raise OSError("no space left on device")


def test_one_that_fails_is_switched_off_once_and_the_others_go_on() -> None:
    weak, strong = Broken(works_until=2), Broken(works_until=99)
    loggers = Loggers({"weak": weak, "strong": strong})
    with pytest.warns(UserWarning) as caught:
        for step in range(1, 6):
            loggers.write(step, "train", {"loss": 1.0})
    assert (weak.written, strong.written) == ([1, 2], [1, 2, 3, 4, 5])
    message = "weak failed at step 3 and is switched off: the server is gone; metrics.jsonl has everything"
    assert [str(warning.message) for warning in caught] == [message]


def test_one_that_fails_at_the_end_is_no_error() -> None:
    loggers = Loggers({"one": Broken(9), "two": Broken(9)})
    with pytest.warns(UserWarning, match="failed at the end") as caught:
        loggers.close()
    assert len(caught) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.write(1, "train", {})
        loggers.close()


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^training.log_to: {name} .* pip install 'quietstar\[log\]'$"):
        make_loggers(name, tmp_path, {})


def test_an_unknown_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^training.log_to: got .comet., needs tensorboard or wandb"):
        make_loggers("comet", tmp_path, {})


def test_every_name_of_the_table_has_its_class() -> None:
    assert tuple(TRACKERS) == LOGGERS
    assert all(hasattr(tracker, method) for tracker in TRACKERS.values() for method in ("write", "close"))


def test_none_is_fine(tmp_path: Path) -> None:
    loggers = make_loggers(" , ", tmp_path, {})
    loggers.write(1, "train", {"loss": 1.0})
    loggers.close()
    assert not list(tmp_path.iterdir())


class TestTensorBoard:
    """Read back with TensorBoard's own reader."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorboard", reason="needs the extra [log]")

    @staticmethod
    def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(directory / "tensorboard"))
        accumulator.Reload()
        return [(event.step, event.value) for event in accumulator.Scalars(tag)]

    @staticmethod
    def log(directory: Path, start: int, steps: range, value: float) -> None:
        loggers = make_loggers("tensorboard", directory, {}, start)
        for step in steps:
            loggers.write(step, "train", {"loss": value})
        loggers.close()

    def test_a_resumed_run_goes_on_without_a_step_twice(self, tmp_path: Path) -> None:
        self.log(tmp_path, 0, range(0, 6), 1.0)  # killed after step 5; the checkpoint is that of step 3
        self.log(tmp_path, 3, range(4, 8), 2.0)
        assert self.curve(tmp_path, "train/loss") == [(step, 1.0 if step <= 3 else 2.0) for step in range(8)]

    def test_a_run_that_never_saved_starts_over(self, tmp_path: Path) -> None:
        self.log(tmp_path, 0, range(0, 3), 1.0)
        self.log(tmp_path, 0, range(0, 2), 2.0)
        assert self.curve(tmp_path, "train/loss") == [(0, 2.0), (1, 2.0)]

    def test_what_a_rollback_takes_back_is_replaced(self, tmp_path: Path) -> None:
        loggers = make_loggers("tensorboard", tmp_path, {}, 0)
        for step, value in ((1, 1.0), (2, 1.0), (3, 1.0), (2, 5.0), (3, 5.0)):
            loggers.write(step, "eval", {"loss": value})
        loggers.close()
        assert self.curve(tmp_path, "eval/loss") == [(1, 1.0), (2, 5.0), (3, 5.0)]


class StandIn(types.ModuleType):
    """The part of the wandb package that is used, without its server."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__("wandb")
        self.fails = fails
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> StandIn:
        if self.fails:
            raise RuntimeError("api_key not configured")
        self.started.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_knows_a_resumed_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 3, 0):
        loggers = make_loggers("wandb", tmp_path, {"model": {"path": "x"}}, start)
        loggers.write(start + 1, "eval", {"loss": 2.0})
        loggers.close()
    first, resumed, new = (arguments["id"] for arguments in wandb.started)
    assert first == resumed != new
    assert (tmp_path / WANDB_RUN_ID).read_text().strip() == new
    assert wandb.logged == [(1, {"eval/loss": 2.0}), (4, {"eval/loss": 2.0}), (1, {"eval/loss": 2.0})]
    assert wandb.finished == 3
    assert wandb.started[0]["config"] == {"model": {"path": "x"}}


def test_wandb_without_an_account_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(fails=True))
    with pytest.warns(UserWarning, match="wandb could not be started and is switched off: api_key not configured"):
        loggers = make_loggers("wandb", tmp_path, {})
    loggers.write(1, "train", {"loss": 1.0})
