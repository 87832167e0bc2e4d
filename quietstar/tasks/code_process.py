"""What the two processes of a check of `quietstar.tasks.code` share: their messages, and what they are kept from.

The program is in one process (`code_runner.py`), its tests are in the other (`code_tests.py`), with a pipe for each
direction. An object of one process is a number in the messages, and in the other process an object that asks for all
that is done with it. Lines of JSON carry the messages, so that none can run code.
"""

from __future__ import annotations

import array
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import fractions
import importlib
import json
import operator
import os
import pathlib
import resource
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from functools import cache
from typing import Any, BinaryIO

MOST_BYTES = 2**26
"""Longest message that a process reads."""

MOST_THREADS = 64
"""How many threads or processes may be started beyond the number that the machine has (by root: any number)."""

_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.fork",
    "os.kill",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "pty.spawn",
)


_ALLOWED = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222, mprotect 10 226,
munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67,
pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216,
madvise 28 233, dup 32 23, dup2 33 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172,
exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83, ftruncate 77 46, getcwd 79 17, chdir 80 49, readlink 89 -,
gettimeofday 96 169, getrlimit 97 -, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176,
geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgid 121 155, getsid 124 156, sigaltstack 131 132, statfs 137 43, fstatfs 138 44,
arch_prctl 158 -, gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, getdents64 217 61,
set_tid_address 218 96, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94,
epoll_wait 232 -, epoll_ctl 233 21, epoll_pwait 281 22, sendto 44 206, recvfrom 45 207,
newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72,
ppoll 271 73, set_robust_list 273 99, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, getcpu 309 168,
getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293, faccessat2 439 439"""
_ALLOWED_IN_ITS_DIRECTORY = ", openat 257 56, rename 82 -, rmdir 84 -, unlink 87 -, unlinkat 263 35, renameat 264 38, "
_ALLOWED_IN_ITS_DIRECTORY += "renameat2 316 276"
_ANY = 0xFFFFFFFF
_ALLOWED_IF = {  # each argument with this index is, under its mask, one of these values
    "ioctl 16 29": ((1, _ANY, (0x5401, 0x5451, 0x5450, 0x5421)),),  # TCGETS, FIOCLEX, FIONCLEX, FIONBIO
    "fcntl 72 25": ((1, _ANY, (0, 1, 2, 3, 4, 1030, 1032)),),  # all but locks, leases and signals to other processes
    "clone 56 220": ((0, 0x10000, (0x10000,)),),  # CLONE_THREAD
    "prlimit64 302 261": ((0, _ANY, (0,)),),  # its own limits, which it can't raise
    "socketpair 53 199": ((0, _ANY, (1,)), (1, 0xF, (1,))),  # AF_UNIX, SOCK_STREAM: it reaches nothing but its pair
}
_MAKES_DIRECTORIES = {
    "mkdir 83 -": ((1, 0o700, (0o700,)),),
    "mkdirat 258 34": ((2, 0o700, (0o700,)),),
}  # removable ones
_READS = {"openat 257 56": ((2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC, (0,)),)}
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH_*, column of the tables


# --- values as data


class Ended(BaseException):
    """The other process has ended."""


_STANDARD: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {  # to a plain value, and back
    complex: (lambda x: (x.real, x.imag), lambda x: complex(*x)),
    bytes: (lambda x: x.hex(), bytes.fromhex),
    range: (lambda x: (x.start, x.stop, x.step), lambda x: range(*x)),
    slice: (lambda x: (x.start, x.stop, x.step), lambda x: slice(*x)),
    type(...): (lambda x: None, lambda x: ...),
    type(NotImplemented): (lambda x: None, lambda x: NotImplemented),
    decimal.Decimal: (str, decimal.Decimal),
    fractions.Fraction: (lambda x: (x.numerator, x.denominator), lambda x: fractions.Fraction(*x)),
    datetime.date: (lambda x: x.isoformat(), datetime.date.fromisoformat),
    datetime.time: (lambda x: x.isoformat(), datetime.time.fromisoformat),
    datetime.datetime: (lambda x: x.isoformat(), datetime.datetime.fromisoformat),
    datetime.timedelta: (lambda x: (x.days, x.seconds, x.microseconds), lambda x: datetime.timedelta(*x)),
    datetime.timezone: (lambda x: (x.utcoffset(None), x.tzname(None)), lambda x: datetime.timezone(*x)),
    time.struct_time: (tuple, time.struct_time),
    pathlib.PurePosixPath: (str, pathlib.PurePosixPath),
    pathlib.PosixPath: (str, pathlib.PosixPath),
    pathlib.PureWindowsPath: (str, pathlib.PureWindowsPath),
    array.array: (lambda x: (x.typecode, x.tolist()), lambda x: array.array(*x)),
    memoryview: (bytes, memoryview),
    types.MappingProxyType: (dict, types.MappingProxyType),
    type({}.keys()): (list, lambda x: dict.fromkeys(x).keys()),
    type({}.items()): (list, lambda x: dict(x).items()),
    type({}.values()): (list, lambda x: dict(enumerate(x)).values()),
}
_BY_NAME = {kind.__name__: kind for kind in _STANDARD}
_MADE_WITH: dict[type, Callable[[Any], Any]] = {  # the argument that an empty one is made with
    collections.defaultdict: operator.attrgetter("default_factory"),
    collections.deque: operator.attrgetter("maxlen"),
}
_MUTABLE = (list, dict, set, bytearray, collections.Counter, collections.OrderedDict, *_MADE_WITH)
_CONTAINERS: dict[str, type] = {kind.__name__: kind for kind in (*_MUTABLE, tuple, frozenset)}
PLAIN: dict[type, Callable[[Any], Any]] = {  # the plain value in an object of a derived class, whatever that says
    int: int.__int__,
    float: float.__float__,
    complex: complex.__complex__,
    str: str.__str__,
    bytes: bytes.__bytes__,
    tuple: lambda x: tuple.__getitem__(x, slice(None)),
    frozenset: frozenset().union,
    list: list.copy,
    dict: dict.copy,
    set: set().union,
    bytearray: bytearray.copy,
    collections.deque: collections.deque,
}
NATIVE = tuple(PLAIN)[:7]
"""Immutable plain types: an object of a class that is derived from one is sent with its value."""

TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
TYPES |= {kind.__name__: kind for kind in (*_STANDARD, *_MUTABLE, type(None))}
TYPES |= {"function": types.FunctionType, "generator": types.GeneratorType, "coroutine": types.CoroutineType}


def plain_type(value: Any) -> type | None:
    """Returns the plain type that the class of a value is or is derived from."""
    return next((kind for kind in PLAIN if issubclass(type(value), kind)), None)


class Codec:
    """Turns values into JSON and back. Of an object that occurs twice in a message, the second is a reference.

    Args:
        other: Encodes what is no plain value.
        made: Decodes what `other` of the other process encoded.
        known: Mutable objects that both processes have, in the same order.
    """

    def __init__(
        self, other: Callable[[Any, Codec], Any], made: Callable[[list[Any], Codec], Any], known: list[Any]
    ) -> None:
        self._other, self._made = other, made
        self.known = known
        self._places = {id(value): place for place, value in enumerate(known)}

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is float or kind is str:
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else ["int", hex(value)]
        if kind in _MUTABLE:
            if id(value) in self._places:
                return ["known", self._places[id(value)]]
            self._places[id(value)] = len(self.known)
            self.known.append(value)
        if _CONTAINERS.get(kind.__name__) is kind:
            content = self.content(value)
            return [kind.__name__, content, *([self.encode(_MADE_WITH[kind](value))] if kind in _MADE_WITH else [])]
        if kind in _STANDARD:
            return [kind.__name__, self.encode(_STANDARD[kind][0](value))]
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        return self._other(value, self)

    def content(self, value: Any) -> list[Any]:
        items = value.items() if isinstance(value, dict) else value
        return [self.encode(item) for item in items]

    def decode(self, told: Any) -> Any:
        if not isinstance(told, list):
            return told
        kind, content = told[0], told[1]
        if kind == "int":
            return int(content, 16)
        if kind == "known":
            return self.known[content]
        if kind == "type":
            return TYPES[content]
        if kind in _BY_NAME:
            return _STANDARD[_BY_NAME[kind]][1](self.decode(content))
        if kind not in _CONTAINERS:
            return self._made(told, self)
        if kind in ("tuple", "frozenset"):
            return _CONTAINERS[kind](map(self.decode, content))
        value: Any
        if _CONTAINERS[kind] is collections.deque:
            value = collections.deque(maxlen=self.decode(told[2]))
        elif _CONTAINERS[kind] is collections.defaultdict:
            value = collections.defaultdict(None)
        else:
            value = _CONTAINERS[kind]()
        self._places[id(value)] = len(self.known)
        self.known.append(value)
        self.fill(value, content)
        if isinstance(value, collections.defaultdict):
            value.default_factory = self.decode(told[2])
        return value

    def fill(self, value: Any, content: list[Any]) -> None:
        """Gives a mutable object new content."""
        items = [self.decode(item) for item in content]
        value.clear()
        if isinstance(value, dict):
            dict.update(value, items)
        else:
            (value.update if isinstance(value, set) else value.extend)(items)


class Pipe:
    def __init__(self, reads: BinaryIO, writes: BinaryIO) -> None:
        self._reads, self._writes = reads, writes

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._writes.write(json.dumps(message).encode() + b"\n")
            self._writes.flush()
        except BrokenPipeError:
            raise Ended from None

    def receive(self) -> dict[str, Any]:
        line = self._reads.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise Ended
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):  # the other process may write anything
            raise Ended from None
        if not isinstance(message, dict):
            raise Ended
        return message


def told(error: BaseException) -> str:
    """Returns the class and the message of an error in one line."""
    try:
        says = " ".join(str(error).split())[:300]
    except BaseException:  # an error of somebody's own class can raise even here
        says = ""
    return f"{type(error).__name__}: {says}" if says else type(error).__name__


# --- objects of the other process

_ONE = "len iter next bool str repr abs round int float complex reversed format hash bytes dir aiter anext"
OPERATORS = {f"__{name}__": name for name in _ONE.split()}
OPERATORS |= {"__call__": "call", "__contains__": "operator.contains", "__index__": "operator.index"}
OPERATORS |= {f"__{name}__": f"operator.{name}" for name in ("getitem", "setitem", "delitem", "neg", "pos", "invert")}
OPERATORS |= {f"__{name}__": f"math.{name}" for name in ("floor", "ceil", "trunc")}
COMPARISONS = {f"__{name}__": f"operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_TWO = "add sub mul truediv floordiv mod pow and_ or_ xor matmul lshift rshift"
ARITHMETIC = {f"__{name.rstrip('_')}__": f"operator.{name}" for name in _TWO.split()}
REFLECTED = {f"__r{name[2:]}": what for name, what in ARITHMETIC.items()}
IN_PLACE = {f"__i{name[2:]}": f"operator.i{name.strip('_')}" for name in ARITHMETIC}
ASKED = {*OPERATORS.values(), *COMPARISONS.values(), *ARITHMETIC.values(), *IN_PLACE.values()} - {"call"}
"""What special methods do, as `perform` knows it: the name of a builtin function, or that of a module's."""


