"""Tasks by their names, and tasks that the user has written."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import check_input, path_kind, path_text
from quietstar.errors import ConfigError, QuietStarError
from quietstar.tasks.addition import Addition
from quietstar.tasks.code import CodeProblems
from quietstar.tasks.commonsenseqa import CommonsenseQA
from quietstar.tasks.gsm8k import GSM8K
from quietstar.tasks.jsonl import QuestionsAndAnswers
from quietstar.tasks.math_numeric import MathNumeric
from quietstar.tasks.routes import Routes
from quietstar.tasks.task import Task


def _addition_direct(options: ProblemOptions) -> Task:
    return Addition(options, direct=True)


_Result = TypeVar("_Result")

TASKS: dict[str, Callable[[ProblemOptions], Task]] = {
    "addition": Addition,
    "addition-direct": _addition_direct,
    "code": CodeProblems,
    "commonsenseqa": CommonsenseQA,
    "gsm8k": GSM8K,
    "jsonl": QuestionsAndAnswers,
    "math": MathNumeric,
    "routes": Routes,
}


def load_task(name: str, options: ProblemOptions) -> Task:
    """Makes a task.

    Args:
        name: Name from `TASKS`, or an entry point: `package.module:function` or `file.py:function`, where the function
            takes the options and returns a `Task`.
        options: Options of the problems, such as the path of their files.

    Raises:
        ConfigError: There is no such task, module or function; importing or calling it raises; or the function returns
            something else than a `Task`.
    """
    task = _entry_point(name, options) if ":" in name else _known(name)(options)
    # the user's class may be a frozen dataclass, which refuses ordinary assignments
    object.__setattr__(task, "_recipe", (_absolute(name), options))
    return task


def recipe_of(task: Task) -> tuple[str, ProblemOptions] | None:
    """Returns the name and options that `load_task` made a task from; None for a task that was made in another way."""
    recipe: tuple[str, ProblemOptions] | None = getattr(task, "_recipe", None)
    return recipe


def _known(name: str) -> Callable[[ProblemOptions], Task]:
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name.lower(), TASKS, 1)
    suggestion = f"; did you mean {close[0]}?" if close else ""
    needed = f"one of {', '.join(TASKS)}, or an entry point such as my_tasks.py:make_task"
    raise ConfigError(f"task: got {name!r}, needs {needed}{suggestion}")


def _entry_point(name: str, options: ProblemOptions) -> Task:
    module_name, _, function_name = name.rpartition(":")
    module = _import(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(function_name, names, 1)
        suggestion = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"task: {module_name} has no function {function_name!r}{suggestion}")
    task = _guarded(lambda: function(options), f"task: {name} raised")
    if not isinstance(task, Task):
        raise ConfigError(f"task: {name} returned a {type(task).__name__}, needs a quietstar.tasks.Task")
    return task


def _import(module_name: str, name: str) -> ModuleType:
    if not module_name.endswith(".py"):
        return _guarded(lambda: importlib.import_module(module_name), f"task: importing {module_name!r} raised")
    file = _file(module_name)
    check_input(file, "task")
    if path_kind(file, "task") != "file":
        raise ConfigError(f"task: {name}: there is no file {path_text(file)}")
    specification = spec_from_file_location(f"quietstar_task_{file.stem}", file)
    assert specification is not None and specification.loader is not None  # a file that ends in .py has both
    module, loader = module_from_spec(specification), specification.loader
    sys.modules[specification.name] = module  # dataclasses look up their own module there
    _guarded(lambda: loader.exec_module(module), f"task: importing {file} raised")
    return module


def _guarded(call: Callable[[], _Result], prefix: str) -> _Result:
    try:
        return call()
    except QuietStarError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{prefix} {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _absolute(name: str) -> str:
    """Returns an entry point that means the same in another working directory."""
    module_name, _, function_name = name.rpartition(":")
    return f"{_file(module_name)}:{function_name}" if module_name.endswith(".py") else name


def _file(name: str) -> Path:
    """Returns the absolute path of a file; pathlib's own functions raise for a circle of links and an unknown home."""
    return Path(os.path.abspath(os.path.expanduser(name)))
