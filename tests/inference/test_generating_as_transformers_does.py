"""What generating with thoughts has in common with transformers' own `generate`, and with itself in other batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from quietstar import ConfigError, DataError, QuietStarForCausalLM
from quietstar.model.cache import PreallocatedLayer, ThinkingCache
from quietstar.model.generation import plan_thinking
from quietstar.model.upstream import CACHE, BaseStreamer
from tests.inference.generated import PROMPTS, generate, new_tokens_of, pad_left, thinking_model, thoughts_of

IDS = torch.tensor([PROMPTS[0]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> QuietStarForCausalLM:
    return thinking_model()


# -- the base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"repetition_penalty": 1.5}]
)
def test_without_thoughts_it_is_the_base(model: QuietStarForCausalLM, options: dict[str, Any]) -> None:
    settled = {**OPTIONS, "max_new_tokens": 24, **options}
    torch.manual_seed(7)
    wanted = model.base.generate(**pad_left(PROMPTS), **settled)
    torch.manual_seed(7)
    assert torch.equal(model.generate(**pad_left(PROMPTS), **settled, think="never"), wanted)


@pytest.mark.parametrize("family", ["mistral_window", "qwen3", "gemma2", "gpt2"])
def test_the_text_alone_goes_as_in_the_base(family: str) -> None:
    """With a rule that never comes true the engine's own pass over the text is the base's too."""
    model = thinking_model(family)
    model.base.set_attn_implementation("eager")
    wanted = model.base.generate(**pad_left(PROMPTS), **{**OPTIONS, "max_new_tokens": 24})
    model.base.set_attn_implementation("quietstar")
    assert torch.equal(generate(model, PROMPTS, 24, think="entropy>1e9").sequences, wanted)
    assert torch.equal(generate(model, PROMPTS, 24, think="never", seed=3).sequences, wanted)


def test_the_model_s_own_generation_config_counts_without_thoughts(model: QuietStarForCausalLM) -> None:
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = 3
    try:
        assert model.generate(**pad_left(PROMPTS), think="never", pad_token_id=0).shape[1] == 7 + 3
        assert model.generate(**pad_left(PROMPTS), pad_token_id=0).shape[1] == 7 + 3
    finally:
        model.generation_config.max_new_tokens = None


def test_without_thoughts_there_is_a_record_too(model: QuietStarForCausalLM) -> None:
    ending = new_tokens_of(generate(model, PROMPTS, 8, think="never"), 8)[1][3]
    output = generate(model, PROMPTS, 8, think="never", eos_token_id=ending)
    new = output.sequences[:, 7:].tolist()
    counts = [text.index(ending) + 1 if ending in text else len(text) for text in new]
    assert output.thinking.predictions == sum(counts) < 32 and output.thinking.share == 0
    assert output.thinking.seconds > 0


def test_nothing_is_dropped_out_without_thoughts() -> None:
    """Adapters bring dropout of their own, which a model in training mode would use."""
    model = thinking_model()
    options = peft.LoraConfig(lora_dropout=0.9, target_modules=["q_proj", "v_proj"])
    peft.inject_adapter_in_model(options, model.base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    texts = {tuple(model.generate(IDS, **OPTIONS, think="never")[0].tolist()) for _ in range(3)}
    assert len(texts) == 1


def test_a_kind_of_cache_that_the_base_asks_for() -> None:
    """The texts have a cache of their own, whatever a base's generation_config says."""
    model = thinking_model()
    wanted = model.generate(IDS, **OPTIONS)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(IDS, **OPTIONS), wanted)


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral_window", "gpt2"])
@pytest.mark.parametrize("rule", ["always", "every:2", "entropy>2.9"])
def test_the_cache_is_that_of_a_pass_over_the_text(family: str, rule: str) -> None:
    """Nothing of a thought stays behind: not in the keys and values of the text, nor in their number."""
    model = thinking_model(family)
    output = generate(model, PROMPTS, 10, think=rule, thoughts_per_token=2, seed=1)
    fresh = ThinkingCache(plan_thinking(model, "never", 1, None, 0, False))
    text = output.sequences[:, :-1]  # the last token was never read
    mask = torch.cat([pad_left(PROMPTS)["attention_mask"], torch.ones(4, 9, dtype=torch.int64)], dim=1)
    model(text, mask, past_key_values=fresh)
    cache = getattr(output, CACHE)
    assert cache.get_seq_length() == fresh.get_seq_length() == text.shape[1]
    for layer, wanted in zip(cache.layers, fresh.layers, strict=True):
        for found, expected in ((layer.keys, wanted.keys), (layer.values, wanted.values)):
            assert found.shape[2] == text.shape[1]
            for row, prompt in enumerate(PROMPTS):
                torch.testing.assert_close(
                    found[row, :, 7 - len(prompt) :], expected[row, :, 7 - len(prompt) :], atol=1e-5, rtol=0
                )


