"""Each option of the objective does what its docstring says, against formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.config.objective import Objective, resolve_objective
from quietstar.errors import ConfigError
from quietstar.objective.learning import LearnOutput, learn
from tests.model.tiny import gradients, make_ids, make_model

IDS = make_ids(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
COUNT, LOOKAHEAD = 3, 3


@pytest.fixture(scope="module")
def model() -> QuietStarForCausalLM:
    return make_model(dtype=torch.float64, thoughts_per_position=COUNT, lookahead=LOOKAHEAD, temperature=0.8)


def step_of(model: QuietStarForCausalLM, mask: Tensor | None = MASK, **options: Any) -> LearnOutput:
    """One step on the same thoughts each time."""
    thoughts = model.think(IDS, mask, seed=1)
    return learn(model, IDS, mask, thoughts=thoughts, objective=resolve_objective("default", **options))


def test_the_parts_add_up(model: QuietStarForCausalLM) -> None:
    for weights in ((0.5, 0.5, 1.0), (0.0, 1.0, 3.0), (2.0, 0.0, 0.0)):
        names = ("base_weight", "talk_weight", "policy_weight")
        step = step_of(model, **dict(zip(names, weights, strict=True)))
        parts = torch.stack([step.base_loss, step.talk_loss, step.policy_loss])
        torch.testing.assert_close(step.loss.detach(), (torch.tensor(weights, dtype=torch.float64) * parts).sum())


def test_losses_are_means_over_targets(model: QuietStarForCausalLM) -> None:
    step = step_of(model)
    has_target = (MASK[:, 1:] & MASK[:, :-1]).bool()
    assert torch.equal(step.base_nll != 0, has_target)
    torch.testing.assert_close(step.base_loss, step.base_nll[has_target].mean())
    per_lookahead = [step.talk_nll[..., j][step.target_mask[..., j]].mean() for j in range(LOOKAHEAD)]
    torch.testing.assert_close(step.talk_loss, torch.stack(per_lookahead).mean())


def test_target_mask_is_where_anchor_and_target_are_text(model: QuietStarForCausalLM) -> None:
    step = step_of(model)
    for b in range(2):
        for p, anchor in enumerate(step.thoughts.anchor[b].tolist()):
            for j in range(LOOKAHEAD):
                target = anchor + 1 + j
                inside = target < IDS.shape[1] and bool(MASK[b, anchor]) and bool(MASK[b, target])
                assert bool(step.target_mask[b, p, j]) == inside
                assert (float(step.talk_nll[b, p, j]) != 0) == inside
                expected = step.base_nll[b, target - 1] if inside else torch.zeros((), dtype=torch.float64)
                assert torch.equal(step.base_nll_at_target[b, p, j], expected)


def test_reward_is_the_improvement_summed_over_lookahead(model: QuietStarForCausalLM) -> None:
    step = step_of(model)
    torch.testing.assert_close(step.reward, (step.base_nll_at_target - step.talk_nll).sum(-1))
    assert step.reward.any() and not step.reward.requires_grad


def test_baselines(model: QuietStarForCausalLM) -> None:
    reward = step_of(model).reward.unflatten(1, (-1, COUNT))
    assert torch.equal(step_of(model, baseline="none").advantage, reward.flatten(1))
    mean = step_of(model, baseline="mean").advantage.unflatten(1, (-1, COUNT))
    torch.testing.assert_close(mean, reward - reward.mean(-1, keepdim=True))
    one_out = step_of(model, baseline="leave_one_out").advantage.unflatten(1, (-1, COUNT))
    for k in range(COUNT):
        others = [o for o in range(COUNT) if o != k]
        torch.testing.assert_close(one_out[..., k], reward[..., k] - reward[..., others].mean(-1))


def test_one_thought_has_no_mean_to_be_compared_with() -> None:
    """The authors subtract nothing when they sample one thought; the mean over it would leave nothing to learn from."""
    model = make_model(thoughts_per_position=1)
    step = learn(model, IDS, objective=resolve_objective("authors", clamp_negative_advantage=False))
    assert torch.equal(step.advantage, step.reward) and step.reward.any()


def test_clamping_keeps_the_thoughts_that_helped(model: QuietStarForCausalLM) -> None:
    free, clamped = step_of(model).advantage, step_of(model, clamp_negative_advantage=True).advantage
    assert (free < 0).any()
    assert torch.equal(clamped, free.clamp_min(0))


@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
def test_policy_temperature(model: QuietStarForCausalLM, temperature: float | None) -> None:
    step = step_of(model, policy_temperature=temperature)
    states = model.talk(IDS, MASK, step.thoughts).stream[:, :, :2]
    logits = states @ model.base.get_output_embeddings().weight.T / (0.8 if temperature is None else temperature)
    wanted = logits.log_softmax(-1).gather(-1, step.thoughts.tokens[..., None])[..., 0]
    torch.testing.assert_close(step.thought_logprob, wanted.detach())
    if temperature is None:
        torch.testing.assert_close(step.thought_logprob, step.thoughts.logprob, atol=1e-6, rtol=0)


def test_the_temperature_of_reinforce_is_that_of_the_thoughts(model: QuietStarForCausalLM) -> None:
    """Not that of the configuration, where a caller thought at another one."""
    thoughts = model.think(IDS, temperature=2.0)
    torch.testing.assert_close(
        learn(model, IDS, thoughts=thoughts).thought_logprob, thoughts.logprob, atol=1e-6, rtol=0
    )


def test_banned_tokens_are_left_out_of_the_policy_too() -> None:
    """REINFORCE scores a thought under the distribution that it was drawn from."""
    model = make_model(dtype=torch.float64, banned_token_ids=list(range(20)))
    step = learn(model, IDS, seed=1)
    assert (step.thoughts.tokens >= 20).all()
    torch.testing.assert_close(step.thought_logprob, step.thoughts.logprob, atol=1e-6, rtol=0)


@pytest.mark.parametrize("positions", ["valid", "authors"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_policy_loss(model: QuietStarForCausalLM, reduction: str, positions: str) -> None:
    step = step_of(model, token_reduction=reduction, policy_positions=positions)
    score = getattr(step.thought_logprob, reduction)(-1)
    if positions == "valid":
        counted = step.target_mask.any(-1)
        assert not counted[0, : 2 * COUNT].any()  # left padding
    else:
        counted = step.thoughts.anchor < IDS.shape[1] - 1 - LOOKAHEAD  # padding counted
        assert counted[0, : 2 * COUNT].all()
    torch.testing.assert_close(step.policy_loss, (-step.advantage * score)[counted].mean())


def test_loss_mean_nonzero_divides_by_the_losses_that_are_not_zero(model: QuietStarForCausalLM) -> None:
    """The two agree wherever no loss is exactly zero."""
    valid, nonzero = step_of(model), step_of(model, loss_mean="nonzero")
    torch.testing.assert_close(valid.loss, nonzero.loss)
    sure = make_model(dtype=torch.float64, thoughts_per_position=COUNT)
    with torch.no_grad():
        sure.base.get_output_embeddings().weight.mul_(
            1e4
        )  # a certain model: its right guesses have a loss of exactly 0
        guess = sure.base(IDS).logits[:, :-1].argmax(-1)
    ids = torch.cat([IDS[:, :1], guess], dim=1)
    valid, nonzero = (
        learn(sure, ids, objective=resolve_objective("default", loss_mean=mean)) for mean in ("valid", "nonzero")
    )
    zeros = int((valid.base_nll == 0).sum())
    total = valid.base_nll.numel()
    assert 0 < zeros < total
    torch.testing.assert_close(nonzero.base_loss * (total - zeros), valid.base_loss * total)


def test_reward_precision() -> None:
    """The authors' rewards are differences of bfloat16 NLLs; ours are float32 whatever the weights."""
    model = make_model(dtype=torch.bfloat16)
    thoughts = model.think(IDS, seed=1)
    exact, rounded = (
        learn(model, IDS, thoughts=thoughts, objective=resolve_objective("default", reward_precision=precision))
        for precision in ("float32", "model")
    )
    assert torch.equal(exact.talk_nll, rounded.talk_nll)
    wanted = (exact.base_nll_at_target.bfloat16().float() - exact.talk_nll.bfloat16().float()).sum(-1)
    assert torch.equal(rounded.reward, wanted)
    assert not torch.equal(exact.reward, rounded.reward)


