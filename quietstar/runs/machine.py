"""The machine that a run uses: a description of it, the signals to stop or save, how much memory is left, and the end
of processes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from quietstar.config.options import DEVICE
from quietstar.config.training import TrainingOptions
from quietstar.errors import ConfigError

if TYPE_CHECKING:
    import torch

PACKAGES = ("quietstar", "torch", "transformers", "triton", "safetensors", "peft", "pyarrow", "numpy", "liger-kernel")
GIT_SECONDS = 5.0
WITHOUT_LIGER = (
    "training.fused_layers: got liger, but Liger-Kernel is not installed; pip install 'quietstar[gpu]', or use none"
)

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1
TEXTS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the messages of allocators that raise a plain RuntimeError: CPU, CUDA driver, Triton's launcher, cuBLAS."""


def environment() -> dict[str, Any]:
    """Describes the machine and this process, as plain JSON values.

    Returns:
        `started` (UTC), `command`, `python`, `platform`, `packages` (versions of those installed, by name), `cpu`,
        `cores`, `memory_gib`, `devices` (names of the GPUs), `cuda` (or null), and `git` of the working directory:
        `commit` and `dirty` (whether a tracked file differs from it), or null where it is not a checkout.
    """
    import torch  # not at the top: reading a report need not wait for it

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": [torch.cuda.get_device_name(index) for index in devices],
        "cuda": torch.version.cuda,
        "git": _git(),
    }


def _command() -> str:
    """Returns the command line as it was typed, `python -m` included."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name:
        name = module.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    commit = _run_git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _run_git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _run_git(*arguments: str) -> str | None:
    # no lock is taken: another git may be at work in the same checkout
    command = ["git", "--no-optional-locks", *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


class StopWaiting(BaseException):
    """A signal came in the middle of a wait."""


class Signals:
    """Context that notes signals, for a loop that looks at them between its steps; on exit the old handlers return.

    SIGTERM and SIGINT set `stop`; a second one ends the process at once, as kill -9 would. SIGUSR1 sets `save`. Outside
    the main thread, where Python allows no handlers, nothing is noted.

    Args:
        twice: Whether a second signal ends the process. Under torchrun it comes by itself: from torchrun, which passes
            on its own, besides the one from whoever signals all processes of a job.

    Attributes:
        stop: Signal that asked to stop; None where none did.
        save: Whether a signal asked to save.
    """

    def __init__(self, twice: bool = True) -> None:
        self._twice = twice
        self.stop: signal.Signals | None = None
        self.save = False
        self._interrupting = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Lets the first SIGTERM or SIGINT raise `StopWaiting` too, within this context, around a long wait."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def agreed(self, total: Callable[[torch.Tensor], torch.Tensor]) -> tuple[signal.Signals | None, bool]:
        """Returns the signal to stop and whether to save, the same on all ranks; `save` is answered with that.

        Args:
            total: Function that sums a tensor over all ranks.
        """
        import torch  # not at the top, as in `environment`

        noted = torch.tensor([self.stop == number for number in STOP] + [self.save], dtype=torch.float32)
        *stops, save = (total(noted) > 0).tolist()
        if save:
            self.save = False
        return next((number for number, asked in zip(STOP, stops, strict=True) if asked), None), save

    def __enter__(self) -> Signals:
        self.stop, self.save = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP, SAVE):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received == SAVE:
            self.save = True
            return
        if self.stop is not None:
            if self._twice:
                os._exit(128 + number)
            return
        self.stop = received
        with suppress(OSError):  # the reader of a pipe may have got the same signal, and have ended
            # os.write, not print: a handler may run in the middle of another write to the same stream
            more = "; a second signal stops at once" if self._twice else ""
            os.write(2, f"\n{received.name}: saving, then stopping{more}\n".encode())
        if self._interrupting:
            raise StopWaiting


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session of its own, with all that is left in the session, and closes its pipes.

    Args:
        process: Process that was started with `start_new_session`.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that a device or the host has no memory left.

    PyTorch's CPU allocator raises a plain RuntimeError, which is known by its message.
    """
    import torch  # not at the top, as in `environment`

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def available_memory() -> int | None:
    """Returns the bytes of host memory that a process can still get, or None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def resolve_device(name: str, option: str = "training.device") -> torch.device:
    """Returns the device that an option names.

    Args:
        name: Name of the device: `auto` (the first GPU, or the CPU if there is none), `cpu`, `cuda` or `cuda:N`.
        option: Name of the option in the error message.

    Raises:
        ConfigError: There is no such device.
    """
    import torch  # not at the top: commands check names before it is needed

    DEVICE.hold(option, name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = name.partition(":")[2]
    if int(index or 0) >= count:
        raise ConfigError(f"{option}: got {name}, but PyTorch sees {count} CUDA devices here")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def set_up(options: TrainingOptions) -> None:
    """Prepares a process for a command that trains; what it cannot do is refused before a model is loaded.

    Args:
        options: Options of the training loop: the number of CPU threads, the device, and what needs a GPU.

    Raises:
        ConfigError: There is no such device, or `training.fused_layers` needs a GPU or a package that is not here.
    """
    fused = options.fused_layers == "liger"
    no_gpu = "training.fused_layers: got liger, whose kernels need a CUDA device, but {}; use none"
    if fused and options.device == "cpu":
        raise ConfigError(no_gpu.format("training.device is cpu"))
    if fused and find_spec("liger_kernel") is None:
        raise ConfigError(WITHOUT_LIGER)
    import torch
    from transformers.utils import logging

    if fused and resolve_device(options.device).type != "cuda":
        raise ConfigError(no_gpu.format("PyTorch sees none here"))
    logging.disable_progress_bar()  # of loading and saving; a training has its own
    if options.threads is not None:
        torch.set_num_threads(options.threads)
