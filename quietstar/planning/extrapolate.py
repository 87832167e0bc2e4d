"""The trace of a deep model from those of two shallow ones.

Layers that are alike add the same bytes at every time and the same operations, so a step of n of them follows from one
of a few and one of a few more, exactly.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from quietstar.config import TrainConfig
from quietstar.model import QuietStarConfig
from quietstar.planning.trace import Trace, layer_name, trace_step

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
