"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, and the progress that a person sees.

A tracker that fails is switched off with a warning; it cannot stop a run. `Progress` shows a bar on a terminal, and one
plain line per report anywhere else.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from quietstar.config.training import logger_names
from quietstar.errors import ConfigError

WANDB_PROJECT = "quietstar"
WANDB_RUN_ID = "wandb-run-id"
"""File in the run directory with the id of the run in W&B, so that a resumed run continues there."""


class Logger(Protocol):
    """Protocol of a tracker that receives lines of metrics."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Takes one line of metrics; a NaN stays a NaN."""

    def close(self) -> None:
        """Writes everything that is still buffered."""


class Loggers:
    """Several loggers; one that fails is switched off with a warning, and the others continue.

    Args:
        loggers: Loggers by name, such as `tensorboard`.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Gives one line of metrics to every logger that is still on.

        Args:
            step: Number of optimizer steps done.
            split: Kind of text that was measured: `train` or `eval`.
            values: Values of the metrics, by name of the metric.
        """
        for name, logger in list(self._loggers.items()):
            try:
                logger.write(step, split, values)
            except Exception as error:  # of any kind: a logger must not stop the training
                del self._loggers[name]
                _warn(name, f"failed at step {step}", error)

    def close(self) -> None:
        """Closes the loggers that are still on; they take no more lines."""
        while self._loggers:
            name, logger = self._loggers.popitem()
            try:
                logger.close()
            except Exception as error:  # as in write
                _warn(name, "failed at the end", error)


def make_loggers(log_to: str, run_directory: Path | str, config: Mapping[str, Any], start_step: int = 0) -> Loggers:
    """Makes the loggers that `training.log_to` names.

    Args:
        log_to: Names of the loggers, separated by commas; empty for none.
        run_directory: Run directory; TensorBoard's files go to `tensorboard/` in it, W&B's to `wandb/`.
        config: Options of the run as plain values by name, shown by W&B.
        start_step: Number of optimizer steps done before; metrics that an earlier part of the run logged after this
            step are replaced (TensorBoard), or stay and are not logged again (W&B).

    Returns:
        The loggers. A logger that is installed but cannot start (no network, no account) is left out with a warning.

    Raises:
        ConfigError: A logger's package is missing, or its name is unknown.
    """
    directory = Path(run_directory)
    loggers: dict[str, Logger] = {}
    for name in logger_names(log_to):
        try:
            loggers[name] = TRACKERS[name](directory, config, start_step)
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
        directory: Run directory; the files go to `tensorboard/` in it.
        config: Options of the run; not used.
        start_step: Number of optimizer steps done before; points after this step are discarded.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], start_step: int) -> None:
        self._directory = str(directory / "tensorboard")
        self._open(start_step + 1 if start_step else 0)  # step 0 is evaluated again where there was no checkpoint

    def _open(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not at the top: an optional package

        self._writer: Any = SummaryWriter(self._directory, purge_step=purge_step)
        self._last_step = purge_step

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        if step < self._last_step:  # the run was rolled back
            self.close()
            self._open(step)
        self._last_step = step
        for name, value in values.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Writes everything that is still buffered."""
        self._writer.close()


class WeightsAndBiases:
    """Logs `split/name` values to a W&B run; a resumed run continues the same one.

    Args:
        directory: Run directory, which keeps the id of the W&B run.
        config: Options of the run as plain values by name, shown with the run.
        start_step: Number of optimizer steps done before; 0 starts a new W&B run.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], start_step: int) -> None:
        wandb: Any = import_module("wandb")  # not at the top: an optional package
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
            settings=wandb.Settings(console="off", disable_git=True),  # W&B would change what the run prints
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        self._run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Sends everything that is still buffered."""
        self._run.finish()


def _warn(name: str, what: str, error: Exception) -> None:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    warnings.warn(f"{name} {what} and is switched off: {reason}; metrics.jsonl has everything", stacklevel=3)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""By the name that `training.log_to` has for it."""


class Progress:
    """Reports the progress of a training run to stderr.

    Args:
        label: Text in front of each line; None reports nothing.
        total: Number of optimizer steps of the run.
        done: Number of optimizer steps that an earlier part of the run has done.
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
        """Counts one more step."""
        self._done += 1
        if self._bar is not None:
            with suppress(OSError):  # as in `note`
                self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
                self._bar.update(1)

    def back_to(self, step: int) -> None:
        """Sets the count back to an earlier step, from which training continues."""
        self._done = step
        if self._bar is not None:
            self._bar.n = step
            with suppress(OSError):
                self._bar.refresh()

    def report(self, values: Mapping[str, float]) -> None:
        """Writes a line of training metrics, unless a bar already shows them."""
        if self._label is None or self._bar is not None:
            return
        per_step = (time.monotonic() - self._started) / max(1, self._done - self._first)
        left = tqdm.format_interval(per_step * (self._total - self._done))
        self.note(
            f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s, {left} left",
        )

    def note(self, text: str) -> None:
        """Writes a line, with a bar or without; if stderr cannot take it (a full disk, a closed pipe), it is lost."""
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