def perform(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    if name == "call":
        return arguments[0](*arguments[1:], **named)
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module or "builtins"), function)(*arguments, **named)


# --- what both processes are kept from


@cache
def system_call_filter(machine: str, writes: bool) -> bytes:
    """Returns the program's filter of system calls (seccomp, in BPF): what it does not name fails with EPERM. It is
    empty for a processor whose calls are not listed here.

    Args:
        machine: Name of the processor, as `platform.machine()` tells it.
        writes: Whether files may be opened for writing, and removed; Landlock decides which.
    """
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return b""
    audit, column = _MACHINES[machine]
    allow, deny, missing = 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, mask, end = 0x20, 0x15, 0x54, 0x06
    steps = [step(load, 4), step(equal, audit, 1), step(end, deny), step(load, 0)]
    steps += [step(equal, 435, 0, 1), step(end, missing)]  # clone3: the C library then takes clone
    for call in (_ALLOWED + (_ALLOWED_IN_ITS_DIRECTORY if writes else "")).split(","):
        number = call.split()[column]
        if number != "-":
            steps += [step(equal, int(number), 0, 1), step(end, allow)]
    for call, conditions in (_ALLOWED_IF | (_MAKES_DIRECTORIES if writes else _READS)).items():
        number = call.split()[column]
        if number == "-":
            continue
        inner = []
        for index, bits, values in conditions:
            inner += [step(load, 16 + 8 * index), step(mask, bits)]
            inner += [step(equal, value, len(values) - tried) for tried, value in enumerate(values)]
            inner.append(step(end, deny))
        inner.append(step(end, allow))
        steps += [step(equal, int(number), 0, len(inner)), *inner]
    return b"".join([*steps, step(end, deny)])


