"""Solved examples that stand before each prompt: the user's own, or those that STaR has published."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.errors import ConfigError, DataError

if TYPE_CHECKING:
    from quietstar.tasks.options import ProblemOptions

PUBLISHED = Path(__file__).with_name("few_shot")


def solved_examples(options: ProblemOptions, hint: bool, published: str | None = None) -> str:
    """The solved examples of a task as they are, ending in a blank line; empty where there are none.

    Args:
        options: Of it, `few_shot_path` and `few_shot_hint_path`.
        hint: Those with the hint shown.
        published: Name of the shipped ones, which the task has where the option is null.

    Raises:
        ConfigError: The task has none of its own, and the options name only the others: with and without the hint,
            prompts need the same examples.
        DataError: There is no such file, or no text in it.
    """
    key, other = ("few_shot_hint_path", "few_shot_path") if hint else ("few_shot_path", "few_shot_hint_path")
    path: str | None = getattr(options, key)
    if path is not None:
        return _read(path, f"problems.{key}")
    if published is not None:
        return _read(str(PUBLISHED / f"{published}{'_hinted' if hint else ''}.txt"), f"problems.{key}")
    if getattr(options, other) is not None:
        shown = "the hint shown" if hint else "no hint"
        raise ConfigError(f"problems.{key}: missing, but problems.{other} is given; needs the same with {shown}")
    return ""


@cache
def _read(path: str, key: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{key}: {path}: cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"{key}: {path}: has no text in it, needs solved examples")
    return text.rstrip("\n") + "\n\n"
