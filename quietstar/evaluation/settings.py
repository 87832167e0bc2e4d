"""What an evaluation is asked to do, checked before anything is loaded.

What an evaluation reads before a model is loaded.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from quietstar.data.sources import read_text
from quietstar.errors import ConfigError
from quietstar.evaluation.answers import AnswerFormat, load_format
from quietstar.model.think_rule import parse_think
from quietstar.runs.files import make_output_dir
from quietstar.tasks.task import Problem

METRICS = ("soft", "exact", "cot")
TASKS = ("gsm8k", "commonsenseqa")

USUAL_LENGTH = 256
UNBOUNDED = 1 << 30
"""The context of a model that states none."""


@dataclass(frozen=True)
class Settings:
    """The options of an evaluation.

    Args:
        output_dir: Where the results go, and where a killed evaluation is gone on with.
        tasks: Of `TASKS`.
        data: Directory with a folder for each task, or with one task's files, or one task's file. None: each task's
            public home.
        metrics: Of `METRICS`, measured on each task.
        problems: Held-out problems of each task, drawn by `seed`; None: all.
        think: When the model thinks while it generates, as in `generate(think=...)`; the other side never thinks.
        text: Held-out text whose NLL is measured.
        text_tokens: At most so many of its tokens, from the beginning.
        length: Tokens of a window of the text, within which each is predicted from those before it. None: as many as
            the texts that the model was trained on, or where that is unknown `USUAL_LENGTH`, and at most what the
            context holds.
        length_from: Where `length` comes from, in words.
        lm_eval: Names of lm-eval tasks, or YAML files that define one.
        batch_size: Texts at once.
        seed: Of the drawn problems, the sampled chains of thought and the bootstrap.
        votes: Chains of thought of a problem.
        temperature: That they are sampled at.
        max_new_tokens: Of a generated answer or chain of thought.
    """

    output_dir: Path
    tasks: tuple[str, ...] = ()
    data: Path | None = None
    metrics: tuple[str, ...] = ("soft", "exact")
    problems: int | None = None
    think: str = "always"
    text: Path | None = None
    text_tokens: int = 16_384
    length: int | None = None
    length_from: str = "as asked for"
    lm_eval: tuple[str, ...] = ()
    batch_size: int = 16
    seed: int = 0
    votes: int = 8
    temperature: float = 0.9
    max_new_tokens: int = 384

    def with_length(self, trained: int | None, context: int) -> Settings:
        """The same with a length.

        Args:
            trained: Tokens of the model's training texts, where they are known.
            context: Tokens that a text may have.
        """
        if self.length is not None:
            return self
        words = "by default" if trained is None else "as in training"
        wanted = USUAL_LENGTH if trained is None else trained
        if wanted > context:
            words = f"all that the context holds, {wanted} {words}"
        return replace(self, length=min(wanted, context), length_from=words)

    def check(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ConfigError: naming the option.
        """
        _known("tasks", self.tasks, TASKS)
        _known("metrics", self.metrics, METRICS)
        if not (self.tasks or self.text or self.lm_eval):
            raise ConfigError("tasks: nothing to evaluate; needs --tasks, --text or --lm_eval")
        if self.tasks and not self.metrics:
            raise ConfigError(f"metrics: none given for the tasks; needs some of {', '.join(METRICS)}")
        smallest = {
            "problems": 1,
            "text_tokens": 2,
            "length": 2,
            "batch_size": 1,
            "seed": 0,
            "votes": 1,
            "max_new_tokens": 1,
        }
        for name, least in smallest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value}, needs {least} or more")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature: got {self.temperature}, needs a number above 0")
        if parse_think(self.think).rule == "never":
            raise ConfigError("think: got never, which is what thinking is compared with; needs another value")
        if self.data is not None and self.data.is_file() and len(self.tasks) != 1:
            raise ConfigError(f"data: {self.data} is one file, needs a directory for {len(self.tasks)} tasks")


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{option}: got {name!r}, needs some of {', '.join(known)}{suggestion}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{option}: got {', '.join(names)}, needs each once")


@dataclass(frozen=True)
class Inputs:
    """What is read before a model is loaded.

    Args:
        problems: Of each task, those that are asked.
        total: Of each task, how many held-out problems there are.
        text: Of `--text`.
    """

    problems: Sequence[tuple[AnswerFormat, list[Problem]]]
    total: Sequence[int]
    text: str | None


def prepare(settings: Settings) -> Inputs:
    """Checks all that can be checked without a model, and reads the data.

    Raises:
        ConfigError: An option cannot be used, or a package is missing.
        DataError: A line of the data is wrong.
    """
    settings.check()
    make_output_dir(settings.output_dir)
    if settings.lm_eval:
        check_lm_eval(settings.lm_eval)
    problems, total = [], []
    for name in settings.tasks:
        form = load_format(name, settings.data)
        every = form.task.problems("test")
        problems.append((form, list(drawn(every, settings.problems, settings.seed))))
        total.append(len(every))
    return Inputs(problems, total, None if settings.text is None else read_text(settings.text))


def check_lm_eval(names: Sequence[str]) -> None:
    """Refuses tasks that cannot be run.

    Raises:
        ConfigError: lm-eval is not installed, or a file of a task cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: lm-eval is not installed; pip install 'quietstar[eval]'")
    for name in names:
        if is_task_file(name):
            read_task(name)


def is_task_file(name: str) -> bool:
    """Whether a name of `--lm_eval` is the file of a task."""
    return name.endswith((".yaml", ".yml"))


def read_task(name: str) -> dict[str, Any]:
    """The definition of a task in a file.

    Raises:
        ConfigError: It cannot be read, or defines none.
    """
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"lm_eval: cannot read {name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"lm_eval: {name} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise ConfigError(f"lm_eval: {name} has no field 'task'; needs the definition of an lm-eval task")
    return content


def drawn(problems: Sequence[Problem], count: int | None, seed: int) -> Iterator[Problem]:
    """So many problems by `seed`, in the order of the data; a smaller number draws some of the same ones."""
    order = list(range(len(problems)))
    random.Random(seed).shuffle(order)
    yield from (problems[place] for place in sorted(order[:count]))
