"""A step is the same however it is cut into micro-batches."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar.config.objective import ObjectiveOptions
from quietstar.config.training import ModelOptions, TrainConfig, TrainingOptions
from quietstar.data.batches import Batch
from quietstar.training.step import OptimizerStep
from quietstar.training.step_functions import compute_step
from tests.model.tiny import make_ids, make_model

MASKS: dict[str, list[list[int]] | None] = {
    "plain": None,
    "padded": [[1] * 12, [1] * 7 + [0] * 5, [1] * 3 + [0] * 9, [1] * 12],
    "documents": [[1] * 4 + [2] * 8, [1] * 12, [1] * 2 + [2] * 5 + [3] * 5, [1] * 11 + [2]],
}


def one_step(
    micro_batch_size: int,
    mask: str = "plain",
    positions: str = "all",
    preset: str = "default",
    *,
    method: str = "quietstar",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    texts: int = 4,
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of one optimizer step in one piece, before clipping, and the step's metrics."""
    model = make_model(dtype=dtype, initial_mixing_weight=0.3)
    given: Any = {"method": method, "batch_size": texts, "micro_batch_size": micro_batch_size, "seed": seed}
    objective: Any = {"preset": preset, "policy_weight": 1.0}  # the authors' million would hide the other terms
    config = TrainConfig(
        model=ModelOptions(positions=positions),
        objective=ObjectiveOptions(**objective),
        training=TrainingOptions(**given),
    )
    rows = MASKS[mask]
    names = [f"text {index}" for index in range(texts)]
    batch = Batch(make_ids(texts, 12, seed=seed), None if rows is None else torch.tensor(rows), names)
    stepper = OptimizerStep(
        model, compute_step(config), config.training, torch.device("cpu"), lambda: False, lambda *event: None
    )
    gradients: list[Tensor] = []
    clip = stepper.optimizer.clip

    def note_then_clip(norms: Any) -> None:
        gradients.extend(
            parameter.grad.clone().flatten() for parameter in model.parameters() if parameter.grad is not None
        )
        clip(norms)

    stepper.optimizer.clip = note_then_clip
    metrics = stepper.run(1, batch)
    assert metrics is not None
    return torch.cat(gradients), metrics


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("preset", ["default", "authors"])
@pytest.mark.parametrize("positions", ["all", "every:3", "entropy:2"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_and_metrics_do_not_depend_on_the_micro_batch(
    mask: str, positions: str, preset: str, micro_batch_size: int
) -> None:
    """A mean of means is wrong where texts have unequally many targets: the authors' policy loss was off by 42 % in
    padded texts."""
    whole, metrics = one_step(4, mask, positions, preset)
    cut, cut_metrics = one_step(micro_batch_size, mask, positions, preset)
    assert float((whole - cut).norm() / whole.norm()) < 1e-10
    assert cut_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mask", MASKS)
def test_language_modelling_does_not_depend_on_the_micro_batch(mask: str) -> None:
    whole, metrics = one_step(4, mask, method="language_modeling")
    cut, cut_metrics = one_step(1, mask, method="language_modeling")
    assert float((whole - cut).norm() / whole.norm()) < 1e-12
    assert cut_metrics == pytest.approx(metrics, rel=1e-9)


def test_in_float32_eight_by_one_differs_from_one_by_eight_by_rounding_around_zero() -> None:
    """A bias, however small, would add up over the steps of a run; rounding does not."""
    means = []
    for seed in range(8):
        whole, _ = one_step(8, dtype=torch.float32, seed=seed, texts=8)
        cut, _ = one_step(1, dtype=torch.float32, seed=seed, texts=8)
        residual = (cut - whole).double() / whole.double().norm()
        assert 0 < float(residual.norm()) < 1e-5
        means.append(float(residual.mean()))
    standard_error = statistics.stdev(means) / math.sqrt(len(means))
    assert abs(statistics.mean(means)) < 3.5 * standard_error  # the 1 % bound of Student's t with 7 degrees of freedom
