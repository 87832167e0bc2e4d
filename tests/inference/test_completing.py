"""Continuing texts: what a checkpoint advises about sampling does not reach what was asked for."""

from __future__ import annotations

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
def test_any_of_several_ends_ends_a_text(model: QuietStarForCausalLM, think: str) -> None:
    own = tokenizer()
    (one,) = own("1")["input_ids"]
    drawn = texts(model, think, temperature=1.0)
    assert any("1" in text[:-1] for text in drawn)
    for owner in (model, model.base):
        owner.generation_config.eos_token_id = [own.eos_token_id, one]
    assert texts(model, think, temperature=1.0) == [text[: text.find("1") + 1] or text for text in drawn]
