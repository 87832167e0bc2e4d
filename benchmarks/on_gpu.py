"""Everything that a GPU is needed for, in minutes: parts in order of value, each with a limit, kept as they are made.

    python benchmarks/on_gpu.py --minutes 9
    python benchmarks/on_gpu.py --minutes 4 --resume          # the parts that are missing
    python benchmarks/on_gpu.py --page on_gpu.tgz             # elsewhere: benchmarks/results/CARD.md from the archive
    python benchmarks/on_gpu.py --minutes 9 --model DIR --texts FILE ...   # and real_model.py

It needs torch, Triton, transformers and pytest; nothing of this project has to be installed. Each part is a process
group that is ended at its limit. Rows are written as they are measured, and after each part the whole folder is packed
into one archive, so that a machine that is taken away costs one part at most. A page, named after the card, has all
parts, and says of the others that they were not reached.

The model's directory and the texts are files of that machine, which has no network: copy them there, a large file in
pieces (`split -b 48M`, and `cat` there). What this part trains is beside the results, in NAME.runs, and not packed:
on the same machine `--resume` goes on from it.

`--dry-run` prints the commands. `--simulate` needs no GPU: it visits a machine with parts that work, fail, hang and
overrun, is killed in the middle, goes on, and fails if anything is lost, done twice or left running.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks import bars
from benchmarks.environment import ROOT, commit, cpu_name, markdown_table, replace_text, version
from benchmarks.script import Benchmark

DONE, FAILED, CUT, NOT_REACHED = "done", "failed", "cut", "not reached"
STATE = "on_gpu.json"
LEAST_SECONDS = 8
"""Time below which no part begins: Python and torch alone take that."""
GRACE_SECONDS = 4
"""Between the interrupt at a part's limit, at which it writes what it has, and its end."""
GPU_TESTS = ["tests/kernels", "tests/model/test_backends.py", "tests/model/test_fused_layers.py"]
SMOKE_TESTS = (
    "every_head_size and 128-dtype0 or no_bit and dtype0 or nothing_waits and triton or graph or same_seed or "
    "dtype0-True-32002"
)
BIG_TESTS = "more_elements or text_of_a or more_logits or memory_is or device_asserts or inductor"
MISTRAL = ["--models", "mistral-7b"]
ATTENTION = ["benchmarks/thought_attention.py", *MISTRAL, "--lengths", "256", "--stream-lengths", "16"]


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        name: Of the part and its folder.
        seconds: Limit of its time.
        about: What it shows.
        needs: What must be there besides the GPU.
        words: Arguments of Python.
        folders: More arguments of a script of benchmarks/: where its results go, and what it keeps between attempts.
        inputs: Files of the user that it measures: with others its results are others.
    """

    name: str
    seconds: int
    about: str
    needs: str
    words: Sequence[str]
    folders: Sequence[str] = ("--output-dir", "{results}")
    inputs: Sequence[str] = ()

    def command(self, folder: Path) -> list[str]:
        """The command line, with which the part writes into a folder."""
        places = {"results": folder, "runs": runs_of(folder.parent) / self.name}
        script = self.words[0].startswith("benchmarks/")
        return [sys.executable, *self.words, *[word.format(**places) for word in self.folders if script]]


def runs_of(folder: Path) -> Path:
    """What the parts of a visit keep between attempts, beside its folder: checkpoints are too large for the archive."""
    return folder.with_name(f"{folder.name}.runs")


def gpu_tests(chosen: str, *, workers: int = 0) -> list[str]:
    """Arguments of Python for the tests that need a GPU, in several processes where pytest-xdist is there."""
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=15", "-rfE", "-k", chosen]
    parallel = workers and importlib.util.find_spec("xdist") is not None
    return [*words, *(["-n", str(workers)] if parallel else []), *GPU_TESTS]


def parts(comparators: Path | None = None, model: Path | None = None, texts: Sequence[str] = ()) -> list[Part]:
    """All parts, the most valuable first; `real_model` where there is a model."""
    beside = [] if comparators is None else ["--comparators", str(comparators)]
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    engine = ["benchmarks/engine_throughput.py", "--no-check", "--batch", "8", "--thought-length", "12"]
    return [
        Part("smoke", 70, "each kernel runs and agrees", "pytest", gpu_tests(SMOKE_TESTS)),
        Part(
            "attention",
            60,
            "thought attention of Mistral-7B's heads, L 256, S 16",
            "",
            [*ATTENTION, "--sides", "triton", "parts"],
        ),
        Part(
            "engine",
            180,
            "a 7B step: time, utilisation, memory, kernels by family",
            "80 GiB of GPU memory; Liger-Kernel for one side",
            [*engine, "--sides", "triton", "triton, liger", "--seconds", "1", *beside],
        ),
        Part(
            "head",
            50,
            "the loss after the mixing head, 8,192 rows",
            "Liger-Kernel for one side",
            [
                "benchmarks/mixed_cross_entropy.py",
                *MISTRAL,
                *["--losses", "mixed", "--rows", "8192", "--sides", "triton", "torch", "two products", "liger"],
                *beside,
            ],
        ),
        Part(
            "sampling",
            30,
            "tokens from hidden states",
            "",
            ["benchmarks/token_sampling.py", *MISTRAL, "--sides", "triton", "torch", "gumbel"],
        ),
        Part(
            "generation",
            60,
            "tokens per second against the base, batch 1 and 16",
            "40 GiB of GPU memory",
            [
                "benchmarks/generation.py",
                *["--model", "mistral-7b", "--batches", "1", "16", "--thoughts", "8", "--context", "256"],
                *["--tokens", "5", "--repeats", "2"],
            ],
        ),
        Part(
            "tests",
            110,
            "the tests that need a GPU",
            "pytest; pytest-xdist to be fast",
            gpu_tests(f"not ({BIG_TESTS} or sanitizer)", workers=workers),
        ),
        *([] if model is None else [real_model(model, texts)]),
        Part(
            "flex",
            80,
            "FlexAttention and SDPA on the same problem",
            "",
            [*ATTENTION, "--sides", "flex", "sdpa", "--work", "forward", "backward"],
        ),
        Part(
            "tune",
            100,
            "the shortlist of configurations, timed",
            "",
            ["benchmarks/tune.py", "--by", "time", "--shortlist"],
        ),
        Part("big", 60, "tensors of more than 2^31 elements", "pytest; 80 GiB of GPU memory", gpu_tests(BIG_TESTS)),
    ]


def real_model(model: Path, texts: Sequence[str]) -> Part:
    """Quiet-STaR and its controls on a model and texts."""
    words = ["benchmarks/real_model.py", "--model", str(model), "--texts", *texts, "--minutes", "5", "--device", "cuda"]
    return Part(
        "real_model",
        330,
        "Quiet-STaR on a model: what its own thoughts gain over foreign ones",
        "--model and --texts",
        [*words, "--length", "256", "--batch-size", "32", "--thoughts-per-position", "4", "--held-out", "200"],
        ("--output", "{runs}", "--results", "{results}"),
        [str(model), *texts],
    )


# -------------------------------------------------------------------------------------------------------- one visit


class Visit:
    """Runs parts until the time is up, and keeps what they give.

    Args:
        folder: Of the results: a folder and a log for each part, the state, the page.
        archive: File into which the folder is packed after each part.
        minutes: For all parts.
    """

    def __init__(self, folder: Path, archive: Path, minutes: float) -> None:
        self.folder = folder
        self.archive = archive
        self.until = time.monotonic() + 60 * minutes
        self.state = read_state(folder)

    def run(self, wanted: Sequence[Part], *, resume: bool) -> None:
        """Runs the parts in order; with `resume` those that are not done yet."""
        self.state["parts"] = {part.name: part.about for part in wanted} | self.state["parts"]
        for part in wanted:
            attempts = [one for one in self.state["attempts"] if one["part"] == part.name]
            other = [one.get("inputs", []) for one in attempts if one.get("inputs", []) != list(part.inputs)]
            if other:
                raise SystemExit(
                    f"error: --output {self.folder}: has {part.name} of {shlex.join(other[-1])}; needs the same model "
                    "and texts, or another folder"
                )
            done = any(one["outcome"] == DONE for one in attempts)
            left = self.until - time.monotonic()
            if resume and done:
                continue
            if left < LEAST_SECONDS:
                print(f"== {part.name}: {NOT_REACHED}", flush=True)
                continue
            self.attempt(part, min(part.seconds, left))
        self.keep()

    def attempt(self, part: Part, seconds: float) -> None:
        """Runs one part in a folder of its own: what an earlier attempt has measured stays."""
        number = 1 + sum(one["part"] == part.name for one in self.state["attempts"])
        name = part.name if number == 1 else f"{part.name}-{number}"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        attempt: dict[str, Any] = {"part": part.name, "folder": name, "outcome": CUT, "seconds": None}
        attempt["inputs"] = list(part.inputs)
        self.state["attempts"].append(attempt)
        self.keep()  # whoever is killed now has been cut here
        begin = time.monotonic()
        attempt["outcome"] = run_command(part.command(folder), folder / "log.txt", seconds, self.folder)
        attempt["seconds"] = round(time.monotonic() - begin, 1)
        self.keep()
        last = (folder / "log.txt").read_text(errors="replace").splitlines()[-8:]
        print(f"== {name}: {attempt['outcome']}, {attempt['seconds']} s", *(line[:150] for line in last), sep="\n")
        sys.stdout.flush()

    def keep(self) -> None:
        """Writes the state and the page, and packs the folder."""
        replace_text(self.folder / STATE, json.dumps(self.state, indent=1))
        replace_text(self.folder / f"{self.state['card']}.md", page(self.folder, self.state))
        new = self.archive.with_name(f".{self.archive.name}.new")
        with tarfile.open(new, "w:gz") as packed:
            packed.add(self.folder, arcname="on_gpu")
        new.replace(self.archive)


def run_command(command: Sequence[str], log: Path, seconds: float, folder: Path) -> str:
    """Runs a command with a limit, and returns its outcome; nothing of its process group is left."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder.with_name(f"{folder.name}.cache"))),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            outcome = DONE if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            outcome = CUT
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # where the group has ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome


# --------------------------------------------------------------------------------------------------------- the page


def read_state(folder: Path) -> dict[str, Any]:
    """What a folder has: the card, the parts, and all attempts so far."""
    file = folder / STATE
    if file.is_file():
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return state
    return {**describe_machine(), "parts": {}, "attempts": []}


def describe_machine() -> dict[str, Any]:
    """The card's name for files, and the lines of the page that name the machine."""
    gpu, driver = "none", ""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
        gpu, driver = found.split(",", 1)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        pass
    words = [word for word in gpu.lower().replace("nvidia", "").split() if word]
    facts = {
        "gpu": f"{gpu}, driver and power limit{driver}" if driver else gpu,
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
    }
    return {"card": "_".join("".join(filter(str.isalnum, word)) for word in words), "facts": facts}


def page(folder: Path, state: dict[str, Any]) -> str:
    """The Markdown page of all parts: what became of each, the bars, then the tables of the best attempt."""
    rows, sections, folders = [], [], {}
    for name, about in state["parts"].items():
        attempts = [one for one in state["attempts"] if one["part"] == name]
        best = max(attempts, key=lambda one: (one["outcome"] == DONE, attempts.index(one)), default=None)
        rows.append(
            [name, about, best["outcome"] if best else NOT_REACHED, f"{best['seconds'] or '-'}" if best else "-"]
        )
        if best is not None:
            folders[name] = folder / best["folder"]
            sections.append(f"## {name}: {about}\n\n{section(folder / best['folder'])}")
    facts = "\n".join(f"- {name}: `{value}`" for name, value in state["facts"].items())
    table = markdown_table(["part", "what", "outcome", "s"], rows, text_columns=3)
    reached = f"## Bars of an H200\n\n{bars.section(folders)}"
    return "\n\n".join([f"# Measured on a GPU: {state['facts']['gpu']}", table, facts, reached, *sections]) + "\n"


