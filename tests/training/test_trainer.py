"""The loop: accumulation, non-finite values, evaluation, reports, and what a run refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quietstar.data.batches import Batch, BatchOrder
from quietstar.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from quietstar.runs.checkpoints import list_checkpoints, verify_checkpoint
from quietstar.runs.machine import resolve_device
from quietstar.training.metrics import read_metrics
from quietstar.training.schedule import learning_rate
from quietstar.training.step import StepResult, thought_seed
from quietstar.training.trainer import Trainer
from tests.training.helpers import (
    ToyThinker,
    language_modeling_step,
    options,
    snapshot,
    texts,
    tiny_llama,
    trainer,
)


def test_it_learns(tmp_path: Path) -> None:
    result = trainer(tmp_path, options_=options(steps=60, log_every=15)).run()
    lines = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == [15, 30, 45, 60]
    assert lines[0]["loss"] > 2.5
    assert lines[-1]["loss"] < 0.5
    assert lines[-1]["accuracy"] > 0.9
    assert result.steps == 60
    assert result.train_metrics["loss"] == lines[-1]["loss"]


def test_a_thinking_model_trains_with_all_its_groups(tmp_path: Path) -> None:
    def step(model: ToyThinker, batch: Batch, seed: int) -> StepResult:
        hidden = batch.tokens[:, :4].float() / 64
        return StepResult((model(hidden).squeeze(-1) - hidden.sum(-1)).square().mean())

    model = ToyThinker()
    before = snapshot(model)
    trainer(tmp_path, model, step, options_=options(steps=30)).run()
    lines = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["thought_embedding_gradient_norm"] > 0 for line in lines)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys()
    start, end = (model.thought_embedding.weight - before["thought_embedding.weight"]).abs().sum(-1).tolist()
    assert start > 0
    assert end == 0  # the toy never uses END: no gradient, no decay, no change


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_micro_batches_are_one_big_batch(tmp_path: Path, micro_batch_size: int) -> None:
    results = []
    for size in (None, micro_batch_size):
        model = tiny_llama(torch.float64)
        given = options(steps=4, batch_size=8, micro_batch_size=size)
        trainer(tmp_path / str(size), model, options_=given).run()
        results.append((snapshot(model), read_metrics(tmp_path / str(size) / "metrics.jsonl")))
    (whole, whole_lines), (parts, part_lines) = results
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(part_lines, whole_lines, strict=True):
        for key in ("loss", "accuracy", "gradient_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9)


def test_micro_batches_count_by_their_weight(tmp_path: Path) -> None:
    """Texts with few targets: a mean of the micro-batches' means would give their targets too much weight."""

    def step_with(weighted: bool) -> Any:
        def step(model: nn.Module, batch: Batch, seed: int) -> StepResult:
            targets = batch.tokens[:, 1:].where(
                torch.arange(11) < 1 + batch.tokens[:, :1] % 9, -100
            )  # 1 to 9 targets per text
            logits = model(input_ids=batch.tokens).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return StepResult(loss, weight=float((targets >= 0).sum()) if weighted else None)

        return step

    results = []
    for name, size, weighted in (("whole", None, False), ("weighted", None, True), ("parts", 2, True)):
        model = tiny_llama(torch.float64)
        given = options(micro_batch_size=size, max_grad_norm=1e9)
        trainer(tmp_path / name, model, step_with(weighted), options_=given).run()
        norms = [line["gradient_norm"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        results.append((snapshot(model), norms))
    (_, plain_norms), (whole, whole_norms), (parts, part_norms) = results
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-10, atol=1e-10)
    assert part_norms == pytest.approx(whole_norms, rel=1e-9)
    assert whole_norms == pytest.approx(plain_norms, rel=1e-4)  # llama's norms round to float32 on the way


def test_gradients_are_clipped_before_they_are_used(tmp_path: Path) -> None:
    """Adam hides a common factor of all gradients until they are smaller than its epsilon, as here."""

    def step(model: ToyThinker, batch: Batch, seed: int) -> StepResult:
        return StepResult(model(batch.tokens[:, :4].float()).square().mean())

    model = ToyThinker()
    before = snapshot(model)
    given = options(steps=1, warmup_steps=0, max_grad_norm=1e-14, thought_embedding_lr_multiplier=1.0, weight_decay=0.0)
    trainer(tmp_path, model, step, options_=given).run()
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in model.state_dict().items()}
    assert moved.pop("thought_embedding.weight") == pytest.approx(1e-2 * 0.1, rel=1e-2)
    assert max(moved.values()) < 1e-6
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["gradient_norm"] > 1e-3  # reported as it was before clipping


