"""Sampling thoughts, and mixing the prediction after one with the prediction without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.model.passes import PAUSE
from quietstar.objective.learning import learn
from tests.model.tiny import VOCABULARY, make_base, make_ids, make_model

IDS = make_ids(2, 6)


def test_shapes_and_dtypes() -> None:
    model = make_model(thought_length=3)
    thoughts = model.think(IDS, anchors="every:2", thoughts_per_position=4)
    assert thoughts.tokens.shape == thoughts.logprob.shape == (2, 12, 3)
    assert (thoughts.tokens.dtype, thoughts.anchor.dtype, thoughts.logprob.dtype) == (
        torch.int64,
        torch.int32,
        torch.float32,
    )
    assert thoughts.thoughts_per_position == 4
    assert not thoughts.logprob.requires_grad


def test_the_same_seed_gives_the_same_thoughts() -> None:
    model = make_model(thought_length=4)
    first, again, other = (model.think(IDS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logprob, again.logprob)
    assert not torch.equal(first.tokens, other.tokens)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model.think(IDS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # a run's other randomness is left alone


def test_the_thoughts_of_one_position_differ() -> None:
    thoughts = make_model(thought_length=4).think(IDS, thoughts_per_position=8)
    distinct = {tuple(tokens) for tokens in thoughts.tokens[0, :8].tolist()}
    assert len(distinct) > 4


def test_greedy_thoughts_are_the_most_probable_tokens_one_after_the_other() -> None:
    model = make_model("gpt2", thought_length=3)
    thoughts = model.think(IDS, greedy=True, thoughts_per_position=1)
    for seed in (1, 2):
        assert torch.equal(model.think(IDS, greedy=True, thoughts_per_position=1, seed=seed).tokens, thoughts.tokens)
    embed = model.base.get_input_embeddings()
    for p, anchor in enumerate(thoughts.anchor[0].tolist()):
        states = torch.cat([embed(IDS[0, : anchor + 1]), model.thought_embedding.weight[:1]])
        for step in range(3):
            token = model.base(inputs_embeds=states[None]).logits[0, -1].argmax()
            assert int(thoughts.tokens[0, p, step]) == int(token)
            states = torch.cat([states, embed(token[None])])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_and_log_probabilities_are_those_of_the_temperature(temperature: float) -> None:
    """One position, one token, many draws: a chi-squared test at a fixed seed, against the model's own softmax."""
    model = make_model(thought_length=1, lookahead=1)
    ids, count = IDS[:1, :3], 4000
    thoughts = model.think(ids, anchors=torch.tensor([1]), thoughts_per_position=count, temperature=temperature)
    embed = model.base.get_input_embeddings()
    states = torch.cat([embed(ids[0, :2]), model.thought_embedding.weight[:1]])
    logits = model.base(inputs_embeds=states[None]).logits[0, -1].detach()
    logprob = (logits / temperature).log_softmax(-1)
    tokens = thoughts.tokens.flatten()
    torch.testing.assert_close(thoughts.logprob.flatten(), logprob[tokens], atol=1e-4, rtol=1e-4)
    assert thoughts.temperature == temperature
    expected = count * logprob.exp()
    likely = expected > 5
    observed = torch.bincount(tokens, minlength=VOCABULARY).float()
    statistic = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_the_tokens_of_a_thought_are_drawn_independently() -> None:
    """With a head of zeros all tokens are equally likely at every step, and the distance between two tokens of a
    thought, around the vocabulary, is uniform too: they are equal once in V times. With the same random numbers at
    every step they would always be. So it is for thoughts of neighbouring seeds at any two steps."""
    model = make_model(thought_length=3, lookahead=1)
    with torch.no_grad():
        model.base.get_output_embeddings().weight.zero_()
    count, anchors = 4000, torch.tensor([1])
    first, second = (
        model.think(IDS[:1, :3], anchors=anchors, thoughts_per_position=count, seed=seed).tokens[0] for seed in (0, 1)
    )
    pairs = [(first[:, i], first[:, j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    pairs += [(first[:, i], second[:, j]) for i in range(3) for j in range(3)]
    for one, other in pairs:
        observed = ((other - one) % VOCABULARY).bincount(minlength=VOCABULARY).float()
        statistic = float(((observed - count / VOCABULARY) ** 2).sum()) * VOCABULARY / count
        assert statistic < 39 + 4 * math.sqrt(2 * 39)  # chi-squared with V - 1 degrees of freedom


def test_banned_tokens_are_never_thought_and_their_probability_goes_to_the_others() -> None:
    model = make_model(thought_length=1)
    free = model.think(IDS, greedy=True, thoughts_per_position=1)
    banned = sorted(set(free.tokens.flatten().tolist()))
    strict = make_model(thought_length=1, banned_token_ids=banned)
    for thoughts in (strict.think(IDS, greedy=True), strict.think(IDS, thoughts_per_position=50)):
        assert not torch.isin(thoughts.tokens, torch.tensor(banned)).any()
    one = strict.think(IDS[:1, :2], thoughts_per_position=2000)
    seen = dict(zip(one.tokens.flatten().tolist(), one.logprob.exp().flatten().tolist(), strict=True))
    assert sum(seen.values()) > 0.95


def test_scoring_given_tokens_gives_the_log_probabilities_of_sampling_them() -> None:
    model = make_model("qwen3", thought_length=3)
    for temperature in (1.0, 0.5):
        sampled = model.think(IDS, seed=1, temperature=temperature)
        scored = model.think(IDS, tokens=sampled.tokens, temperature=temperature)
        torch.testing.assert_close(scored.logprob, sampled.logprob, atol=1e-4, rtol=1e-4)


def test_pausing_repeats_start() -> None:
    """A pausing model is one whose thought tokens have the embedding of START."""
    pausing = make_model("gpt2", thinking="pause", embedding_scale=2.0)
    thoughts = pausing.think(IDS)
    assert (thoughts.tokens == PAUSE).all() and not thoughts.logprob.any()
    speaking = make_model("gpt2", embedding_scale=2.0)
    with torch.no_grad():
        speaking.base.get_input_embeddings().weight[9] = pausing.thought_vectors()[0]
        pausing.base.get_input_embeddings().weight[9] = pausing.thought_vectors()[0]
    nines = speaking.think(IDS, tokens=torch.full_like(thoughts.tokens, 9))
    wanted = speaking.predict(IDS, thoughts=nines)
    found = pausing.predict(IDS, thoughts=thoughts)
    torch.testing.assert_close(found.talk_logits, wanted.talk_logits)
    step = learn(pausing, IDS)
    assert not step.policy_loss.any() and step.loss.requires_grad
    step.loss.backward()
    assert pausing.thought_embedding.weight.grad is not None and pausing.thought_embedding.weight.grad[0].any()


def test_an_untrained_head_gives_its_initial_weight_everywhere() -> None:
    for activation, weight in (("identity", 0.1), ("sigmoid", 0.1), ("identity", 0.0), ("sigmoid", 0.7)):
        model = QuietStarForCausalLM.from_base(
            make_base(), start_text=[5], end_text=[6], mixing_activation=activation, initial_mixing_weight=weight
        )
        found = learn(model, IDS).mixing_weight
        torch.testing.assert_close(found, torch.full_like(found, weight))


def test_the_authors_head_starts_cold() -> None:
    """At w = 0 the thought changes nothing: rewards and gradients of START and END are exactly zero, and the head's
    last layer is the only thing beyond the base that learns. A small initial weight makes all of them move.
    """
    options = {"start_text": [5], "end_text": [6]}
    cold = QuietStarForCausalLM.from_base(make_base(), initial_mixing_weight=None, **options)
    assert cold.mixing_head.output.bias is None
    step = learn(cold, IDS)
    assert not step.mixing_weight.any() and not step.reward.any() and not step.advantage.any()
    torch.testing.assert_close(step.talk_nll, step.base_nll_at_target, atol=0, rtol=0)
    step.loss.backward()
    assert not cold.thought_embedding.weight.grad.any()
    assert cold.mixing_head.output.weight.grad.any()
    assert not cold.mixing_head.layers[0].weight.grad.any()
    half = QuietStarForCausalLM.from_base(
        make_base(), initial_mixing_weight=None, mixing_activation="sigmoid", **options
    )
    assert (learn(half, IDS).mixing_weight == 0.5).all()
    warm = QuietStarForCausalLM.from_base(make_base(), initial_mixing_weight=0.1, **options)
    step = learn(warm, IDS)
    step.loss.backward()
    assert step.reward.any() and warm.thought_embedding.weight.grad.any(dim=1).all()


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
@pytest.mark.parametrize("interpolation", ["logits", "log_probs"])
def test_mixing_as_the_formulas_say(interpolation: str, activation: str) -> None:
    """Section 4.3: log p = w log p_thought + (1-w) log p_base; the authors' code mixes the logits instead."""
    model = make_model(dtype=torch.float64, interpolation=interpolation, mixing_activation=activation)
    thoughts = model.think(IDS, seed=1)
    states = model.talk(IDS, None, thoughts)
    head = model.base.get_output_embeddings().weight
    step = learn(model, IDS, thoughts=thoughts)
    for b, p, j in ((0, 0, 0), (1, 5, 2), (0, 7, 1)):
        i = int(thoughts.anchor[b, p])
        base, thought = states.text[b, i + j], states.stream[b, p, 2 + 1 + j]
        output = model.mixing_head.layers(torch.cat([base, thought]))[0]
        w = torch.sigmoid(output) if activation == "sigmoid" else output
        torch.testing.assert_close(step.mixing_weight[b, p, j], w.detach())
        if interpolation == "logits":
            logprob = (w * (head @ thought) + (1 - w) * (head @ base)).log_softmax(-1)
        else:
            logprob = w * (head @ thought).log_softmax(-1) + (1 - w) * (head @ base).log_softmax(-1)
        nll = -logprob[IDS[b, i + j + 1]]
        torch.testing.assert_close(step.talk_nll[b, p, j], nll.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interpolation", ["logits", "log_probs"])
@pytest.mark.parametrize("family", ["mistral", "cohere"])
def test_predictions_are_those_that_the_loss_scores(family: str, interpolation: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype, interpolation=interpolation)
    thoughts = model.think(IDS, seed=1)
    step, prediction = learn(model, IDS, thoughts=thoughts), model.predict(IDS, thoughts=thoughts)
    assert (
        prediction.talk_logits.dtype == prediction.base_logits.dtype == prediction.mixing_weight.dtype == torch.float32
    )
    target = IDS.gather(1, thoughts.anchor.long() + 1)[..., None]
    tolerance = 1e-4 if dtype == torch.float32 else 0.2  # in bfloat16 the sampling and the talk pass round differently
    talk = prediction.talk_logits if interpolation == "log_probs" else prediction.talk_logits.log_softmax(-1)
    torch.testing.assert_close(-talk.gather(-1, target)[..., 0], step.talk_nll[..., 0], atol=tolerance, rtol=0)
    base = -prediction.base_logits.log_softmax(-1).gather(-1, target)[..., 0]
    torch.testing.assert_close(base, step.base_nll_at_target[..., 0], atol=tolerance, rtol=0)


def test_losses_and_rewards_are_float32_whatever_the_weights() -> None:
    step = learn(make_model(dtype=torch.bfloat16), IDS)
    for name in ("loss", "base_nll", "talk_nll", "reward", "advantage", "mixing_weight", "thought_logprob"):
        assert getattr(step, name).dtype == torch.float32, name
    quantum = step.reward * 64  # NLLs between 2 and 4 in bfloat16 are multiples of 1/64
    assert (quantum - quantum.round()).abs().max() > 0.05


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (None, {"anchors": "every:2"}),
        (None, {"anchors": "entropy:2"}),
        ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], {}),
        ([[1, 1, 2, 2, 2], [1, 2, 2, 2, 0]], {}),
    ],
)
def test_the_layers_get_tensors_of_one_layout(
    mask: list[list[int]] | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """START and the positions came expanded, without memory of their own: a compiled layer was compiled twice."""
    model, ids = make_model(), make_ids(2, 5)
    seen: list[bool] = []
    run = model.run_decoder

    def watched(embeds: Tensor, position_ids: Tensor, thought_pass: Any) -> Tensor:
        seen.extend((embeds.is_contiguous(), position_ids.is_contiguous()))
        return run(embeds, position_ids, thought_pass)

    monkeypatch.setattr(model, "run_decoder", watched)
    learn(model, ids, None if mask is None else torch.tensor(mask), **options)
    assert len(seen) >= 2 * (2 + model.config.thought_length) and all(seen)
