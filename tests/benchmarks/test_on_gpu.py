"""The visit to a GPU: its simulation, its commands, and what it needs of a machine."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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


class Parsed(Exception):
    """The command line has been read."""


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, on_gpu.__file__, *words], capture_output=True, text=True, timeout=120)


def test_the_simulated_visits(capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.main(["--simulate"])
    assert capsys.readouterr().out.count("ok: ") == 6


@pytest.mark.parametrize("part", on_gpu.parts(Path("/opt/others")), ids=lambda part: part.name)
def test_the_script_of_each_part_knows_its_options(part: on_gpu.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(self: Benchmark, arguments: list[str] | None = None, threads: int | None = None) -> Any:
        self.parse_args(arguments)
        raise Parsed

    monkeypatch.setattr(Benchmark, "begin", parse)
    _, path, *words = part.command(Path("out"))
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
    words = [word for word in part.command(Path("out")) if word not in ("-n", "1")]
    found = subprocess.run([*words, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert int(found.stdout.splitlines()[-1].split("/")[0]) >= 10


def test_a_bare_machine_has_all_that_the_scripts_need() -> None:
    """A lent machine has torch, Triton, transformers and pytest, and nothing can be installed there."""
    modules = {f"benchmarks.{Path(part.words[0]).stem}" for part in on_gpu.parts() if part.words[0] != "-m"}
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "smoek"], "--parts: no part 'smoek'; needs smoke, attention"),
        (["--page", "missing.tgz"], "--page missing.tgz: has no on_gpu.json"),
        (["--output", "old"], "--output old: has results already; needs --resume"),
    ],
    ids=["part", "page", "output"],
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
