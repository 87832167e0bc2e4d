"""Thought attention in structured PyTorch: tiles of streams, no whole mask, no repeated keys.

The streams of a tile share the text keys up to the tile's last anchor, so their scores against the text are ONE matrix
product of [streams * S * G] packed rows, and only the few keys between the tile's first and last anchor need a mask.
Own keys are a batch of small products, one for each stream. Both parts share one softmax. The backward pass recomputes
a tile's weights from the saved log-sum-exp; nothing larger than a tile is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.positions import positions_of

WORKSPACE_SCORES = {"cpu": 2**20, "cuda": 2**26}
"""Most scores in a tile by device type, as far as one stream of every text fits: 4 MiB and 256 MiB of float32."""


@dataclass(frozen=True)
class Tile:
    """Consecutive streams of some texts and the text keys that any of them sees.

    Keys first..last-1 are read; keys clear_first..clear_last-1 are visible to every row, the others need the mask. No
    stream sees less for its start than the keys from last_start on.
    """

    batch: slice
    streams: slice
    first: int
    clear_first: int
    clear_last: int
    last: int
    last_start: int


def plan_tiles(
    anchors: list[list[int]], text_starts: list[list[int]], window: int | None, scores_per_stream: int, workspace: int
) -> Iterator[Tile]:
    """Cut P streams of B texts into tiles of at most `workspace` scores.

    Args:
        anchors: B rows of P anchors, or one row that holds for every text.
        text_starts: first visible text positions, B rows of P, or of one that holds for all streams of the text.
        window: sliding window in text positions; None: no window.
        scores_per_stream: number of scores of one stream of one text against everything it may see.
        workspace: largest number of scores in a tile; a tile has at least one stream.
    """
    B = len(text_starts)
    shared = len(anchors) == 1 or all(row == anchors[0] for row in anchors)
    for texts in [slice(0, B)] if shared else [slice(b, b + 1) for b in range(B)]:
        row = anchors[0 if shared else texts.start]
        starts = text_starts[texts]
        step = max(1, workspace // max(1, scores_per_stream * len(starts)))
        for begin in range(0, len(row) if starts else 0, step):
            end = min(begin + step, len(row))
            low, high = row[begin], row[end - 1]
            last = high + 1
            # neither anchors nor starts decrease along the streams
            first_start = min(start[min(begin, len(start) - 1)] for start in starts)
            last_start = max(start[min(end, len(start)) - 1] for start in starts)
            first = max(first_start, low + 1 - window if window is not None else 0)
            first = min(first, high)  # one masked key rather than none: the products need a key
            clear_first = max(last_start, last - window if window is not None else 0)
            clear_last = low + 1
            if clear_first > low:
                clear_first = clear_last = last  # no key is visible to all rows
            yield Tile(texts, slice(begin, end), first, clear_first, clear_last, last, last_start)


def thought_attention_torch(
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
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, P, S, H, D] and lse [B, P, S, H]; see `quietstar_kernels.thought_attention`."""
    B, P, S, H, _ = q.shape
    L, T = k_text.shape[1], k_thought.shape[2]
    keys = (L if window is None else min(L, window)) + T
    anchors, start = positions_of(anchor), None
    starts = [[0]] * B
    if text_start is not None:
        positions = positions_of(text_start)
        start = positions.on(q.device).view(B, P if text_start.dim() == 2 else 1)
        starts = positions.host.clamp_min(0).view(start.shape).tolist()
    rows = [anchors.host.tolist()] if anchor.dim() == 1 else anchors.host.tolist()
    workspace = WORKSPACE_SCORES.get(q.device.type, WORKSPACE_SCORES["cuda"])
    mask = _Mask(
        anchors.on(q.device),
        start,
        window,
        list(plan_tiles(rows, starts, window, S * H * keys, workspace)),
    )
    out: Tensor
    lse: Tensor
    out, lse = _ThoughtAttention.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        q, k_text, v_text, k_thought, v_thought, mask, scale, softcap, results
    )
    return out, lse


