"""The thinking gate: what a thought would gain, asked before there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ThinkingGate(nn.Module):
    """Linear prediction of a thought's gain on the next token, in nats, from the hidden state of the text alone.

    It is fitted in closed form (`quietstar.inference.gate`), not trained, so its weights are buffers: saved, loaded and
    moved with the model, and none of an optimizer's business. They stay float32 in a model of 16 bits. A gate that was
    never fitted predicts 0 everywhere.

    Args:
        hidden_size: E of the base.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros((), dtype=torch.float32))

    def forward(self, hidden_base: Tensor) -> Tensor:
        """Predicted gain: log-probability of the next token with a thought minus without.

        Args:
            hidden_base: [..., E] hidden states of the text without thought, after the final norm.

        Returns:
            float32 [...], in nats.
        """
        # a sum of products and no matrix product: no position's result may depend on how many are asked at once
        return (hidden_base.float() * self.weight).sum(-1) + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(in_float32, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
