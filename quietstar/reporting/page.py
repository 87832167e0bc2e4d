"""Pieces of a self-contained HTML page: no script, no external address, and no text that could become markup.

The arguments `body`, `cells`, `html` and those described as HTML are HTML already; all other text is escaped here.
First stand the pieces, then the style for light and dark, wide and narrow, screen and paper (colours of Okabe and Ito),
then the escaping: text of any content becomes inert, and characters that would hide or reorder text become visible.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy, a second guard in case an escape is missing: nothing is loaded and no script runs."""

_MARKED = ' class="marked"'


def page(title: str, body: Iterable[str], footer: str = "") -> str:
    """Returns a whole HTML document.

    Args:
        title: Title of the browser window.
        body: HTML parts; empty ones are left out.
        footer: Text at the bottom of the page.
    """
    below = f"<footer>{visible(footer)}</footer>" if footer else ""
    content = "\n".join(part for part in (*body, below) if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{plain(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    )


def header(title: str, words: Iterable[str], figures: Iterable[tuple[str, str, str]] = ()) -> str:
    """Returns the top of a page.

    Args:
        title: Heading of the page.
        words: Parts of the line below the heading; empty ones are left out.
        figures: (name, value, small print) of each key figure.
    """
    lede = " · ".join(word for word in words if word)
    return f'<header><h1>{visible(title)}</h1><p class="lede">{visible(lede)}</p>{key_figures(figures)}</header>'


def section(heading: str, body: Iterable[str], note: str = "") -> str:
    """Returns a part of the page under a heading; empty if it has no content.

    Args:
        heading: Heading of the section.
        body: HTML parts of the section; empty ones are left out.
        note: Sentence below the heading.
    """
    content = "\n".join(part for part in body if part)
    if not content:
        return ""
    below = f'<p class="note">{visible(note)}</p>' if note else ""
    return f"<section>\n<h2>{visible(heading)}</h2>{below}\n{content}\n</section>"


def key_figures(figures: Iterable[tuple[str, str, str]]) -> str:
    """Returns key figures as large numbers; each is given as (name, value, small print)."""
    items = ""
    for name, value, small in figures:
        below = f"<small>{visible(small)}</small>" if small else ""
        items += f"<div><dt>{visible(name)}</dt><dd>{visible(value)}{below}</dd></div>"
    return f'<dl class="figures">{items}</dl>' if items else ""


def panel(title: str, note: str, html: str, wide: bool = False) -> str:
    """Returns a chart with its title and one sentence, alone in its row if `wide`; empty if there is no chart."""
    if not html:
        return ""
    caption = f"<figcaption><h3>{visible(title)}</h3><p>{visible(note)}</p></figcaption>"
    return f'<figure class="{"wide panel" if wide else "panel"}">{caption}{html}</figure>'


def panels(body: Iterable[str]) -> str:
    """Returns panels side by side, as many per row as fit."""
    content = "\n".join(part for part in body if part)
    return f'<div class="grid-of-panels">\n{content}\n</div>' if content else ""


def table(
    cells: Sequence[Sequence[str]], head: Sequence[str] = (), marked: Container[int] = (), numbers: bool = False
) -> str:
    """Returns a table of HTML cells; empty if there are no rows.

    Args:
        cells: Rows of cells, each cell as HTML.
        head: Names of the columns.
        marked: Indices of the highlighted rows.
        numbers: Whether cells stay on one line, except those of the first column.
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


def escaped(rows: Iterable[Iterable[str]]) -> list[list[str]]:
    """Returns rows of text as HTML cells of a table."""
    return [list(map(visible, row)) for row in rows]


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Returns a table of names and their values."""
    return table(escaped((name, str(value)) for name, value in pairs))


def folded_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], shown: Container[int], summary: str, bold: Container[int] = ()
) -> list[str]:
    """Returns a table of the most important rows, and a folded table of all rows if there are more.

    Args:
        head: Names of the columns.
        rows: Cells of all rows, each cell as HTML.
        shown: Indices of the most important rows.
        summary: Label of the folded table.
        bold: Indices of the rows with a bold first cell.
    """
    cells = [[f"<b>{row[0]}</b>" if place in bold else row[0], *row[1:]] for place, row in enumerate(rows)]
    first = [row for place, row in enumerate(cells) if place in shown]
    everything = table(cells, head, numbers=True)
    return (
        [everything] if len(first) == len(cells) else [table(first, head, numbers=True), details(summary, everything)]
    )


def reading(kind: str, text: str, facts: str, below: str = "") -> str:
    """Returns a card with a text to read.

    Args:
        kind: Label above the text: what kind of text it is.
        text: Text of the card as HTML.
        facts: Line of facts below the text, as HTML.
        below: Other content below the facts, as HTML.
    """
    return (
        f'<article class="thought"><div class="kind">{visible(kind)}</div><p class="text">{text}</p>'
        f'<p class="facts">{facts}</p>{below}</article>'
    )