def test_a_step_with_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch, seed: int) -> StepResult:
        return StepResult(model(input_ids=batch.tokens).logits.sum() * 0, weight=0.0)

    with pytest.raises(DataError, match=r"step 1: text .* of the training data.*: nothing to train on"):
        trainer(tmp_path, compute_step=step).run()


def test_each_micro_batch_gets_its_texts_and_its_seed(tmp_path: Path) -> None:
    calls: list[tuple[list[list[int]], int, float]] = []

    def step(model: nn.Module, batch: Batch, seed: int) -> StepResult:
        calls.append((batch.tokens.tolist(), seed, float(torch.rand(()))))
        return language_modeling_step(model, batch, seed)

    data = texts()
    given = options(steps=3, micro_batch_size=2, seed=5)
    state = torch.get_rng_state()
    Trainer(tiny_llama(), step, data, given, tmp_path, progress_label=None).run()
    assert torch.equal(torch.get_rng_state(), state)

    order = BatchOrder(len(data), given.batch_size, given.seed)
    wanted = [
        (data[order.indices(step - 1)[2 * micro : 2 * micro + 2]].tolist(), thought_seed(5, step))
        for step in (1, 2, 3)
        for micro in (0, 1)
    ]
    assert [call[:2] for call in calls] == wanted
    assert len({call[2] for call in calls}) == 6  # dropout would differ too


def _bad_loss(at_call: int, value: float) -> Any:
    calls = 0

    def step(model: nn.Module, batch: Batch, seed: int) -> StepResult:
        nonlocal calls
        calls += 1
        result = language_modeling_step(model, batch, seed)
        return StepResult(result.loss * value if calls == at_call else result.loss)

    return step


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_failures_one_after_another_are_counted_across_a_rollback(tmp_path: Path, policy: str) -> None:
    """Every loss from step 3 on is NaN, and three failures stop the run: at steps 3, 4 and 5 where each is skipped, at
    3, 3 and 4 where a step is tried again from the checkpoint before, whose own count is 0."""
    calls = 0

    def step(model: nn.Module, batch: Batch, seed: int) -> StepResult:
        nonlocal calls
        calls += 1
        result = language_modeling_step(model, batch, seed)
        return StepResult(result.loss * math.nan if calls > 2 else result.loss)

    given = options(steps=9, save_every=1, on_non_finite=policy, max_non_finite=3)
    last = 5 if policy == "skip" else 4
    with pytest.raises(NonFiniteError, match=rf"^step {last}: .*; 3 such steps one after another; stopped"):
        trainer(tmp_path, compute_step=step, options_=given).run()
    assert calls == 2 + 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_stops_before_the_optimizer_step(tmp_path: Path, value: float) -> None:
    """Fourth step, second micro-batch: the weights stay those of step 3, and so does all that was saved."""
    reference = tiny_llama()
    trainer(tmp_path / "good", reference, options_=options(steps=3, micro_batch_size=2, schedule="constant")).run()

    model = tiny_llama()
    given = options(steps=8, micro_batch_size=2, schedule="constant", save_every=2)
    run = trainer(tmp_path / "bad", model, _bad_loss(8, value), options_=given)
    with pytest.raises(NonFiniteError) as caught:
        run.run()
    bad_texts = BatchOrder(24, 4, 0).indices(3)[2:]
    message = str(caught.value)
    names = ", ".join(f"text {text} of the training data" for text in bad_texts)
    assert f"step 4: loss is {value} (micro-batch 2 of the step) for {names}" in message
    assert "step-00000002" in message

    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [line["step"] for line in read_metrics(tmp_path / "bad" / "metrics.jsonl")] == [1, 2, 3]
    ((step, path),) = list_checkpoints(tmp_path / "bad" / "checkpoints")
    assert step == 2
    verify_checkpoint(path)


@pytest.mark.parametrize(
    ("parameter", "metric"),
    [("base.weight", "gradient_norm"), ("thought_embedding.weight", "thought_embedding_gradient_norm")],
)
def test_a_bad_gradient_of_a_good_loss_stops_too(tmp_path: Path, parameter: str, metric: str) -> None:
    model = ToyThinker()
    model.get_parameter(parameter).register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.nan))

    def step(model: ToyThinker, batch: Batch, seed: int) -> StepResult:
        return StepResult(model(batch.tokens[:, :4].float()).square().mean())

    before = snapshot(model)
    with pytest.raises(NonFiniteError, match=rf"step 1: {metric} is nan \(first in parameter {parameter}\) for text "):
        trainer(tmp_path, model, step).run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _evaluation(losses: list[float]) -> Any:
    remaining = iter(losses)

    def evaluate(model: nn.Module) -> dict[str, float | Tensor]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"loss": next(remaining), "gain": torch.tensor(0.25)}

    return evaluate