@settings(max_examples=15)
@given(
    rules=st.lists(st.sampled_from(["always", "every:2", "every:3", "entropy>2.9", "never"]), min_size=2, max_size=3),
    pieces=st.lists(st.integers(1, 3), min_size=2, max_size=5),
    thoughts=st.integers(1, 2),
)
def test_a_thought_never_changes_another(rules: list[str], pieces: list[int], thoughts: int) -> None:
    """On the same text a token's thought and prediction are the same, whatever was thought at before.

    In float64: several tokens are read by another kernel than one alone, whose float32 sums round otherwise.
    """
    model = _IN_FLOAT64
    ids = torch.randint(3, 40, (2, sum(pieces)), generator=torch.Generator().manual_seed(sum(pieces)))
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for rule in rules:
        cache = ThinkingCache(plan_thinking(model, rule, thoughts, 1.0, 9, True))
        cache.open(ids[:, : pieces[0]], None)
        cache._seeds = [1, 2]
        end = 0
        for piece in pieces:
            end += piece
            logits = model(ids[:, end - piece : end], past_key_values=cache).logits[:, 0]
            step = cache.thinking.record.thoughts[-1]
            for place, row in enumerate([] if step is None else step.rows.tolist()):
                tokens, before = seen.setdefault((row, end), (step.tokens[place], logits[row]))
                assert torch.equal(tokens, step.tokens[place])
                torch.testing.assert_close(before, logits[row], atol=1e-6, rtol=0)


_MODEL = thinking_model("mistral_window")
_IN_FLOAT64 = thinking_model("mistral_window").double()


def test_more_can_follow_from_a_cache(model: QuietStarForCausalLM) -> None:
    """What was read is not read again, and the text goes on as if it had been the prompt."""
    first = generate(model, PROMPTS, 5)
    mask = torch.cat([pad_left(PROMPTS)["attention_mask"], torch.ones(4, 5, dtype=torch.int64)], dim=1)
    options = {**OPTIONS, "do_sample": True, "seed": 4, "attention_mask": mask}
    wanted = model.generate(first.sequences, **options)
    read = []
    hook = model.base.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.append(ids[0].shape))
    found = model.generate(first.sequences, **options, **{CACHE: getattr(first, CACHE)})
    hook.remove()
    assert torch.equal(found, wanted)
    assert read[0] == (4, 1)


def test_rows_of_a_cache_can_be_repeated_chosen_and_cut(model: QuietStarForCausalLM) -> None:
    """One pass over a shared beginning, then several texts from it."""
    first = generate(model, PROMPTS, 5)
    mask = torch.cat([pad_left(PROMPTS)["attention_mask"], torch.ones(4, 5, dtype=torch.int64)], dim=1)
    cache, rows = getattr(first, CACHE), torch.tensor([3, 1])
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    assert cache.get_seq_length() == 9
    options = {**OPTIONS, "do_sample": True, "seed": 4, "num_return_sequences": 2}
    wanted = model.generate(first.sequences[rows], attention_mask=mask[rows], **options)
    found = model.generate(first.sequences[rows], attention_mask=mask[rows], **options, past_key_values=cache)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="tokens_to_remove: got 3"):
        cache.crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(IDS, **OPTIONS, past_key_values=cache), model.generate(IDS, **OPTIONS))


def test_a_cache_of_another_text_is_refused(model: QuietStarForCausalLM) -> None:
    first = generate(model, PROMPTS, 3)
    other = first.sequences.clone()
    other[1, 8] += 1
    mask = torch.cat([pad_left(PROMPTS)["attention_mask"], torch.ones(4, 3, dtype=torch.int64)], dim=1)
    options = {**OPTIONS, CACHE: getattr(first, CACHE)}
    with pytest.raises(DataError, match=r"input_ids: row 1 has token \d+ at position 8, where the cache holds"):
        model.generate(other, attention_mask=mask, **options)
    with pytest.raises(DataError, match=r"input_ids: got 2 rows .* the cache holds 4"):
        model.generate(first.sequences[:2], attention_mask=mask[:2], **options)


