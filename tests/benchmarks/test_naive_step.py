"""The benchmark's naive step is a fair opponent only if it computes the same training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from benchmarks.naive_step import RELEASED, NaiveObjective, NaiveStep, naive_step

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TALK_HEAD = {"0": "talk_head.0.0", "2": "talk_head.0.2", "4": "talk_head.0.4"}


class Recording:
    """One recorded training step of the released code and the same model on plain transformers."""

    def __init__(self, name: str) -> None:
        self.settings = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        s = self.settings
        config = MistralConfig(
            vocab_size=s["vocab_size"],
            hidden_size=s["hidden_size"],
            intermediate_size=s["intermediate_size"],
            num_hidden_layers=s["num_hidden_layers"],
            num_attention_heads=s["num_attention_heads"],
            num_key_value_heads=s["num_key_value_heads"],
            rope_parameters={"rope_type": "default", "rope_theta": s["rope_theta"]},
            rms_norm_eps=s["rms_norm_eps"],
            sliding_window=s["sliding_window"],
            attn_implementation="sdpa",
        )
        self.base = MistralForCausalLM(config)
        weights = {k.removeprefix("weight."): v for k, v in self.tensors.items() if k.startswith("weight.")}
        self.base.load_state_dict({k: v for k, v in weights.items() if k.startswith(("model.", "lm_head."))})
        hidden = s["hidden_size"]
        self.head = nn.Sequential(
            nn.Linear(2 * hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1, bias=False),
        )
        self.head.load_state_dict(
            {f"{own}.{p}": weights[f"{theirs}.{p}"] for own, theirs in TALK_HEAD.items() for p in self._parts(own)}
        )
        self.start = weights["start_embedding"].clone().requires_grad_()
        self.end = weights["end_embedding"].clone().requires_grad_()

    @staticmethod
    def _parts(layer: str) -> list[str]:
        return ["weight"] if layer == "4" else ["weight", "bias"]

    def step(self, objective: NaiveObjective = RELEASED, **changes: object) -> NaiveStep:
        s = self.settings
        mask = self.tensors["attention_mask"]
        arguments: dict[str, object] = {
            "thoughts_per_position": s["passes"],
            "thought_length": s["n_ahead"] - 3,
            "lookahead": s["n_ahead_talk"],
            "objective": objective,
            "thought_tokens": self.tensors["thought_tokens"],
            "banned": (s["start_id"], s["end_id"]),
            "window": s["sliding_window"],
        }
        return naive_step(
            self.base,
            self.head,
            self.start[0] * s["embedding_scale"],
            self.end[0] * s["embedding_scale"],
            self.tensors["input_ids"],
            None if bool(mask.all()) else mask,
            **{**arguments, **changes},
        )

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.base.named_parameters()}
        for own, theirs in TALK_HEAD.items():
            for part in self._parts(own):
                found[f"{theirs}.{part}"] = self.head.get_parameter(f"{own}.{part}").grad
        found["start_embedding"], found["end_embedding"] = self.start.grad, self.end.grad
        assert all(g is not None for g in found.values())
        return {name: g for name, g in found.items() if g is not None}


@pytest.mark.parametrize("name", ["basic", "padded", "window"])
@pytest.mark.parametrize("intermediate", [True, False], ids=["as_released", "lean"])
def test_equals_the_released_step(name: str, intermediate: bool) -> None:
    recording = Recording(name)
    golden = recording.tensors
    step = recording.step(intermediate_predictions=intermediate)
    step.loss.backward()

    def close(got: Tensor, key: str) -> None:
        torch.testing.assert_close(got.reshape(golden[key].shape), golden[key], atol=1e-4, rtol=1e-5, msg=key)

    real = golden["attention_mask"].repeat_interleave(recording.settings["passes"], dim=0).bool()
    close(step.base_nll, "base_nll")
    for j, values in enumerate(step.talk_nll):
        close(values, f"talk_nll.{j}")
    trimmed = step.advantage.shape[1]
    close(step.reward[:, :trimmed], "reward_summed")
    close(step.advantage, "reward_used")
    close(step.policy_loss, "policy_loss")
    logprob = step.thought_logprob[:, :trimmed].movedim(-1, 1)
    at_text = real[:, None, :trimmed].expand_as(logprob)
    torch.testing.assert_close(logprob[at_text], golden["thought_logprob_t3"][at_text], atol=1e-4, rtol=1e-5)
    recorded_weights = golden["mix_weight"][:, -len(step.mixing_weight) :].movedim(1, 0)
    for step_index, (got, expected) in enumerate(zip(step.mixing_weight, recorded_weights, strict=True)):
        j = max(0, step_index + len(step.talk_nll) - len(step.mixing_weight))
        scored = real[:, 1 + j :]  # past these the text state at i+j is beyond the text, and nothing uses the weight
        positions = scored.shape[1]
        torch.testing.assert_close(got[:, :positions][scored], expected[:, :positions][scored], atol=1e-4, rtol=1e-4)
    # The policy term carries a factor of 1e6, so the total is compared relatively as well.
    torch.testing.assert_close(step.loss.detach(), golden["total_loss"].squeeze(), atol=1e-4, rtol=1e-5)

    gradients = recording.gradients()
    assert set(gradients) == {k.removeprefix("grad.") for k in golden if k.startswith("grad.")}
    for key, gradient in gradients.items():
        expected = golden[f"grad.{key}"]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), key


def test_as_released_and_lean_differ_only_in_what_is_computed() -> None:
    recording = Recording("basic")
    released, lean = recording.step(), recording.step(intermediate_predictions=False)
    thought_inputs = recording.settings["n_ahead"] - 2
    assert len(released.intermediate_nll) == thought_inputs and not lean.intermediate_nll
    assert all(values.requires_grad for values in released.intermediate_nll)
    assert torch.equal(released.loss, lean.loss)


def test_sampled_thoughts_follow_the_model_and_avoid_banned_ids() -> None:
    """At START, where every row has the same distribution, tokens come up as often as the model says."""
    recording = Recording("basic")
    passes = 2000
    banned = (recording.settings["start_id"], recording.settings["end_id"])
    with torch.no_grad():
        step = recording.step(
            thought_tokens=None,
            thoughts_per_position=passes,
            thought_length=1,
            lookahead=1,
            intermediate_predictions=False,
            objective=NaiveObjective(policy_temperature=1.0),
            generator=torch.Generator().manual_seed(0),
        )
    first = step.thought_tokens[:passes, 3, 0]
    assert not set(first.tolist()) & set(banned)
    logprob = step.thought_logprob[:passes, 3, 0]
    counts = torch.bincount(first, minlength=recording.settings["vocab_size"])
    for token in counts.topk(5).indices.tolist():
        p = logprob[first == token][0].exp().item()
        assert abs(counts[token].item() / passes - p) < 5 * math.sqrt(p * (1 - p) / passes)


def test_a_given_thought_is_not_sampled() -> None:
    recording = Recording("basic")
    step = recording.step()
    assert torch.equal(step.thought_tokens, recording.tensors["thought_tokens"])


def test_leave_one_out_doubles_the_advantage_of_two_thoughts() -> None:
    recording = Recording("basic")
    plain = recording.step(NaiveObjective(clamp_negative_advantage=False))
    left_out = recording.step(NaiveObjective(clamp_negative_advantage=False, baseline="leave_one_out"))
    torch.testing.assert_close(left_out.advantage, 2 * plain.advantage)
    by_text = left_out.reward[:, : left_out.advantage.shape[1]].unflatten(0, (-1, 2))
    torch.testing.assert_close(left_out.advantage.unflatten(0, (-1, 2)), by_text - by_text.flip(1))
