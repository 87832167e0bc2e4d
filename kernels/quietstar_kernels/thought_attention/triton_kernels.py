"""Thought attention in Triton.

The query rows of one text and one key head are numbered (stream, token, group): row = (p * S + s) * G + g, where the
G = H // Hkv query heads that read the key head are the group. A tile is BLOCK_M consecutive rows, whatever S is. Its
rows share the text keys up to the tile's last anchor; only the keys between the first and the last anchor, and those at
the border of a window, need a mask. Own keys are numbered p * T + t, and a tile reads those of its streams.

Scores are kept in base 2: score * log2(e), so that exp2 does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton_language import LN_2, LOG2_E, cast, dot, tanh

# Sizes must not be specialised, or every text and stream length would compile its own kernel.
SIZES = ["P", "S", "T", "L", "H", "GROUP", "D", "window", "anchor_batch_stride"]


@triton.jit
def _decode(rows, row_count, S, GROUP):
    """Whether each row exists, and its stream, token and group."""
    valid = rows < row_count
    rows = tl.minimum(rows, row_count - 1)
    return valid, rows // (S * GROUP), rows // GROUP % S, rows % GROUP


@triton.jit
def _load_rows(pointer, offset, row_mask, column, D, EVEN_D: tl.constexpr):
    """[rows, BLOCK_D] at pointer + offset[row] + column; 0 outside the mask and beyond D."""
    mask = row_mask[:, None]
    if not EVEN_D:
        mask = mask & (column < D)[None, :]
    return tl.load(pointer + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, offset, row_mask, column, D, value, EVEN_D: tl.constexpr):
    mask = row_mask[:, None]
    if not EVEN_D:
        mask = mask & (column < D)[None, :]
    tl.store(pointer + offset[:, None] + column[None, :], cast(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_block(pointer, start, stride, offset, end, column, D, MASKED: tl.constexpr, EVEN_D: tl.constexpr):
    """Rows start .. start + BLOCK_N - 1 of a [*, stride] matrix; `offset` is their place relative to the first."""
    block = pointer + tl.cast(start, tl.int64) * stride + offset
    if MASKED:
        keys = start + tl.arange(0, offset.shape[0])
        mask = (keys < end)[:, None]
        if not EVEN_D:
            mask = mask & (column < D)[None, :]
        return tl.load(block, mask=mask, other=0.0)
    if not EVEN_D:
        return tl.load(block, mask=(column < D)[None, :], other=0.0)
    return tl.load(block)


@triton.jit
def _scores(raw, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in base 2 from q @ k^T."""
    if SOFTCAP is None:
        return raw * (SCALE * LOG2_E)
    return tanh(raw * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2_E)


@triton.jit
def _attend(accumulator, running_max, total, scores, value):
    """One step of the online softmax; rows that have seen no key yet keep a running max of -inf."""
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(scores - pivot[:, None])  # [rows, keys]
    shrink = tl.exp2(running_max - pivot)
    total = total * shrink + tl.sum(weight, 1)
    accumulator = dot(cast(weight, value.dtype), value, accumulator * shrink[:, None])
    return accumulator, new_max, total


