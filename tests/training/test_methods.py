"""What a step and an evaluation report is what its names say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar.config.objective import OBJECTIVE_PRESETS, ObjectiveOptions, objective_of
from quietstar.config.training import ModelOptions, TrainConfig, TrainingOptions
from quietstar.data.batches import Batch
from quietstar.objective.learning import learn
from quietstar.training.step import gain_by_difficulty, step_means
from quietstar.training.step_functions import compute_step, evaluate_on
from tests.model.tiny import gradients, make_ids, make_model


def config(positions: str = "entropy:2", objective: ObjectiveOptions | None = None, **options: Any) -> TrainConfig:
    return TrainConfig(
        preset="plain",
        model=ModelOptions(positions=positions),
        objective=objective or ObjectiveOptions(),
        training=TrainingOptions(**{"batch_size": 2, "eval_batches": 2, **options}),
    )


def whole(ids: Tensor, mask: Tensor | None = None) -> Batch:
    return Batch(ids, mask, [""] * len(ids))


def measure(model: Any, ids: Tensor, **options: Any) -> tuple[Any, dict[str, float]]:
    output = learn(model, ids, seed=1, **options)
    return output, step_means(output, whole(ids)).floats()


def test_base_and_talk_nll_are_of_the_same_tokens() -> None:
    """The whole text's NLL is another number; next to the talk NLL of hard positions it made thoughts look harmful."""
    output, metrics = measure(make_model(), make_ids(3, 9), anchors="entropy:2")
    mask = output.target_mask
    assert metrics["base_nll"] == pytest.approx(float(output.base_nll_at_target[mask].mean()))
    assert metrics["talk_nll"] == pytest.approx(float(output.talk_nll[mask].mean()))
    assert metrics["gain"] == pytest.approx(metrics["base_nll"] - metrics["talk_nll"])
    assert metrics["text_nll"] == pytest.approx(float(output.base_nll.mean()))
    assert abs(metrics["text_nll"] - metrics["base_nll"]) > 0.05


def test_each_lookahead_is_measured_apart() -> None:
    output, metrics = measure(make_model(), make_ids(3, 9), anchors="all")
    for j in range(3):
        mask = output.target_mask[..., j]
        base, talk = output.base_nll_at_target[..., j][mask].mean(), output.talk_nll[..., j][mask].mean()
        assert metrics[f"base_nll_{j}"] == pytest.approx(float(base))
        assert metrics[f"talk_nll_{j}"] == pytest.approx(float(talk))
        assert metrics[f"gain_{j}"] == pytest.approx(float(base - talk), rel=1e-4)


def test_thoughts_are_measured_at_their_own_temperatures() -> None:
    model = make_model(temperature=0.7)
    objective = replace(OBJECTIVE_PRESETS["default"], policy_temperature=3.0, clamp_negative_advantage=True)
    output, metrics = measure(model, make_ids(3, 9), anchors="all", objective=objective)
    thinking = output.target_mask.any(-1)
    assert metrics["thought_entropy"] == pytest.approx(-float(output.thoughts.logprob[thinking].mean()))
    assert metrics["thought_logprob"] == pytest.approx(float(output.thought_logprob[thinking].mean()))
    assert metrics["thought_entropy"] != pytest.approx(-metrics["thought_logprob"], rel=0.01)
    assert metrics["reward"] == pytest.approx(float(output.reward[thinking].mean()))
    assert metrics["reward_size"] == pytest.approx(float(output.reward[thinking].abs().mean()))
    assert metrics["advantage_size"] == pytest.approx(float(output.advantage[thinking].abs().mean()))
    weight = output.mixing_weight[output.target_mask].double()
    deviation = (metrics["mixing_weight_square"] - metrics["mixing_weight"] ** 2) ** 0.5
    assert deviation == pytest.approx(float(weight.std(correction=0)), rel=1e-6)


def test_the_entropy_of_thoughts_is_that_of_the_sampler() -> None:
    """With one thought token its distribution is known: the estimate's mean over many thoughts is its entropy."""
    model, ids = make_model(thought_length=1), make_ids(1, 3)
    anchors = torch.tensor([1])
    thoughts = model.think(ids, anchors=anchors, thoughts_per_position=4000, seed=1)
    output = learn(model, ids, thoughts=thoughts, reuse_sampling_pass=False)
    tokens = torch.arange(model.config.text_config.vocab_size).view(1, -1, 1)
    every = model.think(ids, anchors=anchors, thoughts_per_position=tokens.shape[1], tokens=tokens).logprob.double()
    entropy = -float((every.exp() * every).sum())
    spread = float((every.exp() * (every + entropy) ** 2).sum() ** 0.5)
    found = step_means(output, whole(ids)).floats()["thought_entropy"]
    assert abs(found - entropy) < 4 * spread / 4000**0.5


