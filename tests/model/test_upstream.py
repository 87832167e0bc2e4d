"""What `quietstar.model.upstream` relies on: where a release of transformers changes it, a test says in words what."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from quietstar import QuietStarForCausalLM, UnsupportedBackboneError
from quietstar.model import backbone, cache, upstream
from quietstar.model.layers import decoder_layers
from quietstar.model.upstream import (
    CACHE,
    NEWEST_TESTED,
    ROTARY_EMBEDDING,
    BaseStreamer,
    Cache,
    Conv1D,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    GenerateDecoderOnlyOutput,
    SuppressTokensLogitsProcessor,
    attention_implementation,
    cache_argument,
    checkpointing,
    initialization,
    register_attention,
    sdpa_attention_forward,
    set_checkpointing,
    supports_sdpa,
    tied_weights,
    untested_versions,
    with_rotary_embedding,
    without_checkpointing,
)
from quietstar.objective.learning import learn
from quietstar_kernels import thought_attention
from tests.model.tiny import FAMILIES, VOCABULARY, make_base, make_ids, make_model, switch_checkpointing_on

PACKAGE = Path(upstream.__file__).parents[1]
IDS = make_ids(2, 6)


def decoder_of(base: PreTrainedModel) -> Any:
    return base.get_decoder()


INSIDES = {
    *("_attn_implementation", "_supports_sdpa", "all_tied_weights_keys", "_gradient_checkpointing_func"),
    *("gradient_checkpointing", "initialization", "lazy_initialization"),
}
"""Names of transformers' own that `upstream` has a function for, or a name in its place."""
OURS = {"FinetuningOptions", "options", "finetuning"}
"""What has a `gradient_checkpointing` of its own: an option."""


def reaches(node: ast.AST) -> str | None:
    """What of transformers' insides a piece of code uses."""
    if isinstance(node, ast.ImportFrom) and node.module == "transformers":
        return next((alias.name for alias in node.names if alias.name in INSIDES), None)
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    below = [name for name in names if name.startswith("transformers.") and name != "transformers.utils"]
    if isinstance(node, ast.Attribute) and node.attr in INSIDES:
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        below += [node.attr] * (owner not in OURS)
    return below[0] if below else None


def test_no_other_module_reaches_inside() -> None:
    places = {upstream.__file__, cache.__file__}  # the latter's class is a DynamicLayer
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}"  # type: ignore[attr-defined]  # of every node found
        for path in sorted(PACKAGE.rglob("*.py"))
        if str(path) not in places
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (name := reaches(node)) is not None
    ]
    assert found == [], "these belong into quietstar/model/upstream.py, with what they rely on"


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_take_hidden_states_first_and_give_hidden_states(family: str) -> None:
    base = make_base(family)
    decoder = decoder_of(base)
    layers, seen = decoder_layers(decoder), []
    assert len(layers) == base.config.num_hidden_layers, "a decoder layer is no GradientCheckpointingLayer any more"
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, output: seen.append((given, output)))
    decoder(input_ids=IDS)
    assert len(seen) == len(layers), "a pass does not call every layer once through nn.Module.__call__"
    for given, output in seen:
        assert given and isinstance(given[0], Tensor), "a layer does not get its hidden states in the first place"
        assert isinstance(output, Tensor) and output.shape == given[0].shape, "a layer does not give hidden states"


def test_a_layer_s_own_forward_is_called_between_its_hooks() -> None:
    decoder = decoder_of(make_base())
    layer, order = decoder.layers[0], []
    forward = layer.forward
    layer.register_forward_pre_hook(lambda *_: order.append("before"))
    layer.register_forward_hook(lambda *_: order.append("after"))

    def own(*arguments: Any, **options: Any) -> Any:
        order.append("own")
        return forward(*arguments, **options)

    layer.__dict__["forward"] = own
    decoder(input_ids=IDS)
    assert order == ["before", "own", "after"], "a forward in the instance's __dict__ is not what a pass calls"


