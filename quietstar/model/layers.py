"""Recording the output of each decoder layer, and replaying it as a checkpointed forward.

While thoughts are sampled, every layer computes the states that the differentiable forward would compute again. So they
are recorded, and the differentiable forward of a layer returns the recorded output without computing; its backward
recomputes the layer once, on text and streams together. That costs as much as ordinary gradient checkpointing, and the
sampling pass is free.

Both replace the layers' `forward` for the duration of a pass (`intercept_layers`), so no model file is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quietstar.errors import UnsupportedBackboneError
from quietstar.model.upstream import GradientCheckpointingLayer, without_checkpointing

RunLayer = Callable[[Tensor], Tensor]
"""One decoder layer as a function of its input [B, N, E] alone."""
Interceptor = Callable[[int, nn.Module, RunLayer, Tensor], Tensor]
"""Function that is called in place of a layer, with (index, module, run, input [B, N, E])."""


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers in order.

    Raises:
        UnsupportedBackboneError: The decoder has no layers that can be checkpointed.
    """
    layers: list[nn.Module] = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UnsupportedBackboneError(
            f"{type(decoder).__name__} has no transformers GradientCheckpointingLayer, which recording thoughts needs"
        )
    return layers


@contextmanager
def intercept_layers(decoder: nn.Module, interceptor: Interceptor) -> Iterator[None]:
    """Let `interceptor` run in place of every decoder layer's forward, within this context.

    The layer's `forward` is set in the instance, where `nn.Module.__call__` finds it before that of the class. So hooks
    of the module run around it, once per pass, and no internal mechanism of transformers is involved.

    Args:
        decoder: Base model without its output head.
        interceptor: Function that runs in place of each layer. The `run` that it gets may be called in the backward
            pass too, after this context has ended.

    Raises:
        UnsupportedBackboneError: The decoder has no layers, or a layer's first positional argument is not its input.
    """
    layers = decoder_layers(decoder)
    before = [layer.__dict__.get("forward") for layer in layers]

    def intercepted(index: int, layer: nn.Module) -> Callable[..., Tensor]:
        forward = layer.forward

        def call(*arguments: Any, **options: Any) -> Tensor:
            if not arguments:
                raise UnsupportedBackboneError(
                    f"{type(layer).__name__} gets its hidden states by keyword; recording thoughts needs them in the "
                    "first place"
                )

            def run(states: Tensor) -> Tensor:
                with without_checkpointing(layer):  # in the backward pass too
                    output: Tensor = forward(states, *arguments[1:], **options)
                return output

            return interceptor(index, layer, run, arguments[0])

        return call

    with ExitStack() as off:
        try:
            for index, layer in enumerate(layers):
                off.enter_context(without_checkpointing(layer))  # until 5.23 checkpointing wrapped the forward
                layer.__dict__["forward"] = intercepted(index, layer)
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                if own is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.__dict__["forward"] = own


class LayerRecord:
    """The output of every layer for text and streams, [B, L + P*S, E] each, filled piece by piece while thinking."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.text_length = 0
        self.streams = 0

    def write_text(self, index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
        """Run the layer and record its output: the interceptor for the pass over the text."""
        if index in self.outputs:
            raise UnsupportedBackboneError(f"{type(layer).__name__} runs several times a pass, and can't be recorded")
        output = _run_to_states(layer, run, hidden)
        self.text_length = output.shape[1]
        self.outputs[index] = output
        return output

    def open_streams(self, streams: int, stream_length: int) -> None:
        """Make room for P streams of S tokens after the text."""
        self.streams = streams
        for index, text in self.outputs.items():
            self.outputs[index] = text.new_empty(
                text.shape[0], self.text_length + streams * stream_length, text.shape[2]
            )
            self.outputs[index][:, : self.text_length] = text

    def write_streams(self, offset: int) -> Interceptor:
        """Return the interceptor for a pass over the tokens offset, offset + 1, ... of every stream."""

        def write(index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
            output = _run_to_states(layer, run, hidden)
            buffer = self.outputs[index][:, self.text_length :].unflatten(1, (self.streams, -1))
            new = output.unflatten(1, (self.streams, -1))
            buffer[:, :, offset : offset + new.shape[2]] = new
            return output

        return write

    def replay(self, index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
        """Return the recorded output: the interceptor of a pass whose layers run in the backward pass only."""
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        output: Tensor = _Replay.apply(run, self.outputs[index], hidden, *parameters)  # type: ignore[no-untyped-call]
        return output


def _run_to_states(layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
    output = run(hidden)
    if not isinstance(output, Tensor):
        raise UnsupportedBackboneError(
            f"{type(layer).__name__} returns {type(output).__name__}, not a tensor; its output can't be recorded"
        )
    if output.ndim != 3:
        raise UnsupportedBackboneError(
            f"{type(layer).__name__} returns {list(output.shape)}, not [B, N, E]; its output can't be recorded"
        )
    return output


class _Replay(torch.autograd.Function):
    """The identity on the recorded output; its backward pass gives the layer's gradient, by recomputation."""

    @staticmethod
    def forward(ctx: Any, run: RunLayer, recorded: Tensor, hidden: Tensor, *parameters: nn.Parameter) -> Tensor:
        device = hidden.device.type
        ctx.run = run
        ctx.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.save_for_backward(hidden, *parameters)
        return recorded.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        device, enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
            output = ctx.run(hidden)
        wanted = [tensor for tensor in (hidden, *parameters) if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradients[0], allow_unused=True))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in (hidden, *parameters))
