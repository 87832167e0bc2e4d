"""Gives the site the files outside of docs/ that its pages link to, such as `../benchmarks/results/star.md`.

The same links then work in the site and where the pages are read as plain Markdown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds each linked file at its own path."""
    pages = [page.content_string for page in files.documentation_pages()]
    for path in sorted({path for page in pages for path in LINK.findall(page)}):
        if (ROOT / path).is_file():  # of the others mkdocs itself says which page links to them
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """There, docs/ is the top."""
    return LINK.sub(r"](\1", markdown)
