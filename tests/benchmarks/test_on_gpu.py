"""The visit to a GPU: its simulation, its commands, and what it needs of a machine."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import on_gpu
from benchmarks.environment import ROOT
from benchmarks.script import Benchmark

NOT_NEEDED = [
    "jsonargparse",
    "mistral_common",
    "bitsandbytes",
    "trl",
    "peft",
    "pydantic",
    "liger_kernel",
]


PARTS = on_gpu.parts(Path("/opt/others"), Path("/opt/model"), ["/opt/sums.jsonl:question+answer", "/opt/book.txt"])


class Parsed(Exception):
    """The command line has been read."""


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, on_gpu.__file__, *words], capture_output=True, text=True, timeout=120)


def test_the_simulated_visits(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.main(["--simulate"])
    assert capsys.readouterr().out.count("ok: ") == 7


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_script_of_each_part_knows_its_options(part: on_gpu.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(self: Benchmark, arguments: list[str] | None = None, threads: int | None = None) -> Any:
        self.parse_args(arguments)
        raise Parsed

    monkeypatch.setattr(Benchmark, "begin", parse)
    _, path, *words = part.command(Path("out") / part.name)
    if path == "-m":
        assert words[0] == "pytest"
        assert all((ROOT / name).exists() for name in on_gpu.GPU_TESTS)
        return
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{Path(path).stem}").main(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [part for part in on_gpu.parts() if "pytest" in part.words], ids=lambda part: part.name
)
def test_the_chosen_tests_are_there(part: on_gpu.Part) -> None:
    words = [word for word in part.command(Path("out") / part.name) if word not in ("-n", "1")]
    found = subprocess.run([*words, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert int(found.stdout.splitlines()[-1].split("/")[0]) >= 10


def test_a_bare_machine_has_all_that_the_scripts_need() -> None:
    """A lent machine has torch, Triton, transformers and pytest, and nothing can be installed there."""
    modules = {f"benchmarks.{Path(part.words[0]).stem}" for part in PARTS if part.words[0] != "-m"}
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
        f"for name in {sorted(modules)}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_visit_on_a_cpu_keeps_why_a_part_failed(tmp_path: Path) -> None:
    folder = tmp_path / "visit"
    found = script("--minutes", "1", "--parts", "tune", "--output", str(folder), "--archive", str(tmp_path / "a.tgz"))
    assert found.returncode == 0, found.stderr
    (attempt,) = json.loads((folder / "on_gpu.json").read_text())["attempts"]
    assert (attempt["part"], attempt["outcome"]) == ("tune", "failed")
    page = script("--page", str(tmp_path / "a.tgz"), "--results", str(tmp_path / "results"))
    text = (tmp_path / "results" / "none.md").read_text()
    assert "written:" in page.stdout and "| tune " in text and "error: " in text


@pytest.mark.parametrize("option", ["--list", "--dry-run"])
@pytest.mark.parametrize("given", [True, False])
def test_the_part_of_a_real_model_is_there_where_a_model_is(
    option: str, given: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu.main([option, *(["--model", "smol", "--texts", "a.jsonl:question+answer", "b.txt"] if given else [])])
    printed = capsys.readouterr().out
    assert ("real_model" in printed) == given
    if given and option == "--dry-run":
        (line,) = [line for line in printed.splitlines() if "real_model" in line]
        here = Path.cwd()  # the parts run in the repository, wherever the command was given
        texts = f"{here}/a.jsonl:question+answer {here}/b.txt"
        assert f"--model {here}/smol --texts {texts} --minutes 5 --device cuda" in line
        assert line.endswith(f"--output {here}/build/on_gpu.runs/real_model --results {here}/build/on_gpu/real_model")


def test_a_real_model_comes_after_the_kernels_and_before_what_is_beside() -> None:
    names = [part.name for part in PARTS]
    assert names.index("generation") < names.index("real_model") < min(names.index("flex"), names.index("tune"))
    (part,) = [part for part in PARTS if part.name == "real_model"]
    minutes = float(part.words[list(part.words).index("--minutes") + 1])
    assert part.seconds > 60 * minutes


def test_another_attempt_at_a_real_model_goes_on_with_the_same_runs(tmp_path: Path) -> None:
    (part,) = [part for part in PARTS if part.name == "real_model"]
    first, second = (part.command(tmp_path / "visit" / name) for name in ("real_model", "real_model-2"))
    differing = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    assert differing == [(str(tmp_path / "visit" / "real_model"), str(tmp_path / "visit" / "real_model-2"))]
    runs = Path(first[first.index("--output") + 1])
    assert runs.is_relative_to(tmp_path) and not runs.is_relative_to(tmp_path / "visit"), "it would be packed"


def test_a_part_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    """The page kept the results of the first model, without a word."""
    folder = tmp_path / "visit"
    folder.mkdir()
    quick = [
        replace(part, words=["-c", "pass"]) for part in on_gpu.parts(None, tmp_path / "one", ["a.txt"]) if part.inputs
    ]
    visit = on_gpu.Visit(folder, tmp_path / "visit.tgz", minutes=1)
    visit.run(quick, resume=True)
    assert [one["outcome"] for one in visit.state["attempts"]] == [on_gpu.DONE]
    again = on_gpu.Visit(folder, tmp_path / "visit.tgz", minutes=1)
    again.run(quick, resume=True)
    assert len(again.state["attempts"]) == 1
    for inputs in ([str(tmp_path / "other"), "a.txt"], [str(tmp_path / "one"), "b.txt"]):
        with pytest.raises(SystemExit, match=r"has real_model of .*one a.txt; needs the same model and texts"):
            again.run([replace(quick[0], inputs=inputs)], resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "smoek"], "--parts: no part 'smoek'; needs smoke, attention"),
        (["--page", "missing.tgz"], "--page missing.tgz: has no on_gpu.json"),
        (["--output", "old"], "--output old: has results already; needs --resume"),
        (["--model", "smol"], "--model and --texts: got one alone; the part real_model needs both"),
        (["--texts", "a.txt", "b.txt", "--list"], "--model and --texts: got one alone"),
        (["--parts", "real_model"], "--parts: no part 'real_model'; needs smoke, attention"),
    ],
    ids=["part", "page", "output", "model", "texts", "part without a model"],
)
def test_bad_arguments(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "on_gpu.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        on_gpu.main(words)
    assert message in f"{ended.value}{capsys.readouterr().err}"
