"""Packed rows give what the plain model gives one example at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quietstar.data.batches import Batch
from quietstar.data.examples import Example, encode_example
from quietstar.errors import DataError
from quietstar.verifiers.pairs import (
    completion_logprobs,
    encode_pairs,
    make_pairs,
    rows_of,
    score_examples,
    token_logprobs,
)
from quietstar.verifiers.training import load_policy
from tests.verifiers.tiny import labelled


@pytest.fixture(scope="module")
def examples(base: Path) -> list[Example]:
    own = load_policy(str(base))[1]
    return [encode_example(own, one.prompt, one.completion) for one in labelled(2)]


@pytest.fixture(scope="module")
def plain(base: Path, examples: list[Example]) -> Tensor:
    """Each completion's log-probability by transformers' own forward and a softmax over whole logits, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    sums = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].double().log_softmax(-1)
        sums.append(logprobs.gather(1, tokens[0, 1:, None])[example.prompt_length - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize(("row_length", "batch_rows"), [(None, 8), (40, 1), (64, 2)])
def test_scores_are_those_of_the_plain_model_in_any_packing(
    base: Path, examples: list[Example], plain: Tensor, row_length: int | None, batch_rows: int
) -> None:
    model, _ = load_policy(str(base), "float64")
    scores = score_examples(model, examples, row_length, batch_rows)
    torch.testing.assert_close(scores.logprob, plain, rtol=1e-6, atol=0)  # its softmax and norms are float32
    assert scores.tokens.tolist() == [len(example) - example.prompt_length for example in examples]
    torch.testing.assert_close(scores.mean, plain / scores.tokens, rtol=1e-6, atol=0)


def test_training_rows_give_the_same_sums_and_a_gradient(base: Path) -> None:
    model, own = load_policy(str(base), "float64")
    groups = encode_pairs(own, make_pairs(labelled(2), 2, seed=0))
    rows = rows_of(groups)
    batch = Batch(rows.tokens, rows.attention_mask, (), loss_mask=rows.loss_mask)
    sums, counts = completion_logprobs(model, batch)
    expected = score_examples(model, [example for group in groups for example in group])
    torch.testing.assert_close(sums.detach().flatten(), expected.logprob)
    assert counts.flatten().tolist() == expected.tokens.tolist()
    (gradient,) = torch.autograd.grad(sums[0, 1], [model.head.weight])
    assert float(gradient.abs().max()) > 0


def test_a_text_ends_its_own_scores(base: Path, examples: list[Example]) -> None:
    """The scores of an example do not depend on its neighbours, and keep their order."""
    model, _ = load_policy(str(base))
    together = token_logprobs(model, examples, 64)
    backwards = token_logprobs(model, examples[::-1], 48, 1)[::-1]
    for one, other in zip(together, backwards, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_example_longer_than_the_context_is_named(base: Path) -> None:
    model, own = load_policy(str(base))
    long = encode_example(own, "Q:" + "1" * 60, "a=", "problem p7")
    with pytest.raises(DataError, match=r"problem p7: .* 65 tokens, but the model's context has 64"):
        score_examples(model, [long])
