"""Which model a command loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quietstar.config.options import Device

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """A thinking model, and how it is loaded.

    Args:
        checkpoint: Thinking model: a directory, a training run, or a hub name.
        device: Device of the model.
        dtype: Type of the weights. Null: as saved.
        tokenizer: Directory of the tokenizer, for a checkpoint that has none beside it.
    """

    checkpoint: str
    device: Device = "auto"
    dtype: Dtype | None = None
    tokenizer: str | None = None
