"""The two processes of `quietstar.tasks.code`: one runs a program, the other its tests. They are started by file name.

They share two pipes. The tests' process sends the program's source, then calls; the program's process answers with
plain values, which are all that the tests ever see: what is not a plain value is a `_Remote` there. Lines of JSON carry
them, so no message can run code.
"""

from __future__ import annotations

import ast
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
import platform
import resource
import signal
import struct
import symtable
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

MOST_BYTES = 2**26
"""Longest message that a process reads."""

_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "pty.spawn")
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
epoll_wait 232 -, epoll_ctl 233 21, newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72,
ppoll 271 73, set_robust_list 273 99, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, getcpu 309 168,
getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293, faccessat2 439 439"""
_ALLOWED_IN_ITS_DIRECTORY = "rename 82 -, mkdir 83 -, rmdir 84 -, unlink 87 -, mkdirat 258 34, unlinkat 263 35, "
_ALLOWED_IN_ITS_DIRECTORY += "renameat 264 38, renameat2 316 276"
_ANY = 0xFFFFFFFF
_ALLOWED_IF = {  # the argument with this index, under this mask, is one of these values
    "ioctl 16 29": (1, _ANY, (0x5401, 0x5451, 0x5450)),  # TCGETS, FIOCLEX, FIONCLEX
    "fcntl 72 25": (1, _ANY, (0, 1, 2, 3, 4, 1030, 1032)),  # all but locks, leases and signals to other processes
    "clone 56 220": (0, 0x10000, (0x10000,)),  # CLONE_THREAD
    "prlimit64 302 261": (0, _ANY, (0,)),  # its own limits, which it can't raise
}
_READS = {"openat 257 56": (2, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC, (0,))}
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH_*, column of the tables


def main() -> None:
    """Does the part that the command line names: `program` or `tests`."""
    if sys.argv[1] == "tests":
        _Tests().run()
    _run_program()


# --- values as data


class _Ended(BaseException):
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
    type({}.keys()): (list, lambda x: dict.fromkeys(x).keys()),
    type({}.items()): (list, lambda x: dict(x).items()),
}
_BY_NAME = {kind.__name__: kind for kind in _STANDARD}
_MUTABLE = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.OrderedDict)
_CONTAINERS: dict[str, type] = {kind.__name__: kind for kind in (*_MUTABLE, tuple, frozenset)}
_PLAIN = (bool, int, float, str, complex, bytes, tuple, frozenset, *_MUTABLE[:4])
_TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
_TYPES |= {"NoneType": type(None), "function": types.FunctionType, "generator": types.GeneratorType}


class _Codec:
    """Turns values into JSON and back. Of an object that occurs twice in a message, the second is a reference.

    Args:
        other: Encodes what is no plain value.
        made: Decodes what `other` of the other process encoded.
        known: Mutable objects that both processes have, in the same order.
    """

    def __init__(
        self, other: Callable[[Any, _Codec], Any], made: Callable[[list[Any], _Codec], Any], known: list[Any]
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
        if kind is collections.defaultdict:
            value, kind = dict(value), dict
        if kind in _MUTABLE:
            if id(value) in self._places:
                return ["known", self._places[id(value)]]
            self._places[id(value)] = len(self.known)
            self.known.append(value)
        if _CONTAINERS.get(kind.__name__) is kind:
            return [kind.__name__, self.content(value)]
        if kind in _STANDARD:
            return [kind.__name__, self.encode(_STANDARD[kind][0](value))]
        if isinstance(value, type) and _TYPES.get(value.__name__) is value:
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
            return _TYPES[content]
        if kind in _BY_NAME:
            return _BY_NAME[kind] and _STANDARD[_BY_NAME[kind]][1](self.decode(content))
        if kind not in _CONTAINERS:
            return self._made(told, self)
        if kind in ("tuple", "frozenset"):
            return _CONTAINERS[kind](map(self.decode, content))
        value = _CONTAINERS[kind]()
        self.known.append(value)
        self.fill(value, content)
        return value

    def fill(self, value: Any, content: list[Any]) -> None:
        """Gives a mutable object new content."""
        items = [self.decode(item) for item in content]
        value.clear()
        if isinstance(value, dict):
            dict.update(value, items)
        else:
            (value.update if isinstance(value, set) else value.extend)(items)


class _Pipe:
    def __init__(self, reads: BinaryIO, writes: BinaryIO) -> None:
        self._reads, self._writes = reads, writes

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._writes.write(json.dumps(message).encode() + b"\n")
            self._writes.flush()
        except BrokenPipeError:
            raise _Ended from None

    def receive(self) -> dict[str, Any]:
        line = self._reads.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise _Ended
        message = json.loads(line)
        if not isinstance(message, dict):
            raise _Ended
        return message


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # an error of the program's own class can raise even here
        return type(error).__name__


# --- the process of the program


class _Program:
    """The program and its objects that the tests have got."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._lock = threading.RLock()
        self._space: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}

    def load(self, code: str) -> dict[str, Any]:
        exec(compile(code, "solution.py", "exec"), self._space)
        codec = self._codec([])
        return {name: codec.encode(_Named(value)) for name, value in self._space.items() if not name.startswith("__")}

    def answer(self, message: dict[str, Any]) -> None:
        known: list[Any] = []
        codec = self._codec(known)
        reply: dict[str, Any] = {}
        try:
            arguments, named = codec.decode(message["arguments"]), codec.decode(message["named"])
            before = [list(value.items()) if isinstance(value, dict) else list(value) for value in known]
            sent = list(known)
            try:
                value = self._do(message["do"], arguments, named)
            except BaseException as error:
                reply["raised"] = self._raised(error, codec)
            else:
                reply["value"] = codec.encode(value)
            now = [list(value.items()) if isinstance(value, dict) else list(value) for value in sent]
            reply["changed"] = [
                [place, codec.content(value)]
                for place, value in enumerate(sent)
                if len(before[place]) != len(now[place])
                or any(not _same(one, two) for one, two in zip(before[place], now[place], strict=True))
            ]
        except BaseException as error:  # a value that cannot be told
            reply = {"raised": self._raised(RuntimeError(_told(error)), self._codec([])), "changed": []}
        self._pipe.send(reply)

    def _do(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "call":
            return arguments[0](*arguments[1:], **named)
        if name == "data":
            return next(kind for kind in _PLAIN if isinstance(arguments[0], kind))(arguments[0])
        if name.startswith("operator."):
            return getattr(operator, name.removeprefix("operator."))(*arguments)
        return getattr(builtins, name)(*arguments)

    def _codec(self, known: list[Any]) -> _Codec:
        return _Codec(self._encode, self._decode, known)

    def _encode(self, value: Any, codec: _Codec) -> Any:
        if isinstance(value, _Named):
            value = value.value
            if isinstance(value, types.ModuleType):
                return ["module", value.__name__]
            return codec.encode(value)
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._error_class(value)
        if isinstance(value, BaseException):
            return self._raised(value, codec)
        data = next((kind.__name__ for kind in _PLAIN if isinstance(value, kind)), None)
        return ["object", self._place(value), data, isinstance(value, type)]

    def _decode(self, told: list[Any], codec: _Codec) -> Any:
        kind, content = told[0], told[1]
        if kind == "object":
            return self._objects[content]
        if kind == "iterator":
            return iter(codec.decode(content))
        if kind == "named":
            return getattr(importlib.import_module(content), told[2])
        if kind != "function":
            raise ValueError(kind)

        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                inner = self._codec([])
                told = {"arguments": inner.encode(arguments), "named": inner.encode(named)}
                self._pipe.send({"callback": content, **told})
                while True:
                    reply = self._pipe.receive()
                    if "do" not in reply:
                        break
                    self.answer(reply)
                if "raised" in reply:
                    raise _TYPES.get(reply["raised"], RuntimeError)(reply["says"])
                return self._codec([]).decode(reply["value"])

        return call

    def _raised(self, error: BaseException, codec: _Codec) -> Any:
        try:
            arguments = codec.encode(tuple(error.args))
        except BaseException:
            arguments = ["tuple", [_told(error)]]
        return ["error", self._error_class(type(error)), arguments, self._place(error)]

    def _error_class(self, kind: type) -> Any:
        own = []
        for base in kind.__mro__:
            if _TYPES.get(base.__name__) is base:
                return ["class", own, base.__name__]
            own.append([self._place(base), base.__name__])
        raise TypeError(kind)

    def _place(self, value: Any) -> int:
        if id(value) not in self._places:
            self._places[id(value)] = len(self._objects)
            self._objects.append(value)  # it is kept, so that its id stays its own
        return self._places[id(value)]


class _Named:
    def __init__(self, value: Any) -> None:
        self.value = value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two) == 2:  # an item of a dict
        return one[0] is two[0] and one[1] is two[1]
    return one is two


