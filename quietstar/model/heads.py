"""The two small heads of a thinking model, on hidden states of the base.

The mixing head weighs the prediction after a thought (Quiet-STaR, section 4.3). The thinking gate predicts, before any
thought, what a thought would gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quietstar.model.configuration import QuietStarConfig


class MixingHead(nn.Module):
    """Three-layer MLP from [base hidden state; thought hidden state] to the weight w of the thought.

    The last layer's weights start at zero, so an untrained head gives `config.initial_mixing_weight` everywhere.

    Args:
        config: Configuration of the thinking model.
        hidden_size: Hidden size E of the base.
    """

    def __init__(self, config: QuietStarConfig, hidden_size: int) -> None:
        super().__init__()
        self.sigmoid = config.mixing_activation == "sigmoid"
        self.layers = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 1, bias=config.initial_mixing_weight is not None),
        )

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, hidden_base: Tensor, hidden_thought: Tensor) -> Tensor:
        """Return the weight of the thought.

        Args:
            hidden_base: Hidden states without thought, after the final norm, [..., E].
            hidden_thought: Hidden states after the thought, after the final norm, [..., E].

        Returns:
            Mixing weights, [...] in float32, or float64 for float64 inputs.
        """
        output: Tensor = self.layers(torch.cat([hidden_base, hidden_thought], dim=-1)).squeeze(-1)
        output = output if output.dtype == torch.float64 else output.float()
        return torch.sigmoid(output) if self.sigmoid else output


def initial_output_bias(config: QuietStarConfig) -> float:
    """Return the output bias at which an otherwise zero last layer gives `config.initial_mixing_weight`."""
    weight = config.initial_mixing_weight
    if weight is None:
        return 0.0
    return math.log(weight / (1 - weight)) if config.mixing_activation == "sigmoid" else weight


class ThinkingGate(nn.Module):
    """Linear prediction of a thought's gain on the next token, in nats, from the hidden state of the text alone.

    The gate is fitted in closed form (`quietstar.inference.gate`), not trained, so its weights are buffers: saved,
    loaded and moved with the model, and unknown to optimizers. They stay float32 in a model of 16 bits. A gate that was
    never fitted predicts 0 everywhere.

    Args:
        hidden_size: Hidden size E of the base.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros((), dtype=torch.float32))

    def forward(self, hidden_base: Tensor) -> Tensor:
        """Predict the gain: log-probability of the next token with a thought minus without.

        Args:
            hidden_base: Hidden states of the text without thought, after the final norm, [..., E].

        Returns:
            Predicted gains in nats, float32 [...].
        """
        # a sum of products, not a matrix product: a position's result must not depend on how many are computed at once
        return (hidden_base.float() * self.weight).sum(-1) + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device)

        return super()._apply(in_float32, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
