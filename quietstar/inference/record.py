"""What was thought while a text was generated."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TokenThoughts:
    """The thoughts in front of one new token of each row.

    Args:
        rows: int64 [R], the rows that were thought about.
        tokens: int64 [R, K, T].
        mixing_weight: float32 [R, K].
    """

    rows: Tensor
    tokens: Tensor
    mixing_weight: Tensor

    def cpu(self) -> TokenThoughts:
        """The same where it is read without waiting for a device at each row."""
        return TokenThoughts(self.rows.cpu(), self.tokens.cpu(), self.mixing_weight.cpu())


@dataclass
class ThinkingRecord:
    """Counts of a call of `generate`.

    Args:
        predictions: Next-token predictions made, in all rows that were still running.
        thought_at: How many of them had thoughts.
        seconds: Wall time of the call.
        thoughts: One entry for each new token, None where no row thought; empty unless they were asked for.
    """

    predictions: int = 0
    thought_at: int = 0
    seconds: float = 0.0
    thoughts: list[TokenThoughts | None] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the new tokens that were thought about."""
        return self.thought_at / self.predictions if self.predictions else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows in a second of wall time, the pass over the prompt included."""
        return self.predictions / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.predictions} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} a second; "
            f"thought at {100 * self.share:.0f} % of them"
        )
