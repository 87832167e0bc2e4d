"""What the backward pass takes from the sampling pass (`replay`) changes no gradient, and spares its products."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from quietstar import ConfigError, QuietStarForCausalLM
from quietstar.config.training import Replay
from quietstar.model.backbone import replayed_products
from quietstar.objective.learning import learn
from tests.model.tiny import (
    FAMILIES,
    NORM_BEHIND,
    assert_same_gradients,
    gradients,
    make_ids,
    make_model,
    switch_checkpointing_on,
)

STAGES: Sequence[Replay] = get_args(Replay)
RECORDING = tuple(stage for stage in STAGES if stage not in ("layers", "down"))
EXACT = 1e-10
IDS = make_ids(batch=2, length=7)
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 0]])


def backward(model: nn.Module, replay: Replay | None, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step; None has two plain passes."""
    model.zero_grad()
    options = {"reuse_sampling_pass": False} if replay is None else {"replay": replay}
    step = learn(model, arguments.pop("ids", IDS), seed=3, **options, **arguments)
    step.loss.backward()
    return step.loss.detach(), gradients(model)


def assert_two_passes(model: nn.Module, stages: Sequence[Replay], **arguments: Any) -> None:
    """Every stage has the loss and the gradients of two plain passes, in float64."""
    loss, wanted = backward(model, None, **arguments)
    for stage in stages:
        found_loss, found = backward(model, stage, **arguments)
        torch.testing.assert_close(found_loss, loss, atol=EXACT, rtol=EXACT)
        assert_same_gradients(found, wanted, EXACT)


# -- what is left out without a record ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NORM_BEHIND])
def test_down_has_the_bits_of_layers(family: str, precision: str) -> None:
    model = make_model(family, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss, wanted = backward(model, "layers")
        found_loss, found = backward(model, "down")
    assert torch.equal(loss, found_loss)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


UNUSED = {
    "mistral": {"mlp.down_proj"},
    "llama": {"mlp.down_proj"},
    "qwen3": {"mlp.down_proj"},
    "granite": {"mlp.down_proj"},  # multiplied by a number before it is added
    "phi3": {"mlp.down_proj"},
    "gpt2": {"mlp.c_proj"},
    "opt": {"fc2"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},  # side by side, both are only added
    "cohere": {"self_attn.o_proj", "mlp.down_proj"},
}


@pytest.mark.parametrize("family", UNUSED)
def test_only_products_that_are_added_at_last_are_unused(family: str) -> None:
    """By reading each family's forward."""
    model = make_model(family)
    for layer in replayed_products(model, "down"):
        assert set(layer.unused) == UNUSED[family]
        assert not layer.recorded


@pytest.mark.parametrize("family", [*NORM_BEHIND, "opt"])
def test_down_is_refused_where_a_norm_follows(family: str) -> None:
    changes = {"do_layer_norm_before": False} if family == "opt" else {}
    model = make_model(family, changes=changes)
    with pytest.raises(ConfigError, match=f"replay: got down, .*{family}.* needs layers, .* such as mlp"):
        learn(model, IDS, replay="down")
    for stage in RECORDING:
        for layer in replayed_products(model, stage):
            assert not layer.unused


def test_a_norm_that_comes_later_is_seen() -> None:
    """A user's own layer: what is known of a family does not hold for it."""
    model = make_model(dtype=torch.float64)
    down = model.decoder.layers[1].mlp.down_proj
    model.decoder.layers[1].mlp.down_proj = nn.Sequential(down, nn.LayerNorm(32, dtype=torch.float64))
    assert [set(layer.unused) for layer in replayed_products(model, "down")] == [{"mlp.down_proj"}, set()]
    assert_two_passes(model, STAGES)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"replay: got 'most', needs one of layers, down, mlp"):
        learn(make_model(), IDS, replay="most")  # type: ignore[arg-type]


# -- what is recorded --------------------------------------------------------------------------------------------------

