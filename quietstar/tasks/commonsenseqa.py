"""Multiple-choice questions of common sense (CommonsenseQA, arXiv 1811.00937), in STaR's prompt format."""

from __future__ import annotations

import re
from itertools import pairwise, zip_longest
from typing import Any

from quietstar.errors import DataError
from quietstar.tasks.file_task import FileTask, PublicHome, Record, clean, speaks_of_hint
from quietstar.tasks.task import Problem

_LETTERS = "abcde"
_CHOICE = re.compile(r"[(\[{]\W{0,9}([a-e])\W{0,9}[)\]}]", re.IGNORECASE)
_QUOTED = re.compile(r"(?<!\w)['\"\u2018\u201c`*_]{1,3}([A-E])['\"\u2019\u201d`*_]{1,3}(?!\w)|\\text[a-z]*\{([A-E])\}")
_SEVERAL = re.compile(
    r"[(\[{]\s?([a-e](?:\s?(?:[,;/&|+\u2013-]|,?\s(?:or|and|to))\s?[a-e]){1,4})\s?[)\]}]", re.IGNORECASE
)
_ARTICLE = r"A (?!(?i:as|because|is|since|and|or|but|not|to|through)\b)(?:[a-z]|[A-Z]{2})"
_LETTER_ALONE = re.compile(rf"(?<![\w'\u2019.-])(?!{_ARTICLE})([A-E])(?![\w'\u2019-]|\.\w)")
_LAST_LETTER = re.compile(r"(?<![\w'\u2019.-])([a-e])\W*$")
_ANSWER = re.compile(r"\banswer\b|\b(?:right|correct|best)\s(?:choice|option|letter)\b", re.IGNORECASE)
_LINE_END = re.compile(r"(?<!answer is)(?<!answer is:)(?<!answer is\n)(?<!answer is:\n)\n")
_ANSWER_IS = re.compile(rf"(?:{_ANSWER.pattern})\s(?:is\b|(?=\w+n['\u2019]t\b|cannot\b))", re.IGNORECASE)
_OPTION = r"(?:the|an?|both|either|options?|choices?|letters?|answers?|be|been|is|it|one|that)"
_NOT = (
    r"(?:(?:(?<!should )(?<!would )(?<!could )(?<!must )not|not(?=\s+be\b))(?!\s+(?:only|just|merely)\b)"
    r"|nor|neither|never|cannot|\w+n['\u2019]t|no\s+longer|nothing\s+like|far\s+from|hardly|scarcely|barely"
    r"|(?:un|less\s|not\s)likely\s+to)"
)
_SOFTENED = (
    r"(?:really|going|to|likely|necessarily|actually|quite|exactly|probably|simply|supposed|certainly|definitely|have)"
)
_WRONG = r"(?:wrong|incorrect|false)"
_DOUBTED = re.compile(
    r"""\b(?:(?:(?:\w+n['\u2019]t|not|never|nobody|no\sone|cannot|hardly)\s(?:\w+\s){0,2}?
        (?:likely|probable|possible|plausible|think|believe|say|agree|claim|mean|argue|accept|true|correct|right|the\scase|sure|certain|clear|convinced)s?
      |doubt\w*|den(?:y|ies|ied)|disagree|false|untrue|unlikely|impossible|improbable)
      (?:\s(?:that|if|whether))?(?:\s(?:the|my|its?|an?))?(?:\s(?:correct|right|final|best))?
    |(?:wrong|incorrect|false|bad|worst|poor|poorest|weakest|mistaken|least\s\w+|unlikely|implausible))\s
    (?:answer|choice|option|letter)\b[^.,;!?]{0,60}$""",
    re.IGNORECASE | re.VERBOSE,
)
_REMOVED = r"(?:eliminat|exclud|reject|discard|dismiss)(?:e|ed|ing)"
_BUT = (
    r"(?:(?:all|any|anything|every|everything|none|nothing|each)\s+but|except(?:\s+for)?|excluding|unlike|without|besides"
    r"|(?:other|rather)\s+than|instead\s+of|(?:apart|aside)\s+from|(?:rul|eliminat|exclud|reject)\w*\s+out)"
)
_DENIED = re.compile(rf"\b(?:{_NOT}|{_BUT}|{_WRONG}|{_REMOVED})[\s:]+(?:[\w'\u2019-]+\s+){{0,6}}$", re.IGNORECASE)
_PLAINLY_DENIED = re.compile(
    rf"\b(?:{_NOT}|{_BUT}|{_WRONG}\s+(?:option|choice|letter|answer)s?)[\s:]+(?:(?:{_OPTION}|{_SOFTENED})\s+)*$"
    r"|(?:^|\banswer)\s?(?:\w+n['\u2019]t|cannot)\s(?:[\w'\u2019-]+\s){0,6}$",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"\s(?:\w+n['\u2019]t\b|cannot\b|fails\b|(?:is|are|was|were|would|could|can|must|should|seems?|looks?|sounds?|does)\s"
    r"(?:(?:be|the|an?|one|clearly|definitely|obviously|simply|also|to|all)\s)*"
    rf"(?:{_NOT}|{_WRONG}|bad|ruled\s+out|excluded|eliminated|rejected|impossible|unlikely|out)\b)|\W{{0,3}}\?|\s?~~",
    re.IGNORECASE,
)
_ALTERNATIVES = re.compile(
    r"[\s,;/&|+\u2013\u2014:.)(-]*(?:\b(?:or|and|to|through|thru|till|until|vs|versus|plus|as\s+well\s+as|but\s+also|also|maybe|perhaps|possibly)\b[\s,/]*)*"
    rf"(?:{_OPTION}\s+)*",
    re.I,
)
_LISTED = re.compile(  # `not (a), (b) or (c)` denies all of them
    r"\)?\s?(?:(,)|,?\s?(?:\b(?:or|nor|and)\b|[/&|]))\s?(?:(?:the|an?|options?|choices?|letters?|answers?)\s)*",
    re.IGNORECASE,
)
_PLURAL = re.compile(r"\s(?:are|were|do|have)(?:n['\u2019]t)?\b", re.IGNORECASE)
_WORDS_BEFORE = 80


