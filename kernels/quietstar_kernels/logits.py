"""From hidden states to logits: the options that the losses and the sampler share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS_IN_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Most logits held at a time by device type, as far as one row fits: 8 MiB and 256 MiB of float32."""


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
        if self.banned:
            raw.index_fill_(-1, self._banned_ids(raw.device), float("-inf"))
        return slope

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


def rows_in_chunk(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are held at a time: at most LOGITS_IN_CHUNK logits, at least one row."""
    limit = LOGITS_IN_CHUNK.get(device.type, LOGITS_IN_CHUNK["cuda"])
    return max(1, limit // max(1, vocabulary))


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a device multiplies matrices of `dtype` into float32 sums.

    CUDA multiplies low precision as it is; a CPU cannot keep float32 sums of it, so there it is widened.
    """
    return dtype if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else torch.float32


def operand_dtype(lm_head: Tensor, result: torch.dtype, *hidden: Tensor | None) -> torch.dtype:
    """The dtype in which hidden states and lm_head are multiplied into `result` logits."""
    same = all(x is None or x.dtype == lm_head.dtype for x in hidden)
    return product_dtype(lm_head.device, lm_head.dtype) if same and result == torch.float32 else result


def product(left: Tensor, right: Tensor, result: torch.dtype) -> Tensor:
    """left @ right with sums and result in `result`, whatever the dtype of the operands."""
    if left.dtype == result:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=result)
    return torch.mm(left.to(result), right.to(result))


def raw_logits(hidden: Tensor, head: Tensor, result: torch.dtype) -> Tensor:
    """hidden @ head^T in `result`, accurate also for hidden states that head's dtype cannot hold.

    A mixture of two bfloat16 states is not a bfloat16 state, and rounding it to one would bury the small change that a
    small mixing weight makes, which is the reward. It is multiplied in two parts, the rounded state and what the
    rounding left, which keeps 16 bits of it (22 of float16): two low precision products cost far less than a float32
    one. For a moment that holds twice the logits.

    Args:
        hidden: [N, E] in head's dtype, or in `result`.
        head: [V, E] in the dtype of the product, `operand_dtype`.
        result: dtype of the [N, V] logits.
    """
    high = hidden.to(head.dtype)
    raw = product(high, head.T, result)
    if hidden.dtype == result != head.dtype:
        raw += product((hidden - high).to(head.dtype), head.T, result)
    return raw