RECORDED: dict[str, tuple[set[str], set[str]]] = {
    "mistral": ({"mlp.gate_proj", "mlp.up_proj"}, {f"self_attn.{x}_proj" for x in "qkvo"}),
    "gemma2": ({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}, {f"self_attn.{x}_proj" for x in "qkvo"}),
    "phi3": ({"mlp.gate_up_proj"}, {"self_attn.qkv_proj", "self_attn.o_proj"}),
    "gpt2": ({"mlp.c_fc"}, {"attn.c_attn", "attn.c_proj"}),
    "gpt_neox": ({"mlp.dense_h_to_4h"}, {"attention.query_key_value"}),
    "cohere": ({"mlp.gate_proj", "mlp.up_proj"}, {f"self_attn.{x}_proj" for x in "qkv"}),
    "opt": (set(), {f"self_attn.{x}_proj" for x in "qkv"} | {"self_attn.out_proj"}),  # its fc1 has other tokens: B*N
}


@pytest.mark.parametrize("family", RECORDED)
def test_products_of_each_stage(family: str) -> None:
    """By reading each family's forward."""
    mlp, attention = RECORDED[family]
    model = make_model(family)
    stages: tuple[tuple[Replay, set[str]], ...] = (("mlp", mlp), ("linears", mlp | attention), ("all", mlp | attention))
    for stage, wanted in stages:
        assert [set(layer.recorded) for layer in replayed_products(model, stage)] == [wanted] * 2


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("family", ["mistral_window", "gpt2", "gemma2", "phi3", "gpt_neox"])
def test_stages_with_padding_and_documents(family: str) -> None:
    stages = STAGES if family not in NORM_BEHIND else RECORDING
    assert_two_passes(make_model(family, dtype=torch.float64), stages, attention_mask=MASK, anchors="every:2")


@pytest.mark.parametrize("stage", RECORDING)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_exact_as_the_plain_step(autocast: bool, stage: Replay) -> None:
    """bfloat16 weights, or float32 weights under autocast: the error against float32 is that of two plain passes."""
    thoughts = make_model().think(IDS, seed=2)
    _, truth = backward(make_model(), None, thoughts=thoughts)
    model = make_model(dtype=torch.float32 if autocast else torch.bfloat16)
    errors = {}
    for replay in (stage, None):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, found = backward(model, replay, thoughts=thoughts)
        squares = [((found[name].float() - truth[name]) ** 2).sum() / (truth[name] ** 2).sum() for name in truth]
        errors[replay] = float(torch.stack(squares).mean().sqrt())
    assert errors[stage] < 1.25 * errors[None] + 1e-3


class Products(TorchDispatchMode):
    """Counts the FLOPs of the linear layers' products, by PyTorch's formulas, and attention forwards over the text."""

    flops = attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        self.attentions += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return output


