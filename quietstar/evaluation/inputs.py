"""What an evaluation reads before a model is loaded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from quietstar.data.text_file import read_text
from quietstar.errors import ConfigError
from quietstar.evaluation.answer_formats import AnswerFormat, load_format
from quietstar.evaluation.settings import Settings
from quietstar.files import make_output_dir
from quietstar.tasks.task import Problem


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