@dataclass(frozen=True)
class _Mask:
    """The closed form of the mask: who sees what follows from a few integers."""

    anchor: Tensor  # [P] or [B, P]
    start: Tensor | None  # [B, 1] or [B, P]
    window: int | None
    tiles: list[Tile]

    def largest_tile(self, q: Tensor) -> int:
        """Most scores against the text that a tile has."""
        S, H = q.shape[2:4]
        counts = (
            (t.batch.stop - t.batch.start) * (t.streams.stop - t.streams.start) * (t.last - t.first) for t in self.tiles
        )
        return int(S * H * max([0, *counts]))

    def hide_text(self, scores: Tensor, tile: Tile) -> None:
        """Put -inf at the hidden keys of scores [b, Hkv, n, S * G, last - first], in place."""
        for first, last in ((tile.first, tile.clear_first), (tile.clear_last, tile.last)):
            if first < last:
                hidden = self._hidden(tile, first, last, scores.device)
                scores[..., first - tile.first : last - tile.first].masked_fill_(hidden, float("-inf"))

    def _hidden(self, tile: Tile, first: int, last: int, device: torch.device) -> Tensor:
        """True where a key of first..last-1 is out of sight: [b or 1, 1, n, 1, last - first]."""
        key = torch.arange(first, last, device=device)
        anchor = self.anchor[..., tile.streams] if self.anchor.dim() == 1 else self.anchor[tile.batch, tile.streams]
        anchor = anchor.reshape(-1, 1, anchor.shape[-1], 1, 1)  # [b or 1, 1, n, 1, 1]
        hidden = key > anchor
        if self.start is not None and tile.last_start > first:
            start = self.start[tile.batch, tile.streams] if self.start.shape[1] > 1 else self.start[tile.batch]
            hidden = hidden | (key < start[:, None, :, None, None])
        if self.window is not None:
            hidden = hidden | (key <= anchor - self.window)
        return hidden


