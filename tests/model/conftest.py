"""What the model's tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers rounds float64 to float32 (RMS norms and softmax do, whatever the dtype), it stays float64.

    These roundings are the only reason for which a step and its definition differ by more than 1e-9: a gradient that
    many streams share is rounded once, after their sum, in the one and once for every stream in the other.
    """
    to, to_float, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def keep_or_cast(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rounds = self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return self if rounds else to(self, *args, **kwargs)

    def keep_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", keep_softmax)
    monkeypatch.setattr(Tensor, "to", keep_or_cast)
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
