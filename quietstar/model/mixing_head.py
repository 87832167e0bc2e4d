"""The mixing head: how much the prediction after a thought counts (Quiet-STaR, section 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quietstar.model.configuration import QuietStarConfig


class MixingHead(nn.Module):
    """Three-layer MLP from [base hidden state; thought hidden state] to the weight w of the thought.

    The last layer's weights start at zero, so an untrained head gives `config.initial_mixing_weight` everywhere.
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
        """Weight of the thought.

        Args:
            hidden_base: [..., E] hidden states without thought, after the final norm.
            hidden_thought: [..., E] hidden states after the thought, after the final norm.

        Returns:
            [...] in float32, or float64 for float64 inputs.
        """
        output: Tensor = self.layers(torch.cat([hidden_base, hidden_thought], dim=-1)).squeeze(-1)
        output = output if output.dtype == torch.float64 else output.float()
        return torch.sigmoid(output) if self.sigmoid else output


def initial_output_bias(config: QuietStarConfig) -> float:
    """The output bias at which an otherwise zero last layer gives `config.initial_mixing_weight`."""
    weight = config.initial_mixing_weight
    if weight is None:
        return 0.0
    return math.log(weight / (1 - weight)) if config.mixing_activation == "sigmoid" else weight
