"""The attention of thought streams inside an unmodified transformers model.

transformers lets a model's attention be replaced by name. The function registered here, `quietstar_attention`, gets
each layer's queries, keys and values after rotary embedding, and a `ThoughtPass` that is passed along as a keyword
argument and says which tokens of the sequence are text and which belong to streams. Without one it is PyTorch's
scaled-dot-product attention, so the base model stays usable as it is.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.errors import UnsupportedBackboneError
from quietstar.model.upstream import register_attention, sdpa_attention_forward
from quietstar_kernels import thought_attention

IMPLEMENTATION = "quietstar"

# Keyword arguments with which some families change the attention scores; the kernels do not know them.
UNSUPPORTED_ARGUMENTS = {
    "s_aux": "uses attention sinks",
    "position_bias": "adds a position bias to its attention scores",
}


@dataclass
class LayerKeysValues:
    """One layer's stored keys and values.

    Args:
        text_key, text_value: Keys and values of the text, [B, L, Hkv, D].
        stream_key, stream_value: Memory for keys and values of the streams, [B, P, capacity, Hkv, D]; None before use.
    """

    text_key: Tensor
    text_value: Tensor
    stream_key: Tensor | None = None
    stream_value: Tensor | None = None


@dataclass
class StreamCache:
    """Keys and values of a text and of the streams that start from it.

    Args:
        stream_capacity: Largest number of tokens in a stream.
        layers: Stored keys and values by layer index.
    """

    stream_capacity: int
    layers: dict[int, LayerKeysValues] = field(default_factory=dict)


class AttentionResults:
    """What the attention of one layer has computed while thoughts were sampled, for a pass that is differentiated.

    Attributes:
        text: Results of PyTorch's fused attention over the text; of others nothing is kept.
        out: Attended values of the streams, [B, P, S, H, D].
        lse: Log-sum-exp of their scores, [B, P, S, H].
    """

    def __init__(self) -> None:
        self.text: list[Any] = []
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def write(self, out: Tensor, lse: Tensor, offset: int, capacity: int) -> None:
        """Keep the results of the tokens offset, offset + 1, ... of every stream of `capacity` tokens."""
        if self.out is None or self.lse is None:
            self.out, self.lse = (x.new_empty(*x.shape[:2], capacity, *x.shape[3:]) for x in (out, lse))
        end = offset + out.shape[2]
        self.out[:, :, offset:end], self.lse[:, :, offset:end] = out, lse

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are kept."""
        text = [tensor for results in self.text for tensor in results if isinstance(tensor, Tensor)]
        return [*text, *(self.streams or ())]

    @property
    def streams(self) -> tuple[Tensor, Tensor] | None:
        """The results of the streams, where there are any."""
        return None if self.out is None or self.lse is None else (self.out, self.lse)


