"""A whole run: its directory, its phases, its report."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from quietstar.command_line import to_yaml
from quietstar.errors import ConfigError, Interrupted
from quietstar.files import make_output_dir, write_whole
from quietstar.outer_loop.config import EMBEDDED, OuterLoopConfig
from quietstar.outer_loop.inputs import load_problems
from quietstar.outer_loop.make_base import make_base
from quietstar.outer_loop.phases import Phases
from quietstar.outer_loop.report import write_loop_report
from quietstar.outer_loop.star import OuterLoop, Surroundings
from quietstar.outer_loop.store import SampleStore
from quietstar.outer_loop.summary import SUMMARY, summarise_run
from quietstar.outer_loop.vstar import measure, train_verifiers
from quietstar.reporting.environment import environment
from quietstar.training.events import EventLog
from quietstar.training.output_dir import append_json, write_json
from quietstar.training.run_lock import RunLock


def run_outer_loop(config: OuterLoopConfig, with_verifier: bool) -> dict[str, Any]:
    """Runs STaR, or V-STaR with its verifier, from where its output directory says it is.

    Writes `config.yaml`, `environment.json`, `events.jsonl`, `samples.jsonl` (see `SampleStore`), `iteration-NN/` with
    a manifest for each phase, `kept.jsonl`, `train/` and `model/`, then `verifiers/`, `summary.json` and `report.html`.

    Args:
        config: A validated configuration.
        with_verifier: Train a verifier when the iterations are done.

    Returns:
        What `summary.json` holds.

    Raises:
        ConfigError, DataError: For what is wrong with the model, the problems or an option.
        CheckpointError: The directory holds a run of other options, or something damaged.
        Interrupted: A signal has stopped it; the same command goes on.
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
        append_json(out / "environment.json", environment())
        phases = Phases(out, events, config.loop.redo, tell)
        base = make_base(config, task, phases) if config.preset in EMBEDDED else str(config.model.path)
        loop = OuterLoop(Surroundings(config, task, out, base, store, phases, tell))
        generators = loop.run(lambda: _show(out, loop))
        verifiers = train_verifiers(loop, generators[0]) if with_verifier else {}
        summary = summarise_run(loop)
        if config.evaluation.candidates:
            summary["candidates"] = measure(loop, generators, verifiers)
        write_json(out / SUMMARY, summary)
        _describe(out, config)  # again: where phases were redone, the options are other ones
        events.write(config.loop.iterations, "finished", f"{time.monotonic() - started:.0f} s")
    write_loop_report(out)
    return summary


def _show(out: Path, loop: OuterLoop) -> None:
    """Writes what the iterations so far have come to."""
    try:
        write_json(out / SUMMARY, summarise_run(loop))
        write_loop_report(out)
    except Exception as error:  # a report is worth less than the run that it is about
        tell(f"the report failed: {type(error).__name__}: {error}")


def _describe(out: Path, config: OuterLoopConfig) -> None:
    try:
        write_whole(out / CONFIG, to_yaml(config))
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {out} ({error.strerror})") from None


CONFIG = "config.yaml"


def tell(text: str) -> None:
    """A line of progress on stderr; it is lost where nobody takes it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Interrupted` at once: what is done is on the disk, and the trainer has its own ways."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number), saved=True)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there alone
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted:
        tell("stopped; the same command goes on from here")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
