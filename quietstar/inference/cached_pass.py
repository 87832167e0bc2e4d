"""Attention of tokens behind stored texts: new text tokens, and thoughts that hang from the end.

Thoughts lie behind the text in the same memory, token by token with the K streams of a token side by side, so a new
token is one write and one product. A mask keeps the streams apart; a single stream needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quietstar.inference.thinking_cache import ThinkingCache
from quietstar.model.attention import softcapped_attention
from quietstar.model.upstream import sdpa_attention_forward


@dataclass(frozen=True)
class CachedTokens:
    """Which tokens a pass brings: `[new text tokens | tokens of the streams]`, the latter token by token.

    Args:
        cache: Where their keys and values go. It counts the new text tokens already.
        text_tokens: New tokens of the text, n.
        stream_tokens: New tokens of each stream, s.
        stream_offset: Tokens of each stream that are stored.
        streams: K.
        rows: int64, the rows of the batch that this pass is of; None: all.
    """

    cache: ThinkingCache
    text_tokens: int
    stream_tokens: int = 0
    stream_offset: int = 0
    streams: int = 1
    rows: Tensor | None = None
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """Column of the pass's first token."""
        return self.cache.text_length - self.text_tokens + self.streams * self.stream_offset

    def position_ids(self, device: torch.device) -> Tensor:
        """Positions of the tokens of this pass, int64 [len(rows) or 1, n + K s]."""
        length = self.cache.text_length
        text = torch.arange(length - self.text_tokens, length, device=device)
        own = torch.arange(self.stream_offset, self.stream_offset + self.stream_tokens, device=device)
        positions = torch.cat([text, length + own.repeat_interleave(self.streams)])[None]
        start = self.cache.start
        if start is None:
            return positions
        start = start if self.rows is None else start[self.rows]
        return (positions - start[:, None]).clamp_min(0)

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
        """One layer's attention; see `quietstar_attention` for the arguments. [B, N, H, D]."""
        layer = self.cache.layer(int(module.layer_idx))  # type: ignore[arg-type]  # an attribute of attention layers
        batch = self.cache.batch
        keys, values = layer.append(key, value, self.rows, batch)
        if self.rows is not None:
            # rows that do not think ask too, with zeros: cheaper than copying the others' texts together
            everyone = query.new_zeros(batch, *query.shape[1:])
            everyone[self.rows] = query
            query = everyone
        mask = self._mask(window, query.device)
        if softcap is not None:
            attended = softcapped_attention(query, keys, values, _by_head(mask), scaling, softcap)
        elif self.first == 0:
            attended = sdpa_attention_forward(module, query, keys, values, _by_head(mask), scaling=scaling)[0]
        else:
            attended = _few_queries(query, keys, values, mask, scaling)
        shown: Tensor = attended if self.rows is None else attended[self.rows]
        return shown

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Boolean [B or 1, N, columns], or None where every token sees all before it."""
        length = self.cache.text_length
        if window is not None and window >= length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._visible(window, device)
        return self._masks[window]

    def _visible(self, window: int | None, device: torch.device) -> Tensor | None:
        start, length, streams = self.cache.start, self.cache.text_length, self.streams
        count = self.text_tokens + streams * self.stream_tokens
        unbroken = count == 1 or (self.first == 0 and not self.stream_tokens)
        if start is None and window is None and unbroken and (streams == 1 or not self.stream_tokens):
            return None
        column = torch.arange(self.first + count, device=device)[None]
        asking = column[:, self.first :].T  # [N, 1]: the columns of the tokens that ask
        before = column <= asking
        anchor = asking.clamp_max(length - 1)  # the text token from which a token of a stream hangs
        text = before & (column < length)
        if window is not None:
            text = text & (anchor - column < window)
        own = before & (column >= length) & ((column - asking) % streams == 0)
        visible = text[None]
        if start is not None:
            visible = visible & (column >= start[:, None, None])
        return visible | own | (column == asking)  # padding sees itself: a softmax over nothing is NaN


def _by_head(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None]


def _few_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of few tokens to many, without repeating the keys of grouped heads: a group's heads ask as one.

    Args:
        query: [B, H, N, D]; key, value: [B, Hkv, columns, D]; mask: as `_mask` gives it.

    Returns:
        [B, N, H, D].
    """
    group = query.shape[1] // key.shape[1]
    asked = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    spread = None if mask is None else mask.repeat(1, group, 1)[:, None]
    attended = scaled_dot_product_attention(asked, key, value, attn_mask=spread, scale=scaling)
    by_head: Tensor = attended.unflatten(2, (group, -1)).flatten(1, 2)
    return by_head.transpose(1, 2)