def test_thoughts_without_a_target_are_not_measured() -> None:
    """In the padding of the first text streams think, too: their entropies are of nothing."""
    model, ids = make_model(), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    output = learn(model, ids, mask, seed=1)
    found = step_means(output, whole(ids, mask)).floats()
    position = output.thoughts.anchor
    counted = (position < 3) | (torch.arange(2)[:, None] == 1)  # the last token of a text has no next one
    assert 0 < int(counted.sum()) < counted.numel()
    assert found["thought_entropy"] == pytest.approx(float(-output.thoughts.logprob[counted].mean()), rel=1e-5)
    assert found["thought_logprob"] == pytest.approx(float(output.thought_logprob[counted].mean()), rel=1e-5)
    assert found["reward"] == pytest.approx(float(output.reward[counted].mean()), rel=1e-4, abs=1e-6)
    assert found["advantage_size"] == pytest.approx(float(output.advantage[counted].abs().mean()), rel=1e-4)


def test_micro_batches_add_up_to_the_step() -> None:
    model, ids = make_model(), make_ids(4, 9)
    _, wanted = measure(model, ids, anchors="all")
    halves = []
    for first in (0, 2):
        part = whole(ids).part(first, 2)
        output = learn(model, part.tokens, anchors="all", seed=1, first_text=first, texts_in_step=4)
        halves.append(step_means(output, part))
    assert (halves[0] + halves[1]).floats() == pytest.approx(wanted, rel=1e-5)


