"""The losses' Triton kernels: everything around the matrix products, which cuBLAS computes.

Tiles are [rows, vocabulary] or [rows, width]; on a GPU one row at a time, when interpreted a few rows at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton_language import cast
from quietstar_kernels.triton_logits import logits_of, scalar, slope_of


@triton.jit(
    do_not_specialize=["rows"],  # a batch of another size compiles nothing
    do_not_specialize_on_alignment=["weight", "row_scale", "target"],
)
def mix_kernel(
    base,  # [rows, width], any strides
    thought,  # the same; or None: the state is the base
    weight,  # [rows]
    row_scale,  # [rows]; or None without `scaled`
    target,  # [rows]
    states,  # [rows, width], contiguous: the operand of the product with lm_head
    scaled,  # [rows, width], contiguous: row_scale * state; or None
    residual,  # [rows, width], contiguous: what rounding took from the state; or None
    base_row_stride,
    base_column_stride,
    thought_row_stride,
    thought_column_stride,
    rows,
    width,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """(1 - weight) base + weight thought, rounded to the operand's dtype; zero in ignored rows, whatever they hold."""
    dtype: tl.constexpr = tl.float64 if states.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [rows]
    inside = row < rows  # [rows]
    counted = inside & (tl.load(target + row, mask=inside, other=0) != ignore_index)  # [rows]
    if thought is not None:
        share = tl.load(weight + row, mask=counted, other=0.0).to(dtype)[:, None]  # [rows, 1]
    if scaled is not None:
        scale = tl.load(row_scale + row, mask=counted, other=0.0).to(dtype)[:, None]  # [rows, 1]
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)  # [width]
        read = counted[:, None] & (column < width)[None, :]  # [rows, width]
        write = inside[:, None] & (column < width)[None, :]  # [rows, width]
        base_offset = row[:, None] * base_row_stride + column.to(tl.int64)[None, :] * base_column_stride
        state = tl.load(base + base_offset, mask=read, other=0.0).to(dtype)  # [rows, width]
        if thought is not None:
            thought_offset = row[:, None] * thought_row_stride + column.to(tl.int64)[None, :] * thought_column_stride
            after = tl.load(thought + thought_offset, mask=read, other=0.0).to(dtype)  # [rows, width]
            state = (1 - share) * state + share * after
        offset = row[:, None] * width + column[None, :]  # [rows, width]
        rounded = cast(state, states.dtype.element_ty)  # [rows, width]
        tl.store(states + offset, rounded, mask=write)
        if scaled is not None:
            tl.store(scaled + offset, cast(scale * state, scaled.dtype.element_ty), mask=write)
        if residual is not None:
            lost = state - rounded.to(dtype)  # [rows, width]
            tl.store(residual + offset, cast(lost, residual.dtype.element_ty), mask=write)


