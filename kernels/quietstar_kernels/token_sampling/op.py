"""Sampling as PyTorch operators: chunks of rows, their product with lm_head, and one pass from logits to tokens.

Nothing here waits for the device. A CUDA graph can hold `quietstar::sample_tokens`, whose uniform numbers it is given,
but not `quietstar::draw_uniform`, which makes a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quietstar_kernels.configurations import Configuration, configuration
from quietstar_kernels.dispatch import compute_dtype, resolve_backend
from quietstar_kernels.launch import Launch
from quietstar_kernels.logits import LogitOptions, dense, empty_logits, operand_dtype, product, rows_in_chunk
from quietstar_kernels.token_sampling.torch_backend import choose_tokens


def sample_launch(
    raw: Tensor,
    uniform: Tensor | None,
    token: Tensor,
    logprob: Tensor,
    lse: Tensor,
    options: LogitOptions,
    configuration: Configuration,
) -> Launch:
    """`torch_backend.choose_tokens`.

    Args:
        raw: [n, V] raw logits in memory of `empty_logits`, banned tokens at -inf; not overwritten.
    """
    from quietstar_kernels.token_sampling import triton_kernels

    rows, vocabulary = raw.shape
    inner, outer = options.factors
    blocks_of_vocabulary = -(-raw.stride(0) // configuration["BLOCK_VOCABULARY"])
    return Launch(
        triton_kernels.sample_kernel,
        (-(-rows // configuration["BLOCK_ROWS"]),),
        {
            "raw": raw,
            "uniform": uniform,
            "token": token,
            "logprob": logprob,
            "lse": lse,
            "raw_stride": raw.stride(0),
            "rows": rows,
            "columns": raw.stride(0),
            "vocabulary": vocabulary,
            "inner": inner,
            "outer": outer,
        },
        configuration,
        {"SOFTCAP": options.softcap is not None, "BLOCKS": 1 << (blocks_of_vocabulary - 1).bit_length()},
    )


def _choose_tokens_triton(
    raw: Tensor, uniform: Tensor | None, token: Tensor, logprob: Tensor, lse: Tensor, options: LogitOptions
) -> None:
    options.ban_(raw)
    chosen = configuration("token_sampling.sample", f"{raw.element_size() * 8}-bit", raw.device)
    sample_launch(raw, uniform, token, logprob, lse, options, chosen).run()


IMPLEMENTATIONS = {"triton": _choose_tokens_triton, "torch": choose_tokens}


@torch.library.custom_op("quietstar::draw_uniform", mutates_args=())
def draw_uniform(hidden: Tensor, seeds: Sequence[int], count: int) -> Tensor:
    """float64 numbers in [0, 1), `count` of each seed, on the device of hidden: the only randomness. One generator."""
    generator = torch.Generator(device=hidden.device)
    numbers = torch.empty((len(seeds), count), dtype=torch.float64, device=hidden.device)
    for row, seed in zip(numbers, seeds, strict=True):
        torch.rand(count, generator=generator.manual_seed(seed), dtype=row.dtype, device=row.device, out=row)
    return numbers


@draw_uniform.register_fake
def _(hidden: Tensor, seeds: Sequence[int], count: int) -> Tensor:
    return hidden.new_empty((len(seeds), count), dtype=torch.float64)


def compute_tokens(
    hidden: Tensor,
    lm_head: Tensor,
    uniform: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    banned: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """token, logprob and log-sum-exp of the logits, each [N]; see `quietstar_kernels.sample_tokens`.

    Args:
        uniform: [N] numbers in [0, 1), float64, at which the rows' cumulative distributions are inverted; None: greedy.
    """
    backend = resolve_backend(backend, hidden)
    options = LogitOptions(temperature, softcap, logit_scale, tuple(banned))
    N, V = hidden.shape[0], lm_head.shape[0]
    dtype = compute_dtype(hidden, lm_head)
    token = torch.empty(N, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(N, dtype=dtype, device=hidden.device)
    lse = torch.empty_like(logprob)
    uniform = None if uniform is None else uniform.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the logits
        head = dense(lm_head.to(operand_dtype(lm_head, dtype, hidden)))
        size = rows_in_chunk(N, V, hidden.device, dtype)
        logits = empty_logits(size, V, dtype, hidden.device)
        for first in range(0, N, size):
            rows = slice(first, min(first + size, N))
            states = dense(hidden[rows].to(head.dtype))
            raw = product(states, head.T, dtype, out=logits[: rows.stop - first])  # [n, V]
            numbers = None if uniform is None else uniform[rows]
            IMPLEMENTATIONS[backend](raw, numbers, token[rows], logprob[rows], lse[rows], options)
    return token, logprob, lse


sample = torch.library.custom_op("quietstar::sample_tokens", compute_tokens, mutates_args=())


@sample.register_fake
def _(hidden: Tensor, lm_head: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    N = hidden.shape[0]
    dtype = compute_dtype(hidden, lm_head)
    return (
        hidden.new_empty(N, dtype=torch.int64),
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(N, dtype=dtype),
    )


@register_flop_formula(torch.ops.quietstar.sample_tokens)
def _(hidden: Sequence[int], lm_head: Sequence[int], *settings: object, out_shape: object = None) -> int:
    return 2 * hidden[0] * lm_head[0] * lm_head[1]
