"""What the trainer itself costs: CPU time of a run that is not spent in its training steps, and of starting up.

    python benchmarks/trainer_overhead.py

The real `Trainer` trains the embedded default's character model for 200 steps of Quiet-STaR, with metrics every 10
steps, a checkpoint every 50 and an evaluation every 100. In the steps are the forward and backward passes and the
optimizer, timed on the training thread alone; everything else of the process is outside: order and batches, metrics,
progress, evaluations, and checkpoints, which a thread of its own writes. Below that, the CPU time of `quietstar --help`
in a fresh process.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
from torch import Tensor

from benchmarks.environment import ROOT, markdown_table
from benchmarks.script import Benchmark
from quietstar.config.training import DataOptions, ModelOptions, TrainConfig, TrainingOptions
from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.training.run import thinking_options
from quietstar.training.step_functions import compute_step, evaluate_on
from quietstar.training.trainer import Trainer

LENGTH = 40
OUTSIDE_LIMIT, STARTUP_LIMIT = 0.05, 1.5
FORWARD_AND_BACKWARD, OPTIMIZER = "forward and backward", "optimizer"
EVALUATION, REST = "evaluations", "everything else"
STARTUP = "import sys; from quietstar.__main__ import main; sys.exit(main(['--help']))"
"""What the installed script does for `quietstar --help`."""


class Clock:
    """CPU seconds of the thread that trains, by what they went into."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((FORWARD_AND_BACKWARD, OPTIMIZER, EVALUATION), 0.0)
        self._begun = 0.0

    def begin(self) -> None:
        self._begun = time.thread_time()

    def end(self, name: str) -> None:
        self.seconds[name] += time.thread_time() - self._begun

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time going to `name`."""

        def run(*arguments: Any) -> Any:
            self.begin()
            result = function(*arguments)
            self.end(name)
            return result

        return run


def run(steps: int, seed: int = 0) -> dict[str, float]:
    """CPU seconds of a whole run, by what they went into."""
    config = TrainConfig(
        preset="plain",
        model=ModelOptions(path="in memory", lookahead=1, initial_mixing_weight=0.3, start_text="[", end_text="]"),
        data=DataOptions(path="in memory", length=LENGTH),
        training=TrainingOptions(
            steps=steps, eval_every=100, eval_batches=1, save_every=50, log_every=10, seed=seed, device="cpu", threads=1
        ),
    )
    model = QuietStarForCausalLM.from_base(
        character_model(seed), character_tokenizer(), **thinking_options(config.model)
    )
    texts = torch.randint(model.head.weight.shape[0], (256, LENGTH), generator=torch.Generator().manual_seed(seed))
    clock = Clock()
    compute = compute_step(config)

    def timed_step(*arguments: Any) -> Any:
        clock.begin()  # the backward pass is the trainer's call
        return compute(*arguments)

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model,
            timed_step,
            texts,
            config.training,
            out,
            evaluate=clock.timed(EVALUATION, evaluate_on(texts[:64], config)),
        )
        optimizer = trainer.optimizer
        take_gradients = optimizer.backward

        def backward(loss: Tensor) -> None:
            take_gradients(loss)
            clock.end(FORWARD_AND_BACKWARD)

        vars(optimizer)["backward"] = backward
        for name in ("gradient_norms", "clip", "step", "zero_grad"):
            vars(optimizer)[name] = clock.timed(OPTIMIZER, getattr(optimizer, name))
        begun = time.process_time()
        trainer.run()
        total = time.process_time() - begun
    return {**clock.seconds, REST: total - sum(clock.seconds.values())}


def startup_seconds(repeats: int) -> float:
    """CPU seconds, user and system, of `quietstar --help`: the median of some fresh processes."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", STARTUP], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return statistics.median(found)


def outside(seconds: dict[str, float]) -> float:
    """The share of the time that is not in the steps."""
    return (seconds[EVALUATION] + seconds[REST]) / sum(seconds.values())


def table(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    rows = [[name, f"{value:.2f}", f"{value / total:.2%}"] for name, value in seconds.items()]
    rows.append(["the run", f"{total:.2f}", "100.00%"])
    return markdown_table(["part of the run", "CPU seconds", "share"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--repeats", type=int, default=5, help="processes whose start is timed")
    parser.add_out("trainer_overhead")
    options = parser.begin(arguments, threads=1)
    run(2)  # what is loaded and compiled once is no part of a step
    seconds, startup = run(options.steps), startup_seconds(options.repeats)
    share = outside(seconds)
    body = (
        f"{options.steps} steps of the embedded default's character model, with metrics every 10, a checkpoint every "
        f"50 and an evaluation every 100: {share:.2%} of the CPU time is spent outside the steps (at most "
        f"{OUTSIDE_LIMIT:.0%} is allowed).\n\n{table(seconds)}\n\n"
        f"`quietstar --help` takes {startup:.2f} s of CPU time (at most {STARTUP_LIMIT} s)."
    )
    total = sum(seconds.values())
    rows: list[dict[str, object]] = [
        {"measured": name, "cpu_seconds": round(value, 3), "share": round(value / total, 5)}
        for name, value in seconds.items()
    ]
    rows.append({"measured": "quietstar --help", "cpu_seconds": round(startup, 3), "share": ""})
    parser.write(options.out, "What the trainer costs", body, rows)
    return 0 if share < OUTSIDE_LIMIT and startup < STARTUP_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
