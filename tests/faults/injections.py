"""The faults, by name. A child of the zygote brings them about in its own process before it calls the command.

They enter where the program meets the operating system or a library. Time is counted in micro-batches: each calls
`Tensor.backward` once, and an evaluation never does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quietstar.outer_loop.phases import Phases
from quietstar.runs.checkpoints import list_checkpoints
from quietstar.training import checkpoint

FAULTS: dict[str, Callable[..., None]] = {}


def inject(name: str, *arguments: Any) -> None:
    """Brings about a fault of the table."""
    FAULTS[name](*arguments)


def _fault(function: Callable[..., None]) -> Callable[..., None]:
    FAULTS[function.__name__] = function
    return function


class Clock:
    """Counts the micro-batches of this process, and calls what is due in the middle of one."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.before: list[Callable[[int, Tensor], None]] = []
        self.after: list[Callable[[int, Tensor], None]] = []
        self._wound = False

    def wind(self) -> None:
        """Begins to count, if it has not."""
        if self._wound:
            return
        self._wound = True
        backward = Tensor.backward

        def counted(loss: Tensor, *arguments: Any, **keywords: Any) -> None:
            self.begun += 1
            for call in self.before:
                call(self.begun, loss)
            backward(loss, *arguments, **keywords)
            self.ended += 1
            for call in self.after:
                call(self.begun, loss)

        Tensor.backward = counted


CLOCK = Clock()


def _before(call: Callable[[int, Tensor], None]) -> None:
    CLOCK.wind()
    CLOCK.before.append(call)


def _after(call: Callable[[int, Tensor], None]) -> None:
    CLOCK.wind()
    CLOCK.after.append(call)


# -- kills, signals and pauses -----------------------------------------------------------------------------------------


@_fault
def send(micro_batch: int, *names: str) -> None:
    """Sends signals to this process when a micro-batch has its gradients, and before anything is done with them."""

    def call(now: int, loss: Tensor) -> None:
        if now == micro_batch:
            for name in names:
                os.kill(os.getpid(), signal.Signals[name])

    _after(call)


@_fault
def pause(micro_batch: int, file: str) -> None:
    """In a micro-batch, makes a file and waits until it is gone."""

    def call(now: int, loss: Tensor) -> None:
        if now == micro_batch:
            Path(file).touch()
            _wait_while(file)

    _before(call)


@_fault
def hold_saves(file: str) -> None:
    """While a file is there, what a save has written does not reach the disk."""
    fsync = os.fsync

    def held(descriptor: int) -> None:
        if _saving():
            _wait_while(file)
        fsync(descriptor)

    os.fsync = held


def _wait_while(file: str) -> None:
    while os.path.exists(file):
        time.sleep(0.002)


# -- phases of an outer loop -------------------------------------------------------------------------------------------


@_fault
def kill_in_phase(name: str, iteration: int, when: str) -> None:
    """kill -9 in a phase: at its `start`, or at its `end`, when its work is done and its manifest not yet written."""
    run = Phases.run

    def killed(
        phases: Phases, now: int, called: str, inputs: Mapping[str, Any], work: Callable[[str], Mapping[str, Any]]
    ) -> dict[str, Any]:
        def last(key: str) -> Mapping[str, Any]:
            if when == "end":
                work(key)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        return run(phases, now, called, inputs, last if (called, now) == (name, iteration) else work)

    Phases.run = killed


@_fault
def kill_after_checkpoint(directory: str, micro_batch: int) -> None:
    """kill -9 in a micro-batch, as soon as there is a checkpoint."""

    def call(now: int, loss: Tensor) -> None:
        if now == micro_batch:
            while not list_checkpoints(Path(directory)):
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)

    _after(call)


