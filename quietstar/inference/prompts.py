"""Prompts from arguments and files, and the options of their completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quietstar.config.options import (
    Count,
    Seed,
    ShareAbove0,
    SpecialTokensMean,
    TemperatureOr0,
    Text,
    ThoughtsPerToken,
    check,
)
from quietstar.data.rows import BadRow, OptionNames, text_of, unrendered
from quietstar.data.shards import MOST_ROW, local_file
from quietstar.data.sources import STANDARD_INPUT, place_of, standard_input
from quietstar.data.tokenizer import SpecialTokens, encode_prompt
from quietstar.errors import ConfigError, DataError
from quietstar.model.think_rule import parse_think

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FIELD = "prompt"
"""Field of a row that holds the prompt, unless an option says another."""
OPTIONS = OptionNames("prompts", "field", "special_tokens", "", "max_new_tokens", "checkpoint")


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Args:
        text: Text as the user gave it.
        place: Place that messages name, `prompt 2` or `file:line`.
    """

    text: str
    place: str

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        banned: Sequence[int] = (),
        special: SpecialTokens | None = None,
    ) -> list[int]:
        """Returns the token ids, with those that the tokenizer puts before a text; for an empty prompt, BOS alone.

        Args:
            tokenizer: Tokenizer of the model.
            banned: Token ids that no prompt may have, because they are reserved for thoughts.
            special: Rule for the texts of special tokens; None makes them these tokens.

        Raises:
            DataError: The text can't be encoded, has a banned token, or is empty and the tokenizer has no BOS.
        """
        try:
            tokens = encode_prompt(tokenizer, self.text, special)
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


def read_prompts(texts: Sequence[str], file: str | None, field: str = FIELD) -> list[Prompt]:
    """Returns the prompts that the argument `prompt` or `prompts` gives.

    Args:
        texts: Values of the argument `prompt`.
        file: Value of the argument `prompts`: a text with one prompt per line, or a file of another kind with one in
            each row; `-` is standard input.
        field: Field of a row that holds the prompt, or a chat.

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
    prompts = list(_prompts_of(str(file), field))
    if not prompts:
        raise DataError(f"{file}: is empty, needs at least one prompt")
    return prompts


def _prompts_of(path: str, field: str) -> Iterator[Prompt]:
    file = standard_input() if path == STANDARD_INPUT else local_file(path, OPTIONS.path)
    for row in file.rows(0, field, MOST_ROW, OPTIONS.field):
        try:
            text = text_of(row, field, unrendered, OPTIONS, may_be_empty=True)
        except BadRow as error:
            raise DataError(f"{place_of(row, error)}: {error}") from None
        if row.is_json or row.unit:
            yield from () if text is None else [Prompt(text, row.place)]
            continue
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
            yield Prompt(line, f"{row.source}:{number}")


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
        special_tokens: Meaning of a special token's text in a prompt, such as `<|endoftext|>`: `parse`, this token; or
            `text`, its characters.
    """

    max_new_tokens: Count = 64
    think: str = "always"
    thoughts_per_token: ThoughtsPerToken = 1
    thought_temperature: TemperatureOr0 | None = None
    temperature: TemperatureOr0 = 0.0
    top_k: Count | None = None
    top_p: ShareAbove0 | None = None
    seed: Seed = 0
    samples: Count = 1
    batch_size: Count = 8
    stop: tuple[Text, ...] = ()
    special_tokens: SpecialTokensMean = "parse"

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
