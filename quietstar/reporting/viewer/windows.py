"""A text that is longer than what a model reads at once is worked through in overlapping windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quietstar.errors import ConfigError


@dataclass(frozen=True)
class Window:
    """A part of a text, and the positions that think in it.

    Args:
        start: Its first token.
        end: The token after its last one.
        anchors: Positions of the whole text, increasing; each is in one window only.
    """

    start: int
    end: int
    anchors: tuple[int, ...]


def overlap(window: int) -> int:
    """Tokens that every position but those of the first window has at least in front of it, itself not counted."""
    return window // 2


def windows(length: int, anchors: Sequence[int], window: int, lookahead: int, most_anchors: int) -> list[Window]:
    """The windows of a text.

    A position thinks in the first window that holds all tokens that its thought is measured on; from the second window
    on, it is preceded there by at least half a window of text.

    Args:
        length: Tokens of the text.
        anchors: Positions that think, increasing, all before the last token.
        window: Tokens of a window.
        lookahead: Tokens that a thought is measured on.
        most_anchors: Positions that may think at once; windows with more are given several times.
    """
    found = []
    first = 0
    while first < length - 1:
        start = max(0, first - overlap(window))
        end = min(length, start + window)
        beyond = length - 1 if end == length else end - lookahead
        own = [anchor for anchor in anchors if first <= anchor < beyond]
        found += [
            Window(start, end, tuple(own[place : place + most_anchors])) for place in range(0, len(own), most_anchors)
        ]
        first = beyond
    return found


def window_size(
    window: int | None, training_length: int | None, context: int | None, stream: int, lookahead: int
) -> int | None:
    """Tokens of a window; None where a text of any length is one.

    Args:
        window: As asked for. By default the length of training texts, or where that is unknown what the context holds.
        training_length: Of the model, where it is known.
        context: Positions of the base, where they end.
        stream: Tokens of a thought's stream, which reaches beyond the text.
        lookahead: Tokens that a thought is measured on.

    Raises:
        ConfigError: It is too small for the lookahead, or too large for the context.
    """
    least = 2 * lookahead + 2
    most = None if context is None else context - stream
    if most is not None and most < least:
        raise ConfigError(
            f"window: the base has {context} positions and a thought takes {stream}; at least {least} tokens of text "
            "are needed besides"
        )
    if window is None:
        known = [size for size in (training_length, most) if size is not None]
        return max(least, min(known)) if known else None
    if window < least or (most is not None and window > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"window: got {window}, needs {wanted} tokens")
    return window
