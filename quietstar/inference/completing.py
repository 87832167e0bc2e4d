"""Completes prompts batch by batch, and keeps the thoughts that led to each token.

`complete` takes prompts and options; `continue_texts` continues one batch of token ids; `WhenComplete` ends a text as
soon as it is complete.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from quietstar.data.rows import BadRows
from quietstar.data.sources import rendered
from quietstar.data.tokenizer import ChatTemplate, SpecialTokens
from quietstar.errors import DataError
from quietstar.inference.prompts import OPTIONS, CompletionOptions, Prompt
from quietstar.model.cache import ThinkingRecord, TokenThoughts
from quietstar.model.draw import substream
from quietstar.model.loading import ending_tokens
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.passes import PAUSE
from quietstar.model.upstream import BaseStreamer


@dataclass(frozen=True)
class CompletedPrompt:
    """A prompt and its completion.

    Args:
        prompt: Prompt that was completed.
        tokens: Ids of the new tokens, including the end-of-sequence token.
        text: Text that the new tokens add to the prompt, without special tokens.
        thoughts: One entry for each new token: token ids (empty for pauses) and mixing weight of each thought before
            it, or None where the model did not think.
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
) -> Iterator[CompletedPrompt]:
    """Completes prompts in their order; the samples of one prompt come together.

    What is drawn depends on the seed, the prompt and which of several equal prompts it is, not on the batches.

    Args:
        model: Thinking model that completes the prompts.
        tokenizer: Tokenizer of the model.
        prompts: Prompts to complete; all are checked before the first is completed.
        options: Options of thinking, sampling and stopping.
        record: Record that counts and seconds are added to.
        streamer: Receiver of the new tokens; only for a single prompt.

    Raises:
        ConfigError: An option does not fit the model.
        DataError: A prompt cannot be used.
    """
    rule = SpecialTokens(tokenizer, options.special_tokens == "parse", OPTIONS.special_tokens)
    template = ChatTemplate(tokenizer, rule.parse, OPTIONS, answer=True)
    prompts = [replace(prompt, text=rendered(prompt.text, prompt.place, template)) for prompt in prompts]
    encoded, found = [], BadRows()
    for prompt in prompts:
        encoded.append(prompt.encode(tokenizer, model.banned, rule))
        found.found_special(prompt.place, rule.count(prompt.text), rule.means)
    found.tell_special()
    for prompt, tokens in zip(prompts, encoded, strict=True):
        _check_room(model, prompt, len(tokens), options)
    seen: Counter[tuple[int, ...]] = Counter()
    for first in range(0, len(prompts), options.batch_size):
        chosen = slice(first, first + options.batch_size)
        seeds = []
        for own in map(tuple, encoded[chosen]):  # equal prompts get different seeds, in one batch or in several
            seeds.append(substream(options.seed, seen[own]) if seen[own] else options.seed)
            seen[own] += 1
        rows = continue_texts(model, tokenizer, encoded[chosen], options, seeds, record, streamer=streamer)
        for row, continued in enumerate(rows):
            prompt = prompts[first + row // options.samples]
            yield CompletedPrompt(prompt, continued.tokens, continued.text, continued.thoughts)


@dataclass(frozen=True)
class Continued:
    """The continuation of a text.

    Args:
        tokens: Ids of the new tokens, including the end-of-sequence token.
        text: Text that the new tokens add to the prompt, without special tokens.
        thoughts: One entry for each new token: token ids (empty for pauses) and mixing weight of each thought before
            it, or None where the model did not think.
    """

    tokens: list[int]
    text: str
    thoughts: list[list[tuple[list[int], float]] | None]


def continue_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: CompletionOptions,
    seeds: Sequence[int],
    record: ThinkingRecord,
    *,
    is_complete: Callable[[str], bool] | None = None,
    streamer: BaseStreamer | None = None,
) -> list[Continued]:
    """Continues one batch of token ids; the `options.samples` continuations of a prompt are adjacent.

    Only the options count: the advice of the checkpoint's `generation_config` (a repetition penalty, a temperature,
    suppressed tokens) is ignored, except for the tokens that end a text.

    Args:
        model: Thinking model that continues the texts.
        tokenizer: Tokenizer of the model.
        prompts: Token ids of each prompt; lengths may differ.
        options: Options of thinking, sampling and stopping; `batch_size` and `seed` are not used.
        seeds: Seed of each prompt.
        record: Record that counts and seconds are added to.
        is_complete: Function that says whether a new text needs no more tokens, in addition to `options.stop`.
        streamer: Receiver of the new tokens; only for a single prompt.
    """
    ends = ending_tokens(tokenizer, model.head.weight.shape[0], model.generation_config, model.base.config)
    padding = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    ids, mask = pad_left(prompts, padding)
    longest = ids.shape[1]
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_return_sequences=options.samples,
        eos_token_id=ends or None,
        pad_token_id=padding,
        return_dict_in_generate=True,
        do_sample=options.temperature > 0,
    )
    if config.do_sample:
        config.update(temperature=options.temperature, top_k=options.top_k or 0, top_p=options.top_p or 1.0)
    complete = [] if is_complete is None else [WhenComplete(tokenizer, longest, is_complete)]
    complete += [stop_strings(tokenizer, longest, options.stop)] if options.stop else []
    before = time.perf_counter()
    with _only(model, config):
        output = model.generate(
            ids.to(model.device),
            config,
            attention_mask=mask.to(model.device),
            think=options.think,
            thoughts_per_token=options.thoughts_per_token,
            thought_temperature=options.thought_temperature,
            seed=list(seeds) if options.draws else None,
            output_thoughts=True,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(complete),
        )
    record.seconds += time.perf_counter() - before
    new = []
    for row, tokens in enumerate(output.sequences[:, longest:].tolist()):  # rows are padded after their end
        counts = [count for criterion in complete if (count := criterion.end(row)) is not None]
        counts += [place + 1 for place, token in enumerate(tokens) if token in ends][:1]
        new.append(tokens[: min(counts, default=len(tokens))])
    steps = output.thinking.thoughts or [None] * options.max_new_tokens
    rows = []
    for row, tokens in enumerate(new):
        thoughts = [_of_row(step, row) for step in steps[: len(tokens)]]
        rows.append(Continued(tokens, _added(tokenizer, list(prompts[row // options.samples]), tokens), thoughts))
        record.predictions += len(tokens)
        record.thought_at += sum(own is not None for own in thoughts)
    return rows


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hides the checkpoint's generation config; transformers would take from it whatever `config` leaves open."""
    owners = (model, model.base)
    advised = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = deepcopy(config)
        yield
    finally:
        for owner, own in zip(owners, advised, strict=True):
            owner.generation_config = own


def pad_left(rows: Sequence[Sequence[int]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Returns token ids as int64 [B, L] and their attention mask, 0 in the padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _of_row(step: TokenThoughts | None, row: int) -> list[tuple[list[int], float]] | None:
    place: Tensor | None = None if step is None else (step.rows == row).nonzero()
    if step is None or place is None or not len(place):
        return None
    index = int(place[0])
    tokens, weights = step.tokens[index].tolist(), step.mixing_weight[index].tolist()
    return [([t for t in own if t != PAUSE], weight) for own, weight in zip(tokens, weights, strict=True)]


def _added(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """Decodes new tokens together with the prompt, because some tokenizers drop the space before the first token."""
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


class WhenComplete(StoppingCriteria):
    """Ends a row with the token that makes its new text complete.

    The class of transformers for stop strings needs a tokenizer that can read any character.

    Args:
        tokenizer: Tokenizer of the model.
        prompt_length: Number of columns before the new tokens.
        is_complete: Function that says whether a text needs no more tokens.
        tail: Number of last tokens that `is_complete` has to see; None for all.
    """

    def __init__(
        self, tokenizer: Any, prompt_length: int, is_complete: Callable[[str], bool], tail: int | None = None
    ) -> None:
        self._tokenizer, self._prompt_length = tokenizer, prompt_length
        self._is_complete, self._tail = is_complete, tail
        self._ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Any:
        """Returns which rows are at their end, bool [B]."""
        rows = input_ids[:, self._prompt_length :].tolist()
        for row, tokens in enumerate(rows):
            if row not in self._ends and self._is_complete(self._decode(tokens)):
                self._ends[row] = len(tokens)
        return torch.tensor([row in self._ends for row in range(len(rows))], device=input_ids.device)

    def end(self, row: int) -> int | None:
        """Returns how many new tokens a row had when it was complete; None where it never was."""
        return self._ends.get(row)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens if self._tail is None else tokens[-self._tail :])
        return text


def stop_strings(tokenizer: Any, prompt_length: int, strings: Sequence[str]) -> WhenComplete:
    """Returns a criterion that ends a row with the token that completes one of some strings."""
    # a token is at least one byte; 4 more, because some tokenizers drop a space before the first token that they decode
    tail = max(len(string.encode()) for string in strings) + 4
    return WhenComplete(tokenizer, prompt_length, lambda text: any(string in text for string in strings), tail)
