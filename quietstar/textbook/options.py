"""Options of the embedded default experiment, the textbook of sums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TextbookOptions:
    """Options of the embedded default, used with `preset: textbook` only.

    Args:
        seeds: Number of seeds to run, counted from training.seed; the table shows their mean and spread.
        operands: Numbers in a sum: one count such as `4`, or a range such as `3-5`.
        useful_asides: Share of the textbook's bracketed asides that work the sum out; the others only repeat it.
        pretraining_steps: Steps in which the character model reads the textbook, before any thinking.
        controls: Also train the controls: without REINFORCE, pause tokens, and plain language modelling.
    """

    seeds: int = 1
    operands: str = "4"
    useful_asides: float = 0.3
    pretraining_steps: int = 1200
    controls: bool = True
