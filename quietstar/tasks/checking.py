"""Checks answers in worker processes, because a check may hang, raise or end its process without harm to the caller."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import Count, check_value, type_hints
from quietstar.errors import ConfigError
from quietstar.runs.machine import end_session
from quietstar.tasks.code_process import told
from quietstar.tasks.registry import load_task, recipe_of
from quietstar.tasks.task import Problem, Task, Verdict

_WORK = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from quietstar.tasks.checking import work; work()"
START_SECONDS = 120.0
"""How long a worker process may take to import the task's modules."""


class Checker:
    """Judges completions, in worker processes where the task needs them (`Task.isolated`).

    A worker makes the task from its name and options, imports neither torch nor transformers unless the task does, and
    shares nothing with this process. It calls the task's `warm_up()` first, if there is one, so that slow imports do
    not count as time of a check. A worker that hangs is ended and replaced, and so is one whose process the check has
    ended.

    Args:
        task: Task that judges; where it is isolated, it was made by `load_task`.
        timeout: Time limit of one check in seconds.
        workers: Number of worker processes.
        memory: Memory in bytes that the checks of one worker may take.

    Raises:
        ConfigError: A number is not positive, or the task was not made by `load_task`, so that a worker cannot make it.
    """

    def __init__(self, task: Task, timeout: float, workers: int = 1, memory: int = 4 * 2**30) -> None:
        check_value("problems.timeout", timeout, type_hints(ProblemOptions, True)["timeout"])
        check_value("workers", workers, Count)
        self.task = task
        self._workers: list[_Worker] = []
        if task.isolated:
            self._workers = [_Worker(_start_message(task, timeout, memory), timeout) for _ in range(workers)]

    def check(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Returns the verdicts on completions, in their order. A check that fails gives a verdict too, with its
        `failure`.

        Args:
            items: Pairs of a problem and a completion.

        Raises:
            ConfigError: The task can be made here, but not in a worker process.
        """
        if not self._workers:
            return [_judged(self.task, problem, completion) for problem, completion in items]
        verdicts: dict[int, Verdict] = {}
        waiting = deque(enumerate(items))

        def work(worker: _Worker) -> None:
            while True:
                try:
                    place, (problem, completion) = waiting.popleft()
                except IndexError:
                    return
                verdicts[place] = worker.check(problem, completion)

        active = self._workers[: len(items)]
        if active:
            with ThreadPoolExecutor(len(active)) as threads:
                try:
                    list(threads.map(work, active))
                finally:
                    waiting.clear()  # after Ctrl-C too, or the threads would go on
        return [verdicts[place] for place in range(len(items))]

    def close(self) -> None:
        """Ends the worker processes."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Checker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """A process that is started when it is first needed, and again after it has ended."""

    def __init__(self, start_message: dict[str, Any], timeout: float) -> None:
        self._start_message = start_message
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def check(self, problem: Problem, completion: str) -> Verdict:
        process = self._process or self._start()
        request = {"problem": dataclasses.asdict(problem), "completion": completion}
        try:
            reply = self._ask(process, request, self._timeout)
        except TimeoutError:
            self.stop()
            return Verdict(None, False, f"the check took more than {self._timeout:g} s and was stopped")
        except EOFError:
            return Verdict(None, False, f"the check ended its process {self._bury(process)}")
        return Verdict(**reply)

    def stop(self) -> None:
        if self._process is not None:
            self._bury(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        # a new session: Ctrl-C is for the main process, and processes that a check starts can be ended with it
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _WORK, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._process, self._read = process, b""
        try:
            problem = self._ask(process, self._start_message, START_SECONDS)["error"]
        except (TimeoutError, EOFError) as error:
            why = f"it was not ready after {START_SECONDS:g} s" if isinstance(error, TimeoutError) else "it ended"
            problem = f"{why} {self._bury(process)}".strip()
        if problem is not None:
            self.stop()
            raise ConfigError(f"task: {self._start_message['name']} cannot be made in a worker process: {problem}")
        return process

    def _ask(self, process: subprocess.Popen[bytes], message: dict[str, Any], seconds: float) -> Any:
        """Sends a message and returns the reply; raises TimeoutError, or EOFError where the process has ended."""
        assert process.stdin is not None and process.stdout is not None
        until = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # it has ended, which the other pipe shows as well
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        while b"\n" not in self._read:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 65_536)
            if not piece:
                raise EOFError
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _bury(self, process: subprocess.Popen[bytes]) -> str:
        """Ends a process with everything that it started, and returns how the process had ended before; empty if it had
        not.
        """
        with suppress(subprocess.TimeoutExpired):  # one that has closed its pipe may take a moment to be gone
            process.wait(0.2)
        status = process.poll()
        end_session(process)
        self._process = None
        if status is None:
            return ""
        return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _start_message(task: Task, timeout: float, memory: int) -> dict[str, Any]:
    recipe = recipe_of(task)
    if recipe is None:
        raise ConfigError(
            f"task: {task.name} checks its answers in worker processes, which make it again from its name and options; "
            "make it with quietstar.tasks.load_task, or set its attribute `isolated` to False"
        )
    name, options = recipe
    given = dataclasses.asdict(options)
    return {"name": name, "options": given, "timeout": timeout, "memory": memory}


def _judged(task: Task, problem: Problem, completion: str) -> Verdict:
    """Returns the verdict on a completion, whatever the check does short of ending the process."""
    try:
        verdict = task.check(problem, completion)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"check returned a {type(verdict).__name__}, needs a Verdict")
        if not isinstance(verdict.answer, str | None):
            raise TypeError(f"check found an answer of type {type(verdict.answer).__name__}, needs a str or None")
        return dataclasses.replace(verdict, correct=bool(verdict.correct))
    except (Exception, SystemExit) as error:
        return Verdict(None, False, f"the check raised {told(error)}")


# --- the worker process


def work() -> None:
    """Makes the task, reports whether that succeeded, and answers requests until there are no more: one JSON object per
    line in, one per line out.
    """
    requests, replies = _take_streams()
    start = json.loads(requests.readline())
    try:
        task = load_task(start["name"], ProblemOptions(**start["options"]))
        getattr(task, "warm_up", lambda: None)()
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        _reply(replies, {"error": told(error)})
        return
    _limit_memory(start["memory"])
    _reply(replies, {"error": None})
    for line in requests:
        request = json.loads(line)
        # its default action ends a process that hangs although nobody waits for it any more
        signal.setitimer(signal.ITIMER_REAL, 2 * start["timeout"] + 1)
        verdict = _judged(task, Problem(**request["problem"]), request["completion"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, dataclasses.asdict(verdict))


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Returns the streams of requests and replies, and gives the checks an empty stdin, stdout and stderr instead."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    return requests, replies


def _limit_memory(more: int) -> None:
    """Lets the checks take `more` bytes beyond what the process has now, and write no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def _reply(replies: BinaryIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content).encode() + b"\n")
    replies.flush()
