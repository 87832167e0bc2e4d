"""Tensors that have a shape but no memory.

Within `HollowTensors` floating-point tensors are PyTorch's fake tensors. Whole numbers and booleans are real: the
engine reads anchors, targets and masks, and branches on them. A number that is read from a hollow tensor is 0. What
real tensors would take and compute is noted in a `Ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from quietstar.planning.ledger import Ledger, Work

aten = torch.ops.aten
Kernel = Callable[..., Any]
"""Runs in place of an operator whose insides count; what it allocates and computes is noted."""


class HollowTensors(TorchDispatchMode):
    """Runs operations on hollow tensors.

    Args:
        ledger: Where memory and work are noted.
        kernels: What to run in place of an operator, by operator overload.
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
        hollow = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if hollow and func is aten._local_scalar_dense.default:
            return 0.0
        if hollow or (not inputs and _makes_floats(func, kwargs)):
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
        if not _is_view(func):
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
    """Whether an operation without tensors makes floating-point numbers."""
    if "dtype" not in {argument.name for argument in func._schema.arguments}:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:  # arange of whole numbers makes whole numbers
        return func._overloadpacket is not aten.arange
    return bool(dtype.is_floating_point)


def _with_values(tensor: Tensor, spread: int) -> Tensor:
    """Whole numbers and booleans get values: 0, or with `spread` indices below it at equal distances."""
    if not isinstance(tensor, FakeTensor) or tensor.is_floating_point():
        return tensor
    values = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if spread:
        values += torch.arange(tensor.shape[-1]) * spread // tensor.shape[-1]
    return values


@cache
def _is_view(func: Any) -> bool:
    """Whether the results are an argument's memory looked at in another way."""
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


_ATTENTION_PRODUCTS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}
"""Products of queries and keys that the attention of the text takes; PyTorch's registry knows its GPU kernels alone."""


def _attention_product(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> int:
    """FLOPs of one product of [B, H, N, D] with [B, Hkv, L, D]; half of a causal one is never made."""
    return 2 * query.numel() * key.shape[2] // (2 if causal else 1)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block `owner.name` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
