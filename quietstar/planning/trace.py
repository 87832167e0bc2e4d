"""Traces one training step on meta tensors, with the code that trains, to find what it will take.

`trace_model` is called; `trace_step` does the work. Peaks repeat from micro-batch to micro-batch, so at most two of
them are run: the second has the gradients of the first in memory. Layers of one kind add the same bytes at every time
and the same operations, so the trace of a deep model follows exactly from those of two shallow ones (`extrapolate`).
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from quietstar.config.training import TrainConfig, replay_stage
from quietstar.data.batches import Batch
from quietstar.model import attention
from quietstar.model.backbone import replayed_products
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.layers import LayerRecord, RunLayer, decoder_layers
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.upstream import checkpointing, set_checkpointing
from quietstar.planning import kernels
from quietstar.planning.meta_tensors import Ledger, MetaTensors, Work, replaced
from quietstar.planning.model import import_libraries, meta_model, meta_optimizer
from quietstar.training.optimizer import MasterAdamW
from quietstar.training.step import OptimizerStep, StepResult
from quietstar.training.step_functions import ComputeStep, compute_step

KeyT = TypeVar("KeyT")

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
LAYER_INPUTS, KEYS_VALUES = "layer inputs", "keys and values of thoughts"
RECORDED = "recorded operations"
SAMPLING, ACTIVATIONS, RECOMPUTE = "sampling step", "layer activations", "recompute of one layer"
GRADIENT_FLOW, OTHER = "gradients of activations", "other"
KINDS = {
    WEIGHTS: "parameters and buffers",
    GRADIENTS: "summed over the micro-batches of a step",
    OPTIMIZER: "AdamW's moments, and float32 copies of low-precision weights",
    LAYER_INPUTS: "what the sampling pass records of each layer, to recompute it from",
    RECORDED: "of the layers, by training.replay, so that they are not computed again",
    KEYS_VALUES: "of text and streams, while thoughts are sampled",
    SAMPLING: "one layer's activations while sampling",
    ACTIVATIONS: "what the layers keep for the backward pass",
    RECOMPUTE: "one layer's activations, recomputed in the backward pass",
    GRADIENT_FLOW: "on their way back through the layers",
    kernels.LOGITS: "of as many rows as are computed at a time",
    kernels.SAVED_BY_LOSSES: "of hidden states and lm_head, made with the losses",
    OTHER: "embeddings, final norm, mixing head, what leads from one to the next",
}
THINK, TALK, LOSSES, BACKWARD, RECOMPUTING, STEP = (
    "sampling thoughts",
    "forward pass",
    "losses",
    "backward pass",
    "recomputing layers",
    "optimizer step",
)
IN_LAYERS = {
    THINK: (SAMPLING, THINK),
    TALK: (ACTIVATIONS, TALK),
    LOSSES: (ACTIVATIONS, TALK),
    BACKWARD: (RECOMPUTE, RECOMPUTING),
    RECOMPUTING: (RECOMPUTE, RECOMPUTING),
}
"""Kind of memory and part of the step within a layer, by the part that the layer is called from."""

PARTS = (THINK, kernels.SAMPLING_HEAD, TALK, LOSSES, kernels.LOSS_HEAD, RECOMPUTING, BACKWARD, STEP)


UNLIKE = ("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step", "max_window_layers", "moe_layer_freq")
"""Options with which model families make some layers different from others, besides `layer_types`."""


@dataclass(frozen=True)
class Trace:
    """Memory and work of a step: bytes by kind, the keys of `KINDS`, and operations by part of the step, those of
    `PARTS`.

    Args:
        micro_batches: Number of micro-batches in a step.
        text_tokens: Number of text tokens in a step.
        stream_tokens: Number of tokens of the thought streams in a step.
        standing: Bytes before a step: weights and optimizer.
        kept: Bytes between the forward and the backward pass of the first micro-batch.
        peaks: Bytes at the time of most bytes, by part and place.
        largest: Most bytes of each kind; the kinds have their maxima at different times.
        work: Number of times that a step runs each operation, by part.
    """

    micro_batches: int
    text_tokens: int
    stream_tokens: int
    standing: Counter[str]
    kept: Counter[str]
    peaks: dict[tuple[str, str], Counter[str]]
    largest: Counter[str]
    work: dict[str, dict[Work, float]]

    @property
    def peak_time(self) -> tuple[str, str]:
        """Part and place with the most bytes in use."""
        return max(self.peaks, key=lambda time: self.peaks[time].total())

    @property
    def peak(self) -> Counter[str]:
        """Bytes in use at `peak_time`."""
        return self.peaks[self.peak_time]

    @property
    def activations(self) -> int:
        """Bytes at the peak that are not weights, gradients or the optimizer's."""
        return self.peak.total() - sum(self.peak[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER))

    def flops(self, part: str) -> int:
        """Returns the FLOPs of a part of the step."""
        return round(sum(times * work.flops for work, times in self.work.get(part, {}).items()))


