"""The decoding loop against its definition: one row, no cache, no padding, the whole text again for every token."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar.config.sampling import SamplingOptions
from quietstar.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError
from quietstar.model.draw import draw, uniforms
from quietstar.sampling import transformers_sampler as module
from quietstar.sampling.choice import make_sampler, start_server
from quietstar.sampling.requests import Completion, Request, sample_seed
from quietstar.sampling.transformers_sampler import Decoding, TransformersSampler
from tests.model.tiny import make_base, make_model
from tests.sampling.conftest import CHARACTERS

OPTIONS = SamplingOptions(temperature=3.0, max_new_tokens=12, batch_size=5)
FEW_SHOT = (CHARACTERS * 2)[:24]
STOP = tuple(CHARACTERS[::6])
FAMILIES = (
    *("llama", "mistral_window", "qwen2", "qwen2_window", "qwen3", "gpt_neox", "gpt2", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "opt"),
)
"""gpt2 and opt have absolute positions, opt computes them itself; gemma2 has no SDPA; a window is 4 tokens."""


def requests(samples: int = 3) -> list[Request]:
    prompts = [FEW_SHOT + rest for rest in ("AB", "C", "BADCFEHG")]
    return [
        Request(prompt, sample_seed(0, prompt, index), f"{prompt[24:]} {index}")
        for index in range(samples)
        for prompt in prompts
    ]


def by_definition(model: Any, tokenizer: Any, request: Request, options: SamplingOptions) -> Completion:
    prompt = tokenizer(request.prompt)["input_ids"]
    tokens, logprob, reason = [], 0.0, "length"
    uniform = uniforms([request.seed], options.max_new_tokens)
    for step in range(options.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[:, -1]
        token, change = draw(
            logits, uniform[:, step], temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
        tokens.append(int(token))
        logprob += float(change)
        if tokens[-1] == tokenizer.eos_token_id or CHARACTERS[tokens[-1] - 3] in STOP:
            reason = "stop"
            break
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(text.rstrip("".join(STOP)), logprob, len(tokens), reason)


def assert_same(actual: list[Completion], expected: list[Completion]) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert dataclasses.replace(found, logprob=0.0) == dataclasses.replace(wanted, logprob=0.0)
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_gives_what_the_definition_gives(family: str, tokenizer: Any) -> None:
    # eager attention, gemma2's, rounds float64's least number to -inf, and a padded place that sees nothing to NaN
    model = make_base(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    asked = requests()
    expected = [by_definition(model, tokenizer, request, OPTIONS) for request in asked]
    assert len({generation.tokens for generation in expected}) > 2, "rows must end at different times"
    assert len({generation.text for generation in expected}) > 4
    sampler = TransformersSampler(model, tokenizer, OPTIONS, STOP)
    assert_same(sampler.sample(asked), expected)
    for batch in sampler.batches(asked):
        assert_same(sampler.sample([asked[index] for index in batch]), [expected[index] for index in batch])


def sampler_of(model: Any, tokenizer: Any, **options: Any) -> TransformersSampler:
    return TransformersSampler(model, tokenizer, dataclasses.replace(OPTIONS, **options), STOP)


class Work:
    """Tokens, [rows, tokens per row], of each pass through a model."""

    def __init__(self, model: Any) -> None:
        self.passes: list[tuple[int, int]] = []
        self.masked: list[bool] = []
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, arguments: Any, options: Any) -> None:
        self.passes.append(tuple(arguments[0].shape))
        self.masked.append(options["attention_mask"] is not None)


def test_what_is_shared_is_computed_once_and_ended_rows_not_at_all(tokenizer: Any) -> None:
    model = make_base("llama", dtype=torch.float64)
    work, asked = Work(model), requests(samples=4)
    found = sampler_of(model, tokenizer).sample(asked)
    prefix, prompts, *steps = work.passes
    assert prefix == (1, 24) and prompts == (3, 8)
    assert all(width == 1 for _, width in steps) and len(steps) == max(one.tokens for one in found) - 1
    for step, (rows, _) in enumerate(steps, start=1):
        running = sum(one.tokens > step for one in found)
        assert running <= rows < running / (1 - module.LEAST_DROPPED) + 1
    assert sum(rows for rows, _ in steps) < 0.8 * len(asked) * len(steps)


def test_a_prompt_by_itself_is_not_masked(tokenizer: Any) -> None:
    model = make_base("llama")
    work = Work(model)
    sampler_of(model, tokenizer).sample([Request("ABC", seed, "sum") for seed in range(3)])
    assert work.passes[0] == (1, 3) and not any(work.masked)


def test_a_window_as_long_as_the_text_leaves_the_prefix_shared(tokenizer: Any) -> None:
    for window, first in ((44, (1, 24)), (43, (3, 32))):
        model = make_base("mistral_window", dtype=torch.float64, sliding_window=window)
        asked = requests()
        expected = [by_definition(model, tokenizer, request, OPTIONS) for request in asked]
        work = Work(model)
        assert_same(sampler_of(model, tokenizer).sample(asked), expected)
        assert work.passes[0] == first


def test_samples_differ_by_their_seed_alone(tokenizer: Any) -> None:
    sampler = sampler_of(make_base("llama"), tokenizer)
    asked = [Request("ABC", sample_seed(0, index // 2), str(index)) for index in range(12)]
    texts = [generation.text for generation in sampler.sample(asked)]
    assert texts[::2] == texts[1::2] and len(set(texts)) > 3
    assert texts == [generation.text for generation in sampler.sample(asked)]


def test_greedy_and_filtered_completions(tokenizer: Any) -> None:
    model = make_base("llama", dtype=torch.float64)
    for options in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        sampler = sampler_of(model, tokenizer, **options)
        expected = [by_definition(model, tokenizer, request, sampler.options) for request in requests()]
        assert_same(sampler.sample(requests()), expected)
    greedy = sampler_of(model, tokenizer, temperature=0.0).sample(requests())
    assert greedy[:3] == greedy[3:6]


def test_bfloat16_is_repeatable(tokenizer: Any) -> None:
    sampler = sampler_of(make_base("llama", dtype=torch.bfloat16), tokenizer)
    found = sampler.sample(requests())
    assert found == sampler.sample(requests())
    assert all(one.logprob < 0 for one in found)


def test_a_prompt_is_never_cut(tokenizer: Any) -> None:
    sampler = sampler_of(make_base("llama"), tokenizer)
    asked = [Request("A" * 52, 0, "fits"), Request("A" * 53, 0, "problem 9")]
    assert sampler.sample(asked[:1])[0].tokens <= 12
    for call in (sampler.batches, sampler.sample):
        with pytest.raises(DataError, match=r"problem 9: its prompt of 53 tokens and the 12 .* context of 64"):
            call(asked)
    with pytest.raises(DataError, match="empty: the prompt has no tokens"):
        sampler.batches([Request("", 0, "empty")])


def test_a_model_that_has_diverged_is_told_so(tokenizer: Any) -> None:
    model = make_base("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="first: the model's predictions are NaN"):
        sampler_of(model, tokenizer).sample([Request("AB", 0, "first")])


def test_where_memory_runs_out_fewer_are_sampled_at_a_time(tokenizer: Any) -> None:
    model = make_base("llama", dtype=torch.float64)
    asked = requests(samples=4)[:11]
    expected = sampler_of(model, tokenizer).sample(asked)
    rows: list[int] = []

    def has_room_for_three(model: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(arguments[0]))
        if rows[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    model.register_forward_pre_hook(has_room_for_three)
    sampler = sampler_of(model, tokenizer)
    with pytest.warns(UserWarning, match=r"sampling\.batch_size: out of memory with") as warned:
        assert_same(sampler.sample(asked), expected)
    said = [str(warning.message) for warning in warned]
    assert [text.partition(" completions")[0].rpartition(" ")[2] for text in said] == ["11", "5"]
    assert "(CUDA out of memory.): 2 at a time in the rest of this batch" in said[1]
    with pytest.warns(UserWarning, match="with 5 completions"):  # another batch is tried as a whole again
        assert_same(sampler.sample(asked[:5]), expected[:5])


def test_one_completion_that_does_not_fit_says_what_to_lower(tokenizer: Any) -> None:
    model = make_base("llama")

    def exhausted(*arguments: Any) -> None:
        torch.empty(2**60)

    model.register_forward_pre_hook(exhausted)
    with (
        pytest.warns(UserWarning, match="with 2 completions at once .*: 1 at a time"),
        pytest.raises(
            OutOfMemoryError, match=r"AB 0: .* completion alone, 26 tokens .* Lower sampling\.max_new_tokens"
        ),
    ):
        sampler_of(model, tokenizer).sample(requests()[:2])


@pytest.mark.parametrize("family", ["rwkv", "mamba"])
def test_a_model_without_keys_and_values_is_refused(family: str, tokenizer: Any) -> None:
    """Mamba's state has the cache's name since transformers 5.24, and takes padding on the left for text."""
    config = AutoConfig.for_model(family, vocab_size=40, hidden_size=16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=f"{family} has no KV cache"):
        Decoding(model, [(1, 2)], [0], 4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_under_either_name_is_taken(name: str, tokenizer: Any) -> None:
    """transformers 5.24 renamed the argument of its models, and every llama was refused as one without a cache; model
    code that comes with a checkpoint still has the old name.
    """
    model = make_base("llama", dtype=torch.float64)
    inner, seen = model.forward, []
    theirs = next(own for own in ("cache", "past_key_values") if own in inspect.signature(inner).parameters)

    def forward(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        seen.append(name in options)
        return inner(input_ids, attention_mask, position_ids, **{theirs: options.pop(name, None)}, **options)

    names = ("input_ids", "attention_mask", "position_ids", name)
    forward.__signature__ = inspect.Signature(  # that of a model with this name
        [inspect.Parameter(one, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for one in names]
    )
    model.forward = forward
    found = TransformersSampler(model, tokenizer, OPTIONS, STOP).sample(requests())
    assert seen and all(seen)
    assert_same(found, [by_definition(model, tokenizer, request, OPTIONS) for request in requests()])


def test_a_thinking_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"thinks before each token .* save its base alone"):
        make_sampler(tmp_path, OPTIONS, device="cpu")


def test_a_model_directory(tokenizer: Any, tmp_path: Path) -> None:
    base = make_base("llama")
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sampler = make_sampler(tmp_path, OPTIONS, device="cpu", stop=STOP)
    assert sampler.batches([]) == [] == sampler.sample([])
    assert sampler.sample(requests()) == sampler_of(base, tokenizer).sample(requests())
    sampler.close()
    assert start_server(tmp_path, OPTIONS, device="cpu") is None
    with pytest.raises(ConfigError, match=r"this Python has no vllm; install it in an environment of its own"):
        start_server(tmp_path, dataclasses.replace(OPTIONS, engine="vllm"), device="cpu")
