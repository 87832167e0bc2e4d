"""`generate` of a thinking model: transformers' method with checks, a cache and draws that do not depend on the batch.

`ThinkingGeneration.generate` is read first; the functions after it check arguments and finish transformers' processors.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from quietstar.config.options import GENERATION, SAMPLING, TemperatureOr0, ThoughtsPerToken, check_number
from quietstar.errors import ConfigError, DataError
from quietstar.model.cache import Thinking, ThinkingCache, ThinkingRecord
from quietstar.model.draw import draw_from
from quietstar.model.padding import check_ids, check_mask
from quietstar.model.think_rule import NO_GATE, parse_think
from quietstar.model.thinking_model import ThinkingModel
from quietstar.model.upstream import CACHE, GenerateDecoderOnlyOutput, SuppressTokensLogitsProcessor

UNSUPPORTED = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "token_type_ids",
)
"""Arguments of `generate` that bypass the text's cache, or ask for what the passes over it do not keep."""
ARGUMENTS = {"input_ids", "attention_mask", *inspect.signature(GenerationMixin.generate).parameters} - {
    "self",
    "kwargs",
}
"""Arguments of transformers' `generate`, to which the fields of its generation configuration are added."""


class ThinkingGeneration(GenerationMixin):
    """The part of `QuietStarForCausalLM` that generates."""

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        think: str = "always",
        thoughts_per_token: int = 1,
        thought_temperature: float | None = None,
        seed: int | Sequence[int] | None = None,
        output_thoughts: bool = False,
        **options: Any,
    ) -> Any:
        """Continue texts, with a thought before each new token; transformers' `generate` with a few more options.

        A thought is made from the text's keys and values, the mixed prediction after it gives the token, and the keys
        and values of the thought are dropped. The text is never run twice, and neither START nor END can be generated.

        Args:
            inputs: Token ids of the prompts, int64 [B, L], which `input_ids` may give too; several prompts are padded
                on the left, with an `attention_mask`.
            generation_config: Generation configuration of transformers; None takes the model's.
            think: Rule for the tokens that are thought about: `"always"`; `"never"` (the base's own `generate`);
                `"entropy>x"`, where the base prediction has an entropy above x nats; `"every:n"`, every n-th new token;
                `"learned"` or `"learned>x"`, where the model's gate predicts a gain above its threshold, or x nats.
            thoughts_per_token: Number K of thoughts before each token; the mean of their predictions is taken.
            thought_temperature: Sampling temperature of thoughts; 0 takes the most probable tokens. None is 0 for one
                thought, as in the paper's evaluation, and the temperature of the configuration for several.
            seed: Seed of the thoughts, and with `do_sample` of the text; one, or one for each prompt. Each row has its
                own random stream, made from the seed, the prompt, and the row's number among equal prompts, so that a
                text does not depend on the rest of the batch, except for the rounding of matrix products, which in
                bfloat16 does. None lets transformers draw the text from PyTorch's global generator.
            output_thoughts: Whether to keep the thoughts of every token; needs `return_dict_in_generate=True`.
            options: Other arguments of transformers: `max_new_tokens`, `do_sample`, `num_return_sequences`, `streamer`,
                `stopping_criteria`, ... With the `cache` of an earlier call's output (`past_key_values` before
                transformers 5.24; both names are accepted) and the whole text as `inputs`, the part of the text that
                the cache holds is not read again.

        Returns:
            Token ids, int64 [B, L + new]; with `return_dict_in_generate=True` a `ThinkingOutput`, whose `thinking` has
            the share of tokens that were thought about, the time, and the thoughts.

        Raises:
            ConfigError: An option is unknown, out of range, or bypasses the text's cache (beams, assistants).
            DataError: A prompt is empty, padded on the right, too long for the base's context, or holds a token that
                is reserved for thoughts.
        """
        if inputs is not None and options.get("input_ids") is not None:
            raise ConfigError("input_ids: got inputs too, another name for it; give one of them")
        thinking = plan_thinking(self, think, thoughts_per_token, thought_temperature, seed, output_thoughts)
        check_prompt(
            self, thinking, options.get("input_ids") if inputs is None else inputs, options.get("attention_mask")
        )
        settled = self.generation_config if generation_config is None else generation_config
        check_options(options, settled)
        if output_thoughts and not options.get("return_dict_in_generate", settled.return_dict_in_generate):
            raise ConfigError("output_thoughts: got True without return_dict_in_generate=True, which returns them")
        self._prepare()
        past = one_cache(options.pop("past_key_values", None), options.pop("cache", None))
        own_draws = seed is not None and options.get("do_sample", settled.do_sample)
        if thinking.when.rule == "never" and past is None and not own_draws:
            return self._generate_without_thoughts(inputs, generation_config, thinking.record, options)
        for name in UNSUPPORTED:
            given = (options.get(name), getattr(generation_config, name, None))
            if any(value is not None and value is not False for value in given):
                raise ConfigError(f"{name}: not supported with thoughts; leave it out, or use model.base.generate")
        if options.pop("use_cache", True) is False:
            raise ConfigError("use_cache: got False; thoughts are made from the text's keys and values, needs True")
        self.generation_config.cache_implementation = None  # the base may have brought one
        if past is None:
            past = ThinkingCache(thinking)
        else:
            thinking_cache(past).begin(thinking)
        ends = RowEnds(options.pop("stopping_criteria", None) or [], past)
        before = time.perf_counter()
        output = super().generate(inputs, generation_config, stopping_criteria=ends, **options, **{CACHE: past})
        thinking.record.seconds = time.perf_counter() - before
        if isinstance(output, Tensor):
            return output
        fields = {**output, "scores": tuple(thinking.scores)} if thinking.scores else output
        return ThinkingOutput(**fields, thinking=thinking.record)

    def _generate_without_thoughts(
        self: Any,
        inputs: Tensor | None,
        generation_config: GenerationConfig | None,
        record: ThinkingRecord,
        options: dict[str, Any],
    ) -> Any:
        """Run the base's own `generate`, with the options that a user has set on this model's `generation_config`."""
        given = generation_config or GenerationConfig()
        ours, theirs = self.generation_config.to_dict(), self.base.generation_config.to_dict()
        for name, value in ours.items():
            if value != theirs.get(name) and getattr(given, name, None) is None:
                options.setdefault(name, value)
        if self.banned:
            kept = SuppressTokensLogitsProcessor(list(self.banned), device=str(self.device))
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or []), kept])
        before = time.perf_counter()
        output = self.base.generate(inputs, generation_config, **options)
        record.seconds = time.perf_counter() - before
        if type(output) is not GenerateDecoderOnlyOutput:
            return output
        prompt = options.get("input_ids") if inputs is None else inputs
        ending = given.eos_token_id if given.eos_token_id is not None else self.generation_config.eos_token_id
        ending = options.get("eos_token_id", ending)
        record.predictions = count_new(output.sequences, 1 if prompt is None else prompt.shape[1], ending)
        return ThinkingOutput(**output, thinking=record)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the model's inputs for the next token: the tokens that the cache does not hold yet, and the cache."""
        past = thinking_cache(one_cache(past_key_values, cache))
        if not past.is_open:
            past.open(input_ids, attention_mask)
        return {"input_ids": input_ids[:, past.get_seq_length() :], CACHE: past}

    def _get_logits_processor(  # transformers knows the settled options only here
        self: Any, generation_config: GenerationConfig, *arguments: Any, **options: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(  # type: ignore[misc]  # transformers' type of self
            generation_config, *arguments, **options
        )
        cache = thinking_cache((options.get("model_kwargs") or {}).get(CACHE))
        prompt_length, device = int(options["input_ids_seq_length"]), options.get("device") or self.device
        return finish_processors(self, cache, generation_config, prompt_length, processors, device)

    def _get_stopping_criteria(  # its result as a whole says which rows have ended
        self: Any, generation_config: GenerationConfig, stopping_criteria: Any, tokenizer: Any = None, **options: Any
    ) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(  # type: ignore[misc]  # transformers' type of self
            generation_config, stopping_criteria, tokenizer=tokenizer, **options
        )
        cache = getattr(stopping_criteria, "cache", None)
        return criteria if cache is None else type(stopping_criteria)(criteria, cache)


def check_options(options: dict[str, Any], settled: GenerationConfig) -> None:
    """Refuse arguments that `generate` does not know, and numbers that are out of range.

    Args:
        options: Keyword arguments of the call; numbers become those of Python, and 2 becomes 2.0 where transformers
            takes nothing but floats.
        settled: Generation configuration, whose value holds where the call gives none.

    Raises:
        ConfigError: The message names the argument.
    """
    known = ARGUMENTS | {*UNSUPPORTED, "cache", "past_key_values", *GenerationConfig().to_dict()}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            advice = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"{name}: not an argument of generate{advice}; leave it out")
    values = {**settled.to_dict(), **options}
    for name, hint in {**GENERATION, **(SAMPLING if values.get("do_sample") else {})}.items():
        if values.get(name) is not None:
            advice = "; do_sample=False takes the most probable token" if name == "temperature" else ""
            number = check_number(name, values[name], hint, advice)
            if name in options:
                options[name] = number


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given under either of transformers' two names, or None.

    Raises:
        ConfigError: Both were given.
    """
    if past_key_values is not None and cache is not None:
        raise ConfigError("cache: got past_key_values too, transformers' older name for it; give one of them")
    return past_key_values if cache is None else cache


def thinking_cache(cache: Any) -> ThinkingCache:
    """Return `cache` as a `ThinkingCache`.

    Raises:
        ConfigError: It is another kind of cache.
    """
    if not isinstance(cache, ThinkingCache):
        raise ConfigError(
            f"{CACHE}: got a {type(cache).__name__}, needs the ThinkingCache of an earlier call of "
            "generate (return_dict_in_generate=True gives it)"
        )
    return cache


@dataclass
class ThinkingOutput(GenerateDecoderOnlyOutput):
    """The output of transformers' `generate`, with a record of the thinking.

    Args:
        thinking: Counts and time of the call, and the thoughts where they were asked for.
    """

    thinking: ThinkingRecord | None = None


def plan_thinking(
    model: ThinkingModel,
    think: str,
    thoughts_per_token: int,
    thought_temperature: float | None,
    seed: int | Sequence[int] | None,
    output_thoughts: bool,
) -> Thinking:
    """Check the arguments of `generate` that concern thoughts, and gather them.

    Raises:
        ConfigError: One is out of range, or they contradict each other.
    """
    when = parse_think(think, model.config.thinking_threshold)
    if when.rule == "learned" and model.thinking_gate is None:
        raise ConfigError(NO_GATE.format(think=think))
    thoughts_per_token = check_number("thoughts_per_token", thoughts_per_token, ThoughtsPerToken)
    temperature = thought_temperature
    if temperature is None:
        temperature = 0.0 if thoughts_per_token == 1 else model.config.temperature
    temperature = check_number("thought_temperature", temperature, TemperatureOr0)
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
        temperature,
        seeds,
        draw_text=seed is not None,
        keep_thoughts=output_thoughts,
    )


def check_prompt(
    model: ThinkingModel, thinking: Thinking, input_ids: Tensor | None, attention_mask: Tensor | None
) -> None:
    """Refuse prompts that are empty or hold a token that only thoughts may use.

    Raises:
        ConfigError: There are neither one seed nor as many as prompts.
        DataError: A prompt cannot be continued; the message names the row and the position.
    """
    prompts = 1 if input_ids is None else len(input_ids)
    if len(thinking.seeds) not in (1, prompts):
        raise ConfigError(f"seed: got {len(thinking.seeds)} seeds for {prompts} prompts; needs one for each")
    if input_ids is None:
        if model.generation_config is None or model.generation_config.bos_token_id is None:
            raise DataError("input_ids: missing, and the model has no beginning-of-sequence token to start from")
        return
    check_ids("input_ids", input_ids, model.embedding)
    if input_ids.ndim != 2:
        raise DataError(f"input_ids: got shape {list(input_ids.shape)}, needs [batch, length]")
    if input_ids.numel() == 0:
        raise DataError(
            f"input_ids: got shape {list(input_ids.shape)}, an empty prompt; needs a token at least, for example the "
            f"beginning-of-sequence token ({model.config.bos_token_id})"
        )
    text = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        check_mask(input_ids, attention_mask)
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
    model: ThinkingModel,
    cache: ThinkingCache,
    config: GenerationConfig,
    prompt_length: int,
    processors: LogitsProcessorList,
    device: torch.device | str,
) -> LogitsProcessorList:
    """Check the settled options of a call, and add the last processors after those of transformers.

    Args:
        model: Thinking model that generates.
        cache: Cache of the call, which holds what was asked for.
        config: Generation configuration with the options of the call.
        prompt_length: Number of tokens of the prompts, padding included.
        processors: Logits processors of transformers, which are extended in place.
        device: Device of the logits.

    Raises:
        ConfigError: The options ask for a decoding that does not go token by token.
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
    """Draws each row's token from the row's own random stream, and leaves only this token a finite score.

    Args:
        cache: Cache of the call, which gives the random numbers of the next token.
        scores: List that receives the scores of each draw, [B, V] for each token; None keeps none.
    """

    def __init__(self, cache: ThinkingCache, scores: list[Tensor] | None) -> None:
        self._cache = cache
        self._scores = scores

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores [B, V]: 0 for the drawn token, minus infinity for all others."""
        if self._scores is not None:
            self._scores.append(scores)
        precise = torch.promote_types(scores.dtype, torch.float32)  # of a logits processor they may have 16 bits
        token = draw_from(scores.softmax(-1, dtype=precise), self._cache.draws(1)[:, 0])
        chosen = torch.full_like(scores, float("-inf"))
        return chosen.scatter_(1, token[:, None], 0.0)  # type: ignore[return-value]  # a Tensor of transformers' kind


class RowEnds(StoppingCriteriaList):
    """Stopping criteria that also tell the cache which rows have ended, so that these rows stop thinking.

    Args:
        criteria: Stopping criteria of transformers and the user.
        cache: Cache of the call.
    """

    def __init__(self, criteria: Iterable[Any], cache: ThinkingCache) -> None:
        super().__init__(criteria)
        self.cache = cache

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> Any:
        """Return which rows have ended, bool [B]."""
        ended = super().__call__(input_ids, scores, **options)
        self.cache.end(ended)
        return ended


def count_new(sequences: Tensor, prompt_length: int, ending: int | Sequence[int] | None) -> int:
    """Count the new tokens of all rows of `sequences`, int64 [B, L + new], each row up to its first ending token."""
    new = sequences[:, prompt_length:]
    if ending is None:
        return new.numel()
    ends = torch.isin(new, torch.as_tensor(ending, device=new.device))
    return int((ends.cumsum(1) - ends.int() == 0).sum())


def _check_context(model: ThinkingModel, thinking: Thinking, prompt_length: int, max_length: int) -> None:
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
