"""Questions with answers from any JSONL files."""

from __future__ import annotations

import re

from quietstar.errors import DataError
from quietstar.tasks.expressions import same_expression
from quietstar.tasks.file_task import FileTask, Record, begins_with_hint, first_after_marker, speaks_of_hint
from quietstar.tasks.gsm8k import MARKER, equations, through_marker
from quietstar.tasks.numbers import beside_number, canonical_number, plain_text
from quietstar.tasks.task import Problem, Verdict

_ANSWER_LINE = re.compile(r"^[ \t]*Answer:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_EXPRESSION = re.compile(r"[\d\\^=+*/<>]")
_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]{3,}|(?<=\s)[^\W\d_]{2,}")
_END = r"[$\u20ac\u00a3\u00a5%\u00b0]?\d[\d.,:]*[$\u20ac\u00a3\u00a5%\u00b0]?"
_RANGE = re.compile(rf"{_END}(?:-{_END})+|\d+(?:/\d+){{2,}}")
_TIGHT = re.compile(r"\s*([-+*/=<>^,])\s*")

# Units that are written in several ways, and the words beside them that mean nothing.
_SPELLINGS = """$ dollar usd us; € euro eur; £ gbp pound lb quid; ¥ yen jpy; ₹ rupee rs inr; ¢ cent;
    % percent pct percentage; ° degree deg; c celsius; f fahrenheit; mm millimeter millimetre; m meter metre;
    cm centimeter centimetre; km kilometer kilometre; in inch inche; ft foot feet; yd yard; mi mile; g gm gram gramme;
    kg kilogram kilo; mg milligram; oz ounce; l liter litre; ml milliliter millilitre; s sec second; min minute;
    h hr hour; d day; wk week; mo month; yr year; sq square; cu cubic; ω ohm; child children; person people; man men;
    woman women; tooth teeth; mouse mice; goose geese; leaf leave; loaf loave; box boxe"""
_UNIT = {name: group.split()[0] for group in _SPELLINGS.split(";") for name in group.split()}
_FILLING = re.compile(
    r"total|altogether|overall|all|together|in|on|at|for|from|during|with|of|the|an?|it|s?he|they|this|that|these|those"
    r"|his|her|their|my|your|our|its|old|only"
)


