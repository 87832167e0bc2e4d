"""Generation with thoughts, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.inference.generated import PROMPTS, generate, new_tokens_of, thinking_model, thoughts_of
from tests.inference.naive_generation import naive_generate


@pytest.mark.parametrize("family", ["mistral_window", "qwen3", "gemma2", "gpt2"])
def test_every_token_is_that_of_the_definition(family: str) -> None:
    """Token for token and thought for thought, greedily, in a batch of mixed lengths."""
    model = thinking_model(family, thought_length=2)
    output = generate(model, PROMPTS, 64)
    found = new_tokens_of(output, 64)
    assert found[2] == found[0]  # the same prompt
    for row in (0, 1, 3):
        wanted = naive_generate(model, PROMPTS[row], 64)
        assert found[row] == wanted.tokens
        assert thoughts_of(output, row) == wanted.thoughts
    assert output.thinking.share == 1.0 and output.thinking.predictions == 4 * 64


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral_window", {"thoughts_per_token": 2}),
        ("qwen2_window", {"thoughts_per_token": 3, "thought_temperature": 0.7, "think": "every:3"}),
        ("gpt_neox", {"thought_temperature": 1.5, "think": "entropy>2.5"}),
        ("cohere", {"think": "entropy>3.606"}),
    ],
)
def test_every_draw_is_that_of_the_definition(family: str, options: dict[str, Any]) -> None:
    """Text and thoughts are drawn from the rows' own streams; two equal prompts go their own ways."""
    model = thinking_model(family, temperature=0.6)
    output = generate(model, PROMPTS, 12, do_sample=True, temperature=0.8, top_k=0, seed=5, **options)
    found = new_tokens_of(output, 12)
    assert found[0] != found[2]
    naive = {"thought_temperature": model.config.temperature if "thoughts_per_token" in options else 0.0, **options}
    thought_at = 0
    for row, same_before in enumerate((0, 0, 1, 0)):
        wanted = naive_generate(model, PROMPTS[row], 12, seed=5, same_before=same_before, text_temperature=0.8, **naive)
        assert found[row] == wanted.tokens
        assert thoughts_of(output, row) == wanted.thoughts
        thought_at += sum(thought is not None for thought in wanted.thoughts)
    record = output.thinking
    assert (record.predictions, record.thought_at, record.share) == (48, thought_at, thought_at / 48)
    assert thought_at == 48 if "think" not in options else 0 < thought_at < 48


@pytest.mark.parametrize(
    "settings",
    [
        {"interpolation": "log_probs"},
        {"embedding_scale": 3.0, "banned_token_ids": [11, 35]},
        {"thought_length": 1},
        {"thinking": "pause"},
    ],
)
def test_other_ways_to_think(settings: dict[str, Any]) -> None:
    model = thinking_model(**settings)
    output = generate(model, PROMPTS, 10, think="every:2")
    for row, prompt in enumerate(PROMPTS):
        wanted = naive_generate(model, prompt, 10, think="every:2")
        assert new_tokens_of(output, 10)[row] == wanted.tokens
        assert thoughts_of(output, row) == wanted.thoughts


def test_a_gate_decides_where_to_think() -> None:
    """Where its prediction is above the threshold; a threshold below and above all of them is always and never."""
    model = thinking_model(thinking_gate=True)
    assert model.thinking_gate is not None
    model.thinking_gate.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(3)))
    found = {rule: generate(model, PROMPTS, 8, think=rule) for rule in ("learned", "learned>-99", "learned>99")}
    shares = [found[rule].thinking.share for rule in ("learned>99", "learned", "learned>-99")]
    assert shares[0] == 0 < shares[1] < 1 == shares[2]
    assert torch.equal(found["learned>-99"].sequences, generate(model, PROMPTS, 8).sequences)
    model.config.thinking_threshold = 99.0
    assert generate(model, PROMPTS, 8, think="learned").thinking.share == 0
    ids = found["learned"].sequences
    for row, prompt in enumerate(PROMPTS):
        for index, thoughts in enumerate(thoughts_of(found["learned"], row)):
            text = ids[row : row + 1, 7 - len(prompt) : 7 + index]
            hidden = model.base.model(text).last_hidden_state[0, -1]
            assert bool(model.thinking_gate(hidden) > 0) == (thoughts is not None)
