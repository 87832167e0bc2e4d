"""Feeds the readers of YAML, JSON, JSON lines, manifests and answers with broken and hostile texts.

`python -m tests.fuzz --minutes 10` tries each target for ten minutes, `--target yaml` one of them. A reader may return
a value or raise a `QuietStarError`; anything else, more than `SECONDS` for one text, or more than `MEMORY` bytes
besides those of the start, is a fault, and hypothesis prints the smallest text that shows it. So is a number or a
verdict that the other order of a pair, or a second reading, would change.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from quietstar.config.command_line import Command, parse_config
from quietstar.config.commands import COMPARE, TRAIN
from quietstar.config.loops import ProblemOptions
from quietstar.config.parsing import parse_json, parse_yaml
from quietstar.data.sources import read_text
from quietstar.demos.options import read_finished
from quietstar.errors import QuietStarError
from quietstar.evaluation.answers import load_format
from quietstar.evaluation.item_store import ItemStore
from quietstar.evaluation.settings import EVALUATE, read_task
from quietstar.model.adapters import read_adapter_options
from quietstar.outer_loop.phases import Phases
from quietstar.outer_loop.store import SampleStore
from quietstar.outer_loop.training_set import Kept, read_kept
from quietstar.reporting.comparison_report import compared_before, write_comparison
from quietstar.reporting.loop_report import write_loop_report
from quietstar.reporting.train_report import write_report
from quietstar.runs.checkpoints import MANIFEST, STATE, load_state, verify_checkpoint
from quietstar.runs.directory import check_model_directory
from quietstar.runs.files import EventLog, append_json
from quietstar.tasks.expressions import same_expression
from quietstar.tasks.numbers import canonical_latex, canonical_number, numbers_in, plain_text
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Problem, Task
from quietstar.training.checkpoint import load_weights
from quietstar.training.metrics import read_metrics
from quietstar.verifiers.ranking import RankOptions, rank_file, read_candidates
from quietstar.verifiers.training import check_files, read_description
from tests.outer_loop.loop_files import candidates, iteration, write_loop_run

SECONDS = 5
MEMORY = 1 << 30
Reader = Callable[[Path], object]

YAML = (
    "preset: plain\nmodel: {lookahead: 4}\ntraining:\n  steps: 9\n  learning_rate: 1e-6\n",
    "problems: {task: gsm8k, timeout: 2}\nloop: {iterations: 2}\npresets: [star-paper]\n",
    "task: mine\ndataset_path: json\ndoc_to_text: '{{question}}'\nmetric_list: [{metric: acc}]\n",
    "d: &d {a: 1}\ne:\n  <<: *d\n  b: [*d, *d]\n",
    "steps: 2026-13-45\nx: !!float y\nz: 1:30\n",
)
WEIGHTS = {name: {"size": 2, "sha256": "0" * 64} for name in (STATE, "optimizer.safetensors")}
SUMMARY_OF_A_LOOP = {
    "task": "addition",
    "iterations": [iteration(number, True, ("1 digit", "2 digits")) for number in range(3)],
    "candidates": candidates(3, 4),
    "warnings": ["slow"],
}
JSON = (
    '[{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}, NaN]',
    json.dumps(SUMMARY_OF_A_LOOP),
    '{"directories": {"star": "../star"}, "equal_budget": {"budget": 4, "asked": true}}',
    '{"phase": "sample", "iteration": 1, "key": "k", "inputs": {"seed": 1}, "outputs": {"key": "k", "samples": 3}}',
    '{"samples": [{"text": 0, "prefix": "a", "thought": "b", "future": "c", "reward": 0.5, "place": 3}]}',
    '[{"time": 1.5, "python": "3.11", "gpus": [{"name": "H200", "memory": 1}], "packages": {"torch": "2.11"}}]',
    json.dumps(
        {"format": 1, "kind": "dpo", "score": "sum", "beta": 0.1, "files": WEIGHTS, "tokenizer": {"sha256": ""}}
    ),
    '{"r": 8, "lora_alpha": 16.0, "target_modules": ["q"], "base_model_name_or_path": "a/b", "model_type": "llama"}',
    '{"weight_map": {"a": "model-00001-of-00002.safetensors"}, "metadata": {"total_size": 9}}',
    '{"nll": 1.5, "options": {"training.steps": 9}}',
)
PROBLEMS = (
    {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2", "id": 1},
    {"problem": "1 + 1?", "solution": "$\\boxed{2}$", "type": "Algebra", "level": "Level 1", "unique_id": "a"},
    {"task_id": 1, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f() is None"], "test_setup_code": ""},
    {"prompt": "def f():\n", "canonical_solution": "pass", "test": "def check(f): pass", "entry_point": "f"},
    {
        "id": "q",
        "answerKey": "A",
        "question": {"stem": "What?", "choices": [{"label": label, "text": label} for label in "ABCDE"]},
    },
    {"id": "q", "answerKey": "A", "question": "What?", "choices": {"label": [*"ABCDE"], "text": [*"vwxyz"]}},
    {"text": "A text."},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": [{"text": "Yes"}]}]},
)
SAMPLED = {"iteration": 1, "purpose": "sample", "problem": "p", "index": 0}
LINES = (
    '{"step": 1, "split": "train", "loss": 2.5}\n{"step": 2, "split": "eval", "loss": null}\n',
    '{"time": 1.5, "step": 1, "event": "sample finished", "message": "2.0 s"}\n',
    '{"kind": "header", "key": "", "version": 1}\n'
    + json.dumps({"kind": "sample", "key": "k", **SAMPLED, "seed": 1, "hinted": False, "text": "x", "logprob": -1.5})
    + "\n",
    json.dumps({"kind": "verdict", "key": "k", **SAMPLED, "answer": "7", "correct": True, "failure": None, "check": ""})
    + "\n",
    json.dumps(dataclasses.asdict(Kept("p", "Q: ?\nA:", " 7", "sample", 1, 0, True))) + "\n",
    '{"key": "k", "off": {"nll": 1.5}, "on": [0.5, 1]}\n',
    '{"id": 1, "prompt": "1 + 1?", "completions": ["2", "3"], "answers": ["2", null], "tokenizer": {"sha256": ""}}\n',
    *(json.dumps(problem) + "\n" for problem in PROBLEMS),
    json.dumps(PROBLEMS),
    'id,question,answer\n1,"1 + 1?",2\n',
)
STATES = (
    '{"format": 2, "step": 100, "best": {"step": null, "loss": 1e-3}, "position": {}, "record": {"a": 1}}',
    '{"weight_map": {"a": "optimizer.safetensors"}}',
)
MANIFESTS = (
    json.dumps({"format": 2, "files": WEIGHTS}),
    '{"format": 2, "files": {"../x": {"size": -1, "sha256": ""}}}',
)
BETWEEN = "\n\x1e"
"""Separator of a completion and another answer."""
ANSWERS = (
    "So 3 + 4 = 7.\n#### 7",
    f"The answer is (B).{BETWEEN}b",
    f"Thus \\boxed{{\\frac{{1}}{{2}}}}{BETWEEN}0.5",
    f"(x+1)^2{BETWEEN}x^{{2}} + 2x + 1",
    f"\\sqrt[3]{{8}}, \\sin(\\pi/2){BETWEEN}2, 1",
    f"\\log_2 8 + 5! - \\binom{{5}}{{2}}{BETWEEN}$113$",
    "```python\ndef f(x):\n    return x\n```",
    f"#### $1,234.50{BETWEEN}1.2345 x 10^3 dollars",
)
PIECES = (
    *(
        "[",
        "{",
        "}",
        "]",
        "&a ",
        "*a",
        "<<: ",
        "- ",
        ": ",
        "\n",
        "\0",
        "\ufeff",
        "\u2028",
        "!!float ",
        "9" * 5000,
        "1e999",
    ),
    *(
        "[" * 2000,
        '{"a":' * 500,
        "\\ud800",
        '"',
        "NaN",
        "null",
        "-1",
        "true",
        "../",
        "\\boxed{",
        "{" * 200,
        "^",
        "\\frac",
    ),
    *(
        "a: &b [*a, *a]\n",
        "!!python/object/apply:os.getcwd []",
        "٣",
        "½",
        "1,",
        "%",
        "**",
        "(" * 300,
        "!" * 50,
        "9**9**9",
    ),
)
VALUES = (
    "null",
    "true",
    "-1",
    "1e999",
    "1e-400",
    "0.5",
    '""',
    '"x"',
    "[]",
    "{}",
    "[[1]]",
    '{"a": [1]}',
    '["a", 1]',
    "9" * 20,
)
_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.e+-]*|true|false|null|\{[^{}]*\}|\[[^\[\]]*\]')


def mutations(texts: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    """Returns random bytes, and valid texts in which pieces are cut out, repeated or put in, or values exchanged."""
    edit = st.tuples(st.integers(0, 400), st.integers(0, 40), st.sampled_from(PIECES) | st.text(max_size=8))
    exchange = st.tuples(st.integers(0, 400), st.none(), st.sampled_from(VALUES))

    def edited(start: str, edits: list[tuple[int, int | None, str]]) -> bytes:
        for place, length, piece in edits:
            if length is not None:
                at = place % (len(start) + 1)
                start = start[:at] + piece + start[at + length :]
            elif values := list(_VALUE.finditer(start)):
                value = values[place % len(values)]
                start = start[: value.start()] + piece + start[value.end() :]
        return start.encode("utf-8", "surrogatepass")

    edits = st.lists(edit, min_size=1, max_size=6) | st.lists(exchange, min_size=1, max_size=4)
    return st.binary(max_size=400) | st.builds(edited, st.sampled_from(texts), edits)


def read_options(file: Path) -> None:
    """Reads a text as values of options on the command line: one that is a number, and one that is a text."""
    text = file.read_text("utf-8", "replace").replace("\0", "")
    for option in ("training.steps", "training.learning_rate", "data.path"):
        with suppress(QuietStarError):
            parse_config(TRAIN, [f"--{option}={text}", "--preset", "plain", "--model.path", "a/b"])


def read_phase(directory: Path) -> None:
    """Reads a text as the manifest of a phase that was done, perhaps with other inputs."""
    phases = Phases(directory, EventLog(directory / "other-events.jsonl"), False, str)
    phases.run(1, "build", {"seed": 1}, lambda key: {"key": key})


def read_store(directory: Path) -> None:
    """Reads a text as the store of samples of a run."""
    with SampleStore(directory, str) as store:
        store.samples("k")


def read_items(directory: Path) -> None:
    """Reads a text as the items that an evaluation keeps."""
    store = ItemStore(directory / "evaluation_items.jsonl")
    store.get("k")
    store.close()


def read_ranking(directory: Path) -> None:
    """Goes on with a text as a ranking that an earlier run left."""
    (directory / "candidates.jsonl").write_text('{"prompt": "?", "completions": ["1", "2"], "answers": ["1", "2"]}\n')
    with suppress_output():
        rank_file(
            RankOptions(candidates=directory / "candidates.jsonl", by="majority", out=directory / "ranking.jsonl")
        )


def read_problems(directory: Path) -> None:
    """Reads a text as the problems of each task that reads files, and as a training text."""
    for file in (directory / "rows.jsonl", directory / "rows.json", directory / "rows.csv"):
        for name in ("gsm8k", "math", "commonsenseqa", "code", "jsonl"):
            with suppress(QuietStarError):
                task = load_task(name, ProblemOptions(path=str(file)))
                for problem in task.problems("train"):
                    task.prompt(problem, hint=True), task.solution(problem)
        for field in ("text", "messages"):
            with suppress(QuietStarError):
                read_text(file, field)


def read_weights(checkpoint: Path) -> None:
    """Reads a text as the index of a checkpoint's weights."""
    load_weights(nn.Linear(1, 1), checkpoint)


