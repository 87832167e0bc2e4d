"""The readers of YAML and JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from quietstar.config.commands import parse_train_config
from quietstar.config.parsing import MAX_DEPTH, check_type, parse_json, parse_yaml, read_json_file
from quietstar.config.training import TrainingOptions
from quietstar.errors import ConfigError, DataError
from quietstar.training.schedule import schedule_change
from tests.fuzz import TARGETS, fuzz

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"f:\d+: .*aliases stand for more than"),
        (MERGES, r"f:\d+: .*(aliases stand for more than|nested too deeply)"),
        (f"- &a {'x' * 200_000}\n- [*a, *a, *a, *a, *a, *a]", "f:2: .*aliases stand for more than"),
        ("a: &x {b: [*x]}", "f:1: .*stands inside the value"),
        ("- " * (MAX_DEPTH + 1) + "x", "f:1: .*nested too deeply"),
        ("a: 1\nb: 2\na: 3", "f:3: .*'a' is given twice, the first time in line 1"),
        ("a: {b: 1,\n b: 2}", "f:2: .*'b' is given twice"),
        ("1: a\n0x1: b", "f:2: .*the key 1 is given twice"),
        ("? [a]\n: 1", "f:1: .*a key that is a list"),
        ("a: !!timestamp 2026-13-45", "f:1: .*could not determine a constructor"),
        ("a: !!set {b}", "f:1: .*could not determine a constructor"),
        ("\na: 12:30:45", "f:2: .*base 60"),
        *(
            (f"\na: {number}", "f:2: .*octal in YAML 1.1 alone")
            for number in ("010", "-07", "+0777", "00", "0_1", "01_0")
        ),
        ("[1, 012]", "f:1: .*012 is octal"),
        ("012: a", "f:1: .*012 is octal"),
        (f"a: {'7' * 4999}", "f:1: .*a number of 4,999 characters"),
        (f"a: 0x{'f' * 9999}", "f:1: .*a number of 10,001 characters"),
        ("a: !!bool maybe", "f:1: .*'maybe' is no bool"),
        ("a: !!int ''", "f:1: .*'' is no int"),
        ('a: "\\0"', "f:1: .*NUL"),
        ("a: b".encode("utf-16"), "f: not UTF-8 text"),
        (" " * (1 << 19), "f: has more than 262,144 bytes, needs at most"),
    ],
)
def test_yaml_that_is_refused(text: str | bytes, message: str) -> None:
    """A bomb of some hundred bytes took all memory when its value was printed; others ended in a traceback."""
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        parse_yaml(text, "f")
    assert time.monotonic() - start < 2 and len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "d: &d {a: 1, b: 2}\ne:\n  <<: *d\n  b: 3\nf: [*d, *d]",
        "a: 1_000\nb: 0x1f\nc: .5\nd: 'it''s'\ne: |\n  two\n  lines\n",
        "a: null\nb: ~\nc: yes\nd: 1.5e+3\ne: '1:30'\n",
        "a: 0\nb: -0\nc: 0x10\nd: 0.10\ne: '010'\nf: 08\ng: 100\nh: 0b11\n",
        "- " * MAX_DEPTH + "[]" if MAX_DEPTH < 1 else "- " * 60 + "x",
        "",
        "# nothing",
    ],
)
def test_yaml_that_is_read_as_by_pyyaml(text: str) -> None:
    assert parse_yaml(text, "f") == yaml.safe_load(text)


def test_a_date_is_a_text_and_a_byte_order_mark_is_none() -> None:
    assert parse_yaml("\ufeffa: 2026-13-45\nb: 2026-01-02", "f") == {"a": "2026-13-45", "b": "2026-01-02"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ("7" * 5000, "more than 307 digits"),
        ('{"a": -' + "7" * 400 + "}", "more than 307 digits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ('["\\ud800"]', "lone surrogate"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        ("", "not valid JSON: Expecting value at column 1"),
        ('{\n"a": x}', "not valid JSON: Expecting value at line 2, column 6"),
    ],
)
def test_json_that_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_json(text)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True]}, "\N{GRINNING FACE}", [[]] * 500, 10**300, {}])
def test_json_that_is_read(value: object) -> None:
    assert parse_json(json.dumps(value)) == value == parse_json("\ufeff" + json.dumps(value, ensure_ascii=False))


@pytest.mark.parametrize(
    "text",
    [
        "{" + ", ".join(f'"{index}": 0' for index in range(100_000)) + ', "99999": 1}',
        '{"a": {' + ", ".join(f'"{index % 50_000}": 0' for index in range(100_000)) + "}}",
        "[" + ", ".join("7" * 300 for _ in range(60_000)) + ", " + "7" * 309 + "]",
        "".join(f"{index}: 0\n" for index in range(20_000)) + "19999: 1",
        "{" + ", ".join(f"k{index}: 0" for index in range(18_000)) + ", k17999: 1}",
    ],
    ids=["twice at the end", "twice the half", "long numbers", "YAML lines", "YAML flow"],
)
def test_the_time_is_in_proportion_to_the_text(text: str) -> None:
    """Each name was counted among all: 20,000 names took 5 s, and a file may have some millions."""
    start = time.process_time()
    with pytest.raises(DataError, match=r"twice|more than 307 digits"):
        parse_json(text) if text.startswith(('{"', "[")) else parse_yaml(text, "f")
    assert time.process_time() - start < 4


SPARSE = """
import re, sys
from pathlib import Path
from quietstar.errors import QuietStarError
from quietstar.{module} import {name}
try:
    {name}(Path(sys.argv[1]))
