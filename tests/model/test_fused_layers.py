"""Layers whose elementwise work Liger-Kernel does (`training.fused_layers`) are the layers of the base.

Without a GPU, Triton's interpreter runs Liger-Kernel's own kernels, in float32: it has no bfloat16 arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from quietstar import ConfigError, QuietStarForCausalLM, UnsupportedBackboneError
from quietstar.config.objective import resolve_objective
from quietstar.config.training import FinetuningOptions, Replay, TrainingOptions
from quietstar.model import backbone
from quietstar.model.backbone import fuse_layers, replayed_products, unfuse_layers
from quietstar.model.upstream import LlamaPart, part_of_llama
from quietstar.objective.learning import learn
from quietstar.runs import machine
from quietstar.runs.machine import set_up
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.step_functions import language_modeling_step
from quietstar.training.trainer import Trainer
from tests.marks import slow
from tests.model.tiny import assert_same_gradients, gradients, make_ids, make_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_LAYER = {"num_hidden_layers": 1}
IDS = make_ids(batch=1, length=4).to(DEVICE)
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3")
CLOSE = 2e-5
"""Of gradients in float32, relative to the largest of their tensor: ten times what two orders of a sum differ by."""


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Liger-Kernel's operations, which the interpreter runs if two things are as compiled kernels have them.

    A float argument is a tensor, and CUDA's own function for the reciprocal root is Triton's. What the interpreter
    copies to and fro is hidden from those who watch PyTorch's operations, as a kernel on a GPU is.
    """
    ops = pytest.importorskip("liger_kernel.ops")
    if DEVICE == "cuda":
        return ops
    import numpy as np
    import triton.language as tl
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    as_before, run = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def as_tensors(argument: Any) -> Any:
        if not isinstance(argument, float):
            return as_before(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    def unseen(*arguments: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return run(*arguments, **options)

    monkeypatch.setattr(interpreter, "_implicit_cvt", as_tensors)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))
    return ops


def pair(family: str = "mistral", **options: Any) -> tuple[QuietStarForCausalLM, QuietStarForCausalLM]:
    """The same model twice: as it is, and fused."""
    plain, fused = (make_model(family, **{"changes": ONE_LAYER, **options}).to(DEVICE) for _ in range(2))
    fuse_layers(fused)
    return plain, fused


