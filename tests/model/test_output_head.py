"""The logits of a mixed prediction: those whose loss the kernels give, at the precision that a reward needs."""

from __future__ import annotations

import pytest
import torch

from quietstar.model.thinking_model import OutputHead
from quietstar_kernels import logits, mixed_cross_entropy


@pytest.mark.parametrize("products", ["widened", "low_precision"])
@pytest.mark.parametrize("interpolation", ["logits", "log_probs"])
@pytest.mark.parametrize("weight", [1e-4, 1e-2, 0.1])
def test_mixed_logits_keep_the_effect_of_a_small_weight(
    weight: float, interpolation: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if products == "low_precision":  # as on CUDA, whose products of bfloat16 have float32 sums
        monkeypatch.setattr(logits, "product_dtype", lambda device, dtype: dtype)
    generator = torch.Generator().manual_seed(0)
    base, thought = torch.randn(2, 8, 16, 64, generator=generator).bfloat16()
    lm_head = (torch.randn(100, 64, generator=generator) / 8).bfloat16()
    head = OutputHead(lm_head, softcap=None, logit_scale=1.0)
    share = torch.full((8, 16), weight)
    got = head.mixed_logits(base, thought, share, interpolation)
    assert got.dtype == torch.float32
    if interpolation == "logits":
        got = got.log_softmax(-1)
    change = got - head.logits(base).log_softmax(-1)

    target = torch.randint(0, 100, (128,), generator=generator)
    rows = [x.double() for x in (base.flatten(0, 1), thought.flatten(0, 1))]
    with_thought, without = (
        mixed_cross_entropy(*rows, w.double().flatten(), lm_head.double(), target, interpolation=interpolation)
        for w in (share, torch.zeros_like(share))
    )
    error = change.flatten(0, 1).gather(1, target[:, None]).squeeze(1).double() - (without - with_thought)
    assert float(error.std() / (without - with_thought).std()) < 0.05
