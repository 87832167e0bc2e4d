"""Forward passes over a text and the thought streams that start from it.

The stream of anchor i is `START, t_1 .. t_T, END, x_{i+1} .. x_{i+lookahead-1}`; its token at index s has the rotary
position i + 1 + s. The stream sees the text up to i and its own earlier tokens, nothing else. Where a text holds
several documents, only the tokens of the anchor's document are counted, seen and followed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.model.attention import StreamCache, ThoughtPass
from quietstar.model.layers import Interceptor, LayerRecord, intercept_layers
from quietstar.model.padding import Padding
from quietstar.model.thinking_model import ThinkingModel

PAUSE = -1
"""Token id that stands for a repeated START in place of a thought token (`thinking="pause"`)."""


@dataclass(frozen=True)
class TalkStates:
    """Hidden states of a text and its streams after the final norm.

    Args:
        text: Hidden states of the text, [B, L, E].
        stream: Hidden states of the streams, [B, P, S, E].
    """

    text: Tensor
    stream: Tensor


def stream_position_ids(padding: Padding, anchor: Tensor, offset: int, length: int) -> Tensor:
    """Return the positions of stream tokens offset .. offset+length-1, int64 [B, P, length]."""
    first = padding.position_ids.gather(1, anchor.long()) + 1 + offset
    return first[..., None] + torch.arange(length, device=anchor.device)


def lookahead_tokens(input_ids: Tensor, padding: Padding, anchor: Tensor, lookahead: int) -> Tensor:
    """Return the true tokens x_{i+1} .. x_{i+lookahead-1} after each anchor i, int64 [B, P, lookahead-1].

    After the end of a document its last token is repeated; nothing is ever predicted from there.
    """
    offsets = torch.arange(1, lookahead, device=input_ids.device)
    index = torch.minimum(anchor.long()[..., None] + offsets, padding.last_at(anchor)[..., None])
    return input_ids.gather(1, index.flatten(1)).view(index.shape)


def embed_stream(model: ThinkingModel, tokens: Tensor, following: Tensor | None) -> Tensor:
    """Embed START, the thought tokens and, unless `following` is None, END and the tokens after it.

    Args:
        model: Thinking model with the embeddings.
        tokens: Token ids of the thoughts, int64 [B, P, T]; `PAUSE` stands for START.
        following: True tokens after END, int64 [B, P, lookahead-1].

    Returns:
        Embeddings, [B, P, 1 + T, E] without `following`, else [B, P, S, E].
    """
    start, end = model.thought_vectors()
    shape = (*tokens.shape[:2], 1, start.shape[-1])
    embed = model.base.get_input_embeddings()
    if model.config.thinking == "pause":
        inner = torch.where((tokens == PAUSE)[..., None], start, embed(tokens.clamp_min(0)))
    else:
        inner = embed(tokens)
    parts = [start.expand(shape), inner]
    if following is not None:
        parts += [end.expand(shape), embed(following)]
    return torch.cat(parts, dim=2)


def talk_pass(
    model: ThinkingModel,
    input_ids: Tensor,
    padding: Padding,
    tokens: Tensor,
    anchor: Tensor,
    record: LayerRecord | None,
) -> TalkStates:
    """Run text and whole streams in one differentiable pass (step 2 of a training step).

    Args:
        model: Thinking model that runs the pass.
        input_ids: Token ids of the texts, int64 [B, L].
        padding: Padding of the batch.
        tokens: Token ids of the thoughts, int64 [B, P, T].
        anchor: Text position that each stream starts from, int32 [B, P].
        record: Recorded outputs of the layers, which are then recomputed in the backward pass only; None runs them.
    """
    length = input_ids.shape[1]
    streams, stream_length = anchor.shape[1], model.config.stream_length
    following = lookahead_tokens(input_ids, padding, anchor, model.config.lookahead)
    stream_embeds = embed_stream(model, tokens, following)
    embeds = torch.cat([model.base.get_input_embeddings()(input_ids), stream_embeds.flatten(1, 2)], dim=1)
    positions = torch.cat(
        [padding.position_ids, stream_position_ids(padding, anchor, 0, stream_length).flatten(1)], dim=1
    )
    thought_pass = ThoughtPass(
        length,
        stream_length,
        anchor,
        padding.start,
        model.config.backend,
        stream_start=padding.start_at(anchor),
        results=record.attention if record else None,
    )
    with intercept_layers(model.decoder, record.replay) if record else nullcontext():
        hidden = model.run_decoder(embeds, positions, thought_pass)
    return TalkStates(hidden[:, :length], hidden[:, length:].unflatten(1, (streams, stream_length)))


class CachedPass:
    """The keys and values of a text, and streams that grow from it piece by piece, without gradient.

    Args:
        model: Thinking model that runs the passes.
        input_ids: Token ids of the texts, int64 [B, L].
        padding: Padding of the same batch.
        record: Empty record to fill for `talk_pass`; None records nothing.

    Attributes:
        text_hidden: Hidden states of the text after the final norm, [B, L, E].
    """

    def __init__(
        self, model: ThinkingModel, input_ids: Tensor, padding: Padding, record: LayerRecord | None = None
    ) -> None:
        self._model = model
        self._padding = padding
        self._cache = StreamCache(stream_capacity=model.config.stream_length)
        self._length = 0
        self.record = record
        self._anchor = torch.zeros(input_ids.shape[0], 0, dtype=torch.int32, device=input_ids.device)
        self._stream_start: Tensor | None = None
        embeds = model.base.get_input_embeddings()(input_ids)
        self.text_hidden = self._run(
            embeds, padding.position_ids, input_ids.shape[1], 0, self.record.write_text if self.record else None
        )

    def open_streams(self, anchor: Tensor) -> None:
        """Open empty streams that start from the text positions `anchor`, int32 [B, P]."""
        self._anchor = anchor
        self._stream_start = self._padding.start_at(anchor)
        if self.record:
            self.record.open_streams(anchor.shape[1], self._model.config.stream_length)

    def extend(self, embeds: Tensor) -> Tensor:
        """Append [B, P, s, E] embeddings to every stream; return their hidden states [B, P, s, E]."""
        streams, added = embeds.shape[1:3]
        positions = stream_position_ids(self._padding, self._anchor, self._length, added).flatten(1)
        write = self.record.write_streams(self._length) if self.record else None
        hidden = self._run(embeds.flatten(1, 2), positions, 0, added, write)
        self._length += added
        return hidden.view(hidden.shape[0], streams, added, -1)

    def _run(
        self, embeds: Tensor, positions: Tensor, text_length: int, stream_length: int, write: Interceptor | None
    ) -> Tensor:
        thought_pass = ThoughtPass(
            text_length,
            stream_length,
            self._anchor,
            self._padding.start,
            self._model.config.backend,
            stream_start=self._stream_start,
            stream_offset=self._length,
            cache=self._cache,
            results=self.record.attention if self.record else None,
        )
        with torch.no_grad(), intercept_layers(self._model.decoder, write) if write else nullcontext():
            return self._model.run_decoder(embeds, positions, thought_pass)
