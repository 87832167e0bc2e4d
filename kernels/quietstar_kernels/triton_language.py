"""Functions for use inside Triton kernels that mean the same when compiled and when interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as if it were integers, and truncates where the hardware rounds.
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(left, right, accumulator):
    """accumulator + left @ right, in the accumulator's precision; float32 operands are not rounded to TF32."""
    if INTERPRETING:
        left = left.to(accumulator.dtype)
        right = right.to(accumulator.dtype)
    return tl.dot(left, right, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to a relative error of a few units in the last place.

    Near 0 the exponential would leave an error relative to 1, and a soft cap of 50 multiply it by 50. There it is the
    continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) to the term 13, exact in float64.
    """
    square = x * x
    numerator = x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    denominator = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = tl.abs(x) > 0.5
    numerator = tl.where(far, tl.where(x < 0, decay - 1.0, 1.0 - decay), numerator)
    return numerator / tl.where(far, 1.0 + decay, denominator)
