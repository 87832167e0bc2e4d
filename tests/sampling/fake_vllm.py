"""An environment with a vLLM of its own: `python -m vllm.entrypoints.openai.api_server` is what a test says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.faults.launch import REPOSITORY

SERVES = """
import sys
print("started", sys.argv, flush=True)
from tests.sampling.stub_server import main
main()
"""
"""Of the small server of `stub_server.py`."""


def make_python(directory: Path, server: str) -> Path:
    """The Python of the environment.

    Args:
        directory: Where the environment is made.
        server: Source of the server.
    """
    package = directory / "site/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for part in (package, *package.parents[:2]):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(server)
    path = os.pathsep.join(map(str, (directory / "site", REPOSITORY, REPOSITORY / "kernels")))
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python