@pytest.mark.parametrize("family", ["mistral", "gpt2", "phi3"])
def test_the_backward_pass_computes_no_product_again(family: str) -> None:
    """A product counts once forward and twice backward: what a stage spares follows from the sizes of its weights."""
    model = make_model(family)
    tokens = IDS.numel() + IDS.shape[0] * (IDS.shape[1] - 1) * 2 * model.config.stream_length
    again = {}
    for stage in STAGES:
        loss = learn(model, IDS, replay=stage).loss
        with Products() as counted:
            loss.backward()
        again[stage] = counted.flops
        assert counted.attentions == (0 if stage == "all" else 2)
    for stage in STAGES[1:]:
        layers = replayed_products(model, stage)
        modules = [module for layer in layers for module in (*layer.recorded.values(), *layer.unused.values())]
        assert again["layers"] - again[stage] == 2 * tokens * sum(module.weight.numel() for module in modules)
    assert len(modules) == sum(
        isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.decoder.modules()
    )


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("part", ["mlp.gate_proj", "self_attn.q_proj", "text", "out", "lse"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_what_is_recorded_is_what_is_used(family: str, part: str) -> None:
    """A record that is spoilt spoils the gradients: every part of it is taken, and nothing is computed beside it."""
    model = make_model(family, dtype=torch.float64)
    thoughts = model.think(IDS, seed=3, record=True, replay="all")
    record = thoughts.recording.layers
    attention = record.attention[1]
    spoilt = {"text": lambda: attention.text[0][0], "out": lambda: attention.out, "lse": lambda: attention.lse}
    spoilt.get(part, lambda: record.values[1, part])().mul_(1.01)
    _, wanted = backward(model, None)
    _, found = backward(model, "all", thoughts=thoughts)
    with pytest.raises(AssertionError):
        assert_same_gradients(found, wanted, 1e-4)


# -- memory, and what may happen between the passes --------------------------------------------------------------------


@pytest.mark.parametrize("stage", RECORDING)
def test_each_layer_frees_its_record(stage: Replay) -> None:
    """When the first layer's backward pass begins, nothing of the last one is left."""
    model = make_model()
    thoughts = model.think(IDS, record=True, replay=stage)
    assert thoughts.recording is not None
    values, left = thoughts.recording.layers.values, []
    attention = thoughts.recording.layers.attention or {}
    assert {index for index, _ in values} == {0, 1}
    assert len(attention) == (2 if stage == "all" else 0)
    loss = learn(model, IDS, thoughts=thoughts, replay=stage).loss
    model.decoder.layers[0].input_layernorm.register_forward_pre_hook(
        lambda *_: left.append({index for index, _ in [*values, *((index, "") for index in attention)]})
    )
    loss.backward()
    assert left == [{0}]
    assert not values
    assert not attention


@pytest.mark.parametrize("stage", STAGES)
def test_the_graph_of_a_step_does_not_hold_the_record(stage: Replay) -> None:
    """Each layer's output is free once its backward pass has used it, and not only when the loss is gone."""
    model = make_model()
    thoughts = model.think(IDS, record=True, replay=stage)
    record = weakref.ref(thoughts.recording.layers)
    loss = learn(model, IDS, thoughts=thoughts).loss
    del thoughts
    assert record() is None
    loss.backward()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("stage", RECORDING)
def test_a_model_that_is_gone_leaves_no_tensor(stage: Replay, family: str) -> None:
    """What looked for the values that are used was once held by the hooks of the graph that it had looked at."""

    def tensors() -> dict[int, Tensor]:
        gc.collect()
        return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)}

    before = tensors()
    model = make_model(family)
    backward(model, stage)
    del model
    assert [tensor.shape for key, tensor in tensors().items() if key not in before] == []


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_second_backward_pass_computes_what_is_gone(stage: Replay) -> None:
    model = make_model(dtype=torch.float64)
    _, wanted = backward(model, None)
    thoughts = model.think(IDS, seed=3, record=True, replay=stage)
    model.zero_grad()
    first, second = (learn(model, IDS, thoughts=thoughts, replay=stage).loss for _ in range(2))
    first.backward(retain_graph=True)
    assert_same_gradients(gradients(model), wanted, EXACT)
    for loss in (first, second):
        model.zero_grad()
        loss.backward()
        assert_same_gradients(gradients(model), wanted, EXACT)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("stage", STAGES[1:])
def test_weights_that_change_before_the_talk_pass(stage: Replay) -> None:
    model = make_model(dtype=torch.float64)
    thoughts = model.think(IDS, record=True, replay=stage)
    with torch.no_grad():
        model.decoder.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert_two_passes(model, [stage], thoughts=thoughts)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("stage", RECORDING)
def test_a_recording_of_another_precision_is_not_used(stage: Replay) -> None:
    """Values in bfloat16 would stand where the step computes in float64."""
    model = make_model(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        thoughts = model.think(IDS, record=True, replay=stage)
    assert_two_passes(model, [stage], thoughts=thoughts)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("stage", STAGES)
def test_two_micro_batches_alive_at_once(stage: Replay) -> None:
    model = make_model(dtype=torch.float64)
    found = {}
    for options in ({"reuse_sampling_pass": False}, {"replay": stage}):
        model.zero_grad()
        losses = [learn(model, make_ids(1, 6, seed=seed), seed=4, **options).loss for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        found["replay" in options] = gradients(model)
    assert_same_gradients(found[True], found[False], EXACT)


FREEZING = {
    "base": ["base."],
    "products": ["proj"],
    "all but one product": [
        "norm",
        "embed",
        "lm_head",
        "layers.0",
        "self_attn",
        "gate",
        "up_proj",
        "thought",
        "mixing",
    ],
    "norms": ["norm"],
    "first layer": ["embed", "layers.0."],
}


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("frozen", FREEZING)
def test_frozen_weights(frozen: str, family: str) -> None:
    """What the backward pass keeps depends on what is trained; the values that it needs are found for each case."""
    model = make_model(family, dtype=torch.float64)
    replayed_products(model, "mlp")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FREEZING[frozen]))
    assert_two_passes(model, RECORDING if family in NORM_BEHIND else STAGES)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "lora_only"}], ids=str)