def test_plain_language_modelling_is_the_text_nll() -> None:
    model, ids = make_model(), make_ids(2, 9)
    step = compute_step(config(method="language_modeling"))(model, whole(ids), 0)
    expected = torch.nn.functional.cross_entropy(model.base(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(step.loss, expected)
    step.loss.backward()
    assert model.thought_embedding.weight.grad is None


@pytest.mark.parametrize("method", ["quietstar", "language_modeling"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_evaluation_is_repeatable_and_independent_of_the_micro_batch(method: str, masked: bool) -> None:
    """Two batches of three texts, one or two at a time: a part of two counts twice as much as what is left over."""
    model, texts = make_model(), make_ids(9, 8)
    mask = None
    if masked:
        mask = torch.ones_like(texts)
        mask[0, 4:] = mask[3, :2] = 0

    def measured(texts: Tensor, micro_batch_size: int | None = None) -> dict[str, float]:
        options = config(method=method, batch_size=3, micro_batch_size=micro_batch_size)
        return dict(evaluate_on(texts, options, mask)(model))

    whole_steps = measured(texts)
    assert measured(texts) == whole_steps
    unseen = texts.clone()
    unseen[6:] = 3
    assert measured(unseen) == whole_steps
    for micro_batch_size in (1, 2):
        assert measured(texts, micro_batch_size) == pytest.approx(whole_steps, rel=1e-5, abs=1e-6)


def test_padding_is_not_evaluated() -> None:
    """Each text as a row of its own is the definition; padding holds what would be noticed."""
    model, texts = make_model(), make_ids(2, 9)
    mask = torch.ones_like(texts)
    mask[0, 6:] = 0
    for method in ("quietstar", "language_modeling"):
        options = config("all", method=method)
        found = evaluate_on(texts, options, mask)(model)["text_nll"]
        with torch.no_grad():
            rows = [model.base(texts[:1, :6]).logits, model.base(texts[1:]).logits]
        nll = [
            torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
            for logits, row in zip(rows, (texts[0, :6], texts[1]), strict=True)
        ]
        assert found == pytest.approx(float(sum(nll)) / 13, rel=1e-5)


@pytest.mark.parametrize("method", ["quietstar", "language_modeling"])
def test_documents_of_one_text_are_measured_as_texts_of_their_own(method: str) -> None:
    model, texts = make_model(), make_ids(1, 12)
    mask = torch.tensor([[1] * 5 + [2] * 7])
    options = config("all", method=method, batch_size=1, eval_batches=1)
    found = evaluate_on(texts, options, mask)(model)["text_nll"]
    first, second = (evaluate_on(part, options)(model)["text_nll"] for part in (texts[:, :5], texts[:, 5:]))
    assert found == pytest.approx((first * 4 + second * 6) / 10, rel=1e-5)
    step = compute_step(options)(model, whole(texts, mask), 0)
    assert step.weight == (10 if method == "language_modeling" else None)  # the other brings its own denominators


def test_difficulty_is_that_without_thought() -> None:
    """A thought that turns the order around: the tenth that was hardest gains most, though it is now the easiest."""
    base = torch.arange(20.0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    found = gain_by_difficulty(base, 19 - base)
    assert found == {f"gain_decile_{tenth}": 4.0 * tenth - 18 for tenth in range(10)}


def test_gain_by_difficulty_sorts_by_the_nll_without_thought() -> None:
    base = torch.tensor([5.0, 0.0, 3.0, 1.0, 4.0, 2.0, 9.0, 6.0, 8.0, 7.0])
    gain = torch.arange(10) * 0.1
    found = gain_by_difficulty(base.repeat_interleave(2), (base - gain).repeat_interleave(2))
    wanted = {int(place): float(value) for place, value in zip(base, gain, strict=True)}
    assert found == pytest.approx({f"gain_decile_{place}": wanted[place] for place in range(10)}, abs=1e-6)
    few = gain_by_difficulty(base[:3], base[:3] - 1)
    assert len(few) == 3 and set(few.values()) == {1.0}


class TestGradientNorms:
    """The gradients of the two parts of the loss, measured apart."""

    objective = ObjectiveOptions(policy_weight=3.0)

    def test_they_are_of_the_parts_of_the_loss(self) -> None:
        model, texts = make_model(), make_ids(2, 8)
        found = evaluate_on(texts, config("all", self.objective))(model)
        for name, changes in (
            ("gradient_norm_lm", {"policy_weight": 0.0}),
            ("gradient_norm_policy", {"base_weight": 0.0, "talk_weight": 0.0}),
        ):
            objective = replace(objective_of(self.objective), **changes)
            model.zero_grad()
            learn(model, texts, anchors="all", objective=objective, seed=1_234_567).loss.backward()
            wanted = torch.cat([gradient.flatten() for gradient in gradients(model).values()]).norm()
            assert found[name] == pytest.approx(float(wanted), rel=1e-4)

    @pytest.mark.parametrize("reuse", [True, False])
    def test_they_leave_no_trace(self, reuse: bool) -> None:
        model, texts = make_model(), make_ids(2, 8)
        learn(model, texts, anchors="all").loss.backward()
        before = gradients(model)
        model.mixing_head.requires_grad_(False)
        generator = torch.get_rng_state()
        model.eval()
        with torch.no_grad():
            evaluate_on(texts, config("all", self.objective, reuse_sampling_pass=reuse))(model)
        assert torch.equal(torch.get_rng_state(), generator)
        assert not model.training
        after = gradients(model)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    def test_a_sum_over_micro_batches_in_bfloat16_is_as_exact_as_in_one(self) -> None:
        model, texts = make_model(dtype=torch.bfloat16), make_ids(4, 8)
        found = [
            evaluate_on(texts, config("all", self.objective, batch_size=4, micro_batch_size=size))(model)
            for size in (4, 1)
        ]
        for name in ("gradient_norm_lm", "gradient_norm_policy"):
            assert found[0][name] == pytest.approx(found[1][name], rel=0.02)

    def test_without_a_policy_there_are_none(self) -> None:
        model, texts = make_model(), make_ids(2, 8)
        found = evaluate_on(texts, config(objective=ObjectiveOptions(policy_weight=0.0)))(model)
        assert not [name for name in found if name.startswith("gradient_norm")]
        pausing = make_model(thinking="pause")
        assert "gradient_norm_lm" not in evaluate_on(texts, config())(pausing)


def test_overrides_reach_the_objective() -> None:
    options = ObjectiveOptions(preset="authors", policy_weight=2.0, clamp_negative_advantage=False)
    wanted = replace(OBJECTIVE_PRESETS["authors"], policy_weight=2.0, clamp_negative_advantage=False)
    assert objective_of(options) == wanted
