"""Making room between phases: one model at a time."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Gives back what finished phases have held. A trained model is in a reference cycle with its hooks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
