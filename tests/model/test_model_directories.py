"""Directories of models from others: what leads out of them, and what cannot be a model, is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar.errors import CheckpointError, ConfigError, QuietStarError
from quietstar.model.adapters import OPTIONS, add_adapters
from quietstar.model.loading import load_causal_lm
from quietstar.model.modeling import QuietStarForCausalLM
from tests.model.tiny import make_base, make_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_base("llama").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "model.bin", 3, None, "gone.safetensors"]
)
def test_an_index_names_files_of_its_directory(plain: Path, name: Any) -> None:
    """`../x.safetensors` was followed."""
    shutil.copy(plain / "model.safetensors", plain.parent / "x.safetensors")
    names = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(CheckpointError, match=r"weight_map|missing"):
        load_causal_lm(plain)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl", "model.bin", "config.json"])
def test_an_index_names_no_file_that_is_not_safetensors(plain: Path, name: str) -> None:
    names = load_file(plain / "model.safetensors")
    if name != "config.json":
        shutil.move(plain / "model.safetensors", plain / name)
    (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(CheckpointError, match=r"weight_map: .*needs the name of a \.safetensors file"):
        load_causal_lm(plain)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_links_are_followed_in_the_cache_of_the_hub_alone(plain: Path, name: str) -> None:
    shutil.move(plain / name, plain.parent / "elsewhere")
    (plain / name).symlink_to(plain.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a link out"):
        load_causal_lm(plain)
    cache = plain.parent / "models--x"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(plain.parent / "elsewhere", cache / "blobs" / "hash")
    (plain / name).unlink()
    (plain / name).symlink_to("../../blobs/hash")
    (cache / "snapshots").mkdir()
    shutil.move(plain, cache / "snapshots" / "revision")
    load_causal_lm(cache / "snapshots" / "revision")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in (-32, 0, "32", None, 32.0, True, [32])),
        *(("num_hidden_layers", value) for value in (-1, None, {})),
        *(("num_attention_heads", value) for value in (3, 0)),
        *(("num_key_value_heads", value) for value in (3, -1)),
        *(("vocab_size", value) for value in (-40, "40")),
        *(("model_type", value) for value in (None, 3, "")),
    ],
)
def test_a_field_of_the_configuration_is_named(plain: Path, field: str, value: Any) -> None:
    config = json.loads((plain / "config.json").read_text()) | {"head_dim": None, field: value}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: got "):
        load_causal_lm(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_the_tensor_that_is_not_finite_is_named(plain: Path, name: str, value: float) -> None:
    """NaN weights were blamed on attention."""
    tensors = load_file(plain / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has values"):
        QuietStarForCausalLM.from_base(plain, start_text=[5], end_text=[5])
    base = make_base("llama")
    with torch.no_grad():
        base.get_parameter(name).view(-1).fill_(value)
    with pytest.raises(CheckpointError, match=f"{name}: has values"):
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[5])


@pytest.mark.parametrize("name", ["someone/else", "gpt2", "a/b-c", "org/model.v2", "x"])
def test_a_base_that_adapters_name_is_not_asked_of_the_hub(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", network)
    model = make_model("llama")
    add_adapters(model, 2, 4)
    model.save_pretrained(tmp_path)
    options = json.loads((tmp_path / OPTIONS).read_text())
    (tmp_path / OPTIONS).write_text(json.dumps(options | {"base_model_name_or_path": name}))
    with pytest.raises(QuietStarError, match="base of its adapters can't be loaded"):
        QuietStarForCausalLM.from_pretrained(tmp_path)
