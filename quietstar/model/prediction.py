"""Predicts the next token after a thought (sections 4.2 and 4.3 of the paper), from the text's keys and values.

`predict_next` is read first. START goes through the model together with the text's newest token where it is known
beforehand that the token is thought about, and END together with the last token of the thought: T + 1 passes per token.

`CachedTokens` is the attention of these passes. Thoughts are stored after the text in the same memory, token by token
with the K streams of a token side by side, so a new token is one write and one product. A mask separates the streams; a
single stream needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quietstar.model.attention import softcapped_attention
from quietstar.model.cache import ThinkingCache, TokenThoughts
from quietstar.model.draw import draw
from quietstar.model.passes import PAUSE
from quietstar.model.thinking_model import ThinkingModel
from quietstar.model.upstream import sdpa_attention_forward


@torch.no_grad()
def predict_next(model: ThinkingModel, tokens: Tensor, cache: ThinkingCache) -> Tensor:
    """Reads new tokens and predicts the next one, with thoughts where `cache.thinking` asks for them.

    Args:
        model: Thinking model that predicts.
        tokens: Token ids after those that the cache holds, int64 [B, n].
        cache: Cache of the texts, which holds these tokens too afterwards, and no thought.

    Returns:
        Logits, float32 [B, V]: after a thought the mixture, after several the log of their mean probabilities.
    """
    cache.read(tokens)
    thinking = cache.thinking
    batch, count = tokens.shape
    streams = thinking.thoughts_per_token
    assert cache.finished is not None
    running = ~cache.finished
    may_think = thinking.when.at(cache.index)
    embeds = model.base.get_input_embeddings()(tokens)
    together = may_think and count == 1 and not thinking.when.needs_base
    if together:
        start, _ = model.thought_vectors()
        embeds = torch.cat([embeds, start.expand(batch, streams, -1)], dim=1)
    reading = CachedTokens(cache, count, stream_tokens=int(together), streams=streams)
    hidden = model.run_decoder(embeds, reading.position_ids(tokens.device), reading)
    hidden_base = hidden[:, count - 1]

    base_logits = model.head.logits(hidden_base) if may_think and thinking.when.rule == "entropy" else None
    thinks = torch.zeros_like(running)
    if may_think:
        thinks = running & thinking.when.where(model, hidden_base, base_logits)
    rows = thinks.nonzero()[:, 0]
    thinking.record.predictions += int(running.sum())
    thinking.record.thought_at += len(rows)
    thoughts = None
    if len(rows):
        hidden_start = hidden[rows, count:] if together else None
        chosen, hidden_thought = _think(model, cache, rows, hidden_start)
        mixed, weight = _mix(model, hidden_base[rows], hidden_thought)
        thoughts = TokenThoughts(rows, chosen, weight)
    if thinking.keep_thoughts:
        thinking.record.thoughts.append(None if thoughts is None else thoughts.cpu())
    cache.drop_thoughts()
    if thoughts is not None and len(rows) == batch:
        return mixed
    if base_logits is None:
        base_logits = model.head.logits(hidden_base)
    if thoughts is not None:
        base_logits[rows] = mixed
    return base_logits


def _think(
    model: ThinkingModel, cache: ThinkingCache, rows: Tensor, hidden_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Makes thoughts at the end of some rows.

    Args:
        model: Thinking model that makes the thoughts.
        cache: Cache of the texts.
        rows: Rows that think, int64 [R].
        hidden_start: Hidden states after START, [R, K, E]; None where START has not been through the model yet.

    Returns:
        Token ids of the thoughts, int64 [R, K, T], and hidden states after END, [R, K, E].
    """
    length, streams = model.config.thought_length, cache.thinking.thoughts_per_token
    start, end = (vector.expand(len(rows), 1, streams, -1) for vector in model.thought_vectors())
    stored = 0 if hidden_start is None else 1

    def extend(embeds: Tensor) -> Tensor:
        """Appends embeddings [R, s, K, E] to the streams, and returns the last of their hidden states, [R, K, E]."""
        nonlocal stored
        count = embeds.shape[1]
        tokens = CachedTokens(cache, 0, count, stored, streams, None if len(rows) == cache.batch else rows)
        hidden = model.run_decoder(embeds.flatten(1, 2), tokens.position_ids(embeds.device), tokens)
        stored += count
        return hidden[:, -streams:]

    if model.config.thinking == "pause":
        pauses = start.expand(-1, length + 1 - stored, -1, -1)
        hidden = extend(torch.cat([pauses, end], dim=1))
        return torch.full((len(rows), streams, length), PAUSE, device=rows.device), hidden

    embed = model.base.get_input_embeddings()
    uniform = None
    if cache.thinking.temperature > 0:
        uniform = cache.draws(1 + streams * length)[:, 1:].unflatten(1, (streams, length)).to(rows.device)[rows]
    hidden = extend(start) if hidden_start is None else hidden_start
    chosen = []
    for step in range(length):
        token = _pick(model, hidden, cache.thinking.temperature, None if uniform is None else uniform[..., step])
        chosen.append(token)
        following = embed(token)[:, None]
        hidden = extend(following if step + 1 < length else torch.cat([following, end], dim=1))
    return torch.stack(chosen, dim=-1), hidden


