"""How prompts are to be completed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quietstar.errors import ConfigError
from quietstar.inference.when import parse_think


@dataclass(frozen=True)
class CompletionOptions:
    """How to complete; what has the name of an argument of `generate` is that argument.

    Args:
        max_new_tokens: At most, of a completion.
        think: Where.
        thoughts_per_token: K.
        thought_temperature: None: as `generate` chooses.
        temperature: Of the text; 0 is greedy.
        top_k: None: all tokens.
        top_p: None: all tokens.
        seed: Of whatever is drawn.
        samples: Completions of each prompt.
        batch_size: Prompts at once.
        stop: A completion ends with the token that completes one of these.
    """

    max_new_tokens: int = 64
    think: str = "always"
    thoughts_per_token: int = 1
    thought_temperature: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    samples: int = 1
    batch_size: int = 8
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_think(self.think)
        for name in ("max_new_tokens", "thoughts_per_token", "samples", "batch_size", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, needs at least 1")
        for name in ("temperature", "thought_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}: got {value}, needs 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, needs more than 0 and at most 1")
        if "" in self.stop:
            raise ConfigError("stop: got an empty string, needs a character at least")
        if self.temperature == 0:
            for name, default in (("top_k", None), ("top_p", None), ("samples", 1)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}: got {getattr(self, name)} at temperature 0, where always the likeliest token is "
                        "taken; needs a temperature above 0"
                    )

    @property
    def draws(self) -> bool:
        """Whether anything depends on the seed."""
        thoughts = self.thought_temperature if self.thoughts_per_token == 1 else 1
        return self.temperature > 0 or (bool(thoughts) and self.think != "never")
