"""The definition of generating with thoughts, slowly: every token of every thought runs the whole text again.

A row is alone and without padding, the model is transformers' own (`tests.model.naive`), and the rules for where to
think, the draws and the mean of several predictions are written out.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.model.draw import draw, uniforms
from tests.model.naive import NaiveThinker

GOLDEN = 0x9E3779B97F4A7C15


@dataclass
class NaiveText:
    """A continued row: its new tokens, and the thoughts [K][T] in front of each, None where there were none."""

    tokens: list[int]
    thoughts: list[list[list[int]] | None]


def naive_generate(
    model: QuietStarForCausalLM,
    prompt: list[int],
    new_tokens: int,
    *,
    think: str = "always",
    thoughts_per_token: int = 1,
    thought_temperature: float = 0.0,
    seed: int = 0,
    same_before: int = 0,
    text_temperature: float | None = None,
) -> NaiveText:
    """One row, greedily or, with `text_temperature`, drawn from its own stream.

    Args:
        same_before: Equal prompts above this row in its batch.
    """
    naive, config = NaiveThinker(model), model.config
    embed = naive.base.get_input_embeddings()
    start, end = (row * config.embedding_scale for row in naive.thought_embedding.weight)
    digest = hashlib.sha256(repr((seed, same_before, tuple(prompt))).encode()).digest()
    row_seed = int.from_bytes(digest[:8], "big")
    length = config.thought_length

    def after(text: list[int], stream: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [V] and state [E] behind a text and a stream, from scratch."""
        embeds = torch.cat([embed(torch.tensor(text)), *(vector[None] for vector in stream)])[None]
        logits, states = naive.run(embeds, len(text) - 1 if stream else -1, len(text))
        return logits[-1], states[-1]

    def choose(logits: Tensor, uniform: Tensor, temperature: float | None) -> int:
        logits = logits.clone()
        logits[list(model.banned)] = -math.inf
        if not temperature:
            return int(logits.argmax())
        return int(draw(logits[None], uniform[None], temperature=temperature)[0])

    text, result = list(prompt), NaiveText([], [])
    with torch.no_grad():
        for index in range(new_tokens):
            stream_seed = (row_seed + (index + 1) * GOLDEN) % 2**64
            numbers = uniforms([stream_seed], 1 + thoughts_per_token * length)[0]
            base_logits, base_state = after(text, [])
            logits = base_logits
            thoughts = None
            if _thinks(think, index, base_logits):
                thoughts, predictions = [], []
                for k in range(thoughts_per_token):
                    tokens: list[int] = []
                    stream = [start]
                    for step in range(length):
                        if config.thinking == "pause":
                            tokens.append(-1)
                            stream.append(start)
                            continue
                        thought_logits, _ = after(text, stream)
                        uniform = numbers[1 + k * length + step]
                        tokens.append(choose(thought_logits, uniform, thought_temperature))
                        stream.append(embed(torch.tensor(tokens[-1])))
                    thought_logits, state = after(text, [*stream, end])
                    weight = naive.weight(base_state, state)
                    if config.interpolation == "log_probs":
                        mixed = weight * thought_logits.log_softmax(-1) + (1 - weight) * base_logits.log_softmax(-1)
                    else:
                        mixed = weight * thought_logits + (1 - weight) * base_logits
                    thoughts.append(tokens)
                    predictions.append(mixed)
                logits = predictions[0]
                if thoughts_per_token > 1:
                    logits = torch.stack([mixed.softmax(-1) for mixed in predictions]).mean(0).log()
            if text_temperature is not None:
                logits = logits / text_temperature
            token = choose(logits, numbers[0], None if text_temperature is None else 1.0)
            text.append(token)
            result.tokens.append(token)
            result.thoughts.append(thoughts)
    return result


def _thinks(think: str, index: int, base_logits: Tensor) -> bool:
    if think.startswith("every:"):
        return index % int(think[6:]) == 0
    if think.startswith("entropy>"):
        logprobs = base_logits.log_softmax(-1)
        return bool(-(logprobs.exp() * logprobs).nansum() > float(think[8:]))
    return think == "always"