@cache
def task_of(name: str) -> Task:
    return load_task(name, ProblemOptions())


def read_answer(file: Path) -> None:
    """Lets the tasks and the evaluation read and judge a completion, against gold answers and another answer."""
    text, _, other = file.read_text("utf-8", "replace").partition(BETWEEN)
    for name, gold in GOLDS.items():
        task, problem = task_of(name), Problem("1", QUESTION, gold)
        answer = task.extract(text)
        if answer is not None:
            task.canonical(answer)
        if name != "code":  # which starts processes
            assert task.check(problem, text).failure is None
            task.check(dataclasses.replace(problem, answer=other), text)
        accepted = task.accepted(text)
        task.steps(text), task.solution_key(text), task.right_inside(problem, text), task.quotes_hint(problem, text)
        assert task.extract(accepted) == answer, (name, accepted, answer)
    for name in ("gsm8k", "commonsenseqa"):
        form, problem = load_format(name, None), Problem("1", QUESTION, GOLDS[name])
        form.lenient(problem, text), form.concluded(text), form.for_checker(text), form.chain(text)
        form.is_complete(text), form.is_concluded(text), form.is_chain_complete(text)


def read_numbers(file: Path) -> None:
    """Reads two texts as numbers and as expressions, and compares them in both orders."""
    one, _, other = file.read_text("utf-8", "replace").partition(BETWEEN)
    for text in (one, other):
        for number in (canonical_number(text), canonical_number(text, units=False), *dict(numbers_in(text))):
            assert number is None or canonical_number(number) == number, (text, number)
        canonical_latex(text), plain_text(text)
    assert same_expression(one, other) == same_expression(other, one), (one, other)
    equal = canonical_number(one, units=False), canonical_number(other, units=False)
    assert None in equal or same_expression(one, other) == (equal[0] == equal[1]), (one, other)


