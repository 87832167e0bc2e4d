"""The calls of the losses' Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quietstar_kernels.configurations import Configuration, configuration
from quietstar_kernels.launch import Launch
from quietstar_kernels.logits import LogitOptions


def case_of(tensor: Tensor) -> str:
    """What the configurations are keyed by, such as "32-bit"."""
    return f"{tensor.element_size() * 8}-bit"


def mix_rows(base: Tensor, *rest: Any) -> None:
    """`torch_backend.mix_rows`."""
    _run(mix_launch, "mix", base, *rest)


def row_losses(raw: Tensor, *rest: Any) -> None:
    """`torch_backend.row_losses`, of `raw` and `gradient` of `empty_logits`."""
    *_, gradient, options, _ = rest
    options.ban_(raw)
    _run(loss_launch, "loss" if gradient is None else "loss_gradient", raw, *rest)


def finish_gradient(gradient: Tensor, *rest: Any) -> None:
    """`torch_backend.finish_gradient`."""
    _run(hidden_gradient_launch, "hidden_gradient", gradient, *rest)


def _run(launch: Callable[..., Launch], kernel: str, first: Tensor, *rest: Any) -> None:
    chosen = configuration(f"mixed_cross_entropy.{kernel}", case_of(first), first.device)
    launch(first, *rest, chosen).run()


def mix_launch(
    base: Tensor,
    thought: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    states: Tensor,
    scaled: Tensor | None,
    ignore_index: int,
    residual: Tensor | None,
    configuration: Configuration,
) -> Launch:
    """`torch_backend.mix_rows`; states, scaled and residual are contiguous."""
    from quietstar_kernels.mixed_cross_entropy import triton_kernels

    rows, width = states.shape
    return _launch(
        triton_kernels.mix_kernel,
        rows,
        {
            "base": base,
            "thought": thought,
            "weight": weight,
            "row_scale": row_scale,
            "target": target,
            "states": states,
            "scaled": scaled,
            "residual": residual,
            **_strides(base, thought),
            "rows": rows,
            "width": width,
            "ignore_index": ignore_index,
        },
        {},
        configuration,
    )


def loss_launch(
    raw: Tensor,
    target: Tensor,
    lse: Tensor,
    nll: Tensor | None,
    gradient: Tensor | None,
    options: LogitOptions,
    ignore_index: int,
    configuration: Configuration,
) -> Launch:
    """`torch_backend.row_losses`.

    Args:
        raw: [n, V] raw logits in memory of `empty_logits`, banned tokens at -inf; overwritten only as the gradient.
        gradient: [n, V] gradient of the raw logits in memory of `empty_logits`, or `raw`; the padding becomes zero.
    """
    from quietstar_kernels.mixed_cross_entropy import triton_kernels

    rows, vocabulary = raw.shape
    inner, outer = options.factors
    return _launch(
        triton_kernels.loss_kernel,
        rows,
        {
            "raw": raw,
            "target": target,
            "lse": lse,
            "nll": nll,
            "gradient": gradient,
            "raw_stride": raw.stride(0),
            "gradient_stride": 0 if gradient is None else gradient.stride(0),
            "rows": rows,
            "columns": raw.stride(0),
            "vocabulary": vocabulary,
            "ignore_index": ignore_index,
            "inner": inner,
            "outer": outer,
        },
        {"SOFTCAP": options.softcap is not None, "LSE_KNOWN": nll is None},
        configuration,
    )


def hidden_gradient_launch(
    gradient: Tensor,
    base: Tensor | None,
    thought: Tensor | None,
    weight: Tensor | None,
    states: Tensor,
    target: Tensor,
    stored: Tensor | None,
    nll: Tensor | None,
    to_weight: Tensor | None,
    ignore_index: int,
    configuration: Configuration,
) -> Launch:
    """`torch_backend.finish_gradient`; gradient, states and stored are contiguous."""
    from quietstar_kernels.mixed_cross_entropy import triton_kernels

    rows, width = gradient.shape
    return _launch(
        triton_kernels.hidden_gradient_kernel,
        rows,
        {
            "gradient": gradient,
            "base": base,
            "thought": thought,
            "weight": weight,
            "states": states,
            "target": target,
            "stored": stored,
            "nll": nll,
            "to_weight": to_weight,
            **_strides(base, thought),
            "rows": rows,
            "width": width,
            "ignore_index": ignore_index,
        },
        {},
        configuration,
    )


def _strides(base: Tensor | None, thought: Tensor | None) -> dict[str, int]:
    return {
        f"{name}_{along}_stride": 0 if tensor is None else tensor.stride(dimension)
        for name, tensor in (("base", base), ("thought", thought))
        for dimension, along in enumerate(("row", "column"))
    }


def _launch(
    kernel: Any, rows: int, arguments: dict[str, Any], constants: dict[str, Any], configuration: Configuration
) -> Launch:
    return Launch(kernel, (-(-rows // configuration["BLOCK_ROWS"]),), arguments, configuration, constants)
