"""Diagonal attention of parallel thoughts (Quiet-STaR, arXiv 2403.09629, section 4.2 and figure 3).

Every stream hangs from an anchor in the text: it sees the text up to its anchor and itself, never another stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from quietstar_kernels.dispatch import (
    check_backend,
    require_dense_rows,
    require_device,
    require_dtype,
    require_floating,
    require_integer,
    require_shape,
    resolve_backend,
)
from quietstar_kernels.positions import positions_of
from quietstar_kernels.thought_attention.op import (
    LARGEST_D,
    MOST_TEXT_HEADS,
    GivenResults,
    thought_attention_op,
    tile_spans,
)
from quietstar_kernels.thought_attention.reference import thought_attention_reference
from quietstar_kernels.thought_attention.torch_backend import thought_attention_torch

__all__ = ["thought_attention"]

_ORDER = "order"
"""What `_check_order` has found to hold."""


@overload
def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    results: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    results: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    results: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every stream to the text before its anchor and to itself, in one softmax.

    Query (p, s) sees text key j where text_start[p] <= j <= anchor[p] and anchor[p] - j < window, and its own stream's
    keys t <= s + (T - S). S == T is the training pass; S == 1 is one sampling step over a stream of T tokens. Several
    thoughts at one position repeat its anchor: the text keys are stored once. Scores, softmax and sums are float32
    (float64 where an input is float64).

    The values of an anchor tensor, and of a text_start [B, P], are checked, and copied between host and device, at its
    first use and whenever it has been written to: the host waits for the device once for each tensor, not once for each
    layer. Under `torch.compile` they are not checked, an anchor outside the text then counting as the nearest position
    in it.

    A CUDA graph of the "triton" backend reads anchor and text_start themselves where they are on the device: what is
    written to them counts, unchecked, in the next replay. Where they are on the host it reads copies, which a call
    before the capture must have made, and which stay what they were for as long as the tensors live.

    Args:
        q: [B, P, S, H, D] queries of P streams, any floating dtype; like every input it may be a non-contiguous view.
        k_text: [B, L, Hkv, D] text keys; query head h reads key head h // (H // Hkv).
        v_text: [B, L, Hkv, D] text values.
        k_thought: [B, P, T, Hkv, D] keys of the streams, T >= S.
        v_thought: [B, P, T, Hkv, D] values of the streams.
        anchor: [P] or [B, P] text position that each stream hangs from, int32 or int64 on any device, non-decreasing
            along P, 0 <= anchor < L.
        text_start: first text position in sight, int32 or int64 on any device: [B], of a whole text, such as the end of
            its left padding; or [B, P], non-decreasing along P, of each stream, such as the start of its document where
            a text holds several. None: 0. A stream with an anchor before its start sees only itself.
        window: sliding window in text positions, measured from the anchor; None: the whole text.
        scale: factor of the scores; None: D ** -0.5.
        softcap: cap of the scores, which become softcap * tanh(scores / softcap), above 0; None: no cap.
        backend: name of the backend: "auto", "triton", "torch" or "reference". "triton" wants one dtype for all tensors
            (under autocast it takes different ones in autocast's, as PyTorch's own attention does), D <= 256, a dense
            last dimension and B * Hkv < 65536; "auto" takes "torch" where that is not so. Its forward pass needs no
            memory but its results; its backward pass the log-sum-exp once more and float32 parts of the text's
            gradients, at most 16 of them and 1 where the text is long. Its sums have one order: the same call gives the
            same bits.
        results: out and lse that an earlier call returned for these arguments, such as the sampling steps of a stream:
            nothing is computed, and they are returned with a gradient. "reference" computes them again. None: computes.
        return_lse: whether to return the log-sum-exp of the scaled scores too.

    Returns:
        out [B, P, S, H, D] in q's dtype; with `return_lse` also lse [B, P, S, H], natural logarithm, float32 (float64
        where an input is float64). Both are differentiable.

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, device, stride, anchor, text_start, window or backend that does not fit; the message names
            it.
    """
    tensors = {"q": q, "k_text": k_text, "v_text": v_text, "k_thought": k_thought, "v_thought": v_thought}
    for name, tensor in tensors.items():
        require_floating(name, tensor)
        require_device(name, tensor, q.device)
    sizes: dict[str, int] = {}
    require_shape("q", q, ("B", "P", "S", "H", "D"), sizes)
    require_shape("k_text", k_text, ("B", "L", "Hkv", "D"), sizes)
    require_shape("v_text", v_text, ("B", "L", "Hkv", "D"), sizes)
    require_shape("k_thought", k_thought, ("B", "P", "T", "Hkv", "D"), sizes)
    require_shape("v_thought", v_thought, ("B", "P", "T", "Hkv", "D"), sizes)
    for letter in ("S", "H", "D"):
        if sizes[letter] < 1:
            raise ValueError(f"q: got {letter}=0 in shape {list(q.shape)}, wanted at least 1")
    if sizes["Hkv"] < 1 or sizes["H"] % sizes["Hkv"] != 0:
        raise ValueError(f"k_text: got {sizes['Hkv']} key heads, wanted a divisor of q's {sizes['H']} heads")
    if sizes["T"] < sizes["S"]:
        raise ValueError(f"k_thought: got T={sizes['T']} keys in a stream, wanted at least q's S={sizes['S']}")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, or None for the whole text")
    if text_start is not None:
        require_integer("text_start", text_start)
        require_shape("text_start", text_start, ("B",) if text_start.dim() == 1 else ("B", "P"), sizes)
        if text_start.dim() == 2:
            _check_order("text_start", text_start)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, wanted a number above 0, or None")
    if results is not None:
        require_shape("results[0]", results[0], ("B", "P", "S", "H", "D"), sizes)
        require_shape("results[1]", results[1], ("B", "P", "S", "H"), sizes)
    _check_anchor(anchor, sizes)
    if torch.compiler.is_compiling():
        anchor = anchor.clamp(0, sizes["L"] - 1)
    if scale is None:
        scale = sizes["D"] ** -0.5
    dtype, chosen = q.dtype, resolve_backend(backend, q)
    if chosen == "triton":
        q, k_text, v_text, k_thought, v_thought = _as_autocast_would(q, k_text, v_text, k_thought, v_thought)
        refusal = _refusal(q, k_text, v_text, k_thought, v_thought)
        if refusal is not None and check_backend(backend) != "auto":
            raise refusal
        chosen = "triton" if refusal is None else "torch"
    given = {} if results is None or chosen == "reference" else {"results": results}
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the scores
        out, lse = IMPLEMENTATIONS[chosen](
            q, k_text, v_text, k_thought, v_thought, anchor, text_start, window, scale, softcap, **given
        )
    out = out.to(dtype)
    return (out, lse) if return_lse else out


