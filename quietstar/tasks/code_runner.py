"""The process that runs a program for `quietstar.tasks.code`. It is started by its file name.

The program's tests are in another process (`code_tests.py`), with which this one shares two pipes. The
tests' process sends the program's source, then calls; this one answers with plain values, which are all that the tests
ever see: what is no plain value is a `_Remote` there. Lines of JSON carry them, so no message can run code.
"""

from __future__ import annotations

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
import resource
import signal
import struct
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

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
    type({}.keys()): (list, lambda x: dict.fromkeys(x).keys()),
    type({}.items()): (list, lambda x: dict(x).items()),
}
_BY_NAME = {kind.__name__: kind for kind in _STANDARD}
_MUTABLE = (list, dict, set, bytearray, collections.deque, collections.Counter, collections.OrderedDict)
_CONTAINERS: dict[str, type] = {kind.__name__: kind for kind in (*_MUTABLE, tuple, frozenset)}
PLAIN = (bool, int, float, str, complex, bytes, tuple, frozenset, *_MUTABLE[:4])
TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
TYPES |= {"NoneType": type(None), "function": types.FunctionType, "generator": types.GeneratorType}
MODULES = {"bisect", "calendar", "cmath", "collections", "datetime", "decimal", "fractions", "functools", "heapq"}
MODULES |= {"itertools", "json", "math", "operator", "random", "re", "statistics", "string"}
"""Modules that the tests get as their own, because they do no more than compute."""


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
        value = _CONTAINERS[kind]()
        self._places[id(value)] = len(self.known)
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


# --- the process of the program


class _Program:
    """The program and its objects that the tests have got."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._lock = threading.RLock()
        self._space: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}

    def load(self, code: str) -> dict[str, Any]:
        exec(compile(code, "solution.py", "exec"), self._space)
        codec = self._codec([])
        return {name: codec.encode(value) for name, value in self._space.items() if not name.startswith("__")}

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
            reply = {"raised": self._raised(RuntimeError(told(error)), self._codec([])), "changed": []}
        self._pipe.send(reply)

    def _do(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "call":
            return arguments[0](*arguments[1:], **named)
        if name == "data":
            return next(kind for kind in PLAIN if isinstance(arguments[0], kind))(arguments[0])
        if name.startswith("operator."):
            return getattr(operator, name.removeprefix("operator."))(*arguments)
        return getattr(builtins, name)(*arguments)

    def _codec(self, known: list[Any]) -> Codec:
        return Codec(self._encode, self._decode, known)

    def _encode(self, value: Any, codec: Codec) -> Any:
        if isinstance(value, types.ModuleType) and value.__name__ in MODULES:
            return ["module", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self._error_class(value)
        if isinstance(value, BaseException):
            return self._raised(value, codec)
        data = next((kind.__name__ for kind in PLAIN if isinstance(value, kind)), None)
        return ["object", self._place(value), data]

    def _decode(self, told: list[Any], codec: Codec) -> Any:
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
                    raise TYPES.get(reply["raised"], RuntimeError)(reply["says"])
                return self._codec([]).decode(reply["value"])

        return call

    def _raised(self, error: BaseException, codec: Codec) -> Any:
        try:
            arguments = codec.encode(tuple(error.args))
        except BaseException:
            arguments = ["tuple", [told(error)]]
        return ["error", self._error_class(type(error)), arguments, self._place(error)]

    def _error_class(self, kind: type) -> Any:
        own: list[list[Any]] = []
        for base in kind.__mro__:
            if TYPES.get(base.__name__) is base:
                return ["class", own, base.__name__]
            own.append([self._place(base), base.__name__])
        raise TypeError(kind)

    def _place(self, value: Any) -> int:
        if id(value) not in self._places:
            self._places[id(value)] = len(self._objects)
            self._objects.append(value)  # it is kept, so that its id stays its own
        return self._places[id(value)]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two) == 2:  # an item of a dict
        return one[0] is two[0] and one[1] is two[1]
    return one is two


def main() -> NoReturn:
    """Runs a program and answers the calls of its tests, until they end."""
    reads, writes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    pipe = Pipe(reads, writes)
    request = pipe.receive()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    _cut_network()
    limit(request)
    _seal(os.getcwd(), request)
    sys.addaudithook(_forbid)
    program = _Program(pipe)
    try:
        names = program.load(request["code"])
    except BaseException as error:  # SystemExit is an ordinary way to fail
        pipe.send({"failure": told(error)})
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


def limit(request: dict[str, Any]) -> None:
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
    restricted = bool(library.syscall(446, ruleset, 0) == 0)
    os.close(ruleset)
    return restricted and int(version) >= 3  # before, a file could be emptied by opening it


if __name__ == "__main__":
    main()
