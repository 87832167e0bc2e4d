"""The process in which `quietstar.tasks.code` runs a program and its tests. It is started by its file name."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "pty.spawn")


def main() -> None:
    """Reads a request from stdin, limits this process, and reports on stdout how the tests ended."""
    request = json.loads(sys.stdin.buffer.read())
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _cut_network()
    _limit(request)
    sys.addaudithook(_forbid)
    space: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(request["code"], "solution.py", "exec"), space)
        exec(compile(request["tests"], "tests.py", "exec"), space)
    except BaseException as error:  # SystemExit is an ordinary way to fail
        outcome: dict[str, str | None] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    else:
        outcome = {"failure": None, "token": request["token"]}
    os.write(replies, json.dumps(outcome).encode())
    os._exit(0)  # does not wait for threads or exit handlers of the program


def _cut_network() -> None:
    """Moves this process into a network without interfaces, where the kernel lets an ordinary user do so."""
    library = ctypes.CDLL(None)
    if library.unshare(_NEW_NETWORK) != 0:
        library.unshare(_NEW_USERS | _NEW_NETWORK)


def _limit(request: dict[str, Any]) -> None:
    seconds = int(request["timeout"]) + 1
    signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 1)  # its default action ends the process
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 1,  # no limit for root
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is already in force
            resource.setrlimit(kind, (most, most))


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not allowed here")


if __name__ == "__main__":
    main()
