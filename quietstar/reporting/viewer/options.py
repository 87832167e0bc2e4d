"""What a page of thoughts shows."""

from __future__ import annotations

from dataclasses import dataclass

from quietstar.errors import ConfigError
from quietstar.positions import parse_positions

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
