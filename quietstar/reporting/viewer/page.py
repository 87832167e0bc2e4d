"""The page around the data: one file, whose only script is ours by its hash."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template

from quietstar.reporting.text import plain

_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What could end the element that the data is in, or a line of a script: inside of JSON strings alone."""


def page(title: str, data: str) -> str:
    """A whole document.

    Args:
        title: Of the window.
        data: `thoughts.json`, as text.
    """
    script, style = _resource("page.js"), _resource("page.css")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    for character, escaped in _ESCAPED.items():
        data = data.replace(character, escaped)
    return Template(_resource("page.html")).substitute(
        policy=policy, title=plain(title), style=style, data=data, script=script
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of an inline element in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
