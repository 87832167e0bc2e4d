"""README.md and the pages of docs/, and what is in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("README.md",)}
PAGES |= {f"docs/{file.name}": file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}


def page(name: str) -> str:
    """The text of a page of docs/."""
    return PAGES[f"docs/{name}.md"]


def result(name: str) -> str:
    """The text of a committed result."""
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def in_one_line(text: str) -> str:
    """Without line breaks, so that a sentence can be found wherever it is broken."""
    return " ".join(text.split())


def rows(text: str) -> list[list[str]]:
    """Cells of every table row of a Markdown text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not set(line) <= set("|-: ")
    ]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, code) of every block."""
    fence = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(path, code) for path, text in PAGES.items() for code in fence.findall(text)]


def commands() -> list[str]:
    """Every different line of the shell blocks, without its comment."""
    lines = [line for _, code in blocks("bash") for line in code.splitlines()]
    return list(dict.fromkeys(shlex.join(words) for line in lines if (words := shlex.split(line, True))))


def links(text: str) -> list[str]:
    """Where the relative links of a Markdown text lead, without their anchors."""
    found = re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text)
    return [link for link in found if link and not link.startswith("http")]
