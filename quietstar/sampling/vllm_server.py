"""A vLLM server that a run starts on its own machine, and ends; the commands that give servers new weights.

vLLM needs other versions of torch and transformers than this package, so its Python may be that of another environment.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from quietstar.config.sampling import SamplingOptions, split_command
from quietstar.errors import ConfigError, OutOfMemoryError, ServerError
from quietstar.runs.machine import TEXTS, end_session

MODULE = "vllm.entrypoints.openai.api_server"
HOST = "127.0.0.1"
POLL_SECONDS, END_SECONDS = 0.2, 10.0
"""Time between two looks at a server that starts, and time that it has to end."""

KEEPER = """
import contextlib, ctypes, os, signal, subprocess, sys, threading, time
prctl = ctypes.CDLL(None).prctl
server = subprocess.Popen(
    sys.argv[2:], stdin=subprocess.DEVNULL, process_group=0, preexec_fn=lambda: prctl(1, signal.SIGKILL, 0, 0, 0)
)
def end():
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
def watch():
    while os.read(0, 1):
        pass
    server.terminate()
    time.sleep(float(sys.argv[1]))
    end()
threading.Thread(target=watch, daemon=True).start()
status = server.wait()
end()
os._exit(status if status >= 0 else 128 - status)
"""
"""Runs the server, and ends it and all that it has started when its standard input ends, as it does with this run. The
server ends with it in turn (PR_SET_PDEATHSIG)."""

OF_TORCHRUN = re.compile(
    r"(RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|ROLE_NAME|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|"
    r"MASTER_ADDR|MASTER_PORT|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING)"
)
"""Environment variables that torchrun sets, which vLLM would take for its own."""

OUT_OF_MEMORY = (
    *TEXTS,
    "No available memory for the cache blocks",
    "memory utilization",
    "available KV cache memory",
    "MemoryError",
)
"""Parts of the messages of a server that has too little memory."""

_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception)\b: .+")
_HIDES = "root cause"
"""In the message of an error that only tells of an earlier one."""


def has_vllm() -> bool:
    """Returns whether this Python has vLLM."""
    return importlib.util.find_spec("vllm") is not None


class VllmServer:
    """A server of vLLM with one model, at a free port of this machine that no other machine reaches.

    It reads safetensors alone, samples as each request says, and gives raw log-probabilities.

    Args:
        path: Directory or hub name of the model and its tokenizer.
        options: Sampling options, such as the server's Python and its arguments.
        dtype: Dtype of the weights, such as `bfloat16`.
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`.
        log: File that its output is appended to; None: a temporary one.

    Attributes:
        url: URL of the server.

    Raises:
        ConfigError: There is no vLLM, or it cannot serve the model.
        OutOfMemoryError: The model does not fit into memory.
        ServerError: The server is not ready within `server_timeout` seconds.
    """

    def __init__(
        self, path: str | os.PathLike[str], options: SamplingOptions, *, dtype: str, device: str, log: Path | None
    ) -> None:
        if options.server_python is None and not has_vllm():
            raise ConfigError(
                "sampling.engine: this Python has no vllm; install it in an environment of its own, and give the path "
                "of its Python as sampling.server_python"
            )
        self._path, self._log_path = os.fspath(path), log
        self._log: BinaryIO = tempfile.TemporaryFile() if log is None else log.open("ab+")  # noqa: SIM115  # for `close`
        self._start = self._log.seek(0, os.SEEK_END)
        port = _free_port()
        self.url = f"http://{HOST}:{port}"
        command = [
            options.server_python or sys.executable,
            *("-m", MODULE, "--model", self._path, "--host", HOST, "--port", str(port)),
            *("--dtype", dtype, "--seed", "0", "--max-num-seqs", str(options.batch_size)),
            *("--generation-config", "vllm"),  # no defaults of the model: only a request says how to sample
            *("--logprobs-mode", "raw_logprobs"),
            *("--load-format", "safetensors"),  # by default it reads pickles too
            *("--uvicorn-log-level", "warning"),
            *split_command("sampling.server_arguments", options.server_arguments),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", KEEPER, str(END_SECONDS), *command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=server_environment(device, self._path, options.server_python),
            start_new_session=True,
        )
        try:
            self._wait(port, options.server_timeout)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Refuses to go on where the server has ended.

        Raises:
            ServerError, ConfigError, OutOfMemoryError: It has; the message has the reason that it has logged.
        """
        status = self._process.poll()
        if status is None:
            return
        reason, where = self._reason(), "" if self._log_path is None else f"; its output is in {self._log_path}"
        if any(text in reason for text in OUT_OF_MEMORY):
            raise OutOfMemoryError(
                f"{self._path}: vllm has too little memory for it: {reason}; set sampling.server_arguments, to "
                f"'--gpu-memory-utilization 0.8 --max-model-len 4096' for instance{where}"
            )
        raise ServerError(f"{self.url}: vllm has ended with status {status}: {reason}{where}")

    def close(self) -> None:
        """Ends the server and all that it has started."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * END_SECONDS)
        for left in _session(self._process.pid):  # of an engine whose keeper was killed
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        end_session(self._process)
        self._log.close()

    def _wait(self, port: int, limit: float) -> None:
        end = time.monotonic() + limit
        while not _is_healthy(port):
            try:
                self.check()
            except ServerError as error:
                raise ConfigError(f"{self._path}: vllm cannot serve it: {str(error).partition(': ')[2]}") from None
            if time.monotonic() > end:
                raise ServerError(
                    f"{self.url}: vllm is not ready after {limit:g} s (sampling.server_timeout): {self._reason()}"
                )
            time.sleep(POLL_SECONDS)
        self.check()  # another program may have taken the port

    def _reason(self) -> str:
        """Returns the error that the server has logged last, or its last line."""
        self._log.seek(self._start)
        text = self._log.read().decode(errors="replace")
        errors = [found for found in _ERROR.findall(text) if _HIDES not in found]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return (errors or lines or ["it has said nothing"])[-1][:500]


def reload(command: str, model: str | os.PathLike[str]) -> None:
    """Runs the command that gives the servers new weights, without a shell.

    Args:
        command: Command line; `{model}` in a word stands for the model.
        model: Directory of the model, which the command gets as an absolute path, or its hub name.

    Raises:
        ServerError: It cannot be started, or ends with another status than 0.
    """
    name = os.path.abspath(model) if os.path.isdir(model) else os.fspath(model)
    words = [word.replace("{model}", name) for word in split_command("sampling.reload_command", command)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise ServerError(f"sampling.reload_command: cannot start {words[0]} ({error.strerror})") from None
    if done.returncode:
        last = " | ".join((done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-3:])
        raise ServerError(
            f"sampling.reload_command: {words[0]} ended with status {done.returncode}: {last or 'it has said nothing'}"
        )


def server_environment(device: str, path: str, python: str | None) -> dict[str, str]:
    """Returns the environment of a server: without torchrun's variables, on the device, and without reports of usage.

    Args:
        device: Name of the device: `auto`, `cpu`, `cuda` or `cuda:N`; N counts the devices that this process sees.
        path: Directory or hub name of the model.
        python: Python of another environment; None: the running one.
    """
    found = {name: value for name, value in os.environ.items() if not OF_TORCHRUN.fullmatch(name)}
    if python is not None:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
    found["PATH"] = os.pathsep.join(
        filter(None, (os.path.dirname(os.path.abspath(python or sys.executable)), found.get("PATH")))
    )
    found["VLLM_NO_USAGE_STATS"] = found["DO_NOT_TRACK"] = "1"
    if Path(path).is_dir():
        found["HF_HUB_OFFLINE"] = "1"
    seen = [one for one in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    number = device.partition(":")[2]
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        found["CUDA_VISIBLE_DEVICES"] = seen[int(number)] if int(number) < len(seen) else number
    return found


def _session(leader: int) -> list[int]:
    """Returns the processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            _state, _parent, _group, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader:
                found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
