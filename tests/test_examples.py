"""The scripts of examples/ run as they stand, and what they print at the end says what they are for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str, directory: Path, *arguments: str) -> str:
    """What an example prints, run as a user does, in a directory of its own."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_examples_are_short() -> None:
    found = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "examples").glob("*.py")}
    assert len(found) == 4 and all(30 <= lines <= 60 for lines in found.values()), found


@pytest.mark.slow
def test_the_kernels_are_what_plain_pytorch_computes(tmp_path: Path) -> None:
    differences = re.findall(r"^  (\w+) +([\d.e-]+)$", run("kernels_alone.py", tmp_path), re.MULTILINE)
    assert len(differences) == 4 and all(0 <= float(value) < 1e-4 for _, value in differences)


@pytest.mark.slow
def test_a_text_is_learned(tmp_path: Path) -> None:
    said = run("quiet_star_on_your_text.py", tmp_path)
    nlls = [float(value) for value in re.findall(r"([\d.]+) nats a token without", said)]
    assert len(nlls) == 4 and nlls[-1] < nlls[0] - 0.5


@pytest.mark.slow
def test_a_text_and_a_model_of_the_reader_are_taken(tmp_path: Path) -> None:
    from tests.docs.readers_files import write_letters

    write_letters(tmp_path / "letters")
    (tmp_path / "my-text.txt").write_text("One and one are two, two and two are four. " * 12)
    assert "step 60: " in run("quiet_star_on_your_text.py", tmp_path, "my-text.txt", "letters")


@pytest.mark.slow
def test_star_improves_on_a_task_of_ones_own(tmp_path: Path) -> None:
    said = run("star_own_task.py", tmp_path)
    accuracy = [float(value) for value in re.findall(r"^\d +([\d.]+) \[", said, re.MULTILINE)]
    assert len(accuracy) == 3 and accuracy[-1] > accuracy[0] + 10
    assert (tmp_path / "runs/own-task/report.html").is_file()


@pytest.mark.slow
def test_the_verifier_knows_the_mistake_that_its_base_prefers(tmp_path: Path) -> None:
    said = run("vstar_verifier.py", tmp_path)
    first = {name: int(right) / int(of) for name, right, of in re.findall(r"^(.+): .* in (\d+) of (\d+)", said, re.M)}
    assert first["base"] < 0.5 and first["verifier"] > 0.8