@_fault
def on_store_write(number: int, *names: str) -> None:
    """Sends signals in the middle of write number `number`, from 1, of samples: half of the bytes are in the file."""
    write = os.write
    count = 0

    def halved(descriptor: int, data: bytes) -> int:
        nonlocal count
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("/samples.jsonl"):
            return write(descriptor, data)
        count += 1
        if count == number:
            written = write(descriptor, data[: len(data) // 2])
            for name in names:
                os.kill(os.getpid(), signal.Signals[name])
            return written
        return write(descriptor, data)

    os.write = halved


@_fault
def full_disk_of_store(number: int, room: int) -> None:
    """From write number `number`, from 1, of samples on, no file can grow by more than `room` bytes."""
    write = os.write
    count = 0

    def limited(descriptor: int, data: bytes) -> int:
        nonlocal count
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/samples.jsonl"):
            count += 1
            if count == number:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(descriptor).st_size + room, hard))
        return write(descriptor, data)

    os.write = limited


# -- each operation of a save ------------------------------------------------------------------------------------------


@_fault
def list_operations(file: str) -> None:
    """Writes a line for each operation of the saves, before it happens."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _on_each_operation(lambda operation, path: os.write(descriptor, f"{operation}\n".encode()))


@_fault
def kill_at_operation(operation: str) -> None:
    """kill -9 before an operation of a save, such as `fsync MANIFEST.json`;
    at `half` of a file, half of it is there.
    """
    _at_operation(operation, lambda: None)


@_fault
def power_loss_at_operation(operation: str, output_dir: str) -> None:
    """As `kill_at_operation`, and what has not been synced by then is lost."""
    sizes = {file.stat().st_ino: file.stat().st_size for file in _files(output_dir)}
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        sizes[found.st_ino] = found.st_size

    os.fsync = noted

    def lose() -> None:
        for file in _files(output_dir):
            found = file.stat()
            if found.st_size > sizes.get(found.st_ino, 0):
                os.truncate(file, sizes.get(found.st_ino, 0))

    _at_operation(operation, lose)


def _files(directory: str) -> list[Path]:
    return [path for path in Path(directory).rglob("*") if path.is_file()]


def _at_operation(wanted: str, first: Callable[[], None]) -> None:
    def call(operation: str, path: str) -> None:
        if operation == wanted:
            if operation.startswith("half "):
                os.truncate(path, os.path.getsize(path) // 2)
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    _on_each_operation(call)


def _on_each_operation(call: Callable[[str, str], Any]) -> None:
    """Calls with what happens, to which name, and its path, before each change that a save makes to the disk."""
    busy = False

    def announce(name: str, path: str | Path) -> None:
        nonlocal busy
        if busy or not _saving():
            return
        busy = True  # what the call does is no operation of the save
        call(f"{name} {os.path.basename(os.fspath(path)).partition('-' + str(os.getpid()))[0]}", str(path))
        busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR):
                announce("open", path)
        elif event in ("os.rename", "os.remove", "os.rmdir") or (
            event == "os.mkdir" and not os.path.exists(arguments[0])
        ):
            announce(event.removeprefix("os."), arguments[0])

    sys.addaudithook(hook)
    fsync = os.fsync

    def announced(descriptor: int) -> None:
        announce("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = announced
    for module, name in ((checkpoint, "save_file"), (transformers.modeling_utils, "safe_save_file")):
        setattr(module, name, _announced_write(getattr(module, name), announce))


def _announced_write(write: Callable[..., None], announce: Callable[[str, str | Path], None]) -> Callable[..., None]:
    def announced(tensors: dict[str, Tensor], file: str | Path, *arguments: Any, **keywords: Any) -> None:
        announce("write", file)
        write(tensors, file, *arguments, **keywords)
        announce("half", file)

    return announced


def _saving() -> bool:
    return threading.current_thread() is not threading.main_thread()


# -- numbers that are none ---------------------------------------------------------------------------------------------


@_fault
def bad_state(first: int, last: int, number: int, value: str) -> None:
    """Normalised states number `number`, from 1, of micro-batches `first` to `last` are `value`, nan or inf."""
    forward = LlamaRMSNorm.forward
    counted, count = -1, 0

    def poisoned(module: LlamaRMSNorm, states: Tensor) -> Tensor:
        nonlocal counted, count
        out = forward(module, states)
        if not module.training:
            return out
        counted, count = CLOCK.ended, 1 if counted != CLOCK.ended else count + 1
        return out * float(value) if first <= counted + 1 <= last and count == number else out

    CLOCK.wind()
    LlamaRMSNorm.forward = poisoned


@_fault
def bad_gradient(first: int, last: int, value: str) -> None:
    """The gradient of the loss of micro-batches `first` to `last` is multiplied by `value`, nan or inf."""

    def call(now: int, loss: Tensor) -> None:
        if first <= now <= last:
            loss.register_hook(lambda gradient: gradient * float(value))

    _before(call)


# -- not enough of something -------------------------------------------------------------------------------------------


@_fault
def no_memory_forward(largest: int) -> None:
    """More than `largest` texts do not fit: the allocator is asked for what no machine has, and says so."""
    forward = torch.nn.Embedding.forward

    def hungry(module: torch.nn.Embedding, tokens: Tensor) -> Tensor:
        if tokens.ndim == 2 and len(tokens) > largest and torch.is_grad_enabled():
            torch.empty(1 << 50)
        return forward(module, tokens)

    torch.nn.Embedding.forward = hungry


@_fault
def no_memory_backward(first: int, last: int) -> None:
    """The backward pass of micro-batches `first` to `last` fails in its middle, some gradients already there."""

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def call(now: int, loss: Tensor) -> None:
        if first <= now <= last:
            loss.register_hook(fail)

    _before(call)


@_fault
def no_memory_moments() -> None:
    """The first of AdamW's moments does not fit, when the first step makes them."""
    zeros_like = torch.zeros_like
    failed = False

    def failing(tensor: Tensor, **keywords: Any) -> Tensor:
        nonlocal failed
        if CLOCK.ended and not failed and keywords == {"requires_grad": False}:
            failed = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return zeros_like(tensor, **keywords)

    CLOCK.wind()
    torch.zeros_like = failing