@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]], ids=str
)
def test_adapters(targets: Any, options: dict[str, Any]) -> None:
    """They come after a first step, freeze the base and bring dropout; DoRA uses the value of the product below it."""
    peft = pytest.importorskip("peft")
    model = make_model(dtype=torch.float64)
    assert_two_passes(model, STAGES)
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config).train()
    uses_values = "use_dora" in options
    if not uses_values:
        for layer in replayed_products(model, "down"):
            assert set(layer.unused) == {"mlp.down_proj.base_layer"}
    assert_two_passes(adapted, RECORDING if uses_values else STAGES)


class Scaled(nn.Linear):
    """A linear layer with a forward of its own, as quantised ones have: its value is used inside."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output / output.square().mean(-1, keepdim=True).sqrt()


class Doubled(nn.Linear):
    """Two products in one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * super().forward(input).tanh()


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("kind", [Scaled, Doubled])
def test_modules_with_a_forward_of_their_own_are_computed_again(kind: type[nn.Linear], name: str) -> None:
    model = make_model(dtype=torch.float64)
    layer = model.decoder.layers[1]
    old = layer.get_submodule(name)
    new = kind(old.in_features, old.out_features, bias=False, dtype=torch.float64)
    layer.set_submodule(name, new)
    for layer_products in replayed_products(model, "linears")[1:]:
        assert name not in layer_products.recorded
        assert name not in layer_products.unused
    assert_two_passes(model, STAGES)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"])
def test_a_value_that_is_changed_in_place(name: str) -> None:
    """By a hook, as libraries hang them; a record would hold the value before or after it, and zeros neither."""
    model = make_model(dtype=torch.float64)
    model.decoder.layers[0].get_submodule(name).register_forward_hook(lambda _, __, output: output.mul_(1.5))
    first, second = replayed_products(model, "linears")
    assert name not in {*first.recorded, *first.unused}
    assert name in {*second.recorded, *second.unused}
    assert_two_passes(model, STAGES)


@pytest.mark.usefixtures("keep_float64")
def test_one_module_in_two_places() -> None:
    """Tied weights: a module that runs twice has two values, and one that two layers share has one in each."""
    model = make_model(dtype=torch.float64)
    first, second = model.decoder.layers
    first.mlp.up_proj = first.mlp.gate_proj
    second.self_attn.q_proj = first.self_attn.q_proj
    second.mlp.down_proj.weight = first.mlp.down_proj.weight
    recorded = [set(layer.recorded) for layer in replayed_products(model, "linears")]
    assert "mlp.gate_proj" not in recorded[0]
    assert "self_attn.q_proj" in recorded[0] & recorded[1]
    assert_two_passes(model, STAGES)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("stage", STAGES)
def test_with_transformers_gradient_checkpointing_switched_on(stage: Replay) -> None:
    model = make_model(dtype=torch.float64)
    _, wanted = backward(model, None)
    switch_checkpointing_on(model.base)
    model.train()
    _, found = backward(model, stage)
    assert_same_gradients(found, wanted, EXACT)


@pytest.mark.parametrize("stage", STAGES)
def test_modules_are_left_as_they_were_when_a_pass_fails(stage: Replay) -> None:
    model = make_model()
    model.think(IDS, record=True, replay=stage)
    handle = model.decoder.layers[0].mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.think(IDS, record=True, replay=stage)
    handle.remove()
    loss = learn(model, IDS, replay=stage).loss
    model.decoder.layers[0].mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


@pytest.mark.parametrize("chosen", ["base", "lm_head", "mixing_head", "thought_embedding", "layers.0"])
@pytest.mark.parametrize("stage", [*STAGES, None])
def test_second_gradients_are_refused(stage: Replay | None, chosen: str) -> None:
    """The gradient of the mixing head alone had one, in which what the losses had computed was taken for a constant."""
    model: QuietStarForCausalLM = make_model(changes={"tie_word_embeddings": False})
    options: dict[str, Any] = {"reuse_sampling_pass": False} if stage is None else {"replay": stage}
    loss = learn(model, IDS, **options).loss
    parameters = [parameter for name, parameter in model.named_parameters() if chosen in name]
    with pytest.raises(RuntimeError, match=r"first gradients only.* without create_graph=True"):
        torch.autograd.grad(loss, parameters, create_graph=True)
