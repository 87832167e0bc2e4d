"""The decoding loop against its definition: one row, no cache, no padding, the whole text again for every token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from quietstar.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError
from quietstar.outer_loop.options import SamplingOptions
from quietstar.outer_loop.sampling import Generation, Request, make_sampler, sample_seed
from quietstar.outer_loop.sampling import transformers_sampler as module
from quietstar.outer_loop.sampling.decoding import Decoding
from quietstar.outer_loop.sampling.draw import draw, uniforms
from quietstar.outer_loop.sampling.transformers_sampler import TransformersSampler
from tests.model.tiny import make_base
from tests.outer_loop.sampling.conftest import CHARACTERS

OPTIONS = SamplingOptions(temperature=3.0, max_new_tokens=12, batch_size=5)
FEW_SHOT = (CHARACTERS * 2)[:24]
STOP = tuple(CHARACTERS[::6])
FAMILIES = (
    *("llama", "mistral_window", "qwen2", "qwen2_window", "qwen3", "gpt_neox", "gpt2", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "opt"),
)
"""gpt2 and opt have absolute positions, opt computes them itself; gemma2 has no SDPA; a window is 4 tokens."""


def requests(samples: int = 3) -> list[Request]:
    prompts = [FEW_SHOT + rest for rest in ("AB", "C", "BADCFEHG")]
    return [
        Request(prompt, sample_seed(0, prompt, index), f"{prompt[24:]} {index}")
        for index in range(samples)
        for prompt in prompts
    ]


def by_definition(model: Any, tokenizer: Any, request: Request, options: SamplingOptions) -> Generation:
    prompt = tokenizer(request.prompt)["input_ids"]
    tokens, logprob, reason = [], 0.0, "length"
    uniform = uniforms([request.seed], options.max_new_tokens)
    for step in range(options.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[:, -1]
        token, change = draw(
            logits, uniform[:, step], temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        tokens.append(int(token))
        logprob += float(change)
        if tokens[-1] == tokenizer.eos_token_id or CHARACTERS[tokens[-1] - 3] in STOP:
            reason = "stop"
            break
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generation(text.rstrip("".join(STOP)), logprob, len(tokens), reason)


def assert_same(actual: list[Generation], expected: list[Generation]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert dataclasses.replace(found, logprob=0.0) == dataclasses.replace(wanted, logprob=0.0)
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_gives_what_the_definition_gives(family: str, tokenizer: Any) -> None:
    # eager attention, gemma2's, rounds float64's least number to -inf, and a padded place that sees nothing to NaN
    model = make_base(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    asked = requests()
    expected = [by_definition(model, tokenizer, request, OPTIONS) for request in asked]
    assert len({generation.tokens for generation in expected}) > 2, "rows must end at different times"
    assert len({generation.text for generation in expected}) > 4
    sampler = TransformersSampler(model, tokenizer, OPTIONS, STOP)
    assert_same(sampler.sample(asked), expected)
    for batch in sampler.batches(asked):
        assert_same(sampler.sample([asked[index] for index in batch]), [expected[index] for index in batch])
