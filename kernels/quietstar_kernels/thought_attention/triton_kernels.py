"""Thought attention in Triton.

The query rows of one text and one key head are numbered (stream, token, group): row = (p * S + s) * G + g, where the
G = H // Hkv query heads that read the key head are the group. A tile is BLOCK_M consecutive rows, whatever S is. Its
rows share the text keys up to the tile's last anchor; only the keys between the first and the last anchor, and those at
the border of a window, need a mask. Own keys are numbered p * T + t, and a tile reads those of its streams. The first
key in sight is the same for all streams of a text, text_start [B], or with STREAM_STARTS each stream's own, [B, P]; it
does not decrease either, so that a tile reads from that of its first stream and masks up to that of its last.

Scores are kept in base 2, score * log2(e), so that exp2 does. Offsets within a tile are 32-bit and relative to its
first stream, whose own place is a 64-bit scalar: 64-bit offsets for every element would not fit the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton_language import LN_2, LOG2_E, cast, dot, tanh

# Sizes must not be specialised, or every text and stream length would compile its own kernel. GROUP is a constant: it
# is the model's, and divisions by it are most of the integer arithmetic of a tile.
TEXT_SIZES = ["P", "S", "L", "H", "window", "anchor_batch_stride"]
SIZES = [*TEXT_SIZES, "T"]


@triton.jit
def _decode(first_row, row_end, S, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows first_row .. first_row + BLOCK_M - 1.

    Returns:
        Whether each row lies before row_end; the tile's first stream; and of each row, counted from that stream, the
        query p * S + s, its stream p and token s, and the group. Rows past the end repeat the last one.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    first_stream = first_row // (S * GROUP)
    relative = tl.minimum(rows, row_end - 1) - first_stream * (S * GROUP)
    query = relative // GROUP
    stream = query // S
    return rows < row_end, first_stream, query, stream, query - stream * S, relative % GROUP


@triton.jit
def _load_rows(pointer, offset, row_mask, column, D: tl.constexpr):
    """[rows, BLOCK_D] at pointer + offset[row] + column; 0 outside the mask and beyond D."""
    mask = row_mask[:, None]
    if column.shape[0] != D:
        mask = mask & (column < D)[None, :]
    return tl.load(pointer + (offset[:, None] + column[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, offset, row_mask, column, value, D: tl.constexpr):
    mask = row_mask[:, None]
    if column.shape[0] != D:
        mask = mask & (column < D)[None, :]
    tl.store(pointer + (offset[:, None] + column[None, :]), cast(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _text_start(text_start_pointer, place):
    """First text key in sight, of a text or, with STREAM_STARTS, of the stream at that place."""
    start = (place * 0).to(tl.int32)
    if text_start_pointer is not None:
        start = tl.maximum(tl.load(text_start_pointer + place), start)
    return start


@triton.jit
def _text_mask(key, anchor, window, HAS_WINDOW: tl.constexpr):
    """Which keys each anchor sees but for what is before its start; broadcasts key against anchor."""
    mask = key <= anchor
    if HAS_WINDOW:
        mask = mask & (anchor - key < window)
    return mask


@triton.jit
def _own_mask(own, stream, token, S, T):
    """Own key p * T + t is seen by token s of stream p where t <= s + (T - S); broadcasts own against stream, token."""
    return (own >= stream * T) & (own <= stream * T + token + (T - S))


@triton.jit
def _own_offset(own, T, stream_stride, stride):
    """Where own key p * T + t lies."""
    stream = own // T
    return stream * stream_stride + (own - stream * T) * stride


@triton.jit
def _scores(raw, INNER: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Scores from q @ k^T; times OUTER they are in base 2, which the exponential's multiply-add does by the way."""
    scores = raw * INNER
    if HAS_SOFTCAP:
        scores = tanh(scores)
    return scores


