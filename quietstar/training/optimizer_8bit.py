"""AdamW whose moments have 8 bits, from bitsandbytes: a quarter of the memory, the same steps to about a percent."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quietstar.errors import ConfigError
from quietstar.quiet_imports import without_bitsandbytes_warnings
from quietstar.training.optimizer import THOUGHT_EMBEDDING_GRADIENT_NORM, MasterAdamW

NAMES = {
    "exp_avg": "state1",
    "exp_avg_scale": "absmax1",
    "exp_avg_sq": "state2",
    "exp_avg_sq_scale": "absmax2",
}
"""bitsandbytes' names of what `state_tensors` calls by the names on the left."""


class MasterAdamW8bit(MasterAdamW):
    """`MasterAdamW` with blockwise 8-bit moments (arXiv 2110.02861).

    Its `state_tensors` hold the moments as uint8 codes of the parameter's shape, and `exp_avg_scale.NAME` and
    `exp_avg_sq_scale.NAME`, float32 [blocks of 256], beside them. Parameters of less than 4096 elements, and START and
    END, keep float32 moments.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def _build_adam(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float
    ) -> torch.optim.Optimizer:
        adam: Any = _adam_8bit()(groups, lr=0.0, betas=betas, eps=epsilon)
        for index, (group, options) in enumerate(zip(self.groups, adam.param_groups, strict=True)):
            for place, tensor in enumerate(options["params"]):
                if group.norm == THOUGHT_EMBEDDING_GRADIENT_NORM:
                    moments = {key: torch.zeros_like(tensor, dtype=torch.float32) for key in ("state1", "state2")}
                    adam.state[tensor] = {"step": 0, **moments}
                else:
                    adam.init_state(options, tensor, index, place)
        optimizer: torch.optim.Optimizer = adam
        return optimizer

    def _state_of(self, trained: Tensor) -> dict[str, Tensor]:
        state = self._adam.state[trained]
        step = torch.tensor(float(state["step"]))
        return {"step": step, **{name: state[key] for name, key in NAMES.items() if key in state}}

    def _set_state(self, trained: Tensor, tensors: Mapping[str, Tensor]) -> None:
        state = self._adam.state[trained]
        state["step"] = int(tensors["step"])
        for name, tensor in tensors.items():
            if name != "step":
                state[NAMES[name]].copy_(tensor)


def _adam_8bit() -> Any:
    try:
        with without_bitsandbytes_warnings():
            optimizers: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"training.optimizer: adamw_8bit needs bitsandbytes ({error}); pip install 'quietstar[8bit]'"
        ) from error
    return optimizers.AdamW8bit