@triton.jit
def _text_bounds(first_anchor, last_anchor, text_start, L, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Where the text keys of a tile begin, need no mask, need one again, and end.

    begin..clear: the window's left border, masked; clear..masked: whole blocks seen by every row; masked..end: masked.
    """
    end = tl.minimum(last_anchor + 1, L)
    begin = text_start
    clear = text_start
    if HAS_WINDOW:
        begin = tl.maximum(begin, first_anchor - window + 1)
        clear = tl.maximum(clear, last_anchor - window + 1)
    masked = clear + tl.maximum(tl.minimum(first_anchor + 1, end) - clear, 0) // BLOCK_N * BLOCK_N
    return begin, clear, masked, end


@triton.jit
def _text_mask(keys, anchor, limit, window, HAS_WINDOW: tl.constexpr):
    """[rows, keys]: the keys below `limit` that each row sees; those before text_start are never asked for."""
    mask = (keys[None, :] <= anchor[:, None]) & (keys < limit)[None, :]
    if HAS_WINDOW:
        mask = mask & (anchor[:, None] - keys[None, :] < window)
    return mask


@triton.jit
def _attend_text(
    accumulator,
    running_max,
    total,
    q,
    k_pointer,
    v_pointer,
    k_stride,
    v_stride,
    anchor,
    first,
    last,
    window,
    column,
    D,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The text keys first..last-1."""
    key = tl.arange(0, BLOCK_N)
    k_offset = key[:, None] * k_stride + column[None, :]
    v_offset = key[:, None] * v_stride + column[None, :]
    for start in range(first, last, BLOCK_N):
        k = _load_block(k_pointer, start, k_stride, k_offset, last, column, D, MASKED, EVEN_D)  # [keys, D]
        raw = tl.zeros([q.shape[0], BLOCK_N], dtype=accumulator.dtype)
        scores = _scores(dot(q, tl.trans(k), raw), SCALE, SOFTCAP)  # [rows, keys]
        if MASKED:
            scores = tl.where(_text_mask(start + key, anchor, last, window, HAS_WINDOW), scores, float("-inf"))
        v = _load_block(v_pointer, start, v_stride, v_offset, last, column, D, MASKED, EVEN_D)
        accumulator, running_max, total = _attend(accumulator, running_max, total, scores, v)
    return accumulator, running_max, total


@triton.jit
def _text_start(text_start_pointer, batch):
    """First text key that is not padding."""
    start = (batch * 0).to(tl.int32)
    if text_start_pointer is not None:
        start = tl.maximum(tl.load(text_start_pointer + batch), start)
    return start


@triton.jit
def _query_index(batch, stream, token, head, P, S, H):
    """Place of each row in a contiguous [B, P, S, H]."""
    return ((batch * P + stream) * S + token) * H + head


@triton.jit
def _own_mask(own, rows_stream, rows_token, S, T):
    """[rows, keys]: own key p * T + t is seen by token s of stream p where t <= s + (T - S)."""
    key_stream, key_token = own // T, own % T
    same_stream = key_stream[None, :] == rows_stream[:, None]
    return same_stream & (key_token[None, :] <= (rows_token + T - S)[:, None])


@triton.jit
def _attend_own(
    accumulator,
    running_max,
    total,
    q,
    k_pointer,
    v_pointer,
    k_stream_stride,
    k_stride,
    v_stream_stride,
    v_stride,
    stream,
    token,
    first_stream,
    last_stream,
    S,
    T,
    column,
    D,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """The own keys of the streams first_stream..last_stream, block-diagonal."""
    end = (last_stream + 1) * T
    for start in range(first_stream * T, end, BLOCK_OWN):
        own = start + tl.arange(0, BLOCK_OWN)
        exists = own < end
        k_offset = (own // T).to(tl.int64) * k_stream_stride + own % T * k_stride
        v_offset = (own // T).to(tl.int64) * v_stream_stride + own % T * v_stride
        k = _load_rows(k_pointer, k_offset, exists, column, D, EVEN_D)  # [keys, D]
        v = _load_rows(v_pointer, v_offset, exists, column, D, EVEN_D)
        raw = tl.zeros([q.shape[0], BLOCK_OWN], dtype=accumulator.dtype)
        scores = _scores(dot(q, tl.trans(k), raw), SCALE, SOFTCAP)  # [rows, keys]
        visible = _own_mask(own, stream, token, S, T) & exists[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        accumulator, running_max, total = _attend(accumulator, running_max, total, scores, v)
    return accumulator, running_max, total


@triton.jit
def _attend_own_singly(
    accumulator,
    running_max,
    total,
    q,
    k_pointer,
    v_pointer,
    k_offset,
    v_offset,
    k_stride,
    v_stride,
    valid,
    T,
    column,
    D,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Every row's own T keys, which start at its offset, one after the other and without matrix products."""
    slot = tl.arange(0, BLOCK_OWN)
    wide_q = q.to(accumulator.dtype)
    for first in range(0, T, BLOCK_OWN):
        last = tl.minimum(first + BLOCK_OWN, T)
        scores = tl.full([q.shape[0], BLOCK_OWN], float("-inf"), dtype=accumulator.dtype)
        for key in range(first, last):
            k = _load_rows(k_pointer, k_offset + key * k_stride, valid, column, D, EVEN_D)  # [rows, D]
            score = _scores(tl.sum(wide_q * k.to(accumulator.dtype), 1), SCALE, SOFTCAP)  # [rows]
            scores = tl.where((slot == key - first)[None, :], score[:, None], scores)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weight = tl.exp2(scores - new_max[:, None])  # [rows, slots]
        shrink = tl.exp2(running_max - new_max)
        total = total * shrink + tl.sum(weight, 1)
        accumulator = accumulator * shrink[:, None]
        for key in range(first, last):
            v = _load_rows(v_pointer, v_offset + key * v_stride, valid, column, D, EVEN_D)
            share = tl.sum(tl.where((slot == key - first)[None, :], weight, 0.0), 1)  # [rows]
            accumulator += share[:, None] * v.to(accumulator.dtype)
        running_max = new_max
    return accumulator, running_max, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_pointer,
    k_text_pointer,
    v_text_pointer,
    k_thought_pointer,
    v_thought_pointer,
    anchor_pointer,
    text_start_pointer,
    out_pointer,
    lse_pointer,
    q_batch_stride,
    q_stream_stride,
    q_token_stride,
    q_head_stride,
    k_text_batch_stride,
    k_text_stride,
    k_text_head_stride,
    v_text_batch_stride,
    v_text_stride,
    v_text_head_stride,
    k_thought_batch_stride,
    k_thought_stream_stride,
    k_thought_stride,
    k_thought_head_stride,
    v_thought_batch_stride,
    v_thought_stream_stride,
    v_thought_stride,
    v_thought_head_stride,
    anchor_batch_stride,
    P,
    S,
    T,
    L,
    H,
    GROUP,
    D,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """out [B, P, S, H, D] and lse [B, P, S, H], contiguous, of BLOCK_M rows.

    With SINGLE_TOKEN (S == 1, a sampling step) a tile has BLOCK_M // G streams, whose own keys as one block would be
    almost all mask; there each row goes through its own keys one by one.
    """
    kv_heads = H // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    row_count = P * S * GROUP
    # the last rows see the most text: they go first, so that no long program is left over at the end
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, row_count) - 1
    valid, stream, token, group = _decode(first_row + tl.arange(0, BLOCK_M), row_count, S, GROUP)
    first_stream, last_stream = first_row // (S * GROUP), last_row // (S * GROUP)
    column = tl.arange(0, BLOCK_D)

    anchor_pointer += batch * anchor_batch_stride
    anchor = tl.load(anchor_pointer + stream)  # [rows]
    head = kv_head * GROUP + group
    q_offset = stream.to(tl.int64) * q_stream_stride + token * q_token_stride + head * q_head_stride
    q = _load_rows(q_pointer + batch * q_batch_stride, q_offset, valid, column, D, EVEN_D)  # [rows, D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACCUMULATE)
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=ACCUMULATE)
    total = tl.zeros([BLOCK_M], dtype=ACCUMULATE)

    k_thought_pointer += batch * k_thought_batch_stride + kv_head * k_thought_head_stride
    v_thought_pointer += batch * v_thought_batch_stride + kv_head * v_thought_head_stride
    if SINGLE_TOKEN:
        accumulator, running_max, total = _attend_own_singly(
            accumulator,
            running_max,
            total,
            q,
            k_thought_pointer,
            v_thought_pointer,
            stream.to(tl.int64) * k_thought_stream_stride,
            stream.to(tl.int64) * v_thought_stream_stride,
            k_thought_stride,
            v_thought_stride,
            valid,
            T,
            column,
            D,
            SCALE,
            SOFTCAP,
            EVEN_D,
            BLOCK_OWN,
        )
    else:
        accumulator, running_max, total = _attend_own(
            accumulator,
            running_max,
            total,
            q,
            k_thought_pointer,
            v_thought_pointer,
            k_thought_stream_stride,
            k_thought_stride,
            v_thought_stream_stride,
            v_thought_stride,
            stream,
            token,
            first_stream,
            last_stream,
            S,
            T,
            column,
            D,
            SCALE,
            SOFTCAP,
            EVEN_D,
            BLOCK_OWN,
        )

    first_anchor = tl.load(anchor_pointer + first_stream)
    last_anchor = tl.load(anchor_pointer + last_stream)
    text_start = _text_start(text_start_pointer, batch)
    begin, clear, masked, end = _text_bounds(first_anchor, last_anchor, text_start, L, window, BLOCK_N, HAS_WINDOW)
    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    if HAS_WINDOW:
        accumulator, running_max, total = _attend_text(
            accumulator,
            running_max,
            total,
            q,
            k_text_pointer,
            v_text_pointer,
            k_text_stride,
            v_text_stride,
            anchor,
            begin,
            tl.minimum(clear, end),
            window,
            column,
            D,
            SCALE,
            SOFTCAP,
            True,
            HAS_WINDOW,
            EVEN_D,
            BLOCK_N,
        )
    accumulator, running_max, total = _attend_text(
        accumulator,
        running_max,
        total,
        q,
        k_text_pointer,
        v_text_pointer,
        k_text_stride,
        v_text_stride,
        anchor,
        clear,
        masked,
        window,
        column,
        D,
        SCALE,
        SOFTCAP,
        False,
        HAS_WINDOW,
        EVEN_D,
        BLOCK_N,
    )
    accumulator, running_max, total = _attend_text(
        accumulator,
        running_max,
        total,
        q,
        k_text_pointer,
        v_text_pointer,
        k_text_stride,
        v_text_stride,
        anchor,
        masked,
        end,
        window,
        column,
        D,
        SCALE,
        SOFTCAP,
        True,
        HAS_WINDOW,
        EVEN_D,
        BLOCK_N,
    )

    query = _query_index(batch, stream, token, head, P, S, H)
    _store_rows(out_pointer, query * D, valid, column, D, accumulator / total[:, None], EVEN_D)
    tl.store(lse_pointer + query, running_max * LN_2 + tl.log(total), mask=valid)


@triton.jit
def _grad_scores(
    q, k, grad_out, v, lse, delta, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """Softmax weights and the gradient of scale * q @ k^T, both [rows, keys]."""
    zero = tl.zeros([q.shape[0], k.shape[0]], dtype=lse.dtype)
    scores = _scores(dot(q, tl.trans(k), zero), SCALE, SOFTCAP)
    weight = tl.exp2(scores - (lse * LOG2_E)[:, None])
    if MASKED:
        weight = tl.where(visible, weight, 0.0)
    grad_weight = dot(grad_out, tl.trans(v), zero)
    grad = weight * (grad_weight - delta[:, None])
    if SOFTCAP is not None:
        capped = scores * (1.0 / (SOFTCAP * LOG2_E))
        grad = grad * (1 - capped * capped)
    return weight, grad


@triton.jit
def _grad_q_text(
    grad_q,
    q,
    grad_out,
    lse,
    delta,
    k_pointer,
    v_pointer,
    k_stride,
    v_stride,
    anchor,
    first,
    last,
    window,
    column,
    D,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what the text keys first..last-1 give to the queries' gradient."""
    key = tl.arange(0, BLOCK_N)
    k_offset = key[:, None] * k_stride + column[None, :]
    v_offset = key[:, None] * v_stride + column[None, :]
    for start in range(first, last, BLOCK_N):
        k = _load_block(k_pointer, start, k_stride, k_offset, last, column, D, MASKED, EVEN_D)
        v = _load_block(v_pointer, start, v_stride, v_offset, last, column, D, MASKED, EVEN_D)
        visible = _text_mask(start + key, anchor, last, window, HAS_WINDOW)
        _, grad = _grad_scores(q, k, grad_out, v, lse, delta, visible, SCALE, SOFTCAP, MASKED)
        grad_q = dot(cast(grad, k.dtype), k, grad_q)
    return grad_q


@triton.jit(do_not_specialize=[*SIZES, "streams"])
def backward_streams_kernel(
    q_pointer,
    k_text_pointer,
    v_text_pointer,
    k_thought_pointer,
    v_thought_pointer,
    anchor_pointer,
    text_start_pointer,
    out_pointer,
    lse_pointer,
    grad_out_pointer,
    grad_lse_pointer,
    delta_pointer,
    grad_q_pointer,
    grad_k_thought_pointer,
    grad_v_thought_pointer,
    streams,
    q_batch_stride,
    q_stream_stride,
    q_token_stride,
    q_head_stride,
    k_text_batch_stride,
    k_text_stride,
    k_text_head_stride,
    v_text_batch_stride,
    v_text_stride,
    v_text_head_stride,
    k_thought_batch_stride,
    k_thought_stream_stride,
    k_thought_stride,
    k_thought_head_stride,
    v_thought_batch_stride,
    v_thought_stream_stride,
    v_thought_stride,
    v_thought_head_stride,
    anchor_batch_stride,
    P,
    S,
    T,
    L,
    H,
    GROUP,
    D,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Gradients of the queries, own keys and own values of `streams` whole streams.

    out, grad_out, grad_q [B, P, S, H, D]; lse, grad_lse, delta [B, P, S, H]; grad_*_thought [B, P, T, Hkv, D], all
    contiguous. delta, the sum of grad_out * out less grad_lse, is written for the text's pass. Own keys are seen by
    these rows alone, so that their gradients are complete here.
    """
    kv_heads = H // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    rows_of_stream = S * GROUP
    tile_stream = (tl.num_programs(0) - 1 - tl.program_id(0)) * streams
    tile_stream_end = tl.minimum(tile_stream + streams, P)
    tile_row_end = tile_stream_end * rows_of_stream
    column = tl.arange(0, BLOCK_D)

    anchor_pointer += batch * anchor_batch_stride
    q_pointer += batch * q_batch_stride
    k_thought_pointer += batch * k_thought_batch_stride + kv_head * k_thought_head_stride
    v_thought_pointer += batch * v_thought_batch_stride + kv_head * v_thought_head_stride
    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    text_start = _text_start(text_start_pointer, batch)

    for first_row in range(tile_stream * rows_of_stream, tile_row_end, BLOCK_M):
        last_row = tl.minimum(first_row + BLOCK_M, tile_row_end) - 1
        valid, stream, token, group = _decode(first_row + tl.arange(0, BLOCK_M), tile_row_end, S, GROUP)
        first_stream, last_stream = first_row // rows_of_stream, last_row // rows_of_stream
        anchor = tl.load(anchor_pointer + stream)
        head = kv_head * GROUP + group
        query = _query_index(batch, stream, token, head, P, S, H)
        q_offset = stream.to(tl.int64) * q_stream_stride + token * q_token_stride + head * q_head_stride
        q = _load_rows(q_pointer, q_offset, valid, column, D, EVEN_D)  # [rows, D]
        grad_out = _load_rows(grad_out_pointer, query * D, valid, column, D, EVEN_D)
        out = _load_rows(out_pointer, query * D, valid, column, D, EVEN_D)
        lse = tl.load(lse_pointer + query, mask=valid, other=0.0)
        delta = tl.sum(out.to(ACCUMULATE) * grad_out.to(ACCUMULATE), 1)
        delta -= tl.load(grad_lse_pointer + query, mask=valid, other=0.0)
        tl.store(delta_pointer + query, delta, mask=valid)

        grad_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACCUMULATE)
        own_end = (last_stream + 1) * T
        for start in range(first_stream * T, own_end, BLOCK_OWN):
            own = start + tl.arange(0, BLOCK_OWN)
            exists = own < own_end
            k_offset = (own // T).to(tl.int64) * k_thought_stream_stride + own % T * k_thought_stride
            v_offset = (own // T).to(tl.int64) * v_thought_stream_stride + own % T * v_thought_stride
            k = _load_rows(k_thought_pointer, k_offset, exists, column, D, EVEN_D)
            v = _load_rows(v_thought_pointer, v_offset, exists, column, D, EVEN_D)
            visible = _own_mask(own, stream, token, S, T) & exists[None, :]
            _, grad = _grad_scores(q, k, grad_out, v, lse, delta, visible, SCALE, SOFTCAP, True)
            grad_q = dot(cast(grad, k.dtype), k, grad_q)

        first_anchor = tl.load(anchor_pointer + first_stream)
        last_anchor = tl.load(anchor_pointer + last_stream)
        begin, clear, masked, end = _text_bounds(first_anchor, last_anchor, text_start, L, window, BLOCK_N, HAS_WINDOW)
        if HAS_WINDOW:
            grad_q = _grad_q_text(
                grad_q,
                q,
                grad_out,
                lse,
                delta,
                k_text_pointer,
                v_text_pointer,
                k_text_stride,
                v_text_stride,
                anchor,
                begin,
                tl.minimum(clear, end),
                window,
                column,
                D,
                SCALE,
                SOFTCAP,
                True,
                HAS_WINDOW,
                EVEN_D,
                BLOCK_N,
            )
        grad_q = _grad_q_text(
            grad_q,
            q,
            grad_out,
            lse,
            delta,
            k_text_pointer,
            v_text_pointer,
            k_text_stride,
            v_text_stride,
            anchor,
            clear,
            masked,
            window,
            column,
            D,
            SCALE,
            SOFTCAP,
            False,
            HAS_WINDOW,
            EVEN_D,
            BLOCK_N,
        )
        grad_q = _grad_q_text(
            grad_q,
            q,
            grad_out,
            lse,
            delta,
            k_text_pointer,
            v_text_pointer,
            k_text_stride,
            v_text_stride,
            anchor,
            masked,
            end,
            window,
            column,
            D,
            SCALE,
            SOFTCAP,
            True,
            HAS_WINDOW,
            EVEN_D,
            BLOCK_N,
        )
        _store_rows(grad_q_pointer, query * D, valid, column, D, grad_q * SCALE, EVEN_D)

    tl.debug_barrier()  # every thread's delta is read by the others below
    own_end = tile_stream_end * T
    for start in range(tile_stream * T, own_end, BLOCK_OWN):
        own = start + tl.arange(0, BLOCK_OWN)
        exists = own < own_end
        own = tl.minimum(own, own_end - 1)
        key_stream, key_token = own // T, own % T
        k_offset = key_stream.to(tl.int64) * k_thought_stream_stride + key_token * k_thought_stride
        v_offset = key_stream.to(tl.int64) * v_thought_stream_stride + key_token * v_thought_stride
        k = _load_rows(k_thought_pointer, k_offset, exists, column, D, EVEN_D)  # [keys, D]
        v = _load_rows(v_thought_pointer, v_offset, exists, column, D, EVEN_D)
        grad_k = tl.zeros([BLOCK_OWN, BLOCK_D], dtype=ACCUMULATE)
        grad_v = tl.zeros([BLOCK_OWN, BLOCK_D], dtype=ACCUMULATE)
        first_row = start // T * rows_of_stream
        row_end = ((tl.minimum(start + BLOCK_OWN, own_end) - 1) // T + 1) * rows_of_stream
        for row in range(first_row, row_end, BLOCK_M):
            valid, stream, token, group = _decode(row + tl.arange(0, BLOCK_M), row_end, S, GROUP)
            head = kv_head * GROUP + group
            query = _query_index(batch, stream, token, head, P, S, H)
            q_offset = stream.to(tl.int64) * q_stream_stride + token * q_token_stride + head * q_head_stride
            q = _load_rows(q_pointer, q_offset, valid, column, D, EVEN_D)  # [rows, D]
            grad_out = _load_rows(grad_out_pointer, query * D, valid, column, D, EVEN_D)
            lse = tl.load(lse_pointer + query, mask=valid, other=0.0)
            delta = tl.load(delta_pointer + query, mask=valid, other=0.0)
            visible = _own_mask(own, stream, token, S, T) & exists[None, :] & valid[:, None]
            weight, grad = _grad_scores(q, k, grad_out, v, lse, delta, visible, SCALE, SOFTCAP, True)
            grad_v = dot(tl.trans(cast(weight, v.dtype)), grad_out, grad_v)
            grad_k = dot(tl.trans(cast(grad, k.dtype)), q, grad_k)
        index = ((batch * P + key_stream) * T + key_token) * kv_heads + kv_head
        _store_rows(grad_k_thought_pointer, index * D, exists, column, D, grad_k * SCALE, EVEN_D)
        _store_rows(grad_v_thought_pointer, index * D, exists, column, D, grad_v, EVEN_D)


@triton.jit
def _streams_before(anchor_pointer, P, position):
    """How many of the P sorted anchors lie before a position."""
    low = position * 0
    high = low + P
    while low < high:
        middle = (low + high) // 2
        before = tl.load(anchor_pointer + middle) < position
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=[size for size in SIZES if size != "T"] + ["splits"])
def backward_text_kernel(
    q_pointer,
    k_text_pointer,
    v_text_pointer,
    anchor_pointer,
    text_start_pointer,
    lse_pointer,
    delta_pointer,
    grad_out_pointer,
    grad_k_pointer,
    grad_v_pointer,
    splits,
    q_batch_stride,
    q_stream_stride,
    q_token_stride,
    q_head_stride,
    k_text_batch_stride,
    k_text_stride,
    k_text_head_stride,
    v_text_batch_stride,
    v_text_stride,
    v_text_head_stride,
    anchor_batch_stride,
    P,
    S,
    L,
    H,
    GROUP,
    D,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    EVEN_D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of BLOCK_N text keys and values from one of `splits` parts of the rows that see them.

    grad_k, grad_v: [splits, B, Hkv, L, D] in ACCUMULATE, the caller sums the parts; an order of sums that depends on
    the shapes alone is what makes the result repeatable.
    """
    kv_heads = H // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(1) % kv_heads
    # the first keys are seen by the most rows, and the first programs start first
    first_key = tl.program_id(0) // splits * BLOCK_N
    split = tl.program_id(0) % splits
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < L
    column = tl.arange(0, BLOCK_D)

    text_start = _text_start(text_start_pointer, batch)
    anchor_pointer += batch * anchor_batch_stride
    first_stream = _streams_before(anchor_pointer, P, first_key)
    end_stream = first_stream * 0 + P
    if HAS_WINDOW:
        end_stream = _streams_before(anchor_pointer, P, first_key + BLOCK_N - 1 + window)
    if first_key + BLOCK_N <= text_start:
        end_stream = first_stream
    blocks = tl.cdiv((end_stream - first_stream) * S * GROUP, BLOCK_M)
    first_row = first_stream * S * GROUP + split * blocks // splits * BLOCK_M
    row_end = first_stream * S * GROUP + (split + 1) * blocks // splits * BLOCK_M
    row_end = tl.minimum(row_end, end_stream * S * GROUP)

    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    q_pointer += batch * q_batch_stride
    k = _load_rows(k_text_pointer, key.to(tl.int64) * k_text_stride, exists, column, D, EVEN_D)  # [keys, D]
    v = _load_rows(v_text_pointer, key.to(tl.int64) * v_text_stride, exists, column, D, EVEN_D)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATE)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATE)
    for row in range(first_row, row_end, BLOCK_M):
        valid, stream, token, group = _decode(row + tl.arange(0, BLOCK_M), row_end, S, GROUP)
        anchor = tl.load(anchor_pointer + stream)
        head = kv_head * GROUP + group
        query = _query_index(batch, stream, token, head, P, S, H)
        q_offset = stream.to(tl.int64) * q_stream_stride + token * q_token_stride + head * q_head_stride
        q = _load_rows(q_pointer, q_offset, valid, column, D, EVEN_D)  # [rows, D]
        grad_out = _load_rows(grad_out_pointer, query * D, valid, column, D, EVEN_D)
        lse = tl.load(lse_pointer + query, mask=valid, other=0.0)
        delta = tl.load(delta_pointer + query, mask=valid, other=0.0)
        visible = _text_mask(key, anchor, L, window, HAS_WINDOW) & (key >= text_start)[None, :] & valid[:, None]
        weight, grad = _grad_scores(q, k, grad_out, v, lse, delta, visible, SCALE, SOFTCAP, True)
        grad_v = dot(tl.trans(cast(weight, v.dtype)), grad_out, grad_v)
        grad_k = dot(tl.trans(cast(grad, k.dtype)), q, grad_k)
    part = (split * (tl.num_programs(1).to(tl.int64)) + tl.program_id(1)) * L  # [splits, B * Hkv, L]
    _store_rows(grad_k_pointer, (part + key) * D, exists, column, D, grad_k * SCALE, EVEN_D)
    _store_rows(grad_v_pointer, (part + key) * D, exists, column, D, grad_v, EVEN_D)