def backward(model: nn.Module, replay: Replay | None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step; None has two plain passes."""
    model.zero_grad()
    how: dict[str, Any] = {"reuse_sampling_pass": False} if replay is None else {"replay": replay}
    step = learn(model, IDS, seed=3, **how, **options)
    step.loss.backward()
    return step.loss.detach(), gradients(model)


def assert_same_step(plain: nn.Module, fused: nn.Module, replay: Replay | None) -> None:
    loss, wanted = backward(plain, replay)
    found_loss, found = backward(fused, replay)
    torch.testing.assert_close(found_loss, loss, atol=CLOSE, rtol=CLOSE)
    assert_same_gradients(found, wanted, CLOSE)


def own_forwards(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


# -- what is computed --------------------------------------------------------------------------------------------------


def of_norm(model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    norm = model.decoder.norm
    weight, epsilon = norm.weight.double(), norm.variance_epsilon
    return norm, lambda x: nn.functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def of_mlp(model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    mlp = model.decoder.layers[0].mlp
    gate, up, down = (linear.weight.double() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def definition(x: Tensor) -> Tensor:
        gates = x @ gate.T
        return (gates / (1 + torch.exp(-gates)) * (x @ up.T)) @ down.T

    return mlp, definition


@pytest.mark.parametrize("shape", [(1, 5, 32), (3, 1, 32), (2, 7, 32), (9, 32), (1, 32)])
@pytest.mark.parametrize("part", [of_norm, of_mlp])
@pytest.mark.usefixtures("liger")
def test_a_norm_and_an_mlp_are_their_definitions(part: Callable[..., Any], shape: tuple[int, ...]) -> None:
    module, definition = part(pair()[1])
    states = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    output, exact = module(states), definition(states.double())
    torch.testing.assert_close(output.double(), exact, atol=1e-5, rtol=1e-5)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found, wanted = (torch.autograd.grad(x, states, direction.to(x.dtype))[0] for x in (output, exact))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (4, 4, 8), (3, 1, 8), (2, 1, 12), (5, 5, 6)])
@pytest.mark.usefixtures("liger")
def test_queries_and_keys_are_rotated_as_complex_numbers(heads: int, kv_heads: int, size: int) -> None:
    """And what a projection has put out stays, as does the gradient that is handed in: Liger-Kernel rotates in place.

    A projection's output may be recorded; a gradient was overwritten where there is one head.
    """
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    fused = pair(changes={**ONE_LAYER, **sizes})[1]
    attention = fused.decoder.layers[0].self_attn
    rotate = vars(attention)["forward"].__func__.__globals__["apply_rotary_pos_emb"]
    projected = [
        torch.randn(2, 7, count, size, generator=torch.Generator().manual_seed(count)).to(DEVICE).requires_grad_()
        for count in (heads, kv_heads)
    ]
    angle = torch.randn(2, 7, size // 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))
    kept = [x.detach().clone() for x in projected]
    rotated = rotate(*(x.transpose(1, 2) for x in projected), cos, sin)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    turned = [torch.complex(*x.double().chunk(2, -1)) * turn for x in projected]
    exact = [torch.cat([x.real, x.imag], -1).transpose(1, 2) for x in turned]
    directions = [torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) for x in exact]
    given = [x.clone() for x in directions]
    found = torch.autograd.grad(rotated, projected, given)
    assert all(torch.equal(x, before) for x, before in zip(given, directions, strict=True))
    wanted = torch.autograd.grad(exact, projected, [x.double() for x in directions])
    assert all(torch.equal(x, before) for x, before in zip(projected, kept, strict=True))
    for ours, theirs in zip((*rotated, *found), (*exact, *wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "replay"),
    [
        ("mistral", "all"),
        ("smollm3", None),
        slow("qwen3", "linears"),
        slow("llama", "down"),
        slow("qwen2", "mlp"),
        slow("granite", "layers"),
        slow("mistral_window", "linears"),
        slow("qwen2_window", "all"),
    ],
)
@pytest.mark.usefixtures("liger")
def test_a_learning_step_is_the_same(family: str, replay: Replay | None) -> None:
    """Rotated in place, recorded queries would have been rotated twice: gradients were wrong by three quarters."""
    assert_same_step(*pair(family), replay)


@pytest.mark.slow
@pytest.mark.usefixtures("liger")
def test_a_step_errs_no_more_than_the_plain_layers() -> None:
    sizes = {**ONE_LAYER, "hidden_size": 24, "intermediate_size": 40, "head_dim": 6, "vocab_size": 30}
    assert_error_is_that_of_plain_layers("qwen3", torch.float32, "all", sizes, length=4)


@pytest.mark.parametrize("replay", ["mlp", slow("all"), slow("layers")])
@pytest.mark.usefixtures("liger")
def test_a_learning_step_with_adapters_is_the_same(replay: Replay) -> None:
    models = pair()
    for model in models:
        apply_finetuning(model, FinetuningOptions(lora_rank=2), "quietstar")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    assert_same_step(*models, replay)


@pytest.mark.parametrize("replay", [stage for stage in get_args(Replay) if stage != "layers"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@pytest.mark.usefixtures("liger")
def test_each_stage_records_and_leaves_out_the_same_products(family: str, replay: Replay) -> None:
    recorded, unused = (
        [
            [set(modules) for modules in found]
            for found in zip(
                *((layer.recorded, layer.unused) for layer in replayed_products(model, replay)), strict=True
            )
        ]
        for model in pair(family)
    )
    assert recorded == unused


# -- what is replaced --------------------------------------------------------------------------------------------------

PARTS: dict[str, LlamaPart] = {
    "layers.0.self_attn": "rotary embedding",
    "layers.0.mlp": "MLP",
    "layers.0.input_layernorm": "RMSNorm",
    "layers.0.post_attention_layernorm": "RMSNorm",
    "norm": "RMSNorm",
}
OF_QUERIES: dict[str, LlamaPart] = {f"layers.0.self_attn.{name}_norm": "RMSNorm" for name in "qk"}


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_the_parts_of_a_family_like_llama(family: str) -> None:
    decoder = make_model(family, changes=ONE_LAYER).decoder
    found = {name: part for name, module in decoder.named_modules() if (part := part_of_llama(module)) is not None}
    assert found == (PARTS | OF_QUERIES if family == "qwen3" else PARTS)


class Copied(nn.Module):
    """A norm of another family: another name and documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Any) -> Any:
        """Llama's."""
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class AnotherFunction(Copied):
    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.sqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class AnotherNumber(Copied):
    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(4).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class AnotherOrder(Copied):
    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class Swapped(LlamaMLP):
    def forward(self, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return down_proj


class Renamed(LlamaMLP):
    pass


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (Copied, "RMSNorm"),
        (AnotherFunction, None),
        (AnotherNumber, None),
        (AnotherOrder, None),
        (lambda: Swapped(LlamaConfig()), None),
        (lambda: Renamed(LlamaConfig()), "MLP"),
        (lambda: Renamed(LlamaConfig(hidden_act="swish")), "MLP"),
        (lambda: Renamed(LlamaConfig(hidden_act="relu")), None),
        (lambda: nn.RMSNorm(4), None),
        (nn.Identity, None),
    ],
)
def test_a_part_of_llama_is_known_by_its_code(kind: Callable[[], nn.Module], part: LlamaPart | None) -> None:
    with torch.device("meta"):
        assert part_of_llama(kind()) == part


