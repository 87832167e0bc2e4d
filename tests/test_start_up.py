"""What is imported when: users wait for torch and transformers only where a model is used.

A typo, a question and a missing file used to take as long as loading a model's libraries, five seconds of CPU time.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import quietstar
from quietstar.__main__ import COMMANDS
from tests.marks import slow
from tests.model.tiny import make_model

HEAVY = ("torch", "transformers")
RUN = f"""
import contextlib, io, json, sys
from quietstar.__main__ import main

for arguments in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, said.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]]), flush=True)
"""
"""Runs command lines one after another; what one has imported the next has too."""

TEXT = ["--text", "text.txt"]
MISTAKES: dict[str, dict[str, list[str]]] = {
    "train": {
        "unknown option --training.step; did you mean --training.steps?": ["--training.step", "3"],
        "training.steps: got '0.5', needs a whole number": ["--training.steps", "0.5"],
        "training.steps: got 0, needs at least 1": ["--training.steps", "0"],
        "training.device: got 'gpu', needs auto, cpu, cuda or cuda:N": ["--training.device", "gpu"],
        "training.fused_layers: got liger, whose kernels need a CUDA device, but training.device is cpu": [
            *("--training.fused_layers", "liger", "--training.device", "cpu")
        ],
        "training.fused_layers: got 'ligre', needs one of none, liger": ["--training.fused_layers", "ligre"],
        "textbook.operands: got 'x'": ["--textbook.operands", "x"],
        "preset: got 'plian', needs one of": ["--preset", "plian"],
        "config: cannot read none.yaml: No such file or directory": ["--config", "none.yaml"],
        "config: torn.yaml:3: not valid YAML": ["--config", "torn.yaml"],
        "key.yaml: unknown option training.step; did you mean training.steps?": ["--config", "key.yaml"],
        "model.path: missing; preset plain needs a causal language model": ["--data.path", "none.txt"],
        "model.path: ./none is not a directory": ["--model.path", "./none", "--data.path", "text.txt"],
        "model.path: plain has no tokenizer": ["--model.path", "plain", "--data.path", "text.txt"],
        "data.path: none.txt: no such file or directory": ["--model.path", "a/b", "--data.path", "none.txt"],
        "data.path: plain: no file that can be read": ["--model.path", "a/b", "--data.path", "plain"],
        "data.validation_path: none.txt: no such file": [
            *("--model.path", "a/b", "--data.path", "text.txt", "--data.validation_path", "none.txt")
        ],
        "data.path: ./none: no such file or directory": [
            *("--model.path", "a/b", "--data.source", "c4", "--data.path", "./none")
        ],
    },
    "star": {
        "unknown option --loop.iteration; did you mean --loop.iterations?": ["--loop.iteration", "3"],
        "task: got 'addtion', needs one of": ["--task", "addtion"],
        "task: none.py:make: there is no file": ["--task", "none.py:make"],
        "config: cannot read none.yaml": ["--config", "none.yaml"],
        "sampling.samples: got 0, needs at least 1": ["--sampling.samples", "0"],
        "training.fused_layers: got liger, whose kernels need a CUDA device": [
            *("--training.fused_layers", "liger", "--training.device", "cpu")
        ],
        "problems.digits: got 'x', needs a range": ["--problems.digits", "x"],
        "sampling.urls: missing; sampling.engine http needs servers": ["--sampling.engine", "http"],
        "sampling.urls: got 'a:8000', needs http://": ["--sampling.engine", "http", "--sampling.urls", "a:8000"],
        "sampling.server_python: ./none is no program": [
            *("--sampling.engine", "vllm", "--sampling.server_python", "./none")
        ],
        "problems.path: ./none: no such file": ["--task", "gsm8k", "--model.path", "a/b", "--problems.path", "./none"],
        "model.path: /none is not a directory": ["--model.path", "/none", "--dry_run"],
    },
    "vstar": {
        "unknown option --verifier.bet; did you mean --verifier.beta?": ["--verifier.bet", "3"],
        "verifier.beta: got 0.0, needs a finite number above 0": ["--verifier.beta", "0"],
        "loop.few_shot_in_training: a verifier reads": ["--loop.few_shot_in_training", "true"],
        "problems.path: ./none: no such file": ["--task", "gsm8k", "--model.path", "a/b", "--problems.path", "./none"],
    },
    "generate": {
        "unknown option --promt; did you mean --prompt?": ["a/b", "--promt", "x"],
        "max_new_tokens: got 'x', needs a whole number": ["a/b", "--max_new_tokens", "x"],
        "max_new_tokens: got 0, needs at least 1": ["a/b", "--prompt", "x", "--max_new_tokens", "0"],
        "think: got 'allways'": ["a/b", "--prompt", "x", "--think", "allways"],
        "device: got 'gpu', needs auto": ["a/b", "--prompt", "x", "--device", "gpu"],
        "prompt: missing": ["a/b"],
        "checkpoint: missing, needs a value: CHECKPOINT": ["--prompt", "x"],
        "unexpected argument 'c/d'": ["a/b", "c/d"],
        "prompts: cannot read none.txt (No such file or directory)": ["a/b", "--prompts", "none.txt"],
        "checkpoint: ./none is not a directory": ["./none", "--prompt", "x"],
        "plain: neither a model directory": ["plain", "--prompt", "x"],
    },
    "evaluate": {
        "unknown option --txt; did you mean --text?": ["a/b", "--txt", "x"],
        "tasks: got 'gms8k', needs some of gsm8k, commonsenseqa; did you mean gsm8k?": ["a/b", "--tasks", "gms8k"],
        "votes: got 0, needs at least 1": ["a/b", *TEXT, "--votes", "0"],
        "device: got 'gpu', needs auto": ["a/b", *TEXT, "--device", "gpu"],
        "text: none.txt: no such file or directory": ["a/b", "--text", "none.txt"],
        "problems.path: none: no such file or directory": ["a/b", "--tasks", "gsm8k", "--data", "none"],
        "checkpoint: ./none is not a directory": ["./none", *TEXT],
    },
    "view": {
        "unknown option --txt; did you mean --text?": ["a/b", *TEXT, "--txt", "x"],
        "top_k: got 0, needs 1 to 100": ["a/b", *TEXT, "--top_k", "0"],
        "device: got 'gpu', needs auto": ["a/b", *TEXT, "--device", "gpu"],
        "positions: got 'some', needs all": ["a/b", *TEXT, "--positions", "some"],
        "text: none.txt: no such file or directory": ["a/b", "--text", "none.txt"],
        "checkpoint: /none is not a directory": ["/none", *TEXT],
        "plain/x.json is the name of the data": ["a/b", *TEXT, "--out", "plain/x.json"],
    },
    "gate": {
        "out: missing, needs a value: --out OUT": ["a/b", *TEXT],
        "out: plain exists already": ["a/b", *TEXT, "--out", "plain"],
        "held_out: got 2.0, needs a share between 0 and 1": ["a/b", *TEXT, "--out", "new", "--held_out", "2"],
        "length: got 1, needs at least 2": ["a/b", *TEXT, "--out", "new", "--length", "1"],
        "positions: got 'some', needs all": ["a/b", *TEXT, "--out", "new", "--positions", "some"],
        "device: got 'gpu', needs auto": ["a/b", *TEXT, "--out", "new", "--device", "gpu"],
        "text: none.txt: no such file or directory": ["a/b", "--text", "none.txt", "--out", "new"],
        "checkpoint: ./none is not a directory": ["./none", *TEXT, "--out", "new"],
    },
    "rank": {
        "by: got 'vote', needs one of score, majority, weighted, process": [
            "--candidates",
            "candidates.jsonl",
            "--by",
            "vote",
        ],
        "verifier: missing": ["--candidates", "candidates.jsonl"],
        "task: got 'gms8k', needs one of": ["--candidates", "candidates.jsonl", "--verifier", "a/b", "--task", "gms8k"],
        "candidates: cannot read none.jsonl (No such file": ["--candidates", "none.jsonl", "--verifier", "a/b"],
        "device: got 'gpu', needs auto": ["--candidates", "candidates.jsonl", "--verifier", "a/b", "--device", "gpu"],
        "verifier: ./none is not a directory": ["--candidates", "candidates.jsonl", "--verifier", "./none"],
    },
    "compare": {
        "presets: missing": [],
        "preset: got 'rtf'": ["--presets", "rtf", "--model.path", "a/b"],
        "budget: got 0, needs at least 1": ["--presets", "rft", "--budget", "0"],
        "unknown option --loop.iteration": ["--presets", "rft", "--model.path", "a/b", "--loop.iteration", "3"],
        "model.path: ./none is not a directory": ["--presets", "rft", "--model.path", "./none"],
        "problems.path: ./none: no such file": [
            *("--presets", "rft", "--task", "gsm8k", "--model.path", "a/b", "--problems.path", "./none")
        ],
    },
    "plan": {
        "gpu: got 'B9000', needs one of H200": ["--gpu", "B9000"],
        "unknown option --training.step": ["--training.step", "3"],
        "config: cannot read none.yaml": ["--config", "none.yaml"],
        "model.path: ./none is not a directory": ["--model.path", "./none"],
    },
    "report": {
        "run_directory: missing, needs a value: RUN_DIRECTORY": [],
        "none: has neither config.yaml nor metrics.jsonl": ["none"],
    },
    "sweep": {
        "vary: unknown option 'thought_lenght'; did you mean model.thought_length?": ["--vary", "thought_lenght"],
        "vary: model.lookahead=0: model.lookahead: got 0, needs at least 1": ["--vary", "lookahead=0"],
        "unknown option --training.step": ["--training.step", "3"],
        "config: cannot read none.yaml": ["--config", "none.yaml"],
    },
}
"""By command: what is said, and to which arguments."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "plain").mkdir()
    (tmp_path / "text.txt").write_text("A text.\n")
    (tmp_path / "candidates.jsonl").write_text('{"prompt": "a", "completions": ["b"]}\n')
    (tmp_path / "torn.yaml").write_text("training:\n  steps: [3\n")
    (tmp_path / "key.yaml").write_text("training:\n  step: 3\n")
    return tmp_path


