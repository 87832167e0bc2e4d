"""Which shallow models stand for a deep one. That real ones do is tested with the traces."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import Gemma2Config, MistralConfig, Qwen2MoeConfig

from quietstar.planning.meta_tensors import Work
from quietstar.planning.trace import Trace, extrapolate, layer_name, period_of

SIZES = (3, 50, 7)
"""Bytes of a layer of each kind."""


def trace_of(layers: int, kinds: int) -> Trace:
    """A step whose layers take turns: inputs are freed, and gradients made, from the last to the first."""
    sizes = [SIZES[index % kinds] for index in range(layers)]
    peaks = {("losses", ""): Counter(inputs=layers, logits=20)}
    work: Counter[Work] = Counter()
    for index, size in enumerate(sizes):
        gradients = sum(sizes[index + 1 :])
        peaks["backward pass", layer_name(index)] = Counter(inputs=index + 1, gradients=gradients, recompute=10 * size)
        work[Work(size, 2 * size, torch.float32)] += 1
    return Trace(
        micro_batches=1,
        text_tokens=8,
        stream_tokens=16,
        standing=Counter(weights=sum(sizes)),
        kept=Counter(weights=sum(sizes), inputs=layers),
        peaks=peaks,
        largest=Counter(inputs=layers, gradients=sum(sizes)),
        work={"backward pass": dict(work)},
    )


@pytest.mark.parametrize("layers", [12, 13, 14])
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_layers_that_take_turns_are_counted_in_turns(layers: int, kinds: int) -> None:
    few = 2 * kinds + layers % kinds
    found = extrapolate(trace_of(few, kinds), trace_of(few + kinds, kinds), few, kinds, layers)
    expected = trace_of(layers, kinds)
    assert (found.peak, found.peak_time) == (expected.peak, expected.peak_time)
    for name in ("standing", "kept", "largest"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.flops("backward pass") == expected.flops("backward pass")


def test_the_configuration_says_when_layers_repeat() -> None:
    assert period_of(MistralConfig(num_hidden_layers=6)) == 1
    assert period_of(Gemma2Config(num_hidden_layers=6)) == 2
    assert period_of(Qwen2MoeConfig(num_hidden_layers=6, mlp_only_layers=[2])) == 6  # all of them are traced
