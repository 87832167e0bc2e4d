"""Files of candidates: problems with the solutions that are to be ranked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quietstar.errors import ConfigError, DataError


@dataclass
class Candidates:
    """The candidates for one problem.

    Args:
        name: Its id, or its prompt's place in the file.
        prompt: What the generator was asked.
        places: `file:line` of each.
        completions: What it wrote.
        answers: Their final answers, where the file has them: None for no answer.
        tokenizers: Hashes of the tokenizers that they were made for, with the place where each is said.
    """

    name: str
    prompt: str
    places: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    tokenizers: dict[str, str] = field(default_factory=dict)

    @property
    def has_answers(self) -> bool:
        """Whether the file has them."""
        return len(self.answers) == len(self.completions)


def read_candidates(path: Path, ask: Callable[[str], str] = str) -> list[Candidates]:
    """Problems with their candidates, in the order in which they first occur.

    Each line is an object: `prompt`, or `question` that a prompt is made of; `completions`, a list, or `completion`,
    of which lines with one `id` (or without, one prompt) belong together. Optional are `answers` or `answer` (null: has
    none) and `tokenizer`, the sha256 of `tokenizer_fingerprint`.

    Args:
        path: A JSONL file.
        ask: Question -> prompt.

    Raises:
        ConfigError: The file cannot be read.
        DataError: A line is not such an object, naming file:line, or there is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"candidates: cannot read {path} ({error.strerror})") from None
    problems: dict[str, Candidates] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _add(problems, _object(line, f"{path}:{number}"), f"{path}:{number}", ask)
    if not problems:
        raise DataError(f"{path}: has no candidates, needs one JSON object a line")
    for problem in problems.values():
        if problem.answers and not problem.has_answers:
            raise DataError(f"{problem.places[0]}: some candidates of {problem.name} have an answer and some have none")
    return list(problems.values())


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: is a {type(value).__name__}, needs an object with prompt and completions")
    return value


def _add(problems: dict[str, Candidates], line: dict[str, Any], place: str, ask: Callable[[str], str]) -> None:
    asked = next((name for name in ("prompt", "question") if name in line), None)
    if asked is None or not isinstance(line[asked], str) or not line[asked]:
        raise DataError(f"{place}: {asked or 'prompt'}: missing or no text; needs the prompt, or the question")
    prompt = line[asked] if asked == "prompt" else ask(line[asked])
    single = "completions" not in line
    completions = [line.get("completion")] if single else line["completions"]
    if not isinstance(completions, list) or not completions or not all(isinstance(text, str) for text in completions):
        raise DataError(f"{place}: completions: needs a list of texts, at least one (or completion, a text)")
    identifier = line.get("id")
    key = f"id {identifier}" if identifier is not None else f"prompt {prompt}"
    name = str(identifier) if identifier is not None else place
    problem = problems.setdefault(key, Candidates(name, prompt))
    if problem.prompt != prompt:
        raise DataError(f"{place}: id {identifier} has another prompt than at {problem.places[0]}")
    given = "answer" if single else "answers"
    if given in line:
        answers = [line[given]] if single else line[given]
        if not isinstance(answers, list) or len(answers) != len(completions):
            raise DataError(f"{place}: answers: needs a list of as many as there are completions, {len(completions)}")
        problem.answers += [None if answer is None else str(answer) for answer in answers]
    if "tokenizer" in line:
        made_for = line["tokenizer"]
        made_for = made_for.get("sha256") if isinstance(made_for, dict) else made_for
        problem.tokenizers.setdefault(str(made_for), place)
    problem.completions += completions
    problem.places += [place] * len(completions)
