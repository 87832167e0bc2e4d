"""The process that runs the tests of a program for `quietstar.tasks.code`, which starts this file.

The program is in a process of its own (`code_runner.py`); this one alone has the tests, what they expect, and their
verdict. Its requests, and the objects of the program, are what it knows of the other.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    from quietstar.tasks import code_process
else:  # by its file, because this process does not see the package
    _spec = importlib.util.spec_from_file_location("code_process", Path(__file__).with_name("code_process.py"))
    code_process = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(code_process)


# --- objects of the program, as the tests see them

_tests: TestsProcess
_AT_ONCE = 10_000  # how many items of an iterator are sent together
_SIGNS = {"__neg__", "__pos__", "__invert__"}
_MEASURES = {"__abs__", "__round__", "__int__", "__float__", "__complex__", "__index__", "__bool__", "__len__"}


class _Class(type):
    """A class of the program. Its methods ask the program, so that objects of it can be used as those of any class."""

    _remote_place: int

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **named: Any) -> _Class:
        """Makes a class of the tests that is derived from one of the program: there too, with the tests' methods."""
        names = (key for key in space if key in ("__init__", *_METHODS) or not key.startswith("__"))
        sent = {key: space[key] for key in names if _tests.can_give(space[key])}
        place = _tests.ask("derive", name, bases, sent)
        made = super().__new__(cls, name, bases, space | {"_remote_place": place, "_remote_names": None}, **named)
        _tests.classes[place] = made
        return made

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return _tests.ask("call", cls, *arguments, **named)

    def __getattribute__(cls, name: str) -> Any:
        if name in ("__doc__", "__annotations__") and type.__getattribute__(cls, "_remote_names") is not None:
            return _tests.ask("getattr", cls, name)
        return super().__getattribute__(name)

    def __getattr__(cls, name: str) -> Any:
        return _signature(cls) if name == "__signature__" else _tests.ask("getattr", cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        _tests.ask("setattr", cls, name, value)

    def __instancecheck__(cls, value: Any) -> bool:
        return super().__instancecheck__(value) or (
            _place(value) is not None and _tests.ask("isinstance", value, cls) is True
        )

    def __bool__(cls) -> bool:
        return True

    def __iter__(cls) -> Iterator[Any]:
        return cast(Iterator[Any], _tests.ask("iter", cls))

    def __len__(cls) -> int:
        return int(_tests.ask("len", cls))

    def __getitem__(cls, key: Any) -> Any:
        return _tests.ask("operator.getitem", cls, key)

    def __contains__(cls, item: Any) -> bool:
        return _contains(cls, item)


class _Inherited:
    """An attribute of a class of the program, for `super` and for the class itself."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner

    def __get__(self, value: Any, owner: type) -> Any:
        if value is None:
            return _tests.ask("getattr", owner, self._name)
        return _tests.ask("of class", self._owner, self._name, value)


def _own(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], object.__getattribute__(value, "__dict__"))


def _place(value: Any) -> int | None:
    """Returns the number of an object of the program; None for any other."""
    kind = type(value)
    if issubclass(kind, _Class):
        return int(type.__getattribute__(value, "_remote_place"))
    return _own(value).get("_remote_place") if issubclass(type(kind), _Class) else None


def _native(kind: type) -> type:
    """Returns the class of this process that a class of the program is derived from."""
    lines: tuple[type, ...] = type.__getattribute__(kind, "__mro__")
    return next(one for one in lines if not issubclass(type(one), _Class))


def _standard(kind: type) -> type | None:
    """Returns the plain or standard type, such as list or function, that a class of the program is derived from."""
    names = (vars(one).get("_remote_standard") for one in type.__getattribute__(kind, "__mro__"))
    return next((code_process.TYPES[name] for name in names if name), None)


def _attribute(self: Any, name: str) -> Any:
    own = _own(self)
    if name in own:
        return own[name]
    if name == "__class__":
        return _standard(type(self)) or type(self)
    if name == "__signature__":
        return _signature(self)
    if name == "__deepcopy__":
        return object.__getattribute__(self, name)
    for kind in type.__getattribute__(type(self), "__mro__"):
        names = vars(kind).get("_remote_names")
        if names is not None and name in names:
            break
        if names is None and kind is not object and name in vars(kind):
            return object.__getattribute__(self, name)
    return _tests.ask("getattr", self, name)


def _signature(value: Any) -> Any:
    try:
        return _tests.ask("inspect.signature", value)
    except (TypeError, ValueError):
        raise AttributeError("__signature__") from None


def _set_attribute(self: Any, name: str, *value: Any) -> None:
    if name.startswith("__") and issubclass(type(self), BaseException):
        return object.__setattr__(self, name, *value)
    _own(self).pop(name, None)
    _tests.ask("setattr" if value else "delattr", self, name, *value)


def _operator(name: str, what: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        result = _tests.ask(what, self, *arguments, **named)
        if "_remote_mixed" in _own(self) and name in _SIGNS | _MEASURES:
            if _place(result) is None:
                raise TypeError("what a program makes of its object and a plain value has no size in tests")
            _own(result)["_remote_mixed"] = True
        return result

    return method


def _binary(name: str, what: str) -> Callable[[Any, Any], Any]:
    """Makes the method of an operator. Of an object of the program and a plain value, the plain value in the object
    counts; where there is none, the program may make another object of them, but no plain value.
    """
    reflected = name in code_process.REFLECTED

    def method(self: Any, other: Any) -> Any:
        both = (other, self) if reflected else (self, other)
        if _place(other) is not None:
            return _tests.ask(what, *both)
        native = _native(type(self))
        if native in code_process.NATIVE:
            return getattr(native, name, lambda *_: NotImplemented)(self, other)
        if _is_plain(type(self)) and name not in code_process.IN_PLACE:
            plain = _tests.ask("plain", self)
            return code_process.perform(what, (other, plain) if reflected else (plain, other), {})
        if name in code_process.COMPARISONS:
            return NotImplemented
        result = _tests.ask(what, *both)
        if _place(result) is None:
            return NotImplemented
        if name not in code_process.IN_PLACE or isinstance(other, int | float | complex):
            _own(result)["_remote_mixed"] = True
        return result

    return method


def _contains(self: Any, item: Any) -> bool:
    """Returns what the program says of an object of its own, and of a class that the tests name; else compares here."""
    kind = self if isinstance(self, _Class) else type(self)
    if _place(item) is not None or not _tests.named.isdisjoint(type.__getattribute__(kind, "__mro__")):
        return _tests.ask("operator.contains", self, item) is True
    return any(one is item or one == item for one in (_tests.ask("plain", self) if _is_plain(kind) else self))


def _is_plain(kind: type) -> bool:
    return issubclass(_standard(kind) or _native(kind), tuple(code_process.PLAIN))


def _leave(self: Any, kind: type | None, error: BaseException | None, trace: Any) -> bool:
    """Leaves a context. An error of the tests is raised again whatever the program says: it may be their verdict."""
    try:
        known = None if kind is None else next(one for one in kind.__mro__ if _tests.knows(one))
        _tests.ask("call", _attribute(self, "__exit__"), known, error, None)
    except BaseException:
        if not isinstance(error, AssertionError):
            raise
    return False


def _await(self: Any) -> Generator[Any, Any, Any]:
    yield from ()
    return _tests.ask("await", self)


async def _awaited(value: Any) -> Any:
    return await value if type(value) is types.CoroutineType else _tests.ask("await", value)


async def _leave_later(self: Any, kind: type | None, error: BaseException | None, trace: Any) -> bool:
    await _awaited(_tests.ask("call", _attribute(self, "__aexit__"), None, None, None))
    return False


_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _operator(name, what) for name, what in code_process.OPERATORS.items()},
    **{
        name: _binary(name, what)
        for table in ("COMPARISONS", "ARITHMETIC", "REFLECTED", "IN_PLACE")
        for name, what in getattr(code_process, table).items()
    },
    "__contains__": _contains,
    "__enter__": lambda self: _tests.ask("call", _attribute(self, "__enter__")),
    "__exit__": _leave,
    "__await__": _await,
    "__anext__": lambda self: _awaited(_tests.ask("anext", self)),
    "__aenter__": lambda self: _awaited(_tests.ask("call", _attribute(self, "__aenter__"))),
    "__aexit__": _leave_later,
}
_EVERY = {
    "__getattribute__": _attribute,
    "__setattr__": _set_attribute,
    "__delattr__": _set_attribute,
    "__copy__": lambda self: _tests.ask("copy.copy", self),
    "__deepcopy__": lambda self, memo: _tests.ask("copy.deepcopy", self),
}


class TestsProcess:
    """Runs the tests on a program in another process."""

    def __init__(self) -> None:
        self._request: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
        to, back = self._request["pipe"]
        writes, reads = os.fdopen(to, "wb"), os.fdopen(back, "rb")
        self._pipe = code_process.Pipe(reads, writes)
        self._verdict = os.dup(1)
        self._given: list[Any] = []  # what the program has of the tests: it may call all, and ask of
        self._open: set[int] = set()  # these for more
        self._objects: dict[int, Any] = {}
        self.classes: dict[int, type] = {}
        self.named: set[type] = set()
        self._stops: list[BaseException] = []

    def run(self) -> NoReturn:
        global _tests
        _tests = self
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: others of this user cannot read its memory
        code_process.seal(self._request)
        try:
            self._pipe.send({name: self._request[name] for name in ("code", "timeout", "memory", "filters")})
            loaded = self._pipe.receive()
            if "names" not in loaded:
                self._end({"failure": str(loaded.get("failure"))[:300]})
            self._execute(loaded["names"])
            for error in self._stops:  # one that ended a loop in silence is no error that the tests expected
                if not _passed_through(error):
                    raise RuntimeError(f"the program raised {type(error).__name__}")
            self._end({"passed": True})
        except code_process.Ended:
            self._end({"ended": True})
        except BaseException as error:
            self._end({"failure": code_process.told(error)})

    def _end(self, outcome: dict[str, Any]) -> NoReturn:
        os.write(self._verdict, json.dumps(outcome).encode())
        os._exit(0)

    def _execute(self, told: dict[str, Any]) -> None:
        codec = self._codec()
        values = {name: codec.decode(value) for name, value in told.items()}
        module = sys.modules["solution"] = types.ModuleType("solution")
        space = vars(module)
        for name in filter(values.__contains__, self._request["names"]):
            space[name] = values[name]
            if isinstance(values[name], _Class) and name[:1].isupper():
                self.named.add(values[name])
        for name in filter(values.__contains__, self._request["modules"]):
            space[name] = importlib.import_module(name)
        exec(compile(self._request["tests"], "tests.py", "exec", dont_inherit=True), space)

    def ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Lets the program do something, and returns or raises what comes of it.

        The tests are over where the program is, or answers with anything but a value: the error would not be one that
        it raised, and a test that expects an error must not take it for that.
        """
        codec = self._codec()
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
            if "raised" in reply and not issubclass(type(value), BaseException):
                raise ValueError("not an error")
        except code_process.Ended:
            self._end({"ended": True})
        except BaseException as error:
            self._end({"failure": f"the program's reply cannot be read: {code_process.told(error)}"})
        if "raised" not in reply:
            return value
        if isinstance(value, StopIteration | StopAsyncIteration | GeneratorExit) and name != "next":
            self._stops.append(value)
        raise value

    def _call(self, message: dict[str, Any]) -> None:
        """Does for the program what it asks of something that the tests gave it. No attribute leads from there to what
        they did not give.
        """
        codec = self._codec()
        what, arguments = message["callback"], codec.decode(message["arguments"])
        named = codec.decode(message["named"])
        ids = [id(value) for value in arguments]
        if what in ("getattr", "setattr", "delattr"):
            allowed = ids[0] in self._open and not (arguments[1].startswith("__") and arguments[1].endswith("__"))
        elif what == "call":
            allowed = any(arguments[0] is value for value in self._given)
        else:
            allowed = what in code_process.ASKED and not self._open.isdisjoint(ids)
        try:
            if not allowed:
                raise AttributeError(f"{what} is not allowed here")
            reply = {"value": self._codec().encode(code_process.perform(what, arguments, named)), "raised": False}
        except AssertionError as error:  # it is the verdict, which the program must not catch
            self._end({"failure": code_process.told(error)})
        except Exception as error:
            reply = {"value": self._codec().encode(error), "raised": True}
        self._pipe.send(reply)

    def _codec(self) -> code_process.Codec:
        return code_process.Codec(self._encode, self._decode, [])

    def knows(self, kind: type) -> bool:
        """Returns whether the program has this class too."""
        return _place(kind) is not None or code_process.TYPES.get(kind.__name__) is kind

    def can_give(self, value: Any) -> bool:
        try:
            self._codec().encode(value)
        except TypeError:
            return False
        return True

    def _encode(self, value: Any, codec: code_process.Codec) -> Any:
        place = _place(value)
        if place is not None:
            return ["object", place]
        if isinstance(value, types.BuiltinFunctionType) and value.__module__ in ("builtins", "math", "_operator"):
            return ["named", value.__module__, value.__name__]
        if isinstance(value, BaseException):
            base = next(one for one in type(value).__mro__ if code_process.TYPES.get(one.__name__) is one)
            arguments = value.args if all(map(self.can_give, value.args)) else (code_process.told(value),)
            return ["error", base.__name__, codec.encode(arguments), self._give(value)]
        if isinstance(value, Iterator):
            first = list(itertools.islice(value, _AT_ONCE))
            return ["iterator", codec.encode(first), *([self._foreign(value)] if len(first) == _AT_ONCE else [])]
        if (kind := code_process.plain_type(value)) is not None:
            return codec.encode(code_process.PLAIN[kind](value))
        if type(value).__module__ in ("solution", "unittest.mock") or type(value).__name__ in ("StringIO", "BytesIO"):
            return self._foreign(value)
        if callable(value):
            return ["function", self._give(value)]
        raise TypeError(f"a {type(value).__name__} of the tests cannot be given to a program")

    def _foreign(self, value: Any) -> list[Any]:
        self._open.add(id(value))
        return ["foreign", self._give(value)]

    def _give(self, value: Any) -> int:
        for place, one in enumerate(self._given):
            if one is value:
                return place
        self._given.append(value)
        return len(self._given) - 1

    def _decode(self, told: list[Any], codec: code_process.Codec) -> Any:
        kind = told[0]
        if kind == "foreign":
            return self._given[told[1]]
        if kind == "class":
            return self._class(told)
        if kind == "error":
            return self._error(told, codec)
        if kind == "signature":
            inspect, told_parameters = importlib.import_module("inspect"), codec.decode(told[1])
            return inspect.Signature([inspect.Parameter(name, how, **given) for name, how, given in told_parameters])
        if kind != "object":
            raise ValueError("not a value")
        place, of, data = told[1], self._class(told[2]), codec.decode(told[3])
        if place not in self._objects:
            native: Any = _native(of)
            plain = [] if native is object else [data]
            if not issubclass(type(of), _Class) or not all(type(one) is native for one in plain):
                raise ValueError("not an object")
            made = native.__new__(of, *plain)
            _own(made)["_remote_place"] = place
            self._objects[place] = _awaited(made) if _standard(of) is types.CoroutineType else made
        return self._objects[place]

    def _error(self, told: list[Any], codec: code_process.Codec) -> BaseException:
        _, of, arguments, place, state = told
        made, given, attributes = self._class(of), codec.decode(arguments), codec.decode(state)
        if place not in self._objects:
            native: Any = _native(made)
            if not issubclass(native, BaseException):
                raise ValueError("not an error")
            error = native.__new__(made, *given)
            native.__init__(error, *given)
            error.__cause__ = attributes.pop("__cause__", None)
            _own(error).update(attributes)
            if issubclass(type(made), _Class):
                _own(error)["_remote_place"] = place
            self._objects[place] = error
        return cast(BaseException, self._objects[place])

    def _class(self, told: list[Any]) -> type:
        """Returns the class that the program has described. Of the standard library's own, only the errors of modules
        that are loaded here already are themselves.
        """
        if told[0] == "type":
            native = code_process.TYPES[told[1]]
            if native is not object and native not in code_process.NATIVE and not issubclass(native, BaseException):
                raise ValueError("not a class to derive from")
            return native
        place = told[1]
        if place not in self.classes:
            self.classes[place] = self._described(*told[1:])
        return self.classes[place]

    def _described(
        self, place: int, module: str, name: str, bases: list[Any], names: list[str], standard: bool
    ) -> type:
        derived = dict.fromkeys(map(self._class, bases))
        found = vars(sys.modules.get(module, object)).get(name)
        if isinstance(found, type) and issubclass(found, BaseException):
            return found
        derived.pop(object, None)
        space: dict[str, Any] = dict(_EVERY)
        mirrored = [f"__r{one[2:]}" for one in names if standard and one in code_process.ARITHMETIC]  # as of a list
        for one in (*names, *mirrored):
            if one in _METHODS:
                space[one] = _METHODS[one]
            elif one == "__init__" or not one.startswith(("__", "_remote_")):
                space[one] = _Inherited(one)
        kinds = tuple(derived) or (object,)
        native = next(_native(kind) for kind in kinds)
        if native in code_process.NATIVE and native is not object:
            space["__hash__"] = native.__hash__
        elif "__eq__" in space:
            space.setdefault("__hash__", _METHODS["__hash__"])
        space |= {"__module__": module, "_remote_place": place, "_remote_names": frozenset(names)}
        space["_remote_standard"] = name if standard else None
        return type.__new__(_Class, name, kinds, space)


def _passed_through(error: BaseException) -> bool:
    """Returns whether an error was seen by code that is not this file's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace is not None


if __name__ == "__main__":
    TestsProcess().run()
