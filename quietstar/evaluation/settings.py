"""The options of an evaluation, their checks, and the data that is read before a model is loaded."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from quietstar.config.command_line import Command
from quietstar.config.options import (
    INPUT,
    INPUT_ONCE,
    NOT_AN_OPTION,
    CheckpointOptions,
    Count,
    Names,
    Seed,
    SpecialTokensMean,
    Temperature,
    Text,
    at_least,
    check_input,
    path_kind,
)
from quietstar.config.parsing import MAX_YAML_BYTES, parse_yaml
from quietstar.data.sources import TEXT_OPTIONS, read_text
from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.answers import AnswerFormat, load_format
from quietstar.model.think_rule import parse_think
from quietstar.runs.files import make_output_dir
from quietstar.tasks.task import Problem

METRICS = ("soft", "exact", "cot")
TASKS = ("gsm8k", "commonsenseqa")

USUAL_LENGTH = 256
UNBOUNDED = 1 << 30
"""Context, in tokens, of a model that does not state one."""


@dataclass(frozen=True, kw_only=True)
class Settings(CheckpointOptions):
    """Measures a model with thinking on and off on the same items.

    The same command continues an interrupted evaluation.

    Args:
        output_dir: Directory for the results; an interrupted evaluation in it is continued.
        tasks: Tasks, separated by commas: gsm8k, commonsenseqa.
        data: Directory with a folder for each task, or with one task's files, or one task's file. Null: each task's
            public home.
        metrics: Measures of the tasks, separated by commas: `soft` (the paper's accuracy), `exact` (greedy answers),
            `cot` (votes over chains of thought).
        problems: Number of held-out problems per task, drawn at random with `seed`. Null: all.
        think: Rule that says when the model thinks while it generates, as in `quietstar.generate`; the other side of
            the comparison never thinks.
        text: Held-out text, for the NLL and for the page of thoughts: a text file, or one with a document in each row
            (.jsonl, .json, .csv, ...), which are joined by blank lines, or a directory. Null: none.
        text_field: Field of a row that holds the text, or a chat; `meta.text` is one inside another.
        special_tokens: Meaning of a special token's text in the text, such as `<|endoftext|>`: `parse`, this token; or
            `text`, its characters.
        text_tokens: Largest number of tokens to read from the beginning of the text.
        length: Number of tokens in a window of the text; each token is predicted from those before it in its window.
            Null: the length of the model's training texts, or 256 if that is unknown, and never more than the context.
        lm_eval: lm-eval tasks, separated by commas, by name or as YAML files that define one.
        votes: Number of chains of thought per problem, for `cot`.
        temperature: Sampling temperature of the chains of thought.
        max_new_tokens: Longest generated answer or chain of thought, in tokens.
        batch_size: Texts per forward pass.
        seed: Seed of the drawn problems, the sampled chains of thought and the bootstrap.
    """

    output_dir: Path = Path("evaluation")
    tasks: Names = ()
    data: Annotated[Path | None, INPUT] = None
    metrics: Names = ("soft", "exact")
    problems: Count | None = None
    think: str = "always"
    text: Annotated[Path | None, INPUT_ONCE] = None
    text_field: Text = "text"
    special_tokens: SpecialTokensMean = "parse"
    text_tokens: Annotated[int, at_least(2)] = 16_384
    length: Annotated[int, at_least(2)] | None = None
    length_from: str = field(default="as asked for", metadata=NOT_AN_OPTION)
    lm_eval: Names = ()
    votes: Count = 8
    temperature: Temperature = 0.9
    max_new_tokens: Count = 384
    batch_size: Count = 16
    seed: Seed = 0

    def with_length(self, trained: int | None, context: int) -> Settings:
        """Returns the settings with a length: their own, or the default for a model.

        Args:
            trained: Number of tokens in the model's training texts; None if unknown.
            context: Largest number of tokens that the model can read.
        """
        if self.length is not None:
            return self
        words = "by default" if trained is None else "as in training"
        wanted = USUAL_LENGTH if trained is None else trained
        if wanted > context:
            words = f"all that the context holds, {wanted} {words}"
        return replace(self, length=min(wanted, context), length_from=words)


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{option}: got {name!r}, needs some of {', '.join(known)}{suggestion}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{option}: got {', '.join(names)}, needs each once")


def check_settings(settings: Settings, for_use: bool = True) -> None:
    """Refuses settings that cannot be evaluated with.

    Args:
        settings: Settings to check.
        for_use: Whether at least one thing to evaluate has to be named.

    Raises:
        ConfigError: A setting cannot be used; the message names the option.
    """
    _known("tasks", settings.tasks, TASKS)
    _known("metrics", settings.metrics, METRICS)
    if for_use and not (settings.tasks or settings.text or settings.lm_eval):
        raise ConfigError("tasks: nothing to evaluate; needs --tasks, --text or --lm_eval")
    if settings.tasks and not settings.metrics:
        raise ConfigError(f"metrics: none given for the tasks; needs some of {', '.join(METRICS)}")
    if parse_think(settings.think).rule == "never":
        raise ConfigError("think: got never, which is what thinking is compared with; needs another value")
    if settings.data is not None and len(settings.tasks) != 1 and path_kind(settings.data, "data") == "file":
        raise ConfigError(f"data: {settings.data} is one file, needs a directory for {len(settings.tasks)} tasks")


EVALUATE = Command("evaluate", Settings, check=check_settings, argument="checkpoint")


@dataclass(frozen=True)
class Inputs:
    """The data that an evaluation reads before a model is loaded.

    Args:
        problems: Answer format and problems to ask, for each task.
        total: Number of all held-out problems, for each task.
        text: Content of the file `--text`; None without one.
    """

    problems: Sequence[tuple[AnswerFormat, list[Problem]]]
    total: Sequence[int]
    text: str | None


def prepare(settings: Settings) -> Inputs:
    """Reads the data, and checks everything that can be checked without a model.

    Raises:
        ConfigError: An option cannot be used, or a package is missing.
        DataError: A line of the data is wrong.
    """
    make_output_dir(settings.output_dir)
    if settings.lm_eval:
        check_lm_eval(settings.lm_eval)
    problems, total = [], []
    for name in settings.tasks:
        form = load_format(name, settings.data)
        every = form.task.problems("test")
        problems.append((form, list(drawn(every, settings.problems, settings.seed))))
        total.append(len(every))
    names = replace(TEXT_OPTIONS, field="text_field")
    text = None if settings.text is None else read_text(settings.text, settings.text_field, names)
    return Inputs(problems, total, text)


def check_lm_eval(names: Sequence[str]) -> None:
    """Refuses lm-eval tasks that cannot be run.

    Raises:
        ConfigError: lm-eval is not installed, or a file of a task cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: lm-eval is not installed; pip install 'quietstar[eval]'")
    for name in names:
        if is_task_file(name):
            read_task(name)


def is_task_file(name: str) -> bool:
    """Returns whether a name in `--lm_eval` is the file of a task."""
    return name.endswith((".yaml", ".yml"))


def read_task(name: str) -> dict[str, Any]:
    """Reads the definition of an lm-eval task from a file.

    Raises:
        ConfigError: The file cannot be read, or does not define a task.
    """
    check_input(name, "lm_eval")
    try:
        with open(name, "rb") as file:
            content = parse_yaml(file.read(MAX_YAML_BYTES + 1), name)
    except OSError as error:
        raise ConfigError(f"lm_eval: cannot read {name}: {error.strerror}") from None
    except DataError as error:
        raise ConfigError(f"lm_eval: {error}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise ConfigError(f"lm_eval: {name} has no field 'task'; needs the definition of an lm-eval task")
    return content


def drawn(problems: Sequence[Problem], count: int | None, seed: int) -> Iterator[Problem]:
    """Draws `count` problems by `seed`, in the order of the data; a smaller count draws a subset of them."""
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    yield from (problems[place] for place in sorted(order[:count]))
