"""Continuing texts: what a checkpoint advises about sampling does not reach what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from quietstar.inference.completing import continue_texts
from quietstar.inference.prompts import CompletionOptions
from quietstar.model.cache import ThinkingRecord
from quietstar.model.modeling import QuietStarForCausalLM
from tests.evaluation.evaluated import constant_model, tokenizer


@pytest.fixture
def model() -> QuietStarForCausalLM:
    """Whatever stands before, `7` is the likeliest character."""
    return constant_model({"7": 0.5, "1": 0.4, "x": 0.1})


def texts(model: QuietStarForCausalLM, think: str, temperature: float = 0.0) -> list[str]:
    own, options = tokenizer(), CompletionOptions(6, think, temperature=temperature)
    prompts = [own(text)["input_ids"] for text in ("a longer prompt", "short")]
    return [row.text for row in continue_texts(model, own, prompts, options, [1, 2], ThinkingRecord())]


@pytest.mark.parametrize("think", ["always", "never"])
def test_greedy_is_greedy_whatever_the_checkpoint_advises(model: QuietStarForCausalLM, think: str) -> None:
    (seven,) = tokenizer()("7")["input_ids"]
    drawn = texts(model, think, temperature=1.0)
    for owner in (model, model.base):
        advised = owner.generation_config
        advised.update(repetition_penalty=1.5, no_repeat_ngram_size=2, suppress_tokens=[seven], typical_p=0.2)
        advised.update(do_sample=True, temperature=3.0, top_k=1, min_new_tokens=9, bad_words_ids=[[seven]])
    before = model.generation_config.to_dict()
    assert texts(model, think) == ["777777", "777777"]
    assert texts(model, think, temperature=1.0) == drawn
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("think", ["always", "never"])
@pytest.mark.parametrize(
    ("named", "special", "ends"),
    [
        (None, "", ""),
        ([], "", ""),
        ("1", "", ""),  # a word, left from a default
        (["7", "1"], "", ""),
        ([10_000, -1], "", ""),  # no token at all
        ("x", "", ""),
        ("x", "x", "x"),
        (["x"], "x", "x"),
        (["</s>", "x"], "x", "x"),
        (["x", "1"], "x1", "x1"),
        (["x", "1"], "1", "1"),
    ],
)
def test_special_tokens_that_a_configuration_names_end_a_text(
    model: QuietStarForCausalLM, think: str, named: Any, special: str, ends: str
) -> None:
    """`generate` took the generation configuration's ending tokens alone: a default that was a word ended a text, and
    the tokenizer's own end did not where the configuration named a chat model's.
    """
    own = tokenizer()
    free = texts(model, think, temperature=1.0)
    assert any("1" in text[:-1] for text in free)

    def ids(value: Any) -> Any:
        if isinstance(value, list):
            return [ids(one) for one in value]
        return own.convert_tokens_to_ids(value) if isinstance(value, str) else value

    for owner in (model, model.base):
        owner.generation_config.eos_token_id = ids(named)
    own.add_special_tokens({"additional_special_tokens": list(special)})
    options = CompletionOptions(6, think, temperature=1.0)
    prompts = [own(text)["input_ids"] for text in ("a longer prompt", "short")]
    rows = continue_texts(model, own, prompts, options, [1, 2], ThinkingRecord())
    found = [own.decode(row.tokens, skip_special_tokens=False) for row in rows]
    assert found == [text[: min((text.find(end) + 1 for end in ends if end in text), default=6)] for text in free]