def test_evaluation_comes_when_asked_for_and_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        options_=options(steps=7, eval_every=3),
        evaluate=_evaluation([4.0, 2.0, 3.0, math.nan]),
        evaluate_at_start=True,
    )
    result = run.run()
    lines = read_metrics(tmp_path / "metrics.jsonl", "eval")
    assert [(line["step"], line["loss"]) for line in lines[:3]] == [(0, 4.0), (3, 2.0), (6, 3.0)]
    assert lines[3]["step"] == 7
    assert math.isnan(lines[3]["loss"])  # recorded as it is; it is not the best
    assert result.best_eval_step == 3
    assert result.best_eval is not None
    assert result.best_eval["loss"] == 2.0
    assert result.best_eval["gain"] == 0.25
    assert math.isnan(result.eval_metrics["loss"])


def test_eval_every_0_is_never(tmp_path: Path) -> None:
    result = trainer(tmp_path, options_=options(steps=2, eval_every=0), evaluate=_evaluation([])).run()
    assert result.best_eval is None
    assert result.eval_metrics == {}


def test_the_model_is_in_training_mode_and_left_as_it_was(tmp_path: Path) -> None:
    modes = []

    def step(model: Any, batch: Batch, seed: int) -> StepResult:
        modes.append(model.training)
        return language_modeling_step(model, batch, seed)

    model = tiny_llama().eval()
    given = options(steps=3, eval_every=1)
    trainer(tmp_path, model, step, options_=given, evaluate=_evaluation([1.0, 1.0, 1.0])).run()
    assert modes == [True, True, True]
    assert not model.training


def test_logged_values_are_means_since_the_last_line(tmp_path: Path) -> None:
    for every in (1, 4):
        trainer(tmp_path / str(every), options_=options(steps=10, log_every=every)).run()
    single = read_metrics(tmp_path / "1" / "metrics.jsonl")
    lines = read_metrics(tmp_path / "4" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line, window in zip(lines, (single[:4], single[4:8], single[8:]), strict=True):
        for key in ("loss", "accuracy", "gradient_norm"):
            assert line[key] == pytest.approx(sum(each[key] for each in window) / len(window))
        assert line["learning_rate"] == learning_rate(line["step"], options(steps=10))
        assert line["tokens_per_second"] > 0
        assert line["seconds"] > 0


def test_the_run_directory(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text("{}")

    given = options(steps=5, save_every=1, keep_checkpoints=2)
    result = trainer(tmp_path, options_=given, tokenizer=Tokenizer(), config_yaml="preset: test\n").run()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "events.jsonl", "checkpoints", "config.yaml", ".lock"}
    assert (tmp_path / "config.yaml").read_text() == "preset: test\n"
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4, 5]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000005"
    assert (result.checkpoint / "tokenizer.json").exists()
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert (state["step"], state["run"]["options"]["batch_size"]) == (5, 4)


def test_output_that_is_no_terminal_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(steps=4, log_every=2, eval_every=4)
    run = Trainer(tiny_llama(), language_modeling_step, texts(), given, tmp_path, evaluate=_evaluation([1.5]))
    run.run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("train: step 2/4: loss ")
    assert "tokens/s" in lines[0]
    assert lines[0].endswith(" left")
    assert lines[2] == "train: step 4/4: evaluation: loss 1.5, gain 0.25"


def test_a_terminal_gets_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run = Trainer(tiny_llama(), language_modeling_step, texts(), options(steps=4), tmp_path, progress_label="here")
    run.run()
    shown = capsys.readouterr().err
    assert "here: 100%" in shown
    assert "4/4" in shown
    assert "tokens/s" in shown


def test_metric_names_that_the_trainer_uses_are_refused(tmp_path: Path) -> None:
    def step(model: Any, batch: Batch, seed: int) -> StepResult:
        return StepResult(language_modeling_step(model, batch, seed).loss, {"seconds": 1.0})

    with pytest.raises(ValueError, match="metric name 'seconds' is used by the trainer"):
        trainer(tmp_path, compute_step=step).run()


@pytest.mark.parametrize(
    "data", [torch.zeros(0, 8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64), torch.zeros(2, 8)]
)
def test_data_that_is_no_block_of_tokens_is_refused(tmp_path: Path, data: Tensor) -> None:
    with pytest.raises(DataError, match="train_data: got torch"):
        trainer(tmp_path, data=data)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"training\.device: got cuda:99, but PyTorch sees \d+ CUDA devices"):
        resolve_device("cuda:99")
    with pytest.raises(ConfigError, match=r"training\.device: got 'gpu', needs auto"):
        resolve_device("gpu")


def test_starting_over_in_a_directory_with_checkpoints_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, options_=options(steps=2)).run()
    with pytest.raises(CheckpointError, match=r"has checkpoints already .*step-00000002.*training\.resume is off"):
        trainer(tmp_path, options_=options(steps=2, resume=False)).run()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
