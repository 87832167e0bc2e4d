"""Completions as text: what a decoder makes of the sampled tokens behind their prompt, and where a text ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from quietstar.data.examples import end_of_sequence

TOKENS_PER_CHARACTER = 4
"""At most: the bytes of a character in UTF-8."""
SLACK = 8
"""Tokens in front of those that can hold a stop string, so that special tokens and lost first spaces do not matter."""


class CompletionText:
    """Decodes completions, without special tokens.

    Args:
        tokenizer: The model's.
        stop: Strings that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        longest = max(map(len, self.stop), default=0)
        self._window = TOKENS_PER_CHARACTER * longest + SLACK

    def decode(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[str, bool]:
        """The text of a completion up to its first stop string, and whether it has one.

        A text is what the completion adds to the prompt's: alone, many decoders would drop its first space.
        """
        before, both = self._decode(prompt), self._decode([*prompt, *completion])
        text = both[len(before) :] if both.startswith(before) else self._decode(completion)
        ends = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def has_stop(self, completion: Sequence[int]) -> bool:
        """Whether a completion, up to its newest token, has come to a stop string."""
        if not self.stop:
            return False
        text = self._decode(completion[-self._window :])
        return any(stop in text for stop in self.stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def ending_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: object) -> frozenset[int]:
    """Tokens that end a completion: end-of-sequence, and those of the model's generation config that are special.

    Many chat models end a turn with a token of their own. A generation config alone is not to be trusted: where the
    model's configuration names no such token it may hold a default that is an ordinary token of this tokenizer.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    named = getattr(generation_config, "eos_token_id", None)
    others = {named} if isinstance(named, int) else set(named or ())
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset({end_of_sequence(tokenizer), *(others & (special | set(tokenizer.all_special_ids)))})
