"""The probe, which refuses a base model under which thoughts would be silently wrong, and fused layers.

The probe runs a few tokens with a thought stream, and compares the result with what the base computes alone. Where the
elementwise work of the layers is given to fused kernels, it compares the base with itself before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from transformers import PreTrainedConfig

from quietstar.config.training import Replay
from quietstar.errors import CheckpointError, ConfigError, UnsupportedBackboneError
from quietstar.model.attention import ThoughtPass
from quietstar.model.layers import (
    LayerProducts,
    LayerRecord,
    RunLayer,
    decoder_layers,
    find_value_uses,
    intercept_layers,
    layer_products,
)
from quietstar.model.loading import not_finite
from quietstar.model.thinking_model import ThinkingModel, output_head
from quietstar.model.upstream import (
    LlamaPart,
    attention_implementation,
    part_of_llama,
    untested_versions,
    with_advice,
    with_rotary_embedding,
)
from quietstar.runs.machine import WITHOUT_LIGER
from quietstar_kernels.dispatch import interpreting

PROBE_TEXT = 5
PROBE_STREAM = 2
PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3}
LOW_PRECISION_TOLERANCE = 3e-2
"""Largest accepted difference of hidden states, relative to their largest value. A dropped argument changes them by a
tenth or more; a wrong scale changes them by less, which only the tolerance of float32 detects. Where many layers round
one after another, more is accepted: twice what one unit in the last place of each layer's output changes."""
LOW_PRECISION_GRADIENT = 0.25
"""Largest accepted relative difference of gradients in low precision, where rounding adds up over the layers; a lost or
doubled gradient is wrong by half or more."""
PROBING = threading.RLock()
"""Held during a probe, which changes the model's attention for a moment, so that threads do not use it meanwhile."""


def probe_once(model: ThinkingModel) -> None:
    """Probes a model once, as soon as it has weights.

    Raises:
        UnsupportedBackboneError: The probe has failed, as `probe_backbone` describes.
    """
    if model.probed or any(parameter.is_meta for parameter in model.parameters()):
        return
    with PROBING:
        if not model.probed:
            probe_backbone(model)
            model.probed = True


