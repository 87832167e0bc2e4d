"""What every benchmark writes beside its numbers (versions, hardware, date, command), and how it writes them."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD")
TUNING_PREFIXES = (*LIBRARIES, "PYTORCH_", "CUDA_", "TRITON_", "QUIETSTAR_")
PACKAGES = ("torch", "transformers", "triton", "quietstar")


def describe(script: str, arguments: Sequence[str], *, threads: int | None = None) -> dict[str, str]:
    """The lines that make a result repeatable; where a GPU was used, `gpu_name` is one more.

    Args:
        script: Path of the benchmark below the repository's root.
        arguments: Its command line arguments.
        threads: CPU threads that torch used.
    """
    facts = {
        "command": shlex.join(["python", script, *map(without_folders, arguments)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB",
    }
    if threads is not None:
        facts["torch threads"] = str(threads)
    tuning = {name: value for name, value in os.environ.items() if name.startswith(TUNING_PREFIXES)}
    if tuning:
        facts["environment"] = " ".join(f"{name}={without_folders(value)}" for name, value in sorted(tuning.items()))
    return facts


def gpu_name(device: str) -> dict[str, str]:
    """The line that names a CUDA device; none for a CPU. Apart from the others, since it takes memory of the GPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"gpu": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"}


def without_folders(text: str) -> str:
    """Absolute paths cut to their last component: where a machine keeps its files is no part of a result."""
    return re.sub(r"(?:(?<=[=:,])|^)/(?!/)[^=:,]*", lambda path: Path(path[0]).name, text)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Short id of the checked-out commit, marked where a tracked file differs from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, padded so that it reads well in a terminal too; the first `text_columns` are left-aligned."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if k < text_columns else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if k < text_columns else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *[line(row) for row in cells[1:]]])


def write_csv(path: Path, facts: Mapping[str, str], rows: Sequence[Mapping[str, object]]) -> None:
    """One row per measurement, after a head of `# name: value` lines."""
    text = io.StringIO("".join(f"# {name}: {value}\n" for name, value in facts.items()))
    text.seek(0, io.SEEK_END)
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def write_markdown(path: Path, title: str, facts: Mapping[str, str], body: str) -> None:
    """The tables under a title, the facts below them."""
    listed = "\n".join(f"- {name}: `{value}`" for name, value in facts.items())
    replace_text(path, f"# {title}\n\n{body}\n\n## Measured with\n\n{listed}\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that whoever is stopped in the middle leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8", newline="")
    new.replace(path)
