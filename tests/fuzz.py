"""Feeds the readers of YAML, JSON, JSON lines, manifests and answers with broken and hostile texts.

`python -m tests.fuzz --minutes 10` tries each reader for ten minutes, `--target yaml` one of them. A reader may return
a value or raise a `QuietStarError`; anything else, more than `SECONDS` for one input, or more than `MEMORY` bytes
besides those of the start, is a fault, and hypothesis prints the smallest input that shows it.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quietstar.config.commands import parse_train_config
from quietstar.config.loops import ProblemOptions
from quietstar.config.parsing import parse_json, parse_yaml
from quietstar.errors import QuietStarError
from quietstar.evaluation.answers import load_format
from quietstar.runs.checkpoints import MANIFEST, STATE, load_state, verify_checkpoint
from quietstar.runs.directory import read_run
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Problem
from quietstar.training.metrics import read_metrics

SECONDS = 5
MEMORY = 1 << 30

YAML = (
    "preset: plain\nmodel: {lookahead: 4}\ntraining:\n  steps: 9\n  learning_rate: 1e-6\n",
    "d: &d {a: 1}\ne:\n  <<: *d\n  b: [*d, *d]\n",
    "steps: 2026-13-45\nx: !!float y\nz: 1:30\n",
)
JSON = (
    '{"format": 2, "step": 100, "best": {"step": null, "loss": 1e-3}, "position": {}}',
    '[{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}, NaN]',
)
LINES = ('{"step": 1, "split": "train", "loss": 2.5}\n{"step": 2, "split": "eval", "loss": null}\n',)
FILES = {"format": 2, "files": {name: {"size": 2, "sha256": "0" * 64} for name in (STATE, "optimizer.safetensors")}}
MANIFESTS = (json.dumps(FILES), '{"format": 2, "files": {"../x": {"size": -1, "sha256": ""}}}')
ANSWERS = (
    "So 3 + 4 = 7.\n#### 7",
    "The answer is (B).",
    "Thus \\boxed{\\frac{1}{2}}",
    "```python\ndef f(x):\n    return x\n```",
    "#### $1,234.50",
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


def mutations(texts: tuple[str, ...]) -> st.SearchStrategy[bytes]:
    """Returns random bytes, and valid texts in which pieces are cut out, repeated or put in."""
    edit = st.tuples(st.integers(0, 400), st.integers(0, 40), st.sampled_from(PIECES) | st.text(max_size=8))

    def edited(start: str, edits: list[tuple[int, int, str]]) -> bytes:
        for place, length, piece in edits:
            at = place % (len(start) + 1)
            start = start[:at] + piece + start[at + length :]
        return start.encode("utf-8", "surrogatepass")

    return st.binary(max_size=400) | st.builds(edited, st.sampled_from(texts), st.lists(edit, min_size=1, max_size=6))


def read_yaml(content: bytes, place: Path) -> None:
    """Reads a text as YAML, as a file of options, as a value of an option and as the options of a run."""
    file = place / "config.yaml"
    file.write_bytes(content)
    read_run(place)
    text = content.decode("utf-8", "replace").replace("\0", "")
    for arguments in (["--config", str(file)], [f"--training.steps={text}"], [f"--data.path={text}"]):
        with suppress(QuietStarError):
            parse_train_config([*arguments, "--preset", "plain", "--model.path", "a/b"])
    with suppress(QuietStarError):
        repr(parse_yaml(content, "file"))


def read_json(content: bytes, place: Path) -> None:
    """Reads a text as JSON."""
    with suppress(QuietStarError):
        json.dumps(parse_json(content)).encode()


def read_lines(content: bytes, place: Path) -> None:
    """Reads a text as the metrics and the events of a run."""
    for name in ("metrics.jsonl", "events.jsonl"):
        (place / name).write_bytes(content)
    read_run(place)
    with suppress(QuietStarError):
        read_metrics(place / "metrics.jsonl")


def read_manifest(content: bytes, place: Path) -> None:
    """Reads a text as the manifest and as the state of a checkpoint."""
    checkpoint = place / "step-00000100"
    checkpoint.mkdir(exist_ok=True)
    for name in (MANIFEST, STATE):
        (checkpoint / name).write_bytes(content)
    (checkpoint / "optimizer.safetensors").write_bytes(b"{}")
    for read in (verify_checkpoint, load_state):
        with suppress(QuietStarError):
            read(checkpoint)


def read_answer(content: bytes, place: Path) -> None:
    """Lets the tasks and the evaluation read and judge a completion."""
    text = content.decode("utf-8", "replace")
    for name in ("gsm8k", "math", "commonsenseqa", "code", "jsonl"):
        task = load_task(name, ProblemOptions())
        with suppress(QuietStarError):
            answer = task.extract(text)
            if answer is not None:
                task.canonical(answer)
    for name in ("gsm8k", "commonsenseqa"):
        form = load_format(name, None)
        problem = Problem("1", "What?", "7" if name == "gsm8k" else "B")
        with suppress(QuietStarError):
            form.lenient(problem, text)
            form.concluded(text)
            form.for_checker(text)


TARGETS: dict[str, tuple[tuple[str, ...], Callable[[bytes, Path], None]]] = {
    "yaml": (YAML, read_yaml),
    "json": (JSON, read_json),
    "jsonl": (LINES, read_lines),
    "manifest": ((*MANIFESTS, JSON[0]), read_manifest),
    "answer": (ANSWERS, read_answer),
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


def fuzz(target: str, examples: int, seconds: float = float("inf")) -> int:
    """Tries a reader, and returns with how many texts.

    Args:
        target: Name of the reader, of `TARGETS`.
        examples: Number of texts in one round.
        seconds: Time after which no further round begins; infinity: one round, always the same.
    """
    texts, read = TARGETS[target]
    once = seconds == float("inf")
    until, tried = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as directory:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=once,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations(texts))
        def attempt(content: bytes) -> None:
            nonlocal tried
            tried += 1
            with guarded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(content, Path(directory))

        attempt()
        while not once and time.monotonic() < until:
            attempt()
    return tried


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
    for target in arguments.target or TARGETS:
        tried = fuzz(target, 1000, 60 * arguments.minutes)
        print(f"{target}: {tried:,} texts, no fault", flush=True)


if __name__ == "__main__":
    main()
