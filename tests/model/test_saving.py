"""What is saved comes back bit by bit, and the base can be taken out again as a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM, load_authors_checkpoint
from quietstar.errors import CheckpointError
from quietstar.objective.learning import learn
from tests.golden_recording import load_recording
from tests.model.tiny import make_ids, make_model

IDS = make_ids(2, 6)


def assert_same_model(actual: QuietStarForCausalLM, expected: QuietStarForCausalLM) -> None:
    states = actual.state_dict()
    assert states.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(states[name], tensor) and states[name].dtype == tensor.dtype, name
    assert torch.equal(actual(IDS).logits, expected(IDS).logits)
    assert torch.equal(learn(actual, IDS, seed=1).loss, learn(expected, IDS, seed=1).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_through_auto_model(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {
        "thought_length": 3,
        "lookahead": 2,
        "thoughts_per_position": 3,
        "interpolation": "log_probs",
        "mixing_activation": "sigmoid",
        "initial_mixing_weight": 0.3,
        "embedding_scale": 2.0,
        "temperature": 0.7,
        "banned_token_ids": [3, 4],
    }
    model = make_model(dtype=dtype, changes={"tie_word_embeddings": tied}, **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is QuietStarForCausalLM
    assert loaded.dtype == dtype
    for name, value in settings.items():
        assert getattr(loaded.config, name) == value, name
    weights = [loaded.base.get_input_embeddings().weight, loaded.base.get_output_embeddings().weight]
    assert (weights[0] is weights[1]) == tied
    assert_same_model(loaded.eval(), model)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "granite", "qwen2_window", "gpt_neox"])
def test_round_trip_of_other_families(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model)


def test_a_second_round_trip_changes_no_file(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gpt2", "qwen3"])
def test_the_base_leaves_as_a_plain_model(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_model(family, changes={"tie_word_embeddings": tied})
    model.base.save_pretrained(tmp_path)
    assert "quietstar" not in (tmp_path / "config.json").read_text().lower()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain) is type(model.base)
    assert plain.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain(IDS).logits, model.base(IDS).logits, atol=1e-5, rtol=0)
    base_logits = model.predict(IDS, anchors=torch.arange(6)).base_logits
    torch.testing.assert_close(plain(IDS).logits, base_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_the_base_is_the_same_plain_model_while_it_thinks(family: str) -> None:
    """Calls of `model.base` without thoughts, padding masks and caches included, are transformers' own."""
    model = make_model(family)
    plain = AutoModelForCausalLM.from_config(model.base.config, attn_implementation="eager").eval()
    plain.load_state_dict(model.base.state_dict())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for options in ({}, {"attention_mask": mask}):
        ours, theirs = model.base(IDS, **options).logits, plain(IDS, **options).logits
        real = options.get("attention_mask", torch.ones_like(IDS)).bool()
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    length = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.base.generate(IDS, **length), plain.generate(IDS, **length))


def test_from_base_takes_a_directory(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    model.base.save_pretrained(tmp_path)
    made = QuietStarForCausalLM.from_base(tmp_path, start_text=[5], end_text=[6, 7], dtype=torch.float32)
    assert made.dtype == torch.float32
    embedding = made.base.get_input_embeddings().weight
    assert torch.equal(made.thought_embedding.weight[0], embedding[5])
    assert torch.equal(made.thought_embedding.weight[1], embedding[6:8].mean(0))
    assert QuietStarForCausalLM.from_base(tmp_path, start_text=[5], end_text=[6]).dtype == torch.bfloat16


def test_start_and_end_are_scaled_back() -> None:
    model = make_model()
    scaled = QuietStarForCausalLM.from_base(model.base, start_text=[5], end_text=[6], embedding_scale=100.0)
    start, end = scaled.thought_vectors()
    embedding = model.base.get_input_embeddings().weight
    torch.testing.assert_close(start, embedding[5])
    torch.testing.assert_close(end, embedding[6])


# -- the authors' checkpoints ------------------------------------------------------------------------------------------


def write_authors_directory(directory: Path) -> dict[str, Tensor]:
    recording = load_recording("basic")
    weights = recording.weights()
    config = recording.model().base.config.to_dict()
    theirs = {name: recording.settings[name] for name in ("n_ahead", "n_ahead_talk")}
    (directory / "config.json").write_text(json.dumps({**config, **theirs}))
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:5]}, directory / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[5:]}, directory / "model-00002-of-00002.safetensors")
    return weights


def test_the_authors_directory(tmp_path: Path) -> None:
    """Their names, their shards, their configuration; START and END are still the learned ones after a forward."""
    weights = write_authors_directory(tmp_path)
    recording = load_recording("basic")
    model = load_authors_checkpoint(tmp_path)
    assert (model.config.thought_length, model.config.lookahead) == (recording.thought_length, recording.lookahead)
    assert model.config.initial_mixing_weight is None and model.config.mixing_activation == "identity"
    model(recording.tensors["input_ids"][:1, :4])
    assert torch.equal(model.thought_embedding.weight[0], weights["start_embedding"][0])
    assert torch.equal(model.thought_embedding.weight[1], weights["end_embedding"][0])
    assert torch.equal(model.mixing_head.layers[4].weight, weights["talk_head.0.4.weight"])
    start, _ = model.thought_vectors()
    torch.testing.assert_close(start, 100 * weights["start_embedding"][0])
    saved = tmp_path / "ours"
    model.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(again.thought_embedding.weight, model.thought_embedding.weight)


def test_the_authors_checkpoint_in_bfloat16() -> None:
    recording = load_recording("basic")
    weights = {name: tensor.bfloat16() for name, tensor in recording.weights().items()}
    model = load_authors_checkpoint(weights, recording.model().base.config, thought_length=2, lookahead=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.thought_embedding.weight[0], weights["start_embedding"][0])
    # A model that is cast after it was built has rotary frequencies of 8 bits.
    assert model.base.model.rotary_emb.inv_freq.dtype == torch.float32


DAMAGE = {
    "start_embedding: missing": lambda w: w.pop("start_embedding"),
    "1 tensors missing, first base.model.norm.weight": lambda w: w.pop("model.norm.weight"),
    "1 tensors missing, first mixing_head.layers.0.bias": lambda w: w.pop("talk_head.0.0.bias"),
    "1 tensors unknown, first base.model.extra": lambda w: w.update({"model.extra": torch.zeros(2)}),
    "1 tensors of a wrong shape, first base.lm_head.weight": lambda w: w.update({"lm_head.weight": torch.zeros(3, 3)}),
    "end_embedding: got shape": lambda w: w.update({"end_embedding": torch.zeros(2, 3)}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_authors_checkpoints(message: str) -> None:
    recording = load_recording("basic")
    weights, config = recording.weights(), recording.model().base.config
    DAMAGE[message](weights)
    with pytest.raises(CheckpointError, match=message):
        load_authors_checkpoint(weights, config)


def test_authors_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load_authors_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="config: missing"):
        load_authors_checkpoint(load_recording("basic").weights())
    write_authors_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_authors_checkpoint(tmp_path)
    write_authors_directory(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="model-00001"):
        load_authors_checkpoint(tmp_path)
