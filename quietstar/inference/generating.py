"""What `model.generate` adds to transformers' own: checks, a cache, and draws that do not depend on the batch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from quietstar.errors import ConfigError, DataError
from quietstar.inference.draw import draw
from quietstar.inference.record import ThinkingRecord
from quietstar.inference.thinking_cache import Thinking, ThinkingCache
from quietstar.inference.when import NO_GATE, parse_think
from quietstar.model.upstream import GenerateDecoderOnlyOutput, SuppressTokensLogitsProcessor

if TYPE_CHECKING:
    from quietstar.model.modeling import QuietStarForCausalLM

UNSUPPORTED = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_ids",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
)
"""Arguments of `generate` that go around the text's cache, or ask for what its passes do not keep."""


@dataclass
class ThinkingOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `generate`, and what was thought.

    Args:
        thinking: Counts, and the thoughts where they were asked for.
    """

    thinking: ThinkingRecord | None = None


def plan_thinking(
    model: QuietStarForCausalLM,
    think: str,
    thoughts_per_token: int,
    thought_temperature: float | None,
    seed: int | Sequence[int] | None,
    output_thoughts: bool,
) -> Thinking:
    """Check the arguments of `generate` that are about thoughts.

    Raises:
        ConfigError: One is out of range, or they contradict each other.
    """
    when = parse_think(think, model.config.thinking_threshold)
    if when.rule == "learned" and model.thinking_gate is None:
        raise ConfigError(NO_GATE.format(think=think))
    if isinstance(thoughts_per_token, bool) or not isinstance(thoughts_per_token, int) or thoughts_per_token < 1:
        raise ConfigError(f"thoughts_per_token: got {thoughts_per_token!r}, needs a whole number of at least 1")
    temperature = thought_temperature
    if temperature is None:
        temperature = 0.0 if thoughts_per_token == 1 else model.config.temperature
    if isinstance(temperature, str) or not 0 <= temperature < float("inf"):
        raise ConfigError(f"thought_temperature: got {temperature!r}, needs 0 (greedy) or more")
    if thoughts_per_token > 1 and (temperature == 0 or model.config.thinking == "pause"):
        name = "thinking: pauses" if temperature else "thought_temperature: got 0"
        raise ConfigError(
            f"{name} with {thoughts_per_token} thoughts per token, which would all be the same one; needs "
            f"{'thoughts_per_token 1' if temperature else 'a value above 0'}"
        )
    if seed is None:  # thoughts then follow torch.manual_seed, as transformers' draws do
        seeds: tuple[int, ...] = (int(torch.randint(1 << 62, ())) if temperature > 0 else 0,)
    else:
        given: Iterable[Any] = seed if isinstance(seed, (list, tuple, range)) else (seed,)
        try:
            seeds = tuple(operator.index(one) for one in given)
        except TypeError:
            seeds = ()
        if not seeds or any(isinstance(one, bool) for one in given):
            raise ConfigError(f"seed: got {seed!r}, needs a whole number, one for each prompt, or None")
    return Thinking(
        when,
        thoughts_per_token,
        float(temperature),
        seeds,
        draw_text=seed is not None,
        keep_thoughts=output_thoughts,
    )


def check_prompt(
    model: QuietStarForCausalLM, thinking: Thinking, input_ids: Tensor | None, attention_mask: Tensor | None
) -> None:
    """Refuse prompts that are empty or hold a token that only thoughts may use.

    Raises:
        ConfigError: The number of seeds is not that of prompts.
        DataError: Naming row and position.
    """
    prompts = 1 if input_ids is None else len(input_ids)
    if len(thinking.seeds) not in (1, prompts):
        raise ConfigError(f"seed: got {len(thinking.seeds)} seeds for {prompts} prompts; needs one for each")
    if input_ids is None:
        if model.generation_config is None or model.generation_config.bos_token_id is None:
            raise DataError("input_ids: missing, and the model has no beginning-of-sequence token to start from")
        return
    if input_ids.ndim != 2:
        raise DataError(f"input_ids: got shape {list(input_ids.shape)}, needs [batch, length]")
    if input_ids.numel() == 0:
        raise DataError(
            f"input_ids: got shape {list(input_ids.shape)}, an empty prompt; needs a token at least, for example the "
            f"beginning-of-sequence token ({model.config.bos_token_id})"
        )
    text = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise DataError(
                f"attention_mask: got shape {list(attention_mask.shape)}, needs that of input_ids, "
                f"{list(input_ids.shape)}"
            )
        text = attention_mask.bool()
        if bool((attention_mask != text).any()):
            raise DataError("attention_mask: has other values than 0 and 1; a text that is continued is one document")
    empty = (~text.any(1)).nonzero()
    if len(empty):
        raise DataError(f"attention_mask: masks every token of row {int(empty[0])}; needs a token at least")
    if model.banned:
        banned = torch.tensor(model.banned, device=input_ids.device)
        found = (torch.isin(input_ids, banned) & text).nonzero()
        if len(found):
            row, position = found[0].tolist()
            raise DataError(
                f"input_ids: row {row} has token {int(input_ids[row, position])} at position {position}, which is kept "
                "for thoughts (banned_token_ids); take it out of the prompt"
            )


def finish_processors(
    model: QuietStarForCausalLM,
    cache: ThinkingCache,
    config: GenerationConfig,
    prompt_length: int,
    processors: LogitsProcessorList,
    device: torch.device | str,
) -> LogitsProcessorList:
    """Check the settled options of a call, and put the last processors behind transformers' own.

    Raises:
        ConfigError: A way of decoding that does not go token by token.
        DataError: The text would outgrow the base's context.
    """
    options: Any = config
    if (options.num_beams or 1) > 1:
        raise ConfigError(
            f"num_beams: got {options.num_beams}, from the call or generation_config; a thinking model samples or "
            "decodes greedily, needs num_beams=1"
        )
    if options.guidance_scale not in (None, 1):
        raise ConfigError(f"guidance_scale: got {options.guidance_scale}; not supported with thoughts")
    if options.prefill_chunk_size is not None:
        raise ConfigError("prefill_chunk_size: not supported with thoughts; leave it out")
    if options.prompt_lookup_num_tokens is not None:
        raise ConfigError("prompt_lookup_num_tokens: not supported with thoughts; leave it out")
    _check_context(model, cache.thinking, prompt_length, int(options.max_length))
    if model.banned:
        processors.append(SuppressTokensLogitsProcessor(list(model.banned), device=str(device)))
    if options.do_sample and cache.thinking.draw_text:
        scores = cache.thinking.scores if options.output_scores else None
        processors.append(OwnStreams(cache, scores))
    return processors


class OwnStreams(LogitsProcessor):
    """Draws each row's token from the row's own random stream: the only one that keeps a score.

    Args:
        cache: Knows the streams and which token is next.
        scores: Takes the scores that were drawn from, [B, V] for each token; None: they are not kept.
    """

    def __init__(self, cache: ThinkingCache, scores: list[Tensor] | None) -> None:
        self._cache = cache
        self._scores = scores

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V]: 0 for the drawn token, minus infinity for all others."""
        if self._scores is not None:
            self._scores.append(scores)
        uniform = self._cache.draws(1)[:, 0].to(scores.device)
        token, _ = draw(scores, uniform, temperature=1.0)
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, token[:, None], 0.0)  # type: ignore[return-value]  # a Tensor of transformers' kind