def section(folder: Path) -> str:
    """The tables that a part has written, one level lower; the end of its log where there is none."""
    pages = sorted(folder.glob("*.md"))
    if pages:
        texts = [file.read_text(encoding="utf-8").partition("\n## Measured with")[0] for file in pages]
        return "\n\n".join(re.sub(r"(?m)^(#+) ", r"##\1 ", text.strip()) for text in texts)
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines()[-20:] if log.is_file() else []
    return "```\n" + "\n".join(line[:200] for line in lines) + "\n```"


def unpack(archive: Path, place: Path) -> None:
    """Puts the folder `on_gpu` of an archive into a place."""
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")


def write_page(source: Path, results: Path) -> Path:
    """Writes the page of a folder or an archive, and returns its file."""
    with tempfile.TemporaryDirectory() as temporary:
        if source.is_file():
            unpack(source, Path(temporary))
            source = Path(temporary) / "on_gpu"
        if not (source / STATE).is_file():
            raise SystemExit(f"error: --page {source}: has no {STATE}; needs a folder or an archive of this script")
        state = read_state(source)
        out = results / f"{state['card']}.md"
        replace_text(out, page(source, state))
    return out


# ---------------------------------------------------------------------------------------------------- the simulation

SIMULATED = """
import signal, subprocess, sys, time
from pathlib import Path
kind, folder, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if kind == "hangs":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
runs.mkdir(parents=True, exist_ok=True)
before = len(list(runs.iterdir()))
for number in range(before, {"overruns": 100, "goes on": 40}.get(kind, 3)):
    with (folder / "rows.md").open("a") as file:
        print(f"row {number} of a part that {kind}", file=file)
    if kind == "goes on":
        (runs / f"{number}").touch()
    time.sleep(0.1)
if kind == "fails" or kind == "works later" and "-2" not in folder.name:
    sys.exit("it has failed")
"""
EXPECTED = {"works": DONE, "fails": FAILED, "hangs": CUT, "overruns": CUT, "works later": DONE, "goes on": DONE}
"""Simulated part -> its outcome after the last visit."""


