"""Frozen parameters, adapters that come with a model, and gradient checkpointing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar.config.training import FinetuningOptions
from quietstar.data.batches import Batch
from quietstar.errors import CheckpointError, ConfigError
from quietstar.inference.loading import load_finetuned
from quietstar.model.adapters import (
    base_fingerprint,
    has_adapters,
    load_trained_state,
    read_adapters,
    save_finetuned,
    trained_state,
)
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.objective.learning import learn
from quietstar.training.finetuning import apply_finetuning, freeze_parameters, set_gradient_checkpointing
from quietstar.training.optimizer import MasterAdamW, build_optimizer
from quietstar.training.step import StepResult
from quietstar.training.step_functions import language_modeling_step
from tests.model.tiny import assert_same_gradients, gradients, make_base, make_ids, make_model
from tests.training.helpers import options, trainer

IDS = make_ids(2, 7)


def finetuned(dtype: torch.dtype = torch.float32, **values: Any) -> QuietStarForCausalLM:
    return apply_finetuning(make_model(dtype=dtype), FinetuningOptions(**values)).train()


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_by_default_everything_is_trained() -> None:
    assert all(parameter.requires_grad for parameter in finetuned().parameters())


def test_frozen_patterns() -> None:
    model = finetuned(freeze="base.model.embed_tokens.*, base.model.layers.[0-0].*")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all("embed_tokens" in name or "model.layers.0." in name for name in frozen)
    assert len(frozen) == 1 + sum("model.layers.0." in name for name, _ in model.named_parameters())


def test_the_whole_base_can_be_frozen() -> None:
    model = finetuned(freeze="base.*")
    trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"thought_embedding", "mixing_head"}


def test_language_modelling_needs_something_of_the_base_to_train() -> None:
    given = FinetuningOptions(freeze="base.*")
    with pytest.raises(ConfigError, match=r"finetuning\.freeze: got 'base\.\*', which freezes the whole base.*"):
        apply_finetuning(make_model(), given, "language_modeling")


def test_tied_weights_are_frozen_by_either_name() -> None:
    model = make_model(changes={"tie_word_embeddings": True})
    freeze_parameters(model, "base.lm_head.*")
    assert not model.base.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("base.model.layers.0.atention.*", r"'base\.model\.layers\.0\.atention\.\*' matches no parameter.*layers\.0\."),
        ("lm_head.weight", r"matches no parameter; there are, for example, .*base\.lm_head\.weight"),
        ("base.model.norm.weight,*", r"'\*' matches thought_embedding\.weight.*always trained; base\.\* is all"),
        ("mixing_head.layers.0.*", r"matches mixing_head\.layers\.0\.weight"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"finetuning\.freeze: .*" + message):
        freeze_parameters(model, pattern)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_and_patterns_exclude_each_other() -> None:
    pytest.importorskip("peft", reason="adapters are an extra")
    with pytest.raises(ConfigError, match=r"finetuning\.freeze: got 'base\.\*' together with finetuning\.lora_rank 2"):
        finetuned(lora_rank=2, freeze="base.*")


# -- adapters ----------------------------------------------------------------------------------------------------------


def take_steps(model: QuietStarForCausalLM, optimizer: MasterAdamW, steps: range) -> None:
    for step in steps:
        optimizer.backward(learn(model, IDS, seed=step).loss)
        optimizer.clip(optimizer.gradient_norms())
        optimizer.step(1e-2)
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_run_with_adapters_resumes_from_its_small_checkpoint(tmp_path: Path, kind: Any) -> None:
    """bfloat16: the adapters' masters come from the optimizer's state, the rest from the files."""
    pytest.importorskip("peft", reason="adapters are an extra")
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the 8-bit optimizer is an extra")
    given = options(optimizer=kind)
    model = finetuned(torch.bfloat16, lora_rank=4)
    base = base_fingerprint(model)
    optimizer = build_optimizer(model, given)
    assert {name for group in optimizer.groups for name, _ in group.parameters} == trained_state(model).keys()
    take_steps(model, optimizer, range(2))
    save_finetuned(model, tmp_path)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    take_steps(model, optimizer, range(2, 4))

    resumed = finetuned(torch.bfloat16, lora_rank=4)
    continued = build_optimizer(resumed, given)
    load_trained_state(resumed, read_adapters(tmp_path))
    continued.load_state_tensors(state)
    take_steps(resumed, continued, range(2, 4))
    for name, tensor in trained_state(model).items():
        assert torch.equal(trained_state(resumed)[name], tensor), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(continued.state_tensors()[name], tensor), name
    assert base_fingerprint(resumed) == base


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_the_trainer_resumes_a_run_with_adapters(tmp_path: Path, kind: Any) -> None:
    """Three steps and three more are six; a checkpoint holds none of the base, and its base is checked."""
    pytest.importorskip("peft", reason="adapters are an extra")
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="the 8-bit optimizer is an extra")
    data, given = make_ids(8, 7), options(optimizer=kind, schedule="constant")

    def compute_step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
        output = learn(model, batch.tokens, seed=seed, first_text=batch.first, texts_in_step=batch.step_size)
        return StepResult(output.loss)

    def run(name: str, steps: int, model: QuietStarForCausalLM) -> QuietStarForCausalLM:
        trainer(tmp_path / name, model, compute_step, data=data, options_=replace(given, steps=steps)).run()
        return model

    whole = run("whole", 6, finetuned(torch.bfloat16, lora_rank=4))
    run("cut", 3, finetuned(torch.bfloat16, lora_rank=4))
    resumed = run("cut", 6, finetuned(torch.bfloat16, lora_rank=4))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    checkpoint = tmp_path / "cut/checkpoints/step-00000006"
    assert read_adapters(checkpoint).keys() == trained_state(whole).keys()
    assert not list(checkpoint.glob("model*.safetensors"))
    loaded = load_finetuned(checkpoint, base=make_base(dtype=torch.bfloat16))
    assert torch.equal(loaded(IDS).logits, whole.eval()(IDS).logits)
    other = finetuned(torch.bfloat16, lora_rank=4)
    with torch.no_grad():
        other.base.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="trained on a base with other weights"):
        run("cut", 9, other)


def test_a_model_that_comes_with_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters are an extra")
    given = FinetuningOptions(lora_rank=2, lora_targets="q_proj,v_proj")
    save_finetuned(apply_finetuning(make_model(), given), tmp_path)

    def loaded() -> QuietStarForCausalLM:
        return load_finetuned(tmp_path, base=make_base())

    model = loaded()
    before = {name: tensor.clone() for name, tensor in trained_state(model).items()}
    apply_finetuning(model, given)
    assert before.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_state(model).items())
    for changes, message in (
        ({"lora_rank": 0}, r"lora_rank: the model has adapters of rank 2 already\. Set it to 2 .* merge them first"),
        ({"lora_rank": 3}, "lora_rank 2, not 3; lora_alpha 4, not 6"),
        ({"lora_alpha": 1.5}, r"lora_alpha 4, not 1\.5"),
        ({"lora_targets": "all-linear"}, "lora_targets q_proj,v_proj, not all-linear"),
    ):
        with pytest.raises(ConfigError, match=message):
            apply_finetuning(loaded(), replace(given, **changes))
    merged = load_finetuned(tmp_path, base=make_base(), merge=True)
    assert not has_adapters(apply_finetuning(merged, FinetuningOptions()))


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def thinking_loss(model: QuietStarForCausalLM) -> Tensor:
    return learn(model, IDS, seed=2, reuse_sampling_pass=False).loss


def recorded_loss(model: QuietStarForCausalLM) -> Tensor:
    return learn(model, IDS, seed=2).loss


def text_loss(model: QuietStarForCausalLM) -> Tensor:
    return language_modeling_step(model, Batch(IDS, None, ()), 0).loss


def backward(model: QuietStarForCausalLM, compute_loss: Any) -> tuple[Tensor, dict[str, Tensor], list[bool]]:
    """The loss, all gradients, and for each run of the first layer whether it was under gradient."""
    model.zero_grad()
    runs: list[bool] = []
    handle = model.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss = compute_loss(model)
    loss.backward()
    handle.remove()
    return loss.detach(), gradients(model), runs


@pytest.mark.parametrize("compute_loss", [thinking_loss, text_loss, recorded_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    compute_loss: Any, dtype: torch.dtype, lora_rank: int
) -> None:
    if lora_rank:
        pytest.importorskip("peft", reason="adapters are an extra")
    model = finetuned(dtype, lora_rank=lora_rank)
    loss, wanted, runs = backward(model, compute_loss)
    set_gradient_checkpointing(model, True)
    found_loss, found, checkpointed_runs = backward(model, compute_loss)
    assert torch.equal(found_loss, loss)
    assert_same_gradients(found, wanted, 0.0)
    # A pass that is checkpointed runs once more, in the backward pass. The recorded one is one already.
    assert sum(checkpointed_runs) == sum(runs) + (compute_loss is not recorded_loss)
    set_gradient_checkpointing(model, False)
    assert backward(model, compute_loss)[2] == runs


def test_frozen_first_layers_are_not_computed_again() -> None:
    """Nothing below the first trained weight needs a gradient; transformers' own switch would ask for all of them."""
    model = finetuned(freeze="base.model.embed_tokens.*,base.model.layers.0.*", gradient_checkpointing=True)
    assert backward(model, text_loss)[2] == [True]
    model.eval()
    assert backward(model, thinking_loss)[0].isfinite()


def test_less_is_kept_for_the_backward_pass() -> None:
    sizes = {}
    for on in (False, True):
        model = finetuned(gradient_checkpointing=on)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = thinking_loss(model)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes[on] = sum(size for pointer, size in kept.items() if pointer not in weights)
        loss.backward()
    assert sizes[True] < 0.5 * sizes[False]