NO_NORM, NO_ROTATION, NO_MLP = "no RMSNorm", "no rotary embedding", "no MLP"
REFUSED = {
    "gemma": f"{NO_NORM} and {NO_MLP} that",  # (1 + w), all in float32; GELU
    "gemma2": f"{NO_NORM} and {NO_MLP} that",
    "gemma3_text": f"{NO_NORM} and {NO_MLP} that",
    "phi3": f"{NO_ROTATION} and {NO_MLP} that",
    "olmo2": f"{NO_NORM} and {NO_ROTATION} that",
    "olmo3": f"{NO_NORM} and {NO_ROTATION} that",
    "cohere": f"{NO_NORM} and {NO_ROTATION} that",
    "gpt_neox": f"{NO_NORM} and {NO_ROTATION} and {NO_MLP} that",
    "gpt2": f"{NO_NORM} and {NO_ROTATION} and {NO_MLP} that",
    "opt": f"{NO_NORM} and {NO_ROTATION} and {NO_MLP} that",
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family: str) -> None:
    model = make_model(family).to(DEVICE)
    with pytest.raises(UnsupportedBackboneError, match=rf"{family}: layer 0 has {REFUSED[family]}.*fused_layers none"):
        fuse_layers(model)
    assert own_forwards(model) == {}


def with_gelu(model: Any) -> None:
    model.decoder.layers[1].mlp.act_fn = nn.GELU()


def with_a_forward_of_its_own(model: Any) -> None:
    mlp = model.decoder.layers[1].mlp
    mlp.forward = lambda states: type(mlp).forward(mlp, states)


def with_another_norm(model: Any) -> None:
    layer = model.decoder.layers[1]
    layer.input_layernorm = layer.post_attention_layernorm = nn.RMSNorm(32)


def with_a_subclass(model: Any) -> None:
    class Louder(type(model.decoder.layers[1].mlp)):  # type: ignore[misc]  # a class that only the model knows
        def forward(self, states: Tensor) -> Tensor:
            return 2 * super().forward(states)

    model.decoder.layers[1].mlp.__class__ = Louder


def with_another_attention(model: Any) -> None:
    model.decoder.layers[1].self_attn.forward = lambda *_, **__: None


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (with_gelu, NO_MLP),
        (with_a_forward_of_its_own, NO_MLP),
        (with_a_subclass, NO_MLP),
        (with_another_norm, NO_NORM),
        (with_another_attention, NO_ROTATION),
    ],
)
def test_a_layer_that_a_user_has_changed_is_refused(change: Callable[[Any], None], missing: str) -> None:
    model = make_model("llama").to(DEVICE)
    change(model)
    own = own_forwards(model)
    with pytest.raises(UnsupportedBackboneError, match=f"llama: layer 1 has {missing} that computes what Llama's does"):
        fuse_layers(model)
    assert own_forwards(model) == own


