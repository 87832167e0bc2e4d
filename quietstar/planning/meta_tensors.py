"""Tensors that have a shape but no memory, and the ledger of the memory and work that real ones would take.

Within `MetaTensors` floating-point tensors are PyTorch's fake tensors. Integers and booleans are real: the engine reads
anchors, targets and masks, and branches on them. A number that is read from a meta tensor is 0. The `Ledger` counts
bytes by kind, with their peak, and operations by part of the step.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Kernel = Callable[..., Any]
"""A function that runs in place of an operator, so that the memory and work inside the operator are noted."""
_ATTENTION_PRODUCTS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
"""Number of products of queries and keys in the attention of the text; PyTorch's registry has its GPU kernels only."""


class MetaTensors(TorchDispatchMode):
    """Runs operations on meta tensors.

    Args:
        ledger: Ledger that notes memory and work.
        kernels: Functions to run in place of operators, by operator overload.
    """

    def __init__(self, ledger: Ledger, kernels: Mapping[Any, Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._ledger = ledger
        self._kernels = kernels
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation."""
        kwargs = kwargs or {}
        if func in self._kernels:
            with self:
                return self._kernels[func](*args, **kwargs)
        inputs = _tensors((*args, *kwargs.values()))
        meta = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if meta and func is aten._local_scalar_dense.default:
            return 0.0
        if meta or (not inputs and _makes_floats(func, kwargs)):
            with self._fake:
                output = func(*args, **kwargs)
            spread = inputs[0].shape[-1] if func is aten.topk.default else 0
            output = _map_tensors(lambda tensor: _with_values(tensor, spread), output)
        else:
            output = func(*args, **kwargs)
        outputs = _tensors((output,))
        for tensor in outputs:
            self._ledger.take(tensor)
        if func is aten.cumsum.default and kwargs.get("dtype") not in (None, inputs[0].dtype):
            self._ledger.borrow(_bytes(outputs[0]))  # PyTorch converts the whole input first
        asks = not outputs and not func._schema.is_mutable  # for a tensor's device, for instance: that is no work
        if not asks and not _is_view(func):
            self._ledger.compute(_work(func, args, kwargs, inputs, output, outputs))
        return output


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(function, one) for one in value)
    return value


def _makes_floats(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether an operation without tensor arguments makes floating-point numbers."""
    if "dtype" not in {argument.name for argument in func._schema.arguments}:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:  # arange of whole numbers makes whole numbers
        return func._overloadpacket is not aten.arange
    return bool(dtype.is_floating_point)


def _with_values(tensor: Tensor, spread: int) -> Tensor:
    """Gives integers and booleans values: 0, or with `spread` evenly spaced indices below it."""
    if not isinstance(tensor, FakeTensor) or tensor.is_floating_point():
        return tensor
    values = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if spread:
        values += torch.arange(tensor.shape[-1]) * spread // tensor.shape[-1]
    return values


@cache
def _is_view(func: Any) -> bool:
    """Returns whether the results are views of an argument's memory."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def _work(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    inputs: list[Tensor],
    output: Any,
    outputs: list[Tensor],
) -> Work:
    products = _ATTENTION_PRODUCTS.get(func)
    if products is not None:
        flops = products * _attention_product(*args[products == 5 :][:3], causal=args[-1] is True)
    else:
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=output))
    moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
    if not outputs:  # foreach and fused operations write to their arguments
        moved *= 2
    return Work(flops, moved, next((x.dtype for x in inputs if x.is_floating_point()), torch.float32))


def _attention_product(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> int:
    """Returns the FLOPs of one product of [B, H, N, D] with [B, Hkv, L, D]; half of a causal one is not computed."""
    return 2 * query.numel() * key.shape[2] // (2 if causal else 1)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets `owner.name` to `value` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Work:
    """The work of one operation.

    Args:
        flops: FLOPs of the operation's matrix products and attention; a multiplication and an addition count as two.
        bytes: Number of bytes that the operation reads and writes.
        dtype: Dtype of the numbers that the operation multiplies.
    """

    flops: int
    bytes: int
    dtype: torch.dtype


@dataclass
class Ledger:
    """Counts storages from the first tensor that uses them until the last one is gone.

    Attributes:
        kind: Kind that newly allocated memory is counted as.
        part: Name of the part of the step that is running.
        place: Name of the place within this part.
        alive: Bytes in use by kind.
        peaks: Copy of `alive` from the time of most bytes, by part and place.
        largest: Most bytes of each kind; the kinds have their maxima at different times.
        work: Number of times that each operation ran, by part.
    """

    kind: str = "other"
    part: str = "other"
    place: str = ""
    alive: Counter[str] = field(default_factory=Counter)
    peaks: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    largest: Counter[str] = field(default_factory=Counter)
    work: dict[str, Counter[Work]] = field(default_factory=dict)
    _storages: dict[int, tuple[str, int]] = field(default_factory=dict)
    _total: int = 0
    _most: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of bytes in use."""
        return self._total

    def restart(self) -> None:
        """Forgets peaks and work, but not the bytes in use."""
        self.peaks, self._most, self.work, self.largest = {}, {}, {}, self.alive.copy()

    @contextmanager
    def labelled(self, kind: str | None = None, part: str | None = None) -> Iterator[None]:
        """Counts memory as `kind` and work as `part` within the block; None leaves the current one."""
        before = self.kind, self.part
        self.kind, self.part = kind or self.kind, part or self.part
        try:
            yield
        finally:
            self.kind, self.part = before

    def take(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._storages:
            self._storages[key] = self.kind, size
            weakref.finalize(storage, self._free, key).atexit = False
            self._add(self.kind, size)

    def borrow(self, size: int) -> None:
        """Counts bytes that an operation has allocated and already freed."""
        self._add(self.kind, size)
        self._add(self.kind, -size)

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Counts the storage of a tensor as `kind` from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages.get(key, (kind, 0))
        if before != kind:
            self._storages[key] = kind, size
            self._add(before, -size)
            self._add(kind, size)

    def compute(self, work: Work) -> None:
        """Notes an operation."""
        self.work.setdefault(self.part, Counter())[work] += 1

    def _free(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.alive[kind] += size
        self._total += size
        if self.alive[kind] > self.largest[kind]:
            self.largest[kind] = self.alive[kind]
        here = self.part, self.place
        if self._total > self._most.get(here, 0):
            self._most[here] = self._total
            self.peaks[here] = self.alive.copy()
