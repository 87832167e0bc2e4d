"""Starts the ranks of a test with torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
LIMIT = 240
"""Seconds after which a test is stopped that should have ended by itself."""


def launch(
    ranks: int, module: str, *arguments: object, restarts: int = 0, directory: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` on several ranks of this machine and waits for the end of all."""
    with start(ranks, module, *arguments, restarts=restarts, directory=directory) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # which ends the ranks, too
            process.wait(60)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def start(
    ranks: int, module: str, *arguments: object, restarts: int = 0, directory: Path = ROOT
) -> subprocess.Popen[str]:
    """Starts `python -m module` on several ranks of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [f"--max-restarts={restarts}", "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        cwd=directory,
    )


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a directory that `make` has filled, once for all workers of pytest-xdist."""
    base = factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            filling = Path(f"{directory}.filling")
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()
            make(filling)
            filling.rename(directory)
    return directory


def launched(ranks: int, module: str, *arguments: object, directory: Path = ROOT) -> str:
    """Runs `python -m module` on several ranks, which must succeed, and returns what they printed."""
    done = launch(ranks, module, *arguments, directory=directory)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
