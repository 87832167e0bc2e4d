"""Predicts the next token after a thought (sections 4.2 and 4.3 of the paper), from the text's keys and values.

`predict_next` is read first. START goes through the model together with the text's newest token where it is known
beforehand that the token is thought about, and END together with the last token of the thought: T + 1 passes per token.

Thoughts are stored after the text in the same memory, token by token with the K streams of a token side by side, so a
new token is one write and one product. `TextPass` is the attention of a pass over several tokens of the text. A single
token and its thoughts go through `Decoding`: where they are written, their positions and what they see are tensors on
the device that move on from token to token, so that every token is the same launches with the same arguments. A CUDA
graph can hold them, until the text has grown by a block. The host waits only to see which texts of several have ended,
and where a rule has to see the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quietstar.model.attention import softcapped_attention
from quietstar.model.cache import ThinkingCache, TokenThoughts
from quietstar.model.draw import draw_from
from quietstar.model.passes import PAUSE
from quietstar.model.thinking_model import OutputHead, ThinkingModel
from quietstar.model.upstream import sdpa_attention_forward

BLOCK = 128
"""Columns of a text's memory that are read or left out together, so that shapes stay the same for so many tokens."""


def predict_next(model: ThinkingModel, tokens: Tensor, cache: ThinkingCache) -> Tensor:
    """Reads new tokens and predicts the next one, with thoughts where `cache.thinking` asks for them.

    Args:
        model: Thinking model that predicts.
        tokens: Token ids after those that the cache holds, int64 [B, n].
        cache: Cache of the texts, which holds these tokens too afterwards, and no thought.

    Returns:
        Logits, float32 [B, V]: after a thought the mixture, after several the log of their mean probabilities.
    """
    with torch.inference_mode():  # spares the host the bookkeeping of versions and views
        logits, thoughts = _predict(model, tokens, cache)
    # copies, because tensors of inference mode can neither be written to elsewhere nor be part of a graph
    if cache.thinking.keep_thoughts:
        cache.thinking.record.thoughts.append(None if thoughts is None else thoughts.cpu())
    return logits.clone()


def _predict(model: ThinkingModel, tokens: Tensor, cache: ThinkingCache) -> tuple[Tensor, TokenThoughts | None]:
    thinking = cache.thinking
    rows = cache.running()  # None: all
    alive = cache.batch if rows is None else len(rows)
    count = tokens.shape[1]
    alone = count == 1 and cache.text_length > 0
    cache.read(tokens)
    may_think = thinking.when.at(cache.index)
    together = may_think and alone and not thinking.when.needs_base
    embeds = model.base.get_input_embeddings()(tokens)
    if alone:
        decoding = Decoding.after(model, cache)
        if together:
            embeds = torch.cat([embeds, decoding.start], dim=1)
        hidden = decoding.run(model, cache, embeds, 0, 1 + decoding.streams * together)
    else:
        reading = TextPass(cache, count)
        last = cache.text_length - 1 - cache.least_padding
        hidden = model.run_decoder(embeds, reading.position_ids(tokens.device), reading, last)
        decoding = Decoding.after(model, cache)
    hidden_base = hidden[:, count - 1]

    head = model.head
    base_logits = head.logits(hidden_base) if may_think and thinking.when.rule == "entropy" else None
    thinks = alive if may_think else 0
    if thinks and thinking.when.needs_base:
        chosen = thinking.when.where(model, hidden_base, base_logits)
        rows = chosen.nonzero()[:, 0] if rows is None else rows[chosen[rows]]
        thinks = len(rows)
        rows = None if thinks == cache.batch else rows
    thinking.record.predictions += alive
    thinking.record.thought_at += thinks
    mixed = thoughts = None
    if thinks:
        hidden_start = hidden[:, count:] if together else None
        if rows is not None:
            hidden_base = hidden_base[rows]
            hidden_start = None if hidden_start is None else hidden_start[rows]
        picked, hidden_thought = _think(model, head, cache, decoding, rows, hidden_start)
        mixed, weight = _mix(model, head, hidden_base, hidden_thought)
        if thinking.keep_thoughts:
            who = torch.arange(cache.batch, device=tokens.device) if rows is None else rows
            thoughts = TokenThoughts(who, picked, weight)
    if thinks:
        decoding.clear(cache)
    cache.drop_thoughts()
    if mixed is not None and rows is None:
        return mixed, thoughts
    if base_logits is None:
        base_logits = head.logits(hidden[:, count - 1])
    if mixed is not None:
        base_logits[rows] = mixed
    return base_logits, thoughts


