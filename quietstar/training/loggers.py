"""TensorBoard and Weights & Biases, beside `metrics.jsonl`. None of them can stop a run or spoil it.

What a person sees while training runs: a bar on a terminal, one plain line per report anywhere else.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from quietstar.config.training import LOGGERS, logger_names
from quietstar.errors import ConfigError

WANDB_PROJECT = "quietstar"
WANDB_RUN_ID = "wandb-run-id"
"""File in the run directory with the name by which W&B knows the run, so that a resumed one goes on there."""


class Logger(Protocol):
    """Something that takes lines of metrics."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line; a NaN is handed on as NaN."""

    def close(self) -> None:
        """Hands on what is still waiting."""


class Loggers:
    """Several loggers; one that fails is switched off with a warning, and the rest goes on.

    Args:
        loggers: By name.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Gives one line to every logger that is still on.

        Args:
            step: Optimizer steps done.
            split: `train` or `eval`.
            values: Numbers by name.
        """
        for name, logger in list(self._loggers.items()):
            try:
                logger.write(step, split, values)
            except Exception as error:  # whatever a logger raises, the training is worth more
                del self._loggers[name]
                _warn(name, f"failed at step {step}", error)

    def close(self) -> None:
        """Closes those that are still on; they take no more lines."""
        while self._loggers:
            name, logger = self._loggers.popitem()
            try:
                logger.close()
            except Exception as error:  # as in write
                _warn(name, "failed at the end", error)


def make_loggers(log_to: str, run_directory: Path | str, config: Mapping[str, Any], start_step: int = 0) -> Loggers:
    """The loggers of `training.log_to`.

    Args:
        log_to: Names with commas between them; empty for none.
        run_directory: TensorBoard's files go to `tensorboard/` there, W&B's to `wandb/`.
        config: Plain values by name, shown by W&B.
        start_step: The run goes on after this step; what an earlier part has logged of later steps is replaced
            (TensorBoard), or stays and is not logged again (W&B).

    Returns:
        The loggers. One that is installed but cannot be started (no network, no account) is left out with a warning.

    Raises:
        ConfigError: A package is missing, or a name is unknown.
    """
    directory = Path(run_directory)
    loggers: dict[str, Logger] = {}
    for name in logger_names(log_to):
        try:
            loggers[name] = globals()[LOGGERS[name]](directory, config, start_step)
        except ImportError as error:
            raise ConfigError(
                f"training.log_to: {name} cannot be imported ({error}); pip install 'quietstar[log]'"
            ) from None
        except Exception as error:  # as in Loggers.write
            _warn(name, "could not be started", error)
    return Loggers(loggers)


class TensorBoard:
    """Writes `split/name` scalars to `tensorboard/` in the run directory.

    Args:
        directory: The run directory.
        config: Not used.
        start_step: What is there of later steps no longer counts.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], start_step: int) -> None:
        self._directory = str(directory / "tensorboard")
        self._open(start_step + 1 if start_step else 0)  # step 0 is evaluated again where there was no checkpoint

    def _open(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not at the top: an extra that most runs do without

        self._writer: Any = SummaryWriter(self._directory, purge_step=purge_step)
        self._last_step = purge_step

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One point on each curve."""
        if step < self._last_step:  # the run was rolled back
            self.close()
            self._open(step)
        self._last_step = step
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Writes what is still waiting."""
        self._writer.close()


class WeightsAndBiases:
    """Logs `split/name` values to a W&B run, which goes on where a run is resumed.

    Args:
        directory: The run directory.
        config: Shown with the run.
        start_step: At 0 the run is a new one.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], start_step: int) -> None:
        wandb: Any = import_module("wandb")  # not at the top: an extra that most runs do without
        file = directory / WANDB_RUN_ID
        known = file.read_text(encoding="utf-8").strip() if start_step and file.is_file() else ""
        run_id = known or uuid.uuid4().hex[:12]
        file.write_text(run_id + "\n", encoding="utf-8")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),  # W&B's own way to choose another
            name=directory.resolve().name,
            dir=str(directory),
            id=run_id,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(console="off", disable_git=True),  # it would rewrite what the run prints
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One point on each curve."""
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Sends what is still waiting."""
        self._run.finish()


def _warn(name: str, what: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    warnings.warn(f"{name} {what} and is switched off: {reason}; metrics.jsonl has everything", stacklevel=3)


class Progress:
    """Reports to stderr.

    Args:
        label: Stands in front; None reports nothing.
        total: Steps of the run.
        done: Steps that an earlier part of the run has done.
    """

    def __init__(self, label: str | None, total: int, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._done = self._first = done
        self._started = time.monotonic()
        self._bar: tqdm[NoReturn] | None = None
        if label is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit="step", dynamic_ncols=True)

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """One more step is done."""
        self._done += 1
        if self._bar is not None:
            with suppress(OSError):  # as in `note`
                self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
                self._bar.update(1)

    def back_to(self, step: int) -> None:
        """Training continues from an earlier step."""
        self._done = step
        if self._bar is not None:
            self._bar.n = step
            with suppress(OSError):
                self._bar.refresh()

    def report(self, values: Mapping[str, float]) -> None:
        """A line of training metrics; the bar shows them already."""
        if self._label is None or self._bar is not None:
            return
        per_step = (time.monotonic() - self._started) / max(1, self._done - self._first)
        left = tqdm.format_interval(per_step * (self._total - self._done))
        self.note(
            f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s, {left} left",
        )

    def note(self, text: str) -> None:
        """A line for both kinds of output; it is lost where nobody takes it, on a full disk or by a closed pipe."""
        if self._label is None:
            return
        line = f"{self._label}: step {self._done}/{self._total}: {text}"
        with suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()