def test_no_gradient_flows_through_the_reward(model: QuietStarForCausalLM) -> None:
    """With REINFORCE alone, what only the prediction after the thought depends on learns nothing."""
    model.zero_grad()
    step_of(model, base_weight=0.0, talk_weight=0.0).loss.backward()
    found = gradients(model)
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("mixing_head"))
    vectors = found["thought_embedding.weight"]
    assert vectors[0].any() and not vectors[1].any()  # START is before the thought's tokens, END behind them


def test_no_policy_gradient_from_padding(model: QuietStarForCausalLM) -> None:
    """Thoughts at padding and behind the text: their tokens, and what stands in the padding, do not matter."""
    thoughts = model.think(IDS, MASK, seed=1)
    counted = step_of(model).target_mask.any(-1)
    assert (~counted).any()
    tokens = torch.where(counted[..., None], thoughts.tokens, (thoughts.tokens + 5) % 40)
    other_ids = torch.where(MASK.bool(), IDS, (IDS + 7) % 40)
    found = []
    for ids, those in ((IDS, thoughts.tokens), (other_ids, tokens)):
        given_thoughts = model.think(ids, MASK, tokens=those)
        model.zero_grad()
        step = learn(model, ids, MASK, thoughts=given_thoughts)
        step.loss.backward()
        assert not step.advantage[~counted].any()
        found.append((step.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-5)


def test_policy_weight_zero_and_k_of_one(model: QuietStarForCausalLM) -> None:
    """Without REINFORCE there is no baseline to ask for two thoughts."""
    single = make_model(thoughts_per_position=1)
    step = learn(single, IDS, objective=Objective(policy_weight=0.0))
    assert not step.policy_loss.any()
    step.loss.backward()
    assert single.thought_embedding.weight.grad is not None and single.thought_embedding.weight.grad.any()


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """REINFORCE against the exact derivative: every thought of one token enumerated, the reward held fixed.

    With T = 1 and temperature 1, the derivative of sum_t p(t) R(t) is what the estimator expects, with any baseline.
    """
    model = make_model("gpt2", dtype=torch.float64, thought_length=1, lookahead=1, thoughts_per_position=2)
    ids, anchor = IDS[:1, :3], torch.tensor([1])
    vocabulary = torch.arange(40)
    every = model.think(ids, anchors=anchor, thoughts_per_position=40, tokens=vocabulary.view(1, 40, 1))
    scored = learn(model, ids, thoughts=every, objective=Objective(baseline="none"))
    reward, probability = scored.reward[0], every.logprob[0, :, 0].exp()
    torch.testing.assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    start = model.thought_embedding.weight

    states = model.talk(ids, None, every).stream[0, 0, 0]
    logprob = (states @ model.base.get_output_embeddings().weight.T).log_softmax(-1)
    (wanted,) = torch.autograd.grad(-(logprob.exp() * reward).sum(), start)

    total = torch.zeros_like(start)
    for baseline in ("none", "leave_one_out"):
        total.zero_()
        objective = Objective(base_weight=0.0, talk_weight=0.0, baseline=baseline)
        # the expectation over pairs of independent thoughts, each pair weighted by its probability
        for first in range(40):
            pairs = torch.stack([torch.full((40,), first), vocabulary], dim=1).view(40, 2, 1)
            thoughts = model.think(ids.expand(40, -1), anchors=anchor, tokens=pairs)
            step = learn(model, ids.expand(40, -1), thoughts=thoughts, objective=objective, reuse_sampling_pass=False)
            score = thoughts_score(model, ids, thoughts.tokens)
            weight = probability[first] * probability
            loss = -(weight[:, None] * step.advantage * score).sum() / 2
            total += torch.autograd.grad(loss, start)[0]
        torch.testing.assert_close(total, wanted, atol=1e-10, rtol=1e-9)


def thoughts_score(model: QuietStarForCausalLM, ids: Tensor, tokens: Tensor) -> Tensor:
    """log p of one-token thoughts at anchor 1, [B, P], differentiable."""
    embed = model.base.get_input_embeddings()
    states = torch.cat([embed(ids[0, :2]), model.thought_embedding.weight[:1]])
    logprob = model.base(inputs_embeds=states[None]).logits[0, -1].log_softmax(-1)
    return logprob[tokens[..., 0]]


@settings(max_examples=15)
@given(st.permutations(range(COUNT)), st.sampled_from(["default", "paper", "authors"]))
def test_the_order_of_a_positions_thoughts_does_not_matter(order: list[int], preset: str) -> None:
    model = make_model(dtype=torch.float64, thoughts_per_position=COUNT)
    thoughts = model.think(IDS, MASK, seed=1)
    shuffled = thoughts.tokens.unflatten(1, (-1, COUNT))[:, :, order].flatten(1, 2)
    first = learn(model, IDS, MASK, thoughts=thoughts, objective=preset)
    second = learn(model, IDS, MASK, thoughts=model.think(IDS, MASK, tokens=shuffled), objective=preset)
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(
        second.advantage.unflatten(1, (-1, COUNT)), first.advantage.unflatten(1, (-1, COUNT))[:, :, order]
    )


def test_learning_helps_where_it_can() -> None:
    """A few steps on one batch lower the loss: the signs are right."""
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for seed in range(12):
        optimizer.zero_grad()
        step = learn(model, IDS, seed=seed)
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.base_loss + step.talk_loss))
    assert losses[-1] < losses[0] - 1


def test_a_model_that_does_not_think_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="model: got a LlamaForCausalLM, needs a QuietStarForCausalLM"):
        learn(make_model("llama").base, IDS)  # type: ignore[arg-type]  # what a user may get wrong