def _think(
    model: ThinkingModel,
    head: OutputHead,
    cache: ThinkingCache,
    decoding: Decoding,
    rows: Tensor | None,
    hidden_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Makes thoughts at the end of some rows.

    Args:
        model: Thinking model that makes the thoughts.
        head: Output head of its base.
        cache: Cache of the texts.
        decoding: Passes of this token.
        rows: Rows that think, int64 [R]; None: all.
        hidden_start: Hidden states after START, [R, K, E]; None where START has not been through the model yet.

    Returns:
        Token ids of the thoughts, int64 [R, K, T], and hidden states after END, [R, K, E].
    """
    length, streams = model.config.thought_length, decoding.streams
    start, end = decoding.start, decoding.end
    if rows is not None:
        start, end = start[: len(rows)], end[: len(rows)]
    stored = 1 if hidden_start is None else 1 + streams  # tokens of this token's passes that are through

    def extend(embeds: Tensor) -> Tensor:
        """Appends embeddings [R, n, E] to the streams, and returns the last of their hidden states, [R, K, E]."""
        nonlocal stored
        begin, stored = stored, stored + embeds.shape[1]
        return decoding.run(model, cache, embeds, begin, stored, rows)[:, -streams:]

    if model.config.thinking == "pause":
        pauses = start.repeat(1, length + (hidden_start is None), 1)
        hidden = extend(torch.cat([pauses, end], dim=1))
        return torch.full((len(start), streams, length), PAUSE, device=start.device), hidden

    embed = model.base.get_input_embeddings()
    uniform = None
    if cache.thinking.temperature > 0:
        uniform = cache.draws(1 + streams * length)[:, 1:].unflatten(1, (streams, length))
        uniform = uniform if rows is None else uniform[rows]
    hidden = extend(start) if hidden_start is None else hidden_start
    chosen = []
    for step in range(length):
        number = None if uniform is None else uniform[..., step]
        token = _pick(head, hidden, decoding.banned, cache.thinking.temperature, number)
        chosen.append(token)
        following = embed(token)
        hidden = extend(following if step + 1 < length else torch.cat([following, end], dim=1))
    return torch.stack(chosen, dim=-1), hidden


def _pick(
    head: OutputHead, hidden: Tensor, banned: Tensor | None, temperature: float, uniform: Tensor | None
) -> Tensor:
    """Chooses a token of each stream, int64 [R, K], from hidden states [R, K, E]."""
    logits = head.logits(hidden)
    if banned is not None:
        logits.index_fill_(-1, banned, float("-inf"))
    if uniform is None:
        return logits.argmax(-1)
    probability = torch.softmax(logits.flatten(0, 1) / temperature, -1)
    return draw_from(probability, uniform.flatten()).view(hidden.shape[:2])


def _mix(model: ThinkingModel, head: OutputHead, hidden_base: Tensor, hidden_thought: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits [R, V] and mixing weights [R, K], from hidden states [R, E] and [R, K, E]."""
    hidden_base = hidden_base[:, None].expand_as(hidden_thought)
    weight = model.mixing_head(hidden_base, hidden_thought)
    logits = head.mixed_logits(hidden_base, hidden_thought, weight, model.config.interpolation)
    if logits.shape[1] == 1:
        return logits[:, 0], weight
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1]), weight


