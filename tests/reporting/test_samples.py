"""Sampled thoughts are those of the model, at places that stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quietstar import QuietStarForCausalLM
from quietstar.demos.corpus import SYMBOLS
from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.training.run import AFTER, BEFORE, sample_thoughts, write_samples
from tests.model.tiny import randomize_thinking

TOKENIZER = character_tokenizer()


def thinking_model(**options: Any) -> QuietStarForCausalLM:
    settings = {"thought_length": 3, "lookahead": 2, "backend": "torch", **options}
    model = QuietStarForCausalLM.from_base(character_model(0), TOKENIZER, start_text="[", end_text="]", **settings)
    randomize_thinking(model)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> QuietStarForCausalLM:
    return thinking_model()


def texts(count: int = 2, length: int = 70) -> torch.Tensor:
    return torch.randint(0, len(SYMBOLS), (count, length), generator=torch.Generator().manual_seed(1))


def text_of(ids: list[int]) -> str:
    return "".join(SYMBOLS[token] for token in ids)


def test_text_thought_and_numbers_belong_together(model: QuietStarForCausalLM) -> None:
    tokens = texts()
    samples = sample_thoughts(model, TOKENIZER, tokens, None, "all", 20, seed=3)
    thoughts = model.think(tokens, anchors="all", thoughts_per_position=1, seed=3)
    with torch.no_grad():
        logprob = model.base(tokens).logits.log_softmax(-1)
    assert len({(one["text"], one["position"]) for one in samples}) == 20
    for one in samples:
        row, place = one["text"], one["position"]
        ids = tokens[row].tolist()
        cut = "…" if place + 1 > BEFORE else ""
        assert one["before"] == cut + text_of(ids[max(0, place + 1 - BEFORE) : place + 1])
        assert one["after"] == text_of(ids[place + 1 : place + 1 + AFTER])
        assert one["thought"] == text_of(thoughts.tokens[row, place].tolist())
        assert one["base_nll"] == pytest.approx(-float(logprob[row, place, ids[place + 1]]), abs=1e-4)
        assert one["talk_nll"] != one["base_nll"] and one["mixing_weight"] != 0
    assert any(one["before"].startswith("…") for one in samples)


def test_the_places_stay_while_the_thoughts_change(model: QuietStarForCausalLM) -> None:
    tokens = texts(2, 30)
    before = model.thought_embedding.weight.detach().clone()
    one = sample_thoughts(model, TOKENIZER, tokens, None, "every:2", 12, seed=3)
    try:
        with torch.no_grad():
            model.thought_embedding.weight.mul_(30)
        two = sample_thoughts(model, TOKENIZER, tokens, None, "every:2", 12, seed=3)
    finally:
        with torch.no_grad():
            model.thought_embedding.weight.copy_(before)
    assert [(a["text"], a["position"]) for a in one] == [(b["text"], b["position"]) for b in two]
    assert [a["thought"] for a in one] != [b["thought"] for b in two]
    assert all(a["position"] % 2 == 0 for a in one)
    assert sample_thoughts(model, TOKENIZER, tokens, None, "every:2", 12, seed=3) == one


def test_padding_is_never_shown(model: QuietStarForCausalLM) -> None:
    tokens = texts(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, 12:] = 0
    mask[1, :5] = 0
    samples = sample_thoughts(model, TOKENIZER, tokens, mask, "all", 999, seed=3)
    places = sorted((one["text"], one["position"]) for one in samples)
    assert places == [(0, place) for place in range(11)] + [(1, place) for place in range(5, 19)]
    whole = {0: text_of(tokens[0, :12].tolist()), 1: text_of(tokens[1, 5:].tolist())}
    for one in samples:
        assert whole[one["text"]].startswith(one["before"] + one["after"])


def test_documents_of_a_text_are_not_mixed(model: QuietStarForCausalLM) -> None:
    tokens = texts(1, 20)
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 2
    samples = sample_thoughts(model, TOKENIZER, tokens, mask, "all", 999, seed=3)
    first, second = text_of(tokens[0, :9].tolist()), text_of(tokens[0, 9:].tolist())
    assert sorted(one["position"] for one in samples) == [place for place in range(19) if place != 8]
    for one in samples:
        assert (first if one["position"] < 9 else second).startswith(one["before"] + one["after"])


def test_a_pause_has_no_text() -> None:
    samples = sample_thoughts(thinking_model(thinking="pause"), TOKENIZER, texts(1, 12), None, "all", 2, seed=3)
    assert [one["thought"] for one in samples] == [None, None]


def test_the_file_is_whole_and_found_by_its_step(model: QuietStarForCausalLM, tmp_path: Path) -> None:
    samples = sample_thoughts(model, TOKENIZER, texts(), None, "entropy:4", 5, seed=3)
    path = write_samples(tmp_path, 100, samples)
    assert path == tmp_path / "samples" / "step-00000100.json"
    assert json.loads(path.read_text()) == {"step": 100, "samples": samples}
    with pytest.raises(ValueError, match="JSON"):
        write_samples(tmp_path, 100, [{"reward": float("nan")}])
    assert json.loads(path.read_text())["samples"] == samples
    assert [file.name for file in path.parent.iterdir()] == [path.name]