def probe_backbone(model: ThinkingModel) -> None:
    """Runs a few tokens and compares the result with the plain base model.

    The pass has a text of five tokens and a stream of two that starts from the text's second position. The stream's
    hidden states must be those that the base gives with its own attention when these two tokens simply follow the first
    two of the text; the text's hidden states and the logits of the head must be those of the base. A recorded pass over
    the same tokens must have the gradient of a plain one.

    Raises:
        UnsupportedBackboneError: A result differs; the message names the family, what differs, and the libraries whose
            releases are newer than tested.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            _probe_states(model)
            _probe_recording(model)
    except UnsupportedBackboneError as error:
        if (bad := not_finite(model)) is not None:
            raise CheckpointError(f"{bad}: has values that are NaN or infinite, so the model cannot be used") from error
        raise UnsupportedBackboneError(with_advice(error)) from error.__cause__


def _probe_inputs(model: ThinkingModel, **options: Any) -> tuple[Tensor, Tensor, Tensor, ThoughtPass]:
    """Returns embeddings of the text [1, 5, E] and the stream [1, 2, E], positions of both, and the pass over them."""
    embed: Any = model.base.get_input_embeddings()
    device = embed.weight.device
    ids = (torch.arange(PROBE_TEXT, device=device) * 7 + 3)[None] % embed.weight.shape[0]
    embeds = embed(ids)
    anchor = torch.tensor([[1]], dtype=torch.int32, device=device)
    positions = torch.tensor([[*range(PROBE_TEXT), 2, 3]], device=device)
    thought_pass = ThoughtPass(PROBE_TEXT, PROBE_STREAM, anchor, None, model.config.backend, **options)
    return embeds, embeds.flip(1)[:, :PROBE_STREAM], positions, thought_pass


def _probe_states(model: ThinkingModel) -> None:
    base: Any = model.base
    config = base.config
    family = config.model_type
    seen: list[tuple[int, int | None]] = []
    embeds, stream, positions, thought_pass = _probe_inputs(model, seen=seen)
    tolerance = PROBE_TOLERANCE.get(embeds.dtype, LOW_PRECISION_TOLERANCE)
    implementation = attention_implementation(config)
    try:
        hidden = model.run_decoder(torch.cat([embeds, stream], dim=1), positions, thought_pass)
        _check_layers(config, seen)
        base.set_attn_implementation("eager")  # the family's own attention, with whatever it does to its scores
        followed = torch.cat([embeds[:, :2], stream], dim=1)
        plain = model.decoder(inputs_embeds=followed, use_cache=False).last_hidden_state
        text = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = base(inputs_embeds=embeds, use_cache=False).logits.float()
        text_error = _relative(hidden[:, :PROBE_TEXT], text)
        thought_error = _relative(hidden[:, PROBE_TEXT:], plain[:, 2:])
        if embeds.dtype not in PROBE_TOLERANCE and max(text_error, thought_error) > tolerance:
            tolerance = max(tolerance, 2 * _rounding(model, embeds, text))
    except (UnsupportedBackboneError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything that the family's code, or a compiler, may raise
        raise UnsupportedBackboneError(f"{family}: text and thoughts can't be run in one pass ({error})") from error
    finally:
        base.set_attn_implementation(implementation)
    for name, difference in (("text", text_error), ("thought", thought_error)):
        if not difference <= tolerance:
            raise UnsupportedBackboneError(
                f"{family}: {name} states differ from the plain model's by {difference:.1e} of their size; "
                "its attention does something that thought attention does not know"
            )
    head = output_head(base)
    difference = _relative(head.logits(text).float(), logits)
    if not difference <= tolerance:
        raise UnsupportedBackboneError(
            f"{family}: lm_head applied to the final states gives other logits than the model ({difference:.1e})"
        )


def _rounding(model: ThinkingModel, embeds: Tensor, states: Tensor) -> float:
    """How far the base's own final states move if each value of each layer's output is the next number up or down."""
    generator = torch.Generator().manual_seed(0)

    def move(layer: nn.Module, arguments: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        half_a_unit = torch.finfo(hidden.dtype).eps / 2  # relative to the number, so that it is rounded to the next
        signs = torch.randint(2, hidden.shape, generator=generator).mul(2).sub(1).to(hidden.device)
        moved = (hidden.float() * (1 + half_a_unit * signs)).to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hooks = [layer.register_forward_hook(move) for layer in decoder_layers(model.decoder)]
    try:
        return _relative(model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state, states)
    finally:
        for hook in hooks:
            hook.remove()


def _probe_recording(model: ThinkingModel) -> None:
    """Checks that the stream's gradient in a recorded pass is the one that the base's own attention gives."""
    base: Any = model.base
    if any(parameter.is_inference() for parameter in base.parameters()):
        return  # a model made in inference mode never has a gradient
    embeds, stream, positions, thought_pass = _probe_inputs(model)
    text, stream = embeds.requires_grad_(), stream.requires_grad_()
    direction = torch.arange(stream.numel(), device=stream.device).cos().view_as(stream).to(stream.dtype)
    implementation = attention_implementation(base.config)

    def gradient(hidden: Tensor) -> Tensor:
        own, foreign = torch.autograd.grad(hidden, (text, stream), direction)
        return torch.cat([own[:, :2], foreign], dim=1)

    with _frozen(base):  # only the gradient of the inputs is wanted; those of a large base may not fit
        try:
            base.set_attn_implementation("eager")
            with torch.enable_grad(), intercept_layers(model.decoder, LayerRecord().write_text):
                followed = torch.cat([text[:, :2], stream], dim=1)
                plain = gradient(model.decoder(inputs_embeds=followed, use_cache=False).last_hidden_state[:, 2:])
        except torch.OutOfMemoryError:
            raise
        except UnsupportedBackboneError:
            if untested_versions():
                raise
            return  # layers that can't be recorded: training names them, and can run without recording
        except RuntimeError:
            return  # weights without a gradient, such as some quantised ones: the model can think, not learn
        finally:
            base.set_attn_implementation(implementation)
        record = LayerRecord()
        try:
            with intercept_layers(model.decoder, record.write_text):
                model.run_decoder(torch.cat([embeds, stream], dim=1), positions, thought_pass)
            recorded, layers = len(record.outputs), len(decoder_layers(model.decoder))
            if not recorded:
                raise UnsupportedBackboneError(f"{base.config.model_type}: 0 of {layers} layers were recorded")
            with torch.enable_grad(), intercept_layers(model.decoder, record.replay):
                hidden = model.run_decoder(torch.cat([text, stream], dim=1), positions, thought_pass)
                replayed = gradient(hidden[:, PROBE_TEXT:])
        except (UnsupportedBackboneError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # anything that the family's code, or a compiler, may raise
            raise UnsupportedBackboneError(
                f"{base.config.model_type}: a recorded pass can't be replayed ({error})"
            ) from error
    difference = _relative(replayed, plain)
    # low precision may overflow here where training, with its smaller gradients, does not
    if bool(plain.isfinite().all()) and not difference <= PROBE_TOLERANCE.get(plain.dtype, LOW_PRECISION_GRADIENT):
        raise UnsupportedBackboneError(
            f"{base.config.model_type}: the gradient of a recorded pass differs from the plain model's by "
            f"{difference:.1e} of its size"
        )


def replayed_products(model: ThinkingModel, replay: Replay, prefix: str = "") -> list[LayerProducts]:
    """Returns the linear modules of each layer that a stage of `training.replay` records or leaves out.

    The few tokens of the probe find out which values the backward pass uses: once, and again when adapters come or
    other weights are trained.

    Args:
        model: Thinking model with weights, or with meta tensors.
        replay: Stage of `training.replay`.
        prefix: Text before the option's name in messages, such as `training.`.

    Raises:
        ConfigError: The stage is unknown; or it is `down`, and there is no product whose value no gradient depends on.
    """
    if replay not in (stages := get_args(Replay)):
        raise ConfigError(f"{prefix}replay: got {replay!r}, needs one of {', '.join(stages)}")
    if replay == "layers":
        return []
    layers = decoder_layers(model.decoder)
    trained = tuple((id(parameter), parameter.requires_grad) for parameter in model.decoder.parameters())
    with PROBING:
        if model.value_uses[0] != trained:
            model.value_uses = trained, _find_value_uses(model)
    uses = model.value_uses[1]
    if replay == "down" and all(map(all, (layer.values() for layer in uses))):
        raise ConfigError(
            f"{prefix}replay: got down, but {model.base.config.model_type} has no linear module whose value the "
            "backward pass can do without (a norm may follow a layer's last); needs layers, or a stage that records "
            "values, such as mlp"
        )
    return [layer_products(layer, use, replay) for layer, use in zip(layers, uses, strict=True)]


def _find_value_uses(model: ThinkingModel) -> list[dict[str, bool]]:
    found: list[dict[str, bool]] = []

    def watch(index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
        uses, output = find_value_uses(layer, run, hidden.detach().requires_grad_())
        found.append(uses)
        return output

    with torch.inference_mode(False), torch.enable_grad(), intercept_layers(model.decoder, watch):
        embeds, stream, positions, thought_pass = _probe_inputs(model)
        model.run_decoder(torch.cat([embeds, stream], dim=1), positions, thought_pass)
    return found


# -- fused layers ------------------------------------------------------------------------------------------------------


def fuse_layers(model: nn.Module) -> None:
    """Gives the elementwise work of a thinking model's layers to the fused kernels of Liger-Kernel, in place.

    RMSNorm, rotary embedding and the product with SiLU are replaced in this model alone, where their code is Llama's.
    Weights, names and modules stay. A few tokens must have the states and the gradient that they had before.

    Args:
        model: Thinking model, or a module that holds one, on its device.

    Raises:
        ConfigError: Liger-Kernel is not installed, or the model is not on a CUDA device.
        UnsupportedBackboneError: The family has other layers than Llama, or they differ now from what they were; then
            the model is unchanged.
    """
    thinking = next((module for module in model.modules() if isinstance(module, ThinkingModel)), None)
    if thinking is None:
        raise ConfigError(
            f"training.fused_layers: got liger, but {type(model).__name__} is no thinking model; use none"
        )
    if thinking.fused:
        return
    family = thinking.base.config.model_type
    if thinking.device.type != "cuda" and not interpreting():
        raise ConfigError(
            f"training.fused_layers: got liger, but the model is on {thinking.device}; needs a CUDA device"
        )
    forwards = _fused_forwards(thinking.decoder, family)
    with PROBING, torch.inference_mode(False), torch.enable_grad(), _frozen(thinking.base):
        plain = _states_and_gradient(thinking)
        try:
            for module, forward in forwards.items():
                vars(module)["forward"] = forward
            _check_fused(thinking, plain)
        except BaseException:
            for module in forwards:
                vars(module).pop("forward", None)
            raise
    thinking.fused = list(forwards)
    thinking.value_uses = (), []  # they keep other values for the backward pass


def unfuse_layers(model: nn.Module) -> None:
    """Gives the layers of a model their own forwards again."""
    for thinking in model.modules():
        if isinstance(thinking, ThinkingModel) and thinking.fused:
            for module in thinking.fused:
                vars(module).pop("forward", None)
            thinking.fused, thinking.value_uses = [], ((), [])


def _fused_forwards(decoder: nn.Module, family: str) -> dict[nn.Module, Callable[..., Any]]:
    """Returns the forwards by Liger-Kernel of a decoder's modules, which use the modules' own weights."""
    parts = {module: part for module in decoder.modules() if (part := part_of_llama(module)) is not None}
    for index, layer in enumerate(decoder_layers(decoder)):
        there = {parts[module] for module in layer.modules() if module in parts}
        if missing := [part for part in get_args(LlamaPart) if part not in there]:
            raise UnsupportedBackboneError(
                f"{family}: layer {index} has no {' and no '.join(missing)} that computes what Llama's does, which "
                "Liger-Kernel's are used for; needs training.fused_layers none"
            )
    try:
        ops: Any = import_module("liger_kernel.ops")
    except ImportError as error:
        raise ConfigError(f"{WITHOUT_LIGER} ({error})") from None
    run: Any = _Fused.apply

    def norm(module: Any, states: Tensor) -> Any:
        # not in place: others may hold the gradient over which the norm's would be written
        arguments = (states, module.weight, module.variance_epsilon, 0.0, "llama", False, None)
        return run(*arguments, ops.LigerRMSNormFunction)

    def mlp(module: Any, states: Tensor) -> Any:
        return module.down_proj(run(module.gate_proj(states), module.up_proj(states), ops.LigerSiLUMulFunction))

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Any:
        rotation: Any = _FusedOnCopies.apply
        return rotation(query, key, cos, sin, ops.LigerRopeFunction)

    def forward_of(module: nn.Module, part: LlamaPart) -> Callable[..., Any]:
        forward = norm if part == "RMSNorm" else mlp if part == "MLP" else with_rotary_embedding(module, rotate)
        return MethodType(forward, module)  # a copy of the model gets its own

    return {module: forward_of(module, part) for module, part in parts.items()}


class _Fused(torch.autograd.Function):
    """An operation of Liger-Kernel, whose gradients are an error where they would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *given, ctx.operation = arguments
        return ctx.operation.forward(ctx, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        found = ctx.operation.backward(ctx, *gradients)
        # some kernels write a gradient over what they have read, which autograd does not see
        written = {tensor.untyped_storage()._cdata for tensor in found if isinstance(tensor, Tensor)}
        increment_version([tensor for tensor in saved if tensor.untyped_storage()._cdata in written])
        return (*found, None)


class _FusedOnCopies(_Fused):
    """An operation that writes over what it is given: projected queries may be recorded, and others hold a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _Fused.forward(ctx, *(one.clone() if isinstance(one, Tensor) else one for one in arguments))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return _Fused.backward(ctx, *(gradient.clone() for gradient in gradients))


def _states_and_gradient(model: ThinkingModel) -> tuple[Tensor, Tensor]:
    """Returns the decoder's states of the probe's text, [1, 5, E], and the gradient of the text in some direction."""
    embeds = _probe_inputs(model)[0].detach().requires_grad_()
    states = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    direction = torch.arange(states.numel(), device=states.device).cos().view_as(states).to(states.dtype)
    return states.detach(), torch.autograd.grad(states, embeds, direction)[0]


def _check_fused(model: ThinkingModel, plain: tuple[Tensor, Tensor]) -> None:
    family = model.base.config.model_type
    try:
        found = _states_and_gradient(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # anything that a compiler may raise
        raise UnsupportedBackboneError(f"{family}: Liger-Kernel can't run in its layers ({error})") from error
    dtype = plain[0].dtype
    limits = PROBE_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE), PROBE_TOLERANCE.get(dtype, LOW_PRECISION_GRADIENT)
    for name, ours, theirs, limit in zip(("states", "gradient"), found, plain, limits, strict=True):
        difference = _relative(ours, theirs)
        if name == "states" and dtype not in PROBE_TOLERANCE and difference > limit:
            limit = max(limit, 2 * _rounding(model, _probe_inputs(model)[0].detach(), ours))
        if bool(theirs.isfinite().all()) and not difference <= limit:
            raise UnsupportedBackboneError(
                f"{family}: with Liger-Kernel's operations the {name} of a few tokens differ by {difference:.1e} of "
                "their size; needs training.fused_layers none"
            )


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def _check_layers(config: PreTrainedConfig, seen: list[tuple[int, int | None]]) -> None:
    """Checks that every layer called thought attention, with the window that the configuration gives the layer."""
    family, window = config.model_type, getattr(config, "sliding_window", None)
    layers = getattr(config, "num_hidden_layers", len(seen))
    if len(seen) != layers:
        raise UnsupportedBackboneError(
            f"{family}: {len(seen)} of {layers} layers passed thought attention (the others do not use transformers' "
            "attention interface, or do not hand its keyword arguments on)"
        )
    if not window or not getattr(config, "use_sliding_window", True):
        return
    if window < 2 + PROBE_STREAM:
        raise UnsupportedBackboneError(
            f"{family}: a sliding window of {window} is below the {2 + PROBE_STREAM} of the probe"
        )
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    for (layer, told), kind in zip(seen, kinds, strict=True):
        if (told == window) != (kind == "sliding_attention"):
            raise UnsupportedBackboneError(
                f"{family}: layer {layer} is {kind} with a window of {window} and tells the attention function {told}"
            )