class CommonsenseQA(FileTask):
    """A stem and five choices, answered by a rationale that ends in `Therefore, the answer is blotter (e).`

    The data has no human-written rationales. The hint is ` (CORRECT)` after the line of the right choice. The held-out
    problems are the development split, because the test split is published without answers. The solved examples are the
    seven that STaR published, unless the options name others.

    Args:
        options: Options of the problems. `path` is a directory with `train_rand_split.jsonl` and
            `dev_rand_split.jsonl`, or a file.
    """

    name = "commonsenseqa"
    stop = ("\nQ:",)
    isolated = False
    train_files = ("train_rand_split.jsonl",)
    test_files = ("dev_rand_split.jsonl",)
    published_examples = "commonsenseqa"
    home = PublicHome(
        "tau/commonsense_qa",
        "data/train-*.parquet",
        "data/validation-*.parquet",
        "https://www.tau-nlp.org/commonsenseqa",
        "train_rand_split.jsonl and dev_rand_split.jsonl",
    )

    def read(self, record: Record, number: int) -> Problem:
        answer = record.text("answerKey").strip().lower()
        stem, choices = _question(record)
        if answer not in choices:
            raise DataError(
                f"{record.place}: field 'answerKey' is {answer.upper()!r}, needs the label of one of the choices "
                f"({', '.join(label.upper() for label in choices)})"
            )
        lines = [stem, "Answer Choices:", *(f"({label}) {text}" for label, text in choices.items())]
        return Problem(record.text("id"), "\n".join(lines), answer, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        lines = problem.question.split("\n")
        if hint:
            place = _choice_lines(problem)[problem.answer]
            lines[place] += " (CORRECT)"
        return "Q: " + "\n".join(lines) + "\nA:"

    def extract(self, completion: str) -> str | None:
        """Returns the letter of the conclusion, the first line that says `answer is` and then names a choice, such as
        `(e)` or `E.`

        Where no line does, the conclusion is the first line with the word `answer` and a choice, or else the last line
        with a choice before the first blank one, so that ` (e).` is an answer too. The first choice after `answer is`
        counts, and the last one of another line. Denied choices (`not (b)`, `all but (b)`, `(b) is wrong`) never do;
        alternatives, ranges and sequences (`(a) or (b)`, `(a) to (e)`, `(a) (b)`) are no answer. Text after
        the conclusion is ignored.
        """
        found = _conclusion(completion)
        return None if found is None else found[1]

    def canonical(self, answer: str) -> str:
        return answer.strip().strip("().").lower()

    def accepted(self, completion: str) -> str:
        found = _conclusion(completion)
        if found is None:
            return completion.rstrip()
        return completion[: completion.index(found[0]) + len(found[0])].rstrip()

    def conclusion(self, problem: Problem) -> str:
        """Returns the sentence that ends every right solution, such as ` Therefore, the answer is blotter (e).`"""
        line = problem.question.split("\n")[_choice_lines(problem)[problem.answer]]
        return f" Therefore, the answer is {line[4:]} ({problem.answer})."

    def direct(self, problem: Problem) -> str:
        """Returns the answer alone as a completion, as in STaR's direct prompts: ` (e).`"""
        return f" ({problem.answer})."

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion)


def _question(record: Record) -> tuple[str, dict[str, str]]:
    """Returns the stem and the choices by their letters, from a line of the task's own files or a row of the hub's."""
    nested = record.fields.get("question")
    if isinstance(nested, dict):
        record = Record(f"{record.place}: question", nested)
        choices = nested.get("choices")
        stem = record.text("stem")
    else:
        choices = record.fields.get("choices")
        stem = record.text("question")
    return _one_line(stem), _choices(choices, record.place)


