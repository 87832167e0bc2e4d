"""Prompts from arguments and files, and the options of their completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.config.options import Count, NonNegative, Seed, ShareAbove0, Text, check
from quietstar.config.parsing import parse_json
from quietstar.data.rows import BYTE_ORDER_MARK, BadRow, decode
from quietstar.data.tokenizer import encode_prompt
from quietstar.errors import ConfigError, DataError
from quietstar.model.think_rule import parse_think

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FIELD = "prompt"
"""Field of a JSONL line that holds the prompt."""


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Args:
        text: Text as the user gave it.
        place: Place that messages name, `prompt 2` or `file:line`.
    """

    text: str
    place: str

    def encode(self, tokenizer: PreTrainedTokenizerBase, banned: Sequence[int] = ()) -> list[int]:
        """Returns the token ids, with those that the tokenizer puts before a text; for an empty prompt, BOS alone.

        Args:
            tokenizer: Tokenizer of the model.
            banned: Token ids that no prompt may have, because they are reserved for thoughts.

        Raises:
            DataError: The text can't be encoded, has a banned token, or is empty and the tokenizer has no BOS.
        """
        try:
            tokens = encode_prompt(tokenizer, self.text)
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from None
        if not tokens:
            if not isinstance(tokenizer.bos_token_id, int):
                raise DataError(
                    f"{self.place}: is empty, and the tokenizer has no beginning-of-sequence token to start from; "
                    "needs at least one token"
                )
            return [tokenizer.bos_token_id]
        for token in tokens:
            if token in banned:
                raise DataError(
                    f"{self.place}: contains {tokenizer.convert_ids_to_tokens(token)!r}, token {token}, which is kept "
                    "for thoughts; remove it"
                )
        return tokens


def read_prompts(texts: Sequence[str], file: str | None) -> list[Prompt]:
    """Returns the prompts that the argument `prompt` or `prompts` gives.

    Args:
        texts: Values of the argument `prompt`.
        file: Value of the argument `prompts`: a `.txt` file with one prompt per line, or a `.jsonl` file with one in
            the field `prompt` of each line.

    Raises:
        ConfigError: Both arguments are missing, both are given, or the file cannot be read.
        DataError: A line of the file does not hold a prompt; the message names file:line.
    """
    if bool(texts) == (file is not None):
        got = "missing" if file is None else "got it together with prompts"
        raise ConfigError(f"prompt: {got}; needs either --prompt TEXT, once or several times, or --prompts FILE")
    if texts:
        name = "prompt" if len(texts) == 1 else "prompt {}"
        return [Prompt(text, name.format(number)) for number, text in enumerate(texts, start=1)]
    path = Path(str(file))
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts: got {path}, needs a .txt file (one prompt per line) or .jsonl (field {FIELD!r})")
    try:
        lines = path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n")
    except OSError as error:
        raise ConfigError(f"prompts: cannot read {path} ({error.strerror})") from None
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path}: is empty, needs at least one prompt")
    read = _text_of_object if path.suffix == ".jsonl" else _text_of_line
    return [read(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _text_of_line(line: bytes, place: str) -> Prompt:
    try:
        return Prompt(decode(line.removesuffix(b"\r")), place)
    except BadRow as error:
        raise DataError(f"{place}: {error}") from None


def _text_of_object(line: bytes, place: str) -> Prompt:
    try:
        value = parse_json(line)
    except DataError as error:
        raise DataError(f"{place}: is not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get(FIELD), str):
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{place}: got {got}, needs an object whose field {FIELD!r} is a string")
    return Prompt(value[FIELD], place)


@dataclass(frozen=True)
class CompletionOptions:
    """Options of completing prompts; an option with the name of an argument of `generate` is that argument.

    Args:
        max_new_tokens: Largest number of new tokens per completion.
        think: Rule that says where to think: `always`, `never`, `entropy>x` (x in nats), `every:n`, `learned` or
            `learned>x` (x in nats).
        thoughts_per_token: Number of thoughts (K) before each token.
        thought_temperature: Sampling temperature of the thoughts; 0 takes the most probable token. Null: 0 for one
            thought, the model's for several.
        temperature: Sampling temperature of the text; 0 takes the most probable token.
        top_k: Number of most probable tokens to sample from. Null: all.
        top_p: Total probability of the most probable tokens to sample from. Null: all tokens.
        seed: Seed of the sampled tokens and thoughts.
        samples: Number of completions per prompt.
        batch_size: Prompts completed at once.
        stop: Texts that end a completion, with the token in which the text ends; may be given several times.
    """

    max_new_tokens: Count = 64
    think: str = "always"
    thoughts_per_token: Count = 1
    thought_temperature: NonNegative | None = None
    temperature: NonNegative = 0.0
    top_k: Count | None = None
    top_p: ShareAbove0 | None = None
    seed: Seed = 0
    samples: Count = 1
    batch_size: Count = 8
    stop: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        parse_think(self.think)
        check(self, cls=CompletionOptions)
        if self.temperature == 0:
            for name, default in (("top_k", None), ("top_p", None), ("samples", 1)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}: got {getattr(self, name)} at temperature 0, which always takes the most probable "
                        "token; needs a temperature above 0"
                    )

    @property
    def draws(self) -> bool:
        """Whether the completions depend on the seed."""
        thoughts = self.thought_temperature if self.thoughts_per_token == 1 else 1
        return self.temperature > 0 or (bool(thoughts) and self.think != "never")
