"""The process that runs a task's checks for `quietstar.tasks.checking`: one JSON object per line in, one per line out.

It is started by its file name, with the `sys.path` of the process that starts it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from quietstar.tasks.task import Task


def main() -> None:
    """Makes the task, reports whether that succeeded, and answers requests until there are no more."""
    requests, replies = _take_streams()
    start = json.loads(requests.readline())
    sys.path[:] = start["path"]
    try:
        task = _load(start["name"], start["options"])
    except BaseException as error:  # the user's module may raise anything while it is imported
        _reply(replies, {"error": _told(error)})
        return
    _limit_memory(start["memory"])
    _reply(replies, {"error": None})
    for line in requests:
        # its default action ends a process that hangs although nobody waits for it any more
        signal.setitimer(signal.ITIMER_REAL, 2 * start["timeout"] + 1)
        verdict = _check(task, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, verdict)


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Returns the streams of requests and replies, and gives the checks an empty stdin, stdout and stderr instead."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    return requests, replies


def _load(name: str, options: dict[str, Any]) -> Task:
    from quietstar.config.loops import ProblemOptions
    from quietstar.tasks.registry import load_task

    task = load_task(name, ProblemOptions(**options))
    getattr(task, "warm_up", lambda: None)()
    return task


def _limit_memory(more: int) -> None:
    """Lets the checks take `more` bytes beyond what the process has now, and write no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def _check(task: Task, request: dict[str, Any]) -> dict[str, Any]:
    from quietstar.tasks.task import Problem, Verdict

    try:
        verdict = task.check(Problem(**request["problem"]), request["completion"])
        if not isinstance(verdict, Verdict):
            raise TypeError(f"check returned a {type(verdict).__name__}, needs a Verdict")
        if not isinstance(verdict.answer, str | None):
            raise TypeError(f"check found an answer of type {type(verdict.answer).__name__}, needs a str or None")
        reply = {"answer": verdict.answer, "correct": bool(verdict.correct), "failure": verdict.failure}
    except BaseException as error:  # SystemExit must not end the worker
        return {"answer": None, "correct": False, "failure": f"the check raised {_told(error)}"}
    return reply


def _told(error: BaseException) -> str:
    """Returns the class and the message of an error in one line."""
    try:
        says = " ".join(str(error).split())[:300]
    except BaseException:  # an error of the user's own class can raise even here
        says = ""
    return f"{type(error).__name__}: {says}" if says else type(error).__name__


def _reply(replies: BinaryIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main()
