"""The store of samples: nothing that was written is lost, and nothing that is damaged goes unnoticed."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from quietstar.errors import CheckpointError, ConfigError
from quietstar.outer_loop.store import STORE_VERSION, Place, Sample, SampleStore
from quietstar.sampling.requests import Completion
from quietstar.tasks.task import Verdict

STRANGE = 'a\u2028b\x85c\x1ed \ud800 \udfff \U0001f600 \\ud83d \x00 "q" \r\n end'
"""Line separators of Unicode, lone surrogates, a character of four bytes, and what JSON writes in another way."""

FAILURE = "the check raised KeyError"


def sample(index: int, text: str = "x", key: str = "k", problem: str = "p\u2028") -> Sample:
    return Sample(Place(1, "sample", problem, index), key, 10 + index, False, Completion(text, -0.1 / 3, 4, "stop"))


def judged(one: Sample, correct: bool = True) -> Sample:
    return replace(one, verdict=Verdict("7", correct, None if correct else FAILURE))


@contextmanager
def opened(directory: Path) -> Iterator[tuple[SampleStore, list[str]]]:
    told: list[str] = []
    with SampleStore(directory, told.append) as store:
        yield store, told


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    hinted = Sample(Place(3, "rationalize", "q", 0), "h", 2**63 - 1, True, Completion(STRANGE, -1e-300, 9, "length"))
    ours = [sample(index, f"{index}{STRANGE}") for index in range(3)]
    with opened(tmp_path) as (store, told):
        store.add_samples([*ours, hinted])
        store.add_verdicts([judged(ours[0], False), judged(ours[1]), judged(hinted)])
        store.add_verdicts([judged(ours[0])])  # the last one counts
        expected = {("p\u2028", 0): judged(ours[0]), ("p\u2028", 1): judged(ours[1]), ("p\u2028", 2): ours[2]}
        assert store.samples("k") == expected and store.samples("h") == {("q", 0): judged(hinted)}
        assert store.samples("other") == {}
    with opened(tmp_path) as (store, more):
        assert store.samples("k") == expected and store.samples("h") == {("q", 0): judged(hinted)}
    assert told == more == []


def test_every_line_says_all_that_is_known(tmp_path: Path) -> None:
    with opened(tmp_path) as (store, _):
        store.add_samples([sample(0)])
        store.add_verdicts([judged(sample(0), False)])
    content = (tmp_path / "samples.jsonl").read_text("utf-8")
    header, made, found = [json.loads(line) for line in content.split("\n")[:-1]]
    place = {"key": "k", "iteration": 1, "purpose": "sample", "problem": "p\u2028", "index": 0}
    assert header == {"kind": "header", "key": "", "version": STORE_VERSION}
    generation = {"text": "x", "logprob": -0.1 / 3, "tokens": 4, "finish_reason": "stop"}
    assert made == {"kind": "sample", **place, "seed": 10, "hinted": False, **generation}
    assert found == {
        "kind": "verdict",
        **place,
        "answer": "7",
        "correct": False,
        "failure": "the check raised KeyError",
        "check": "",
    }


def test_torn_at_every_byte_of_the_last_line(tmp_path: Path) -> None:
    """All earlier lines are there, the torn one is cut off, and takes its place again."""
    ours = [sample(index, STRANGE) for index in range(3)]
    with opened(tmp_path) as (store, _):
        store.add_samples(ours)
    file = tmp_path / "samples.jsonl"
    content = file.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(content)):
        file.write_bytes(content[:size])
        with opened(tmp_path) as (store, told):
            assert list(store.samples("k").values()) == ours[:2]
            assert told == [f"{file}:4: the last line was torn ({size - last} bytes) and is cut off"][: size - last]
            other = sample(2, f"{STRANGE} again")
            store.add_samples([other])
            assert list(store.samples("k").values()) == [*ours[:2], other]
        with opened(tmp_path) as (store, told):
            assert list(store.samples("k").values()) == [*ours[:2], other] and told == []


def test_a_torn_header(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    file = tmp_path / "samples.jsonl"
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with opened(tmp_path):
            pass
        assert file.read_bytes() == content


DAMAGES = {
    "half a line": lambda line: line[: len(line) // 2] + b"\n",
    "zeros": lambda line: b"\0" * (len(line) - 1) + b"\n",
    "no JSON object": lambda line: b"17\n",
    "no such field": lambda line: line.replace(b'"text"', b'"tex\xc3\xa4"'),
    "no such kind": lambda line: line.replace(b'"sample"', b'"simple"', 1),
    "not UTF-8": lambda line: line.replace(b"x", b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_in_the_middle_is_named(damage: str, tmp_path: Path) -> None:
    with opened(tmp_path) as (store, _):
        store.add_samples([sample(0), sample(1)])
    file = tmp_path / "samples.jsonl"
    header, first, second = file.read_bytes().splitlines(keepends=True)
    damaged = DAMAGES[damage](first)
    assert damaged != first
    file.write_bytes(header + damaged + second)
    with pytest.raises(CheckpointError, match=r"samples\.jsonl:2: damaged .*delete this line"), opened(tmp_path):
        pass
    assert file.read_bytes() == header + damaged + second
    file.write_bytes(header + second)  # as the message says
    with opened(tmp_path) as (store, _):
        assert list(store.samples("k").values()) == [sample(1)]
    file.write_bytes(header + second + damaged)
    with opened(tmp_path) as (store, told):  # the last line of all is one that a crash can have torn
        assert list(store.samples("k").values()) == [sample(1)] and "samples.jsonl:3: the last line" in told[0]


def test_another_version(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    message = r"samples\.jsonl: written by version .* of the store.*output_dir"
    for first in ({"kind": "header", "version": STORE_VERSION + 1}, {"kind": "sample"}):
        file.write_text(json.dumps(first) + "\n" + json.dumps(first) + "\n")
        with pytest.raises(CheckpointError, match=message), opened(tmp_path):
            pass


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"output_dir: cannot write to .*samples\.jsonl"), opened(tmp_path):
        pass


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """No file may grow beyond a limit that lies within the lines to be written: half of them get there."""
    file = tmp_path / "samples.jsonl"
    with opened(tmp_path) as (store, _):
        store.add_samples([sample(0)])
        before = file.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 150, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"samples\.jsonl: cannot write \(File too large\)"):
                store.add_samples([sample(1), sample(2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == before and list(store.samples("k").values()) == [sample(0)]
        store.add_samples([sample(1)])
        assert list(store.samples("k").values()) == [sample(0), sample(1)]
    with opened(tmp_path) as (store, told):
        assert list(store.samples("k").values()) == [sample(0), sample(1)] and told == []


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """What a process has said to be stored is stored, wherever kill -9 has met it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with opened(tmp_path) as (store, _):
            for index in range(10**6):
                store.add_samples([sample(index, str(index) * 20_000)])
                os.write(writing, f"{index}\n".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as messages:
        said = [messages.readline() for _ in range(5)]
        os.kill(pid, signal.SIGKILL)
        said += messages.readlines()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with opened(tmp_path) as (store, _):
        found = [place for _, place in store.samples("k")]
    last = int(said[-1])
    assert last >= 4 and found in (list(range(last + 1)), list(range(last + 2)))
