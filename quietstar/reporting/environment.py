"""What a run ran on: versions, hardware, the state of the code, and the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("quietstar", "torch", "transformers", "triton", "safetensors", "peft", "pyarrow", "numpy")
GIT_SECONDS = 5.0


def environment() -> dict[str, Any]:
    """The machine, as plain JSON values.

    Returns:
        `started` (UTC), `command`, `python`, `platform`, `packages` (those installed, by name), `cpu`, `cores`,
        `memory_gib`, `devices` (names of the GPUs), `cuda` (or null), and `git` of the working directory: `commit` and
        `dirty` (whether a tracked file differs from it), or null where that is no checkout.
    """
    import torch  # not at the top: who only reads a report need not wait for it

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "devices": [torch.cuda.get_device_name(index) for index in devices],
        "cuda": torch.version.cuda,
        "git": _git(),
    }


def _command() -> str:
    """The command line as it was typed, `python -m` included."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name:
        name = module.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    commit = _run_git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _run_git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _run_git(*arguments: str) -> str | None:
    # no lock is taken: another git may be at work in the same checkout
    command = ["git", "--no-optional-locks", *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
