"""What every kernel does before it computes: choose a backend, check arguments, settle the precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")


def resolve_backend(backend: str) -> str:
    """Name the backend that will run: "torch" or "reference".

    Args:
        backend: one of `BACKENDS`; "auto" is "torch" in this version.

    Raises:
        ValueError: the name is unknown, or it is "triton", which this version does not have.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        raise ValueError(
            "backend: 'triton' is not built into this version; use 'auto' or 'torch', which also runs on CUDA tensors"
        )
    return "torch" if backend == "auto" else backend


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


def require_shape(name: str, tensor: Tensor, letters: Sequence[str], sizes: dict[str, int]) -> None:
    """Match a shape against named sizes; a letter seen for the first time takes its size from this tensor.

    Args:
        name: the argument's name for the message.
        tensor: the argument.
        letters: one name for each dimension, as in ("B", "L", "Hkv", "D").
        sizes: the sizes known so far; extended in place.

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
