"""Tasks by name, tasks of the user's own, and names that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import TASKS, load_task
from quietstar.tasks.addition import Addition
from quietstar.tasks.registry import recipe_of

OPTIONS = ProblemOptions(digits="1")


def write(path: Path, text: str) -> str:
    file = path / "mine.py"
    file.write_text(text)
    return str(file)


def test_every_name_makes_the_task_of_that_name() -> None:
    assert [load_task(name, OPTIONS).name for name in TASKS] == list(TASKS)


def test_entry_points_of_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "from quietstar.tasks.addition import Addition\ndef make(options): return Addition(options)")
    monkeypatch.chdir(tmp_path)
    task = load_task("mine.py:make", OPTIONS)
    assert isinstance(task, Addition)
    assert recipe_of(task) == (f"{Path(file).resolve()}:make", OPTIONS)
    assert isinstance(load_task("quietstar.tasks.addition:Addition", OPTIONS), Addition)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gsm-8k", r"task: got 'gsm-8k', needs one of addition, .* did you mean gsm8k\?"),
        ("chess", r"task: got 'chess', needs one of addition, .* an entry point such as my_tasks\.py:make_task$"),
        ("no_such_file.py:make", r"task: no_such_file\.py:make: there is no file /.*no_such_file\.py"),
        ("no.such.module:make", r"task: importing 'no\.such\.module' raised ModuleNotFoundError: No module named 'no'"),
        ("quietstar.tasks.addition:Additoin", r"has no function 'Additoin'; did you mean Addition\?"),
    ],
)
def test_names_of_nothing(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_task(name, OPTIONS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def make(options): return 5", r"mine\.py:make returned a int, needs a quietstar\.tasks\.Task"),
        ("def make(options): raise KeyError('digits')", r"mine\.py:make raised KeyError: 'digits'"),
        ("import sys\nsys.exit('bye')", r"importing .*mine\.py raised SystemExit: bye"),
        ("def make(", r"importing .*mine\.py raised SyntaxError"),
        ("make = 5", r"mine\.py has no function 'make'"),
    ],
)
def test_entry_points_that_do_not_work(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_task(f"{write(tmp_path, text)}:make", OPTIONS)
    sys.modules.pop("quietstar_task_mine", None)
