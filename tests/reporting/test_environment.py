"""What a run says about the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quietstar.runs.machine import environment


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_it_is_plain_and_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/quietstar", "train", "--data.path", "a b"])
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        facts["packages"]["torch"]
    )
    assert facts["cores"] == os.cpu_count() and facts["memory_gib"] > 0.1
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert facts["command"].endswith("train --data.path 'a b'")


def test_the_state_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # git must not find a checkout further up
    assert environment()["git"] is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert environment()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert environment()["git"] == {"commit": commit, "dirty": True}


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git"] is None
