"""What a step and an evaluation report is what its names say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quietstar.config import ModelOptions, ObjectiveOptions, TrainConfig, TrainingOptions
from quietstar.objective import PRESETS
from quietstar.training.methods import compute_step, evaluate_on, objective_of, step_metrics
from tests.model.tiny import make_ids, make_model


def config(**options: object) -> TrainConfig:
    return TrainConfig(
        preset="plain",
        model=ModelOptions(positions="entropy:2"),
        training=TrainingOptions(batch_size=2, eval_batches=2, **options),  # type: ignore[arg-type]
    )


def test_base_and_talk_nll_are_of_the_same_tokens() -> None:
    """The whole text's NLL is another number; next to the talk NLL of hard positions it made thoughts look harmful."""
    model, ids = make_model(), make_ids(3, 9)
    output = model.learn(ids, anchors="entropy:2", seed=1)
    metrics = step_metrics(output)
    mask = output.target_mask
    torch.testing.assert_close(metrics["base_nll"], output.base_nll_at_target[mask].mean())
    torch.testing.assert_close(metrics["talk_nll"], output.talk_nll[mask].mean())
    torch.testing.assert_close(metrics["gain"], metrics["base_nll"] - metrics["talk_nll"])
    torch.testing.assert_close(metrics["text_nll"], output.base_nll.mean())
    assert abs(metrics["text_nll"] - metrics["base_nll"]) > 0.05
    first = (output.base_nll_at_target - output.talk_nll)[..., 0][mask[..., 0]].mean()
    torch.testing.assert_close(metrics["gain_0"], first)


def test_plain_language_modelling_is_the_text_nll() -> None:
    model, ids = make_model(), make_ids(2, 9)
    step = compute_step(config(method="language_modeling"))(model, ids, 0)
    expected = torch.nn.functional.cross_entropy(model.base(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(step.loss, expected)
    step.loss.backward()
    assert model.thought_embedding.weight.grad is None


@pytest.mark.parametrize("method", ["quietstar", "language_modeling"])
def test_an_evaluation_is_repeatable_and_independent_of_the_micro_batch(method: str) -> None:
    model, texts = make_model(), make_ids(9, 8)
    whole = evaluate_on(texts, config(method=method))(model)
    again = evaluate_on(texts, config(method=method))(model)
    assert whole == again
    unseen = texts.clone()
    unseen[4:] = 3  # two batches of two are used
    assert evaluate_on(unseen, config(method=method))(model) == whole
    if method == "language_modeling":
        small = evaluate_on(texts, config(method=method, micro_batch_size=1))(model)
        assert small["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_overrides_reach_the_objective() -> None:
    options = ObjectiveOptions(preset="authors", policy_weight=2.0, clamp_negative_advantage=False)
    wanted = replace(PRESETS["authors"], policy_weight=2.0, clamp_negative_advantage=False)
    assert objective_of(options) == wanted