class _ThoughtAttention(torch.autograd.Function):
    """Saves the inputs, the output and the log-sum-exp; the backward pass recomputes the weights tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_text: Tensor,
        v_text: Tensor,
        k_thought: Tensor,
        v_thought: Tensor,
        mask: _Mask,
        scale: float,
        softcap: float | None,
        results: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.mask, ctx.scale, ctx.softcap = mask, scale, softcap
        if results is not None:
            out, lse = results[0].to(q.dtype).detach(), results[1].detach()
            ctx.save_for_backward(q, k_text, v_text, k_thought, v_thought, out, lse)
            return out, lse
        Hkv, T = k_thought.shape[3], k_thought.shape[2]
        dtype = compute_dtype(q, k_text, v_text, k_thought, v_thought)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:4], dtype=dtype, device=q.device)
        keys, values = _pack_text(k_text, dtype), _pack_text(v_text, dtype)  # [B, Hkv, L, D]
        hide_own = None if q.shape[2] == 1 else _own_bias(q, Hkv, T, dtype)  # the newest token sees its whole stream
        workspace = keys.new_empty(mask.largest_tile(q))
        for tile in mask.tiles:
            rows = _pack_rows(q, tile, Hkv, dtype).mul_(scale)  # [b, Hkv, n, S * G, D]
            text = _times_text_transposed(rows, keys, tile, workspace)  # [b, Hkv, n, S * G, last - first]
            own = rows @ _pack_own(k_thought, tile, dtype).mT  # [b, Hkv, n, S * G, T]
            for scores in (text, own):
                _cap(scores, softcap)
            mask.hide_text(text, tile)
            if hide_own is not None:
                own.add_(hide_own)
            top = torch.maximum(text.amax(-1, keepdim=True), own.amax(-1, keepdim=True))  # finite: a query sees itself
            text.sub_(top).exp_()
            own.sub_(top).exp_()
            total = text.sum(-1, keepdim=True).add_(own.sum(-1, keepdim=True))
            mixed = _times_text(text, values, tile).add_(own @ _pack_own(v_thought, tile, dtype)).div_(total)
            _unpack_rows(mixed, out, tile)
            _unpack_rows(total.log_().add_(top), lse.unsqueeze(-1), tile)
        ctx.save_for_backward(q, k_text, v_text, k_thought, v_thought, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k_text, v_text, k_thought, v_thought, out, lse = ctx.saved_tensors
        mask: _Mask = ctx.mask
        Hkv, T, dtype = k_thought.shape[3], k_thought.shape[2], lse.dtype
        keys, values = _pack_text(k_text, dtype), _pack_text(v_text, dtype)  # [B, Hkv, L, D]
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        grad_q, grad_k_own, grad_v_own = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k_thought, v_thought)
        )
        hide_own = _own_bias(q, Hkv, T, dtype)
        workspace, grad_workspace = keys.new_empty((2, mask.largest_tile(q)))
        with torch.autocast(q.device.type, enabled=False):
            for tile in mask.tiles:
                rows = _pack_rows(q, tile, Hkv, dtype).mul_(ctx.scale)
                own_keys, own_values = _pack_own(k_thought, tile, dtype), _pack_own(v_thought, tile, dtype)
                text = _times_text_transposed(rows, keys, tile, workspace)
                own = rows @ own_keys.mT
                text_slope, own_slope = (_cap(scores, ctx.softcap, slope=True) for scores in (text, own))
                mask.hide_text(text, tile)
                own.add_(hide_own)
                log_total = _pack_rows(lse.unsqueeze(-1), tile, Hkv, dtype)  # [b, Hkv, n, S * G, 1]
                text.sub_(log_total).exp_()  # the softmax weights
                own.sub_(log_total).exp_()

                grad_rows = _pack_rows(grad_out, tile, Hkv, dtype)
                _add_to_text(grad_values, text, grad_rows, tile)
                _unpack_own(own.mT @ grad_rows, grad_v_own, tile)
                # d score = weight * (d weight - sum of weight * d weight), and that sum is <d out, out>
                delta = _pack_rows(out, tile, Hkv, dtype).mul_(grad_rows).sum(-1, keepdim=True)
                delta -= _pack_rows(grad_lse.unsqueeze(-1), tile, Hkv, dtype)
                text.mul_(_times_text_transposed(grad_rows, values, tile, grad_workspace).sub_(delta))
                own.mul_((grad_rows @ own_values.mT).sub_(delta))
                if text_slope is not None and own_slope is not None:
                    text.mul_(text_slope)
                    own.mul_(own_slope)
                _add_to_text(grad_keys, text, rows, tile)
                _unpack_own(own.mT @ rows, grad_k_own, tile)
                _unpack_rows(_times_text(text, keys, tile).add_(own @ own_keys).mul_(ctx.scale), grad_q, tile)
        grad_k_text = grad_keys.transpose(1, 2).to(k_text.dtype)
        grad_v_text = grad_values.transpose(1, 2).to(v_text.dtype)
        return grad_q, grad_k_text, grad_v_text, grad_k_own, grad_v_own, None, None, None, None


def _cap(scores: Tensor, softcap: float | None, *, slope: bool = False) -> Tensor | None:
    """softcap * tanh(scores / softcap) in place; with `slope` returns the derivative, None without a softcap."""
    if softcap is None:
        return None
    scores.div_(softcap).tanh_()
    derivative = 1 - scores.square() if slope else None
    scores.mul_(softcap)
    return derivative


def _own_bias(q_BPSHD: Tensor, Hkv: int, T: int, dtype: torch.dtype) -> Tensor:
    """[S * G, T]: 0 where query s sees its stream's key t, t <= s + (T - S), and -inf where it does not."""
    S, H = q_BPSHD.shape[2:4]
    bias = torch.full((S, T), float("-inf"), dtype=dtype, device=q_BPSHD.device).triu_(1 + T - S)
    return bias.repeat_interleave(H // Hkv, dim=0)


def _pack_text(keys_BLKD: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L, Hkv, D] -> contiguous [B, Hkv, L, D]."""
    return keys_BLKD.transpose(1, 2).to(dtype).contiguous()


def _pack_own(keys_BPTKD: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """[B, P, T, Hkv, D] -> contiguous [b, Hkv, n, T, D] of the tile."""
    return keys_BPTKD[tile.batch, tile.streams].permute(0, 3, 1, 2, 4).to(dtype).contiguous()


def _unpack_own(packed: Tensor, into_BPTKD: Tensor, tile: Tile) -> None:
    into_BPTKD[tile.batch, tile.streams].copy_(packed.permute(0, 2, 3, 1, 4))


def _pack_rows(x_BPSHD: Tensor, tile: Tile, Hkv: int, dtype: torch.dtype) -> Tensor:
    """[B, P, S, H, D] -> a new contiguous [b, Hkv, n, S * G, D]: the rows that read one key head lie together."""
    x = x_BPSHD[tile.batch, tile.streams]
    b, n, S, H, D = x.shape
    packed = torch.empty((b, Hkv, n, S, H // Hkv, D), dtype=dtype, device=x.device)
    packed.copy_(_split_heads(x, Hkv).permute(0, 3, 1, 2, 4, 5))
    return packed.view(b, Hkv, n, S * (H // Hkv), D)


def _unpack_rows(packed: Tensor, into_BPSHD: Tensor, tile: Tile) -> None:
    into = into_BPSHD[tile.batch, tile.streams]
    b, n, S, H, D = into.shape
    Hkv = packed.shape[1]
    _split_heads(into, Hkv).copy_(packed.view(b, Hkv, n, S, H // Hkv, D).permute(0, 2, 3, 1, 4, 5))


def _split_heads(x_BPSHD: Tensor, Hkv: int) -> Tensor:
    """A view [..., Hkv, G, D] of [..., H, D]."""
    b, n, S, H, D = x_BPSHD.shape
    return x_BPSHD.view(b, n, S, Hkv, H // Hkv, D)


def _times_text_transposed(rows: Tensor, keys: Tensor, tile: Tile, workspace: Tensor) -> Tensor:
    """rows [b, Hkv, n, S * G, D] times the tile's text keys -> [b, Hkv, n, S * G, last - first] in the workspace."""
    visible = keys[tile.batch, :, tile.first : tile.last].flatten(0, 1)  # [b * Hkv, last - first, D]
    rows_of_heads = rows.view(visible.shape[0], -1, rows.shape[4])
    shape = (*rows_of_heads.shape[:2], visible.shape[1])
    # memory that has been touched before: fresh pages for every tile would cost a tenth of the time on a CPU
    result = workspace[: math.prod(shape)].view(shape)
    torch.bmm(rows_of_heads, visible.mT, out=result)
    return result.view(*rows.shape[:4], visible.shape[1])


def _times_text(weights: Tensor, values: Tensor, tile: Tile) -> Tensor:
    """weights [b, Hkv, n, S * G, last - first] times the tile's text values -> [b, Hkv, n, S * G, D]."""
    visible = values[tile.batch, :, tile.first : tile.last]
    return (weights.flatten(2, 3) @ visible).view(*weights.shape[:4], values.shape[3])


def _add_to_text(into: Tensor, weights: Tensor, rows: Tensor, tile: Tile) -> None:
    """Add weights^T rows to the tile's text keys of into [B, Hkv, L, D]."""
    into[tile.batch, :, tile.first : tile.last] += weights.flatten(2, 3).mT @ rows.flatten(2, 3)