@_fault
def no_memory_optimizer(number: int) -> None:
    """Memory runs out in optimizer step `number` of this process, when it has changed weights."""
    step = torch.optim.AdamW.step
    count = 0

    def failing(optimizer: torch.optim.AdamW) -> None:
        nonlocal count
        count += 1
        step(optimizer)
        if count == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    torch.optim.AdamW.step = failing


@_fault
def no_memory_copy() -> None:
    """No tensor can be copied for a checkpoint."""
    to = Tensor.to

    def hungry(tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if CLOCK.begun and arguments == ("cpu",) and keywords == {"copy": True}:
            torch.empty(1 << 50)
        return to(tensor, *arguments, **keywords)

    CLOCK.wind()
    Tensor.to = hungry


@_fault
def full_disk(first: int, last: int, size: int) -> None:
    """From micro-batch `first` to `last`, and no save is being written, no file can grow beyond `size` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(now: int, loss: Tensor) -> None:
        if now == first:
            while any(thread.name == "checkpoint" for thread in threading.enumerate()):
                time.sleep(0.002)  # a save that has begun before is none of those that are to fail
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        if now >= last and not any(thread.name == "checkpoint" for thread in threading.enumerate()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))

    _before(call)


@_fault
def no_privileges() -> None:
    """Lets permissions hold for root, too, by giving up every capability."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


# -- bystanders --------------------------------------------------------------------------------------------------------


@_fault
def no_messages() -> None:
    """Nobody reads what this process writes to stderr: the pipe is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)


@_fault
def failing_logger(micro_batch: int) -> None:
    """TensorBoard fails from a micro-batch on, and when it is closed."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar = SummaryWriter.add_scalar

    def failing(writer: SummaryWriter, *arguments: Any) -> None:
        if CLOCK.begun >= micro_batch:
            raise RuntimeError("the logger's own fault")
        add_scalar(writer, *arguments)

    def fail(writer: SummaryWriter) -> None:
        raise RuntimeError("the logger's own fault")

    CLOCK.wind()
    SummaryWriter.add_scalar = failing
    SummaryWriter.close = fail
