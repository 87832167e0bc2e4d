"""`generate` of a thinking model, on top of transformers' own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from quietstar.errors import ConfigError
from quietstar.inference.generating import (
    UNSUPPORTED,
    ThinkingOutput,
    check_prompt,
    finish_processors,
    plan_thinking,
)
from quietstar.inference.thinking_cache import ThinkingCache


class ThinkingGeneration(GenerationMixin):
    """The part of `QuietStarForCausalLM` that generates; the checks and draws are in `quietstar.inference`."""

    @torch.no_grad()
    def generate(  # type: ignore[override]  # transformers' positional arguments are options here
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
                of the batch. One seed, or one for each prompt. Without a seed transformers draws the text from
                PyTorch's global generator.
            output_thoughts: Keep the thoughts of every token; needs `return_dict_in_generate=True`.
            options: transformers' own: `max_new_tokens`, `do_sample`, `num_return_sequences`, `streamer`,
                `stopping_criteria`, ... With `past_key_values` of an earlier call, and the whole text as `inputs`, what
                was read then is not read again.

        Returns:
            int64 [B, L + new]; with `return_dict_in_generate=True` a `ThinkingOutput`, whose `thinking` has the share
            of tokens that were thought about, the time, and the thoughts.

        Raises:
            ConfigError: An option is unknown, out of range, or goes around the text's cache (beams, assistants).
            DataError: A prompt is empty, padded on the right, too long for the base's context, or holds a token that
                is kept for thoughts.
        """
        thinking = plan_thinking(self, think, thoughts_per_token, thought_temperature, seed, output_thoughts)
        input_ids = options.get("input_ids") if inputs is None else inputs
        check_prompt(self, thinking, input_ids, options.get("attention_mask"))
        for name in UNSUPPORTED:
            if options.get(name) is not None:
                raise ConfigError(f"{name}: not supported with thoughts; leave it out, or use model.base.generate")
        past = options.pop("past_key_values", None)
        if thinking.when.rule == "never" and seed is None and past is None:
            return self._generate_without_thoughts(inputs, generation_config, options)
        if options.pop("use_cache", True) is False:
            raise ConfigError("use_cache: got False; thoughts are made from the text's keys and values, needs True")
        if past is None:
            past = ThinkingCache(thinking)
        else:
            thinking_cache(past).begin(thinking)
        before = time.perf_counter()
        output = super().generate(inputs, generation_config, past_key_values=past, **options)  # type: ignore[misc]  # their type of self
        thinking.record.seconds = time.perf_counter() - before
        return output if isinstance(output, Tensor) else ThinkingOutput(**output, thinking=thinking.record)

    def _generate_without_thoughts(
        self: Any, inputs: Tensor | None, generation_config: GenerationConfig | None, options: dict[str, Any]
    ) -> Any:
        processors = LogitsProcessorList(options.pop("logits_processor", None) or [])
        if self.banned:
            processors.append(SuppressTokensLogitsProcessor(list(self.banned), device=str(self.device)))
        before = self.base.generation_config
        self.base.generation_config = self.generation_config  # what a user sets on the model counts here too
        try:
            return self.base.generate(inputs, generation_config, logits_processor=processors, **options)
        finally:
            self.base.generation_config = before

    def prepare_inputs_for_generation(  # type: ignore[override]  # the other arguments serve other caches
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, **_: Any
    ) -> dict[str, Any]:
        """What the cache has not seen yet."""
        cache = thinking_cache(past_key_values)
        if not cache.is_open:
            cache.open(input_ids, attention_mask)
        return {"input_ids": input_ids[:, cache.get_seq_length() :], "past_key_values": cache}

    def _get_logits_processor(  # transformers knows the settled options only here
        self: Any, generation_config: GenerationConfig, *arguments: Any, **options: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *arguments, **options)  # type: ignore[misc]  # their type of self
        cache = thinking_cache((options.get("model_kwargs") or {}).get("past_key_values"))
        return finish_processors(self, cache, generation_config, int(options["input_ids_seq_length"]), processors)


def thinking_cache(past_key_values: Any) -> ThinkingCache:
    """`past_key_values` as the cache that thoughts can be made from.

    Raises:
        ConfigError: It is another kind of cache.
    """
    if not isinstance(past_key_values, ThinkingCache):
        raise ConfigError(
            f"past_key_values: got a {type(past_key_values).__name__}, needs the ThinkingCache of an earlier call of "
            "generate (return_dict_in_generate=True gives it)"
        )
    return past_key_values
