"""What the tests of generating share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM
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
    settled = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(**pad_left(prompts), **settled, return_dict_in_generate=True, output_thoughts=True)


def new_tokens_of(output: Any, count: int) -> list[list[int]]:
    return output.sequences[:, -count:].tolist()


def thoughts_of(output: Any, row: int) -> list[list[list[int]] | None]:
    """The thoughts [K][T] in front of each new token of a row, None where there were none."""
    found = []
    for step in output.thinking.thoughts:
        place = [] if step is None else (step.rows == row).nonzero()[:, 0].tolist()
        found.append(step.tokens[place[0]].tolist() if place else None)
    return found