@triton.jit
def _attend(accumulator, running_max, total, scores, v, OUTER: tl.constexpr):
    """One step of the online softmax; rows that have seen no key yet keep a running max of -inf."""
    new_max = tl.maximum(running_max, tl.max(scores, 1) * OUTER)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(scores * OUTER - pivot[:, None])  # [rows, keys]
    shrink = tl.exp2(running_max - pivot)
    total = total * shrink + tl.sum(weight, 1)
    accumulator = dot(cast(weight, v.dtype), v, accumulator * shrink[:, None])
    return accumulator, new_max, total


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
    streams,
    S,
    T,
    column,
    D: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """The own keys of the tile's streams, block-diagonal; pointers are at its first stream."""
    for start in range(0, streams * T, BLOCK_OWN):
        own = start + tl.arange(0, BLOCK_OWN)
        exists = own < streams * T
        k = _load_rows(k_pointer, _own_offset(own, T, k_stream_stride, k_stride), exists, column, D)
        v = _load_rows(v_pointer, _own_offset(own, T, v_stream_stride, v_stride), exists, column, D)
        raw = tl.zeros([q.shape[0], BLOCK_OWN], dtype=accumulator.dtype)
        scores = _scores(dot(q, tl.trans(k), raw), INNER, HAS_SOFTCAP)  # [rows, keys]
        visible = _own_mask(own[None, :], stream[:, None], token[:, None], S, T)
        scores = tl.where(visible, scores, float("-inf"))
        accumulator, running_max, total = _attend(accumulator, running_max, total, scores, v, OUTER)
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
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STREAM_STARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """out [B, P, S, H, D] and lse [B, P, S, H], contiguous, of BLOCK_M rows."""
    kv_heads = H // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    row_count = P * S * GROUP
    # the last rows see the most text: they go first, so that no long program is left over at the end
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    valid, first_stream, query, stream, token, group = _decode(first_row, row_count, S, GROUP, BLOCK_M)
    last_stream = (tl.minimum(first_row + BLOCK_M, row_count) - 1) // (S * GROUP)
    column = tl.arange(0, BLOCK_D)

    wide_stream = first_stream.to(tl.int64)
    q_pointer += batch * q_batch_stride + wide_stream * q_stream_stride + kv_head * GROUP * q_head_stride
    q_offset = stream * q_stream_stride + token * q_token_stride + group * q_head_stride
    q = _load_rows(q_pointer, q_offset, valid, column, D)  # [rows, D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACCUMULATE)
    running_max = tl.full([BLOCK_M], float("-inf"), dtype=ACCUMULATE)
    total = tl.zeros([BLOCK_M], dtype=ACCUMULATE)

    k_thought_pointer += batch * k_thought_batch_stride + kv_head * k_thought_head_stride
    k_thought_pointer += wide_stream * k_thought_stream_stride
    v_thought_pointer += batch * v_thought_batch_stride + kv_head * v_thought_head_stride
    v_thought_pointer += wide_stream * v_thought_stream_stride
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
        last_stream - first_stream + 1,
        S,
        T,
        column,
        D,
        INNER,
        OUTER,
        HAS_SOFTCAP,
        BLOCK_OWN,
    )

    anchor_pointer += batch * anchor_batch_stride + first_stream
    anchor = tl.load(anchor_pointer + stream)  # [rows]
    first_anchor = tl.load(anchor_pointer)
    last_anchor = tl.load(anchor_pointer + (last_stream - first_stream))
    if STREAM_STARTS:
        text_start_pointer += batch * P + first_stream
        text_start = tl.load(text_start_pointer + stream)  # [rows]
        last_start = tl.load(text_start_pointer + (last_stream - first_stream))
        first_key = _text_start(text_start_pointer, first_stream * 0)
    else:
        first_key = _text_start(text_start_pointer, batch)
    if HAS_WINDOW:
        first_key = tl.maximum(first_key, first_anchor - window + 1)
    key_end = tl.minimum(last_anchor + 1, L)
    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    block = tl.arange(0, BLOCK_N)
    for start in range(first_key, key_end, BLOCK_N):
        key = start + block
        exists = key < key_end
        wide_start = tl.cast(start, tl.int64)
        k = _load_rows(k_text_pointer + wide_start * k_text_stride, block * k_text_stride, exists, column, D)
        raw = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACCUMULATE)
        scores = _scores(dot(q, tl.trans(k), raw), INNER, HAS_SOFTCAP)  # [rows, keys]
        masked = start + BLOCK_N - 1 > first_anchor
        if HAS_WINDOW:
            masked = masked | (last_anchor - start >= window)
        if masked:
            visible = _text_mask(key[None, :], anchor[:, None], window, HAS_WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        if STREAM_STARTS:  # noqa: SIM102  # Triton would compile both sides of an `and`
            if start < last_start:
                scores = tl.where(key[None, :] >= text_start[:, None], scores, float("-inf"))
        v = _load_rows(v_text_pointer + wide_start * v_text_stride, block * v_text_stride, exists, column, D)
        accumulator, running_max, total = _attend(accumulator, running_max, total, scores, v, OUTER)

    first_query = (batch * P + first_stream) * S * H + kv_head * GROUP
    query = query * H + group
    _store_rows(out_pointer + first_query * D, query * D, valid, column, accumulator * (1 / total)[:, None], D)
    tl.store(lse_pointer + first_query + query, running_max * LN_2 + tl.log(total), mask=valid)


@triton.jit
def _weight_and_gradient(
    left,
    left_value,
    right,
    right_value,
    lse,
    delta,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Softmax weights and the gradient of scale * <q, k> before any mask.

    left and left_value are (q, grad_out) and right and right_value (k, v), for [rows, keys], or the other way round for
    [keys, rows]; lse and delta have one entry for each row, in a dimension that broadcasts against that.
    """
    zero = tl.zeros([left.shape[0], right.shape[0]], dtype=lse.dtype)
    scores = _scores(dot(left, tl.trans(right), zero), INNER, HAS_SOFTCAP)
    weight = tl.exp2(scores * OUTER - lse * LOG2_E)
    gradient = weight * (dot(left_value, tl.trans(right_value), zero) - delta)
    if HAS_SOFTCAP:
        gradient = gradient * (1 - scores * scores)
    return weight, gradient


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
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STREAM_STARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Gradients of the queries, own keys and own values of `streams` whole streams.

    out, grad_out, grad_q [B, P, S, H, D]; lse, grad_lse, delta [B, P, S, H]; grad_*_thought [B, P, T, Hkv, D], all
    contiguous. delta, the sum of grad_out * out less grad_lse, is written for the text's pass. Own keys are seen by
    these rows alone, so that their gradients are complete here: with ONE_BLOCK of rows, of at most BLOCK_M, as soon as
    those have met them, else in a second pass over the rows.
    """
    kv_heads = H // GROUP
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    stream_rows = S * GROUP
    tile_stream = (tl.num_programs(0) - 1 - tl.program_id(0)) * streams
    streams = tl.minimum(streams, P - tile_stream)
    column = tl.arange(0, BLOCK_D)
    block = tl.arange(0, BLOCK_N)
    own_block = tl.arange(0, BLOCK_OWN)

    # everything below counts from the tile's first stream
    wide_stream = tile_stream.to(tl.int64)
    anchor_pointer += batch * anchor_batch_stride + tile_stream
    q_pointer += batch * q_batch_stride + wide_stream * q_stream_stride + kv_head * GROUP * q_head_stride
    k_thought_pointer += batch * k_thought_batch_stride + kv_head * k_thought_head_stride
    k_thought_pointer += wide_stream * k_thought_stream_stride
    v_thought_pointer += batch * v_thought_batch_stride + kv_head * v_thought_head_stride
    v_thought_pointer += wide_stream * v_thought_stream_stride
    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    first_own = (batch * P + wide_stream) * T * kv_heads + kv_head
    grad_k_thought_pointer += first_own * D
    grad_v_thought_pointer += first_own * D
    first_query = (batch * P + wide_stream) * S * H + kv_head * GROUP
    out_pointer += first_query * D
    grad_out_pointer += first_query * D
    grad_q_pointer += first_query * D
    lse_pointer += first_query
    grad_lse_pointer += first_query
    delta_pointer += first_query
    if STREAM_STARTS:
        text_start_pointer += batch * P + tile_stream
    else:
        text_start = _text_start(text_start_pointer, batch)

    for first_row in range(0, streams * stream_rows, BLOCK_M):
        row_end = tl.minimum(first_row + BLOCK_M, streams * stream_rows)
        valid, first_stream, query, stream, token, group = _decode(first_row, row_end, S, GROUP, BLOCK_M)
        stream += first_stream
        last_stream = (row_end - 1) // stream_rows
        query = (first_stream * S + query) * H + group
        q_offset = stream * q_stream_stride + token * q_token_stride + group * q_head_stride
        q = _load_rows(q_pointer, q_offset, valid, column, D)  # [rows, D]
        grad_out = _load_rows(grad_out_pointer, query * D, valid, column, D)
        out = _load_rows(out_pointer, query * D, valid, column, D)
        lse = tl.load(lse_pointer + query, mask=valid, other=float("inf"))[:, None]
        delta = tl.sum(out.to(ACCUMULATE) * grad_out.to(ACCUMULATE), 1)
        delta -= tl.load(grad_lse_pointer + query, mask=valid, other=0.0)
        tl.store(delta_pointer + query, delta, mask=valid)
        delta = delta[:, None]

        grad_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACCUMULATE)
        for start in range(first_stream * T, (last_stream + 1) * T, BLOCK_OWN):
            own = start + own_block
            exists = own < (last_stream + 1) * T
            k_offset = _own_offset(own, T, k_thought_stream_stride, k_thought_stride)
            v_offset = _own_offset(own, T, v_thought_stream_stride, v_thought_stride)
            k = _load_rows(k_thought_pointer, k_offset, exists, column, D)  # [keys, D]
            v = _load_rows(v_thought_pointer, v_offset, exists, column, D)
            weight, gradient = _weight_and_gradient(
                q, grad_out, k, v, lse, delta, INNER, OUTER, HAS_SOFTCAP
            )  # [rows, keys]
            visible = _own_mask(own[None, :], stream[:, None], token[:, None], S, T)
            gradient = cast(tl.where(visible, gradient, 0.0), k.dtype)
            grad_q = dot(gradient, k, grad_q)
            if ONE_BLOCK:
                weight = cast(tl.where(visible, weight, 0.0), v.dtype)
                zero = tl.zeros([BLOCK_OWN, BLOCK_D], dtype=ACCUMULATE)
                grad_v = dot(tl.trans(weight), grad_out, zero)
                grad_k = dot(tl.trans(gradient), q, zero)
                _store_rows(grad_v_thought_pointer, own * kv_heads * D, exists, column, grad_v, D)
                _store_rows(grad_k_thought_pointer, own * kv_heads * D, exists, column, grad_k * SCALE, D)

        anchor = tl.load(anchor_pointer + stream)  # [rows]
        first_anchor = tl.load(anchor_pointer + first_stream)
        last_anchor = tl.load(anchor_pointer + last_stream)
        if STREAM_STARTS:
            text_start = tl.load(text_start_pointer + stream)  # [rows]
            last_start = tl.load(text_start_pointer + last_stream)
            first_key = _text_start(text_start_pointer, first_stream)
        else:
            first_key = text_start
        if HAS_WINDOW:
            first_key = tl.maximum(first_key, first_anchor - window + 1)
        key_end = tl.minimum(last_anchor + 1, L)
        for start in range(first_key, key_end, BLOCK_N):
            key = start + block
            exists = key < key_end
            wide_start = tl.cast(start, tl.int64)
            k_block, v_block = k_text_pointer + wide_start * k_text_stride, v_text_pointer + wide_start * v_text_stride
            k = _load_rows(k_block, block * k_text_stride, exists, column, D)
            v = _load_rows(v_block, block * v_text_stride, exists, column, D)
            _, gradient = _weight_and_gradient(q, grad_out, k, v, lse, delta, INNER, OUTER, HAS_SOFTCAP)
            masked = start + BLOCK_N - 1 > first_anchor
            if HAS_WINDOW:
                masked = masked | (last_anchor - start >= window)
            if masked:
                visible = _text_mask(key[None, :], anchor[:, None], window, HAS_WINDOW)
                gradient = tl.where(visible, gradient, 0.0)
            if STREAM_STARTS:  # noqa: SIM102  # Triton would compile both sides of an `and`
                if start < last_start:
                    gradient = tl.where(key[None, :] >= text_start[:, None], gradient, 0.0)
            grad_q = dot(cast(gradient, k.dtype), k, grad_q)
        _store_rows(grad_q_pointer, query * D, valid, column, grad_q * SCALE, D)

    if not ONE_BLOCK:
        tl.debug_barrier()  # below, every thread reads the others' delta
        for start in range(0, streams * T, BLOCK_OWN):
            own = start + own_block
            exists = own < streams * T
            k_offset = _own_offset(own, T, k_thought_stream_stride, k_thought_stride)
            v_offset = _own_offset(own, T, v_thought_stream_stride, v_thought_stride)
            k = _load_rows(k_thought_pointer, k_offset, exists, column, D)  # [keys, D]
            v = _load_rows(v_thought_pointer, v_offset, exists, column, D)
            grad_k = tl.zeros([BLOCK_OWN, BLOCK_D], dtype=ACCUMULATE)
            grad_v = tl.zeros([BLOCK_OWN, BLOCK_D], dtype=ACCUMULATE)
            row_end = ((tl.minimum(start + BLOCK_OWN, streams * T) - 1) // T + 1) * stream_rows
            for first_row in range(start // T * stream_rows, row_end, BLOCK_M):
                valid, first_stream, query, stream, token, group = _decode(first_row, row_end, S, GROUP, BLOCK_M)
                stream += first_stream
                query = (first_stream * S + query) * H + group
                q_offset = stream * q_stream_stride + token * q_token_stride + group * q_head_stride
                q = _load_rows(q_pointer, q_offset, valid, column, D)  # [rows, D]
                grad_out = _load_rows(grad_out_pointer, query * D, valid, column, D)
                lse = tl.load(lse_pointer + query, mask=valid, other=float("inf"))[None, :]
                delta = tl.load(delta_pointer + query, mask=valid, other=0.0)[None, :]
                weight, gradient = _weight_and_gradient(
                    k, v, q, grad_out, lse, delta, INNER, OUTER, HAS_SOFTCAP
                )  # [keys, rows]
                visible = _own_mask(own[:, None], stream[None, :], token[None, :], S, T)
                grad_v = dot(cast(tl.where(visible, weight, 0.0), v.dtype), grad_out, grad_v)
                grad_k = dot(cast(tl.where(visible, gradient, 0.0), k.dtype), q, grad_k)
            _store_rows(grad_k_thought_pointer, own * kv_heads * D, exists, column, grad_k * SCALE, D)
            _store_rows(grad_v_thought_pointer, own * kv_heads * D, exists, column, grad_v, D)


@triton.jit
def _streams_before(sorted_pointer, P, position):
    """How many of P sorted anchors or starts lie before a position."""
    low = position * 0
    high = low + P
    while low < high:
        middle = (low + high) // 2
        before = tl.load(sorted_pointer + middle) < position
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=[*TEXT_SIZES, "splits"])
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
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STREAM_STARTS: tl.constexpr,
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
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    # the first keys are seen by the most rows, and the first programs start first
    first_key = tl.program_id(0) // splits * BLOCK_N
    split = tl.program_id(0) % splits
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < L
    column = tl.arange(0, BLOCK_D)
    stream_rows = S * GROUP

    if not STREAM_STARTS:
        text_start = _text_start(text_start_pointer, batch)
    anchor_pointer += batch * anchor_batch_stride
    begin_stream = _streams_before(anchor_pointer, P, first_key)
    end_stream = begin_stream * 0 + P
    if HAS_WINDOW:
        end_stream = _streams_before(anchor_pointer, P, first_key + BLOCK_N - 1 + window)
    if STREAM_STARTS:
        text_start_pointer += batch * P
        end_stream = tl.minimum(end_stream, _streams_before(text_start_pointer, P, first_key + BLOCK_N))
        end_stream = tl.maximum(end_stream, begin_stream)
    else:
        if first_key + BLOCK_N <= text_start:
            end_stream = begin_stream
    blocks = tl.cdiv((end_stream - begin_stream) * stream_rows, BLOCK_M)
    begin_row = begin_stream * stream_rows + split * blocks // splits * BLOCK_M
    end_row = begin_stream * stream_rows + (split + 1) * blocks // splits * BLOCK_M
    end_row = tl.minimum(end_row, end_stream * stream_rows)

    k_text_pointer += batch * k_text_batch_stride + kv_head * k_text_head_stride
    v_text_pointer += batch * v_text_batch_stride + kv_head * v_text_head_stride
    k_text_pointer += first_key.to(tl.int64) * k_text_stride
    v_text_pointer += first_key.to(tl.int64) * v_text_stride
    q_pointer += batch * q_batch_stride + kv_head * GROUP * q_head_stride
    k = _load_rows(k_text_pointer, (key - first_key) * k_text_stride, exists, column, D)  # [keys, D]
    v = _load_rows(v_text_pointer, (key - first_key) * v_text_stride, exists, column, D)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATE)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATE)
    for first_row in range(begin_row, end_row, BLOCK_M):
        valid, first_stream, query, stream, token, group = _decode(first_row, end_row, S, GROUP, BLOCK_M)
        wide_stream = tl.cast(first_stream, tl.int64)
        first_query = (batch * P + wide_stream) * S * H + kv_head * GROUP
        query = query * H + group
        q_offset = stream * q_stream_stride + token * q_token_stride + group * q_head_stride
        q = _load_rows(q_pointer + wide_stream * q_stream_stride, q_offset, valid, column, D)  # [rows, D]
        grad_out = _load_rows(grad_out_pointer + first_query * D, query * D, valid, column, D)
        lse = tl.load(lse_pointer + first_query + query, mask=valid, other=float("inf"))[None, :]
        delta = tl.load(delta_pointer + first_query + query, mask=valid, other=0.0)[None, :]
        weight, gradient = _weight_and_gradient(
            k, v, q, grad_out, lse, delta, INNER, OUTER, HAS_SOFTCAP
        )  # [keys, rows]
        last_stream = (tl.minimum(first_row + BLOCK_M, end_row) - 1) // stream_rows
        masked = tl.load(anchor_pointer + first_stream) < first_key + BLOCK_N - 1
        if not STREAM_STARTS:
            masked = masked | (first_key < text_start)
        if HAS_WINDOW:
            masked = masked | (tl.load(anchor_pointer + last_stream) - first_key >= window)
        if masked:
            anchor = tl.load(anchor_pointer + first_stream + stream)
            visible = _text_mask(key[:, None], anchor[None, :], window, HAS_WINDOW)
            if not STREAM_STARTS:
                visible = visible & (key >= text_start)[:, None]
            weight = tl.where(visible, weight, 0.0)
            gradient = tl.where(visible, gradient, 0.0)
        if STREAM_STARTS:  # noqa: SIM102  # Triton would compile both sides of an `and`
            if first_key < tl.load(text_start_pointer + last_stream):
                visible = key[:, None] >= tl.load(text_start_pointer + first_stream + stream)[None, :]
                weight = tl.where(visible, weight, 0.0)
                gradient = tl.where(visible, gradient, 0.0)
        grad_v = dot(cast(weight, v.dtype), grad_out, grad_v)
        grad_k = dot(cast(gradient, k.dtype), q, grad_k)
    part = ((split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * L + first_key) * D  # [splits, B * Hkv, L, D]
    _store_rows(grad_k_pointer + part, (key - first_key) * D, exists, column, grad_k * SCALE, D)
    _store_rows(grad_v_pointer + part, (key - first_key) * D, exists, column, grad_v, D)
