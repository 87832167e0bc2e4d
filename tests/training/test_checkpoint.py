"""Checkpoints: whole or not there, and weights that come back as they were."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from quietstar.errors import CheckpointError
from quietstar.runs.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_state,
    remove_old_checkpoints,
    verify_checkpoint,
)
from quietstar.training.checkpoint import load_weights, save_checkpoint, take_snapshot
from tests.training.helpers import ToyThinker, snapshot, tiny_llama

OPTIMIZER = {"step.weight": torch.tensor(3.0)}


def _save(directory: Path, step: int, model: nn.Module | None = None) -> Path:
    return save_checkpoint(
        directory, take_snapshot(step, ToyThinker() if model is None else model, OPTIMIZER, {"note": "x"})
    )


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def _tiny_mixtral() -> MixtralForCausalLM:
    """A family whose hub names differ from its module names."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )


@pytest.mark.parametrize(
    "make",
    [
        tiny_llama,
        lambda: tiny_llama(tied=True),
        lambda: tiny_llama(torch.bfloat16, tied=True),
        ToyThinker,
        _tiny_mixtral,
    ],
    ids=["untied", "tied", "tied-bfloat16", "plain-module", "renamed-on-the-hub"],
)
def test_weights_come_back_bit_for_bit(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    _randomise(model)
    path = _save(tmp_path, 1, model)
    other = make()
    load_weights(other, path)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    path = _save(tmp_path, 1, model)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    _randomise(model)
    load_weights(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_is_a_model_directory(tmp_path: Path) -> None:
    model = tiny_llama()
    _randomise(model)
    loaded = AutoModelForCausalLM.from_pretrained(_save(tmp_path, 1, model))
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_weights_in_shards_are_found_by_their_index(tmp_path: Path) -> None:
    model = tiny_llama()
    path = _save(tmp_path, 1, model)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="10KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    other = tiny_llama()
    _randomise(other)
    load_weights(other, path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight': got '\.\./\.\./elsewhere\.safetensors', needs the name of"
    ):
        load_weights(other, path)


def test_weights_of_another_model_are_refused_before_anything_is_copied(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, ToyThinker())
    weights = load_file(path / "model.safetensors")
    for changed, message in (
        (
            {k: v for k, v in weights.items() if k != "norm.bias"},
            r"the model needs norm\.bias, which the checkpoint does",
        ),
        (weights | {"verifier.weight": torch.zeros(1)}, r"the model has no verifier\.weight"),
        (weights | {"base.bias": torch.zeros(5)}, r"base\.bias is torch\.float32 \[5\], the model needs .* \[4\]"),
        (weights | {"base.bias": torch.zeros(4).half()}, r"base\.bias is torch\.float16"),
    ):
        save_file(changed, path / "model.safetensors")
        model = ToyThinker()
        _randomise(model)
        before = snapshot(model)
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    for step in (9, 100, 20):
        _save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"
    assert load_state(tmp_path / "step-00000100") == {"format": 2, "step": 100, "note": "x"}


def _flip_a_bit(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 4
    (path / "model.safetensors").write_bytes(bytes(content))


def _link_outside(path: Path) -> None:
    (path / "optimizer.safetensors").rename(path.parent / "elsewhere")
    (path / "optimizer.safetensors").symlink_to(path.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit-flip": (_flip_a_bit, r"the content of model\.safetensors has changed"),
    "truncated": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]),
        r"model\.safetensors has \d+ bytes",
    ),
    "emptied": (lambda path: (path / "state.json").write_bytes(b""), r"state\.json has 0 bytes"),
    "file-missing": (lambda path: (path / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "file-added": (lambda path: (path / "pytorch_model.bin").touch(), r"pytorch_model\.bin does not belong to it"),
    "link": (_link_outside, r"optimizer\.safetensors is missing"),
    "manifest-missing": (lambda path: (path / "MANIFEST.json").unlink(), r"MANIFEST\.json is missing"),
    "manifest-torn": (lambda path: (path / "MANIFEST.json").write_text('{"form'), r"MANIFEST\.json: cannot be read"),
    "manifest-other": (lambda path: (path / "MANIFEST.json").write_text("{}"), r"MANIFEST\.json: not a manifest"),
    **{
        f"manifest-{kind}": (lambda path, text=text: (path / "MANIFEST.json").write_text(text), message)
        for kind, text, message in (
            ("deep", "[" * 100_000, "nested too deeply"),
            ("list", "[]", "needs a JSON object"),
            ("files-a-list", '{"format": 2, "files": []}', r"MANIFEST\.files: got \[\], needs an object"),
            ("outside", '{"format": 2, "files": {"../a": {"size": 1, "sha256": ""}}}', r"got the name '\.\./a'"),
            ("absolute", '{"format": 2, "files": {"/a": {"size": 1, "sha256": ""}}}', "got the name '/a'"),
            ("size", '{"format": 2, "files": {"a": {"size": "1", "sha256": ""}}}', r"files\.a\.size: got '1'"),
            ("negative", '{"format": 2, "files": {"a": {"size": -1, "sha256": ""}}}', r"files\.a\.size: got -1"),
            ("hash", '{"format": 2, "files": {"a": {"size": 1, "sha256": "x"}}}', r"files\.a\.sha256: got 'x'"),
        )
    },
    "manifest-empty": (
        lambda path: [
            [file.unlink() for file in path.iterdir()],
            (path / "MANIFEST.json").write_text('{"format": 2, "files": {}}'),
        ],
        r"optimizer\.safetensors is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    damage(bad)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(bad)
    with pytest.warns(
        UserWarning, match=rf"passing over a damaged checkpoint: .*{bad.name}.*{message}.*using .*{good.name}"
    ):
        assert latest_checkpoint(tmp_path) == good
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match=rf"no checkpoint is whole .*{message}"):
        latest_checkpoint(tmp_path)


def test_a_failing_save_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    first = _save(tmp_path, 1)

    class FullDisk:
        def save_pretrained(self, save_directory: str) -> None:
            (Path(save_directory) / "tokenizer.json").write_text("{")
            raise OSError("no space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(tmp_path, take_snapshot(step, ToyThinker(), OPTIMIZER, {}, FullDisk()))
    assert list(tmp_path.iterdir()) == [first]
    verify_checkpoint(first)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    (path / "state.json").unlink()
    assert _save(tmp_path, 1) == path
    verify_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_cannot_hold_is_refused_before_anything_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        save_checkpoint(tmp_path, take_snapshot(1, ToyThinker(), OPTIMIZER, {"loss": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_retention_counts_only_up_to_the_newest_step(tmp_path: Path) -> None:
    """A damaged step 50 was passed over; keeping one checkpoint must not mean keeping that one."""
    for step in (10, 20, 30, 50):
        _save(tmp_path, step)
    (tmp_path / "step-00000040.new-77").mkdir()
    (tmp_path / "step-00000040.backup").mkdir()
    (tmp_path / "notes").mkdir()
    remove_old_checkpoints(tmp_path, keep=1, newest_step=30)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [30, 50]
    assert {path.name for path in tmp_path.iterdir()} >= {"step-00000040.backup", "notes"}
    assert not (tmp_path / "step-00000040.new-77").exists()


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = _save(tmp_path, 1, tiny_llama())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == path
