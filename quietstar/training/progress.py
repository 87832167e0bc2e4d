"""What a person sees while training runs: a bar on a terminal, one plain line per report anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from tqdm import tqdm


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
