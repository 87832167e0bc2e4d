"""What must not change a run: doing it again, how a batch is cut up, and what is recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.runs import Runs, assert_same_end, lines, newest
from tests.marks import slow

ONE_STEP: dict[str, Any] = {
    "training__steps": 1,
    "training__batch_size": 8,
    "training__log_every": 1,
    "data__validation_fraction": 0,
    "training__warmup_steps": 0,
    "training__max_grad_norm": 1e6,
    "training__thought_embedding_max_grad_norm": 1e6,
}


def _gradients(run: Path) -> dict[str, Tensor]:
    """Of the first step: AdamW's mean of the gradient is a tenth of it, as nothing was clipped. float64."""
    tensors = load_file(newest(run) / "optimizer.safetensors")
    prefix = "exp_avg."
    return {name.removeprefix(prefix): 10 * t.double() for name, t in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    "changes", [{}, slow({"training__method": "language_modeling"}), slow({"data__packing": "crop"})], ids=str
)
def test_two_fresh_runs_are_bitwise_equal(runs: Runs, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs.run(tmp_path, **changes)
    assert_same_end(tmp_path, runs.whole(**changes))


def test_another_seed_is_another_run(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, training__seed=1)
    assert lines(tmp_path) != lines(runs.whole())


@pytest.mark.parametrize("packing", ["joined", slow("separate"), slow("crop")])
@pytest.mark.parametrize("method", ["quietstar", "language_modeling"])
def test_one_batch_of_8_is_8_batches_of_1(runs: Runs, tmp_path: Path, packing: str, method: str) -> None:
    """To rounding in float32, and the rounding has no direction: its mean is not to be told from 0."""
    options = ONE_STEP | {"data__packing": packing, "training__method": method}
    for size in (8, 1):
        runs.run(tmp_path / str(size), training__micro_batch_size=size, **options)
    at_once, in_parts = (_gradients(tmp_path / size) for size in ("8", "1"))
    assert at_once.keys() == in_parts.keys()
    residuals = []
    for name, gradient in at_once.items():
        size = gradient.abs().max()
        torch.testing.assert_close(in_parts[name], gradient, rtol=0, atol=2e-6 * max(1e-6, float(size)), msg=name)
        if size:
            residuals.append(((in_parts[name] - gradient) / size).flatten())
    residual = torch.cat(residuals)
    assert residual.abs().max() > 0  # or the two were the same computation
    assert residual.mean().abs() < 3 * residual.std() / residual.numel() ** 0.5
    (ours,), (theirs,) = ([line for line in lines(tmp_path / size) if "loss" in line] for size in ("8", "1"))
    for name, value in theirs.items():
        assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-6)), name


@pytest.mark.parametrize(
    "changes",
    [
        {"training__reuse_sampling_pass": "false"},
        slow({"training__method": "language_modeling"}),
        slow({"training__reuse_sampling_pass": "false", "data__packing": "separate"}),
    ],
    ids=str,
)
def test_gradient_checkpointing_changes_nothing(runs: Runs, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs.run(tmp_path, finetuning__gradient_checkpointing="true", **changes)
    assert_same_end(tmp_path, runs.whole(**changes))


def test_the_recorded_pass_gives_the_gradients_of_the_plain_one(runs: Runs, tmp_path: Path) -> None:
    for reuse in ("true", "false"):
        runs.run(tmp_path / reuse, training__reuse_sampling_pass=reuse, **ONE_STEP)
    recorded, plain = (_gradients(tmp_path / reuse) for reuse in ("true", "false"))
    for name, gradient in plain.items():
        atol = 2e-6 * max(1e-6, float(gradient.abs().max()))
        torch.testing.assert_close(recorded[name], gradient, rtol=0, atol=atol, msg=name)