@dataclass(frozen=True)
class SimulatedPart(Part):
    """A part that behaves as its name says."""

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-c", SIMULATED, self.name, str(folder), str(runs_of(folder.parent) / self.name)]


def simulated_parts() -> list[Part]:
    """One part for each kind of behaviour."""
    return [SimulatedPart(name, 3, f"a part that {name}", "", ()) for name in EXPECTED]


def simulate() -> None:
    """Visits a machine that is taken away during the fourth part, and twice more with what the archive has.

    Raises:
        SystemExit: Something is lost, done twice, or left running.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder, archive = place / "on_gpu", place / "on_gpu.tgz"
        with subprocess.Popen([sys.executable, __file__, "--simulated-visit", str(folder)]) as first:
            while not (folder / "overruns" / "rows.md").is_file() and first.poll() is None:
                time.sleep(0.05)
            first.kill()
        folder.rename(place / "taken away")
        unpack(archive, place)
        after_first = outcomes(folder)
        for _ in range(2):
            Visit(folder, archive, minutes=1).run(simulated_parts(), resume=True)
        text = write_page(archive, place).read_text(encoding="utf-8")
        works = [one for one in read_state(folder)["attempts"] if one["part"] == "works"]
        checks = {
            "the archive of the first visit has all its parts": list(after_first) == list(EXPECTED)[:4],
            "the killed part counts as cut": after_first.get("overruns") == CUT,
            "each part ends as it should": outcomes(folder) == EXPECTED,
            "what is done is not done again": len(works) == 1,
            "rows before a failure or a cut are on the page": all(
                f"row 2 of a part that {name}" in text for name in EXPECTED if name not in ("hangs", "goes on")
            ),
            "what a part keeps is not packed, and its next attempt goes on from it": sorted(
                line for file in folder.glob("goes on*/rows.md") for line in file.read_text().splitlines()
            )
            == sorted(f"row {number} of a part that goes on" for number in range(40)),
            "nothing is left running": not running("import time; time.sleep(60)"),
        }
    for check, holds in checks.items():
        print(f"{'ok' if holds else 'FAULT'}: {check}")
    if not all(checks.values()):
        raise SystemExit("error: the simulation has shown a fault")


def outcomes(folder: Path) -> dict[str, str]:
    """The outcome of the last attempt at each part."""
    return {one["part"]: one["outcome"] for one in read_state(folder)["attempts"]}


def running(word: str) -> list[str]:
    """Ids of processes with this argument."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes().split(b"\0"):
                found.append(file.parent.name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument(
        "--minutes", type=float, default=9, help="for all parts; no part begins that cannot end in time"
    )
    parser.add_argument("--output", type=Path, default=Path("build/on_gpu"), help="folder for what is measured")
    parser.add_argument("--archive", type=Path, help="its packed copy (default: the folder's name and .tgz)")
    parser.add_argument("--resume", action="store_true", help="only the parts that are not done in the folder")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these, in this order (default: all)")
    parser.add_argument("--comparators", type=Path, help="folder with packages that are not installed, such as Liger's")
    parser.add_argument("--model", type=Path, metavar="DIR", help="of the part real_model, with --texts")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="as in benchmarks/real_model.py")
    parser.add_argument("--list", action="store_true", help="name the parts, their limits and what each needs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write the page of a folder or an archive")
    parser.add_argument("--simulate", action="store_true", help="try this script itself, without a GPU")
    parser.add_argument("--simulated-visit", type=Path, help=argparse.SUPPRESS)
    parser.add_results()
    options = parser.begin(arguments)
    if (options.model is None) != (not options.texts):
        parser.error("--model and --texts: got one alone; the part real_model needs both")
    # the parts run elsewhere
    model, comparators = (path and path.resolve() for path in (options.model, options.comparators))
    texts = [
        str(Path(file).resolve()) + colon + fields for file, colon, fields in (t.partition(":") for t in options.texts)
    ]
    known = {part.name: part for part in parts(comparators, model, texts)}
    if unknown := [name for name in options.parts or () if name not in known]:
        parser.error(f"--parts: no part {unknown[0]!r}; needs {', '.join(known)}")
    wanted = [known[name] for name in options.parts or known]
    if options.list:
        rows = [[part.name, part.about, part.needs or "-", f"{part.seconds}"] for part in wanted]
        print(markdown_table(["part", "what it shows", "needs", "limit, s"], rows, text_columns=3))
    elif options.dry_run:
        for part in wanted:
            print(shlex.join(part.command(options.output.resolve() / part.name)))
    elif options.page:
        print(f"written: {write_page(options.page, options.results)}")
    elif options.simulate:
        simulate()
    else:
        folder = options.simulated_visit or options.output
        archive = options.archive or folder.with_name(f"{folder.name}.tgz")
        if options.simulated_visit:
            wanted = simulated_parts()
        elif not options.resume and (folder / STATE).exists():
            parser.error(f"--output {folder}: has results already; needs --resume, or another folder")
        Visit(folder.resolve(), archive, options.minutes).run(wanted, resume=options.resume)
        print(f"written: {archive}")


if __name__ == "__main__":
    main()
