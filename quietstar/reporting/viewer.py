"""The thought viewer: the thoughts of a model at each token of a text and their gain, as a page and as JSON.

The fields of `thoughts.json`, version 1, follow. Probabilities are rounded to 3 significant digits, all other numbers
to 4 decimals; a number that is not finite is null. Log-probabilities are in nats. `token` is the token that is
predicted: its thoughts start at the position before it.

    version         1
    title           name of the page
    model           name (no path), family of the base, vocabulary, thought_length, lookahead J, interpolation,
                    thinking ("sample" or "pause")
    settings        thoughts K, top_k, temperature (null: greedy), seed, positions, tokens (largest number of text
                    tokens), window and overlap (in tokens), training_length or null, device, dtype
    environment     python, packages (version by name), git (commit and whether it was dirty, or null)
    text.name       name of the text
    text.cut        whether the text continues after the last token
    text.tokens     [N] token ids
    text.pieces     {index: text} of tokens that end a character which earlier tokens began; the texts of all other
                    tokens are in the vocabulary
    vocabulary      {id: text} of every id in the file; a list of bytes if the token alone is not a whole character
    positions       one object for each token that was thought about, in the order of the text:
      token         index of the token in the text, from 1
      base          [J] log-probabilities without thought of the tokens token .. token + J - 1, fewer at the end
      before        [top_k] pairs of id and probability without thought, the most probable first
      mean          like `before`, for the mean over the thoughts; only if K is more than 1
      thoughts      [K] objects: tokens [T] (null for pauses), logprob of the thought at its temperature,
                    weight w of the thought in the prediction of `token`, talk [J] log-probabilities of the same tokens
                    as in `base`, reward: sum over J of talk - base, advantage: reward minus the mean reward of the
                    position (null for one thought), after: like `before`, with this thought mixed in

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

from quietstar.config.options import (
    NOT_AN_OPTION,
    Count,
    Positions,
    SpecialTokensMean,
    Temperature,
    at_least,
    check,
    within,
)
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
        special_tokens: Meaning of a special token's text in the text, such as `<|endoftext|>`: `parse`, this token; or
            `text`, its characters.
        training_length: Tokens of the model's training texts, where that is known.
        model_name: What the page calls the model.
        text_name: What the page calls the text.

    Raises:
        ConfigError: A value is out of range.
    """

    tokens: Annotated[int, at_least(2)] = 2000
    thoughts: Count | None = None
    top_k: Annotated[int, within(1, 100)] = 8
    temperature: Temperature | None = None
    greedy: bool = False
    seed: int = 0
    positions: Positions = "all"
    window: int | None = None
    special_tokens: SpecialTokensMean = "parse"
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
"""Characters that could end the element with the data, or a line of a script; they occur only inside JSON strings."""


def write_page(content: dict[str, Any], out: Path) -> Path:
    """Writes the page and, in the same directory with the suffix `.json`, its data; each file is whole at any moment.

    Args:
        content: Result of `quietstar.inference.viewed_thoughts.thoughts_of`: the fields of `thoughts.json`.
        out: Path of the page, usually `thoughts.html`; a missing directory is created.

    Returns:
        Path of the page.

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
    """Returns the whole HTML document.

    Args:
        title: Title of the browser window.
        data: Content of `thoughts.json` as text.
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
    """Returns the source expression of an inline element for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