def trace_step(config: TrainConfig, base: PreTrainedConfig, backend: str) -> Trace:
    """Runs one step on meta tensors.

    Args:
        config: Configuration of the run.
        base: Configuration of the base model, or of a thinking one.
        backend: Device to trace for: "cpu", or "cuda" for the Triton kernels.

    Raises:
        ConfigError, UnsupportedBackboneError: The model can't be made to think.
    """
    options = config.training
    size = options.micro_batch_size or options.batch_size
    micro_batches = options.batch_size // size
    traced = min(2, micro_batches)
    tokens = torch.zeros(traced * size, config.data.length, dtype=torch.int64)
    batch = Batch(tokens, None, [f"text {index}" for index in range(len(tokens))])

    import_libraries(config)
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # it is 0 for all
        warnings.filterwarnings("ignore", "training.master_weights")  # it judges weights, which are 0 here
        stack.enter_context(MetaTensors(ledger, kernels.KERNELS[backend](ledger)))
        with ledger.labelled(WEIGHTS):
            model = meta_model(config, base)
        with ledger.labelled(OPTIMIZER):
            optimizer = meta_optimizer(model, options)
        if options.method == "quietstar":
            replayed_products(model, replay_stage(options), "training.")  # found before the step that is traced
        watch = _Watch(ledger, model)
        stepper = OptimizerStep(
            model,
            watch.compute_step(compute_step(config)),
            replace(options, optimizer="adamw"),
            torch.device("cpu"),
            lambda: False,
            lambda step, event, message: None,
        )
        stepper.optimizer = watch.optimizer(optimizer)
        for replacement in watch.replacements(backend):
            stack.enter_context(replacement)
        if options.method == "language_modeling":
            stepper.run(1, batch.part(0, size))  # then only what has a gradient has moments
        watch.kept = Counter()
        gc.collect()  # so that a plan does not depend on when Python did it last
        standing = ledger.alive.copy()
        ledger.restart()
        stepper.run(2, batch)
    scale = micro_batches / traced
    return Trace(
        micro_batches=micro_batches,
        text_tokens=options.batch_size * config.data.length,
        stream_tokens=round(watch.stream_tokens * scale),
        standing=standing,
        kept=watch.kept,
        peaks=ledger.peaks,
        largest=ledger.largest,
        work={
            part: {work: times * (1.0 if part == STEP else scale) for work, times in counts.items()}
            for part, counts in ledger.work.items()
        },
    )


