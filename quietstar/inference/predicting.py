"""The next token's prediction after a thought (sections 4.2 and 4.3 of the paper), from the text's keys and values.

START goes through the model together with the text's newest token where it is known beforehand that the token is
thought about, and END together with the last token of the thought: T + 1 passes for a token, T the thought's length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.inference.cached_pass import CachedTokens
from quietstar.inference.draw import draw
from quietstar.inference.record import TokenThoughts
from quietstar.inference.thinking_cache import ThinkingCache
from quietstar.model.passes import PAUSE

if TYPE_CHECKING:
    from quietstar.model.modeling import QuietStarForCausalLM


@torch.no_grad()
def predict_next(model: QuietStarForCausalLM, tokens: Tensor, cache: ThinkingCache) -> Tensor:
    """Reads new tokens and predicts the next one, with thoughts where `cache.thinking` asks for them.

    Args:
        model: The thinking model.
        tokens: int64 [B, n], what follows the tokens that the cache holds.
        cache: Holds these too afterwards, and no thought.

    Returns:
        float32 [B, V] logits: after thoughts the mixture, for several thoughts the log of their mean probabilities.
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
    model: QuietStarForCausalLM, cache: ThinkingCache, rows: Tensor, hidden_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Thoughts at the end of some rows.

    Args:
        rows: int64 [R].
        hidden_start: [R, K, E] where START has been through the model.

    Returns:
        Tokens, int64 [R, K, T], and hidden states after END, [R, K, E].
    """
    length, streams = model.config.thought_length, cache.thinking.thoughts_per_token
    start, end = (vector.expand(len(rows), 1, streams, -1) for vector in model.thought_vectors())
    stored = 0 if hidden_start is None else 1

    def extend(embeds: Tensor) -> Tensor:
        """Puts [R, s, K, E] behind the streams; the hidden states [R, K, E] of the last of them."""
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


def _pick(model: QuietStarForCausalLM, hidden: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """A token of each stream, int64 [R, K], from its hidden states [R, K, E]."""
    logits = model.head.logits(hidden)
    if model.banned:
        logits[..., list(model.banned)] = float("-inf")
    if uniform is None:
        return logits.argmax(-1)
    token, _ = draw(logits.flatten(0, 1), uniform.flatten(), temperature=temperature)
    return token.view(hidden.shape[:2])


def _mix(model: QuietStarForCausalLM, hidden_base: Tensor, hidden_thought: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, V] and mixing weights [R, K], from hidden states [R, E] and [R, K, E]."""
    hidden_base = hidden_base[:, None].expand_as(hidden_thought)
    weight = model.mixing_head(hidden_base, hidden_thought)
    logits = model.head.mixed_logits(hidden_base, hidden_thought, weight, model.config.interpolation)
    if logits.shape[1] == 1:
        return logits[:, 0], weight
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1]), weight
