"""What an evaluation is asked to do, and what it reads before a model is loaded."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from quietstar.config.command_line import Command
from quietstar.config.options import NOT_AN_OPTION, CheckpointOptions, Count, Names, Natural, Positive, at_least
from quietstar.data.sources import read_text
from quietstar.errors import ConfigError
from quietstar.evaluation.answers import AnswerFormat, load_format
from quietstar.model.think_rule import parse_think
from quietstar.runs.files import make_output_dir
from quietstar.tasks.task import Problem

if TYPE_CHECKING:
    pass


METRICS = ("soft", "exact", "cot")
TASKS = ("gsm8k", "commonsenseqa")

USUAL_LENGTH = 256
UNBOUNDED = 1 << 30
"""The context of a model that states none."""


@dataclass(frozen=True, kw_only=True)
class Settings(CheckpointOptions):
    """Measures a model with thinking on and off on the same items.

    The same command goes on with an evaluation that was killed.

    Args:
        output_dir: Directory for the results, in which a killed evaluation is gone on with.
        tasks: Tasks with commas: some of gsm8k, commonsenseqa.
        data: Directory with a folder for each task, or with one task's files, or one task's file. Null: each task's
            public home.
        metrics: Measures of the tasks with commas: `soft` (the paper's accuracy), `exact` (greedy answers), `cot`
            (votes over chains of thought).
        problems: Held-out problems of each task, drawn by `seed`. Null: all.
        think: When the model thinks while it generates, as in `quietstar.generate`; the other side never thinks.
        text: Held-out text file, for the NLL and the page of thoughts.
        text_tokens: Tokens of the text at most, from the beginning.
        length: Tokens of a window of the text, within which each is predicted from those before it. Null: as many as
            the texts that the model was trained on, or where that is unknown 256, and at most what the context holds.
        lm_eval: lm-eval tasks with commas, or YAML files that define one.
        votes: Chains of thought of a problem.
        temperature: Sampling temperature of the chains of thought.
        max_new_tokens: Tokens of a generated answer or chain of thought at most.
        batch_size: Texts at once.
        seed: Seed of the drawn problems, the sampled chains of thought and the bootstrap.
    """

    output_dir: Path = Path("evaluation")
    tasks: Names = ()
    data: Path | None = None
    metrics: Names = ("soft", "exact")
    problems: Count | None = None
    think: str = "always"
    text: Path | None = None
    text_tokens: Annotated[int, at_least(2)] = 16_384
    length: Annotated[int, at_least(2)] | None = None
    length_from: str = field(default="as asked for", metadata=NOT_AN_OPTION)
    lm_eval: Names = ()
    votes: Count = 8
    temperature: Positive = 0.9
    max_new_tokens: Count = 384
    batch_size: Count = 16
    seed: Natural = 0

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


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{option}: got {name!r}, needs some of {', '.join(known)}{suggestion}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{option}: got {', '.join(names)}, needs each once")


def check_settings(settings: Settings, for_use: bool = True) -> None:
    """Refuses what cannot be done.

    Args:
        settings: What to check.
        for_use: Whether there has to be something to do.

    Raises:
        ConfigError: naming the option.
    """
    _known("tasks", settings.tasks, TASKS)
    _known("metrics", settings.metrics, METRICS)
    if for_use and not (settings.tasks or settings.text or settings.lm_eval):
        raise ConfigError("tasks: nothing to evaluate; needs --tasks, --text or --lm_eval")
    if settings.tasks and not settings.metrics:
        raise ConfigError(f"metrics: none given for the tasks; needs some of {', '.join(METRICS)}")
    if parse_think(settings.think).rule == "never":
        raise ConfigError("think: got never, which is what thinking is compared with; needs another value")
    if settings.data is not None and settings.data.is_file() and len(settings.tasks) != 1:
        raise ConfigError(f"data: {settings.data} is one file, needs a directory for {len(settings.tasks)} tasks")


EVALUATE = Command("evaluate", Settings, check=check_settings, argument="checkpoint")


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
    """Reads the data, and checks what can be checked without a model.

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
