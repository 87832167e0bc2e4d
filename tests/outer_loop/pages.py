"""What a page shows, taken from its HTML."""

from __future__ import annotations

import html
import re


def headings(page: str, level: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(rf"<{level}>(.*?)</{level}>", page)]


def part(page: str, heading: str) -> str:
    """A section of the page."""
    return page.partition(f"<h2>{html.escape(heading)}</h2>")[2].partition("</section>")[0]


def legend(page: str, title: str) -> list[str]:
    panel = page.partition(f"<h3>{title}</h3>")[2].partition("</ul>")[0]
    return [html.unescape(name) for name in re.findall(r"</svg>(.*?)</li>", panel)]


def cells(section: str) -> list[list[str]]:
    return [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row)]
        for row in re.findall(r"<tr.*?>(.*?)</tr>", section)
    ]
