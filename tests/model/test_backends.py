"""A whole training step on Triton's kernels is that of PyTorch's own operations: interpreted, and on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quietstar.config.training import Replay
from quietstar.objective.learning import learn
from tests.marks import slow
from tests.model.tiny import assert_same_gradients, gradients, make_ids, make_model


def assert_same_step(
    family: str,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    reuse_sampling_pass: bool = True,
    replay: Replay = "layers",
    **options: Any,
) -> None:
    """Thinking, loss and every gradient with "triton" and "torch".

    The first text is padded on the left; gpt2's second one is of two documents.
    """
    plain = make_model(family, dtype=dtype, **options).to(device)
    ids = make_ids(batch=2, length=8).to(device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if family == "gpt2":
        mask[1, 3:] = 2
    found = {}
    for backend in ("torch", "triton"):
        model = copy.deepcopy(plain)
        model.config.backend = backend
        thoughts = model.think(ids, mask, seed=1)
        step = learn(model, ids, mask, thoughts=thoughts, reuse_sampling_pass=reuse_sampling_pass, replay=replay)
        step.loss.backward()
        found[backend] = (step, gradients(model))
    (wanted, wanted_gradients), (step, step_gradients) = found["torch"], found["triton"]
    assert torch.equal(step.thoughts.tokens, wanted.thoughts.tokens)
    torch.testing.assert_close(step.thoughts.logprob, wanted.thoughts.logprob, rtol=0, atol=tolerance)
    torch.testing.assert_close(step.talk_nll, wanted.talk_nll, rtol=0, atol=tolerance)
    torch.testing.assert_close(step.loss, wanted.loss, rtol=0, atol=tolerance)
    assert_same_gradients(step_gradients, wanted_gradients, tolerance)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral_window", {"replay": "all"}),
        slow("gemma2", {"interpolation": "log_probs"}),
        slow("gpt2", {"replay": "all"}),
    ],
    ids=["mistral_window", "gemma2", "gpt2"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets only where there is no GPU")
def test_interpreted_kernels_and_torch_make_the_same_step(family: str, options: dict[str, Any]) -> None:
    assert_same_step(family, "cpu", torch.float64, 1e-9, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("reuse_sampling_pass", "replay"), [(True, "layers"), (True, "all"), (False, "layers")])
@pytest.mark.parametrize("family", ["mistral", "mistral_window", "gemma2", "gpt2"])
def test_kernels_and_torch_make_the_same_step(family: str, reuse_sampling_pass: bool, replay: Replay) -> None:
    assert_same_step(family, "cuda", torch.float32, 1e-3, reuse_sampling_pass, replay)


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_bits() -> None:
    model = make_model("mistral").cuda().bfloat16()
    ids = make_ids(batch=2, length=9).cuda()

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        step = learn(model, ids, seed=3)
        step.loss.backward()
        return [step.thoughts.tokens, step.talk_nll, *gradients(model).values()]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
