"""Runs a command in a process of its own, and looks at how it ends."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 60.0
"""Seconds. Runs take about one; the rest is for a busy machine."""
START_TIMEOUT = 300.0
"""Seconds until the first process is there: before it, everything is imported and a first run done."""


@dataclass
class Process:
    """A running command.

    Args:
        zygote: Who has forked it.
        pid: Its process id.
        log: File with its stdout and stderr.
    """

    zygote: Zygote
    pid: int
    log: Path

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Exit status, or minus the signal that has ended it."""
        return self.zygote.wait(self.pid, timeout)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.zygote.ended(self.pid)

    def send(self, *names: str) -> None:
        """Sends signals, one after another."""
        for name in names:
            os.kill(self.pid, signal.Signals[name])

    def kill(self) -> None:
        """kill -9, unless it has ended by itself."""
        if not self.ended:
            with suppress(ProcessLookupError):
                self.send("SIGKILL")

    def until(self, condition: Callable[[], object], timeout: float = TIMEOUT) -> None:
        """Waits for a condition that comes true while the process runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self.ended, f"ended too early:\n{self.text}"
            assert time.monotonic() < deadline, f"still waiting:\n{self.text}"
            time.sleep(0.002)

    @property
    def text(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Zygote:
    """The client of `zygote.py`.

    Args:
        directory: For the logs.
        environment: Additional variables.
        first: The arguments of a run that it does itself, so that its children find everything imported.
        command: Of this package: `train`, `star` or `vstar`.
    """

    def __init__(
        self, directory: Path, environment: dict[str, str], first: Sequence[str], command: str = "train"
    ) -> None:
        self._directory = directory
        self._command = command
        self._count = 0
        self._statuses: dict[int, int] = {}
        self._waiting: set[int] = set()
        self._answers = b""
        self.python_path = environment["PYTHONPATH"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", command, *first],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def launch(self, arguments: Sequence[str], *faults: Sequence[object]) -> Process:
        """Starts the command.

        Args:
            arguments: Of the command.
            faults: (name, argument, ...) of each, from `injections.py`.
        """
        log = self._directory / f"log-{self._count}.txt"
        self._count += 1
        request = {
            "command": self._command,
            "arguments": list(arguments),
            "faults": [list(fault) for fault in faults],
            "log": str(log),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        before = set(self._waiting)
        self._read(lambda: self._waiting != before or None, TIMEOUT if self._count > 1 else START_TIMEOUT)
        (pid,) = self._waiting - before
        return Process(self, pid, log)

    def run(self, arguments: Sequence[str], *faults: Sequence[object], expect: int = 0) -> str:
        """Runs the command to its end, which must have this exit status; returns what it has written."""
        process = self.launch(arguments, *faults)
        status = process.wait()
        assert status == expect, f"exit status {status}, not {expect}:\n{process.text}"
        return process.text

    def wait(self, pid: int, timeout: float) -> int:
        """See `Process.wait`."""
        self._read(lambda: pid in self._statuses or None, timeout)
        return self._statuses[pid]

    def ended(self, pid: int) -> bool:
        """See `Process.ended`."""
        self._read(lambda: pid in self._statuses or None, 0.0)
        return pid in self._statuses

    def close(self) -> None:
        """Ends it, and every process that still runs."""
        for pid in self._waiting:
            os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT)
        self._process.stdout.close()

    def _read(self, done: Callable[[], object], timeout: float) -> None:
        """Reads answers until `done`; a timeout of 0 takes those that are there."""
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while not done():
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                if timeout:
                    raise TimeoutError(f"no answer in {timeout} s")
                return
            received = os.read(stdout, 1 << 16)
            assert received, "the zygote has died"
            *lines, self._answers = (self._answers + received).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if "status" in answer:
                    self._statuses[answer["pid"]] = answer["status"]
                    self._waiting.discard(answer["pid"])
                else:
                    self._waiting.add(answer["pid"])
