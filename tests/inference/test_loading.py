"""`load_thinking` takes whatever a user has of a model that thinks, and says of anything else what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from quietstar import CheckpointError, ConfigError, DataError, QuietStarForCausalLM
from quietstar.config.training import FinetuningOptions
from quietstar.inference.loading import AUTHORS_TOKENS, load_thinking
from quietstar.inference.prompts import Prompt
from quietstar.model.loading import character_tokenizer
from quietstar.training.checkpoint import save_checkpoint, take_snapshot
from quietstar.training.finetuning import apply_finetuning
from tests.golden_recording import load_recording
from tests.model.test_saving import write_authors_directory
from tests.model.tiny import VOCABULARY, make_base, make_ids, make_model, randomize_thinking

IDS = make_ids(1, 6)
SYMBOLS = "".join(chr(ord("0") + index) for index in range(VOCABULARY - 1))


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    character_tokenizer(SYMBOLS, "</s>").save_pretrained(directory)
    return directory


# -- a model's directory -----------------------------------------------------------------------------------------------


def test_a_model_directory(tmp_path: Path) -> None:
    model = make_model()
    loaded, tokenizer = load_thinking(save(model, tmp_path), device="cpu")
    assert not loaded.training and tokenizer.decode(tokenizer("012")["input_ids"]) == "012"
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_the_type_that_is_asked_for_leaves_rotary_frequencies_alone(tmp_path: Path) -> None:
    save(make_model(), tmp_path)
    loaded, _ = load_thinking(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.base.model.rotary_emb.inv_freq.dtype == torch.float32


def test_without_a_tokenizer_one_can_be_named(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^tokenizer: .*model has no tokenizer.*with the argument tokenizer"):
        load_thinking(tmp_path / "model", device="cpu")
    character_tokenizer(SYMBOLS).save_pretrained(tmp_path / "tokenizer")
    _, tokenizer = load_thinking(tmp_path / "model", device="cpu", tokenizer=tmp_path / "tokenizer")
    assert len(tokenizer) == len(SYMBOLS)
    with pytest.raises(ConfigError, match=r"^tokenizer: .*nowhere is not a directory; a model is a directory.*$"):
        load_thinking(tmp_path / "model", device="cpu", tokenizer=tmp_path / "nowhere")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    character_tokenizer(SYMBOLS + "xyz").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary has 40 entries; tokenizer and model do not belong together"):
        load_thinking(tmp_path, device="cpu")


def test_a_plain_model(tmp_path: Path) -> None:
    save(make_base(), tmp_path)
    with pytest.raises(
        ConfigError, match=r"a plain mistral model.*AutoModelForCausalLM.*quietstar\.train --model\.path"
    ):
        load_thinking(tmp_path, device="cpu")


# -- a run's directory -------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_of_a_run(tmp_path: Path) -> None:
    """A newer one that is damaged is passed over, aloud."""
    run = tmp_path / "run"
    models = {}
    for step, seed in ((100, 1), (200, 2), (300, 3)):
        models[step] = make_model(seed=seed)
        tokenizer = character_tokenizer(SYMBOLS, "</s>")
        save_checkpoint(run / "checkpoints", take_snapshot(step, models[step], {}, {}, tokenizer))
    loaded, _ = load_thinking(run, device="cpu")
    torch.testing.assert_close(loaded(IDS).logits, models[300](IDS).logits)
    (run / "checkpoints/step-00000300/model.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="step-00000300"):
        loaded, _ = load_thinking(run, device="cpu")
    torch.testing.assert_close(loaded(IDS).logits, models[200](IDS).logits)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a model directory \(it has no config\.json\) nor that of a"):
        load_thinking(tmp_path, device="cpu")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
        load_thinking(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="device: got 'gpu'"):
        load_thinking(tmp_path, device="gpu")


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_are_merged_into_their_base(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters are an extra")
    make_base().save_pretrained(tmp_path / "base")
    model = QuietStarForCausalLM.from_base(tmp_path / "base", start_text=[5], end_text=[6], thought_length=2)
    model = apply_finetuning(model, FinetuningOptions(lora_rank=2))
    randomize_thinking(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    loaded, _ = load_thinking(save(model.eval(), tmp_path / "adapters"), device="cpu")
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)


# -- the authors' checkpoint -------------------------------------------------------------------------------------------


def authors_checkpoint(directory: Path, named: bool) -> tuple[int, int]:
    """Their names and shards; START and END are the last two ids, which their tokenizer names and the base's hasn't."""
    write_authors_directory(directory)
    size = int(load_recording("basic").settings["vocab_size"])
    tokenizer = character_tokenizer("".join(chr(0x4E00 + index) for index in range(size - 2)))
    if named:
        assert tokenizer.add_tokens(list(AUTHORS_TOKENS), special_tokens=True) == 2
    tokenizer.save_pretrained(directory)
    return size - 2, size - 1


@pytest.mark.parametrize("named", [True, False])
def test_the_authors_checkpoint_generates_without_start_and_end(tmp_path: Path, named: bool) -> None:
    banned = authors_checkpoint(tmp_path, named)
    model, _ = load_thinking(tmp_path, device="cpu")
    assert tuple(model.banned) == banned
    ids = torch.arange(5, 11)[None].repeat(4, 1)
    start_and_end = torch.tensor(banned)
    with torch.no_grad():  # whatever the state, one of the two is the likeliest token
        direction = 100 * torch.randn(model.head.weight.shape[1], generator=torch.Generator().manual_seed(0))
        model.head.weight[banned[0]], model.head.weight[banned[1]] = direction, -direction
    assert torch.isin(model(ids).logits.argmax(-1), start_and_end).all()
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": True}
    output = model.generate(
        ids, seed=3, thought_temperature=1.0, return_dict_in_generate=True, output_thoughts=True, **options
    )
    thoughts = torch.stack([step.tokens for step in output.thinking.thoughts])
    assert thoughts.shape == (12, 4, 1, load_recording("basic").thought_length)
    assert not torch.isin(thoughts, start_and_end).any()
    assert not torch.isin(output.sequences, start_and_end).any()
    plain = model.generate(ids, think="never", **options)
    assert not torch.isin(plain, start_and_end).any()


def test_a_prompt_with_the_name_of_start(tmp_path: Path) -> None:
    start, _ = authors_checkpoint(tmp_path, named=True)
    model, tokenizer = load_thinking(tmp_path, device="cpu")
    with pytest.raises(DataError, match=rf"prompt 1: contains '<\|startthought\|>', token {start}, which"):
        Prompt("一<|startthought|>", "prompt 1").encode(tokenizer, model.banned)


def test_the_authors_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from the hub's cache, without a network; transformers alone would make a plain Mistral of it."""
    repository = tmp_path / "models--someone--quietstar"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    banned = authors_checkpoint(snapshot, named=True)
    names = {file.name: load_file(file) for file in snapshot.glob("*.safetensors")}
    weight_map = {tensor: file for file, tensors in names.items() for tensor in tensors}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, _ = load_thinking("someone/quietstar", device="cpu")
    wanted, _ = load_thinking(snapshot, device="cpu")
    assert tuple(model.banned) == banned
    torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits)
    with pytest.raises(ConfigError, match="someone/else"):
        load_thinking("someone/else", device="cpu")