def test_a_cache_outlives_inference_mode(model: QuietStarForCausalLM) -> None:
    with torch.inference_mode():
        first = model.generate(IDS, **OPTIONS, return_dict_in_generate=True)
    text = first.sequences.clone()
    found = model.generate(text, **OPTIONS, **{CACHE: getattr(first, CACHE)})
    assert torch.equal(found, model.generate(text, **OPTIONS))


def test_memory_grows_where_a_text_outgrows_it() -> None:
    layer, states = PreallocatedLayer(), torch.randn(2, 3, 700, 4)
    for begin in (*range(0, 640, 64), *range(640, 700)):
        end = begin + 64 if begin < 640 else begin + 1
        key, value = layer.append(states[:, :, begin:end], -states[:, :, begin:end])
        assert torch.equal(key, states[:, :, :end]) and torch.equal(value, -states[:, :, :end])
    layer.truncate(650)
    layer.reserve(2000)
    one, columns = torch.ones(1, 3, 2, 4), torch.tensor([655, 651])
    layer.write(columns, one, one, torch.tensor([1]))
    layer.write(columns[:1] + 1, 2 * one[:, :, :1].expand(2, -1, -1, -1), -one[:, :, :1].expand(2, -1, -1, -1), None)
    keys, values = layer.first(1000)
    assert torch.equal(keys[:, :, :650], states[:, :, :650]) and torch.equal(values[:, :, :650], -states[:, :, :650])
    written = keys[:, :, 650:, 0].tolist()
    assert all((head[1], head[5], head[6]) == (1, 1, 2) for head in written[1])
    assert all(head[6] == 2 for head in written[0])
    assert layer.get_seq_length() == 650 and bool(keys.isfinite().all()) and bool(values.isfinite().all())


# -- batches -----------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(order=st.permutations(range(4)), count=st.integers(1, 4), seed=st.integers(0, 9), sample=st.booleans())
def test_a_text_does_not_depend_on_its_batch(order: list[int], count: int, seed: int, sample: bool) -> None:
    prompts = [[1, 7, 12, 30, 4], [9, 8], [5, 6, 7], [21, 22, 23, 24, 25, 26, 27]]
    options = {"do_sample": sample, "seed": seed, "think": "every:2", "thoughts_per_token": 2}
    whole = generate(_MODEL, prompts, 8, **options)
    part = generate(_MODEL, [prompts[row] for row in order[:count]], 8, **options)
    for place, row in enumerate(order[:count]):
        assert new_tokens_of(part, 8)[place] == new_tokens_of(whole, 8)[row]
        assert thoughts_of(part, place) == thoughts_of(whole, row)


def test_several_texts_of_a_prompt_are_its_rows(model: QuietStarForCausalLM) -> None:
    options = {"do_sample": True, "seed": 3}
    several = generate(model, PROMPTS[:2], 6, num_return_sequences=3, **options)
    rows = generate(model, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, 6, **options)
    assert new_tokens_of(several, 6) == new_tokens_of(rows, 6)
    assert len({tuple(text) for text in new_tokens_of(several, 6)}) == 6


def test_each_prompt_may_have_a_seed_of_its_own(model: QuietStarForCausalLM) -> None:
    """So that equal prompts of different calls are told apart, whatever stands above them."""
    together = generate(model, PROMPTS[:3], 6, do_sample=True, seed=[7, 8, 9], num_return_sequences=2)
    for row, seed in enumerate((7, 8, 9)):
        alone = generate(model, [PROMPTS[row]], 6, do_sample=True, seed=seed, num_return_sequences=2)
        assert new_tokens_of(alone, 6) == new_tokens_of(together, 6)[2 * row : 2 * row + 2]


def test_without_a_seed_pytorch_s_generator_counts(model: QuietStarForCausalLM) -> None:
    def draw_with(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return new_tokens_of(generate(model, PROMPTS, 6, do_sample=True, thought_temperature=1.0), 6)

    assert draw_with(0) == draw_with(0) != draw_with(1)


# -- stopping and streaming --------------------------------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class AfterToken(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.token


def test_a_streamer_sees_every_token(model: QuietStarForCausalLM) -> None:
    streamer = Collect()
    found = model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS, streamer=streamer, seed=0)
    assert streamer.tokens == found[0].tolist() and streamer.ended


def test_stopping_criteria_stop(model: QuietStarForCausalLM) -> None:
    ids = torch.tensor([PROMPTS[0]])
    whole = model.generate(ids, **OPTIONS)[0].tolist()
    token = whole[7]
    stopped = model.generate(ids, **OPTIONS, stopping_criteria=StoppingCriteriaList([AfterToken(token)]))
    assert stopped[0].tolist() == whole[: whole.index(token, 5) + 1]


