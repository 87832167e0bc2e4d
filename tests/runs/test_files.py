"""The files of a run: whose mode a save changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quietstar.model.adapters import add_adapters
from quietstar.runs.files import saving
from tests.model.tiny import make_model

PRIVATE = [
    "private/secret.safetensors",
    "secret.safetensors",
    "adapter/old.safetensors",
    "a/b/c.safetensors",
    "model-00001-of-00002.safetensors",
    ".hidden.safetensors",
]


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_save_changes_the_modes_of_its_own_files(tmp_path: Path, name: str, adapters: bool) -> None:
    """Every file of that ending became readable by all, at any depth of the directory."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0o600)
    model = make_model("llama")
    if adapters:
        add_adapters(model, 2, 4)
    before = os.umask(0o022)
    try:
        with saving(tmp_path):
            model.save_pretrained(tmp_path)
            save_file({"a": torch.zeros(1)}, tmp_path / "more.safetensors")
    finally:
        os.umask(before)
    assert not (tmp_path / name).exists() or oct((tmp_path / name).stat().st_mode & 0o777) == "0o600"
    written = {path for path in tmp_path.rglob("*.safetensors") if path != tmp_path / name}
    assert len(written) == (3 if adapters else 2)
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o644"}


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_that_is_replaced_gets_the_mode_of_a_new_one(tmp_path: Path, times: int) -> None:
    before = os.umask(0o022)
    try:
        for _ in range(times):
            with saving(tmp_path):
                save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
            assert oct((tmp_path / "a.safetensors").stat().st_mode & 0o777) == "0o644"
    finally:
        os.umask(before)


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(mode=0o600)
    (tmp_path / "out").mkdir()
    with saving(tmp_path / "out"):
        (tmp_path / "out" / "a.safetensors").symlink_to(elsewhere)
    assert oct(elsewhere.stat().st_mode & 0o777) == "0o600"