QUESTION = "What?\nAnswer Choices:\n(a) v\n(b) w\n(c) x\n(d) y\n(e) z"
GOLDS = {
    "gsm8k": "7",
    "math": "1/2",
    "commonsenseqa": "b",
    "jsonl": "x^2 + 2x + 1",
    "code": "assert 1",
}


@contextmanager
def suppress_output() -> Iterator[None]:
    """Keeps what is told on the standard streams from the screen."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@dataclasses.dataclass(frozen=True)
class Target:
    """Readers that are tried with the same texts.

    Args:
        texts: Texts that are changed into others.
        files: Names of the files that hold the text.
        readers: Readers of the text, each a function of the directory with these files.
    """

    texts: tuple[str, ...]
    files: tuple[str, ...]
    readers: tuple[Reader, ...]


COMMANDS: tuple[Command[Any], ...] = (TRAIN, COMPARE, EVALUATE)  # all commands have one reader
CHECKPOINT = "step-00000100"
TARGETS = {
    "yaml": Target(
        YAML,
        ("config.yaml", "task.yaml"),
        (
            lambda place: repr(parse_yaml((place / "config.yaml").read_bytes(), "file")),
            *(
                lambda place, command=command: parse_config(command, ["--config", str(place / "config.yaml")])
                for command in COMMANDS
            ),
            lambda place: read_options(place / "config.yaml"),
            lambda place: read_task(str(place / "task.yaml")),
            write_report,
        ),
    ),
    "json": Target(
        JSON,
        (
            *("summary.json", "comparison.json", "environment.json", "samples/step-00000001.json", "config.json"),
            *("iteration-01/build.json", "iteration-02/sample.json", "verifier.json", "adapter/adapter_config.json"),
            *("model.safetensors.index.json", "finished.json", "list.json"),
        ),
        (
            lambda place: json.dumps(parse_json((place / "config.json").read_bytes())).encode(),
            write_report,
            write_loop_report,
            compared_before,
            lambda place: write_comparison(place / "compared", {"one": place}),
            read_phase,
            lambda place: check_files(place, read_description(place)),
            check_model_directory,
            read_adapter_options,
            lambda place: read_finished(place / "finished.json", {"training.steps": 9}),
            lambda place: append_json(place / "list.json", 1),
        ),
    ),
    "jsonl": Target(
        LINES,
        (
            *("metrics.jsonl", "events.jsonl", "samples.jsonl", "iteration-02/kept.jsonl", "evaluation_items.jsonl"),
            *("ranking.jsonl", "rows.jsonl", "rows.json", "rows.csv"),
        ),
        (
            lambda place: read_metrics(place / "metrics.jsonl"),
            write_report,
            write_loop_report,
            lambda place: read_kept(place / "iteration-02/kept.jsonl"),
            read_items,
            read_ranking,
            lambda place: read_candidates(place / "rows.jsonl"),
            read_problems,
            read_store,
        ),
    ),
    "manifest": Target(
        (*MANIFESTS, *STATES),
        tuple(f"{CHECKPOINT}/{name}" for name in (MANIFEST, STATE, "model.safetensors.index.json")),
        tuple(
            lambda place, read=read: read(place / CHECKPOINT) for read in (verify_checkpoint, load_state, read_weights)
        ),
    ),
    "answer": Target(
        ANSWERS,
        ("answer.txt",),
        (lambda place: read_answer(place / "answer.txt"), lambda place: read_numbers(place / "answer.txt")),
    ),
}


@contextmanager
def guarded() -> Iterator[None]:
    """Ends what takes longer than `SECONDS`."""

    def late(signal_number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a target was tried with, and what it took.

    Args:
        texts: Number of texts.
        seconds: Seconds for all of them.
        slowest: Seconds for the slowest one.
        memory: Largest resident memory of the process above that of the start, in MiB.
    """

    texts: int
    seconds: float
    slowest: float
    memory: float

    def __str__(self) -> str:
        return (
            f"{self.texts:,} texts in {self.seconds:,.0f} s, the slowest in {self.slowest:.2f} s, "
            f"at most {self.memory:.0f} MiB above the start"
        )


