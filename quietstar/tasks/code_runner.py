"""The process that runs a program for `quietstar.tasks.code`, which starts this file.

The process of its tests (`code_tests.py`) sends the program's source, then calls; this one answers. What they expect
never comes here.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from quietstar.tasks import code_process
else:  # by its file, because this process does not see the package
    _spec = importlib.util.spec_from_file_location("code_process", Path(__file__).with_name("code_process.py"))
    code_process = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(code_process)


class _Foreign:
    """An object of the tests, as the program sees it."""

    __slots__ = ("_foreign_ask", "_foreign_place")

    def __init__(self, ask: Callable[..., Any], place: int) -> None:
        object.__setattr__(self, "_foreign_ask", ask)
        object.__setattr__(self, "_foreign_place", place)

    def __getattr__(self, name: str) -> Any:
        return self._foreign_ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._foreign_ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._foreign_ask("delattr", self, name)


def _foreign_method(what: str, reflected: bool) -> Callable[..., Any]:
    def method(self: _Foreign, *arguments: Any, **named: Any) -> Any:
        given = (*arguments, self) if reflected else (self, *arguments)
        return self._foreign_ask(what, *given, **named)

    return method


for _table in ("OPERATORS", "COMPARISONS", "ARITHMETIC", "REFLECTED", "IN_PLACE"):
    for _name, _what in getattr(code_process, _table).items():
        setattr(_Foreign, _name, _foreign_method(_what, _table == "REFLECTED"))


# --- the process of the program


class _Program:
    """The program, its objects that the tests have got, and those of the tests that it has got."""

    def __init__(self, pipe: code_process.Pipe) -> None:
        self._pipe = pipe
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._described: set[int] = set()
        self._foreign: dict[int, Any] = {}
        self._lock = threading.RLock()
        self._runner: Any = None
        self._module = sys.modules["solution"] = types.ModuleType("solution")

    def load(self, code: str) -> dict[str, Any]:
        space = vars(self._module)
        given = {*space, "__builtins__", "__annotations__"}
        exec(compile(code, "solution.py", "exec", dont_inherit=True), space)
        codec = self._codec([])
        return {name: codec.encode(value) for name, value in space.items() if name not in given}

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
        except BaseException as error:  # a value that cannot be code_process.told
            self._described.clear()  # what this reply described is not sent
            reply = {"raised": self._raised(RuntimeError(code_process.told(error)), self._codec([])), "changed": []}
        self._pipe.send(reply)

    def _do(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if name == "plain":
            kind = code_process.plain_type(arguments[0])
            assert kind is not None
            return code_process.PLAIN[kind](arguments[0])
        if name == "of class":  # what `super` finds
            kind, attribute, value = arguments
            found = vars(kind)[attribute]
            return found.__get__(value, type(value)) if hasattr(found, "__get__") else found
        if name == "derive":
            title, bases, space = arguments
            made = types.new_class(title, bases, {}, lambda own: own.update(space))
            self._described.add(self._place(made))
            return self._place(made)
        if name == "await":
            asyncio = importlib.import_module("asyncio")
            self._runner = self._runner or asyncio.Runner()
            return self._runner.run(_awaiting(arguments[0]))
        return code_process.perform(name, arguments, named)

    def _codec(self, known: list[Any]) -> code_process.Codec:
        return code_process.Codec(self._encode, self._decode, known)

    def _encode(self, value: Any, codec: code_process.Codec) -> Any:
        if type(value) is _Foreign:
            return ["foreign", value._foreign_place]
        if type(value) is types.FunctionType and "_foreign_place" in vars(value):
            return ["foreign", vars(value)["_foreign_place"]]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, BaseException):
            return self._raised(value, codec)
        inspect = sys.modules.get("inspect")
        if inspect is not None and type(value) is inspect.Signature:
            return ["signature", codec.encode([_parameter(one) for one in value.parameters.values()])]
        kind = next((kind for kind in code_process.NATIVE if issubclass(type(value), kind)), None)
        data = None if kind is None else codec.encode(code_process.PLAIN[kind](value))
        return ["object", self._place(value), self._class(type(value)), data]

    def _decode(self, told: list[Any], codec: code_process.Codec) -> Any:
        kind, content = told[0], told[1]
        if kind == "object":
            return self._objects[content]
        if kind == "iterator":
            return itertools.chain(codec.decode(content), *(codec.decode(one) for one in told[2:]))
        if kind == "named":
            return getattr(importlib.import_module(content), told[2])
        if kind == "error":
            error = code_process.TYPES[content](*codec.decode(told[2]))
            error._foreign_place = told[3]
            return error
        if kind not in ("foreign", "function"):
            raise ValueError(kind)
        if content not in self._foreign:
            self._foreign[content] = self._function(content) if kind == "function" else _Foreign(self._ask, content)
        return self._foreign[content]

    def _function(self, place: int) -> Callable[..., Any]:
        itself = _Foreign(self._ask, place)

        def call(*arguments: Any, **named: Any) -> Any:
            return self._ask("call", itself, *arguments, **named)

        vars(call)["_foreign_place"] = place
        return call

    def _ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Lets the tests do something with an object of theirs."""
        with self._lock:
            inner = self._codec([])
            self._pipe.send({"callback": what, "arguments": inner.encode(arguments), "named": inner.encode(named)})
            while True:
                reply = self._pipe.receive()
                if "do" not in reply:
                    break
                self.answer(reply)
            value = self._codec([]).decode(reply["value"])
        if reply["raised"]:
            raise value
        return value

    def _raised(self, error: BaseException, codec: code_process.Codec) -> Any:
        if "_foreign_place" in vars(error):
            return ["foreign", vars(error)["_foreign_place"]]
        kind = type(error)
        try:
            base: Any = next(base for base in kind.__mro__ if base.__module__ not in ("solution", "__main__"))
            arguments = codec.encode(tuple(base.__reduce__(error)[1]))  # has what `args` lacks: the name of a file
        except BaseException:
            arguments = ["tuple", [code_process.told(error)]]
        try:
            state = {name: value for name, value in vars(error).items() if not name.startswith("_remote_")}
            told_state = codec.encode(state | ({"__cause__": error.__cause__} if error.__cause__ else {}))
        except BaseException:
            told_state = ["dict", []]
        return ["error", self._class(kind), arguments, self._place(error), told_state]

    def _class(self, kind: type) -> Any:
        """Describes a class of the program, and once for all that of a standard object."""
        name = type.__dict__["__name__"].__get__(kind)
        standard = code_process.TYPES.get(name) is kind
        if standard and (kind in code_process.NATIVE or kind is object or issubclass(kind, BaseException)):
            return ["type", name]
        place = self._place(kind)
        if place in self._described:
            return ["class", place]
        self._described.add(place)
        space = type.__dict__["__dict__"].__get__(kind)
        bases = [self._class(base) for base in type.__dict__["__bases__"].__get__(kind)]
        names = [one for one in space if isinstance(one, str)]
        return ["class", place, str(space.get("__module__", "builtins")), name, bases, names, standard]

    def _place(self, value: Any) -> int:
        if id(value) not in self._places:
            self._places[id(value)] = len(self._objects)
            self._objects.append(value)  # it is kept, so that its id stays its own
        return self._places[id(value)]


async def _awaiting(value: Any) -> Any:
    return await value


def _parameter(one: Any) -> tuple[Any, ...]:
    given = {"default": one.default, "annotation": one.annotation}
    return one.name, int(one.kind), {name: value for name, value in given.items() if value is not one.empty}


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple) and len(one) == len(two) == 2:  # an item of a dict
        return one[0] is two[0] and one[1] is two[1]
    return one is two


def main() -> NoReturn:
    """Runs a program and answers the calls of its tests, until they end."""
    pipe = code_process.Pipe(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    request = pipe.receive()
    code_process.seal(request)
    program = _Program(pipe)
    try:
        names = program.load(request["code"])
    except BaseException as error:  # SystemExit is an ordinary way to fail
        pipe.send({"failure": code_process.told(error)})
        os._exit(0)
    pipe.send({"names": names})
    while True:
        try:
            program.answer(pipe.receive())
        except BaseException:
            os._exit(0)  # does not wait for threads or exit handlers of the program


if __name__ == "__main__":
    main()