@triton.jit(
    do_not_specialize=["rows"],  # a batch of another size compiles nothing
    do_not_specialize_on_alignment=["target", "lse", "nll"],
)
def loss_kernel(
    raw,  # [rows, columns], -inf where banned, anything from column `vocabulary` on
    target,  # [rows]
    lse,  # [rows], written; read if LSE_KNOWN
    nll,  # [rows]; or None
    gradient,  # [rows, columns], may be `raw` itself; or None
    raw_stride,
    gradient_stride,
    rows,
    columns,  # a multiple of 16, so that a mask divides no vector of elements
    vocabulary,
    ignore_index,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    LSE_KNOWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
):
    """Log-sum-exp and loss of each row, and d loss / d raw, which is zero in ignored rows."""
    dtype: tl.constexpr = raw.dtype.element_ty
    inner = scalar(inner, dtype)
    outer = scalar(outer, dtype)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [rows]
    inside = row < rows  # [rows]
    row = tl.minimum(row, rows - 1)  # [rows], so that what is past the end computes a row twice, and stores it once
    token = tl.load(target + row)  # [rows]
    counted = token != ignore_index  # [rows]
    raw_row = raw + row[:, None] * raw_stride  # [rows, 1]

    if LSE_KNOWN:
        log_sum = tl.load(lse + row)  # [rows]
    else:
        # Every thread loads it, and threads that are done store the gradient, which may be `raw` itself. Before the
        # reductions, for they wait for all threads: after the last one, a store could overtake another thread's load.
        at_target = tl.load(raw + row * raw_stride + tl.where(counted, token, 0))  # [rows]
        running_max = tl.full([BLOCK_ROWS], float("-inf"), dtype)  # [rows]
        running_sum = tl.zeros([BLOCK_ROWS], dtype)  # [rows]
        for first in range(0, columns, BLOCK_VOCABULARY):
            column = first + tl.arange(0, BLOCK_VOCABULARY)[None, :]  # [1, vocabulary]
            block = tl.load(raw_row + column, mask=column < columns, other=float("-inf"))  # [rows, vocabulary]
            block = tl.where(column < vocabulary, block, float("-inf"))  # [rows, vocabulary]
            logits = logits_of(block, inner, outer, SOFTCAP)  # [rows, vocabulary]
            new_max = tl.maximum(running_max, tl.max(logits, axis=1))  # [rows]
            pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # [rows], as long as all tokens are banned
            running_sum = running_sum * tl.exp(running_max - pivot) + tl.sum(tl.exp(logits - pivot[:, None]), axis=1)
            running_max = new_max
        log_sum = tl.log(running_sum) + running_max
        tl.store(lse + row, log_sum, mask=inside)
        if nll is not None:
            # not log_sum - at_target, whose rounding is that of the larger log_sum
            loss = tl.log(running_sum) + (running_max - logits_of(at_target, inner, outer, SOFTCAP))  # [rows]
            tl.store(nll + row, tl.where(counted, loss, 0.0), mask=inside)

    if gradient is not None:
        gradient_row = gradient + row[:, None] * gradient_stride  # [rows, 1]
        for first in range(0, columns, BLOCK_VOCABULARY):
            column = first + tl.arange(0, BLOCK_VOCABULARY)[None, :]  # [1, vocabulary]
            block = tl.load(raw_row + column, mask=column < columns, other=float("-inf"))  # [rows, vocabulary]
            block = tl.where(column < vocabulary, block, float("-inf"))  # [rows, vocabulary]
            logits = logits_of(block, inner, outer, SOFTCAP)  # [rows, vocabulary]
            probability = tl.exp(logits - log_sum[:, None])  # [rows, vocabulary]
            to_logits = tl.where(column == token[:, None], probability - 1, probability)  # [rows, vocabulary]
            to_raw = to_logits * slope_of(block, inner, outer, SOFTCAP)  # [rows, vocabulary]
            to_raw = tl.where(counted[:, None], to_raw, 0.0)  # [rows, vocabulary]
            mask = inside[:, None] & (column < columns)  # [rows, vocabulary]
            tl.store(gradient_row + column, cast(to_raw, gradient.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows"],  # a batch of another size compiles nothing
    do_not_specialize_on_alignment=["weight", "target", "nll", "to_weight"],
)
def hidden_gradient_kernel(
    gradient,  # [rows, width], contiguous: d loss / d state, not yet rounded
    base,  # [rows, width], any strides; or None without `nll` and `to_weight`, like the next three
    thought,
    weight,  # [rows]
    states,  # [rows, width], contiguous: the rounded states
    target,  # [rows]
    stored,  # [rows, width], contiguous: the gradient, rounded; or None
    nll,  # [rows], corrected in place; or None
    to_weight,  # [rows]: d loss / d weight; or None
    base_row_stride,
    base_column_stride,
    thought_row_stride,
    thought_column_stride,
    rows,
    width,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """What the gradient of the mixed state is good for before it is rounded: see `torch_backend.finish_gradient`."""
    dtype: tl.constexpr = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [rows]
    inside = row < rows  # [rows]
    counted = inside & (tl.load(target + row, mask=inside, other=0) != ignore_index)  # [rows]
    correction = tl.zeros([BLOCK_ROWS], dtype)  # [rows]
    along_difference = tl.zeros([BLOCK_ROWS], dtype)  # [rows]
    if base is not None:
        share = tl.load(weight + row, mask=counted, other=0.0).to(dtype)[:, None]  # [rows, 1]
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)  # [width]
        read = counted[:, None] & (column < width)[None, :]  # [rows, width]
        write = inside[:, None] & (column < width)[None, :]  # [rows, width]
        offset = row[:, None] * width + column[None, :]  # [rows, width]
        to_state = tl.load(gradient + offset, mask=write, other=0.0)  # [rows, width]
        if base is not None:
            base_offset = row[:, None] * base_row_stride + column.to(tl.int64)[None, :] * base_column_stride
            thought_offset = row[:, None] * thought_row_stride + column.to(tl.int64)[None, :] * thought_column_stride
            before = tl.load(base + base_offset, mask=read, other=0.0).to(dtype)  # [rows, width]
            after = tl.load(thought + thought_offset, mask=read, other=0.0).to(dtype)  # [rows, width]
            along_difference += tl.sum(to_state * (after - before), axis=1)
            if nll is not None:
                rounded = tl.load(states + offset, mask=read, other=0.0).to(dtype)  # [rows, width]
                lost = (1 - share) * before + share * after - rounded  # [rows, width]
                correction += tl.sum(to_state * lost, axis=1)
        if stored is not None:
            tl.store(stored + offset, cast(to_state, stored.dtype.element_ty), mask=write)
    if nll is not None:
        tl.store(nll + row, tl.load(nll + row, mask=inside, other=0.0) + correction, mask=inside)
    if to_weight is not None:
        tl.store(to_weight + row, along_difference, mask=inside)
