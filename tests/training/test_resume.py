"""A run that was stopped and resumed is the run that was not: weights bit for bit, metrics line for line."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quietstar.data.batches import Batch
from quietstar.errors import CheckpointError, Interrupted
from quietstar.runs.checkpoints import list_checkpoints
from quietstar.training.metrics import read_metrics
from quietstar.training.step import StepResult
from tests.training.helpers import language_modeling_step, options, texts, tiny_llama, trainer


class Stopped(Exception):
    """Stands for a crash."""


def _stopping(at_call: int) -> Any:
    calls = 0

    def step(model: Any, batch: Batch, seed: int) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise Stopped
        return language_modeling_step(model, batch, seed)

    return step


def _evaluate(model: Any) -> dict[str, float | Tensor]:
    torch.rand(3)  # an evaluation may use the global generator without changing what is trained
    return {"loss": language_modeling_step(model, Batch(texts(4, 9), None, ()), 0).loss}


def _lines(directory: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second")
    lines = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def _assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("stopped_in_step", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "accumulation", "tied", "dropout"])
def test_resumed_is_uninterrupted(tmp_path: Path, kind: str, stopped_in_step: int) -> None:
    """Saved every 2 steps, logged every 3: the stops lie before the first save, between saves, and inside a log window.
    24 texts make 6 steps an epoch, so the last stop lies behind the first epoch."""

    def model() -> nn.Module:
        dtype = torch.bfloat16 if kind in ("bfloat16", "accumulation") else torch.float32
        return tiny_llama(dtype, tied=kind == "tied", dropout=0.3 if kind == "dropout" else 0.0)

    micro = 2 if kind == "accumulation" else None
    given = options(steps=9, micro_batch_size=micro, save_every=2, log_every=3, eval_every=4, keep_checkpoints=9)
    whole = model()
    finished = trainer(tmp_path / "whole", whole, options_=given, evaluate=_evaluate, evaluate_at_start=True).run()

    calls_per_step = 2 if micro else 1
    crash = _stopping(calls_per_step * (stopped_in_step - 1) + calls_per_step)  # in the step's last micro-batch
    with pytest.raises(Stopped):
        trainer(tmp_path / "cut", model(), crash, options_=given, evaluate=_evaluate, evaluate_at_start=True).run()
    resumed = model()
    result = trainer(tmp_path / "cut", resumed, options_=given, evaluate=_evaluate, evaluate_at_start=True).run()

    _assert_same(resumed, whole)
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")
    assert [line["step"] for line in _lines(tmp_path / "cut") if line["split"] == "train"] == [3, 6, 9]
    assert result.best_eval_step == finished.best_eval_step
    for file in ("optimizer.safetensors", "model.safetensors"):
        ours, theirs = load_file(result.checkpoint / file), load_file(finished.checkpoint / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_passes_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    given = options(steps=6, save_every=2, keep_checkpoints=2)
    whole = tiny_llama()
    trainer(tmp_path / "whole", whole, options_=given).run()
    trainer(tmp_path / "cut", options_=replace(given, steps=6)).run()
    (tmp_path / "cut" / "checkpoints" / "step-00000006" / "optimizer.safetensors").unlink()
    resumed = tiny_llama()
    with pytest.warns(UserWarning, match=r"damaged checkpoint: .*step-00000006: optimizer\.safetensors is missing"):
        result = trainer(tmp_path / "cut", resumed, options_=given).run()
    _assert_same(resumed, whole)
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")
    assert result.checkpoint.name == "step-00000006"
    assert [step for step, _ in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [4, 6]


def test_checkpoints_that_are_all_damaged_stop_the_run(tmp_path: Path) -> None:
    """Starting from the beginning would overwrite the metrics, and hide that days of work are unreadable."""
    trainer(tmp_path, options_=options(steps=2)).run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*state\.json has 0 bytes"):
        trainer(tmp_path, options_=options(steps=4)).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_returns_at_once_and_changes_nothing(tmp_path: Path) -> None:
    given = options(steps=4, eval_every=2)
    model = tiny_llama()
    first = trainer(tmp_path, model, options_=given, evaluate=_evaluate).run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = tiny_llama()
    assert trainer(tmp_path, again, _stopping(1), options_=given, evaluate=_evaluate).run() == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    _assert_same(again, model)


def test_a_run_can_be_extended(tmp_path: Path) -> None:
    given = options(steps=6, schedule="constant")
    whole = tiny_llama()
    trainer(tmp_path / "whole", whole, options_=given).run()
    trainer(tmp_path / "cut", options_=replace(given, steps=3)).run()
    extended = tiny_llama()
    assert trainer(tmp_path / "cut", extended, options_=given).run().steps == 6
    _assert_same(extended, whole)
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    trainer(tmp_path, options_=options(steps=2)).run()
    for changes, data, message in (
        ({"learning_rate": 0.5}, texts(), r"training\.learning_rate was 0\.01 and is 0\.5"),
        ({"batch_size": 8}, texts(), r"training\.batch_size was 4 and is 8"),
        ({}, texts(count=20), r"the training data's shape was \[24, 12\] and is \[20, 12\]"),
        ({}, texts().flip(0), r"the training data's sha256 was"),
    ):
        with pytest.raises(CheckpointError, match=rf"step-00000002: belongs to another run: .*{message}"):
            trainer(tmp_path, data=data, options_=options(steps=4, **changes)).run()
    unchanged = {"steps": 4, "log_every": 2, "save_every": 1, "keep_checkpoints": 1, "micro_batch_size": 1}
    assert trainer(tmp_path, options_=options(**unchanged)).run().steps == 4


def test_a_run_of_another_model_or_objective_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = {"model.thought_length": 8, "model.path": "a", "objective.policy_weight": None}
    (tmp_path / "run").mkdir()

    def run(run_options: dict[str, Any] | None, steps: int) -> None:
        yaml = {"config_yaml": f"{run_options}"}
        trainer(tmp_path / "run", options_=options(steps=steps), run_options=run_options, **yaml).run()

    run(model, 2)
    before = (tmp_path / "run" / "config.yaml").read_text()
    for changed, message in (
        (model | {"model.thought_length": 4}, r"model\.thought_length was 8 and is 4\. Set it back, or choose another"),
        (model | {"model.path": "b"}, r"model\.path was 'a' and is 'b'"),
        (model | {"objective.policy_weight": 0.0}, r"objective\.policy_weight was None and is 0\.0"),
        (None, "one says what its model and objective are and the other does not"),
    ):
        for steps in (2, 4):  # finished already, or to be extended
            with pytest.raises(CheckpointError, match=rf"step-00000002: belongs to another run: .*{message}"):
                run(changed, steps)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    run(model, 4)


class RunningMean:
    """What a baseline of the rewards would be: it changes with every step, and the loss depends on it."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def compute_step(self, model: Any, batch: Batch, seed: int) -> StepResult:
        loss = language_modeling_step(model, batch, seed).loss
        result = StepResult(loss * (1 + self.value), {"baseline": self.value})
        self.value = 0.9 * self.value + 0.1 * float(loss.detach())
        return result


