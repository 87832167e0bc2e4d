"""A recording that does not belong to the model, the text or the settings is never used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quietstar import DataError, QuietStarForCausalLM, Thoughts
from quietstar.objective.learning import learn
from tests.model.tiny import make_model

IDS = torch.tensor([[5, 9, 3, 12, 7, 8, 2, 11]])


def scale_up(model: QuietStarForCausalLM, ids: torch.Tensor) -> None:
    model.config.embedding_scale = 3.0


def change_a_weight(model: QuietStarForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        next(model.base.parameters()).mul_(1.5)


def replace_a_weight(model: QuietStarForCausalLM, ids: torch.Tensor) -> None:
    parameter = next(model.base.parameters())
    parameter.data = parameter.data * 1.5


def change_the_text(model: QuietStarForCausalLM, ids: torch.Tensor) -> None:
    ids[0, 0] += 1


@pytest.mark.parametrize("change", [scale_up, change_a_weight, replace_a_weight, change_the_text])
def test_a_stale_recording_is_made_again(change: Callable[[QuietStarForCausalLM, torch.Tensor], None]) -> None:
    model, ids = make_model(thoughts_per_position=2), IDS.clone()
    thoughts = model.think(ids, record=True)
    change(model, ids)
    reused = learn(model, ids, thoughts=thoughts, reuse_sampling_pass=True).loss
    plain = learn(model, ids, thoughts=thoughts, reuse_sampling_pass=False).loss
    torch.testing.assert_close(reused, plain, atol=1e-4, rtol=1e-4)  # a foreign one is wrong by 0.1 and more


def test_a_recording_of_other_documents_is_made_again() -> None:
    model = make_model(thoughts_per_position=2)
    masks = [torch.tensor([[1, 1, 1, border, border, 2, 2, 2]]) for border in (1, 2)]
    thoughts = model.think(IDS, masks[0], record=True)
    reused, plain = (
        learn(model, IDS, masks[1], thoughts=thoughts, reuse_sampling_pass=reuse).loss for reuse in (True, False)
    )
    torch.testing.assert_close(reused, plain, atol=1e-4, rtol=1e-4)
    other = learn(model, IDS, masks[0], thoughts=thoughts).loss
    assert (other - plain).abs() > 1e-2


def test_a_recording_of_another_model_is_not_used() -> None:
    one, other = make_model(seed=0), make_model(seed=1)
    thoughts = one.think(IDS, record=True)
    reused = learn(other, IDS, thoughts=thoughts, reuse_sampling_pass=True).loss
    plain = learn(other, IDS, thoughts=thoughts, reuse_sampling_pass=False).loss
    torch.testing.assert_close(reused, plain, atol=1e-4, rtol=1e-4)  # a foreign one is wrong by 0.1 and more


@pytest.mark.parametrize("reuse_sampling_pass", [False, True])
@pytest.mark.parametrize(
    ("anchors", "token", "message"),
    [
        ([1, 2, 3, 4], 5, "side by side"),
        ([2, 2, 1, 1], 5, "must not decrease"),
        ([1, 1, 8, 8], 5, r"anchors 1\.\.8, needs positions in the text, 0\.\.7"),
        ([-1, -1, 2, 2], 5, r"anchors -1\.\.2"),
        ([1, 1, 2, 2], 4000, "tokens"),
        ([1, 1, 2, 2], -1, "tokens"),
    ],
)
def test_thoughts_that_cannot_be(anchors: list[int], token: int, message: str, reuse_sampling_pass: bool) -> None:
    model = make_model(thoughts_per_position=2)
    tokens = torch.full((1, 4, model.config.thought_length), token)
    thoughts = Thoughts(tokens, torch.tensor([anchors], dtype=torch.int32), torch.zeros(tokens.shape), 2)
    with pytest.raises(DataError, match=message):
        learn(model, IDS, thoughts=thoughts, reuse_sampling_pass=reuse_sampling_pass)


def test_a_router_draws_no_jitter_while_it_trains() -> None:
    """Mixtral multiplies a router's input by noise while training: sampling, forward and recomputation differed."""
    changes = {"model_type": "mixtral", "router_jitter_noise": 0.3, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = make_model(changes=changes).train()
    thoughts = model.think(IDS, record=True)
    losses = [learn(model, IDS, thoughts=thoughts, reuse_sampling_pass=reuse).loss for reuse in (True, False, False)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(losses[1], losses[2])
