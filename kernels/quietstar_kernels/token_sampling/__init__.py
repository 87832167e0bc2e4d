"""Draw tokens from hidden states without [N, V] logits: how thoughts are sampled.

Quiet-STaR (arXiv 2403.09629), section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quietstar_kernels.dispatch import require_device, require_floating, require_shape
from quietstar_kernels.logits import is_reference, make_options
from quietstar_kernels.token_sampling.op import draw_uniform, sample
from quietstar_kernels.token_sampling.reference import sample_tokens_reference

__all__ = ["sample_tokens", "uniform_numbers"]


def uniform_numbers(hidden: Tensor, seeds: Sequence[int], count: int) -> Tensor:
    """The numbers that `sample_tokens` draws `count` rows with, for several seeds at once and with one generator.

    Args:
        hidden: any tensor on the device.
        seeds: seeds of the draws, any integers, taken modulo 2^63.
        count: number of rows.

    Returns:
        numbers in [0, 1), float64 [len(seeds), count].
    """
    numbers: Tensor = draw_uniform(hidden, [seed % 2**63 for seed in seeds], count)
    return numbers


@torch.no_grad()
def sample_tokens(
    hidden: Tensor,
    lm_head: Tensor,
    *,
    seed: int | None = None,
    uniform: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: Sequence[int] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits(hidden)); logits(h) is that of `mixed_cross_entropy`.

    Each row inverts its cumulative distribution at one float64 uniform number. All rows' numbers are drawn at once from
    a generator with the given seed on the tensors' device, so that the same seed gives the same numbers whatever the
    chunk size and the backend. The tokens are then the same too, but where a number falls within rounding of the border
    between two tokens: the reference sums a float64 softmax, the others the exponentials in the logits' precision, and
    a product's rounding may depend on the number of rows. No gradient.

    The logits of one chunk of rows are held at a time: at most `logits.CACHE_BYTES` of them, or `logits.ENOUGH_ROWS`
    rows where those are more, within `logits.CHUNK_BYTES`, as far as one row fits. On CUDA that is 1,024 rows for
    Mistral-7B's head (V = 32002), 131 MB of float32, and for Qwen2.5's (V = 151,936), 622 MB.

    Args:
        hidden: [N, E] final hidden states, any floating dtype.
        lm_head: [V, E] output embedding, any floating dtype; where it is not hidden's, both are multiplied in float32.
        seed: seed of the draws, any integer, taken modulo 2^63; None where `uniform` or `greedy` is given. CPU and CUDA
            draw different numbers from one seed.
        uniform: [N] numbers in [0, 1) to draw with, float64 on hidden's device, such as a part of `uniform_numbers`: no
            generator is then made, and a CUDA graph can hold the call; None: those of `seed` and `rows`.
        rows: place of these rows among others, (first, total): they are the rows first .. first + N - 1 of total rows,
            and get the numbers that they would get there; None: (0, N).
        temperature: divisor of the logits, above 0.
        greedy: whether to take the most probable token instead; the seed is then unused.
        softcap: cap of the logits, above 0; None: no cap.
        logit_scale: factor of the logits before the cap.
        banned: token ids that are never drawn and left out of the softmax.
        backend: name of the backend: "auto", "triton", "torch" or "reference".

    Returns:
        token int64 [N] and its log-probability [N] under the distribution it was drawn from, temperature and banned
        tokens included (with `greedy` too): float32 (float64 where an input is float64).

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape or option that does not fit; the message names the argument.
    """
    require_floating("hidden", hidden)
    require_floating("lm_head", lm_head)
    require_device("lm_head", lm_head, hidden.device)
    sizes: dict[str, int] = {}
    require_shape("hidden", hidden, ("N", "E"), sizes)
    require_shape("lm_head", lm_head, ("V", "E"), sizes)
    if sizes["V"] == 0:
        raise ValueError("lm_head: got shape with V=0, wanted at least one token")
    options = make_options(temperature, softcap, logit_scale, banned, sizes["V"])
    first, total = (0, sizes["N"]) if rows is None else rows
    if first < 0 or total < first + sizes["N"]:
        raise ValueError(f"rows: got {rows}, wanted (first, total) with 0 <= first and first + N={sizes['N']} <= total")
    if uniform is not None:
        if seed is not None or rows is not None:
            raise ValueError("uniform: got numbers and a seed or rows besides, wanted one source of random numbers")
        if uniform.dtype != torch.float64:
            raise TypeError(f"uniform: got dtype {uniform.dtype}, wanted float64")
        require_device("uniform", uniform, hidden.device)
        require_shape("uniform", uniform, ("N",), sizes)
    if greedy:
        uniform = None
    elif uniform is None:
        if seed is None:
            raise ValueError("seed: got None, wanted an integer, or the numbers to draw with as uniform")
        uniform = uniform_numbers(hidden, [seed], total)[0, first : first + sizes["N"]]
    if is_reference(backend):
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the logits
            return sample_tokens_reference(hidden, lm_head, uniform, options)
    token, logprob, _ = sample(
        hidden, lm_head, uniform, options.temperature, options.softcap, options.logit_scale, options.banned, backend
    )
    return token, logprob