def test_a_row_that_a_criterion_ends_is_not_thought_about(model: QuietStarForCausalLM) -> None:
    free = new_tokens_of(generate(model, PROMPTS, 12), 12)
    token = free[1][2]
    stop = StoppingCriteriaList([AfterToken(token)])
    output = generate(model, PROMPTS, 12, stopping_criteria=stop)
    kept = [text.index(token) + 1 if token in text else 12 for text in free]
    assert min(kept) < 12 and output.thinking.predictions == output.thinking.thought_at == sum(kept)


def test_scores_are_those_that_were_drawn_from(model: QuietStarForCausalLM) -> None:
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "seed": 1}
    output = generate(model, PROMPTS, 4, **options, output_scores=True, output_logits=True)
    for scores, raw in zip(output.scores, output.logits, strict=True):
        torch.testing.assert_close(scores, raw / 0.7)


def test_a_row_that_has_ended_is_not_thought_about(model: QuietStarForCausalLM) -> None:
    free = generate(model, PROMPTS, 12)
    ending = new_tokens_of(free, 12)[1][2]
    output = generate(model, PROMPTS, 12, eos_token_id=ending)
    running = 0
    for row, text in enumerate(new_tokens_of(free, 12)):
        kept = text.index(ending) + 1 if ending in text else 12
        running += kept
        assert new_tokens_of(output, output.sequences.shape[1] - 7)[row][:kept] == text[:kept]
        assert all(thought is None for thought in thoughts_of(output, row)[kept:])
        assert all(thought is not None for thought in thoughts_of(output, row)[:kept])
    assert output.thinking.predictions == output.thinking.thought_at == running


def test_kept_tokens_come_out_of_nothing(model: QuietStarForCausalLM) -> None:
    """Neither in the text nor in thoughts, whatever generation configuration is given, and without thoughts."""
    said = generate(model, PROMPTS, 12).sequences[:, 7:].flatten().tolist()
    banned = sorted(set(said) - {token for prompt in PROMPTS for token in prompt})[:3]
    other = thinking_model(banned_token_ids=banned)
    for rule in ("always", "never"):
        config = type(other.generation_config)(max_new_tokens=12, pad_token_id=0, eos_token_id=None, do_sample=False)
        found = other.generate(**pad_left(PROMPTS), generation_config=config, think=rule)
        assert banned and not set(found[:, 7:].flatten().tolist()) & set(banned)


