"""How the positions that think are written: `all`, `every:N` or `entropy:K`."""

from __future__ import annotations

from quietstar.errors import ConfigError

WANTED = "needs all, every:N (N at least 1), or entropy:K (K a count of at least 1, or a fraction between 0 and 1)"


def parse_positions(positions: str, name: str = "positions") -> tuple[str, float]:
    """Read `all`, `every:N` or `entropy:K`.

    Args:
        positions: What to read. A count is written with digits alone: 1.0 could be a count or all of the text.
        name: What the message calls it.

    Returns:
        The rule, and its number: N, a count K as a whole number or a fraction K below 1; 1 for `all`.

    Raises:
        ConfigError: Anything else.
    """
    if positions == "all":
        return positions, 1.0
    rule, _, amount = positions.partition(":")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if rule in ("every", "entropy") and amount.isdecimal() and number >= 1:
        return rule, number
    if rule == "entropy" and 0 < number < 1:
        return rule, number
    raise ConfigError(f"{name}: got {positions!r}, {WANTED}")