def readings(cards: Iterable[str]) -> str:
    """Returns cards side by side, as many per row as fit."""
    content = "\n".join(cards)
    return f'<div class="thoughts">\n{content}\n</div>' if content else ""


def details(summary: str, html: str) -> str:
    """Returns folded HTML with a label; empty if there is no content."""
    return f"<details><summary>{visible(summary)}</summary>{html}</details>" if html else ""


def warning_list(warnings: Iterable[str]) -> str:
    """Returns warnings as a highlighted list; empty if there are none."""
    items = "".join(f"<li>{visible(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""


LIGHT = """  --page: #fafaf8; --card: #ffffff; --line: #e3e3de; --grid: #ececea; --zero: #b9bbb8;
  --text: #1c1e21; --muted: #62676d; --tint: #e8f1f7; --tint-text: #0b4a73; --warn: #fdf1e3;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #e69f00; --c6: #56b4e9; --c7: #8b9096;
  --faint: 0.5;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
"""
"""CSS variables: colours on a light background, and the sans-serif fonts."""

CHART_STYLE = """
.grid { stroke: var(--grid); fill: none; } .grid.zero { stroke: var(--zero); }
.tick { fill: var(--muted); font: 11px var(--sans); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.line { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1.1; opacity: var(--faint); }
.key .faint { stroke-width: 1.5; opacity: 0.7; } .dashed { stroke-dasharray: 5 3.5; stroke-linecap: butt; }
.dots { stroke: var(--card); stroke-width: 0.7; } .seed { fill: none; stroke: var(--muted); stroke-width: 0.9; }
.spread { stroke-width: 1.8; fill: none; } .band { stroke: none; opacity: 0.16; }
.mark { stroke: var(--c7); stroke-width: 1; stroke-dasharray: 1.5 2.5; }
.hover { fill: transparent; } .hover:hover { fill: var(--muted); fill-opacity: 0.13; } .bar:hover { opacity: 0.75; }
.s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); }
.s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); } .f4 { fill: var(--c4); }
.f5 { fill: var(--c5); } .f6 { fill: var(--c6); } .f7 { fill: var(--c7); }
"""
"""CSS of what is inside a chart."""

STYLE = (
    """
:root {
  color-scheme: light dark;
"""
    + LIGHT
    + """  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, "Noto Serif", "Liberation Serif", serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121416; --card: #191c1f; --line: #2b2f34; --grid: #25292d; --zero: #565c63;
    --text: #e4e6e8; --muted: #9ca3aa; --tint: #17303f; --tint-text: #a9d8f5; --warn: #33281a;
    --faint: 0.6;
    --c1: #56b4e9; --c2: #e69f00; --c3: #1fb58a; --c4: #cc79a7; --c5: #f0e442; --c6: #d55e00; --c7: #838a91;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 80rem; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 var(--sans); font-variant-numeric: tabular-nums;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; }
h2 { margin: 3rem 0 0.25rem; font-size: 1.2rem; font-weight: 650; letter-spacing: -0.005em; }
h3 { margin: 0; font-size: 0.95rem; font-weight: 600; }
h1, h2, h3, td, dd, p { overflow-wrap: anywhere; }
.lede, .note { margin: 0.35rem 0 0; color: var(--muted); max-width: 46rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem;
  margin: 1.75rem 0 0; }
.figures > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.8rem 0.95rem; }
.figures dt { color: var(--muted); font-size: 0.8rem; line-height: 1.3; }
.figures dd { margin: 0.15rem 0 0; font-size: 1.45rem; font-weight: 600; letter-spacing: -0.01em; line-height: 1.25; }
.figures small { display: block; margin-top: 0.1rem; color: var(--muted); font-size: 0.78rem; font-weight: 400;
  letter-spacing: 0; }
.grid-of-panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21.5rem), 1fr));
  gap: 0.9rem; margin-top: 1rem; }
.panel { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.85rem 0.95rem 0.6rem;
  display: flex; flex-direction: column; }
.panel p { margin: 0.1rem 0 0; color: var(--muted); font-size: 0.8rem; line-height: 1.4; }
.panel .chart { margin-top: auto; } .wide { grid-column: 1 / -1; overflow-x: auto; }
.wide .chart { min-width: 56rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; margin: 0.45rem 0 0.5rem;
  padding: 0; font-size: 0.78rem; color: var(--muted); }
.legend li { display: flex; align-items: center; gap: 0.4rem; }
.key { width: 26px; height: 10px; flex: none; }
.chart { display: block; width: 100%; height: auto; }
"""
    + CHART_STYLE
    + """
.thoughts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)); gap: 0.9rem;
  margin-top: 1rem; }
.thought { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.85rem 1rem;
  min-width: 0; }
.thought .text { margin: 0.35rem 0 0.6rem; font: 1.02rem/1.6 var(--serif); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.thought bdi { unicode-bidi: isolate; }
.before { color: var(--muted); } .after { font-weight: 600; }
.inner { background: var(--tint); color: var(--tint-text); border-radius: 4px; padding: 0.08em 0.3em;
  margin: 0 0.15em;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.kind { color: var(--muted); font-size: 0.78rem; }
.facts { margin: 0; color: var(--muted); font-size: 0.8rem; }
.facts b { color: var(--text); font-weight: 600; }
.earlier { margin: 0.55rem 0 0; padding-top: 0.5rem; border-top: 1px solid var(--line); font-size: 0.8rem;
  color: var(--muted); }
.earlier .inner { font-family: var(--serif); font-size: 0.92rem; background: none; border: 1px solid var(--line);
  color: var(--text); white-space: pre-wrap; }
/* what stands for characters without a shape: line ends quietly, whatever could deceive aloud */
.space { color: var(--c7); font: 0.8em var(--sans); margin: 0 0.1em; }
.hidden { font: 0.72em var(--mono); color: var(--c2); border: 1px solid currentColor; border-radius: 3px;
  padding: 0 0.2em;
  margin: 0 0.05em; unicode-bidi: isolate; }
.table { overflow-x: auto; margin-top: 0.9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
th, td { text-align: left; padding: 0.38rem 0.95rem; vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: 0.8rem; }
tbody tr { border-top: 1px solid var(--line); } table:not(:has(thead)) tbody tr:first-child { border-top: 0; }
td:first-child { white-space: nowrap; }
td:nth-child(2):not(:last-child) { min-width: 5.8rem; } td { font-family: var(--mono); font-size: 0.82rem; }
details { margin-top: 0.9rem; } summary { cursor: pointer; color: var(--muted); font-size: 0.88rem; }
.marked { background: var(--warn); }
.numbers td { white-space: nowrap; } .numbers td:first-child { white-space: normal; overflow-wrap: break-word; }
.numbers td:first-child { min-width: 11rem; }
.warnings { margin: 0.9rem 0 0; padding: 0.7rem 1rem 0.7rem 2.1rem; background: var(--warn);
  border: 1px solid var(--line); border-left: 3px solid var(--c2); border-radius: 8px; overflow-wrap: anywhere; }
a { color: var(--c1); }
footer { margin-top: 3rem; padding-top: 0.9rem; border-top: 1px solid var(--line); color: var(--muted);
  font-size: 0.8rem; }
@media (max-width: 34rem) {
  body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.45rem; } h2 { margin-top: 2.25rem; }
  td:first-child { white-space: normal; } th, td { padding: 0.38rem 0.7rem; }
}
@media print {
  :root {
    --page: #fff; --card: #fff; --line: #ccc; --grid: #e5e5e5; --zero: #999; --text: #000; --muted: #444;
    --tint: #eef4f8; --tint-text: #0b4a73; --warn: #fff;
    --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #cc79a7; --c5: #e69f00; --c6: #56b4e9; --c7: #777;
  }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .panel, .thought, .figures > div { break-inside: avoid; } h2 { break-after: avoid; }
  .grid-of-panels { grid-template-columns: 1fr 1fr; }
}
"""
)


# Cc: controls; Cf: formats (bidi, zero width); Cs: lone surrogates; Co, Cn: private, unassigned; Zl, Zp: line breaks
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SAFE = re.compile(r"[ !#-%(-;=?-~]*")  # printable ASCII without what HTML escapes

_SYMBOLS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
_LINE_END = '<span class="space" title="U+000A">\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</span>'


def visible(text: str, one_line: bool = False) -> str:
    """Returns text as HTML content; line ends and tabs become symbols.

    Args:
        text: Text with any characters, NUL and lone surrogates included.
        one_line: Whether a line end is a symbol only; otherwise it also breaks the line.
    """
    if _SAFE.fullmatch(text):
        return text
    content = "".join(map(_visible_character, text))
    return content if one_line else content.replace(_LINE_END, f"{_LINE_END}\n")


def plain(text: str) -> str:
    """Returns text for an attribute or a `<title>`: like `visible`, but without markup."""
    if _SAFE.fullmatch(text):
        return text
    return "".join(html.escape(_name(character) or character) for character in text)


def _visible_character(character: str) -> str:
    name = _name(character)
    if name is None:
        return html.escape(character)
    return (
        f'<span class="{"space" if character in _SYMBOLS else "hidden"}" title="U+{ord(character):04X}">{name}</span>'
    )


def _name(character: str) -> str | None:
    """Returns a stand-in for a character that cannot be seen; None for one that can."""
    if unicodedata.category(character) not in _HIDDEN:
        return None
    return _SYMBOLS.get(character) or f"⟨U+{ord(character):04X}⟩"
