"""Options of the embedded default experiment, the textbook of sums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TextbookOptions:
    """Options of the embedded default, used with `preset: textbook` only.

    Args:
        seeds: Number of seeds to run; the table shows their mean and spread.
    """

    seeds: int = 1