def fuzz(name: str, examples: int, seconds: float = float("inf")) -> Tried:
    """Tries the readers of a target, and returns with what.

    Args:
        name: Name of the target, of `TARGETS`.
        examples: Number of texts in one round.
        seconds: Time after which no further round begins; infinity: one round, always the same.
    """
    target = TARGETS[name]
    once = seconds == float("inf")
    start, before, times = time.monotonic(), resident_memory("VmRSS"), [0.0]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            derandomize=once,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations(target.texts))
        def attempt(content: bytes) -> None:
            began = time.monotonic()
            for name in target.files:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(content)
            with guarded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for read in target.readers:
                    with suppress(QuietStarError):
                        read(place)
            times.append(time.monotonic() - began)

        write_loop_run(place)
        (place / "compared").mkdir()
        attempt()
        while not once and time.monotonic() < start + seconds:
            attempt()
    memory = (resident_memory("VmHWM") - before) / 2**20
    return Tried(len(times) - 1, time.monotonic() - start, max(times), memory)


def resident_memory(name: str) -> int:
    """Returns a size in bytes that Linux tells of this process, such as `VmHWM`, the peak of its resident memory."""
    status = Path("/proc/self/status").read_text("utf-8", "replace")
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def limit_memory() -> None:
    """Lets this process take `MEMORY` bytes more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def main() -> None:
    """Reads the command line and tries the readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="minutes for each reader")
    parser.add_argument("--target", choices=TARGETS, action="append", help="reader to try; by default all")
    arguments = parser.parse_args()
    limit_memory()
    faults = 0
    for target in arguments.target or TARGETS:
        try:
            print(f"{target}: no fault; {fuzz(target, 100, 60 * arguments.minutes)}", flush=True)
        except Exception:
            faults += 1
            print(f"{target}: a fault\n{traceback.format_exc()}", flush=True)
    raise SystemExit(faults)


if __name__ == "__main__":
    main()