class QuestionsAndAnswers(FileTask):
    """`Q: ...\\nA:`, answered by a rationale and `#### answer`.

    Answers are compared as numbers where both are numbers, and then their units have to be the same where both have
    one; else as texts without regard to white space, a dot at the end, and the case of words. Where both look like
    expressions, sympy decides whether they are equal; ranges, scores and dates (`10-20`) are no differences.

    Args:
        options: Options of the problems. `question`, `answer`, `rationale` and `id` name the fields. `path` is a file,
            or a directory with `train.jsonl` and `test.jsonl`.
    """

    name = "jsonl"
    stop = ("\nQ:",)
    train_files = ("train.jsonl",)
    test_files = ("test.jsonl",)

    def warm_up(self) -> None:
        same_expression("1", "1")

    def read(self, record: Record, number: int) -> Problem:
        options = self.options
        question = record.text(options.question, option="problems.question")
        gold = record.text(options.answer, option="problems.answer", number=True)
        rationale = record.text(options.rationale, option="problems.rationale") if options.rationale else None
        name = record.text(options.id, option="problems.id", number=True) if options.id else str(number)
        answer = self.extract(gold) or self.canonical(gold)
        if not answer or (self.extract(gold) is None and "\n" in gold.strip()):
            raise DataError(
                f"{record.place}: field {options.answer!r} has several lines, none of which gives the final answer; "
                f"needs the answer alone, or a line '{MARKER} answer'"
            )
        return Problem(name, question, answer, rationale, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return f"Q: {problem.question}{f' ({problem.answer})' if hint else ''}\nA:"

    def extract(self, completion: str) -> str | None:
        """Returns the text after the first `####`, or else after the first `Answer:` that begins a line.

        Text after that line is ignored.
        """
        found = first_after_marker(completion, MARKER)
        if found is None and (line := _ANSWER_LINE.search(completion)):
            found = line[1]
        return None if found is None else self.canonical(found)

    def canonical(self, answer: str) -> str:
        """Returns a number without a unit in one spelling, and any other text without needless white space.

        A text that is no expression is written in small letters.
        """
        number, text = canonical_number(answer, symbols=False), plain_text(answer, symbols=False)
        if number is not None:
            return text if beside_number(answer) else number
        return _TIGHT.sub(r"\1", text) if _is_expression(text) else text.casefold()

    def check(self, problem: Problem, completion: str) -> Verdict:
        answer, gold = self.extract(completion), problem.answer
        if answer is None or answer == gold:
            return Verdict(answer, answer == gold)
        same = self._same(gold, answer)
        return Verdict(gold if same else answer, same)

    def _same(self, gold: str, answer: str) -> bool:
        if not (_EXPRESSION.search(answer) and _EXPRESSION.search(gold)) or _is_range(gold) or _is_range(answer):
            return False
        if any(canonical_number(text, symbols=False) is not None for text in (gold, answer)):
            number = canonical_number(gold)  # a symbol before one of two numbers, as in `x = 5 apples`, does not count
            if number is not None and number == canonical_number(answer):
                return _same_unit(_unit(gold), _unit(answer))
        return same_expression(gold, answer)

    def accepted(self, completion: str) -> str:
        if first_after_marker(completion, MARKER) is None and (line := _ANSWER_LINE.search(completion)):
            return completion[: line.end()].rstrip()
        return through_marker(completion, MARKER)

    def solution(self, problem: Problem) -> str | None:
        if problem.rationale is None:
            return None
        if self.extract(problem.rationale) is not None:
            return f" {problem.rationale}"
        return f" {problem.rationale.rstrip()}\n{MARKER} {problem.answer}"

    def solution_key(self, completion: str) -> str:
        return equations(completion) or super().solution_key(completion)

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion) or begins_with_hint(completion, problem.answer)


def _is_expression(text: str) -> bool:
    """Returns whether the case of letters counts: `2X` is an expression, `10 AM` and `World War 2` are not."""
    return _EXPRESSION.search(text) is not None and _WORD.search(text) is None


def _is_range(text: str) -> bool:
    return _RANGE.fullmatch(_TIGHT.sub(r"\1", text)) is not None


def _unit(text: str) -> frozenset[str]:
    """Returns the words beside a number in one spelling, those behind `per` marked."""
    beside = beside_number(text).lower().replace("kph", "km per h").replace("mph", "mi per h")
    beside = re.sub(r"\^?(?:\{?2\}?|\u00b2)", " square", re.sub(r"\^?(?:\{?3\}?|\u00b3)", " cubic", beside))
    beside = re.sub(r"(?<!\bin)(?<!\bon)(?<!\bat)(?<!\bof)(?<!\bfor) an? (?=\w)", " per ", beside)  # `$5 an hour`
    words, mark = [], ""
    for word in re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*|[^\w\s.,()\\{}-]", beside):
        one = re.sub(r"ies$", "y", word).removesuffix("s")
        if word in ("/", "per"):
            mark = "per "
        else:
            words.append(mark + _UNIT.get(word, _UNIT.get(one, one)))
    unit = {word for word in words if not _FILLING.fullmatch(word)} or set(words[:1]) & {"in"}
    return frozenset(unit - {"\u00b0"} if unit & {"c", "f"} else unit)


def _same_unit(one: frozenset[str], other: frozenset[str]) -> bool:
    """Returns whether two units are the same, where both are given: `red apples` are apples, and no `km/h` is a km."""
    powers = [{word for word in unit if word.startswith(("per ", "sq", "cu"))} for unit in (one, other)]
    return not one or not other or (powers[0] == powers[1] and (one <= other or other <= one))
