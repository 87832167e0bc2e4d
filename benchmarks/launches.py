"""Counts what the host asks a device to do: operators, and of these the launches, waits and what changes from token to
token. The counts are the same on every machine, and a CPU counts what a GPU would be sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quietstar.model.upstream import GradientCheckpointingLayer

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::unique_consecutive", "aten::_unique2")
"""Operators whose result, or its shape, the host needs to go on."""
ALLOCATIONS = ("aten::empty", "aten::new_empty")


@dataclass(frozen=True)
class Call:
    """One operator.

    Args:
        name: Name and overload.
        launch: Whether it computes or copies, and does not only show the same memory in another way, or make some.
        arguments: Numbers as they are, and of tensors dtype, shape, strides and place in their memory: what a CUDA
            graph repeats.
    """

    name: str
    launch: bool
    arguments: tuple[Any, ...]

    @property
    def waits(self) -> bool:
        return self.name.partition(".")[0] in WAITS


@dataclass
class Launches(TorchDispatchMode):
    """Writes down the operators that run in its context, composite ones taken apart: those of inference mode arrive
    whole, others in parts.

    Args:
        calls: Operators so far.
        generators: Number of `torch.Generator` that were made.
    """

    calls: list[Call] = field(default_factory=list)
    generators: int = 0
    _steps: list[tuple[int, int]] = field(default_factory=list)
    _passes: list[tuple[int, int]] = field(default_factory=list)
    _layers: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        memory = {x.untyped_storage()._cdata for x in given}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = func.name()
        is_new = any(x.untyped_storage()._cdata not in memory for x in made) and not name.startswith(ALLOCATIONS)
        launch = func._schema.is_mutable or is_new
        arguments = tuple(
            (x.dtype, *x.shape, *x.stride(), x.storage_offset()) if isinstance(x, Tensor) else x
            for x in tree_leaves((args, kwargs))
        )
        self.calls.append(Call(name, launch, arguments))
        return result

    @property
    def operators(self) -> int:
        return len(self.calls)

    @property
    def launches(self) -> int:
        return sum(call.launch for call in self.calls)

    @property
    def layer_launches(self) -> int:
        """Launches that decoder layers asked for."""
        return sum(call.launch for begin, end in self._layers for call in self.calls[begin:end])

    @property
    def layer_passes(self) -> int:
        """How often a decoder layer was run."""
        return len(self._layers)

    @property
    def waits(self) -> int:
        return sum(call.waits for call in self.calls)

    def steps(self) -> list[list[Call]]:
        """What was asked for within each call of the model, or each pass through its decoder where there is none."""
        return [self.calls[begin:end] for begin, end in self._steps or self._passes]

    @contextmanager
    def within(self, model: Any) -> Iterator[Launches]:
        """Counts, and tells apart what the decoder layers of a thinking model ask for."""
        decoder, plain, counter = model.base.get_decoder(), torch.Generator, self

        class Counted(torch.Generator):
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                counter.generators += 1
                return plain.__new__(plain, *args, **kwargs)

        def hooks_of(module: nn.Module, spans: list[tuple[int, int]]) -> Iterator[Any]:
            begun: list[int] = []
            yield module.register_forward_pre_hook(lambda *_: begun.append(len(self.calls)))
            yield module.register_forward_hook(lambda *_: spans.append((begun.pop(), len(self.calls))))

        spans = [(model, self._steps), (model.base, self._steps), (decoder, self._passes)]
        spans += [(part, self._layers) for part in decoder.modules() if isinstance(part, GradientCheckpointingLayer)]
        with ExitStack() as stack:
            for module, into in spans:
                for hook in hooks_of(module, into):
                    stack.callback(hook.remove)
            stack.enter_context(mock.patch.object(torch, "Generator", Counted))
            stack.enter_context(self)
            yield self


def changed(before: Sequence[Call], after: Sequence[Call]) -> list[Call]:
    """The launches of a token that a recording of the token before would not do: other numbers, or memory shown in
    another place or shape. All of them where there are more or fewer."""
    old, new = ([call for call in calls if call.launch] for calls in (before, after))
    if len(old) != len(new):
        return new
    return [b for a, b in zip(old, new, strict=True) if (a.name, a.arguments) != (b.name, b.arguments)]
