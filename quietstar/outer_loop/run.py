"""Runs a whole outer loop: its directory, its phases, its report.

`run_outer_loop` runs one loop, `describe` prints what it would do, and `run_compared` runs several loops and writes one
report that compares them.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from quietstar.config.command_line import to_yaml
from quietstar.config.loops import EMBEDDED, OuterLoopConfig, fine_tuning_steps
from quietstar.data.tokenizer import encode_prompt, load_tokenizer
from quietstar.errors import ConfigError, Interrupted
from quietstar.outer_loop.finetune import make_base
from quietstar.outer_loop.inputs import ComparedRun, load_problems
from quietstar.outer_loop.phases import Phases
from quietstar.outer_loop.star import OuterLoop, RunContext
from quietstar.outer_loop.store import SampleStore
from quietstar.outer_loop.summary import summarise_run
from quietstar.outer_loop.vstar import measure, train_verifiers
from quietstar.reporting.comparison_report import print_comparison, write_comparison
from quietstar.reporting.loop_report import write_loop_report
from quietstar.runs.files import (
    CONFIG,
    ENVIRONMENT,
    SUMMARY,
    EventLog,
    RunLock,
    append_json,
    make_output_dir,
    write_json,
    write_whole,
)
from quietstar.runs.machine import environment
from quietstar.tasks.registry import load_task


def run_outer_loop(config: OuterLoopConfig, with_verifier: bool) -> dict[str, Any]:
    """Runs STaR, or V-STaR with its verifier; a run that was interrupted continues in its output directory.

    Writes `config.yaml`, `environment.json`, `events.jsonl`, `samples.jsonl` (a `SampleStore`), `iteration-NN/` with
    a manifest for each phase, `kept.jsonl`, `train/` and `model/`, then `verifiers/`, `summary.json` and `report.html`.

    Args:
        config: Validated configuration of the run.
        with_verifier: Whether to train a verifier after the iterations.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError, DataError: The model, the problems or an option cannot be used.
        CheckpointError: The directory holds a run with other options, or a damaged file.
        Interrupted: A signal has stopped the run; the same command continues it.
    """
    task = load_problems(config, with_verifier)
    out = Path(config.output_dir)
    make_output_dir(out)
    started = time.monotonic()
    with RunLock(out), _stopped_by_signals(), SampleStore(out, tell) as store:
        events = EventLog(out)
        events.write(0, "started", config.task)
        if not (out / CONFIG).exists():
            _describe(out, config)
        append_json(out / ENVIRONMENT, environment())
        phases = Phases(out, events, config.loop.redo, tell)
        base = make_base(config, task, phases) if config.preset in EMBEDDED else str(config.model.path)
        loop = OuterLoop(RunContext(config, task, out, base, store, phases, tell))
        try:
            generators = loop.run(lambda: _show(out, loop))
            verifiers = train_verifiers(loop, generators[0]) if with_verifier else {}
            summary = summarise_run(loop)
            if config.evaluation.candidates:
                summary["candidates"] = measure(loop, generators, verifiers)
        finally:
            loop.end_server()
        write_json(out / SUMMARY, summary)
        _describe(out, config)  # again: where phases were redone, the options have changed
        events.write(config.loop.iterations, "finished", f"{time.monotonic() - started:.0f} s")
    write_loop_report(out)
    return summary


def _show(out: Path, loop: OuterLoop) -> None:
    """Writes the summary and the report of the iterations so far."""
    try:
        write_json(out / SUMMARY, summarise_run(loop))
        write_loop_report(out)
    except Exception as error:  # a failing report must not end the run
        tell(f"the report failed: {type(error).__name__}: {error}")


def _describe(out: Path, config: OuterLoopConfig) -> None:
    try:
        write_whole(out / CONFIG, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {out} ({error.strerror})") from None


def tell(text: str) -> None:
    """Writes a line of progress to stderr; an output that is closed is ignored."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGINT raise `Interrupted` at once: finished work is on disk, and the trainer saves its own."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number), saved=True)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted:
        tell("stopped; the same command continues from here")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(config: OuterLoopConfig) -> None:
    """Prints what a run would do: problems, a prompt, lengths and numbers of samples and steps. Reads no weights."""
    task = load_task(config.task, config.problems)
    train, test = task.problems("train"), task.problems("test")
    drawn = len(train) if config.problems.limit is None else min(config.problems.limit, len(train))
    print(f"task {task.name}: {len(train)} training problems, {len(test)} held out; {drawn} drawn for each iteration")
    print(f"samples: {drawn * config.sampling.samples} an iteration, {config.loop.iterations} iterations")
    if config.loop.schedule == "epochs":
        print(f"fine-tuning: {config.loop.start_epochs:g} epochs, {config.loop.added_epochs:g} more each iteration")
    else:
        steps = [fine_tuning_steps(i, config.loop, 1, 1) for i in range(1, config.loop.iterations + 1)]
        print(f"fine-tuning steps: {', '.join(map(str, steps))}; {sum(steps)} in all")
    before = task.few_shot() if config.sampling.few_shot else ""
    if config.model.path is not None:
        tokenizer = load_tokenizer(config.model.path)
        lengths = sorted(len(encode_prompt(tokenizer, before + task.prompt(problem))) for problem in (*train, *test))
        print(f"prompts: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most")
        print(
            f"with {config.sampling.max_new_tokens} new tokens the longest text has "
            f"{lengths[-1] + config.sampling.max_new_tokens}"
        )
    for title, hint in (("a prompt", False), ("the same prompt with the hint", True)):
        print(f"{title}:\n{json.dumps(task.prompt(train[0], hint), ensure_ascii=False)}")


def run_compared(arms: Mapping[str, ComparedRun], out: Path, budget: int | None = None) -> None:
    """Runs each arm in its own directory, and writes `report.html` and `comparison.json`; finished work is kept.

    Args:
        arms: Outer loops to compare, by name.
        out: Directory of the comparison.
        budget: Number of completions per training problem to compare at; None: the largest number that all arms have.
    """
    make_output_dir(out)
    with RunLock(out):
        for name, arm in arms.items():
            tell(f"== {name}")
            run_outer_loop(arm.config, arm.with_verifier)
        directories = {name: Path(arm.config.output_dir) for name, arm in arms.items()}
        write_comparison(out, directories, budget)
        print_comparison(directories, budget)


def shared_base(config: OuterLoopConfig) -> OuterLoopConfig:
    """Makes the base model of an embedded default, and returns options with which several arms start from it."""
    out = Path(config.output_dir)
    make_output_dir(out)
    with RunLock(out):
        phases = Phases(out, EventLog(out), config.loop.redo, tell)
        base = make_base(config, load_task(config.task, config.problems), phases)
    return replace(config, preset="plain", model=replace(config.model, path=base))
