"""Arguments that cannot be used are refused by name, by every method that takes them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import quietstar
from quietstar import QuietStarForCausalLM
from quietstar.errors import ConfigError, QuietStarError
from quietstar.model.adapters import add_adapters, merge_adapters
from tests.model.tiny import VOCABULARY, make_ids, make_model

IDS = make_ids(2, 7)
CALLS: dict[str, Callable[..., Any]] = {
    "generate": lambda model, ids, **more: model.generate(ids, max_new_tokens=2, **more),
    "generate without thoughts": lambda model, ids, **more: model.generate(
        ids, max_new_tokens=2, think="never", **more
    ),
    "forward": lambda model, ids, **more: model(ids, **more),
    "think": lambda model, ids, **more: model.think(ids, **more),
    "predict": lambda model, ids, **more: model.predict(ids, **more),
    "learn": lambda model, ids, **more: quietstar.learn(model, ids, **more),
}


@pytest.fixture(scope="module")
def model() -> QuietStarForCausalLM:
    return make_model()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "ids",
    [
        *(IDS.float(), IDS.bool(), IDS.to(torch.uint8), IDS - 30, IDS + 30, IDS.clone().fill_(VOCABULARY)),
        *(IDS[:, :0], IDS[:0], IDS[0], IDS[None], IDS.tolist(), IDS.numpy(), "text", IDS.to("meta")),
    ],
    ids=str,
)
def test_ids_that_are_no_token_ids(model: QuietStarForCausalLM, call: str, ids: Any) -> None:
    """They ended in an IndexError, an AttributeError or a message of PyTorch's about 'indices'."""
    with pytest.raises(QuietStarError, match=r"^input_ids: "):
        CALLS[call](model, ids)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("edge", [0, VOCABULARY - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_token_id_can_be_given(model: QuietStarForCausalLM, call: str, edge: int, dtype: torch.dtype) -> None:
    CALLS[call](model, torch.full((2, 7), edge, dtype=dtype))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mask", [[[1] * 7] * 2, "x", 1, np.ones((2, 7)), torch.ones(2, 7, device="meta")], ids=str)
def test_masks_that_are_no_masks(model: QuietStarForCausalLM, call: str, mask: Any) -> None:
    with pytest.raises(QuietStarError, match=r"^attention_mask: "):
        CALLS[call](model, IDS, attention_mask=mask)


@pytest.mark.parametrize("call", ["think", "predict", "learn"])
@pytest.mark.parametrize(
    "anchors", [[], (), torch.zeros(2, 0, dtype=torch.int64), {}, [1.5], [[1], [2], [3]], [-1], [7], True], ids=str
)
def test_anchors_that_are_no_positions(model: QuietStarForCausalLM, call: str, anchors: Any) -> None:
    with pytest.raises(QuietStarError, match=r"^anchors: "):
        CALLS[call](model, IDS, anchors=anchors)


@pytest.mark.parametrize("value", [1e-40, 5e-324, 0, -1, float("nan"), float("inf"), "1", True])
def test_temperatures_that_logits_cannot_be_divided_by(model: QuietStarForCausalLM, value: Any) -> None:
    """1e-40 gave thoughts of NaN, or a message of PyTorch's about a probability tensor."""
    with pytest.raises(ConfigError, match=r"^temperature: "):
        model.think(IDS, temperature=value)
    for think in ("always", "never"):
        with pytest.raises(ConfigError, match=r"^temperature: "):
            model.generate(IDS, max_new_tokens=1, do_sample=True, temperature=value, think=think)
    if value != 0:  # greedy
        with pytest.raises(ConfigError, match=r"^thought_temperature: "):
            model.generate(IDS, max_new_tokens=1, thought_temperature=value)


def test_a_tiny_temperature_takes_the_most_probable(model: QuietStarForCausalLM) -> None:
    assert torch.equal(model.think(IDS, temperature=1e-30).tokens, model.think(IDS, greedy=True).tokens)
    drawn = model.generate(IDS, max_new_tokens=3, do_sample=True, temperature=1e-30)
    assert torch.equal(drawn, model.generate(IDS, max_new_tokens=3))


REFUSED: dict[str, Any] = {
    "inputs_embeds": torch.zeros(2, 7, 32),
    "position_ids": torch.arange(14).view(2, 7),
    "negative_prompt_ids": IDS,
    "negative_prompt_attention_mask": np.ones((2, 7)),
    "token_type_ids": IDS,
    "assistant_model": torch.zeros(3),
    "output_hidden_states": True,
    "cache_position": torch.arange(7),
    "encoder_outputs": [IDS],
    "head_mask": np.ones(4),
    "labels": IDS,
    "max_new_token": 3,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_of_generate_that_thoughts_cannot_have(model: QuietStarForCausalLM, name: str) -> None:
    """`options.get(name)` asked a tensor whether it is true: Boolean value of Tensor is ambiguous."""
    with pytest.raises(ConfigError, match=f"^{name}: "):
        model.generate(IDS, **{"max_new_tokens": 1, name: REFUSED[name]})


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": (0, -1, 2.5, "3", True),
        "max_length": (0, -4, 9.5),
        "num_return_sequences": (0, 1.5),
        "top_k": (-1, 2.5, "3", float("nan")),
        "top_p": (0, -0.1, 1.1, float("nan"), "1"),
        "min_p": (-0.1, 1.5, float("nan"), "0", True),
        "top_h": (0, 1.01, float("inf")),
        "typical_p": (0, -1, 2, "0.5"),
        "epsilon_cutoff": (-0.1, 1, 5.0),
        "eta_cutoff": (-1e-9, 1.0, float("nan")),
        "repetition_penalty": (0, -2.0, float("inf"), float("nan"), "1.2"),
        "no_repeat_ngram_size": (-1, 1.5, "2"),
        "thoughts_per_token": (0, 1.5, True, "2"),
    }.items(),
)
def test_numbers_of_generate_out_of_range(model: QuietStarForCausalLM, name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}: "):
            model.generate(IDS, **{"do_sample": True, name: value})


@pytest.mark.parametrize(
    ("name", "whole"), [("temperature", 2), ("repetition_penalty", 2), ("min_p", 0), ("typical_p", 1), ("top_p", 1)]
)
def test_a_whole_number_is_a_number(model: QuietStarForCausalLM, name: str, whole: int) -> None:
    """transformers refused a temperature of 2: its own checks take nothing but floats."""
    options = {"max_new_tokens": 4, "do_sample": True, "seed": 3}
    found, wanted = (model.generate(IDS, **options, **{name: value}) for value in (whole, float(whole)))
    assert torch.equal(found, wanted)


def test_other_arguments_of_forward_and_think(model: QuietStarForCausalLM) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("inputs_embeds", lambda: model(inputs_embeds=torch.zeros(2, 7, 32))),
        ("inputs_embeds", lambda: model(IDS, inputs_embeds=torch.zeros(2, 7, 32))),
        ("input_ids", lambda: model()),
        ("input_ids", lambda: model.generate(IDS, input_ids=IDS, max_new_tokens=1)),
        *(("labels", lambda value=value: model(IDS, labels=value)) for value in (IDS.float(), IDS + 40, IDS - 60)),
        *(("labels", lambda value=value: model(IDS, labels=value)) for value in (IDS[:, :3], IDS.tolist())),
        *(("logits_to_keep", lambda value=value: model(IDS, logits_to_keep=value)) for value in (-1, 2.5, "x", True)),
        *(("seed", lambda value=value: model.think(IDS, seed=value)) for value in (1.5, "x", None, [1])),
        *(("tokens", lambda value=value: model.think(IDS, tokens=value)) for value in ([[1]], torch.zeros(2, 12, 2))),
        *(("tokens", lambda v=v: model.think(IDS, tokens=torch.full((2, 12, 2), v))) for v in (-1, VOCABULARY)),
        *(("thoughts_per_position", lambda v=v: model.think(IDS, thoughts_per_position=v)) for v in (0, 2.5, True)),
    ]
    for name, call in calls:
        with pytest.raises(QuietStarError, match=f"^{name}: "):
            call()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"new_num_tokens": 44},
        {"new_num_tokens": 41, "pad_to_multiple_of": 16},
        {"new_num_tokens": 44, "mean_resizing": False},
        {"new_num_tokens": 30},
        {"pad_to_multiple_of": 64},
        {"new_num_tokens": VOCABULARY},
    ],
    ids=str,
)
def test_a_resized_model_is_saved_loaded_and_generates(
    tied: bool, family: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The head of an untied base and the configuration were left behind, and what was saved could not be loaded."""
    model = make_model(family, changes={"tie_word_embeddings": tied})
    kept, thoughts = model.embedding.detach().clone(), model.thought_embedding.weight.detach().clone()
    head = model.head.weight.detach().clone()
    model.resize_token_embeddings(**arguments)
    multiple = arguments.get("pad_to_multiple_of", 1)
    rows = -(-arguments.get("new_num_tokens", VOCABULARY) // multiple) * multiple
    same = min(rows, VOCABULARY)
    assert model.embedding.shape[0] == model.head.weight.shape[0] == rows
    assert model.config.text_config.vocab_size == model.base.config.vocab_size == rows
    assert torch.equal(model.embedding[:same], kept[:same]) and torch.equal(model.head.weight[:same], head[:same])
    assert torch.equal(model.thought_embedding.weight, thoughts)
    ids = IDS.clamp_max(rows - 1)
    ids[0, 3] = rows - 1
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-3)
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    quietstar.learn(loaded, ids).loss.backward()


def test_resizing_that_would_lose_something_is_refused() -> None:
    model = make_model(banned_token_ids=[35])
    for arguments in ({"new_num_tokens": 0}, {"new_num_tokens": -3}, {"new_num_tokens": 4.0}, {"new_num_tokens": 35}):
        with pytest.raises(ConfigError, match="new_num_tokens"):
            model.resize_token_embeddings(**arguments)
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        model.resize_token_embeddings(44, pad_to_multiple_of=0)
    add_adapters(model, 2, 4)
    with pytest.raises(ConfigError, match="adapters"):
        model.resize_token_embeddings(44)
    merge_adapters(model)
    model.resize_token_embeddings(44)
    assert model.generate(IDS + 3, max_new_tokens=1).shape == (2, 8)


NUMBERS: list[dict[str, Any]] = [
    {"max_new_tokens": np.int64(2)},
    {"max_length": np.int32(9)},
    {"max_new_tokens": 2, "do_sample": True, "temperature": np.float32(0.5)},
    {"max_new_tokens": 2, "do_sample": True, "top_p": np.float32(0.5), "top_k": np.uint8(3)},
    {"max_new_tokens": 2, "do_sample": True, "min_p": np.float16(0.25), "typical_p": np.float64(0.5)},
    {"max_new_tokens": 2, "repetition_penalty": np.float32(1.5)},
    {"max_new_tokens": 2, "thoughts_per_token": np.int64(2), "thought_temperature": np.float32(1)},
    {"max_new_tokens": 2, "do_sample": True, "temperature": Fraction(1, 2), "seed": np.int64(3)},
]


@pytest.mark.parametrize("arguments", NUMBERS, ids=str)
def test_a_number_of_another_library_is_a_number(model: QuietStarForCausalLM, arguments: dict[str, Any]) -> None:
    """Those of NumPy were refused, or came to transformers, which refused them."""

    def plain(value: Any) -> Any:
        return float(value) if isinstance(value, Fraction | np.floating) else int(value)

    torch.manual_seed(0)
    found = model.generate(IDS, **arguments)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(IDS, **{name: plain(value) for name, value in arguments.items()}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", np.float64(2)),
        ("max_new_tokens", np.bool_(True)),
        ("max_new_tokens", np.int64(0)),
        ("thoughts_per_token", 100_000_000),
        ("thoughts_per_token", np.int64(1025)),
        ("thoughts_per_token", 2.0),
        ("repetition_penalty", np.float32(-1)),
        ("repetition_penalty", np.float64("nan")),
        ("repetition_penalty", "1.5"),
        ("thought_temperature", 10**400),
        ("thought_temperature", 1j),
    ],
)
def test_a_number_that_cannot_be_is_named(model: QuietStarForCausalLM, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: got .*, needs "):
        model.generate(IDS, **({"max_new_tokens": 2} | {name: value}))


@pytest.mark.parametrize("size", [np.int64(VOCABULARY + 3), np.uint16(VOCABULARY + 3), np.float64(40), True, 0, "40"])
@pytest.mark.parametrize("argument", ["new_num_tokens", "pad_to_multiple_of"])
def test_the_size_of_embeddings_may_be_a_number_of_numpy(size: Any, argument: str) -> None:
    model = make_model()
    if isinstance(size, np.integer):
        assert model.resize_token_embeddings(**{argument: size}).num_embeddings == int(size)
    else:
        with pytest.raises(ConfigError, match=f"^{argument}: got .*, needs a whole number of at least 1$"):
            model.resize_token_embeddings(**{argument: size})
