"""Whole runs of the trainer on one process or several ranks, for the tests of checkpoints and faults.

Each argument is a run: `DIRECTORY:STEPS`, and behind a second colon a fault. Where the first directory is named after
copies, each copy of the model lies on two ranks.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quietstar.config.distributed import DistributedOptions
from quietstar.data.batches import Batch, IndexedBatches
from quietstar.errors import QuietStarError
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.sharding import shard_model
from quietstar.training.ranks import ALONE, Ranks, join_ranks
from quietstar.training.step import StepResult
from quietstar.training.step_functions import compute_step, evaluate_on
from quietstar.training.trainer import Trainer
from tests.distributed.steps import LENGTH, TEXTS, Case, build, options

CASE = Case(dtype=torch.float32)
LOW = Case(dtype=torch.bfloat16)


def data() -> Tensor:
    return torch.randint(6, 131, (3 * TEXTS, LENGTH), generator=torch.Generator().manual_seed(5))


def train(directory: Path, steps: int, ranks: Ranks = ALONE, fault: str = "") -> None:
    """Trains to a step, from where the directory's newest checkpoint is."""
    case = LOW if directory.name.startswith("low") else CASE
    model, config = build(case), options(case, alone=False)
    if ranks.mesh is not None:
        shard_model(model, ranks.model_mesh)
    training = config.training
    training.steps, training.save_every, training.log_every, training.eval_every = steps, 2, 1, 2
    training.schedule, training.device, training.threads = "constant", "cpu", 1
    training.on_non_finite = "skip"
    inner = compute_step(config)

    def step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
        result = inner(model, batch, seed)
        return fail(fault, result, ranks, batch, directory)

    Trainer(
        model,
        step,
        IndexedBatches(data(), TEXTS, 0),
        training,
        directory,
        evaluate=evaluate_on(data()[:5], config, ranks=ranks),
        evaluate_at_start=True,
        progress_label=None,
        ranks=ranks,
    ).run()


def fail(fault: str, result: StepResult, ranks: Ranks, batch: Batch, directory: Path) -> StepResult:
    """Does what a fault says, on the last rank and in the third step."""
    third = batch.names == IndexedBatches(data(), TEXTS, 0).batch(3).part(batch.first, len(batch)).names
    if not fault or not third or ranks.rank != ranks.size - 1:
        return result
    if fault == "nan":
        return StepResult(result.loss * torch.nan, result.metrics, result.weight, result.means)
    if fault == "memory":
        raise MemoryError("out of memory")
    if fault == "error":
        raise ValueError("the third step does not work")
    mark = directory / "was killed"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), getattr(signal, fault))
    return result


def main() -> None:
    torch.set_num_threads(1)
    copies = Path(sys.argv[1].partition(":")[0]).name.startswith("copies")
    with join_ranks(DistributedOptions(shard=2 if copies else None), "cpu") as ranks:
        for argument in sys.argv[1:]:
            directory, steps, *fault = argument.split(":")
            try:
                train(Path(directory), int(steps), ranks, *fault)
            except QuietStarError as error:
                print(f"rank {ranks.rank}: {type(error).__name__}: {error}", flush=True)
                raise SystemExit(3) from None


def metrics_of(line: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers in a line of metrics that do not depend on the time."""
    return {name: value for name, value in line.items() if name not in ("split", "seconds", "tokens_per_second")}


if __name__ == "__main__":
    main()
