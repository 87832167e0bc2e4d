"""`generate` of a thinking model, on top of transformers' own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from quietstar.errors import ConfigError
from quietstar.model.upstream import CACHE, GenerateDecoderOnlyOutput, SuppressTokensLogitsProcessor

if TYPE_CHECKING:
    from quietstar.inference.record import ThinkingRecord
    from quietstar.inference.thinking_cache import ThinkingCache

# quietstar.inference builds on the model, so it is imported where it is used.


class ThinkingGeneration(GenerationMixin):
    """The part of `QuietStarForCausalLM` that generates; the checks and draws are in `quietstar.inference`."""

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
        """Continue texts, with a thought before each new token; transformers' `generate` with a few options more.

        A thought is made from the text's keys and values, its mixed prediction gives the token, and its own keys and
        values are dropped. The text is never run twice, and neither START nor END can come out.

        Args:
            inputs: int64 [B, L], or as `input_ids`; several texts are padded on the left, with an `attention_mask`.
            generation_config: transformers' own.
            think: Which tokens are thought about: `"always"`; `"never"` (the base's own `generate`); `"entropy>x"`,
                where the base's prediction has more than x nats; `"every:n"`, every n-th new token; `"learned"` or
                `"learned>x"`, where the model's gate predicts a gain of more than its threshold, or x nats.
            thoughts_per_token: K; of several thoughts the mean of their predictions is taken.
            thought_temperature: 0 for greedy thoughts. By default 0 for one thought, as in the paper's evaluation, and
                that of the configuration for several.
            seed: Thoughts, and with `do_sample` the text, are drawn from random streams of each row's own, made from
                the seed, the prompt, and which of several equal prompts the row is: a text does not depend on the rest
                of the batch, up to the rounding of matrix products, which in bfloat16 does. One seed, or one for each
                prompt. Without a seed transformers draws the text from
                PyTorch's global generator.
            output_thoughts: Keep the thoughts of every token; needs `return_dict_in_generate=True`.
            options: transformers' own: `max_new_tokens`, `do_sample`, `num_return_sequences`, `streamer`,
                `stopping_criteria`, ... With the `cache` of an earlier call's output (`past_key_values` before
                transformers 5.24; both names are taken), and the whole text as `inputs`, what was read then is not
                read again.

        Returns:
            int64 [B, L + new]; with `return_dict_in_generate=True` a `ThinkingOutput`, whose `thinking` has the share
            of tokens that were thought about, the time, and the thoughts.

        Raises:
            ConfigError: An option is unknown, out of range, or goes around the text's cache (beams, assistants).
            DataError: A prompt is empty, padded on the right, too long for the base's context, or holds a token that
                is kept for thoughts.
        """
        from quietstar.inference.generating import UNSUPPORTED, RowEnds, ThinkingOutput, check_prompt, plan_thinking
        from quietstar.inference.thinking_cache import ThinkingCache

        thinking = plan_thinking(self, think, thoughts_per_token, thought_temperature, seed, output_thoughts)
        check_prompt(
            self, thinking, options.get("input_ids") if inputs is None else inputs, options.get("attention_mask")
        )
        settled = self.generation_config if generation_config is None else generation_config
        if output_thoughts and not options.get("return_dict_in_generate", settled.return_dict_in_generate):
            raise ConfigError("output_thoughts: got True without return_dict_in_generate=True, which returns them")
        self._prepare()
        past = one_cache(options.pop("past_key_values", None), options.pop("cache", None))
        own_draws = seed is not None and options.get("do_sample", settled.do_sample)
        if thinking.when.rule == "never" and past is None and not own_draws:
            return self._generate_without_thoughts(inputs, generation_config, thinking.record, options)
        for name in UNSUPPORTED:
            if options.get(name) or (generation_config is not None and getattr(generation_config, name, None)):
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
        """The base's own `generate`, with what a user has set on this model's `generation_config`."""
        from quietstar.inference.generating import ThinkingOutput, count_new

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
        """What the cache has not seen yet."""
        past = thinking_cache(one_cache(past_key_values, cache))
        if not past.is_open:
            past.open(input_ids, attention_mask)
        return {"input_ids": input_ids[:, past.get_seq_length() :], CACHE: past}

    def _get_logits_processor(  # transformers knows the settled options only here
        self: Any, generation_config: GenerationConfig, *arguments: Any, **options: Any
    ) -> LogitsProcessorList:
        from quietstar.inference.generating import finish_processors

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


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """What was given under either of transformers' two names for a cache, or None.

    Raises:
        ConfigError: Both were given.
    """
    if past_key_values is not None and cache is not None:
        raise ConfigError("cache: got past_key_values too, transformers' older name for it; give one of them")
    return past_key_values if cache is None else cache


def thinking_cache(cache: Any) -> ThinkingCache:
    """`cache` as one that thoughts can be made from.

    Raises:
        ConfigError: It is another kind of cache.
    """
    from quietstar.inference.thinking_cache import ThinkingCache

    if not isinstance(cache, ThinkingCache):
        raise ConfigError(
            f"{CACHE}: got a {type(cache).__name__}, needs the ThinkingCache of an earlier call of "
            "generate (return_dict_in_generate=True gives it)"
        )
    return cache
