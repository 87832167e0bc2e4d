"""The thought viewer: what a model thought at each token of a text, and what that gained, as a page and as JSON.

`thoughts.json`, version 1. Probabilities are rounded to 3 significant digits, all other numbers to 4 decimals; one that
is not finite is null. Log-probabilities are in nats. A token is the one that is predicted: its thoughts hang from the
position before it.

    version         1
    title           name of the page
    model           name (no path), family of the base, vocabulary, thought_length, lookahead J, interpolation,
                    thinking ("sample" or "pause")
    settings        thoughts K, top_k, temperature (null: greedy), seed, positions, tokens (at most so many), window and
                    overlap (tokens), training_length or null, device, dtype
    environment     python, packages (version by name), git (commit and whether it was dirty, or null)
    text.name       of the file
    text.cut        whether the file goes on after the last token
    text.tokens     [N] token ids
    text.pieces     {index: text} of tokens that end a character which others began; all else is in the vocabulary
    vocabulary      {id: text} of every id in the file; a list of bytes where the token alone is no whole character
    positions       one object for each token that was thought about, in the order of the text:
      token         its index in the text, from 1
      base          [J] log-probabilities without thought of the tokens token .. token + J - 1, fewer at the end
      before        [top_k] pairs of id and probability without thought, the most probable first
      mean          the same of the mean over the thoughts; only where K is more than 1
      thoughts      [K] objects: tokens [T] (null for pauses), logprob of the thought at its temperature,
                    weight w of the thought in the prediction of `token`, talk [J] log-probabilities of the same tokens
                    as in `base`, reward: sum over J of talk - base, advantage: reward less the mean of the position's
                    (null for one thought), after: as `before`, with this thought mixed in

The gain at a token is the mean over its thoughts of talk[0] - base[0].
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from quietstar.config.values import parse_positions
from quietstar.errors import ConfigError
from quietstar.reporting.page import plain
from quietstar.runs.files import write_whole

VERSION = 1
SMALLEST_TOKENS = 2
MOST_TOP_K = 100


@dataclass(frozen=True)
class ViewOptions:
    """What is shown.

    Args:
        tokens: At most so many of the text, at least 2.
        thoughts: Thoughts a position; by default those of the model's configuration, one for greedy thoughts and
            pauses.
        top_k: Most probable next tokens that are listed.
        temperature: Of the thoughts; by default that of the model's configuration.
        greedy: The most probable thought instead of sampled ones.
        seed: Of the thoughts.
        positions: `all`, `every:N`, or `entropy:K`, the K positions (or this share of them) at which the base is most
            uncertain.
        window: Tokens that the model reads at once; by default `training_length`, or else what its context holds.
        training_length: Tokens of the model's training texts, where that is known.
        model_name, text_name: For the page.

    Raises:
        ConfigError: A value is out of range.
    """

    tokens: int = 2000
    thoughts: int | None = None
    top_k: int = 8
    temperature: float | None = None
    greedy: bool = False
    seed: int = 0
    positions: str = "all"
    window: int | None = None
    training_length: int | None = None
    model_name: str = "model"
    text_name: str = "text"

    def __post_init__(self) -> None:
        if self.tokens < SMALLEST_TOKENS:
            raise ConfigError(f"tokens: got {self.tokens}, needs at least {SMALLEST_TOKENS}")
        if self.thoughts is not None and self.thoughts < 1:
            raise ConfigError(f"thoughts: got {self.thoughts}, needs at least 1")
        if self.greedy and (self.thoughts or 1) > 1:
            raise ConfigError(f"thoughts: got {self.thoughts} with greedy, which gives the same one each time; needs 1")
        if self.greedy and self.temperature is not None:
            raise ConfigError(f"temperature: got {self.temperature} with greedy, which has none")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature}, needs a value above 0")
        if not 1 <= self.top_k <= MOST_TOP_K:
            raise ConfigError(f"top_k: got {self.top_k}, needs 1 to {MOST_TOP_K}")
        parse_positions(self.positions)


_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What could end the element that the data is in, or a line of a script: inside of JSON strings alone."""


def write_page(content: dict[str, Any], out: Path) -> Path:
    """Writes the page and, with the ending `.json` beside it, its data; each file is whole at any moment.

    Args:
        content: What `quietstar.inference.viewed_thoughts.thoughts_of` gives.
        out: The page, usually `thoughts.html`; its directory is made where it does not exist.

    Returns:
        The page.

    Raises:
        ConfigError: `out` has the name of the data.
        OSError: A file cannot be written.
    """
    out = Path(out)
    data_file = out.with_suffix(".json")
    if data_file == out:
        raise ConfigError(f"out: got {out.name}, which is the name of the data; needs a name such as thoughts.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    write_whole(data_file, data + "\n")
    write_whole(out, _page(content["title"], data))
    return out


def _page(title: str, data: str) -> str:
    """A whole document.

    Args:
        title: Of the window.
        data: `thoughts.json`, as text.
    """
    script, style = _resource("viewer.js"), _resource("viewer.css")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    for character, escaped in _ESCAPED.items():
        data = data.replace(character, escaped)
    return Template(_resource("viewer.html")).substitute(
        policy=policy, title=plain(title), style=style, data=data, script=script
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression of an inline element in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
