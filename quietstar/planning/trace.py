"""One training step on meta tensors: the code that trains, so that the plan knows what it will take.

Peaks repeat from micro-batch to micro-batch, so a step is cut down to at most two of them: the second has the gradients
of the first beside it.

The trace of a deep model from those of two shallow ones.

Layers that are alike add the same bytes at every time and the same operations, so a step of n of them follows from one
of a few and one of a few more, exactly.
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

from quietstar.config.training import TrainConfig
from quietstar.data.batches import Batch
from quietstar.model import attention
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

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
LAYER_INPUTS, KEYS_VALUES = "layer inputs", "keys and values of thoughts"
SAMPLING, ACTIVATIONS, RECOMPUTE = "sampling step", "layer activations", "recompute of one layer"
GRADIENT_FLOW, OTHER = "gradients of activations", "other"
KINDS = {
    WEIGHTS: "parameters and buffers",
    GRADIENTS: "summed over the micro-batches of a step",
    OPTIMIZER: "AdamW's moments, and float32 copies of low-precision weights",
    LAYER_INPUTS: "what the sampling pass records of each layer, to recompute it from",
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
"""Kind and part of what a layer does, by the part that it is called from."""
PARTS = (THINK, kernels.SAMPLING_HEAD, TALK, LOSSES, kernels.LOSS_HEAD, RECOMPUTING, BACKWARD, STEP)


@dataclass(frozen=True)
class Trace:
    """What a step takes. Bytes by kind, the keys of `KINDS`; parts of the step are those of `PARTS`.

    Args:
        micro_batches: In a step.
        text_tokens: Of a step.
        stream_tokens: Of a step.
        standing: Before a step: weights and optimizer.
        kept: Between the forward and the backward pass of the first micro-batch.
        peaks: By part and place, when most bytes were alive there.
        largest: The most of each kind, each at its own time.
        work: By part, how often a step does which operation.
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
        """Part and place at which most bytes are alive."""
        return max(self.peaks, key=lambda time: self.peaks[time].total())

    @property
    def peak(self) -> Counter[str]:
        """The bytes that are alive then."""
        return self.peaks[self.peak_time]

    @property
    def activations(self) -> int:
        """Those of them that are not weights, gradients or the optimizer's."""
        return self.peak.total() - sum(self.peak[kind] for kind in (WEIGHTS, GRADIENTS, OPTIMIZER))

    def flops(self, part: str) -> int:
        """FLOPs of a part of the step."""
        return round(sum(times * work.flops for work, times in self.work.get(part, {}).items()))


def trace_step(config: TrainConfig, base: PreTrainedConfig, backend: str) -> Trace:
    """Runs one step on meta tensors.

    Args:
        config: Of the run.
        base: Configuration of the base model, or of a thinking one.
        backend: Where it would run: "cpu", or "cuda" for the Triton kernels.

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
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which is 0, as the other's
        warnings.filterwarnings("ignore", "training.master_weights")  # judged by weights, which are 0
        stack.enter_context(MetaTensors(ledger, kernels.KERNELS[backend](ledger)))
        with ledger.labelled(WEIGHTS):
            model = meta_model(config, base)
        with ledger.labelled(OPTIMIZER):
            optimizer = meta_optimizer(model, options)
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
            stepper.run(1, batch.part(0, size))  # after which only what has a gradient has moments
        watch.kept = Counter()
        gc.collect()  # so that a plan does not hang on when Python last did
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
    """Tells the ledger what a model is doing, and whose memory is whose."""

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
        """`compute`, followed by its backward pass."""

        def run(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
            with self._ledger.labelled(OTHER, LOSSES):
                result = compute(model, batch, seed)
            self.kept = self.kept or self._ledger.alive.copy()
            self._ledger.kind, self._ledger.part = GRADIENT_FLOW, BACKWARD
            return result

        return run

    def optimizer(self, optimizer: MasterAdamW) -> MasterAdamW:
        """The optimizer, its work being its own."""
        for name, kind, part in (
            ("collect_gradients", GRADIENTS, BACKWARD),
            ("gradient_norms", OTHER, STEP),
            ("clip", OTHER, STEP),
            ("step", OPTIMIZER, STEP),
            ("zero_grad", OTHER, STEP),
        ):
            vars(optimizer)[name] = self._during(getattr(optimizer, name), kind, part)
        return optimizer

    def replacements(self, backend: str) -> Iterator[AbstractContextManager[None]]:
        """What has to be other than it is while a step is traced."""
        yield replaced(LayerRecord, "write_text", self._recording(LayerRecord.write_text))
        yield replaced(LayerRecord, "open_streams", self._during(LayerRecord.open_streams, LAYER_INPUTS))
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
            self._ledger.relabel(output, LAYER_INPUTS)
            return output

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
        """A layer's forward pass, also where it is called without the layer's hooks: in the backward pass."""

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

        return leave


def layer_name(index: int) -> str:
    """The place of a layer, counted from 0."""
    return f"layer {index + 1}"


KeyT = TypeVar("KeyT")
UNLIKE = ("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step", "max_window_layers", "moe_layer_freq")
"""Options by which families make some layers unlike others, besides `layer_types`."""


def trace_model(config: TrainConfig, base: PreTrainedConfig, backend: str) -> Trace:
    """`trace_step`, with as few layers as tell it all."""
    text: Any = base.text_config if isinstance(base, QuietStarConfig) else base
    layers, period = int(text.num_hidden_layers), period_of(text)
    few = 2 * period + (layers - 2 * period) % period
    if layers <= few + period or config.finetuning.freeze.strip():
        return trace_step(config, base, backend)
    short, long = (trace_step(config, _with_layers(base, count), backend) for count in (few, few + period))
    return extrapolate(short, long, few, period, layers)


def period_of(text: Any) -> int:
    """After how many layers their kinds repeat; all of them if it is not known."""
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
    """The trace of a model of many layers.

    Args:
        short: Of a model of `few` layers.
        long: Of one of `period` more.
        few: Layers, at least two periods of them.
        period: After how many layers their kinds repeat.
        layers: Of the model; `few` and a multiple of the period.
    """
    steps = (layers - few) // period

    def extend(a: dict[KeyT, Any], b: dict[KeyT, Any]) -> dict[KeyT, Any]:
        return {key: a.get(key, 0) + steps * (b.get(key, 0) - a.get(key, 0)) for key in a.keys() | b.keys()}

    peaks = {}
    for (part, place), peak in short.peaks.items():
        # of a sequence of layers that grows evenly, the first or the last has the peak
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
    """What a place among few layers is called among a period more, and among all of them."""
    if not place:
        return [("", "")]
    index = next(index for index in range(few) if layer_name(index) == place)
    found = [(place, place)] if index < few - period else []
    if index >= period:
        found.append((layer_name(index + period), layer_name(index + layers - few)))
    return found