def python(code: str, given: str = "", directory: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_has_mistakes_here() -> None:
    assert MISTAKES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_question_or_a_mistake_is_answered_without_torch(command: str, place: Path) -> None:
    lines = [[command, "--help"], *([command, *arguments] for arguments in MISTAKES[command].values())]
    answers = [json.loads(line) for line in python(RUN, json.dumps(lines), place).splitlines()]
    (status, said, imported), *others = answers
    assert (status, imported) == (0, [])
    assert "usage: " in said
    assert len(others) == len(MISTAKES[command])
    for (status, said, imported), told in zip(others, MISTAKES[command], strict=True):
        assert told in said
        assert said.splitlines()[-1].partition("error: ")[1]
        assert (status, imported) == (2, []), said
    assert sorted(path.name for path in place.iterdir() if path.name not in ("evaluation", "runs")) == [
        *("candidates.jsonl", "key.yaml", "plain", "text.txt", "torn.yaml")
    ]


def test_questions_to_the_quietstar_command_are_answered_without_torch() -> None:
    lines = [["--help"], ["--version"], ["tarin"], [], ["train", "--print_config"]]
    answers = [json.loads(line) for line in python(RUN, json.dumps(lines)).splitlines()]
    assert [(status, imported) for status, _, imported in answers] == [(0, []), (0, []), (2, []), (2, []), (0, [])]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["quietstar", "--help"], 0, "usage: quietstar COMMAND"),
        (["quietstar.train", "--help"], 0, "--training.steps"),
        (["quietstar.train", "--traning.steps", "3"], 2, "did you mean --training.steps?"),
        (["quietstar.train", "--data.path", "nowhere.txt"], 2, "error: "),
    ],
)
def test_the_command_itself_imports_no_torch(arguments: list[str], status: int, told: str, place: Path) -> None:
    """As a user calls it; Python lists what it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *arguments], capture_output=True, text=True, cwd=place
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == status and told in done.stdout + done.stderr
    assert "argparse" in imported or arguments[0] == "quietstar"
    assert not imported & set(HEAVY)


def test_submodules_are_attributes() -> None:
    """Before names were imported late, importing the package had imported them."""
    assert python("import quietstar; print(quietstar.objective.__name__, quietstar.evaluation.__name__)") == (
        "quietstar.objective quietstar.evaluation\n"
    )


def test_importing_the_package_is_light_and_its_names_come_when_they_are_used() -> None:
    said = python(
        f"import sys, quietstar; print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "import transformers; print('torch' in sys.modules, 'quietstar.model' in sys.modules)\n"
        "from quietstar import *; print(QuietStarForCausalLM.__module__, Verifier.__module__)"
    )
    assert said.splitlines() == [
        "[]",
        "False False",
        "quietstar.model.modeling quietstar.verifiers.verifier",
    ]


def test_the_package_has_the_names_that_it_lists() -> None:
    package = quietstar
    assert {public: getattr(package, public) for public in package.__all__}
    assert set(package.__all__) <= set(dir(package))
    told = {  # to a type checker
        alias.name: getattr(importlib.import_module(str(statement.module)), alias.name)
        for block in ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert told and all(getattr(package, public) is value for public, value in told.items())
    with pytest.raises(AttributeError, match="module 'quietstar' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "thinking"
    make_model("llama").save_pretrained(path)
    return path


AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"


def usual_and_more(ways: Iterable[str]) -> list[Any]:
    """Each takes a process that imports everything: only the first is among the tests that everyone runs."""
    first, *more = ways
    return [first, *map(slow, more)]


IMPORTS = {
    "transformers first": f"{AUTO}; import quietstar",
    "a lazy transformers first": f"import transformers, quietstar; {AUTO}",
    "quietstar first": f"import quietstar; {AUTO}",
    "a part of the model first": f"import quietstar.model.layers; {AUTO}",
    "quietstar twice": f"import importlib, quietstar as q; importlib.reload(q); {AUTO}; importlib.reload(q)",
    "in a thread": (
        "import threading, quietstar, transformers; "
        "thread = threading.Thread(target=lambda: transformers.AutoModelForCausalLM); thread.start(); "
        f"{AUTO}; thread.join()"
    ),
}


@pytest.mark.parametrize("order", usual_and_more(IMPORTS))
def test_the_auto_classes_know_the_model_whatever_is_imported_first(order: str, thinking: Path) -> None:
    said = python(
        f"{IMPORTS[order]}\n"
        f"print(type(AutoConfig.from_pretrained({str(thinking)!r})).__name__)\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(thinking)!r})).__name__)"
    )
    assert said.split() == ["QuietStarConfig", "QuietStarForCausalLM"]


@pytest.mark.parametrize("order", usual_and_more(["import transformers, quietstar", "import quietstar, transformers"]))
def test_the_auto_config_alone_knows_the_configuration(order: str, thinking: Path) -> None:
    said = python(f"{order}\nprint(type(transformers.AutoConfig.from_pretrained({str(thinking)!r})).__name__)")
    assert said.split() == ["QuietStarConfig"]


@pytest.mark.parametrize("module", usual_and_more(["model.loading", "inference.completing", "objective.learning"]))
def test_any_module_can_be_imported_first(module: str) -> None:
    """transformers imports its Auto classes in the middle of modules of its own that these import."""
    assert python(f"import quietstar.{module}; print('whole')") == "whole\n"


@pytest.mark.slow
def test_a_process_that_is_spawned_knows_the_model(thinking: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, sys, quietstar\n"
        "def make(config):\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    return type(AutoModelForCausalLM.from_config(config)).__name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(make, (quietstar.QuietStarConfig.from_pretrained(sys.argv[1]),)))\n"
    )
    done = subprocess.run([sys.executable, script, thinking], capture_output=True, text=True)
    assert done.stdout.strip() == "QuietStarForCausalLM", done.stderr


def test_the_version_is_the_packages() -> None:
    assert python(RUN, json.dumps([["--version"]])).find(f"quietstar {quietstar.__version__}") > 0


INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "module",
    ["quietstar.errors", "quietstar.imports", "quietstar.rank", "quietstar.config.command_line", "quietstar.verifiers"],
)
def test_ctrl_c_while_the_package_is_imported(tmp_path: Path, module: str) -> None:
    """It ended in a traceback until `run_command` began; only Python's own start is before the package."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"INTERRUPTED": module, "PYTHONPATH": paths}
    words = [sys.executable, "-m", "quietstar.rank", "--help"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert done.stderr in ("", "interrupted; what is finished is kept\n") and not done.stdout