@pytest.mark.parametrize("kind", ["interrupted", "interrupted at the end", "out of memory", "not a number"])
def test_extra_state_is_that_of_finished_steps(tmp_path: Path, kind: str) -> None:
    """A step that is left in the middle, done again, or skipped had already moved the baseline, twice or to NaN."""
    given = options(steps=6, micro_batch_size=2, schedule="constant", on_non_finite="skip", save_every=2)
    whole = RunningMean()
    trainer(tmp_path / "whole", tiny_llama(), whole.compute_step, options_=given, extra_state=whole).run()

    baseline = RunningMean()
    calls = 0

    def step(model: Any, batch: Batch, seed: int) -> StepResult:
        nonlocal calls
        calls += 1
        result = baseline.compute_step(model, batch, seed)
        # in the first of two micro-batches of step 3, or in the second, whose step is finished and saved
        if (calls, kind) in ((5, "interrupted"), (6, "interrupted at the end")):
            os.kill(os.getpid(), signal.SIGTERM)
        if calls == 6 and kind == "out of memory":
            raise torch.OutOfMemoryError("none left")
        if calls == 6 and kind == "not a number":
            baseline.value = math.nan
            return StepResult(result.loss * math.nan)
        return result

    def run() -> None:
        trainer(tmp_path / "cut", tiny_llama(), step, options_=given, extra_state=baseline).run()

    if kind.startswith("interrupted"):
        with pytest.raises(Interrupted) as caught:
            run()
        assert (caught.value.code, caught.value.saved) == (143, True)
        baseline = RunningMean()
        run()
    else:
        run()
    if kind == "not a number":
        assert 0 < baseline.value < whole.value  # one step fewer
    elif kind == "out of memory":
        assert baseline.value > 0  # steps of other micro-batches move it otherwise
        assert calls == 6 + 4 + 3 * 4  # six calls, then step 3 and the rest with one text at a time
    else:
        assert baseline.value == whole.value
        assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")


def test_extra_state_is_restored(tmp_path: Path) -> None:
    given = options(steps=6, save_every=3, schedule="constant", keep_checkpoints=9)
    models = []
    for name in ("whole", "cut"):
        baseline, model = RunningMean(), tiny_llama()
        trainer(tmp_path / name, model, baseline.compute_step, options_=given, extra_state=baseline).run()
        models.append(model)
        if name == "cut":
            shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000006")
            baseline, resumed = RunningMean(), tiny_llama()
            trainer(tmp_path / name, resumed, baseline.compute_step, options_=given, extra_state=baseline).run()
            _assert_same(resumed, models[0])
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="one has extra state and the other has not"):
        trainer(tmp_path / "cut", options_=given).run()


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "told"),
    [
        ("cosine", 2, 9, True),
        ("linear", 2, 9, True),
        ("cosine", 0, 7, True),
        ("cosine", 2, 6, False),
        ("constant", 2, 9, False),
        ("constant", 0, 12, False),
        ("cosine", 6, 9, False),
    ],
)
def test_a_run_that_goes_on_longer_says_what_its_schedule_would_have_been(
    schedule: str, warmup: int, steps: int, told: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Continued from 6 to 9 steps under a cosine, a run was silently another one than a run of 9."""
    given = options(steps=6, save_every=3, schedule=schedule, warmup_steps=warmup)
    trainer(tmp_path / "cut", tiny_llama(), options_=given).run()
    assert not [one for one in recwarn if "training.steps" in str(one.message)]
    longer = replace(given, steps=steps)
    resumed = tiny_llama()
    trainer(tmp_path / "cut", resumed, options_=longer).run()
    messages = [str(one.message) for one in recwarn if "training.steps" in str(one.message)]
    assert len(messages) == told
    assert all(f"training.steps was 6 and is {steps}" in message for message in messages)
    whole = tiny_llama()
    trainer(tmp_path / "whole", whole, options_=replace(longer, warmup_steps=warmup)).run()
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert same is not told
