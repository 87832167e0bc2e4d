"""Adapters on the base: the gradients of the recorded pass, and a small checkpoint that gives everything back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quietstar import CheckpointError, ConfigError, QuietStarForCausalLM
from quietstar.inference.loading import load_finetuned
from quietstar.model.adapters import (
    adapter_options,
    adapter_targets,
    add_adapters,
    base_fingerprint,
    check_base,
    has_adapters,
    is_adapter_checkpoint,
    linear_layers,
    load_trained_state,
    merge_adapters,
    read_adapters,
    save_finetuned,
    trained_state,
)
from quietstar.objective.learning import learn
from tests.model.tiny import assert_same_gradients, gradients, make_base, make_ids, make_model

pytest.importorskip("peft", reason="adapters are an extra")

IDS = make_ids(2, 6)
FAMILIES = ["mistral", "gpt2", "gpt_neox", "phi3"]


def adapted_model(family: str = "mistral", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model whose adapters have moved."""
    model = make_model(family, dtype=dtype, **changes)
    add_adapters(model, rank=2, alpha=4.0)
    move_adapters(model)
    return model


def move_adapters(model: QuietStarForCausalLM) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in trained_state(model).items():
            if ".lora_B." in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def saved_base(directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    make_base(dtype=dtype, **changes).save_pretrained(directory)
    return directory


def from_directory(directory: Path, dtype: torch.dtype = torch.float32) -> QuietStarForCausalLM:
    """A model with moved adapters whose base comes from a directory."""
    model = QuietStarForCausalLM.from_base(
        directory, start_text=[5], end_text=[6], dtype=dtype, thought_length=2, lookahead=3, banned_token_ids=[3]
    )
    with torch.no_grad():
        model.mixing_head.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    add_adapters(model, rank=2, alpha=3.0)
    move_adapters(model)
    return model.eval()


def base_weights(model: QuietStarForCausalLM) -> dict[str, Tensor]:
    state = model.base.state_dict()
    return {name.replace(".base_layer.", "."): value.clone() for name, value in state.items() if ".lora_" not in name}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_thoughts_give_the_plain_gradients(family: str) -> None:
    model = adapted_model(family, dtype=torch.float64).train()
    found = {}
    for reuse in (True, False):
        model.zero_grad()
        learn(model, IDS, seed=3, reuse_sampling_pass=reuse).loss.backward()
        found[reuse] = gradients(model)
    assert_same_gradients(found[True], found[False], 1e-10)
    assert found[True].keys() == trained_state(model).keys()
    assert all(bool(gradient.abs().sum() > 0) for gradient in found[True].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_adapters_change_nothing(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    before = model(IDS).logits
    add_adapters(model, rank=2, alpha=4.0)
    assert type(model) is QuietStarForCausalLM and has_adapters(model)
    assert torch.equal(model(IDS).logits, before)
    assert {tensor.dtype for name, tensor in trained_state(model).items() if "lora" in name} == {dtype}


def test_only_what_is_trained_moves() -> None:
    model = adapted_model(dtype=torch.bfloat16).train()
    frozen = base_weights(model)
    before = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        learn(model, IDS, seed=step).loss.backward()
        optimizer.step()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in base_weights(model).items())
    moved = {name for name, tensor in trained_state(model).items() if not torch.equal(tensor, before[name])}
    assert moved == before.keys()


def test_the_random_half_of_the_adapters_is_always_the_same() -> None:
    one, other = make_model(), make_model()
    add_adapters(one, rank=2, alpha=4.0)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    add_adapters(other, rank=2, alpha=4.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in trained_state(one).items():
        assert torch.equal(tensor, trained_state(other)[name]), name


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_matrix_of_the_layers_and_no_other(family: str) -> None:
    model = make_model(family)
    targets = adapter_targets(model, "all-linear")
    assert not any("lm_head" in name or "embed" in name for name in targets)
    matrices = {name for name, p in model.base.named_parameters() if p.ndim == 2 and ".0." in name}
    assert {f"{name}.weight" for name in targets if ".0." in name} == matrices
    add_adapters(model, rank=2, alpha=4.0)
    assert {name.partition(".lora_A")[0] for name, _ in model.base.named_parameters() if ".lora_A" in name} == set(
        targets
    )
    assert list(linear_layers(model)) == targets


def test_targets_by_name() -> None:
    model = make_model()
    assert adapter_targets(model, "v_proj, layers.1.mlp.up_proj") == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]
    for names, message in (
        (
            "q_prj",
            r"lora_targets: mistral has no linear layer 'q_prj' \(did you mean q_proj\?\).*down_proj",
        ),
        ("lm_head", r"no linear layer 'lm_head'.*decoder layers are down_proj, gate_proj, k_proj"),
        ("proj", "no linear layer 'proj'"),
        (" , ", "needs all-linear or names of layers"),
        ("all-linear,q_proj", "needs all-linear or names of layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapter_targets(model, names)


def test_adapters_are_added_once() -> None:
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapters(adapted_model(), rank=2, alpha=4.0)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"finetuning\.lora_rank: adapters need peft.*install 'quietstar\[peft\]'"):
        add_adapters(make_model(), rank=2, alpha=4.0)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    base = saved_base(tmp_path / "base", dtype=dtype, tie_word_embeddings=tied)
    model = from_directory(base, dtype)
    save_finetuned(model, tmp_path / "saved")
    assert is_adapter_checkpoint(tmp_path / "saved") and not is_adapter_checkpoint(base)
    loaded = load_finetuned(tmp_path / "saved")
    assert type(loaded) is QuietStarForCausalLM and not loaded.training
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.thought_length == 2 and loaded.generation_config.suppress_tokens == [3]
    embeddings = [loaded.base.get_input_embeddings().weight, loaded.base.get_output_embeddings().weight]
    assert (embeddings[0] is embeddings[1]) == tied
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trained_state(model).keys()

    merged = load_finetuned(tmp_path / "saved", merge=True)
    assert not has_adapters(merged) and all(p.requires_grad for p in merged.parameters())
    # the base's: rounding may turn a thought into another one
    ours, theirs = merged.base(IDS).logits.detach(), model.base(IDS).logits.detach()
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < (1e-5 if dtype == torch.float32 else 0.02)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(whole(IDS).logits, merged(IDS).logits)


def test_a_second_round_trip_changes_no_file(tmp_path: Path) -> None:
    save_finetuned(from_directory(saved_base(tmp_path / "base")), tmp_path / "one")
    save_finetuned(load_finetuned(tmp_path / "one"), tmp_path / "two")
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert {str(name) for name in names} >= {"config.json", "thoughts.safetensors", "adapter/adapter_model.safetensors"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_only_what_is_trained_is_written(tmp_path: Path) -> None:
    model = from_directory(saved_base(tmp_path / "base"))
    save_finetuned(model, tmp_path / "saved")
    files = [*(tmp_path / "saved").rglob("*.safetensors")]
    stored = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert stored == sum(tensor.numel() for tensor in trained_state(model).values())
    assert read_adapters(tmp_path / "saved").keys() == trained_state(model).keys()


def test_copies_can_be_written_while_the_model_trains_on(tmp_path: Path) -> None:
    model = from_directory(saved_base(tmp_path / "base"))
    copies = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    with torch.no_grad():
        for tensor in trained_state(model).values():
            tensor.add_(1.0)
    save_finetuned(model, tmp_path / "saved", copies)
    loaded = trained_state(load_finetuned(tmp_path / "saved"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in copies.items())


def test_adapters_on_a_model_that_thinks_already(tmp_path: Path) -> None:
    """Of the base directory only the base is used: START, END and the mixing head are those of the checkpoint."""
    make_model(thought_length=1).save_pretrained(tmp_path / "thinking")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "thinking")
    model.config.thought_length = 3
    add_adapters(model, rank=2, alpha=4.0, targets="q_proj")
    move_adapters(model)
    with torch.no_grad():
        model.thought_embedding.weight.add_(1.0)
    save_finetuned(model, tmp_path / "saved")
    loaded = load_finetuned(tmp_path / "saved")
    assert loaded.config.thought_length == 3
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_peft_puts_the_adapters_on_the_plain_base(tmp_path: Path) -> None:
    import peft

    base = saved_base(tmp_path / "base")
    model = from_directory(base)
    save_finetuned(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved/adapter")
    torch.testing.assert_close(plain.eval()(IDS).logits, model.base(IDS).logits, atol=1e-5, rtol=1e-5)
    assert float((plain(IDS).logits - plain.unload()(IDS).logits).abs().max()) > 0.1


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    model = from_directory(base)
    save_finetuned(model, tmp_path / "saved")
    check_base(model, tmp_path / "saved")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base of its adapters can't be loaded.*base="):
        load_finetuned(tmp_path / "saved")
    found = load_finetuned(tmp_path / "saved", base=moved)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    assert adapter_options(found).base_model_name_or_path == str(moved)
    save_finetuned(found, tmp_path / "saved")
    assert torch.equal(load_finetuned(tmp_path / "saved")(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match="trained on a base with other weights"):
        load_finetuned(tmp_path / "saved", base=make_base(seed=1))


def test_a_base_from_nowhere_has_to_be_given(tmp_path: Path) -> None:
    model = adapted_model()
    save_finetuned(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not name the base.*base="):
        load_finetuned(tmp_path)
    assert torch.equal(load_finetuned(tmp_path, base=make_base())(IDS).logits, model(IDS).logits)


def test_a_merged_base_is_no_longer_that_of_a_file(tmp_path: Path) -> None:
    model = from_directory(saved_base(tmp_path / "base"))
    before = base_fingerprint(model)
    logits = model(IDS).logits
    merge_adapters(model)
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    assert base_fingerprint(model) != before
    add_adapters(model, rank=1, alpha=1.0)
    assert adapter_options(model).base_model_name_or_path is None


def drop(name: str, file: Path) -> None:
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)


LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
DAMAGE = {
    r"adapter_config\.json: cannot be read": lambda d: (d / "adapter/adapter_config.json").write_text("{}"),
    r"adapter_model\.safetensors: cannot be read": lambda d: (d / "adapter/adapter_model.safetensors").write_text("x"),
    r"thoughts\.safetensors: cannot be read": lambda d: (d / "thoughts.safetensors").unlink(),
    r"needs base\.model\.layers\.0\.mlp\.up_proj\.lora_A": lambda d: drop(
        LORA, d / "adapter/adapter_model.safetensors"
    ),
    "needs thought_embedding.weight": lambda d: drop("thought_embedding.weight", d / "thoughts.safetensors"),
    r"config\.json": lambda d: (d / "config.json").unlink(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    save_finetuned(from_directory(saved_base(directory / "base")), directory / "saved")
    return directory / "saved"


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_checkpoints(saved: Path, tmp_path: Path, message: str) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "copy"))
    DAMAGE[message](directory)
    with pytest.raises(CheckpointError, match=message):
        load_finetuned(directory)


def test_state_of_other_adapters_is_refused() -> None:
    model = adapted_model()
    state = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    name = "base.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    for wrong, message in (
        ({key: tensor for key, tensor in state.items() if key != name}, f"the model needs {name}"),
        (state | {"base.other": torch.zeros(1)}, "the model has no base.other"),
        (state | {name: state[name][:1]}, r"q_proj.*is torch\.float32 \[1, 32\], the model needs .* \[2, 32\]"),
        (state | {name: state[name].bfloat16()}, r"is torch\.bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_trained_state(model, wrong)


def test_auto_model_puts_base_and_adapters_together(tmp_path: Path) -> None:
    model = from_directory(saved_base(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is QuietStarForCausalLM and torch.equal(loaded(IDS).logits, model(IDS).logits)
