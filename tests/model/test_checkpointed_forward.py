"""The sampling pass is the checkpointed forward: same losses and gradients as the plain two-phase step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quietstar import QuietStarForCausalLM
from quietstar.objective.learning import learn
from tests.model.tiny import assert_same_gradients, gradients, make_ids, make_model, switch_checkpointing_on

EXACT = 1e-10
IDS = make_ids(batch=2, length=7)
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])


def backward(model: QuietStarForCausalLM, reuse: bool, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    step = learn(model, arguments.pop("ids", IDS), reuse_sampling_pass=reuse, **arguments)
    step.loss.backward()
    return step.loss.detach(), gradients(model)


def assert_exact(model: QuietStarForCausalLM, tolerance: float = EXACT, **arguments: Any) -> None:
    """With the same thoughts, both ways give the same loss and the same gradients."""
    loss, found = backward(model, True, **arguments)
    wanted_loss, wanted = backward(model, False, **arguments)
    torch.testing.assert_close(loss, wanted_loss, atol=tolerance, rtol=tolerance)
    assert_same_gradients(found, wanted, tolerance)


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("objective", ["default", "authors"])
@pytest.mark.parametrize("family", ["mistral_window", "gpt2"])
def test_recorded_thoughts_give_the_plain_gradients(family: str, objective: str) -> None:
    model = make_model(family, dtype=torch.float64)
    thoughts = model.think(IDS, MASK, record=True, seed=3)
    assert thoughts.recording is not None
    assert_exact(model, attention_mask=MASK, thoughts=thoughts, objective=objective)


@pytest.mark.usefixtures("keep_float64")
def test_one_call_thinks_and_learns_the_same_both_ways() -> None:
    assert_exact(make_model(dtype=torch.float64), seed=5)


@pytest.mark.usefixtures("keep_float64")
def test_a_recording_that_older_weights_made_is_not_used() -> None:
    """A step of the optimizer between thinking and learning: the loss must be that of the new weights."""
    model = make_model(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    thoughts = model.think(IDS, record=True)
    before, _ = backward(model, True, thoughts=thoughts)
    optimizer.step()
    after, _ = backward(model, True, thoughts=thoughts)
    assert abs(before - after) > 1e-3
    assert_exact(model, thoughts=thoughts)


@pytest.mark.usefixtures("keep_float64")
def test_a_recording_of_other_inputs_is_not_used() -> None:
    model = make_model(dtype=torch.float64)
    thoughts = model.think(IDS, record=True)
    other = make_ids(batch=2, length=7, seed=9)
    assert_exact(model, ids=other, thoughts=thoughts)
    assert_exact(model, attention_mask=MASK, thoughts=thoughts)
    swapped = replace(thoughts, tokens=thoughts.tokens.roll(1, dims=1))
    assert_exact(model, thoughts=swapped)
    assert backward(model, True, thoughts=swapped)[0] != backward(model, True, thoughts=thoughts)[0]


@pytest.mark.usefixtures("keep_float64")
def test_gradient_accumulation() -> None:
    """Two losses alive at once, their backward passes in the other order."""
    model = make_model(dtype=torch.float64)
    batches = [make_ids(1, 6, seed=seed) for seed in (1, 2)]
    found = {}
    for reuse in (True, False):
        model.zero_grad()
        steps = [learn(model, batch, seed=4, reuse_sampling_pass=reuse) for batch in batches]
        for step in reversed(steps):
            (step.loss / len(steps)).backward()
        found[reuse] = gradients(model)
    assert_same_gradients(found[True], found[False], EXACT)


FREEZING = {
    "embeddings": ["embed_tokens"],
    "first layer": ["layers.0."],
    "last layer": ["layers.1."],
    "base": ["base."],
    "all but one norm": ["embed_tokens", "layers.0.", "self_attn", "mlp", "lm_head", "thought", "mixing", "model.norm"],
    "thoughts": ["thought_embedding", "mixing_head"],
}


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("frozen", FREEZING)
def test_frozen_parameters(frozen: str) -> None:
    model = make_model(dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FREEZING[frozen]))
    assert_exact(model)
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


@pytest.mark.usefixtures("keep_float64")
def test_autograd_grad_and_a_second_backward() -> None:
    model = make_model(dtype=torch.float64)
    _, wanted = backward(model, False)
    model.zero_grad()
    step = learn(model, IDS)
    chosen = ["base.model.layers.0.self_attn.k_proj.weight", "thought_embedding.weight"]
    found = torch.autograd.grad(step.loss, [model.get_parameter(name) for name in chosen], retain_graph=True)
    for name, gradient in zip(chosen, found, strict=True):
        torch.testing.assert_close(gradient, wanted[name], atol=EXACT, rtol=EXACT)
    step.loss.backward()
    assert_same_gradients(gradients(model), wanted, EXACT)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_exact_as_the_plain_step(autocast: bool) -> None:
    """bfloat16 weights, or float32 weights under autocast: the error against float32 is that of the plain step."""
    thoughts = make_model().think(IDS, seed=2)
    _, truth = backward(make_model(), False, thoughts=thoughts)
    model = make_model(dtype=torch.float32 if autocast else torch.bfloat16)
    errors = {}
    for reuse in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = learn(model, IDS, thoughts=thoughts, reuse_sampling_pass=reuse).loss
        loss.backward()
        found = gradients(model)
        assert found.keys() == truth.keys()
        squares = [((found[name].float() - truth[name]) ** 2).sum() / (truth[name] ** 2).sum() for name in truth]
        errors[reuse] = float(torch.stack(squares).mean().sqrt())
    assert errors[True] < 1.25 * errors[False] + 1e-3
    assert errors[False] < 0.3


@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_pass_recomputes_in_the_precision_of_the_forward(autocast: bool) -> None:
    """`loss.backward()` usually stands outside of the autocast context that the forward ran in."""
    model = make_model()
    dtypes: list[torch.dtype] = []
    model.base.model.layers[0].mlp.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = learn(model, IDS).loss
    forward = len(dtypes)
    loss.backward()
    assert len(dtypes) == forward + 1
    assert set(dtypes) == {torch.bfloat16 if autocast else torch.float32}


@pytest.mark.usefixtures("keep_float64")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_transformers_gradient_checkpointing_switched_on(use_reentrant: bool) -> None:
    model = make_model(dtype=torch.float64)
    thoughts = model.think(IDS, seed=1)
    _, wanted = backward(model, False, thoughts=thoughts)
    switch_checkpointing_on(model.base, use_reentrant=use_reentrant)
    model.train()
    assert torch.equal(model.think(IDS, seed=1).tokens, thoughts.tokens)
    for reuse in (True, False):
        _, found = backward(model, reuse, thoughts=thoughts)
        assert_same_gradients(found, wanted, EXACT)
    layer = model.base.model.layers[0]
    assert layer.gradient_checkpointing and layer.training


def test_hooks_of_a_layer_run_around_the_recorded_pass_and_not_in_its_backward() -> None:
    """What shards a model hangs on them: once a pass, outside of what is recorded, replayed and recomputed."""
    model = make_model()
    model.think(IDS)  # the probe has passes of its own
    layer, order = model.decoder.layers[0], []
    layer.register_forward_pre_hook(lambda *_: order.append("before"))
    layer.register_forward_hook(lambda *_: order.append("after"))
    layer.mlp.register_forward_hook(lambda *_: order.append("layer"))
    once = ["before", "layer", "after"]
    thoughts = model.think(IDS, record=True)
    passes = 1 + model.config.thought_length + 1  # text, START and each token but the last, the rest of the streams
    assert order == once * passes
    order.clear()
    loss = learn(model, IDS, thoughts=thoughts).loss
    assert order == ["before", "after"]
    loss.backward()
    assert order == ["before", "after", "layer"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_of_the_layer_s_own_is_used_and_stays(fails: bool) -> None:
    """As accelerate's, which brings offloaded weights."""
    model = make_model()
    _, wanted = backward(model, True, seed=1)
    layer, calls = model.decoder.layers[0], []
    inner = layer.forward

    def own(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if fails:
            raise KeyError("in the middle of a pass")
        return inner(*arguments, **options)

    layer.forward = own
    if fails:
        with pytest.raises(KeyError, match="in the middle of a pass"):
            learn(model, IDS)
    else:
        _, found = backward(model, True, seed=1)
        assert_same_gradients(found, wanted, EXACT)
        assert len(calls) == 1 + model.config.thought_length + 1 + 1  # and once in the backward pass
    assert layer.__dict__["forward"] is own
    assert all("forward" not in other.__dict__ for other in model.decoder.layers[1:])


@pytest.mark.usefixtures("keep_float64")
def test_lora_on_the_base() -> None:
    """peft freezes the base and brings a dropout, which must not separate the sampling pass from the recomputation."""
    peft = pytest.importorskip("peft")
    model = make_model(dtype=torch.float64)
    config = peft.LoraConfig(
        r=2,
        lora_dropout=0.5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["thought_embedding", "mixing_head"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():  # and not the rotary frequencies
        parameter.data = parameter.data.double()
    adapted.train()
    found = {}
    for reuse in (True, False):
        adapted.zero_grad()
        learn(adapted, IDS, seed=3, reuse_sampling_pass=reuse).loss.backward()
        found[reuse] = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    assert_same_gradients(found[True], found[False], EXACT)
    trained = {name.split(".")[-2] if "lora" in name else name for name in found[True]}
    assert any("thought_embedding" in name for name in trained) and any("mixing_head" in name for name in trained)
    assert any("lora_A" in name for name in found[True])
    assert not any("base_layer" in name for name in found[True])


def test_each_layer_runs_once_in_the_backward_pass_and_not_at_all_in_the_forward() -> None:
    model = make_model()
    calls: list[int] = []
    handle = model.base.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    thoughts = model.think(IDS, record=True)
    assert calls == [False] * (1 + model.config.thought_length + 1)  # text, START and all but the last token, the rest
    calls.clear()
    step = learn(model, IDS, thoughts=thoughts)
    assert calls == []
    step.loss.backward()
    assert calls == [True]
    handle.remove()


def test_layers_are_left_as_they_were_when_a_pass_fails() -> None:
    model = make_model()
    layer = model.base.model.layers[0]
    before = dict(layer.__dict__)

    def fail(*_: Any) -> None:
        raise RuntimeError("a layer failed")

    handle = layer.mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a layer failed"):
        model.think(IDS, record=True)
    handle.remove()
    assert {k: v for k, v in layer.__dict__.items() if not k.startswith("_")} == {
        k: v for k, v in before.items() if not k.startswith("_")
    }
    assert "_gradient_checkpointing_func" not in layer.__dict__


def test_the_result_of_a_step_does_not_keep_the_recording_alive() -> None:
    """A loop that holds its last step while it makes the next would otherwise hold two recordings."""
    model = make_model()
    assert learn(model, IDS).thoughts.recording is None


def test_weights_that_move_before_the_backward_pass_are_refused() -> None:
    """The recomputation would use other weights than the forward; autograd says so."""
    model = make_model()
    loss = learn(model, IDS).loss
    with torch.no_grad():
        nn.init.zeros_(model.base.model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