class RowEnds(StoppingCriteriaList):
    """Stopping criteria that also tell the cache which rows have ended, so that nothing is thought there any more.

    Args:
        criteria: The criteria.
        cache: Of the call.
    """

    def __init__(self, criteria: Iterable[Any], cache: ThinkingCache) -> None:
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> Any:
        """Which rows are at their end, bool [B]."""
        ended = super().__call__(input_ids, scores, **options)
        self.cache.end(ended)
        return ended


def count_new(sequences: Tensor, prompt_length: int, ending: int | Sequence[int] | None) -> int:
    """New tokens of all rows, [B, L + new], each up to its first end."""
    new = sequences[:, prompt_length:]
    if ending is None:
        return new.numel()
    ends = torch.isin(new, torch.as_tensor(ending, device=new.device))
    return int((ends.cumsum(1) - ends.int() == 0).sum())


def _check_context(model: QuietStarForCausalLM, thinking: Thinking, prompt_length: int, max_length: int) -> None:
    limit = getattr(model.base.config, "max_position_embeddings", None)
    thought = 0 if thinking.when.rule == "never" else model.config.thought_length + 1
    if limit is None or max_length + thought <= limit:
        return
    room = limit - thought - prompt_length
    advice = f"lower max_new_tokens to at most {room}" if room > 0 else "shorten the prompt"
    behind = f", with the {thought} positions of a thought behind the last," if thought else ""
    raise DataError(
        f"input_ids: the prompt has {prompt_length} tokens and would grow to {max_length}, which{behind} is more than "
        f"the {limit} of the base's context; {advice}"
    )
