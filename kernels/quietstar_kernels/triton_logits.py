"""`logits.LogitOptions` inside Triton kernels: functions of tiles of raw logits, whose banned tokens are -inf already.

`inner` and `outer` are those of `LogitOptions.factors`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton_language import INTERPRETING, tanh


@triton.jit
def scalar(x, dtype: tl.constexpr):
    """A float64 argument in `dtype`; the interpreter has a Python number, which it would round to float32."""
    if INTERPRETING:
        return tl.full([], x, dtype)
    else:
        return x.to(dtype)


@triton.jit
def logits_of(raw, inner, outer, SOFTCAP: tl.constexpr):
    """Logits; a negative scale or a cap must not bring a banned token back."""
    if SOFTCAP:
        logits = outer * tanh(inner * raw)
    else:
        logits = outer * raw
    return tl.where(raw == float("-inf"), float("-inf"), logits)


@triton.jit
def slope_of(raw, inner, outer, SOFTCAP: tl.constexpr):
    """d logits / d raw: a tile with a soft cap, else one number."""
    if SOFTCAP:
        capped = tanh(inner * raw)
        return inner * outer * (1 - capped * capped)
    else:
        return outer