@dataclass(frozen=True)
class TextPass:
    """The attention of a pass over new tokens of the texts.

    Args:
        cache: Cache that the keys and values go to; the new tokens are already counted in its length.
        count: Number n of new tokens.
    """

    cache: ThinkingCache
    count: int
    _masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def position_ids(self, device: torch.device) -> Tensor:
        """Returns the positions of the tokens of this pass, int64 [B or 1, n]."""
        length, start = self.cache.text_length, self.cache.start
        positions = torch.arange(length - self.count, length, device=device)[None]
        return positions if start is None else (positions - start[:, None]).clamp_min(0)

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
        keys, values = self.cache.layer(int(module.layer_idx)).append(key, value)  # type: ignore[arg-type]  # of layers
        mask = self._mask(window, query.device)
        if softcap is not None:
            return softcapped_attention(query, keys, values, mask, scaling, softcap)
        if self.count == self.cache.text_length:
            attended: Tensor = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
            return attended
        spread = None if mask is None else mask.repeat(1, 1, query.shape[1] // keys.shape[1], 1)
        return _grouped(query, keys, values, spread, scaling)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """Returns the mask, bool [B or 1, 1, n, columns], or None where every token sees all before it."""
        length = self.cache.text_length
        if window is not None and window >= length:
            window = None
        if window not in self._masks:
            self._masks[window] = self._visible(window, device)
        return self._masks[window]

    def _visible(self, window: int | None, device: torch.device) -> Tensor | None:
        start, length = self.cache.start, self.cache.text_length
        if start is None and window is None and self.count in (1, length):
            return None
        column = torch.arange(length, device=device)[None]
        asking = column[:, length - self.count :].T  # [n, 1]: the columns of the tokens that ask
        visible = column <= asking
        if window is not None:
            visible = visible & (asking - column < window)
        visible = visible[None]
        if start is not None:
            visible = visible & (column >= start[:, None, None])
        return (visible | (column == asking))[:, None]  # padding sees itself: a softmax over nothing is NaN


class Decoding:
    """The passes over one token of each text and its thoughts: where they write, their positions, and what they see.

    A token's passes are over `[text token | K x START | K x first token of the thoughts | ... | K x END]`, M tokens.
    All tensors are made for a text of any length that ends within the columns that are read; `after` moves them on.

    Args:
        model: Thinking model that runs the passes.
        cache: Cache of the texts, which counts the token already.

    Attributes:
        streams: Number K of thoughts before each token.
        count: Number of columns that are read.
        start, end: Embeddings of START and END, [B, K, E].
        banned: Ids of the tokens that no thought may contain, int64; None: all are allowed.
    """

    start: Tensor
    end: Tensor

    def __init__(self, model: ThinkingModel, cache: ThinkingCache) -> None:
        self._length = length = cache.text_length
        self.streams = streams = cache.thinking.thoughts_per_token
        self._own = own = streams * (model.config.thought_length + 2)
        self.count = -(-(length + own) // BLOCK) * BLOCK
        cache.reserve(self.count)
        assert cache.finished is not None
        device = cache.finished.device
        column, stored = torch.arange(self.count, device=device), torch.arange(own, device=device)
        newest = column[length - 1 : length]  # the streams' tokens are stored behind it
        self._columns = torch.cat([newest, length + stored])
        self._positions = torch.cat([newest, length + stored // streams])[None]
        self._padding: Tensor | None = None
        if cache.start is not None:
            start = cache.start[:, None]
            self._positions, self._padding = self._positions - start, column < start
        # columns counted from the text's end: 0 and less for the text, 1 .. own for the streams
        self._behind = column - (length - 1)
        self._place = self._behind.clamp(0, own + 1)
        asking = torch.arange(-1, own, device=device)[:, None]
        seen = (stored <= asking) & ((asking - stored) % streams == 0)
        self._seen = nn.functional.pad(seen, (1, 1))  # [M, own + 2]
        self._seen[:, 0] = True
        self._masks: dict[tuple[int | None, torch.dtype], StepMasks] = {}
        self._parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.banned = torch.tensor(model.banned, device=device) if model.banned else None

    @classmethod
    def after(cls, model: ThinkingModel, cache: ThinkingCache) -> Decoding:
        """Returns the passes over the token that the cache has read last."""
        decoding: Decoding | None = cache.decoding
        if decoding is not None and decoding._fits(model, cache):
            decoding._move_on()
        else:
            with torch.inference_mode(False), torch.no_grad():  # so that it can move on outside of inference mode
                decoding = cache.decoding = cls(model, cache)
        shape = (cache.batch, decoding.streams, -1)
        decoding.start, decoding.end = (vector.expand(shape) for vector in model.thought_vectors())
        return decoding

    def _fits(self, model: ThinkingModel, cache: ThinkingCache) -> bool:
        own = cache.thinking.thoughts_per_token * (model.config.thought_length + 2)
        length = cache.text_length
        return own == self._own and length == self._length + 1 and length + own <= self.count

    def _move_on(self) -> None:
        self._length += 1
        self._columns.add_(1)
        self._positions.add_(1)
        self._behind.sub_(1)
        torch.clamp(self._behind, 0, self._own + 1, out=self._place)
        for masks in self._masks.values():
            masks.fill()

    def run(
        self,
        model: ThinkingModel,
        cache: ThinkingCache,
        embeds: Tensor,
        begin: int,
        end: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Runs the tokens begin .. end-1 of the M; returns hidden states, [R, end - begin, E].

        Args:
            model: Thinking model that runs them.
            cache: Cache of the texts.
            embeds: Embeddings of the tokens, [R, end - begin, E].
            begin, end: First of the tokens, and the one behind the last.
            rows: Rows that take part, int64 [R]; None: all.
        """
        if (begin, end) not in self._parts:
            with torch.inference_mode(False):
                self._parts[begin, end] = self._columns[begin:end], self._positions[:, begin:end]
        columns, positions = self._parts[begin, end]
        if rows is not None and self._padding is not None:
            positions = positions[rows]
        last = self._length + (end - 2) // self.streams - cache.least_padding
        return model.run_decoder(embeds, positions, StepPass(self, cache, begin, end, columns, rows), last)

    def clear(self, cache: ThinkingCache) -> None:
        """Clears the keys and values of this token's thoughts, so that numbers that are none end with their thought."""
        for index in range(len(cache.layers)):
            cache.layer(index).clear(self._columns[1:])

    def mask(self, window: int | None, dtype: torch.dtype, begin: int, end: int, group: int) -> Tensor:
        """Returns what the tokens begin .. end-1 see: 0, and -inf elsewhere, [B or 1, 1, group * n or 1, columns].

        Args:
            window: Number of last tokens of the text that are seen; None: all.
            dtype: Dtype of the mask.
            begin, end: First of the tokens, and the one behind the last.
            group: How often the tokens are repeated, as a group's heads are more queries.
        """
        if window is not None and window >= self.count:
            window = None
        masks = self._masks.get((window, dtype))
        if masks is None:
            masks = self._masks[window, dtype] = StepMasks(self._seen, self._behind, self._place, self._padding, window)
        return masks.of(begin, end, 1 if end - begin == 1 else group, dtype)


class StepMasks:
    """The masks of all passes of a token in one tensor, for layers with the same window.

    Args:
        seen: Whether the M tokens see the text, each of the streams' tokens, and what is behind, bool [M, own + 2].
        behind: Columns counted from the text's end, int64 [columns]; they change from token to token.
        place: What each column is, an index of `seen`'s columns, int64 [columns]; changes too.
        padding: Columns of each row that are padding, bool [B, columns]; None: none.
        window: Number of last tokens of the text that are seen; None: all.
    """

    def __init__(self, seen: Tensor, behind: Tensor, place: Tensor, padding: Tensor | None, window: int | None) -> None:
        self._seen, self._behind, self._place, self._padding, self._window = seen, behind, place, padding, window
        self._tables: dict[tuple[int, int, int], Tensor] = {}
        self._shown: dict[tuple[int, int, int], Tensor] = {}
        self._table: Tensor | None = None
        self._mask: Tensor | None = None

    def of(self, begin: int, end: int, group: int, dtype: torch.dtype) -> Tensor:
        """Returns the mask of one pass; see `Decoding.mask`."""
        key = (begin, end, group)
        if key not in self._shown:
            with torch.inference_mode(False):
                self._add(key, dtype)
        return self._shown[key]

    def _add(self, key: tuple[int, int, int], dtype: torch.dtype) -> None:
        begin, end, group = key
        table = torch.zeros((), dtype=dtype, device=self._seen.device).where(self._seen[begin:end], float("-inf"))
        self._tables[key] = table.repeat(group, 1)
        self._table = torch.cat(list(self._tables.values()))
        texts = 1 if self._padding is None else len(self._padding)
        self._mask = self._table.new_empty(texts, 1, len(self._table), len(self._place))
        sizes = [len(table) for table in self._tables.values()]
        self._shown = dict(zip(self._tables, self._mask.split(sizes, dim=2), strict=True))
        self.fill()

    def fill(self) -> None:
        """Computes the masks anew, in the same memory, after `behind` and `place` have changed."""
        if self._table is None or self._mask is None:
            return
        if self._padding is None and self._window is None:
            torch.index_select(self._table, 1, self._place, out=self._mask[0, 0])
            return
        mask = self._table.index_select(1, self._place)[None, None]
        hidden = self._padding
        if self._window is not None:
            far = self._behind <= -self._window
            hidden = far if hidden is None else hidden | far
        assert hidden is not None
        hidden = hidden.view(-1, 1, 1, hidden.shape[-1])
        torch.where(hidden, torch.full_like(mask[..., :1, :1], float("-inf")), mask, out=self._mask)


@dataclass
class StepPass:
    """The attention of one pass over some of a token's M tokens; see `Decoding`.

    Args:
        decoding: Passes that this is one of.
        cache: Cache that the keys and values go to.
        begin, end: First of the tokens, and the one behind the last.
        columns: Columns of the memory that they are written to, int64 [n].
        rows: Rows of the batch that take part, int64 [R]; None: all.
    """

    decoding: Decoding
    cache: ThinkingCache
    begin: int
    end: int
    columns: Tensor
    rows: Tensor | None

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
        """Runs one layer's attention, [R, N, H, D]; see `quietstar_attention` for the arguments."""
        layer = self.cache.layer(int(module.layer_idx))  # type: ignore[arg-type]  # an attribute of attention layers
        layer.write(self.columns, key, value, self.rows)
        keys, values = layer.first(self.decoding.count)
        if self.rows is not None:
            # rows that do not think get queries of zeros: cheaper than gathering the texts of the others
            everyone = query.new_zeros(self.cache.batch, *query.shape[1:])
            everyone[self.rows] = query
            query = everyone
        group = query.shape[1] // keys.shape[1] if softcap is None else 1
        mask = self.decoding.mask(window, query.dtype, self.begin, self.end, group)
        if softcap is None:
            attended = _grouped(query, keys, values, mask, scaling)
        else:
            attended = softcapped_attention(query, keys, values, mask, scaling, softcap)
        return attended if self.rows is None else attended[self.rows]


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Computes attention of few tokens to many; a group's heads become more queries, so their keys are not repeated.

    Args:
        query: Queries, [B, H, N, D].
        key, value: Stored keys and values, [B, Hkv, columns, D].
        mask: Mask of the visible columns, [B or 1, 1, H / Hkv * N or 1, columns]; None: all.
        scaling: Factor of the scores; None: 1 / sqrt(D).

    Returns:
        Attended values, [B, N, H, D].
    """
    batch, heads, count, size = query.shape
    asked = query.reshape(batch, key.shape[1], -1, size)
    attended = scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, heads, count, -1).transpose(1, 2)