class _Watch:
    """Tells the ledger what a model is doing, and what its memory is for."""

    def __init__(self, ledger: Ledger, model: QuietStarForCausalLM) -> None:
        self._ledger = ledger
        self._model = model
        self._pass: attention.ThoughtPass | None = None
        self._before: list[tuple[str, str]] = []
        self.kept: Counter[str] = Counter()
        self.stream_tokens = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        model.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        layers = decoder_layers(model.decoder)
        self._places = [layer_name(index) for index in range(len(layers))]
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._enter_layer(self._places[index]))
            layer.register_forward_hook(self._leave_layer(index))
            checkpoint, on = checkpointing(layer)
            if checkpoint is not None:
                set_checkpointing(layer, on, self._checkpointing(index, checkpoint))
        vars(model)["think"] = self._during(model.think, OTHER, THINK)
        vars(model)["talk"] = self._during(model.talk, OTHER, TALK)

    def compute_step(self, compute: ComputeStep) -> ComputeStep:
        """Returns `compute`, after which the ledger counts the backward pass."""

        def run(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
            with self._ledger.labelled(OTHER, LOSSES):
                result = compute(model, batch, seed)
            self.kept = self.kept or self._ledger.alive.copy()
            self._ledger.kind, self._ledger.part = GRADIENT_FLOW, BACKWARD
            return result

        return run

    def optimizer(self, optimizer: MasterAdamW) -> MasterAdamW:
        """Returns the optimizer, with its methods' memory and work labelled."""
        for name, kind, part in (
            ("collect_gradient", GRADIENTS, BACKWARD),
            ("gradient_norms", OTHER, STEP),
            ("clip", OTHER, STEP),
            ("step", OPTIMIZER, STEP),
            ("zero_grad", OTHER, STEP),
        ):
            vars(optimizer)[name] = self._during(getattr(optimizer, name), kind, part)
        return optimizer

    def replacements(self, backend: str) -> Iterator[AbstractContextManager[None]]:
        """Yields the replacements of functions that are active while a step is traced."""
        yield replaced(LayerRecord, "write_text", self._recording(LayerRecord.write_text))
        yield replaced(LayerRecord, "make_room", self._making_room(LayerRecord.make_room))
        yield replaced(LayerRecord, "replay", self._replaying(LayerRecord.replay))
        if backend == "cuda":
            yield replaced(attention, "thought_attention", kernels.triton_attention)

    def _during(self, function: Callable[..., Any], kind: str, part: str | None = None) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with self._ledger.labelled(kind, part):
                return function(*arguments, **options)

        return run

    def _recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(record: LayerRecord, *arguments: Any) -> Any:
            output = function(record, *arguments)
            for kind, tensors in ((LAYER_INPUTS, record.outputs), (RECORDED, record.values)):
                for tensor in tensors.values():
                    self._ledger.relabel(tensor, kind)
            return output

        return run

    def _making_room(self, function: Callable[..., None]) -> Callable[..., None]:
        def run(record: LayerRecord, tensors: dict[Any, Tensor], count: int) -> None:
            with self._ledger.labelled(RECORDED if tensors is record.values else LAYER_INPUTS):
                function(record, tensors, count)

        return run

    def _replaying(self, replay: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(record: LayerRecord, index: int, layer: nn.Module, run_layer: RunLayer, hidden: Tensor) -> Tensor:
            return replay(record, index, layer, self._in_layer(index, run_layer), hidden)

        return run

    def _checkpointing(self, index: int, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(run_layer: Callable[..., Any], *arguments: Any) -> Any:
            return checkpoint(self._in_layer(index, run_layer), *arguments)

        return run

    def _in_layer(self, index: int, run_layer: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a layer's forward pass for calls without the layer's hooks too: in the backward pass."""

        def run(*arguments: Any) -> Any:
            with self._ledger.labelled():
                self._at(self._places[index])
                return run_layer(*arguments)

        return run

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._ledger.relabel(parameter.grad, GRADIENTS)

    def _enter_decoder(self, module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        self._pass = options.get("thought_pass")
        if self._pass is not None and self._pass.cache is None:
            self.stream_tokens += self._pass.anchor.numel() * self._pass.stream_length

    def _enter_layer(self, place: str) -> Callable[..., None]:
        def enter(layer: nn.Module, arguments: Any) -> None:
            self._before.append((self._ledger.kind, self._ledger.part))
            self._at(place)

        return enter

    def _at(self, place: str) -> None:
        ledger = self._ledger
        ledger.place, (ledger.kind, ledger.part) = place, IN_LAYERS[ledger.part]

    def _leave_layer(self, index: int) -> Callable[..., None]:
        def leave(layer: nn.Module, arguments: Any, output: Any) -> None:
            self._ledger.kind, self._ledger.part = self._before.pop()
            if self._pass is not None and self._pass.cache is not None:
                stored = self._pass.cache.layers[index]
                for tensor in (stored.text_key, stored.text_value, stored.stream_key, stored.stream_value):
                    if tensor is not None:
                        self._ledger.relabel(tensor, KEYS_VALUES)
                results = (self._pass.results or {}).get(index)
                for tensor in () if results is None else results.tensors():
                    self._ledger.relabel(tensor, RECORDED)

        return leave


def layer_name(index: int) -> str:
    """Returns the name of a layer's place in the ledger, for an index counted from 0."""
    return f"layer {index + 1}"


def trace_model(config: TrainConfig, base: PreTrainedConfig, backend: str) -> Trace:
    """Returns the trace of `trace_step`, from models of as few layers as determine it."""
    text: Any = base.text_config if isinstance(base, QuietStarConfig) else base
    layers, period = int(text.num_hidden_layers), period_of(text)
    few = 2 * period + (layers - 2 * period) % period
    if layers <= few + period or config.finetuning.freeze.strip():
        return trace_step(config, base, backend)
    short, long = (trace_step(config, _with_layers(base, count), backend) for count in (few, few + period))
    return extrapolate(short, long, few, period, layers)


def period_of(text: Any) -> int:
    """Returns the number of layers after which their kinds repeat; the number of all layers if it is not known."""
    layers = int(text.num_hidden_layers)
    if any(getattr(text, name, None) and getattr(text, name) != 1 for name in UNLIKE):
        return layers
    kinds = list(getattr(text, "layer_types", None) or [None] * layers)
    return next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i - p] for i in range(p, layers)))


def _with_layers(base: PreTrainedConfig, count: int) -> PreTrainedConfig:
    base = copy.deepcopy(base)
    text: Any = base.text_config if isinstance(base, QuietStarConfig) else base
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return base


def extrapolate(short: Trace, long: Trace, few: int, period: int, layers: int) -> Trace:
    """Returns the trace of a model of many layers.

    Args:
        short: Trace of a model of `few` layers.
        long: Trace of a model of `few` + `period` layers.
        few: Number of layers of the shallower model, at least two periods.
        period: Number of layers after which their kinds repeat.
        layers: Number of layers of the deep model, `few` and a multiple of the period.
    """
    steps = (layers - few) // period

    def extend(a: dict[KeyT, Any], b: dict[KeyT, Any]) -> dict[KeyT, Any]:
        return {key: a.get(key, 0) + steps * (b.get(key, 0) - a.get(key, 0)) for key in a.keys() | b.keys()}

    peaks = {}
    for (part, place), peak in short.peaks.items():
        # bytes grow evenly from layer to layer, so the first or the last has the peak
        for in_long, in_all in _places(place, few, period, layers):
            if (part, in_long) in long.peaks:
                peaks[part, in_all] = Counter(extend(peak, long.peaks[part, in_long]))
    return Trace(
        micro_batches=short.micro_batches,
        text_tokens=short.text_tokens,
        stream_tokens=short.stream_tokens,
        standing=Counter(extend(short.standing, long.standing)),
        kept=Counter(extend(short.kept, long.kept)),
        peaks=peaks,
        largest=Counter(extend(short.largest, long.largest)),
        work={part: extend(short.work[part], long.work[part]) for part in short.work},
    )


def _places(place: str, few: int, period: int, layers: int) -> list[tuple[str, str]]:
    """Returns the names of a place of the shallow model in the deeper one, and in the whole model."""
    if not place:
        return [("", "")]
    index = next(index for index in range(few) if layer_name(index) == place)
    found = [(place, place)] if index < few - period else []
    if index >= period:
        found.append((layer_name(index + period), layer_name(index + layers - few)))
    return found
