"""What the host does for a token: no more than for a token of the base, the same each time, and without waiting.

Generation of one text is bound by the host, which sends a GPU ten thousand launches for a token with a thought. The
engine once built positions and masks anew for every pass, asked three times a token for a value, made its products one
column longer each time, and in training a generator for each token of a thought: no CUDA graph could hold it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.launches import Launches, changed
from quietstar import QuietStarForCausalLM
from quietstar.model.cache import PreallocatedLayer, ThinkingCache
from quietstar.model.generation import plan_thinking
from quietstar.model.layers import decoder_layers
from quietstar.model.prediction import BLOCK
from quietstar.model.upstream import CACHE
from tests.inference.generated import LONG, PROMPTS, generate, new_tokens_of, pad_left, thinking_model, thoughts_of
from tests.model.tiny import make_model

FEW, MANY = 3, 9
ONE = PROMPTS[:1]
SAMPLED: dict[str, Any] = {"thoughts_per_token": 2, "thought_temperature": 1.0, "seed": 1}
OPTIONS: dict[str, Any] = {"thoughts_per_token": 1, "thought_temperature": None, "seed": 0}
PAUSED: dict[str, Any] = {"thinking": "pause"}
WAYS: list[tuple[str, list[list[int]], dict[str, Any], dict[str, Any]]] = [
    *((family, ONE, {}, {}) for family in ("llama", "gpt2", "gpt_neox", "gemma2", "phi3", "cohere2")),
    ("mistral", PROMPTS, {}, {}),
    ("mistral_window", PROMPTS, {}, SAMPLED),
    ("gemma2", ONE, {}, SAMPLED),
    ("gpt2", PROMPTS, {}, {"think": "every:1"}),
    ("llama", ONE, {"banned_token_ids": [3, 9]}, {"do_sample": True, **SAMPLED}),
    ("qwen3", ONE, PAUSED, {}),
    ("phi3", ONE, {"interpolation": "log_probs"}, {"thoughts_per_token": 3, "seed": 2}),
]


def count(model: QuietStarForCausalLM, call: Callable[[int], object]) -> tuple[Launches, Launches]:
    call(2)  # a model tries its base out once
    few, many = Launches(), Launches()
    for launches, tokens in ((few, FEW), (many, MANY)):
        with launches.within(model):
            call(tokens)
    return few, many


def of_a_layer(few: Launches, many: Launches) -> float:
    return (many.layer_launches - few.layer_launches) / (many.layer_passes - few.layer_passes)


def of_a_pass(few: Launches, many: Launches, layers: int) -> float:
    """Besides those of layers."""
    outside = (many.launches - many.layer_launches) - (few.launches - few.layer_launches)
    return outside * layers / (many.layer_passes - few.layer_passes)


@pytest.mark.parametrize(("family", "prompts", "changes", "settings"), WAYS)
def test_a_token_is_the_same_few_launches_each_time(
    family: str, prompts: list[list[int]], changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    """A pass costs what one of the base does; the two launches that differ copy the new token from the growing text."""
    prompts = [[token for token in prompt if token != 9] for prompt in prompts]
    model = thinking_model(family, **changes)
    few, many = count(model, lambda tokens: generate(model, prompts, tokens, **settings))
    plain: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, **pad_left(prompts)}
    base = count(model, lambda tokens: model.base.generate(max_new_tokens=tokens, **plain))
    layers = int(model.base.config.num_hidden_layers)
    streams = settings.get("thoughts_per_token", 1)
    drawing = 12 * streams if "seed" in settings else 0  # softmax, cumulative sum and search of each token of a thought
    # several tokens of a pass are put beside each other before and after the product
    assert of_a_layer(few, many) <= of_a_layer(*base) + 3
    passes = (many.layer_passes - few.layer_passes) / layers / (MANY - FEW)
    assert of_a_pass(few, many, layers) <= of_a_pass(*base, layers) + drawing + 8 / passes  # a token's own, shared
    for before, after in pairwise(many.steps()[2:]):
        assert [call.name for call in changed(before, after)] == ["aten::copy_", "aten::embedding"]
    assert many.generators == 0
    # one wait to see whether all have ended, which is transformers' own; which rows have is the other
    assert many.waits - few.waits == (MANY - FEW) * (1 if len(prompts) == 1 else 2)
    inside = sum(call.waits for step in many.steps()[1:] for call in step)
    assert inside == (MANY - 1) * (len(prompts) > 1)


def test_a_rule_that_looks_at_the_prediction_waits_for_it_once() -> None:
    model = thinking_model()
    for rule, prompts, waits in (("entropy>0", ONE, 1), ("entropy>99", ONE, 1), ("entropy>2.9", PROMPTS, 2)):
        few, many = count(model, lambda tokens, rule=rule, p=prompts: generate(model, p, tokens, think=rule))  # type: ignore[misc]  # bound
        assert many.waits - few.waits == (MANY - FEW) * (1 + waits), rule


@pytest.mark.parametrize("length", [1, 2, 5, 8, 11])
def test_thoughts_of_training_make_one_generator(length: int) -> None:
    """It was one for each token of a thought."""
    model = make_model("mistral", thought_length=length)
    launches = Launches()
    with launches.within(model):
        model.think(torch.arange(3, 15)[None], thoughts_per_position=2)
    assert launches.generators == 1
    greedy = Launches()
    with greedy.within(model):
        model.think(torch.arange(3, 15)[None], greedy=True)
    assert greedy.generators == 0


def longer_model(family: str) -> QuietStarForCausalLM:
    changes = {"n_positions": 256} if family == "gpt2" else {**LONG, "max_position_embeddings": 256}
    return make_model(family, changes=changes, thought_length=3).double()


@pytest.mark.parametrize("family", ["mistral", "mistral_window", "gpt2", "gemma2", "cohere2"])
@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_a_text_that_outgrows_a_block_goes_on(family: str, settings: dict[str, Any]) -> None:
    """Where a text gets longer than the columns that are read, the next block is taken in; the definition is a call
    that has read all of the text at once."""
    model = longer_model(family)
    prompts = [[3 + (7 * i) % 31 for i in range(BLOCK - 12)], [5 + (3 * i) % 29 for i in range(BLOCK - 17)]]
    new = 16
    output = generate(model, prompts, new, output_logits=True, **settings)
    for done in (3, 6, 7, 8, 12, 15):
        texts = [[*p, *t[:done]] for p, t in zip(prompts, new_tokens_of(output, new), strict=True)]
        asked = (settings.get(name, plain) for name, plain in OPTIONS.items())
        cache = ThinkingCache(plan_thinking(model, "always", *asked, True))
        cache.open(*pad_left(prompts).values())
        logits = model(pad_left(texts)["input_ids"], **{CACHE: cache}).logits[:, 0]
        torch.testing.assert_close(logits.float(), output.logits[done], atol=2e-6, rtol=0)
        for row in range(2):
            thoughts = cache.thinking.record.thoughts[0]
            assert thoughts is not None and thoughts.tokens[row].tolist() == thoughts_of(output, row)[done]


def test_memory_stays_where_it_is_within_a_block() -> None:
    model = longer_model("llama")
    cache = ThinkingCache(plan_thinking(model, "always", 1, None, 0, False))
    ids = torch.arange(3, 33)[None]
    model(ids, **{CACHE: cache})
    places = set()
    for token in range(3, 40):
        model(torch.tensor([[token]]), **{CACHE: cache})
        places.add(tuple(memory.data_ptr() for layer in cache.layers for memory in layer._memory))
    assert len(places) == 1


def test_what_comes_out_can_be_used_everywhere() -> None:
    """Passes run in inference mode, whose tensors can neither be written to elsewhere nor be part of a graph."""
    model = thinking_model()
    cache = ThinkingCache(plan_thinking(model, "always", 2, 1.0, 0, True))
    logits: Tensor = model(torch.tensor([[5, 6, 7]]), **{CACHE: cache}).logits
    output = generate(model, PROMPTS, 3, output_logits=True)
    thoughts = [step for step in (*cache.thinking.record.thoughts, *output.thinking.thoughts) if step is not None]
    kept = [tensor for step in thoughts for tensor in (step.rows, step.tokens, step.mixing_weight)]
    for tensor in (logits, output.sequences, *output.logits, *kept):
        assert not tensor.is_inference()
    logits[..., 3] = -1.0
    weight = torch.ones(40, requires_grad=True)
    (logits * weight).sum().backward()
    model.base.get_input_embeddings()(thoughts[0].tokens).sum().backward()
    assert weight.grad is not None


def test_growing_holds_one_layer_twice_at_most() -> None:
    """All layers' old memory stayed until the token's end, nearly as much again as the cache."""
    model = make_model("llama", changes={"max_position_embeddings": 2048, "num_hidden_layers": 8}, thought_length=3)
    held: list[tuple[int, int]] = []
    grow = PreallocatedLayer._grow

    def watched(layer: PreallocatedLayer, *arguments: Any) -> None:
        grow(layer, *arguments)
        held.append((layer.capacity, bytes_of_keys(layer._memory[0].shape[-1])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreallocatedLayer, "_grow", watched)
        generate(model, [[5, 7] * 500], 300, think="every:50")
    size = model.config.text_config.num_key_value_heads * (model.config.text_config.hidden_size // 4) * 4 * 2 * 8
    assert len({capacity for capacity, _ in held}) > 1
    for capacity, found in held:
        assert found <= size * capacity * 1.3


def bytes_of_keys(size: int) -> int:
    """Returns the bytes of all tensors that are keys or values, each memory once."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    kept = [tensor.untyped_storage() for tensor in tensors if tensor.ndim == 4 and tensor.shape[-1] == size]
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen3", "phi3"])
@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_thought_that_overflows_costs_one_token(family: str, wrong: float) -> None:
    """Its keys and values stayed behind the text, where weight 0 times NaN is NaN: the rest of the text was lost."""
    model = make_model(family, changes={**LONG, "num_hidden_layers": 4}, thought_length=3)
    generate(model, ONE, 1)  # a model tries its base out once
    count = 0
    layer = decoder_layers(model.decoder)[0]

    def spoil(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal count
        states = output[0] if isinstance(output, tuple) else output
        count += states.shape[1] == 1  # a pass over a token of a thought
        if count == 6:
            states = states * wrong
            count += 1
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with layer.register_forward_hook(spoil):
        found = generate(model, ONE, 8, output_logits=True)
    finite = [bool(logits.isfinite().all()) for logits in found.logits]
    assert finite.count(False) == 1 and finite[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_16_bits_are_drawn_from(dtype: torch.dtype) -> None:
    """A logits processor may return them; in float16 the cumulative probabilities overflowed."""
    model = thinking_model("llama")
    settings: dict[str, Any] = {"do_sample": True, "seed": 3, "think": "never"}
    rounded = [lambda ids, scores: scores.to(dtype).float()]
    wanted = new_tokens_of(generate(model, ONE, 12, logits_processor=rounded, **settings), 12)
    found = new_tokens_of(
        generate(model, ONE, 12, logits_processor=[lambda ids, scores: scores.to(dtype)], **settings), 12
    )
    assert found == wanted and len(set(found[0])) > 2
