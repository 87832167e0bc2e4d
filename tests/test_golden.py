"""The authors' training step, number by number (recordings in tests/golden)."""

from __future__ import annotations

import pytest
import torch

from tests.golden_recording import RECORDINGS, load_recording, relative_error

ABSOLUTE = 1e-4
GRADIENT = 1e-5


@pytest.mark.parametrize("reuse_sampling_pass", [False, True])
@pytest.mark.parametrize("name", RECORDINGS)
def test_step_equals_the_authors(name: str, reuse_sampling_pass: bool) -> None:
    recording = load_recording(name)
    expected = recording.tensors
    model = recording.model(backend="reference")
    ids, mask = expected["input_ids"], expected["attention_mask"]
    length, lookahead = ids.shape[1], recording.lookahead
    thoughts = model.think(
        ids,
        mask,
        anchors=torch.arange(length),
        tokens=recording.to_streams(expected["thought_tokens"]),
        record=reuse_sampling_pass,
    )
    step = model.learn(ids, mask, thoughts=thoughts, objective="authors", reuse_sampling_pass=reuse_sampling_pass)
    step.loss.backward()

    def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(actual, wanted, atol=ABSOLUTE, rtol=0)

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
    close(step.loss.detach() / expected["total_loss"][0], torch.tensor(1.0))

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