except QuietStarError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""


@pytest.mark.parametrize(
    ("module", "name", "file"),
    [
        ("runs.checkpoints", "read_json", "state.json"),
        ("runs.directory", "check_model_directory", "config.json"),
        ("runs.directory", "check_model_directory", "generation_config.json"),
        ("runs.directory", "check_model_directory", "model.safetensors.index.json"),
        ("runs.directory", "read_run", "environment.json"),
        ("runs.directory", "read_run", "events.jsonl"),
        ("runs.directory", "read_run", "config.yaml"),
        ("reporting.loop_files", "read_summary", "summary.json"),
        ("reporting.comparison_report", "compared_before", "comparison.json"),
    ],
)
def test_a_large_file_is_not_in_memory(tmp_path: Path, module: str, name: str, file: str) -> None:
    """The size was looked at when the whole file was in memory: a sparse file of 4 GiB took 4 GiB."""
    (tmp_path / "metrics.jsonl").touch()
    with (tmp_path / file).open("wb") as large:
        large.truncate(600 << 20)
    path = tmp_path / file if name == "read_json" else tmp_path
    program = SPARSE.format(module=module, name=name)
    said = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    *message, peak = said.splitlines()
    assert int(peak) < 300
    assert name == "read_run" or "has more than 33,554,432 bytes" in message[0]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes
    with closing(socket.socket(socket.AF_UNIX)) as one:
        one.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("make", [pipe, listening, lambda path: path.symlink_to("/dev/zero")])
def test_what_may_never_end_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A reader of a named pipe waited for a writer for ever."""
    make(tmp_path / "a.json")
    with pytest.raises((DataError, OSError), match=r"is a pipe, a socket or a device|No such device"):
        read_json_file(tmp_path / "a.json")


@dataclass
class Thing:
    name: str
    size: int | None = None
    parts: dict[str, list[float]] | None = None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"thing: got \[\], needs an object"),
        ({}, "thing: name is missing"),
        ({"name": None}, r"thing\.name: got None, needs a text"),
        ({"name": "a", "size": True}, r"thing\.size: got True, needs a whole number or null"),
        ({"name": "a", "size": 1.0}, r"thing\.size: got 1\.0"),
        ({"name": "a", "parts": {"b": [1, "c"]}}, r"thing\.parts\.b\[1\]: got 'c', needs a number"),
    ],
)
def test_wrong_types_are_named(value: object, message: str) -> None:
    check_type({"name": "a", "size": 3, "parts": {"b": [1, 2.5]}, "more": []}, Thing, "thing")
    with pytest.raises(DataError, match=message):
        check_type(value, Thing, "thing")


@pytest.mark.parametrize(
    ("option", "value", "needs"),
    [
        ("training.steps", "[" * 3000, "a whole number"),
        ("training.steps", "&a [*a]", "a whole number"),
        ("training.steps", BOMB, "a whole number"),
        ("training.steps", "9" * 5000, "a whole number"),
        ("training.steps", "1:30", "a whole number"),
        ("training.steps", str(2**63), "at most 64 bits"),
        ("training.learning_rate", "!!timestamp 2026-13-45", "a number"),
        ("training.learning_rate", ".inf", "a finite number"),
        ("training.seed", "-1", "0 to 4294967295"),
        ("training.seed", str(2**32), "0 to 4294967295"),
        ("training.threads", "1000000", "1 to 1024"),
        ("training.threads", "0", "1 to 1024"),
        ("data.workers", "5000", "0 to 1024"),
    ],
)
def test_hostile_values_on_the_command_line(option: str, value: str, needs: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}: got .*{needs}") as caught:
        parse_train_config([f"--{option}={value}", "--preset=plain", "--model.path=a/b", "--data.path=c"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", ["*a", "[[[[", "2026-13-45", "1:30", "{a: b}", "&a [*a]", "9" * 200])
def test_a_text_may_look_like_yaml(value: str) -> None:
    config = parse_train_config([f"--data.path={value}", "--preset=plain", "--model.path=a/b"])
    assert config.data.path == value


@pytest.mark.parametrize(
    ("schedule", "before", "now", "done", "differ"),
    [
        ("cosine", 60, 90, 60, True),
        ("linear", 60, 90, 30, True),
        ("linear", 90, 60, 30, True),
        ("constant", 60, 90, 60, False),
        ("cosine", 60, 60, 40, False),
        ("cosine", 60, 90, 20, False),
    ],
)
def test_a_longer_run_is_told_of_its_schedule(schedule: str, before: int, now: int, done: int, differ: bool) -> None:
    """A run continued from 6 to 9 steps under a cosine was taken for a run of 9; in the warm-up both are one."""
    options = TrainingOptions(schedule=schedule, steps=now, warmup_steps=20)  # type: ignore[arg-type]  # a text
    message = schedule_change(before, options, done)
    assert (f"training.steps was {before} and is {now}" in message) is differ and bool(message) is differ


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_fuzz_run(target: str) -> None:
    assert fuzz(target, 60).texts >= 60
