"""What the README shows works as written, and its numbers are those of committed results."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from quietstar.command_line import parse_train_config
from quietstar.textbook.character_model import character_model, character_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Cells of every table row of a Markdown text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not set(line) <= set("|-: ")
    ]


def test_the_table_is_that_of_the_committed_result() -> None:
    result = rows((ROOT / "benchmarks/results/textbook.md").read_text(encoding="utf-8"))
    columns, arms = result[0], {row[0]: row for row in result[1:]}
    shown = [row for row in rows(README) if row[0] in arms]
    assert len(shown) == 5
    names = next(row for row in rows(README) if "answer NLL, with thought" in row)
    for row in shown:
        for name, cell in zip(names[1:], row[1:], strict=True):
            assert cell == arms[row[0]][columns.index(name)], (row[0], name)


def test_the_step_table_is_that_of_the_committed_result() -> None:
    result = {tuple(row) for row in rows((ROOT / "benchmarks/results/train_step.md").read_text(encoding="utf-8"))}
    cells = {cell for row in result for cell in row}
    names = next(row for row in rows(README) if row[0] == "text length")
    table = [row for row in rows(README) if row[0] in ("64", "128", "256", "512")]
    assert len(table) == 4 and len(names) == len(table[0])
    for row in table:
        for cell in row[1:]:
            for number in re.findall(r"[\d.]+", cell):
                assert number in cells, (row, number)


def test_every_train_command_parses() -> None:
    commands = re.findall(r"python -m quietstar\.train[^\n#`]*", README)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)[3:]
        if "--help" not in words:
            parse_train_config(words)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).is_file(), link


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "from_base" in block)
    base = tmp_path / "base"
    character_model(0).save_pretrained(base)
    character_tokenizer().save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    # The character model knows 13 characters and not "---"; the rest runs as it stands.
    code = code.replace('"path/or/hub-name"', f'{str(base)!r}, start_text="[", end_text="]"')
    code = re.sub(r"torch\.tensor\(\[\[.*?\]\]\)", "torch.tensor([[5, 7, 4, 7, 1, 8, 3, 12]])", code)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["logits"].shape) == (1, 8, 13)  # type: ignore[attr-defined]
    assert (tmp_path / "plain" / "config.json").is_file()
