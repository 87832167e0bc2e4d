"""What every kernel does before it computes: choose a backend, check arguments, settle the precision."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from quietstar_kernels.backends import BACKENDS

BACKEND_VARIABLE = "QUIETSTAR_BACKEND"
"""Environment variable that replaces "auto": what a whole run or test suite uses, without a change to its code."""

WITHOUT_CUDA = "use 'torch', or set TRITON_INTERPRET=1 before the start to interpret the kernels on a CPU, slowly"
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_backend(backend: str) -> str:
    """Return `backend`, with "auto" replaced by `QUIETSTAR_BACKEND` where that is set.

    Raises:
        ValueError: the name, or the environment variable's, is unknown, or is "triton" where no tensor could run it.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(BACKEND_VARIABLE):
        source, backend = BACKEND_VARIABLE, os.environ[BACKEND_VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{source}: 'triton' is not installed here (it exists for Linux); 'torch' runs everywhere")
        if not torch.cuda.is_available() and not interpreting():
            raise ValueError(f"{source}: 'triton' wants a CUDA device, and there is none here; {WITHOUT_CUDA}")
    return backend


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """Name the backend that will run: "triton", "torch" or "reference".

    Args:
        backend: name of a backend, one of `BACKENDS`; "auto" is "triton" for CUDA tensors of 16 or 32 bits on sm_80 and
            later, and else "torch".
        tensor: first tensor argument of the operation, whose device and dtype decide.

    Raises:
        ValueError: the name is unknown, or "triton" cannot run where the tensor is.
        TypeError: "triton" does not know the tensor's dtype.
    """
    backend = check_backend(backend)
    if backend == "auto":
        fast = tensor.device.type == "cuda" and tensor.dtype in TRITON_DTYPES[:3] and HAS_TRITON
        return "triton" if fast and torch.cuda.get_device_properties(tensor.device).major >= 8 else "torch"
    if backend == "triton":
        if tensor.device.type != "cuda" and not interpreting():
            raise ValueError(f"backend: 'triton' wants CUDA tensors, got one on {tensor.device}; {WITHOUT_CUDA}")
        if tensor.dtype not in TRITON_DTYPES:
            raise TypeError(f"backend: 'triton' computes bfloat16, float16, float32 and float64, got {tensor.dtype}")
    return backend


# a constant, or torch.compile would trace the import
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it untyped
def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU: fixed when they are first imported."""
    return _interpreting()


@cache
def _interpreting() -> bool:
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision of scores, logits and sums: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a floating point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a floating point tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted a floating point dtype")


def require_integer(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is an int32 or int64 tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted an int32 or int64 tensor")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted int32 or int64")


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless `tensor` has `dtype`, that of the first argument."""
    if tensor.dtype != dtype:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, wanted {dtype} like the first argument; backend 'torch' mixes dtypes"
        )


def require_dense_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension is dense in memory; the other strides may be anything."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name}: got stride {tensor.stride(-1)} along the last dimension, wanted 1; pass {name}.contiguous()"
        )


def require_shape(name: str, tensor: Tensor, letters: Sequence[str], sizes: dict[str, int]) -> None:
    """Match a shape against named sizes; a letter seen for the first time takes its size from this tensor.

    Args:
        name: name of the argument in error messages.
        tensor: tensor whose shape is checked.
        letters: name of each dimension, as in ("B", "L", "Hkv", "D").
        sizes: sizes known so far, by name; extended in place.

    Raises:
        ValueError: another number of dimensions, or a size that differs from the known one.
    """
    fits = tensor.dim() == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted [{wanted}]")
    sizes.update(zip(letters, tensor.shape, strict=True))


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, wanted {device}, where the first argument is")