def _choices(choices: Any, place: str) -> dict[str, str]:
    if isinstance(choices, dict):  # the hub's rows have lists of labels and of texts
        labels, texts = choices.get("label"), choices.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            choices = [{"label": label, "text": text} for label, text in zip_longest(labels, texts)]
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{place}: has no list 'choices', needs objects with the fields 'label' and 'text'")
    found = {}
    for number, choice in enumerate(choices, start=1):
        one = Record(f"{place}: choice {number}", choice if isinstance(choice, dict) else {})
        found[one.text("label").strip().lower()] = _one_line(one.text("text"))
    if "".join(found) != _LETTERS:
        raise DataError(f"{place}: the choices are labelled {', '.join(found).upper()}, needs A, B, C, D, E")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _choice_lines(problem: Problem) -> dict[str, int]:
    """Returns for each letter the line of the question that has its choice, counted from 0."""
    last = problem.question.count("\n")
    return {letter: last - len(_LETTERS) + 1 + place for place, letter in enumerate(_LETTERS)}


def _conclusion(completion: str) -> tuple[str, str | None] | None:
    """Returns the line that concludes, with the letter of its choice; None where no line names a choice."""
    before = completion.partition("\nQ:")[0]
    lines = [(line, _plain(line)) for line in _LINE_END.split(before)]
    for saying, denied in ((_ANSWER_IS, _DENIED), (_ANSWER_IS, _PLAINLY_DENIED), (_ANSWER, _PLAINLY_DENIED)):
        for line, plain in lines:
            said = next((match for match in saying.finditer(plain) if not _is_doubted(plain, match.end())), None)
            if said and (found := _letters(plain[said.end() :], denied, alone=True)):
                return line, _one(found, 0)
            if said and saying is _ANSWER and (found := _letters(plain, denied)):
                return line, _one(found, -1)
    paragraph = before.lstrip().partition("\n\n")[0]
    for line in reversed(paragraph.split("\n")):
        if found := _letters(_plain(line), _PLAINLY_DENIED):
            return line, _one(found, -1)
    return None


def _letters(text: str, denied: re.Pattern[str], alone: bool = False, last: bool = True) -> list[re.Match[str]]:
    """Returns the choices that a text names and does not deny.

    Args:
        text: Text of a line, or of its end.
        denied: Regular expression of what denies the choice behind it. Some choices of the data begin with `not`.
        alone: Whether a capital letter counts without parentheses where none has them.
        last: Whether a small one at the end of the text does then.
    """
    found = list(_CHOICE.finditer(text))
    if not found and alone:
        found = list(_LETTER_ALONE.finditer(text)) or (list(_LAST_LETTER.finditer(text)) if last else [])
    ends = [0, *(choice.end() for choice in found)]
    links = [_LISTED.fullmatch(text, one.end(), other.start()) for one, other in pairwise(found)]
    listed = [False] * len(found)  # with the one before it; a comma needs an `or` somewhere behind it
    for place, link in reversed([*enumerate(links, start=1)]):
        listed[place] = link is not None and (not link[1] or (place + 1 < len(found) and listed[place + 1]))
    rejected = [_REJECTED.match(text, choice.end()) for choice in found]
    for place in reversed(range(1, len(found))):  # `(a) and (b) are wrong`
        end = rejected[place]
        if listed[place] and end is not None and _PLURAL.match(end[0]):
            rejected[place - 1] = end
    kept, removed = [], False
    for choice, after, joined, ruled_out in zip(found, ends, listed, rejected, strict=False):
        removed = (
            (removed and joined)
            or denied.search(text[max(after, choice.start() - _WORDS_BEFORE) : choice.start()]) is not None
            or _is_doubted(text, choice.start())
        )
        if not (removed or ruled_out):
            kept.append(choice)
    return kept


def _is_doubted(text: str, place: int) -> bool:
    """Returns whether the sentence that goes on at a place doubts the answer that it gives."""
    return _DOUBTED.search(text[max(0, place - _WORDS_BEFORE) : place]) is not None


def first_letter(text: str) -> str | None:
    """Returns the first choice in parentheses that a text names and does not deny, or else the first capital letter
    that stands alone and is no article; None where there is none, or another one beside it as an alternative.
    """
    found = _letters(_plain(text), _PLAINLY_DENIED, alone=True, last=False)
    return _one(found, 0) if found else None


def _one(found: list[re.Match[str]], place: int) -> str | None:
    """Returns the letter of the first or the last choice; None where another one stands beside it as an alternative."""
    chosen = found[place]
    for one, other in pairwise(found):
        between = chosen.string[one.end() : other.start()]
        if chosen in (one, other) and one[1].lower() != other[1].lower() and _ALTERNATIVES.fullmatch(between):
            return None
    return chosen[1].lower()


def _plain(line: str) -> str:
    """Returns a line as `clean` writes it, with single spaces and with parentheses for quotes around a letter."""
    line = _QUOTED.sub(lambda match: f"({match[1] or match[2]})", " ".join(clean(line).split()))
    return _SEVERAL.sub(lambda match: " or ".join(f"({one})" for one in re.findall(r"\b[A-Ea-e]\b", match[1])), line)