def _as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of different dtypes, such as rotated queries and plain values, in autocast's dtype where it is on."""
    device = tensors[0].device.type
    if all(tensor.dtype == tensors[0].dtype for tensor in tensors) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _triton(q: Tensor, *rest: Any, results: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """out [B, P, S, H, D] and lse [B, P, S, H]; see `thought_attention`."""
    *keys_values, anchor, text_start, window, scale, softcap = rest
    anchor = _on_device(anchor, q.device)
    text_start = None if text_start is None else _on_device(text_start, q.device)
    arguments = (q, *keys_values, anchor, text_start, window, scale, softcap)
    out: Tensor
    lse: Tensor
    if results is None:
        out, lse = thought_attention_op(*arguments)
    else:
        out, lse = GivenResults.apply(*results, *arguments)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out, lse


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "triton": _triton,
    "torch": thought_attention_torch,
    "reference": thought_attention_reference,
}


def _refusal(q: Tensor, k_text: Tensor, v_text: Tensor, k_thought: Tensor, v_thought: Tensor) -> Exception | None:
    """What keeps the Triton kernels from these tensors, as the error that says so; "auto" then takes "torch"."""
    tensors = {"q": q, "k_text": k_text, "v_text": v_text, "k_thought": k_thought, "v_thought": v_thought}
    try:
        for name, tensor in tensors.items():
            require_dtype(name, tensor, q.dtype)
            require_dense_rows(name, tensor)
    except (TypeError, ValueError) as error:
        return error
    if not 1 <= q.shape[-1] <= LARGEST_D:
        return ValueError(f"q: got D={q.shape[-1]}, backend 'triton' wants 1 <= D <= {LARGEST_D}; 'torch' takes any")
    if q.shape[0] * k_text.shape[2] > MOST_TEXT_HEADS:
        return ValueError(
            f"q: got B * Hkv = {q.shape[0] * k_text.shape[2]}, backend 'triton' wants at most {MOST_TEXT_HEADS}"
        )
    for name, span in tile_spans(q, k_text, v_text, k_thought, v_thought).items():
        if span >= 2**31:
            return ValueError(
                f"{name}: got strides {tensors[name].stride()}, with which a tile's elements lie {span} apart, wanted "
                f"less than 2**31; pass {name}.contiguous()"
            )
    return None


def _on_device(positions: Tensor, device: torch.device) -> Tensor:
    """int32 on the device: the tensor itself where it is that, so that a CUDA graph reads what is written to it."""
    if positions.device == device and positions.dtype == torch.int32 and positions.is_contiguous():
        return positions
    if _values_are_out_of_reach(positions):
        return positions.to(device, torch.int32).contiguous()
    return positions_of(positions).on(device)


def _values_are_out_of_reach(tensor: Tensor) -> bool:
    """A compiled graph holds operators only, and a CUDA graph that is captured cannot wait for a copy."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_anchor(anchor: Tensor, sizes: dict[str, int]) -> None:
    """Check dtype and shape, and where values may be read, range and order."""
    require_integer("anchor", anchor)
    require_shape("anchor", anchor, ("P",) if anchor.dim() == 1 else ("B", "P"), sizes)
    if _values_are_out_of_reach(anchor):
        return
    positions = positions_of(anchor)
    if anchor.numel() == 0 or sizes["L"] in positions.checked:
        return
    low, high = (int(bound) for bound in positions.host.aminmax())
    if low < 0 or high >= sizes["L"]:
        culprit = low if low < 0 else high
        raise ValueError(f"anchor: got {culprit}, wanted text positions 0 <= anchor < L={sizes['L']}")
    _check_order("anchor", anchor)
    positions.checked.add(sizes["L"])


def _check_order(name: str, tensor: Tensor) -> None:
    """Check that positions do not decrease along P, where values may be read."""
    if _values_are_out_of_reach(tensor):
        return
    positions = positions_of(tensor)
    if _ORDER in positions.checked:
        return
    if bool((positions.host[..., 1:] < positions.host[..., :-1]).any()):
        raise ValueError(f"{name}: got a decreasing sequence, wanted positions in non-decreasing order along P")
    positions.checked.add(_ORDER)
