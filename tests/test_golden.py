"""The authors' training step, number by number (recordings in tests/golden).

Terms are compared absolutely, the recorded total relatively: REINFORCE with its weight of 1e6 makes it about 4e6, where
neighbouring float32 numbers are 0.25 or 0.5 apart. So the total can't show the two language-modelling terms or their
weights; they are held to the recording's own losses, and their sum and its gradients, without REINFORCE, to the naive
step of the benchmark, which is held to the same recordings.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.naive_step import NaiveObjective, naive_step
from quietstar import QuietStarForCausalLM
from quietstar.config.objective import OBJECTIVE_PRESETS, Objective
from quietstar.objective.learning import LearnOutput, learn
from tests.golden_recording import RECORDINGS, Recording, load_recording, relative_error

ABSOLUTE = 1e-4
TOTAL = 2e-6
GRADIENT = 1e-5
BACKENDS = ["reference", "torch"]


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=ABSOLUTE, rtol=0)


def run_step(
    recording: Recording, model: QuietStarForCausalLM, objective: Objective, reuse_sampling_pass: bool
) -> LearnOutput:
    """One step on the recorded batch and thoughts, with its backward pass."""
    expected = recording.tensors
    ids, mask = expected["input_ids"], expected["attention_mask"]
    thoughts = model.think(
        ids,
        mask,
        anchors=torch.arange(ids.shape[1]),
        tokens=recording.to_streams(expected["thought_tokens"]),
        record=reuse_sampling_pass,
    )
    step = learn(model, ids, mask, thoughts=thoughts, objective=objective, reuse_sampling_pass=reuse_sampling_pass)
    step.loss.backward()
    return step


def recorded_losses(recording: Recording) -> tuple[Tensor, Tensor]:
    """The base and the talk loss, by the authors' mean over the losses that are not zero."""
    talk = [recording.tensors[f"talk_nll.{j}"] for j in range(recording.lookahead)]
    base = recording.tensors["base_nll"]
    return base[base != 0].mean(), torch.stack([nll[nll != 0].mean() for nll in talk]).mean()


def naive_gradients(
    recording: Recording, model: QuietStarForCausalLM, objective: NaiveObjective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the same weights in the naive step, on the plain base model."""
    expected = recording.tensors
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain.base.set_attn_implementation("sdpa")
    mask = expected["attention_mask"]
    start, end = plain.thought_embedding.weight * recording.settings["embedding_scale"]
    step = naive_step(
        plain.base,
        plain.mixing_head.layers,
        start,
        end,
        expected["input_ids"],
        None if bool(mask.all()) else mask,
        thoughts_per_position=recording.passes,
        thought_length=recording.thought_length,
        lookahead=recording.lookahead,
        objective=objective,
        thought_tokens=expected["thought_tokens"],
        window=recording.settings["sliding_window"],
    )
    step.loss.backward()
    return step.loss.detach(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECORDINGS)
def test_language_modelling_terms_without_reinforce(name: str, backend: str) -> None:
    recording = load_recording(name)
    model = recording.model(backend=backend)
    objective = replace(OBJECTIVE_PRESETS["authors"], policy_weight=0.0)
    step = run_step(recording, model, objective, reuse_sampling_pass=True)
    base, talk = recorded_losses(recording)
    close(step.loss.detach(), 0.5 * base + 0.5 * talk)
    loss, gradients = naive_gradients(recording, model, NaiveObjective(policy_weight=0.0))
    close(step.loss.detach(), loss)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for key, gradient in gradients.items():
        assert relative_error(ours[key], gradient) < GRADIENT, (key, relative_error(ours[key], gradient))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reuse_sampling_pass", [False, True])
@pytest.mark.parametrize("name", RECORDINGS)
def test_step_equals_the_authors(name: str, reuse_sampling_pass: bool, backend: str) -> None:
    recording = load_recording(name)
    expected = recording.tensors
    model = recording.model(backend=backend)
    length, lookahead = expected["input_ids"].shape[1], recording.lookahead
    step = run_step(recording, model, OBJECTIVE_PRESETS["authors"], reuse_sampling_pass)

    base_loss, talk_loss = recorded_losses(recording)
    close(step.base_loss, base_loss)
    close(step.talk_loss, talk_loss)
    streams = recording.to_streams
    close(step.base_nll, expected["base_nll"][:: recording.passes])
    for j in range(lookahead):
        wanted = streams(expected[f"talk_nll.{j}"])
        close(step.talk_nll[:, : wanted.shape[1], j], wanted)
        real = step.target_mask[:, : wanted.shape[1], j]
        weight = streams(expected["mix_weight"][:, recording.settings["n_ahead"] - 2 + j, : length - 1 - j])
        close(step.mixing_weight[:, : wanted.shape[1], j][real], weight[real])
    trimmed = length - 1 - lookahead
    close(step.reward[:, : trimmed * recording.passes], streams(expected["reward_summed"]))
    close(step.advantage[:, : trimmed * recording.passes], streams(expected["reward_used"]))
    logprob = streams(expected["thought_logprob_t3"].transpose(1, 2))
    valid = step.target_mask[:, : logprob.shape[1]].any(-1)
    close(step.thought_logprob[:, : logprob.shape[1]][valid], logprob[valid])
    close(step.policy_loss, expected["policy_loss"][0])
    torch.testing.assert_close(step.loss.detach(), expected["total_loss"][0], atol=0, rtol=TOTAL)

    scale = model.config.embedding_scale
    for key, gradient in expected.items():
        if not key.startswith("grad."):
            continue
        their_name = key.removeprefix("grad.")
        if their_name in ("start_embedding", "end_embedding"):
            assert not gradient[1].any()
            row = 0 if their_name == "start_embedding" else 1
            ours, gradient = model.thought_embedding.weight.grad[row], gradient[0]
        elif their_name.startswith("talk_head.0."):
            ours = model.mixing_head.get_parameter("layers." + their_name.removeprefix("talk_head.0.")).grad
        else:
            ours = model.base.get_parameter(their_name).grad
        assert ours is not None, their_name
        assert relative_error(ours, gradient) < GRADIENT, (their_name, relative_error(ours, gradient))
    assert scale == recording.settings["embedding_scale"]
