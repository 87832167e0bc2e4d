"""Recording the output of each decoder layer, and replaying it as a checkpointed forward.

While thoughts are sampled, every layer computes the states that the differentiable forward would compute again. So they
are recorded, and the differentiable forward of a layer returns the recorded output without computing; its backward
recomputes the layer once, on text and streams together. That costs as much as ordinary gradient checkpointing, and the
sampling pass is free.

The matrix products of this recomputation have been computed too. Where the outputs of a layer's linear modules are
recorded as well (`LayerProducts`), they are taken from there: autograd's own graph of each module is built, without its
product. A product whose value no gradient depends on, such as the last one of a layer without a norm behind it, is left
out without being recorded (`find_value_uses`).

All of it replaces `forward` of layers and modules for the duration of a pass, so no model file is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.config.training import Replay
from quietstar.errors import UnsupportedBackboneError
from quietstar.model.attention import AttentionResults
from quietstar.model.upstream import Conv1D, GradientCheckpointingLayer, without_checkpointing

aten = torch.ops.aten

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

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(without_checkpointing(layer))  # until 5.23 checkpointing wrapped the forward
        stack.enter_context(_forwards({layer: intercepted(index, layer) for index, layer in enumerate(layers)}))
        yield


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Set the `forward` of modules within this context."""
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


# -- the products of a layer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerProducts:
    """Linear modules of one layer whose products the backward pass does not compute again.

    Args:
        recorded: Modules whose outputs are recorded, by name.
        unused: Modules whose outputs no gradient depends on, by name.
    """

    recorded: Mapping[str, nn.Module]
    unused: Mapping[str, nn.Module]


def layer_products(layer: nn.Module, uses: Mapping[str, bool], replay: Replay) -> LayerProducts:
    """Return the linear modules that a stage of `training.replay` records or leaves out in one layer.

    Args:
        layer: Decoder layer.
        uses: What `find_value_uses` returned for it.
        replay: Stage above `layers`.
    """
    attention = tuple(f"{name}." for name, module in layer.named_modules() if name and hasattr(module, "layer_idx"))
    kept = {"down": (), "mlp": [name for name in uses if not name.startswith(attention)]}.get(replay, uses)
    return LayerProducts(
        {name: layer.get_submodule(name) for name in kept if uses[name]},
        {name: layer.get_submodule(name) for name, used in uses.items() if not used},
    )


