"""The sampler's Triton kernel: from raw logits to tokens, one reading of each row and of one block of it.

Tiles are [rows, vocabulary]; on a GPU one row at a time, when interpreted a few rows at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton_logits import logits_of, scalar


@triton.jit(
    do_not_specialize=["rows"],  # a batch of another size compiles nothing
    do_not_specialize_on_alignment=["uniform", "token", "logprob", "lse"],
)
def sample_kernel(
    raw,  # [rows, columns], -inf where banned, anything from column `vocabulary` on
    uniform,  # [rows] in [0, 1); or None: the most probable token
    token,  # [rows]
    logprob,  # [rows]
    lse,  # [rows]
    raw_stride,
    rows,
    columns,  # a multiple of 16, so that a mask divides no vector of elements
    vocabulary,
    inner: tl.float64,
    outer: tl.float64,
    SOFTCAP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCABULARY: tl.constexpr,
):
    """Token, its log-probability and the log-sum-exp of each row. BLOCKS blocks hold the vocabulary."""
    dtype: tl.constexpr = raw.dtype.element_ty
    inner = scalar(inner, dtype)
    outer = scalar(outer, dtype)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [rows]
    inside = row < rows  # [rows]
    row = tl.minimum(row, rows - 1)  # [rows], so that what is past the end computes a row twice, and stores it once
    raw_row = raw + row[:, None] * raw_stride  # [rows, 1]
    block_index = tl.arange(0, BLOCKS)[None, :]  # [1, blocks]
    block_sums = tl.zeros([BLOCK_ROWS, BLOCKS], dtype)  # [rows, blocks], relative to exp(running_max)
    running_max = tl.full([BLOCK_ROWS], float("-inf"), dtype)  # [rows]
    most_probable = tl.zeros([BLOCK_ROWS], tl.int32)  # [rows]
    # the next two blocks are on their way to shared memory while the sums of this one wait for all threads
    for first in tl.range(0, columns, BLOCK_VOCABULARY, num_stages=3):
        column = first + tl.arange(0, BLOCK_VOCABULARY)[None, :]  # [1, vocabulary]
        block = tl.load(raw_row + column, mask=column < columns, other=float("-inf"))  # [rows, vocabulary]
        block = tl.where(column < vocabulary, block, float("-inf"))  # [rows, vocabulary]
        logits = logits_of(block, inner, outer, SOFTCAP)  # [rows, vocabulary]
        block_max = tl.max(logits, axis=1)  # [rows]
        if uniform is None:
            here = tl.where(logits == block_max[:, None], column, vocabulary)  # [rows, vocabulary]
            most_probable = tl.where(block_max > running_max, tl.min(here, axis=1), most_probable)
        new_max = tl.maximum(running_max, block_max)  # [rows]
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)  # [rows], as long as all tokens are banned
        block_sum = tl.sum(tl.exp(logits - pivot[:, None]), axis=1)  # [rows]
        block_sums = block_sums * tl.exp(running_max - pivot)[:, None]  # [rows, blocks]
        block_sums = tl.where(block_index == first // BLOCK_VOCABULARY, block_sum[:, None], block_sums)
        running_max = new_max

    chosen = most_probable  # [rows]
    if uniform is not None:
        sums = block_sums.to(tl.float64)  # [rows, blocks]
        cumulative = tl.cumsum(sums, axis=1)  # [rows, blocks]
        total = tl.max(cumulative, axis=1)  # [rows]
        below_total = (total.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)  # [rows], the next number
        number = tl.load(uniform + row)  # [rows]
        # strictly below the total, so that some token exceeds it; that token's own probability must be positive
        threshold = tl.minimum(number * total, below_total)[:, None]  # [rows, 1]
        # a parallel cumulative sum may round a step down, so the last block and token that can be drawn are a fallback
        last_block = tl.max(tl.where(sums > 0, block_index, 0), axis=1)  # [rows]
        first_block = tl.min(tl.where((cumulative > threshold) & (sums > 0), block_index, BLOCKS), axis=1)  # [rows]
        chosen_block = tl.minimum(first_block, last_block)  # [rows]
        before = tl.sum(tl.where(block_index < chosen_block[:, None], sums, 0.0), axis=1)[:, None]  # [rows, 1]

        column = (
            chosen_block[:, None] * BLOCK_VOCABULARY + tl.arange(0, BLOCK_VOCABULARY)[None, :]
        )  # [rows, vocabulary]
        block = tl.load(raw_row + column, mask=column < columns, other=float("-inf"))  # [rows, vocabulary]
        block = tl.where(column < vocabulary, block, float("-inf"))  # [rows, vocabulary]
        likelihood = tl.exp(logits_of(block, inner, outer, SOFTCAP) - running_max[:, None]).to(tl.float64)
        reached = before + tl.cumsum(likelihood, axis=1) > threshold  # [rows, vocabulary]
        last_token = tl.max(tl.where(likelihood > 0, column, 0), axis=1)  # [rows]
        first_token = tl.min(tl.where(reached & (likelihood > 0), column, vocabulary), axis=1)  # [rows]
        chosen = tl.minimum(first_token, last_token)

    at_token = tl.load(raw + row * raw_stride + chosen)  # [rows]
    log_total = tl.log(tl.sum(block_sums, axis=1))  # [rows]
    tl.store(token + row, chosen.to(tl.int64), mask=inside)
    tl.store(logprob + row, logits_of(at_token, inner, outer, SOFTCAP) - running_max - log_total, mask=inside)
    tl.store(lse + row, running_max + log_total, mask=inside)
