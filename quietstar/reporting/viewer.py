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
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any

from quietstar.config.options import NOT_AN_OPTION, Count, Positions, Positive, at_least, check, within
from quietstar.errors import ConfigError
from quietstar.reporting.page import plain
from quietstar.runs.files import write_whole

VERSION = 1


@dataclass(frozen=True)
class ViewOptions:
    """What is shown.

    Args:
        tokens: Tokens of the text at most.
        thoughts: Thoughts at each position. Null: those of the model's training, or one for greedy thoughts and pauses.
        top_k: Number of the most probable next tokens that are listed.
        temperature: Sampling temperature of the thoughts. Null: that of the model's training.
        greedy: Show the most probable thought instead of sampled ones.
        seed: Seed of the thoughts.
        positions: Where to think; with `entropy:K` at the K positions (or this share of them) at which the base is most
            uncertain.
        window: Tokens that the model reads at once, half of them overlapping. Null: the length of its training texts,
            or what its context holds.
        training_length: Tokens of the model's training texts, where that is known.
        model_name: What the page calls the model.
        text_name: What the page calls the text.

    Raises:
        ConfigError: A value is out of range.
    """

    tokens: Annotated[int, at_least(2)] = 2000
    thoughts: Count | None = None
    top_k: Annotated[int, within(1, 100)] = 8
    temperature: Positive | None = None
    greedy: bool = False
    seed: int = 0
    positions: Positions = "all"
    window: int | None = None
    training_length: int | None = field(default=None, metadata=NOT_AN_OPTION)
    model_name: str = field(default="model", metadata=NOT_AN_OPTION)
    text_name: str = field(default="text", metadata=NOT_AN_OPTION)

    def __post_init__(self) -> None:
        check(self, cls=ViewOptions)
        if self.greedy and (self.thoughts or 1) > 1:
            raise ConfigError(f"thoughts: got {self.thoughts} with greedy, which gives the same one each time; needs 1")
        if self.greedy and self.temperature is not None:
            raise ConfigError(f"temperature: got {self.temperature} with greedy, which has none")


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
