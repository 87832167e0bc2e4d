"""The engine on a GPU: what "auto" chooses there agrees with PyTorch's own operations, in a whole training step."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.model.tiny import gradients, make_ids, make_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["mistral", "mistral_window", "gemma2", "gpt2"])
@pytest.mark.parametrize("reuse_sampling_pass", [True, False])
def test_kernels_and_torch_make_the_same_step(family: str, reuse_sampling_pass: bool) -> None:
    found = {}
    on_cpu = make_model(family)
    ids = make_ids(batch=2, length=9).cuda()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    thoughts = None
    for backend in ("torch", "auto"):
        model = copy.deepcopy(on_cpu).cuda()
        model.config.backend = backend
        thoughts = thoughts or model.think(ids, mask, seed=1)
        step = model.learn(ids, mask, thoughts=thoughts, reuse_sampling_pass=reuse_sampling_pass)
        step.loss.backward()
        found[backend] = (step, gradients(model))
    (wanted, wanted_gradients), (step, step_gradients) = found["torch"], found["auto"]
    torch.testing.assert_close(step.talk_nll, wanted.talk_nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.loss, wanted.loss, rtol=1e-4, atol=1e-4)
    for name, gradient in wanted_gradients.items():
        error = (step_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: {error}"


def test_the_same_seed_gives_the_same_bits() -> None:
    model = make_model("mistral").cuda().bfloat16()
    ids = make_ids(batch=2, length=9).cuda()

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        step = model.learn(ids, seed=3)
        step.loss.backward()
        return [step.thoughts.tokens, step.talk_nll, *gradients(model).values()]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
