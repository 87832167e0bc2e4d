"""From hidden states to logits: the options that the losses and the sampler share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quietstar_kernels.dispatch import BACKEND_VARIABLE

CHUNK_BYTES = {"cpu": 2**23, "cuda": 3 * 2**29}
"""Most bytes of logits and of their gradient held at a time by device type, as far as one row fits. A chunk reads
lm_head and adds to its gradient, which costs as much memory traffic for few rows as for many: 1.5 GiB hold a training
step's 8,192 rows of Mistral-7B in one chunk, and are little beside what such a step keeps for its backward pass."""

CACHE_BYTES = {"cpu": 2**23, "cuda": 2**25}
"""The same where each logit is read once, as a loss or a token needs it: 32 MiB stay in a GPU's second level cache."""

ENOUGH_ROWS = 1024
"""CACHE_BYTES makes no chunk of fewer rows: each reads lm_head once, which by the data sheet of an H200 takes a fifth
of the time of the arithmetic of so many rows, and for fewer rows more than the cache saves."""

ROW_TILE = 128
"""Rows that a matrix product computes at a time: a chunk that is no multiple of it wastes part of its last tile."""

ROW_ALIGNMENT = 64
"""Rows of logits begin at multiples of so many elements, 128 bytes of 16 bits: fast products need 16 bytes at least,
which the 64,004 bytes of Mistral's 32,002 tokens are not."""


@dataclass(frozen=True)
class LogitOptions:
    """logits = softcap(logit_scale * hidden @ lm_head^T) / temperature, with the banned tokens at -inf.

    softcap(z) is cap * tanh(z / cap), or z where `softcap` is None.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    banned: tuple[int, ...] = ()

    def check(self, vocabulary: int) -> None:
        """Raise ValueError, naming the argument, for a value that gives no distribution over `vocabulary` tokens."""
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, wanted a number above 0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: got {self.softcap}, wanted a number above 0, or None")
        outside = [token for token in self.banned if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(f"banned: got token {outside[0]}, wanted ids 0 <= id < V={vocabulary}")
        if vocabulary and len(set(self.banned)) == vocabulary:
            raise ValueError(f"banned: got all {vocabulary} tokens of the vocabulary, wanted at least one allowed")

    def transform(self, raw: Tensor) -> Tensor:
        """Raw logits [..., V] -> logits [..., V]; out of place, differentiable."""
        logits = raw * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        if self.banned:
            logits = logits.index_fill(-1, self._banned_ids(raw.device), float("-inf"))
        return logits

    def transform_(self, raw: Tensor) -> Tensor | None:
        """The same in place, without a graph.

        Returns:
            d logits / d raw where it is not the constant `slope`, that is with a softcap: [..., V]; else None.
        """
        slope = None
        if self.softcap is None:
            if self.slope != 1.0:
                raw.mul_(self.slope)
        else:
            raw.mul_(self.logit_scale / self.softcap).tanh_()
            slope = torch.square(raw).neg_().add_(1.0).mul_(self.slope)  # tanh' = 1 - tanh^2
            raw.mul_(self.softcap / self.temperature)
        self.ban_(raw)
        return slope

    def ban_(self, raw: Tensor) -> None:
        """Set the banned tokens of raw logits [..., V] to -inf, without a wait from a device's second call on.

        Not to be traced: it keeps the ids on the device.
        """
        if self.banned:
            raw.index_fill_(-1, banned_ids(self.banned, raw.device), float("-inf"))

    @property
    def factors(self) -> tuple[float, float]:
        """(inner, outer): logits = outer * tanh(inner * raw) with a softcap, else outer * raw."""
        if self.softcap is None:
            return 1.0, self.slope
        return self.logit_scale / self.softcap, self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """d logits / d raw without a softcap."""
        return self.logit_scale / self.temperature

    def _banned_ids(self, device: torch.device) -> Tensor:
        return torch.tensor(self.banned, device=device)


def make_options(
    temperature: float, softcap: float | None, logit_scale: float, banned: Sequence[int], vocabulary: int
) -> LogitOptions:
    """Checked options; see `LogitOptions.check` for the errors."""
    options = LogitOptions(temperature, softcap, logit_scale, tuple(int(token) for token in banned))
    options.check(vocabulary)
    return options


@lru_cache(maxsize=64)
def banned_ids(banned: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 ids on a device, copied there once: a copy would wait, and a CUDA graph could not hold it."""
    return torch.tensor(banned, dtype=torch.int64, device=device)