def test_bfloat16() -> None:
    """The same call gives the same text; that of other batches may differ, as matrix products round otherwise."""
    model = thinking_model(dtype=torch.bfloat16)
    output = generate(model, PROMPTS, 6, output_logits=True)
    assert torch.equal(generate(model, PROMPTS, 6).sequences, output.sequences)
    assert output.logits[0].dtype == torch.float32 and bool(torch.stack(output.logits).isfinite().all())
    assert getattr(output, CACHE).layers[0].keys.dtype == torch.bfloat16


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "sometimes"}, r"think: got 'sometimes', needs one of always, never, entropy>x"),
        ({"think": "alway"}, r"did you mean always\?"),
        ({"think": "entropy>high"}, r"think: got 'entropy>high', entropy>x needs a number of nats"),
        ({"think": "entropy>inf"}, r"needs a number of nats"),
        ({"think": "every:0"}, r"every:n needs an n of at least 1"),
        ({"think": None}, r"think: got None"),
        ({"think": "learned"}, r"think: got 'learned', but this model has no learned gate; `python -m quietstar.gate"),
        ({"thoughts_per_token": 0}, r"thoughts_per_token: got 0, needs a whole number of 1 to 1024"),
        ({"thoughts_per_token": True}, r"thoughts_per_token: got True"),
        ({"thought_temperature": -1.0}, r"thought_temperature: got -1.0, needs .* or 0 \(greedy\)"),
        ({"thought_temperature": 0, "thoughts_per_token": 2}, r"got 0 with 2 thoughts per token, which would all be"),
        ({"seed": 1.5}, r"seed: got 1.5, needs a whole number, one for each prompt, or None"),
        ({"seed": [1, 2]}, r"seed: got 2 seeds for 1 prompts; needs one for each"),
        ({"num_beams": 2}, r"num_beams: got 2, from the call or generation_config; a thinking model samples"),
        ({"guidance_scale": 2.0}, r"guidance_scale: got 2.0"),
        ({"use_cache": False}, r"use_cache: got False; thoughts are made from the text's keys and values"),
        ({"prompt_lookup_num_tokens": 2}, r"prompt_lookup_num_tokens: "),
        ({"prefill_chunk_size": 2}, r"prefill_chunk_size: "),
        ({"cache_implementation": "static"}, r"cache_implementation: not supported with thoughts"),
        ({"output_hidden_states": True}, r"output_hidden_states: not supported with thoughts"),
        ({"position_ids": True}, r"position_ids: not supported with thoughts"),
        ({"output_thoughts": True}, r"output_thoughts: got True without return_dict_in_generate=True"),
        ({"thought_temperature": "0"}, r"thought_temperature: got '0', needs .* or 0"),
        ({"thought_temperature": float("inf")}, r"thought_temperature: got inf"),
        ({"custom_generate": "somebody/something"}, r"custom_generate: not supported with thoughts"),
        ({"past_key_values": object()}, f"{CACHE}: got a object, needs the ThinkingCache"),
    ],
)
def test_options_that_are_refused(model: QuietStarForCausalLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate(torch.tensor([PROMPTS[0]]), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("ids", "mask", "options", "message"),
    [
        ([[]], None, {}, r"input_ids: got shape \[1, 0\], an empty prompt; needs a token at least"),
        ([3, 4], None, {}, r"input_ids: got shape \[2\], needs \[batch, length\]"),
        ([[3, 4], [5, 6]], [[1, 1], [0, 0]], {}, r"attention_mask: masks every token of row 1"),
        ([[3, 4], [5, 6]], [[1, 1], [1, 0]], {}, r"attention_mask: row 1 is padded on the right; .* on the left"),
        ([[3, 4, 7]], [[1]], {}, r"attention_mask: got shape \[1, 1\], needs that of input_ids, \[1, 3\]"),
        ([[3, 4, 7]], [[1, 2, 2]], {}, r"attention_mask: has other values than 0 and 1"),
        ([[3, 4, 7]], [[1, 0, 1]], {}, r"attention_mask: row 0 has a gap"),
        (
            [[3] * 60],
            None,
            {"max_new_tokens": 80},
            r"the prompt has 60 tokens and would grow to 140.*lower max_new_tok",
        ),
        ([[3] * 130], None, {}, r"the prompt has 130 tokens.*the 128 of the base's context; shorten the prompt"),
    ],
)
def test_prompts_that_are_refused(
    model: QuietStarForCausalLM, ids: Any, mask: Any, options: dict[str, Any], message: str
) -> None:
    given_mask = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with pytest.raises(DataError, match=message):
        model.generate(torch.tensor(ids, dtype=torch.int64), **given_mask, **{**OPTIONS, **options})


def test_the_context_is_used_to_its_end(model: QuietStarForCausalLM) -> None:
    """START, three tokens and END behind the last but one of 128 positions: 124 tokens."""
    ids = torch.tensor([[3] * 120])
    assert model.generate(ids, **{**OPTIONS, "max_new_tokens": 4}).shape == (1, 124)
    with pytest.raises(DataError, match="lower max_new_tokens to at most 4"):
        model.generate(ids, **{**OPTIONS, "max_new_tokens": 5})


def test_a_prompt_with_a_token_that_is_kept_for_thoughts() -> None:
    model = thinking_model(banned_token_ids=[30])
    with pytest.raises(DataError, match=r"input_ids: row 1 has token 30 at position 2, which is kept for thoughts"):
        model.generate(torch.tensor([[3, 4, 5], [6, 7, 30]]), **OPTIONS)
    padded = {"input_ids": torch.tensor([[3, 4, 5], [30, 6, 7]]), "attention_mask": torch.tensor([[1] * 3, [0, 1, 1]])}
    model.generate(**padded, **OPTIONS)  # as padding it says nothing


def test_a_cache_that_is_longer_than_the_text(model: QuietStarForCausalLM) -> None:
    first = generate(model, [PROMPTS[0]], 5)
    with pytest.raises(DataError, match="input_ids: got 5 tokens, but the cache holds 9; give the whole text"):
        model.generate(torch.tensor([PROMPTS[0]]), **OPTIONS, **{CACHE: getattr(first, CACHE)})


def test_several_pauses_are_one() -> None:
    with pytest.raises(ConfigError, match="thinking: pauses with 2 thoughts per token, which would all be the same"):
        thinking_model(thinking="pause").generate(IDS, **OPTIONS, thoughts_per_token=2)


def test_a_plain_checkpoint_says_what_to_do(tmp_path: Path, model: QuietStarForCausalLM) -> None:
    model.base.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"text_config: missing.*from_base\(path\).*AutoModelForCausalLM"):
        QuietStarForCausalLM.from_pretrained(tmp_path)