def _run_program() -> NoReturn:
    reads, writes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    pipe = _Pipe(reads, writes)
    request = pipe.receive()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    _cut_network()
    _limit(request)
    _seal(os.getcwd())
    sys.addaudithook(_forbid)
    program = _Program(pipe)
    try:
        names = program.load(request["code"])
    except BaseException as error:  # SystemExit is an ordinary way to fail
        pipe.send({"failure": _told(error)})
        os._exit(0)
    pipe.send({"names": names})
    while True:
        try:
            program.answer(pipe.receive())
        except BaseException:
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


def _seal(directory: str) -> None:
    """Takes from this process, for good, what a program does not need: rights of root, files, most system calls."""
    library = ctypes.CDLL(None)
    library.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    library.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    writes = _restrict_files(library, directory)
    library.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if platform.machine() in _MACHINES and sys.maxsize > 2**32:
        code = filter_of(platform.machine(), writes)
        buffer = ctypes.create_string_buffer(code, len(code))
        head = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        library.prctl(22, 2, head, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _restrict_files(library: ctypes.CDLL, directory: str) -> bool:
    """Lets this process read Python's files and write in the directory, and returns whether Landlock does so fully."""
    version = library.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = 0x1FFF | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
    of_file, read = 0b1110 | (rights & 0x4000), 0b1100
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
    restricted = library.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return restricted and version >= 3  # before, a file could be emptied by opening it


def filter_of(machine: str, writes: bool) -> bytes:
    """Returns the system call filter (seccomp, in BPF): what it does not name fails with EPERM.

    Args:
        machine: Name of the processor, as `platform.machine()` tells it.
        writes: Whether files may be opened for writing, and removed; Landlock decides which.
    """
    audit, column = _MACHINES[machine]
    allow, deny, missing = 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, mask, end = 0x20, 0x15, 0x54, 0x06
    steps = [step(load, 4), step(equal, audit, 1), step(end, deny), step(load, 0)]
    steps += [step(equal, 435, 0, 1), step(end, missing)]  # clone3: the C library then takes clone
    simple = _ALLOWED + (", openat 257 56, " + _ALLOWED_IN_ITS_DIRECTORY if writes else "")
    for call in simple.split(","):
        number = call.split()[column]
        if number != "-":
            steps += [step(equal, int(number), 0, 1), step(end, allow)]
    for call, (index, bits, values) in (_ALLOWED_IF | ({} if writes else _READS)).items():
        inner = [step(load, 16 + 8 * index), step(mask, bits)]
        for value in values:
            inner += [step(equal, value, 0, 1), step(end, allow)]
        inner.append(step(end, deny))
        steps += [step(equal, int(call.split()[column]), 0, len(inner)), *inner]
    return b"".join([*steps, step(end, deny)])


# --- the process of the tests


_tests: _Tests


class _Remote:
    """An object of the program, as the tests see it. Plain values are never shown to its methods for comparison."""

    __slots__ = ("_remote_data", "_remote_is_type", "_remote_place")

    def __init__(self, place: int, data: str | None, is_type: bool) -> None:
        object.__setattr__(self, "_remote_place", place)
        object.__setattr__(self, "_remote_data", data)
        object.__setattr__(self, "_remote_is_type", is_type)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _tests.ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return _tests.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _tests.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        _tests.ask("delattr", self, name)

    def __getitem__(self, key: Any) -> Any:
        return _tests.ask("operator.getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _tests.ask("operator.setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        _tests.ask("operator.delitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        iterator = _tests.ask("iter", self)
        return iter(iterator) if type(iterator) is not _Remote else _items(iterator)

    def __next__(self) -> Any:
        return _tests.ask("next", self)

    def __len__(self) -> int:
        return int(_tests.ask("len", self))

    def __bool__(self) -> bool:
        return _tests.ask("bool", self) is True

    def __repr__(self) -> str:
        return str(_tests.ask("repr", self))

    def __str__(self) -> str:
        return str(_tests.ask("str", self))

    def __hash__(self) -> int:
        return hash(self._remote_place if self._remote_data is None else _tests.ask("data", self))

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is _Remote and _tests.ask("isinstance", value, self) is True


def _items(iterator: _Remote) -> Iterator[Any]:
    while True:
        try:
            value = next(iterator)
        except StopIteration:
            return
        yield value


def _forward(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    work = getattr(operator, name)

    def method(self: _Remote, other: Any) -> Any:
        if type(other) is _Remote and self._remote_data is None:
            return _tests.ask(f"operator.{name}", *((other, self) if reflected else (self, other)))
        if self._remote_data is None:  # a method of the program must not decide on a plain value
            return NotImplemented
        mine = _tests.ask("data", self)
        return work(other, mine) if reflected else work(mine, other)

    return method


for _name in ["eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul", "lshift", "rshift"]:
    _bare = _name.strip("_")
    setattr(_Remote, f"__{_bare}__", _forward(_name, False))
    if _bare not in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_Remote, f"__r{_bare}__", _forward(_name, True))


class _Tests:
    """Runs the tests on a program in another process."""

    def __init__(self) -> None:
        self._request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
        writes, reads = (
            os.fdopen(number, mode) for number, mode in zip(self._request["pipe"], ("wb", "rb"), strict=True)
        )
        self._pipe = _Pipe(reads, writes)
        self._functions: list[Any] = []
        self._classes: dict[int, type] = {}

    def run(self) -> NoReturn:
        global _tests
        _tests = self
        replies = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: others of this user cannot read its memory
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        _limit(self._request)
        outcome: dict[str, Any]
        try:
            self._pipe.send({name: self._request[name] for name in ("code", "timeout", "memory")})
            loaded = self._pipe.receive()
            if "names" in loaded:
                self._execute(loaded["names"])
                outcome = {"passed": True}
            else:
                outcome = {"failure": str(loaded.get("failure"))[:300]}
        except _Ended:
            outcome = {"ended": True}
        except BaseException as error:
            outcome = {"failure": _told(error)}
        os.write(replies, json.dumps(outcome).encode())
        os._exit(0)

    def _execute(self, told: dict[str, Any]) -> None:
        source = self._request["tests"]
        names, bases = _free_names(source)
        own = set(vars(builtins))
        # a program may have the name of a builtin function only if that is all that is tested
        usable = names if names <= own and len(names) == 1 else names - own
        codec = self._codec([])
        space: dict[str, Any] = {"__name__": "solution"}
        for name in usable:
            if name in bases and name in sys.stdlib_module_names and name in told:
                space[name] = importlib.import_module(name)
            elif name in told:
                space[name] = codec.decode(told[name])
        exec(compile(source, "tests.py", "exec"), space)

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Lets the program do something, and returns or raises what comes of it."""
        codec = self._codec([])
        told = {"arguments": codec.encode(arguments), "named": codec.encode(named)}
        self._pipe.send({"do": name, **told})
        while True:
            reply = self._pipe.receive()
            if "callback" not in reply:
                break
            self._call(reply)
        sent = len(codec.known)
        value = codec.decode(reply["value"] if "value" in reply else reply["raised"])
        for place, content in reply["changed"]:
            if 0 <= place < sent:
                codec.fill(codec.known[place], content)
        if "raised" not in reply:
            return value
        if isinstance(value, StopIteration | StopAsyncIteration | GeneratorExit) and name != "next":
            raise RuntimeError(f"the program raised {type(value).__name__}")  # it would end a loop of the tests
        raise value

    def _call(self, message: dict[str, Any]) -> None:
        codec = self._codec([])
        try:
            function = self._functions[message["callback"]]
            value = function(*codec.decode(message["arguments"]), **codec.decode(message["named"]))
            reply = {"value": self._codec([]).encode(value)}
        except Exception as error:
            reply = {"raised": type(error).__name__, "says": _told(error)}
        self._pipe.send(reply)

    def _codec(self, known: list[Any]) -> _Codec:
        return _Codec(self._encode, self._decode, known)

    def _encode(self, value: Any, codec: _Codec) -> Any:
        if type(value) is _Remote:
            return ["object", value._remote_place]
        place = getattr(value, "_remote_place", None)
        if isinstance(value, type | BaseException) and isinstance(place, int):
            return ["object", place]
        if isinstance(value, types.BuiltinFunctionType) and value.__module__ in ("builtins", "math", "_operator"):
            return ["named", value.__module__, value.__name__]
        if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | type):
            self._functions.append(value)
            return ["function", len(self._functions) - 1]
        if isinstance(value, Iterator):
            return ["iterator", codec.encode(list(value))]
        base = next((kind for kind in _PLAIN if isinstance(value, kind)), None)
        if base is not None:
            return codec.encode(base(value))
        raise TypeError(f"a {type(value).__name__} of the tests cannot be given to a program")

    def _decode(self, told: list[Any], codec: _Codec) -> Any:
        kind = told[0]
        if kind == "object":
            return _Remote(int(told[1]), told[2], told[3] is True)
        if kind == "module":
            if told[1].partition(".")[0] not in sys.stdlib_module_names:
                raise ImportError(told[1])
            return importlib.import_module(told[1])
        if kind == "class":
            return self._error_class(told[1], told[2])
        if kind != "error":
            raise ValueError("not a value")
        made = self._error_class(told[1][1], told[1][2])
        arguments = codec.decode(told[2])
        error = BaseException.__new__(made, *arguments)
        error.args = arguments
        if made.__name__ not in _TYPES:
            error.__dict__["_remote_place"] = told[3]
        return error

    def _error_class(self, own: list[list[Any]], base: str) -> type:
        made = _TYPES[base]
        if not issubclass(made, BaseException):
            raise ValueError("not an exception")
        for place, name in reversed(own):
            if place not in self._classes:
                self._classes[place] = type(str(name), (made,), {"_remote_place": place})
            made = self._classes[place]
        return made


def _free_names(source: str) -> tuple[set[str], set[str]]:
    """Returns the names that tests use and do not define, and those of them of which they only take attributes."""
    tree = ast.parse(source)
    table = symtable.symtable(source, "tests.py", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables, used = [table], set()
    while tables:
        one = tables.pop()
        tables += one.get_children()
        used |= {symbol.get_name() for symbol in one.get_symbols() if symbol.is_global() or one is table}
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    parents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    alone = {node.id for node in loads if id(node) not in parents}
    return used - bound, used - bound - alone


if __name__ == "__main__":
    main()
