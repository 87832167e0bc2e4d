"""Pieces of an HTML page that needs nothing but itself: no script, no address, and no text that could become markup.

The arguments called `body`, `cells` and `html` are HTML already; all other text is escaped here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from quietstar.reporting.style import STYLE
from quietstar.reporting.text import plain, visible

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The browser's own guard, should an escape ever be missing: nothing is loaded and no script runs."""

_MARKED = ' class="marked"'


def page(title: str, body: Iterable[str]) -> str:
    """A whole document.

    Args:
        title: Of the window.
        body: HTML parts, empty ones left out.
    """
    content = "\n".join(part for part in body if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{plain(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    )


def section(heading: str, body: Iterable[str], note: str = "") -> str:
    """A part of the page under a heading; nothing where it has no content.

    Args:
        heading: Its name.
        body: HTML parts.
        note: A sentence below the heading.
    """
    content = "\n".join(part for part in body if part)
    if not content:
        return ""
    below = f'<p class="note">{visible(note)}</p>' if note else ""
    return f"<section>\n<h2>{visible(heading)}</h2>{below}\n{content}\n</section>"


def key_figures(figures: Iterable[tuple[str, str, str]]) -> str:
    """Numbers that stand out: (name, value, small print)."""
    items = ""
    for name, value, small in figures:
        below = f"<small>{visible(small)}</small>" if small else ""
        items += f"<div><dt>{visible(name)}</dt><dd>{visible(value)}{below}</dd></div>"
    return f'<dl class="figures">{items}</dl>' if items else ""


def panel(title: str, note: str, html: str) -> str:
    """A chart with its title and one sentence; nothing where there is no chart."""
    if not html:
        return ""
    return (
        f'<figure class="panel"><figcaption><h3>{visible(title)}</h3><p>{visible(note)}</p></figcaption>{html}</figure>'
    )


def panels(body: Iterable[str]) -> str:
    """Panels side by side, as many as fit."""
    content = "\n".join(part for part in body if part)
    return f'<div class="grid-of-panels">\n{content}\n</div>' if content else ""


def table(
    cells: Sequence[Sequence[str]], head: Sequence[str] = (), marked: Container[int] = (), numbers: bool = False
) -> str:
    """A table of HTML cells; nothing where there are no rows.

    Args:
        cells: Rows of HTML.
        head: Names of the columns.
        marked: Indices of rows that stand out.
        numbers: Cells do not break into lines, but for those of the first column.
    """
    if not cells:
        return ""
    top = f"<thead><tr>{''.join(f'<th>{visible(name)}</th>' for name in head)}</tr></thead>" if head else ""
    rows = "\n".join(
        f"<tr{_MARKED if index in marked else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for index, row in enumerate(cells)
    )
    kind = "table numbers" if numbers else "table"
    return f'<div class="{kind}"><table>{top}<tbody>{rows}</tbody></table></div>'


def details(summary: str, html: str) -> str:
    """Something folded away."""
    return f"<details><summary>{visible(summary)}</summary>{html}</details>" if html else ""


def warning_list(warnings: Iterable[str]) -> str:
    """Sentences that stand out; nothing where there are none."""
    items = "".join(f"<li>{visible(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""
