"""Completions of prompts, batch by batch, with the thoughts that led to them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from quietstar.errors import DataError
from quietstar.inference.completion_options import CompletionOptions
from quietstar.inference.draw import substream
from quietstar.inference.prompts import Prompt
from quietstar.inference.record import ThinkingRecord, TokenThoughts
from quietstar.inference.stopping import StopStrings
from quietstar.model import QuietStarForCausalLM
from quietstar.model.passes import PAUSE


@dataclass(frozen=True)
class Completion:
    """What was added to a prompt.

    Args:
        prompt: The prompt.
        tokens: The new tokens, the end-of-sequence token included.
        text: What they add to the prompt's text, without special tokens.
        thoughts: One entry for each new token: its thoughts' tokens (empty for pauses) and mixing weights, or None.
    """

    prompt: Prompt
    tokens: list[int]
    text: str
    thoughts: list[list[tuple[list[int], float]] | None]


def complete(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: CompletionOptions,
    record: ThinkingRecord,
    streamer: BaseStreamer | None = None,
) -> Iterator[Completion]:
    """Completes prompts in their order, all samples of one together.

    What is drawn depends on the seed, the prompt and which of several equal prompts it is, not on the batches.

    Args:
        model: Thinks.
        tokenizer: The model's.
        prompts: All are checked before the first is completed.
        options: How.
        record: Counts and seconds are added to it.
        streamer: Takes the tokens of the only prompt.

    Raises:
        ConfigError: An option does not fit the model.
        DataError: A prompt cannot be used.
    """
    encoded = [prompt.encode(tokenizer, model.banned) for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        _check_room(model, prompt, len(tokens), options)
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for tokens in encoded:  # equal prompts differ, in one batch or in several
        again = seen[tuple(tokens)]
        seeds.append(substream(options.seed, again) if again else options.seed)
        seen[tuple(tokens)] += 1
    for first in range(0, len(prompts), options.batch_size):
        batch = slice(first, first + options.batch_size)
        rows = iter(_generate(model, tokenizer, encoded[batch], options, seeds[batch], record, streamer))
        for prompt, before in zip(prompts[batch], encoded[batch], strict=True):
            for tokens, thoughts in islice(rows, options.samples):
                yield Completion(prompt, tokens, _added(tokenizer, before, tokens), thoughts)


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    options: CompletionOptions,
    seeds: list[int],
    record: ThinkingRecord,
    streamer: BaseStreamer | None,
) -> list[tuple[list[int], list[list[tuple[list[int], float]] | None]]]:
    """New tokens and thoughts of every row."""
    ending = model.generation_config.eos_token_id
    if ending is None:
        ending = tokenizer.eos_token_id
    ends = ending if isinstance(ending, list) else [ending]
    padding = next((token for token in (tokenizer.pad_token_id, ends[0]) if token is not None), 0)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        drawn = {"do_sample": True, "temperature": options.temperature}
        drawn |= {"top_k": options.top_k or 0, "top_p": options.top_p or 1.0}
    stops = StopStrings(tokenizer, options.stop, longest)
    before = time.perf_counter()
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        think=options.think,
        thoughts_per_token=options.thoughts_per_token,
        thought_temperature=options.thought_temperature,
        seed=seeds if options.draws else None,
        output_thoughts=True,
        return_dict_in_generate=True,
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.samples,
        eos_token_id=ending,
        pad_token_id=padding,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([stops] if options.stop else []),
        **drawn,
    )
    record.seconds += time.perf_counter() - before
    new = [_until_end(row, ends, stops) for row in output.sequences[:, longest:].tolist()]
    thinking = getattr(output, "thinking", None)  # the base's own output has none
    steps = [None] * options.max_new_tokens if thinking is None else thinking.thoughts
    rows = [(tokens, [_of_row(step, row) for step in steps[: len(tokens)]]) for row, tokens in enumerate(new)]
    record.predictions += sum(len(tokens) for tokens, _ in rows)
    record.thought_at += sum(own is not None for _, thoughts in rows for own in thoughts)
    return rows


def _of_row(step: TokenThoughts | None, row: int) -> list[tuple[list[int], float]] | None:
    place: Tensor | None = None if step is None else (step.rows == row).nonzero()
    if step is None or place is None or not len(place):
        return None
    index = int(place[0])
    tokens, weights = step.tokens[index].tolist(), step.mixing_weight[index].tolist()
    return [([t for t in own if t != PAUSE], weight) for own, weight in zip(tokens, weights, strict=True)]


def _until_end(tokens: list[int], ends: Sequence[int | None], stops: StopStrings) -> list[int]:
    """A row up to its first end; behind it others of the batch went on."""
    counts = range(1, len(tokens) + 1)
    return tokens[: next((n for n in counts if tokens[n - 1] in ends or stops.end(tokens[:n])), len(tokens))]


def _added(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """Some tokenizers drop the space before the first token, so that new tokens are decoded behind the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _check_room(model: QuietStarForCausalLM, prompt: Prompt, length: int, options: CompletionOptions) -> None:
    limit = getattr(model.base.config, "max_position_embeddings", None)
    thought = 0 if options.think == "never" else model.config.thought_length + 1
    if limit is None or length + options.max_new_tokens + thought <= limit:
        return
    room = limit - thought - length
    advice = f"lower max_new_tokens to at most {room}" if room > 0 else "shorten it"
    raise DataError(
        f"{prompt.place}: has {length} tokens; with max_new_tokens {options.max_new_tokens} and {thought} positions "
        f"for thoughts that is more than the {limit} of the base's context; {advice}"
    )