def test_checkpointing_is_switched_by_two_attributes_of_a_layer() -> None:
    base = make_base().train()
    layer, calls = decoder_of(base).layers[0], []

    def run_and_count(forward: Any, *arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    assert checkpointing(layer) == (None, False)
    switch_checkpointing_on(base, use_reentrant=False)
    assert checkpointing(layer)[0] is not None and checkpointing(layer)[1], (
        "transformers switches checkpointing on by other attributes than gradient_checkpointing and "
        "_gradient_checkpointing_func"
    )
    set_checkpointing(layer, True, run_and_count)
    base(IDS)
    assert calls == [1], "a layer with gradient_checkpointing on does not call _gradient_checkpointing_func"
    with without_checkpointing(layer):
        base(IDS)
    assert calls == [1], "a layer with gradient_checkpointing off calls _gradient_checkpointing_func"
    assert checkpointing(layer) == (run_and_count, True)


def test_gpt2_s_linear_layers_are_transposed() -> None:
    projection: Any = decoder_of(make_base("gpt2")).h[0].mlp.c_fc
    assert isinstance(projection, Conv1D) and projection.weight.shape == (32, 128)


# -- attention ---------------------------------------------------------------------------------------------------------


def test_a_registered_attention_gets_keyword_arguments_and_a_mask_as_it_is() -> None:
    """A 4-D mask of one element and repeated positions must neither be built upon nor be taken for packed texts."""
    seen: list[tuple[Any, Any]] = []

    def attention(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, *, note: Any = None, **_: Any) -> Any:
        seen.append((mask, note))
        return sdpa_attention_forward(module, query, key, value, None)

    register_attention("noted", attention)
    base = make_base()
    base.set_attn_implementation("noted")
    assert attention_implementation(base.config) == "noted", "config._attn_implementation is not the attention's name"
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    positions = torch.tensor([[0, 1, 2, 3, 1, 2]])
    decoder_of(base)(input_ids=IDS, attention_mask=mask, position_ids=positions, use_cache=False, note="own")
    assert len(seen) == base.config.num_hidden_layers, "a registered attention is not called in every layer"
    for given, note in seen:
        assert note == "own", "a model's keyword arguments do not reach its attention"
        assert given is mask, "a 4-D attention mask does not reach the attention as it is"


def test_pytorch_s_attention_in_transformers_signature() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    module: Any = nn.Module()
    module.is_causal = True
    found, weights = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    scores = (0.3 * query @ key.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    assert weights is None
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


def test_a_plain_call_of_the_base_sees_what_pytorch_s_attention_sees() -> None:
    """Under our name too: padding on the left, and a causal mask."""
    base = make_base()
    assert supports_sdpa(base), "_supports_sdpa does not say any more that a model can take PyTorch's attention"
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    logits = []
    for name in ("sdpa", "quietstar"):
        base.set_attn_implementation(name)
        logits.append(base(IDS, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*logits)


# -- caches and generating ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_name_for_the_cache(family: str) -> None:
    base = make_base(family)
    assert cache_argument(base.forward) == CACHE, f"{family} takes its cache by another name than generate has for it"
    output = base(IDS, **{CACHE: DynamicCache(config=base.config)}, use_cache=True)
    assert isinstance(output[CACHE], Cache), f"{family} gives its cache by another name than it takes it"


def test_a_function_without_a_cache_has_no_name_for_it() -> None:
    assert cache_argument(lambda input_ids: None) is None
    assert cache_argument(lambda input_ids, past_key_values: None) == "past_key_values"


def test_what_generate_returns_can_be_extended() -> None:
    fields = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
    assert {"sequences", "scores", CACHE} <= fields, "the output of generate has other fields"


def test_a_layer_of_a_cache_keeps_keys_and_values() -> None:
    key, value = torch.randn(2, 1, 2, 3, 4)
    layer = DynamicLayer()
    assert not layer.is_initialized
    layer.lazy_initialization(key, value)
    assert layer.is_initialized, "DynamicLayer.lazy_initialization(keys, values) does not set is_initialized"
    keys, values = layer.update(key, value)
    assert torch.equal(keys, key) and torch.equal(values, value) and layer.get_seq_length() == 3
    made = Cache(layer_class_to_replicate=DynamicLayer)
    made.update(key, value, 0)
    assert type(made.layers[0]) is DynamicLayer, "a Cache does not make layers of layer_class_to_replicate"
    kinds = [type(layer) for layer in DynamicCache(config=make_base("qwen2_window").config).layers]
    assert kinds == [DynamicLayer, DynamicSlidingWindowLayer], "DynamicCache makes other layers of a configuration"


def test_generate_calls_what_a_thinking_model_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that are read there, by name."""
    base, calls = make_base(), {}
    for name in ("_get_logits_processor", "_get_stopping_criteria", "prepare_inputs_for_generation"):
        own = getattr(base, name, None)
        assert own is not None, f"GenerationMixin.{name} is gone"

        def noted(*arguments: Any, _own: Any = own, _name: str = name, **options: Any) -> Any:
            calls.setdefault(_name, inspect.signature(_own).bind(*arguments, **options).arguments)
            return _own(*arguments, **options)

        monkeypatch.setattr(base, name, noted)
    base.generate(IDS, max_new_tokens=2, do_sample=False)
    processors = calls["_get_logits_processor"]
    assert isinstance(processors["generation_config"], GenerationConfig)
    assert processors["input_ids_seq_length"] == IDS.shape[1], "generate does not tell the prompt's length by name"
    assert CACHE in processors["model_kwargs"], "the cache is not among model_kwargs when processors are made"
    assert "stopping_criteria" in calls["_get_stopping_criteria"]
    prepared = calls["prepare_inputs_for_generation"]
    assert CACHE in prepared or CACHE in prepared.get("kwargs", {}), "inputs are prepared without the cache"


# -- loading -----------------------------------------------------------------------------------------------------------


def test_the_gate_stays_in_float32(tmp_path: Path) -> None:
    make_model(thinking_gate=True).save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.mixing_head.output.weight.dtype == torch.bfloat16
    assert loaded.thinking_gate.weight.dtype == torch.float32, "_keep_in_fp32_modules_strict is not read any more"


def test_tied_weights_are_named() -> None:
    assert tied_weights(make_base("gemma2")) == {"lm_head.weight"}, "all_tied_weights_keys does not name a tied head"
    assert tied_weights(make_base(changes={"tie_word_embeddings": False})) == set()


def test_tokens_are_suppressed_and_streamed_as_generate_does_it() -> None:
    base, seen = make_base(), []

    class Noted(BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(value.tolist())

        def end(self) -> None:
            seen.append("end")

    free = base.generate(IDS[:1], max_new_tokens=1, do_sample=False)[0, -1]
    banned = SuppressTokensLogitsProcessor([int(free)], device="cpu")
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "streamer": Noted()}
    text = base.generate(IDS[:1], logits_processor=[banned], **options)[0, IDS.shape[1] :].tolist()
    assert int(free) not in text, "SuppressTokensLogitsProcessor lets its tokens through"
    assert seen == [IDS[:1].tolist(), [text[0]], [text[1]], "end"], "a streamer is not told the prompt, tokens and end"


@pytest.mark.slow
def test_a_name_that_has_moved_says_which_release_is_newer() -> None:
    """As when a release renames what is imported: not only that there is no such name."""
    code = (
        "import importlib.metadata as m, sys, transformers.cache_utils as c; del c.DynamicLayer\n"
        "real = m.version; m.version = lambda name: '99.0' if name == 'transformers' else real(name)\n"
        "import quietstar.model.upstream"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "ImportError: cannot import name 'DynamicLayer' .* transformers 99.0 is newer than .*-c constraints.txt"
    assert done.returncode == 1 and re.search(told, done.stderr), done.stderr


def test_what_was_loaded_is_not_initialized() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it has loaded
    initialization.zeros_(weight)
    assert weight.tolist() == [1, 1], "transformers.initialization overwrites a parameter that was loaded"


# -- releases that nobody has tried ------------------------------------------------------------------------------------


def test_newer_releases_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.14.1+cu130", "transformers": "5.24.1", "triton": "3.10.0"}
    monkeypatch.setattr(upstream, "version", installed.__getitem__)
    monkeypatch.setattr(upstream, "NEWEST_TESTED", {"torch": "2.14.1", "transformers": "5.24.0", "triton": "3.9.0"})
    assert untested_versions() == [
        "transformers 5.24.1 is newer than 5.24.0, the newest that was tested",
        "triton 3.10.0 is newer than 3.9.0, the newest that was tested",
    ]


def break_recording(monkeypatch: pytest.MonkeyPatch) -> str:
    """As transformers 5.24 did: recording is not called any more."""
    layer = type(decoder_of(make_base()).layers[0])
    monkeypatch.setattr(layer, "__call__", lambda self, *given, **options: type(self).forward(self, *given, **options))
    return "mistral: 0 of 2 layers were recorded"


def change_gradient(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Of thought attention alone: the forward pass stays right."""

    def attention(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, lse = thought_attention(*arguments, **options)
        if output.requires_grad:
            output.register_hook(change)
        return output, lse

    monkeypatch.setattr("quietstar.model.attention.thought_attention", attention)


def break_replay(monkeypatch: pytest.MonkeyPatch) -> str:
    def without_gradient(index: int, layer: nn.Module, run: Any, hidden: Tensor) -> Tensor:
        output: Tensor = run(hidden)
        return hidden + (output - hidden).detach()

    monkeypatch.setattr(backbone.LayerRecord, "replay", lambda self, *given: without_gradient(*given))
    return "mistral: the gradient of a recorded pass differs from the plain model's"


def halve_gradient(monkeypatch: pytest.MonkeyPatch) -> str:
    change_gradient(monkeypatch, lambda gradient: gradient / 2)
    return "mistral: the gradient of a recorded pass differs from the plain model's"


def stop_backward(monkeypatch: pytest.MonkeyPatch, error: type[Exception] = RuntimeError) -> str:
    def stop(gradient: Tensor) -> Tensor:
        raise error("a compiler's own error")

    change_gradient(monkeypatch, stop)
    return r"mistral: a recorded pass can't be replayed \(a compiler's own error\)"


def stop_backward_by_a_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    return stop_backward(monkeypatch, NameError)


def break_mask(monkeypatch: pytest.MonkeyPatch) -> str:
    def stop(*_: Any, **__: Any) -> Any:
        raise NameError("a compiler's own error")

    monkeypatch.setattr("quietstar.model.attention.thought_attention", stop)
    return r"mistral: text and thoughts can't be run in one pass \(a compiler's own error\)"


BREAKS = (break_recording, break_replay, halve_gradient, stop_backward, stop_backward_by_a_compiler, break_mask)


@pytest.mark.parametrize("break_it", BREAKS)
@pytest.mark.parametrize("newer", [True, False])
def test_a_release_that_breaks_the_engine_is_named(monkeypatch: pytest.MonkeyPatch, break_it: Any, newer: bool) -> None:
    base, reason = make_base(), break_it(monkeypatch)
    monkeypatch.setitem(NEWEST_TESTED, "transformers", "5.1.0" if newer else "99.0")
    with pytest.raises(UnsupportedBackboneError, match=reason) as caught:
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
    advice = "is newer than 5.1.0, the newest that was tested. 'pip install -c constraints.txt .'"
    assert (advice in str(caught.value)) == newer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_deep_model_is_no_wrong_gradient(dtype: torch.dtype) -> None:
    base = make_base("llama", changes={"num_hidden_layers": 24}).to(dtype)
    assert QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6]).dtype == dtype


def test_a_base_without_a_gradient_can_think() -> None:
    """As one whose quantised weights have no backward pass."""

    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise NotImplementedError

    base = make_base()
    decoder_of(base).layers[0].mlp.register_forward_hook(lambda _, __, output: OneWay.apply(output))
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
    assert model.predict(IDS).talk_logits.isfinite().all()


def test_a_base_made_in_inference_mode_can_think() -> None:
    with torch.inference_mode():
        base = make_base()
        model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
        assert model.predict(IDS).talk_logits.isfinite().all()
    assert all(parameter.requires_grad for parameter in base.parameters())


class Twice(nn.Module):
    """A layer that a pass runs two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.layer(self.layer(*arguments, **options), *arguments[1:], **options)


def test_layers_that_run_several_times_a_pass_are_trained_without_recording() -> None:
    base = make_base()
    decoder_of(base).layers[0] = Twice(decoder_of(base).layers[0])
    base.config.num_hidden_layers = 3  # such families count what runs
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
    assert model.predict(IDS).talk_logits.isfinite().all()
    with pytest.raises(UnsupportedBackboneError, match="MistralDecoderLayer runs several times a pass"):
        model.think(IDS, record=True)


@pytest.mark.parametrize("newer", [True, False])
def test_layers_that_cannot_be_recorded_are_refused_under_an_untested_release_alone(
    monkeypatch: pytest.MonkeyPatch, newer: bool
) -> None:
    """Such a family can think, and be trained without recording; of a tested family a new release has made it."""
    monkeypatch.setattr("quietstar.model.layers.GradientCheckpointingLayer", nn.LSTM)
    monkeypatch.setitem(NEWEST_TESTED, "transformers", "5.1.0" if newer else "99.0")
    base, reason = make_base(), "has no transformers GradientCheckpointingLayer, which recording thoughts needs"
    if newer:
        with pytest.raises(UnsupportedBackboneError, match=rf"{reason}.*5\.1\.0, the newest"):
            QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
        return
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
    assert model.predict(IDS).talk_logits.isfinite().all()
    assert learn(model, IDS, reuse_sampling_pass=False).loss.isfinite()
    with pytest.raises(UnsupportedBackboneError, match=reason):
        learn(model, IDS)


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_the_model_as_it_was(training: bool) -> None:
    """Also where a user has switched checkpointing on, frozen a part, or works in inference mode."""
    base = make_base().train(training)
    switch_checkpointing_on(base, use_reentrant=True)
    frozen = next(base.parameters()).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with torch.inference_mode():
        model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
        assert model.predict(IDS).talk_logits.shape[-1] == VOCABULARY
    assert not frozen.requires_grad
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [checkpointing(layer)[1] for layer in decoder_layers(model.decoder)] == [True, True]
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model.decoder))


def test_the_layers_of_llama_are_what_fused_kernels_stand_for() -> None:
    """What has Llama's code is replaced by kernels, so this code must be RMSNorm, SwiGLU and a rotation of pairs."""
    layer = make_base("llama", dtype=torch.float64).model.layers[0]
    states = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm, mlp = layer.input_layernorm, layer.mlp
    expected = nn.functional.rms_norm(states, (32,), norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(norm(states), expected, atol=1e-6, rtol=1e-6)  # computes in float32
    swiglu = nn.functional.silu(states @ mlp.gate_proj.weight.T) * (states @ mlp.up_proj.weight.T)
    torch.testing.assert_close(mlp(states), swiglu @ mlp.down_proj.weight.T)
    rotate = inspect.unwrap(type(layer.self_attn).forward).__globals__[ROTARY_EMBEDDING]
    query, key = states.view(2, 5, 4, 8).transpose(1, 2), states.view(2, 5, 4, 8)[:, :, :2].transpose(1, 2)
    angle = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    for given, rotated in zip((query, key), rotate(query, key, cos, sin), strict=True):
        turned = torch.complex(*given.chunk(2, -1)) * turn
        torch.testing.assert_close(rotated, torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2", "qwen3", "granite", "smollm3", "gemma2"])
def test_an_attention_with_another_rotary_embedding_is_else_the_same(family: str) -> None:
    """All names that its forward looks up are there, and a model beside it keeps its own."""
    base, beside = make_base(family), make_base(family)
    attention = base.model.layers[0].self_attn
    own = inspect.unwrap(type(attention).forward).__globals__[ROTARY_EMBEDDING]
    calls: list[int] = []

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        calls.append(query.shape[-2])
        return own(query, key, cos, sin)

    attention.forward = MethodType(with_rotary_embedding(attention, rotate), attention)
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, beside(IDS).logits)
    assert calls == [IDS.shape[1]]