def seal(request: dict[str, Any]) -> None:
    """Takes from this process, for good, what neither a program nor its tests need."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    _cut_network()
    _limit(request)
    _seal(os.getcwd(), request)
    sys.addaudithook(_forbid)


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
        resource.RLIMIT_CORE: 0,
    }
    with open("/proc/loadavg", "rb") as file:  # the last but one word ends in the machine's number of tasks
        limits[resource.RLIMIT_NPROC] = int(file.read().split()[-2].partition(b"/")[2]) + MOST_THREADS
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is already in force
            resource.setrlimit(kind, (most, most))


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
        return  # asyncio wakes itself through a pair of these; `connect`, `bind` and `sendto` are refused
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not allowed here")


def _seal(directory: str, request: dict[str, Any]) -> None:
    """Takes from this process, for good, what a program does not need: rights of root, files, most system calls."""
    library = ctypes.CDLL(None)
    library.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    library.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    writes = _restrict_files(library, directory)
    library.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    code = bytes.fromhex(request["filters"][writes])
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if not code or library.prctl(22, 2, head, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))  # neither processes nor threads, but for root


def _restrict_files(library: ctypes.CDLL, directory: str) -> bool:
    """Lets this process read Python's files and write in the directory, and returns whether Landlock does so fully."""
    version = library.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = 0x1FFF | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
    of_file, read = 0b0110 | (rights & 0x4000), 0b1100
    ruleset = library.syscall(444, struct.pack("Q", rights), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    home = os.path.dirname(os.__file__)
    readable = (home, f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
    granted = dict.fromkeys((*readable, "/etc/localtime", "/dev/urandom"), read)
    granted |= {os.devnull: of_file, directory: rights & ~0b1010001000001}  # no programs, devices or sockets
    for path, allowed in granted.items():
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed &= rights if os.path.isdir(path) else of_file
            library.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    restricted = bool(library.syscall(446, ruleset, 0) == 0)
    os.close(ruleset)
    return restricted and int(version) >= 3  # before, a file could be emptied by opening it