def find_value_uses(layer: nn.Module, run: RunLayer, hidden: Tensor) -> tuple[dict[str, bool], Tensor]:
    """Run a layer and find whether its gradient depends on the value that each of its linear modules computes.

    A value is followed through all operations on it; the gradient depends on it where one of them keeps for its
    backward pass what was computed from it. Modules with a `forward` of their own (such as quantised ones) are left
    out, adapters, which cost less than their memory, and those whose value is used but can't be recorded: they run
    several times or on other tokens than the layer, or the value is changed in place.

    Args:
        layer: Decoder layer.
        run: Layer as a function of its input.
        hidden: Input of the layer, [B, N, E], with gradient.

    Returns:
        Whether the value is used, by the module's name; and the layer's output.
    """
    watch, runs, elsewhere = _ValueWatch(), Counter[str](), set[str]()

    def watched(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            output = forward(*arguments, **options)
            runs[name] += 1
            if len(arguments) != 1 or options:
                watch.unfit.add(name)
            if output.shape[:-1] != hidden.shape[:-1]:
                elsewhere.add(name)
            watch.follow(output, name)
            return output

        return call

    modules = {
        name: module
        for name, module in layer.named_modules()
        if type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and not any(part.startswith("lora_") for part in name.split("."))
    }
    with (
        _forwards({module: watched(name, module.forward) for name, module in modules.items()}),
        saved_tensors_hooks(watch.keep, lambda nothing: nothing),
        watch,
    ):
        output = run(hidden)
    watch.alive.clear()  # autograd's graph holds the hooks, in a circle that no collector sees
    uses = {name: name in watch.kept for name in runs if name not in watch.unfit}
    recordable = {name for name, times in runs.items() if times == 1 and name not in elsewhere}
    return {name: used for name, used in uses.items() if not used or name in recordable}, output


class _ValueWatch(TorchDispatchMode):
    """Follows the values of modules from operation to operation, by the memory that they are in.

    Attributes:
        kept: Names of the values that something kept for its backward pass was computed from.
        alive: All tensors so far, so that no memory is used twice.
        unfit: Names of the values that were changed in place, so that another value can't stand for them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.kept: set[str] = set()
        self.unfit: set[str] = set()
        self._names: dict[int, set[str]] = {}
        self._outputs: dict[int, str] = {}
        self.alive: list[Tensor] = []

    def follow(self, output: Tensor, name: str) -> None:
        """Follow the output of a module."""
        memory = self._memory(output)
        self._names[memory] = self._names.get(memory, set()) | {name}
        self._outputs[memory] = name

    def keep(self, tensor: Tensor) -> None:
        """Note that an operation keeps a tensor for its backward pass, which there will not be."""
        self.kept |= self._names.get(self._memory(tensor), set())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation; its results are computed from all that its arguments are computed from."""
        output = func(*args, **(kwargs or {}))
        read = [self._memory(tensor) for tensor in _tensors((*args, *(kwargs or {}).values()))]
        names = set[str]().union(*(self._names.get(memory, ()) for memory in read))
        if func._schema.is_mutable and read[0] in self._outputs:
            self.unfit.add(self._outputs[read[0]])
        for tensor in _tensors((output,)):
            memory = self._memory(tensor)
            self._names[memory] = self._names.get(memory, set()) | names
        return output

    def _memory(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        return int(tensor.untyped_storage()._cdata)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _NoProducts(TorchDispatchMode):
    """Runs a linear module without its matrix product, whose result is zeros without memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or leave it out."""
        if func not in (aten.mm.default, aten.addmm.default):
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_zeros(()).expand(left.shape[0], right.shape[1])


def _without_product(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the forward of a linear module with autograd's graph of it, and with zeros as its value."""

    def call(states: Tensor) -> Tensor:
        states = states.contiguous()  # of others PyTorch adds the bias in place, to the zeros without memory
        with _NoProducts():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return forward(states)

    return call


# -- recording and replaying -------------------------------------------------------------------------------------------


class LayerRecord:
    """What the layers compute for text and streams, [B, L + P*S, E] each, filled piece by piece while thinking.

    Args:
        products: Linear modules of each layer that are recorded or left out; none: layers are recomputed as they are.
        attention: Whether the results of attention are recorded, too.

    Attributes:
        outputs: Output of every layer, by index.
        values: Output of every recorded module, by index of the layer and name; each is gone once it has been used.
        attention: Results of every layer's attention, by index, likewise; None where they are not recorded.
    """

    def __init__(self, products: Sequence[LayerProducts] = (), attention: bool = False) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.values: dict[tuple[int, str], Tensor] = {}
        self.attention: dict[int, AttentionResults] | None = {} if attention else None
        self._products = products
        self.text_length = 0
        self.streams = 0

    def write_text(self, index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
        """Run the layer and record its output: the interceptor for the pass over the text."""
        if index in self.outputs:
            raise UnsupportedBackboneError(f"{type(layer).__name__} runs several times a pass, and can't be recorded")
        with self._writing(index, None):
            output = _run_to_states(layer, run, hidden)
        self.text_length = output.shape[1]
        self.outputs[index] = output
        return output

    def open_streams(self, streams: int, stream_length: int) -> None:
        """Make room for P streams of S tokens after the text."""
        self.streams = streams
        self.make_room(self.outputs, streams * stream_length)
        self.make_room(self.values, streams * stream_length)

    def make_room(self, tensors: dict[Any, Tensor], count: int) -> None:
        """Move recorded tensors of the text to where they have room for `count` tokens of streams."""
        for key, text in tensors.items():
            tensors[key] = text.new_empty(text.shape[0], self.text_length + count, text.shape[2])
            tensors[key][:, : self.text_length] = text

    def write_streams(self, offset: int) -> Interceptor:
        """Return the interceptor for a pass over the tokens offset, offset + 1, ... of every stream."""

        def write(index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
            with self._writing(index, offset):
                output = _run_to_states(layer, run, hidden)
            self._fill(self.outputs[index], offset, output)
            return output

        return write

    def replay(self, index: int, layer: nn.Module, run: RunLayer, hidden: Tensor) -> Tensor:
        """Return the recorded output: the interceptor of a pass whose layers run in the backward pass only."""
        if self._products:
            run = _run_without_products(run, self._products[index], index, self.values)
        parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        output: Tensor = _Replay.apply(run, self.outputs[index], hidden, *parameters)  # type: ignore[no-untyped-call]
        return output

    def _fill(self, recorded: Tensor, offset: int, piece: Tensor) -> None:
        """Write a piece [B, P*s, E] of the streams, tokens offset .. offset + s - 1 of each, to [B, L + P*S, E]."""
        new = piece.unflatten(1, (self.streams, -1))
        recorded[:, self.text_length :].unflatten(1, (self.streams, -1))[:, :, offset : offset + new.shape[2]] = new

    def _writing(self, index: int, offset: int | None) -> AbstractContextManager[None]:
        """Record a layer's products within the context, of the text (None) or of the streams from `offset` on."""

        def written(key: tuple[int, str], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(states: Tensor) -> Tensor:
                output = forward(states)
                if offset is None:
                    self.values[key] = output
                else:
                    self._fill(self.values[key], offset, output)
                return output

            return call

        if not self._products:
            return nullcontext()
        recorded = self._products[index].recorded
        return _forwards({module: written((index, name), module.forward) for name, module in recorded.items()})


def _run_without_products(
    run: RunLayer, products: LayerProducts, index: int, values: dict[tuple[int, str], Tensor]
) -> RunLayer:
    """Return a layer that takes its products from `values`, and computes those that are gone.

    It holds no more of the record than the values: it lives as long as the graph of the pass.
    """

    def read(key: tuple[int, str], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(states: Tensor) -> Tensor:
            value = values.pop(key, None)
            if value is None:
                return forward(states)
            output: Tensor = _Value.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
                _without_product(forward)(states), value
            )
            return output

        return call

    def run_again(states: Tensor) -> Tensor:
        recorded = {module: read((index, name), module.forward) for name, module in products.recorded.items()}
        unused = {module: _without_product(module.forward) for module in products.unused.values()}
        with _forwards(recorded | unused):
            return run(states)

    return run_again


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


class _Value(torch.autograd.Function):
    """The identity, with a value that has been computed before."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


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
        if torch.is_grad_enabled():  # otherwise the second gradient would be silently wrong
            raise RuntimeError("a recorded pass has first gradients only: call backward without create_graph=True")
        hidden, *parameters = ctx.saved_tensors
        device, enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
            output = ctx.run(hidden)
        wanted = [tensor for tensor in (hidden, *parameters) if tensor.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradients[0], allow_unused=True))
        return None, None, *(next(found) if tensor.requires_grad else None for tensor in (hidden, *parameters))
