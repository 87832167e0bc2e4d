"""The process that runs the tests of a program for `quietstar.tasks.code`. It is started by its file name.

The program is in a process of its own (`code_runner.py`); this one alone has the tests, what they expect, and their
verdict.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import operator
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    from quietstar.tasks import code_runner
else:  # by its file, because this process does not see the package
    _spec = importlib.util.spec_from_file_location("code_runner", Path(__file__).with_name("code_runner.py"))
    code_runner = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(code_runner)


_tests: TestsProcess


class _Remote:
    """An object of the program, as the tests see it. Plain values are never shown to its methods for comparison."""

    __slots__ = ("_remote_data", "_remote_place")
    _remote_data: str | None
    _remote_place: int

    def __init__(self, place: int, data: str | None) -> None:
        object.__setattr__(self, "_remote_place", place)
        object.__setattr__(self, "_remote_data", data)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _tests.ask("call", self, *arguments, **named)

    def __iter__(self) -> Iterator[Any]:
        iterator = _tests.ask("iter", self)
        return iter(iterator) if type(iterator) is not _Remote else _items(iterator)

    def __len__(self) -> int:
        return int(_tests.ask("len", self))

    def __bool__(self) -> bool:
        return _tests.ask("bool", self) is True

    def __hash__(self) -> int:
        return hash(self._remote_place if self._remote_data is None else _tests.ask("data", self))

    def __instancecheck__(self, value: Any) -> bool:
        return type(value) is _Remote and _tests.ask("isinstance", value, self) is True


def _items(iterator: _Remote) -> Iterator[Any]:
    while True:
        try:
            value = next(cast(Iterator[Any], iterator))
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


def _ask(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: _tests.ask(name, self, *arguments)


for _name in (
    "getattr",
    "setattr",
    "delattr",
    "next",
    "repr",
    "str",
    "abs",
    "reversed",
    "int",
    "float",
    "complex",
    "round",
):
    setattr(_Remote, f"__{_name}__", _ask(_name))
for _name in ("getitem", "setitem", "delitem", "neg", "pos", "invert", "index"):
    setattr(_Remote, f"__{_name}__", _ask(f"operator.{_name}"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Remote, f"__{_name}__", _forward(_name, False))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul"):
    setattr(_Remote, f"__{_name.rstrip('_')}__", _forward(_name, False))
    setattr(_Remote, f"__r{_name.rstrip('_')}__", _forward(_name, True))


class TestsProcess:
    """Runs the tests on a program in another process."""

    def __init__(self) -> None:
        self._request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
        to, back = self._request["pipe"]
        writes, reads = os.fdopen(to, "wb"), os.fdopen(back, "rb")
        self._pipe = code_runner.Pipe(reads, writes)
        self._functions: list[Any] = []
        self._classes: dict[int, type] = {}

    def run(self) -> NoReturn:
        global _tests
        _tests = self
        self._verdict = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: others of this user cannot read its memory
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        code_runner.limit(self._request)
        try:
            self._pipe.send({name: self._request[name] for name in ("code", "timeout", "memory", "filters")})
            loaded = self._pipe.receive()
            if "names" in loaded:
                self._execute(loaded["names"])
                self._end({"passed": True})
            self._end({"failure": str(loaded.get("failure"))[:300]})
        except code_runner.Ended:
            self._end({"ended": True})
        except BaseException as error:
            self._end({"failure": code_runner.told(error)})

    def _end(self, outcome: dict[str, Any]) -> NoReturn:
        os.write(self._verdict, json.dumps(outcome).encode())
        os._exit(0)

    def _execute(self, told: dict[str, Any]) -> None:
        source = self._request["tests"]
        codec = self._codec([])
        space: dict[str, Any] = {"__name__": "solution"}
        for name in filter(told.__contains__, self._request["names"]):
            space[name] = codec.decode(told[name])
        for name in filter(told.__contains__, self._request["modules"]):
            space[name] = importlib.import_module(name)
        exec(compile(source, "tests.py", "exec"), space)

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Lets the program do something, and returns or raises what comes of it.

        The tests are over where the program is, or answers with anything but a value: the error would not be one that
        it raised, and a test that expects an error must not take it for that.
        """
        codec = self._codec([])
        told = {"arguments": codec.encode(arguments), "named": codec.encode(named)}
        try:
            self._pipe.send({"do": name, **told})
            while "callback" in (reply := self._pipe.receive()):
                self._call(reply)
            sent = len(codec.known)
            value = codec.decode(reply["value"] if "value" in reply else reply["raised"])
            for place, content in reply["changed"]:
                if 0 <= place < sent:
                    codec.fill(codec.known[place], content)
        except code_runner.Ended:
            self._end({"ended": True})
        except BaseException as error:
            self._end({"failure": f"the program's reply cannot be read: {code_runner.told(error)}"})
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
            reply = {"raised": type(error).__name__, "says": code_runner.told(error)}
        self._pipe.send(reply)

    def _codec(self, known: list[Any]) -> code_runner.Codec:
        return code_runner.Codec(self._encode, self._decode, known)

    def _encode(self, value: Any, codec: code_runner.Codec) -> Any:
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
        base = next((kind for kind in code_runner.PLAIN if isinstance(value, kind)), None)
        if base is not None:
            return codec.encode(base(value))
        raise TypeError(f"a {type(value).__name__} of the tests cannot be given to a program")

    def _decode(self, told: list[Any], codec: code_runner.Codec) -> Any:
        kind = told[0]
        if kind == "object":
            return _Remote(int(told[1]), told[2])
        if kind == "module":
            if told[1] not in code_runner.MODULES:
                raise ImportError(told[1])
            return importlib.import_module(told[1])
        if kind == "class":
            return self._error_class(told[1], told[2])
        if kind != "error":
            raise ValueError("not a value")
        made = self._error_class(told[1][1], told[1][2])
        arguments = codec.decode(told[2])
        error: BaseException = made(*arguments)
        if made.__name__ not in code_runner.TYPES:
            error.__dict__["_remote_place"] = told[3]
        return error

    def _error_class(self, own: list[list[Any]], base: str) -> type:
        made = code_runner.TYPES[base]
        if not issubclass(made, BaseException):
            raise ValueError("not an exception")
        for place, name in reversed(own):
            if place not in self._classes:
                self._classes[place] = type(str(name), (made,), {"_remote_place": place})
            made = self._classes[place]
        return made


if __name__ == "__main__":
    TestsProcess().run()
