"""Seeds as pure functions of where training is: a run's position is one integer, and no generator state is saved."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def thought_seed(seed: int, step: int) -> int:
    """Seed of the thoughts of one optimizer step.

    The numbers are folded one after another through the SplitMix64 finalizer, so neighbouring steps and seeds get
    unrelated values, and the thoughts of a step do not depend on what ran before it. All micro-batches of a step share
    the seed: a text's thoughts do not depend on how the step was cut up.

    Args:
        seed: The run's seed (any integer; taken modulo 2**64).
        step: Optimizer step, counted from 1.

    Returns:
        An integer in 0 .. 2**63 - 1.
    """
    return _fold(seed, step, 0, 0)


def module_seed(seed: int, step: int, micro_index: int) -> int:
    """Seed of the global generator (dropout) in one micro-batch: not the thoughts' own, or both would correlate.

    Args and result are those of `thought_seed`; micro_index is counted from 0.
    """
    return _fold(seed, step, micro_index, 1)


def _fold(*values: int) -> int:
    state = 0
    for value in values:
        state = _split_mix_64(state ^ (value & _MASK))
    return state >> 1


def _split_mix_64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
