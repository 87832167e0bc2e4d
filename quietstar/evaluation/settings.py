"""What an evaluation is asked to do, checked before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quietstar.errors import ConfigError
from quietstar.inference.when import parse_think

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
