r"""Expressions in LaTeX or plain text, read whole or not at all, and compared exactly by sympy.

Read are numbers, letters, `+ - * / ^ !`, `\frac`, `\sqrt`, `\binom`, elementary functions, absolute values, and lists,
tuples, sets and intervals of these. Everything else makes an expression unreadable, and an unreadable expression equals
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from quietstar.tasks.numbers import canonical_number, plain_expression

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[A-Za-z]+|\\[{}])|(?P<word>[A-Za-z]{2,})"
    r"|(?P<sign>\*\*|[-+*/^!()\[\]{}|,=_]|\u00d7|\u00b7|\u22c5|\u00f7|\u221a|\u03c0|\u221e|[A-Za-z\u03b1-\u03c9]))"
)
_RAISED = re.compile(r"[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_LOWERED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-")
_FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "log")},
    **{"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"},
}
"""Functions with their names in sympy."""
_GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega)")
_SPELLED = {
    **{"\\" + name: name for name in (*_FUNCTIONS, "sqrt", "pi", "binom", "infty")},
    **{rf"\{kind}frac": "frac" for kind in ("", "c", "d", "t")},
    **dict.fromkeys((r"\cdot", r"\times", "\u00d7", "\u00b7", "\u22c5"), "*"),
    **dict.fromkeys((r"\div", "\u00f7"), "/"),
    **dict.fromkeys((r"\dbinom", r"\tbinom"), "binom"),
    **{"**": "^", "\u221a": "sqrt", "\u03c0": "pi", "\u221e": "infty", r"\lbrace": r"\{", r"\rbrace": r"\}"},
}
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "|": "|"}
_LONGEST, _MOST_BITS, _LARGEST_FACTORIAL = 1000, 100_000, 2000


class _Unreadable(Exception):
    """An expression with a part that is not understood."""


def same_expression(gold: str, answer: str) -> bool:
    r"""Returns whether an answer equals the gold answer, both in LaTeX or as plain expressions.

    Both have to be read whole: `36\text{ million}`, `101_2` and `x=2\lor x=3` equal nothing but the same text. Values
    are compared exactly and not by their decimals. `x = 3` equals `3` and `3 = x`, but not `y = 3`: a name counts,
    unless the other answer is one expression without any.

    Sympy has no time limit. Call it in a process that can be ended.

    Args:
        gold: Text of the right answer.
        answer: Text of the answer that is judged.
    """
    numbers = [canonical_number(text, units=False, symbols=False) for text in (gold, answer)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    try:
        one, other = _read(gold), _read(answer)
        if _is_equation(one) != _is_equation(other):
            one, other = _unnamed(one), _unnamed(other)
        return _equal(one, other)
    except (_Unreadable, RecursionError, OverflowError, MemoryError):
        return False


def _is_equation(value: Any) -> bool:
    return isinstance(value, tuple) and value[0] == "="


def _unnamed(value: Any) -> Any:
    """Returns the other side of an equation with a symbol as one of its sides, and anything else as it is."""
    if _is_equation(value):
        for name, other in (value[1:], value[:0:-1]):
            if name.is_Symbol and not other.has(name):
                return other
    return value


def _equal(one: Any, other: Any) -> bool:
    sympy = import_module("sympy")
    if isinstance(one, tuple) or isinstance(other, tuple):
        if not (isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0] and len(one) == len(other)):
            return False
        if one[0] not in ("", "{}", "="):
            return all(map(_equal, one[1:], other[1:]))
        left = list(other[1:])  # the order of several answers, a set's elements and an equation's sides has no meaning
        for item in one[1:]:
            place = next((place for place, candidate in enumerate(left) if _equal(item, candidate)), None)
            if place is None:
                return False
            del left[place]
        return True
    difference = one - other
    return bool(
        one == other or difference.is_zero or (not _is_far_from_zero(difference) and sympy.simplify(difference) == 0)
    )


def _is_far_from_zero(difference: Any) -> bool:
    """Returns whether a difference has a value at some point: simplifying it could take `29^{10^9}` apart."""
    sympy = import_module("sympy")
    symbols = sorted(difference.free_symbols, key=str)
    point = {symbol: sympy.Rational(7 * place + 9, 8) for place, symbol in enumerate(symbols)}
    value = difference.subs(point).evalf(20)
    return bool(value.is_number and value.is_finite and abs(value) > 1e-9)


def _read(text: str) -> Any:
    """Returns an expression of sympy, or a tuple of its brackets, or `=`, and the expressions between them.

    Raises:
        _Unreadable: A part of the text is not understood.
    """
    number = canonical_number(text, units=False, symbols=False)
    expression = plain_expression(text, symbols=False) if number is None else number
    if len(expression) > _LONGEST:
        raise _Unreadable
    return _Reader(expression).whole() if number is None else import_module("sympy").Rational(number)


class _Reader:
    """A reader of one expression by recursive descent; each method reads one level of precedence."""

    def __init__(self, text: str) -> None:
        self.sympy = import_module("sympy")  # takes a second to load
        self.tokens: list[str] = []
        self.place = 0
        text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
        self.latex = "\\" in text
        end = 0
        while text[end:].strip():
            match = _TOKEN.match(text, end)
            if match is None:
                raise _Unreadable
            end = match.end()
            token = match[0].strip()
            if match["word"]:
                self.tokens += self._spelled(token)
            elif match["command"] and not (token in _SPELLED or token in (r"\{", r"\}") or _GREEK.fullmatch(token)):
                raise _Unreadable
            else:
                self.tokens.append(_SPELLED.get(token, token))

    def _spelled(self, word: str) -> list[str]:
        if word in (*_FUNCTIONS, "sqrt", "pi"):
            return [word]
        if len(word) > 2 or word.lower() in ("or", "if", "of", "is", "to", "in", "no", "an", "at", "as", "by"):
            raise _Unreadable
        return list(word)

    def whole(self) -> Any:
        first = self.peek()
        if first in ("(", "[", r"\{") and (found := self._bracketed()) is not None:
            return found
        items = self._items()
        if self.peek():
            raise _Unreadable
        return items[0] if len(items) == 1 else ("", *items)

    def _bracketed(self) -> Any:
        """Returns a tuple, an interval or a set that is all of the text; None where the brackets are only grouping."""
        last = self.tokens[-1]
        depth = 0
        for place, token in enumerate(self.tokens):
            depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
            if depth == 0 and place < len(self.tokens) - 1:
                return None
        if last not in (")", "]", r"\}") or (self.tokens[0] == r"\{") != (last == r"\}"):
            raise _Unreadable
        inner, self.tokens = self.tokens, self.tokens[1:-1]
        items = self._items()
        if self.peek():
            raise _Unreadable
        if len(items) == 1 and inner[0] == "(" and last == ")":
            return items[0]
        return ("{}" if last == r"\}" else inner[0] + last, *items)

    def _items(self) -> list[Any]:
        items = [self._item()]
        while self.peek() == ",":
            self.place += 1
            items.append(self._item())
        return items

    def _item(self) -> Any:
        sides = [self.sum()]
        if self.peek() == "=":
            self.place += 1
            sides.append(self.sum())
        for value in sides:
            if value.has(self.sympy.nan, self.sympy.zoo) or (len(value.args) and value.has(self.sympy.oo)):
                raise _Unreadable
        done = sides[0] == sides[-1] and sides[0].is_number  # `2 + 3 = 5`
        return sides[0] if len(sides) == 1 or done else ("=", *sides)

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, token: str | None = None) -> str:
        found = self.peek()
        if not found or (token is not None and found != token):
            raise _Unreadable
        self.place += 1
        return found

    def sum(self) -> Any:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Any:
        value, divided = self.signed(), False
        while True:
            token = self.peek()
            if token == "*":
                self.place += 1
                value, divided = value * self.signed(), False
            elif token == "/":
                self.place += 1
                value, divided = self._quotient(value, self.signed()), True
            elif self._begins_factor(token):
                if divided or token[0].isdigit() or token[0] == ".":  # `1/2x` is read in two ways, `x2` in three
                    raise _Unreadable
                if token == "{":  # `{3}{4}` is set as 34
                    raise _Unreadable
                if token == "frac" and self._is_number(self.tokens[self.place - 1]):  # a mixed number or a product
                    raise _Unreadable
                value = value * self.power()
            else:
                return value

    def _begins_factor(self, token: str) -> bool:
        return token not in ("", "+", "-", "*", "/", "^", "!", ")", "]", "}", r"\}", "|", ",", "=", "_", r"\{")

    @staticmethod
    def _is_number(token: str) -> bool:
        return token[0].isdigit() or token[0] == "."

    def _quotient(self, above: Any, below: Any) -> Any:
        if below.is_zero:
            raise _Unreadable
        return above / below

    def signed(self) -> Any:
        if self.peek() in ("+", "-"):
            return self.signed() if self.take() == "+" else -self.signed()
        return self.power()

    def power(self) -> Any:
        base = self.factorial()
        if self.peek() != "^":
            return base
        self.place += 1
        if self.peek() == "{":
            exponent = self.group()
        elif self.latex and (self._is_number(self.peek() or "x") and len(self.peek()) > 1):  # LaTeX raises one digit
            raise _Unreadable
        else:
            exponent = -self.power() if self.peek() == "-" and self.take() else self.power()
        return self._raised(base, exponent)

    def _raised(self, base: Any, exponent: Any) -> Any:
        if exponent.is_number and not exponent.is_Rational and base.is_number and abs(self.sympy.N(exponent)) > 1000:
            raise _Unreadable
        if exponent.is_Rational:
            size = max((part.bit_length() for part in self._integers(base)), default=1)
            if abs(exponent) * size > _MOST_BITS or (not base.is_number and abs(exponent) > 100):
                raise _Unreadable
            if base.is_zero and exponent <= 0:
                raise _Unreadable
        return base**exponent

    @staticmethod
    def _integers(value: Any) -> list[int]:
        return [int(part) for number in value.atoms() if number.is_Rational for part in (number.p, number.q)]

    def factorial(self) -> Any:
        value = self.atom()
        if self.peek() == "!":
            self.place += 1
            if self.peek() == "!" or not (value.is_Integer and 0 <= value <= _LARGEST_FACTORIAL):
                raise _Unreadable
            value = self.sympy.factorial(value)
        return value

    def group(self) -> Any:
        """Reads what a command takes: what is between braces, or one character."""
        if self.peek() == "{":
            return self.between("{")
        token = self.peek()
        if self._is_number(token or "x") and len(token) > 1:  # `\frac12`
            self.tokens[self.place : self.place + 1] = list(token)
        return self.atom()

    def between(self, opening: str) -> Any:
        self.take(opening)
        value = self.sum()
        self.take(_CLOSING[opening])
        return value

    def atom(self) -> Any:
        token = self.take()
        simple: dict[str, Callable[[], Any]] = {
            "pi": lambda: self.sympy.pi,
            "e": lambda: self.sympy.E,
            "i": lambda: self.sympy.I,
            "infty": lambda: self.sympy.oo,
            "frac": lambda: self._quotient(self.group(), self.group()),
            "sqrt": self._root,
            "binom": self._binomial,
        }
        if token in simple:
            return simple[token]()
        if token in ("(", "[", "{", "|"):
            self.place -= 1
            value = self.between(token)
            return self.sympy.Abs(value) if token == "|" else value
        if token in _FUNCTIONS:
            return self._function(token)
        if self._is_number(token):
            if token == "." or (len(token) > 1 and token[0] == "0" and token[1] != "."):  # `\frac0.5` takes the point
                raise _Unreadable
            return self.sympy.Rational(token)
        if token.removeprefix("\\").isalpha() and (len(token) == 1 or _GREEK.fullmatch(token)):
            if self.peek() == "(" and (token.isupper() or token in "fgh"):  # `f(2)` is no product
                raise _Unreadable
            return self.sympy.Symbol(token)
        raise _Unreadable

    def _root(self) -> Any:
        degree = self.between("[") if self.peek() == "[" else self.sympy.Integer(2)
        value = self.between("(") if self.peek() == "(" else self.group()
        if not (degree.is_Integer and 2 <= degree <= 100):
            raise _Unreadable
        if degree % 2 and value.is_negative:
            return -((-value) ** self.sympy.Rational(1, degree))
        return value ** self.sympy.Rational(1, degree)

    def _binomial(self) -> Any:
        above, below = self.group(), self.group()
        if not (above.is_Integer and below.is_Integer and 0 <= below <= above <= _LARGEST_FACTORIAL):
            raise _Unreadable
        return self.sympy.binomial(above, below)

    def _function(self, name: str) -> Any:
        base = None
        if name == "log" and self.peek() == "_":
            self.place += 1
            base = self.group()
        opening = self.peek()
        argument = self.between(opening) if opening in ("(", "{") else self.atom()
        follows = self._begins_factor(self.peek()) and self.peek() not in _FUNCTIONS
        if follows and opening not in ("(", "{"):  # `\sin 2x`
            raise _Unreadable
        function = getattr(self.sympy, _FUNCTIONS[name])
        if name == "log":  # without a base it is that of ten or e: nobody says which
            return self.sympy.Function("log")(argument) if base is None else function(argument, base)
        return function(argument)
