"""Loading reads safetensors and nothing else, runs no code, and takes nothing that is incomplete for whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar import CheckpointError, ConfigError, QuietStarForCausalLM, UnsupportedBackboneError
from quietstar.model.loading import load_causal_lm
from tests.model.tiny import make_base, make_model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_base("llama").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def from_base(path: Path) -> QuietStarForCausalLM:
    return QuietStarForCausalLM.from_base(path, start_text=[3], end_text=[4], thought_length=2, lookahead=1)


def change_config(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_pickled_weights_are_not_read(plain: Path) -> None:
    """transformers falls back to pytorch_model.bin, a pickle, where there are no safetensors."""
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"safetensors"):
        from_base(plain)


def test_code_of_a_model_directory_is_not_run(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal transformers asks whether to run it; whoever answers yes has run it."""
    witness = plain / "ran"
    (plain / "evil.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    change_config(plain, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="can't be loaded"):
        from_base(plain)
    assert not witness.exists()


def test_a_kernel_named_in_the_configuration_is_not_fetched(plain: Path) -> None:
    change_config(plain, attn_implementation="someone/kernel")
    assert from_base(plain).base.config._attn_implementation == "quietstar"


def test_missing_weights_are_named(plain: Path) -> None:
    """transformers fills them with random numbers and a warning."""
    weights = load_file(plain / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        from_base(plain)


def test_a_thinking_model_without_its_thoughts_is_refused(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["thought_embedding.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"thought_embedding\.weight"):
        load_causal_lm(tmp_path)


def test_a_torn_file_is_one_line(plain: Path) -> None:
    file = plain / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be loaded"):
        from_base(plain)


def test_a_thinking_model_is_not_wrapped_again(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match="a thinking model already; load it with from_pretrained"):
        from_base(tmp_path)


def test_a_tied_model_misses_nothing(tmp_path: Path) -> None:
    base = make_base("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, base.get_output_embeddings().weight)
