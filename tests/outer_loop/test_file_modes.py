"""Files of a run of STaR or V-STaR can be read by whom the user's umask lets read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quietstar import star, vstar
from tests.marks import slow
from tests.outer_loop.loops import VERIFIER, arguments


def modes(paths: list[Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(oct(path.stat().st_mode & 0o777), []).append(path.name)
    return found


@pytest.mark.parametrize("umask", [0o027, slow(0o022), slow(0o002), slow(0o077)])
@pytest.mark.parametrize("command", ["star", slow("vstar")])
def test_every_file_of_a_loop_follows_the_umask(command: str, umask: int, adder: Path, tmp_path: Path) -> None:
    """Weights that safetensors wrote were private, so that colleagues could not go on with a loop."""
    out = tmp_path / "run"
    more = {} if command == "star" else VERIFIER
    words = arguments(adder, out, more, loop__rationalize="true", training__report="true")
    before = os.umask(umask)
    try:
        assert (star if command == "star" else vstar).main(words) == 0
    finally:
        os.umask(before)
    everything = [out, *out.rglob("*")]
    files = [path for path in everything if path.is_file()]
    names = {path.name for path in files}
    assert {"model.safetensors", "config.yaml", "summary.json", ".lock"} <= names
    assert any(name.endswith(".jsonl") for name in names) and any(name.endswith(".html") for name in names)
    assert set(modes(files)) == {oct(0o666 & ~umask)}, modes(files)
    assert set(modes([path for path in everything if path.is_dir()])) == {oct(0o777 & ~umask)}