def rows_in_chunk(
    rows: int, vocabulary: int, device: torch.device, dtype: torch.dtype, gradient: torch.dtype | None = None
) -> int:
    """Rows whose logits are held at a time: `rows` in equal parts, of at most CHUNK_BYTES or one row.

    Args:
        rows: number of all rows.
        vocabulary: number of logits of a row, V.
        device: device of the logits.
        dtype: dtype of the logits.
        gradient: dtype of their gradient, which takes the logits' place where it is the same; None: no gradient, so
            that each logit is read once, and there are at most CACHE_BYTES of them too, or ENOUGH_ROWS rows.
    """
    row_bytes = max(1, vocabulary * sum(kind.itemsize for kind in {dtype, gradient or dtype}))
    limit = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    if gradient is None:
        limit = min(limit, max(CACHE_BYTES.get(device.type, CACHE_BYTES["cuda"]), ENOUGH_ROWS * row_bytes))
    most = max(1, limit // row_bytes)
    if rows <= most:
        return max(1, rows)
    tile = ROW_TILE if most >= ROW_TILE else 1
    most -= most % tile
    equal = -(-rows // -(-rows // most))
    return -(-equal // tile) * tile


def empty_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, vocabulary], whose rows are padded to a multiple of ROW_ALIGNMENT elements."""
    columns = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty((rows, columns), dtype=dtype, device=device)[:, :vocabulary]


def dense(matrix: Tensor) -> Tensor:
    """The matrix, copied if a product would have to copy it each time."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def is_reference(backend: str) -> bool:
    """Whether `backend`, of `backends.BACKENDS`, names the reference.

    This much torch.compile follows. The operators settle the rest when they run, and refuse a name that is none.
    """
    return (os.environ.get(BACKEND_VARIABLE) or backend if backend == "auto" else backend) == "reference"


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a device multiplies matrices of `dtype` into float32 sums.

    CUDA multiplies low precision as it is; a CPU cannot keep float32 sums of it, so there it is widened.
    """
    return dtype if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else torch.float32


def operand_dtype(lm_head: Tensor, result: torch.dtype, *hidden: Tensor | None) -> torch.dtype:
    """The dtype in which hidden states and lm_head are multiplied into `result` logits."""
    same = all(x is None or x.dtype == lm_head.dtype for x in hidden)
    return product_dtype(lm_head.device, lm_head.dtype) if same and result == torch.float32 else result


def product(left: Tensor, right: Tensor, result: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right with sums and result in `result`, whatever the dtype of the operands; written to `out` if given."""
    if left.dtype == result:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=result, out=out)
    return torch.mm(left.to(result), right.to(result), out=out)


def add_product_(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, summed in the precision of `into`."""
    if left.dtype == into.dtype:
        torch.addmm(into, left, right, out=into)
    elif left.is_cuda:
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    else:
        torch.addmm(into, left.to(into.dtype), right.to(into.dtype), out=into)


def raw_logits(hidden: Tensor, head: Tensor, result: torch.dtype) -> Tensor:
    """hidden @ head^T in `result`, accurate also for hidden states that head's dtype cannot hold.

    A mixture of two bfloat16 states is not a bfloat16 state, and rounding it to one would bury the small change that a
    small mixing weight makes, which is the reward. It is multiplied in two parts, the rounded state and what the
    rounding left, which keeps 16 bits of it (22 of float16): two low precision products cost far less than a float32
    one. For a moment that holds twice the logits.

    Args:
        hidden: [N, E] hidden states, in head's dtype or in `result`.
        head: [V, E] output embedding, in the dtype of the product's operands (`operand_dtype`).
        result: dtype of the [N, V] logits.
    """
    high = hidden.to(head.dtype)
    raw = product(high, head.T, result)
    if hidden.dtype == result != head.dtype:
        raw += product((hidden - high).to(head.dtype), head.T, result)
    return raw
