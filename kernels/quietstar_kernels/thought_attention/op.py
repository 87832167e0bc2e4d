"""Thought attention's Triton kernels as PyTorch operators: launch, fakes, autograd.

Nothing here waits for the device or reads a tensor's values, so a call may be captured in a CUDA graph, and nothing is
larger than the inputs but for the partial sums of the text's gradients (`grad_text_parts`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels.configurations import Configuration, configuration
from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.launch import Launch

LARGEST_D = 256
GRAD_TEXT_PROGRAMS = 1024
"""Programs of the text's backward pass, as far as its rows go: enough to fill any GPU several times over."""
LARGEST_BLOCK = 256
MOST_TEXT_HEADS = 65535
"""CUDA's limit of a grid's second axis, which numbers texts and key heads."""
MOST_SPLITS = 16
MOST_STREAMS = 8


def padded_head_size(D: int) -> int:
    """The power of two that a row of D elements takes in a tile."""
    return max(32, 1 << (D - 1).bit_length())


def case_of(q: Tensor) -> str:
    """What the configurations are keyed by, such as "16-bit D128"."""
    return f"{q.element_size() * 8}-bit D{padded_head_size(q.shape[-1])}"


def tile_spans(q: Tensor, k_text: Tensor, v_text: Tensor, k_thought: Tensor, v_thought: Tensor) -> dict[str, int]:
    """How far apart the elements of a tile lie at most, which the kernels count in 32 bits."""
    _, P, S, H, _ = q.shape
    T, Hkv = k_thought.shape[2:4]
    group = H // Hkv
    streams = min(P, max(MOST_STREAMS, LARGEST_BLOCK // (S * group)) + 1)
    spans = {"q": streams * q.stride(1) + S * q.stride(2) + group * q.stride(3)}
    for name, x in (("k_thought", k_thought), ("v_thought", v_thought)):
        spans[name] = streams * x.stride(1) + T * x.stride(2)
    for name, x in (("k_text", k_text), ("v_text", v_text)):
        spans[name] = LARGEST_BLOCK * x.stride(1)
    return spans


def forward_launch(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    configuration: Configuration,
) -> Launch:
    """out and lse; S == 1 is the sampling step. For the arguments see `quietstar_kernels.thought_attention`.

    Args:
        anchor: [P] or [B, P] text position of each stream, int32 on q's device.
        text_start: [B] or contiguous [B, P] first text position in sight, int32 on q's device; None: 0.
        out: [B, P, S, H, D] attended values in q's dtype, contiguous, written.
        lse: [B, P, S, H] log-sum-exp of the scores, contiguous, written.
    """
    from quietstar_kernels.thought_attention import triton_kernels

    B, P, S, H, _ = q.shape
    Hkv = k_text.shape[2]
    arguments, constants = _shared(q, k_text, v_text, k_thought, v_thought, anchor, text_start, window, scale, softcap)
    pointers = {
        **_pointers(q, k_text, v_text, k_thought, v_thought, anchor, text_start),
        "out_pointer": out,
        "lse_pointer": lse,
    }
    return Launch(
        triton_kernels.forward_kernel,
        (_blocks(P * S * (H // Hkv), configuration["BLOCK_M"]), B * Hkv),
        pointers | arguments,
        configuration,
        constants,
    )


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): scores in base 2 are outer * tanh(inner * raw) with a softcap, else outer * inner * raw.

    outer is above 0: the largest score is the largest before it is multiplied, and what a mask hides stays -inf.
    """
    if softcap is not None:
        return scale / softcap, softcap * math.log2(math.e)
    return (1.0, scale * math.log2(math.e)) if scale > 0 else (float(scale), math.log2(math.e))


def streams_in_tile(P: int, rows_of_stream: int, block: int) -> int:
    """Whole streams of a backward tile: the fewest whose rows waste the least of the last block of rows."""
    most = max(1, min(P, max(MOST_STREAMS, block // rows_of_stream)))

    def waste(streams: int) -> float:
        rows = streams * rows_of_stream
        return _blocks(rows, block) * block / rows

    return min(range(1, most + 1), key=waste)


def backward_streams_launch(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    grad_k_thought: Tensor,
    grad_v_thought: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    configuration: Configuration,
) -> Launch:
    """delta, grad_q, grad_k_thought and grad_v_thought, all contiguous like out, lse and their gradients.

    Args:
        delta: [B, P, S, H] sums of grad_out * out less grad_lse, like lse; written for `backward_text_launch`.
    """
    from quietstar_kernels.thought_attention import triton_kernels

    B, P, S, H, _ = q.shape
    Hkv = k_text.shape[2]
    rows_of_stream = S * (H // Hkv)
    streams = streams_in_tile(P, rows_of_stream, configuration["BLOCK_M"])
    arguments, constants = _shared(q, k_text, v_text, k_thought, v_thought, anchor, text_start, window, scale, softcap)
    pointers = {
        **_pointers(q, k_text, v_text, k_thought, v_thought, anchor, text_start),
        "out_pointer": out,
        "lse_pointer": lse,
        "grad_out_pointer": grad_out,
        "grad_lse_pointer": grad_lse,
        "delta_pointer": delta,
        "grad_q_pointer": grad_q,
        "grad_k_thought_pointer": grad_k_thought,
        "grad_v_thought_pointer": grad_v_thought,
        "streams": streams,
    }
    return Launch(
        triton_kernels.backward_streams_kernel,
        (_blocks(P, streams), B * Hkv),
        pointers | arguments,
        configuration,
        constants | {"SCALE": float(scale), "ONE_BLOCK": streams * rows_of_stream <= configuration["BLOCK_M"]},
    )


def grad_text_parts(q: Tensor, k_text: Tensor, configuration: Configuration) -> int:
    """Parts [splits, B, Hkv, L, D] into which the text's gradients are split.

    Enough to make `GRAD_TEXT_PROGRAMS` programs, as far as every part still has a block of rows.
    """
    _, P, S, H, _ = q.shape
    B, L, Hkv, _ = k_text.shape
    programs = max(1, _blocks(L, configuration["BLOCK_N"]) * B * Hkv)
    row_blocks = _blocks(P * S * (H // Hkv), configuration["BLOCK_M"])
    return max(1, min(MOST_SPLITS, row_blocks, _blocks(GRAD_TEXT_PROGRAMS, programs)))


def backward_text_launch(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_k_parts: Tensor,
    grad_v_parts: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    configuration: Configuration,
) -> Launch:
    """The parts of the text's gradients, [splits, B, Hkv, L, D] in lse's dtype, to be summed by the caller."""
    from quietstar_kernels.thought_attention import triton_kernels

    B, L, Hkv, _ = k_text.shape
    arguments, constants = _shared(q, k_text, v_text, None, None, anchor, text_start, window, scale, softcap)
    splits = grad_k_parts.shape[0]
    pointers = {
        "q_pointer": q,
        "k_text_pointer": k_text,
        "v_text_pointer": v_text,
        "anchor_pointer": anchor,
        "text_start_pointer": text_start,
        "lse_pointer": lse,
        "delta_pointer": delta,
        "grad_out_pointer": grad_out,
        "grad_k_pointer": grad_k_parts,
        "grad_v_pointer": grad_v_parts,
        "splits": splits,
    }
    return Launch(
        triton_kernels.backward_text_kernel,
        (_blocks(L, configuration["BLOCK_N"]) * splits, B * Hkv),
        pointers | arguments,
        configuration,
        constants | {"SCALE": float(scale)},
    )


@torch.library.custom_op("quietstar::thought_attention", mutates_args=())
def thought_attention_op(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out [B, P, S, H, D] and lse [B, P, S, H]; `anchor` and `text_start` are int32 on q's device."""
    out, lse = _empty_outputs(q)
    kernel = "thought_attention.step" if q.shape[2] == 1 else "thought_attention.forward"
    chosen = configuration(kernel, case_of(q), q.device)
    tensors = (q, k_text, v_text, k_thought, v_thought, anchor, text_start, out, lse)
    forward_launch(*tensors, window, scale, softcap, chosen).run()
    return out, lse


@thought_attention_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@torch.library.custom_op("quietstar::thought_attention_backward", mutates_args=())
def thought_attention_backward_op(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k_text, v_text, k_thought and v_thought, each contiguous and in its tensor's dtype."""
    case = case_of(q)
    inputs = (q, k_text, v_text, k_thought, v_thought, anchor, text_start)
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    delta = torch.empty_like(lse)
    grad_q, grad_k_thought, grad_v_thought = _empty(q), _empty(k_thought), _empty(v_thought)
    outputs = (out, lse, grad_out, grad_lse, delta, grad_q, grad_k_thought, grad_v_thought)
    chosen = configuration("thought_attention.backward_streams", case, q.device)
    backward_streams_launch(*inputs, *outputs, window, scale, softcap, chosen).run()

    chosen = configuration("thought_attention.backward_text", case, q.device)
    B, L, Hkv, D = k_text.shape
    parts = (grad_text_parts(q, k_text, chosen), B, Hkv, L, D)
    grad_k, grad_v = (torch.empty(parts, dtype=lse.dtype, device=q.device) for _ in range(2))
    backward_text_launch(
        q, k_text, v_text, anchor, text_start, lse, delta, grad_out, grad_k, grad_v, window, scale, softcap, chosen
    ).run()
    grad_k_text, grad_v_text = (x.sum(0).transpose(1, 2).to(q.dtype).contiguous() for x in (grad_k, grad_v))
    return grad_q, grad_k_text, grad_v_text, grad_k_thought, grad_v_thought


@thought_attention_backward_op.register_fake
def _(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_thought: Tensor, v_thought: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k_text), _empty(v_text), _empty(k_thought), _empty(v_thought)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = thought_attention_backward_op(*ctx.saved_tensors, grad_out, grad_lse, ctx.window, ctx.scale, ctx.softcap)
    return *grads, None, None, None, None, None


thought_attention_op.register_autograd(_backward, setup_context=_setup_context)


class GivenResults(torch.autograd.Function):
    """The operator with out and lse that it has computed before; they come first, then its own arguments."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        results = out.to(inputs[0].dtype).detach(), lse.detach()
        _setup_context(ctx, inputs, results)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return None, None, *_backward(ctx, *gradients)


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(q), torch.empty(q.shape[:4], dtype=compute_dtype(q), device=q.device)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _pointers(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "q_pointer": q,
        "k_text_pointer": k_text,
        "v_text_pointer": v_text,
        "k_thought_pointer": k_thought,
        "v_thought_pointer": v_thought,
        "anchor_pointer": anchor,
        "text_start_pointer": text_start,
    }


def _shared(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor | None,
    v_thought: Tensor | None,
    anchor: Tensor,
    text_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Strides and sizes, and the constants, that the three kernels share; without own keys those of the text's pass."""
    import triton.language as tl

    _, P, S, H, D = q.shape
    _, L, Hkv, _ = k_text.shape
    strides = {
        "q": (q, ("batch_stride", "stream_stride", "token_stride", "head_stride")),
        "k_text": (k_text, ("batch_stride", "stride", "head_stride")),
        "v_text": (v_text, ("batch_stride", "stride", "head_stride")),
    }
    sizes = {"P": P, "S": S, "L": L, "H": H}
    # no further than the text, where it hides nothing either: the kernels add positions to it in 32 bits
    sizes["window"] = 0 if window is None else min(window, L)
    if k_thought is not None and v_thought is not None:
        own = ("batch_stride", "stream_stride", "stride", "head_stride")
        strides |= {"k_thought": (k_thought, own), "v_thought": (v_thought, own)}
        sizes["T"] = k_thought.shape[2]
    arguments = {
        f"{name}_{which}": tensor.stride(dimension)
        for name, (tensor, names) in strides.items()
        for dimension, which in enumerate(names)
    }
    inner, outer = score_factors(scale, softcap)
    arguments["anchor_batch_stride"] = anchor.stride(0) if anchor.dim() == 2 else 0
    constants = {
        "GROUP": H // Hkv,
        "D": D,
        "INNER": inner,
        "OUTER": outer,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "STREAM_STARTS": text_start is not None and text_start.dim() == 2,
        "ACCUMULATE": tl.float64 if q.dtype == torch.float64 else tl.float32,
        "BLOCK_D": padded_head_size(D),
    }
    return arguments | sizes, constants