@pytest.mark.usefixtures("liger")
def test_weights_names_and_other_models_stay(tmp_path: Path) -> None:
    plain, fused = pair()
    other = make_model(changes=ONE_LAYER).to(DEVICE)
    assert set(own_forwards(fused)) == {f"base.model.{name}" for name in PARTS}
    assert own_forwards(plain) == own_forwards(other) == {}
    assert fused.state_dict().keys() == plain.state_dict().keys()
    forwards = own_forwards(fused)
    fuse_layers(fused)  # twice is once
    assert own_forwards(fused) == forwards
    plain.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    weights = "model.safetensors"
    assert (tmp_path / "fused" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    with torch.no_grad():
        assert torch.equal(plain.base(IDS).logits, other.base(IDS).logits)


@pytest.mark.usefixtures("liger")
def test_a_copy_of_a_fused_model_has_weights_of_its_own() -> None:
    fused = pair()[1]
    copied = copy.deepcopy(fused)
    norm, mlp = copied.decoder.norm, copied.decoder.layers[0].mlp
    states = torch.ones(1, 1, 32, device=DEVICE)
    with torch.no_grad():
        norm.weight.zero_()
        mlp.up_proj.weight.zero_()
        assert not norm(states).any() and not mlp(states).any()
        assert fused.decoder.norm(states).any() and fused.decoder.layers[0].mlp(states).any()


@pytest.mark.usefixtures("liger")
def test_a_run_trains_with_fused_layers_and_its_checkpoint_is_that_of_any_run(tmp_path: Path) -> None:
    def train(fused_layers: Any) -> tuple[Any, list[str], dict[str, Tensor]]:
        model = make_model(changes=ONE_LAYER)
        options = TrainingOptions(
            steps=2, batch_size=1, learning_rate=1e-3, eval_every=0, device=DEVICE, fused_layers=fused_layers
        )
        out = tmp_path / fused_layers
        result = Trainer(model, language_modeling_step, make_ids(2, 6), options, out, progress_label=None).run()
        names = sorted(path.name for path in result.checkpoint.iterdir())
        return result, names, load_file(result.checkpoint / "model.safetensors")

    (plain, files, wanted), (fused, found_files, found) = train("none"), train("liger")
    assert found_files == files and found.keys() == wanted.keys()
    assert fused.train_metrics["text_nll"] == pytest.approx(plain.train_metrics["text_nll"], rel=1e-5)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def wrong_forward(operation: Any) -> Any:
    class Wrong(operation):  # type: ignore[misc]  # Liger-Kernel has no types
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            found = operation.forward(ctx, *arguments)
            return tuple(1.01 * x for x in found) if isinstance(found, tuple) else 1.01 * found

    return Wrong


def wrong_backward(operation: Any) -> Any:
    class Wrong(operation):  # type: ignore[misc]  # Liger-Kernel has no types
        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return tuple(x if x is None else 1.01 * x for x in operation.backward(ctx, *gradients))

    return Wrong


@pytest.mark.parametrize("operation", ["LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction"])
@pytest.mark.parametrize(("wrong", "what"), [(wrong_forward, "states"), (wrong_backward, "gradient")])
def test_an_operation_that_computes_something_else_is_found(
    liger: Any, monkeypatch: pytest.MonkeyPatch, operation: str, wrong: Callable[[Any], Any], what: str
) -> None:
    model = make_model(changes=ONE_LAYER).to(DEVICE)
    monkeypatch.setattr(liger, operation, wrong(getattr(liger, operation)))
    with pytest.raises(UnsupportedBackboneError, match=rf"mistral: with Liger-Kernel's .* the {what} .*none"):
        fuse_layers(model)
    assert own_forwards(model) == {} and not model.fused


@pytest.mark.usefixtures("liger")
def test_a_model_that_was_fused_can_have_its_own_layers_again() -> None:
    """A trainer without fused layers trained a model with them that one with them had left."""
    model = make_model(changes=ONE_LAYER).to(DEVICE)
    fuse_layers(model)
    assert own_forwards(model)
    unfuse_layers(model)
    assert own_forwards(model) == {} and not model.fused
    fuse_layers(model)
    assert own_forwards(model)


@pytest.mark.usefixtures("liger")
def test_what_liger_kernel_cannot_run_is_refused_by_name() -> None:
    model = make_model(dtype=torch.float64, changes=ONE_LAYER).to(DEVICE)
    with pytest.raises(UnsupportedBackboneError, match=r"mistral: Liger-Kernel can't run in its layers \(.*float64"):
        fuse_layers(model)
    assert own_forwards(model) == {}


@pytest.mark.usefixtures("liger")
def test_gradients_that_would_be_silently_wrong_are_errors() -> None:
    """Its gradient of the product with SiLU is written over the product's inputs; a second one would read it."""
    states = torch.randn(1, 3, 32, device=DEVICE, requires_grad=True)
    layer = pair()[1].decoder.layers[0]
    output = layer.mlp(states).square().sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        output.backward()
    for module in (layer.mlp, layer.input_layernorm):
        first = torch.autograd.grad(module(states).square().sum(), states, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.usefixtures("liger")
def test_a_norms_gradient_may_be_taken_twice_and_leaves_the_one_it_is_given() -> None:
    norm = pair()[1].decoder.norm
    states = torch.randn(1, 3, 32, device=DEVICE, requires_grad=True)
    output, direction = norm(states), torch.ones(1, 3, 32, device=DEVICE)
    first, second = (torch.autograd.grad(output, states, direction, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and bool((direction == 1).all())


def test_on_a_cpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="fused_layers: got liger, but the model is on cpu; needs a CUDA device"):
        fuse_layers(make_model())
    with pytest.raises(ConfigError, match="fused_layers: got liger, but Linear is no thinking model; use none"):
        fuse_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("device", "installed", "told"),
    [
        ("cpu", True, "whose kernels need a CUDA device, but training.device is cpu; use none"),
        ("cpu", False, "whose kernels need a CUDA device, but training.device is cpu; use none"),
        ("auto", True, "whose kernels need a CUDA device, but PyTorch sees none here; use none"),
        ("auto", False, r"but Liger-Kernel is not installed; pip install 'quietstar\[gpu\]', or use none"),
        ("cuda", False, r"but Liger-Kernel is not installed; pip install 'quietstar\[gpu\]', or use none"),
        ("cuda:1", True, "training.device: got cuda:1, but PyTorch sees 0 CUDA devices here"),
    ],
)
def test_a_command_refuses_it_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, told: str
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_up(TrainingOptions(device=device))
    with pytest.raises(ConfigError, match=told):
        set_up(TrainingOptions(device=device, fused_layers="liger"))


def test_without_the_package_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    model = make_model().to(DEVICE)
    with pytest.raises(ConfigError, match=r"pip install 'quietstar\[gpu\]'"):
        fuse_layers(model)
    backward(model, "layers")  # nothing else asks for it


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [*get_args(Replay), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
@pytest.mark.usefixtures("liger")
def test_a_step_on_a_gpu_errs_no_more_than_the_plain_layers(
    family: str, dtype: torch.dtype, replay: Replay | None
) -> None:
    """Against the same model in float64, of sizes that no block divides, with the same thoughts."""
    sizes = {"hidden_size": 200, "intermediate_size": 700, "num_hidden_layers": 4, "head_dim": 40, "vocab_size": 300}
    assert_error_is_that_of_plain_layers(family, dtype, replay, sizes, length=32)


def assert_error_is_that_of_plain_layers(
    family: str, dtype: torch.dtype, replay: Replay | None, sizes: dict[str, Any], length: int
) -> None:
    """REINFORCE is left out: its weights are differences of nearly equal losses, which magnify every rounding."""
    plain, fused = pair(family, dtype=dtype, changes=sizes)
    exact = copy.deepcopy(plain).double()
    generator, high = torch.Generator().manual_seed(0), sizes["vocab_size"]
    ids = torch.randint(high, (2, length), generator=generator).to(DEVICE)
    tokens = torch.randint(high, (2, 2 * (length - 1), 2), generator=generator).to(DEVICE)
    objective = dataclasses.replace(resolve_objective("default"), policy_weight=0.0)

    def gradient(model: Any) -> Tensor:
        how: dict[str, Any] = {"record": True, "replay": replay} if replay is not None else {}
        thoughts = model.think(ids, tokens=tokens, **how)
        learn(model, ids, thoughts=thoughts, objective=objective, reuse_sampling_pass=bool(how)).loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    truth = gradient(exact)
    error, allowed = (float((gradient(model) - truth).norm() / truth.norm()) for model in (fused, plain))
    assert error <= 1.5 * allowed + 1e-6, (error, allowed)