def _pick(model: ThinkingModel, hidden: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """Chooses a token of each stream, int64 [R, K], from hidden states [R, K, E]."""
    logits = model.head.logits(hidden)
    if model.banned:
        logits[..., list(model.banned)] = float("-inf")
    if uniform is None:
        return logits.argmax(-1)
    token, _ = draw(logits.flatten(0, 1), uniform.flatten(), temperature=temperature)
    return token.view(hidden.shape[:2])


def _mix(model: ThinkingModel, hidden_base: Tensor, hidden_thought: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits [R, V] and mixing weights [R, K], from hidden states [R, E] and [R, K, E]."""
    hidden_base = hidden_base[:, None].expand_as(hidden_thought)
    weight = model.mixing_head(hidden_base, hidden_thought)
    logits = model.head.mixed_logits(hidden_base, hidden_thought, weight, model.config.interpolation)
    if logits.shape[1] == 1:
        return logits[:, 0], weight
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1]), weight


@dataclass(frozen=True)
class CachedTokens:
    """The tokens of one pass: `[new text tokens | tokens of the streams]`, the latter token by token.

    Args:
        cache: Cache that the keys and values go to; the new text tokens are already counted in its length.
        text_tokens: Number n of new tokens of the text.
        stream_tokens: Number s of new tokens of each stream.
        stream_offset: Number of tokens of each stream that are stored.
        streams: Number K of streams in each row.
        rows: Rows of the batch that take part in this pass, int64; None: all.
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
        """Column of the pass's first token in the stored keys."""
        return self.cache.text_length - self.text_tokens + self.streams * self.stream_offset

    def position_ids(self, device: torch.device) -> Tensor:
        """Returns the positions of the tokens of this pass, int64 [len(rows) or 1, n + K s]."""
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
        """Runs one layer's attention, [B, N, H, D]; see `quietstar_attention` for the arguments."""
        layer = self.cache.layer(int(module.layer_idx))  # type: ignore[arg-type]  # an attribute of attention layers
        batch = self.cache.batch
        keys, values = layer.append(key, value, self.rows, batch)
        if self.rows is not None:
            # rows that do not think get queries of zeros: cheaper than gathering the texts of the others
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
        """Returns the mask, bool [B or 1, N, columns], or None where every token sees all before it."""
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
        anchor = asking.clamp_max(length - 1)  # the text token that a stream's token starts from
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
    """Computes attention of few tokens to many; a group's heads become more queries, so their keys are not repeated.

    Args:
        query: Queries, [B, H, N, D].
        key, value: Stored keys and values, [B, Hkv, columns, D].
        mask: Mask of the visible columns, bool [B or 1, N, columns]; None: all.
        scaling: Factor of the scores; None: 1 / sqrt(D).

    Returns:
        Attended values, [B, N, H, D].
    """
    group = query.shape[1] // key.shape[1]
    asked = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    spread = None if mask is None else mask.repeat(1, group, 1)[:, None]
    attended = scaled_dot_product_attention(asked, key, value, attn_mask=spread, scale=scaling)
    by_head: Tensor = attended.unflatten(2, (group, -1)).flatten(1, 2)
    return by_head.transpose(1, 2)
