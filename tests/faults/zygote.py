"""A process that has imported everything and forks a child per launch: `python -m tests.faults.zygote COMMAND ...`.

Importing torch and transformers takes seconds, and these tests launch hundreds of runs. A forked child is a process
like any other: it has its own memory, files, signals and exit status, and can be killed. Requests and answers are JSON
lines on stdin and stdout.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import sys
import threading
import traceback
from contextlib import redirect_stdout, suppress
from typing import Any

import torch

from quietstar import star, train, vstar
from tests.faults.injections import inject

COMMANDS = {"train": train.main, "star": star.main, "vstar": vstar.main}


def serve() -> None:
    """Answers until stdin ends: `{"pid"}` to a launch, and `{"pid", "status"}` when that process has ended."""
    for name in ("quietstar.training.run", "quietstar.demos.textbook", "quietstar.outer_loop.run"):
        importlib.import_module(name)  # the commands do so only when they run
    gc.freeze()
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    requests = b""
    while True:
        for key, _ in selector.select():
            if key.data is not None:
                _, status = os.waitpid(key.data, 0)
                selector.unregister(key.fd)
                os.close(key.fd)
                _answer({"pid": key.data, "status": os.waitstatus_to_exitcode(status)})
                continue
            received = os.read(sys.stdin.fileno(), 1 << 16)
            if not received:
                return
            *lines, requests = (requests + received).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                _answer({"pid": pid})


def _answer(value: dict[str, int]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(value).encode() + b"\n")


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, *arguments in request["faults"]:
            inject(name, *arguments)
        status = COMMANDS[request["command"]](request["arguments"])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # as at the end of any Python process: it waits for the threads
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to pytest, which then closes stdin
    torch.set_num_threads(1)  # a process with threads must not fork
    with suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")
    with redirect_stdout(sys.stderr):
        assert COMMANDS[sys.argv[1]](sys.argv[2:]) == 0  # a first run imports the rest
    serve()
    os._exit(0)  # at a normal exit, a library complains about what it has not freed