class _FusedAttention(TorchDispatchMode):
    """Keeps the results of PyTorch's fused attention, or gives kept ones instead of computing."""

    OPERATIONS = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
    )
    """Those that return a log-sum-exp without a gradient, too."""

    def __init__(self, results: list[Any], given: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._results = results
        self._given = given

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        if func not in self.OPERATIONS:
            return func(*args, **(kwargs or {}))
        if self._given and self._results:
            return self._results.pop()
        output = func(*args, **(kwargs or {}))
        if not self._given:
            self._results.append(output)
        return output


class AttentionPass(Protocol):
    """What a forward pass tells the attention of its layers: which of its tokens see which."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Run one layer's attention, [B, N, H, D]; see `quietstar_attention` for the arguments."""
        ...


@dataclass(frozen=True)
class ThoughtPass:
    """What the attention of one forward pass must know. The sequence is `[text | stream 0 | stream 1 | ...]`.

    Args:
        text_length: Number of text tokens in this pass; 0 when the text's keys and values come from `cache`.
        stream_length: Number of tokens of each stream in this pass; 0 in a pass over the text alone.
        stream_offset: Number of tokens of each stream that `cache` already holds.
        anchor: Text position that each stream starts from, int32 [B, P], on any device.
        text_start: First text token that text tokens see, int32: [B], of each row; [B, L], of each token; None: 0.
        backend: Kernel backend: "auto", "triton", "torch" or "reference".
        stream_start: First text token that streams see, int32: [B], of each row; [B, P], of each stream; None: 0.
        cache: Cache of this pass's keys and values and those of earlier passes. None in the pass over text and whole
            streams, which needs no cache and must give the same result when a layer is recomputed.
        results: What each layer's attention computes, by layer index: kept in a pass with a cache, taken in another.
            None keeps nothing.
        seen: List that receives one entry (layer index, window) per attention call, for the probe; None keeps none.
    """

    text_length: int
    stream_length: int
    anchor: Tensor
    text_start: Tensor | None
    backend: str
    stream_start: Tensor | None = None
    stream_offset: int = 0
    cache: StreamCache | None = None
    results: dict[int, AttentionResults] | None = None
    seen: list[tuple[int, int | None]] | None = None
    _text_masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def text_mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Return the mask of the text, bool [B or 1, 1, L, L], or None where it equals plain causal attention."""
        length = self.text_length
        if window is not None and window >= length:
            window = None
        if window is None and self.text_start is None:
            return None
        if window not in self._text_masks:
            query = torch.arange(length, device=device)[:, None]
            key = torch.arange(length, device=device)[None, :]
            visible = key <= query
            if window is not None:
                visible = visible & (query - key < window)
            visible = visible[None, None]
            if self.text_start is not None:
                # a padding query sees itself: softmax over nothing would be NaN and would spread through the layers
                start = self.text_start if self.text_start.ndim == 2 else self.text_start[:, None]
                visible = visible & (key >= start[:, None, :, None]) | (key == query)
            self._text_masks[window] = visible
        return self._text_masks[window]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Run one layer's attention, [B, N, H, D]."""
        layer_index = int(module.layer_idx)  # type: ignore[arg-type]  # of every transformers attention layer
        if self.seen is not None:
            self.seen.append((layer_index, window))
        length, outputs = self.text_length, []
        kept = self._results_of(layer_index)
        if length:
            text_query, text_key, text_value = query[:, :, :length], key[:, :, :length], value[:, :, :length]
            mask = self.text_mask(window, query.device)
            if softcap is not None:
                outputs.append(softcapped_attention(text_query, text_key, text_value, mask, scaling, softcap))
            else:
                with nullcontext() if kept is None else _FusedAttention(kept.text, given=self.cache is None):
                    outputs.append(
                        sdpa_attention_forward(module, text_query, text_key, text_value, mask, scaling=scaling)[0]
                    )
            text_key, text_value = text_key.transpose(1, 2), text_value.transpose(1, 2)
            if self.cache is not None:
                # every sampling step reads them head by head: in this layout float32 is never copied again
                text_key, text_value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (text_key, text_value))
                self.cache.layers[layer_index] = LayerKeysValues(text_key, text_value)
        if self.stream_length:
            stream_query, stream_key, stream_value = (
                rearrange(tensor[:, :, length:], "b h (p s) d -> b p s h d", p=self.anchor.shape[1])
                for tensor in (query, key, value)
            )
            if self.cache is not None:
                stored = self.cache.layers[layer_index]
                text_key, text_value = stored.text_key, stored.text_value
                stream_key, stream_value = _append(self, stored, stream_key, stream_value)
            attended, lse = thought_attention(
                stream_query,
                text_key,
                text_value,
                stream_key,
                stream_value,
                self.anchor,
                text_start=self.stream_start,
                window=window,
                scale=scaling,
                softcap=softcap,
                backend=self.backend,
                results=kept.streams if kept is not None and self.cache is None else None,
                return_lse=True,
            )
            if kept is not None and self.cache is not None:
                kept.write(attended, lse, self.stream_offset, self.cache.stream_capacity)
            outputs.append(attended.flatten(1, 2))
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _results_of(self, layer_index: int) -> AttentionResults | None:
        """Return where this layer's results are kept; taken ones are gone, and computed again in another pass."""
        if self.results is None:
            return None
        if self.cache is None:
            return self.results.pop(layer_index, None)
        return self.results.setdefault(layer_index, AttentionResults())


def quietstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    thought_pass: AttentionPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run the attention of one layer, in the signature that transformers asks for.

    Args:
        module: Attention layer that calls.
        query: Queries of the N text and stream tokens of this pass, [B, H, N, D].
        key, value: Keys and values of these tokens, [B, Hkv, N, D].
        attention_mask: Mask of a plain call; ignored where `thought_pass` is given.
        scaling: Factor of the scores; None: 1 / sqrt(D).
        dropout: Dropout rate of a plain call.
        sliding_window: Number of last tokens that a token sees, itself included; None: all.
        softcap: Soft cap: scores become softcap * tanh(scores / softcap), as in Gemma 2; None: no cap.
        thought_pass: Layout of the N tokens; None makes this plain scaled-dot-product attention.
        kwargs: Other arguments of the layer; some of them are refused with a `thought_pass`.

    Returns:
        Attended values [B, N, H, D], and None in place of attention weights.

    Raises:
        UnsupportedBackboneError: The layer changes its scores in a way that the kernels do not know.
    """
    if thought_pass is None:
        if softcap is not None:
            attended = softcapped_attention(query, key, value, attention_mask, scaling, softcap)
            return attended, None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedBackboneError(
                f"{type(module).__name__} {reason}, which thought attention does not support"
            )
    return thought_pass.attend(module, query, key, value, scaling, sliding_window, softcap), None


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Compute attention with a soft cap, in plain operations: PyTorch's own has no soft cap.

    Args:
        query: Queries, [B, H, N, D].
        key, value: Keys and values, [B, Hkv, L, D].
        mask: Mask of the visible tokens, broadcast against [B, H, N, L]: bool, or numbers that are added to the scores;
            None: causal, where the N queries are the last of the L tokens.
        scaling: Factor of the scores; None: 1 / sqrt(D).
        softcap: Soft cap: scores become softcap * tanh(scores / softcap).

    Returns:
        Attended values, [B, N, H, D].
    """
    group = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (key.shape[1], group)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.einsum("bkgnd,bkld->bkgnl", grouped, key)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        count, length = scores.shape[-2:]
        mask = torch.ones(1, 1, count, length, dtype=torch.bool, device=query.device).tril(length - count)
    if mask.dtype == torch.bool:
        # the smallest number, not minus infinity: padding that sees nothing would be NaN, and would spread
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[:, :, None]
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
    return torch.einsum("bkgnl,bkld->bnkgd", weights, value).flatten(2, 3)


def _append(thought_pass: ThoughtPass, stored: LayerKeysValues, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new stream tokens after the stored ones; return keys and values, [B, P, offset + new, Hkv, D] each."""
    assert thought_pass.cache is not None
    if stored.stream_key is None or stored.stream_value is None:
        shape = (*key.shape[:2], thought_pass.cache.stream_capacity, *key.shape[3:])
        stored.stream_key, stored.stream_value = key.new_empty(shape), value.new_empty(shape)
    start, end = thought_pass.stream_offset, thought_pass.stream_offset + thought_pass.stream_length
    stored.stream_key[:, :, start:end] = key
    stored.stream_value[:, :, start:end] = value
    return stored.stream_key[:, :, :end], stored.stream_value[:, :, :end]


# The mask function serves plain calls of the base model; a thought pass brings its own 4-D mask and never reaches it.
register_attention(IMPLEMENTATION, quietstar_attention)
