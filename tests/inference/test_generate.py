"""Generation with thoughts: against its definition, and what it must have in common with transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM
from tests.inference.naive_generation import naive_generate
from tests.model.tiny import make_model

PROMPTS = [[1, 7, 12, 30, 4], [9, 8], [1, 7, 12, 30, 4], [21, 22, 23, 24, 25, 26, 27]]
"""Of mixed lengths, two of them equal."""
LONG = {"max_position_embeddings": 128}


def thinking_model(family: str = "mistral", **options: Any) -> QuietStarForCausalLM:
    changes = {"n_positions": 128} if family == "gpt2" else LONG
    return make_model(family, changes=changes, **{"thought_length": 3, **options})


def pad_left(prompts: list[list[int]], padding: int = 0) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model: QuietStarForCausalLM, prompts: list[list[int]], new_tokens: int, **options: Any) -> Any:
    """Without an end-of-sequence token, so that every row has as many new tokens."""
    options = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(**pad_left(prompts), **options, return_dict_in_generate=True, output_thoughts=True)


def new_tokens_of(output: Any, count: int) -> list[list[int]]:
    return output.sequences[:, -count:].tolist()


@pytest.mark.parametrize("family", ["mistral_window", "qwen3", "gemma2", "gpt2"])
def test_every_token_is_that_of_the_definition(family: str) -> None:
    model = thinking_model(family)
    output = generate(model, PROMPTS, 64)
    found = new_tokens_of(output, 64)
    for row, prompt in enumerate(PROMPTS):
        if row == 2:
            assert found[2] == found[0]  # the same prompt, greedily
            continue
        wanted = naive_generate(model, prompt, 64)
        assert found[row] == wanted.tokens
        thoughts = [step.tokens[row].tolist() for step in output.thinking.thoughts]
        assert thoughts == wanted.thoughts
    assert output.thinking.share == 1.0 and output.thinking.predictions == 4 * 64
