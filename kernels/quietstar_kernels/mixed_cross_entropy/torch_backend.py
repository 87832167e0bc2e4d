"""The losses in PyTorch, one chunk of rows at a time.

A row's loss is a weighted sum of the losses of its predictions: "logits" has one prediction, from the mixed hidden
state; "log_probs" has two, with weights w and 1 - w; `linear_cross_entropy` has one, from the only hidden state. Saved
for the backward pass are the inputs and one log-sum-exp for each prediction; a chunk's logits are computed again.

Where the product with lm_head is in low precision (`logits.product_dtype`), the logits of a mixed state are accurate to
float32 all the same (`logits.raw_logits`), in both passes, so that the softmax of the backward pass fits the saved
log-sum-exp. Its two products of the logits' gradient are in plain low precision: that gradient is rounded, and with it
the mixed state, each by at most half a unit in the last place. Gradients are no differences of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions, operand_dtype, product, raw_logits, rows_in_chunk


def mixed_cross_entropy_torch(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    interpolation: str,
    options: LogitOptions,
    ignore_index: int,
) -> Tensor:
    """Loss [N]; see `quietstar_kernels.mixed_cross_entropy`. Without thought and weight: the loss of hidden_base."""
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        hidden_base, hidden_thought, weight, lm_head, target.long(), interpolation, options, ignore_index
    )
    return loss


@dataclass(frozen=True)
class _Rows:
    """n rows of the inputs, in the precision of the logits."""

    index: slice | Tensor  # which rows they are
    base: Tensor  # [n, E]
    thought: Tensor | None  # [n, E]
    weight: Tensor | None  # [n, 1]
    target: Tensor  # [n, 1]

    def predictions(self, interpolation: str, operand: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
        """The hidden states [n, E] whose losses add up to the rows' loss, with their weights [n, 1]; None is 1.

        States are in `operand`, that of the product with lm_head, which holds the inputs exactly; a mixed state is not.
        """
        if self.thought is None or self.weight is None:
            return [(self.base.to(operand), None)]
        if interpolation == "logits":
            return [(torch.lerp(self.base, self.thought, self.weight), None)]
        return [(self.thought.to(operand), self.weight), (self.base.to(operand), 1 - self.weight)]


def _chunks(
    base: Tensor,
    thought: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    ignore_index: int,
    size: int,
    dtype: torch.dtype,
) -> Iterator[_Rows]:
    """The rows that count, `size` at a time."""
    counted = target != ignore_index
    kept = None if bool(counted.all()) else counted.nonzero().squeeze(-1)
    total = target.shape[0] if kept is None else kept.shape[0]
    for first in range(0, total, size):
        index = slice(first, min(first + size, total)) if kept is None else kept[first : first + size]
        yield _Rows(
            index,
            base[index].to(dtype),
            None if thought is None else thought[index].to(dtype),
            None if weight is None else weight[index].to(dtype).unsqueeze(-1),
            target[index].unsqueeze(-1),
        )


class _HeadLoss(torch.autograd.Function):
    """The loss of every row; gradients to both hidden states, the weight and lm_head, only where they are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_base: Tensor,
        hidden_thought: Tensor | None,
        weight: Tensor | None,
        lm_head: Tensor,
        target: Tensor,
        interpolation: str,
        options: LogitOptions,
        ignore_index: int,
    ) -> Tensor:
        floating = [x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None]
        dtype = compute_dtype(*floating)
        head = lm_head.to(operand_dtype(lm_head, dtype, hidden_base, hidden_thought))
        size = rows_in_chunk(lm_head.shape[0], lm_head.device)
        loss = torch.zeros(target.shape, dtype=dtype, device=target.device)
        lse = loss.new_zeros((2 if interpolation == "log_probs" else 1, *target.shape))
        for rows in _chunks(hidden_base, hidden_thought, weight, target, ignore_index, size, dtype):
            predictions = rows.predictions(interpolation, head.dtype)
            for lse_of_prediction, (hidden, share) in zip(lse, predictions, strict=True):
                logits = raw_logits(hidden, head, dtype)
                options.transform_(logits)
                at_target = logits.gather(-1, rows.target)
                top = logits.amax(-1, keepdim=True)
                log_sum = logits.sub_(top).exp_().sum(-1, keepdim=True).log_().add_(top)
                nll = log_sum - at_target
                lse_of_prediction[rows.index] = log_sum.squeeze(-1)
                loss[rows.index] += (nll if share is None else share * nll).squeeze(-1)
        ctx.save_for_backward(hidden_base, hidden_thought, weight, lm_head, target, lse)
        ctx.interpolation, ctx.options, ctx.ignore_index = interpolation, options, ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden_base, hidden_thought, weight, lm_head, target, lse = ctx.saved_tensors
        options: LogitOptions = ctx.options
        dtype = lse.dtype
        head = lm_head.to(operand_dtype(lm_head, dtype, hidden_base, hidden_thought))
        size = rows_in_chunk(lm_head.shape[0], lm_head.device)
        needs_base, needs_thought, needs_weight, needs_head = ctx.needs_input_grad[:4]
        # ignored rows keep the zeros
        grad_base = torch.zeros_like(hidden_base) if needs_base else None
        grad_thought = torch.zeros_like(hidden_thought) if needs_thought else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_head = torch.zeros(lm_head.shape, dtype=dtype, device=lm_head.device) if needs_head else None
        needs_hidden = needs_base or needs_thought or needs_weight
        with torch.autocast(target.device.type, enabled=False):
            for rows in _chunks(hidden_base, hidden_thought, weight, target, ctx.ignore_index, size, dtype):
                upstream = grad_loss[rows.index].unsqueeze(-1)
                nlls, grads = [], []
                predictions = rows.predictions(ctx.interpolation, head.dtype)
                for log_sum_N, (hidden, share) in zip(lse, predictions, strict=True):
                    logits = raw_logits(hidden, head, dtype)
                    slope = options.transform_(logits)
                    log_sum = log_sum_N[rows.index].unsqueeze(-1)
                    nlls.append(log_sum - logits.gather(-1, rows.target))
                    # d nll / d logits = softmax - one_hot(target), then the chain to the raw logits
                    grad_row = (upstream if share is None else upstream * share) * (
                        options.slope if slope is None else 1
                    )
                    grad_logits = logits.sub_(log_sum).exp_().mul_(grad_row).scatter_add_(-1, rows.target, -grad_row)
                    if slope is not None:
                        grad_logits.mul_(slope)
                    grad_logits = grad_logits.to(head.dtype)
                    if grad_head is not None:
                        _add_product_(grad_head, grad_logits.T, hidden.to(head.dtype))
                    if needs_hidden:
                        grads.append(product(grad_logits, head, dtype))
                if not needs_hidden:
                    continue
                if rows.thought is None or rows.weight is None:
                    to_base, to_thought, to_weight = grads[0], None, None
                elif ctx.interpolation == "logits":
                    to_base, to_thought = (1 - rows.weight) * grads[0], rows.weight * grads[0]
                    to_weight = (grads[0] * (rows.thought - rows.base)).sum(-1)
                else:
                    to_thought, to_base = grads
                    to_weight = (upstream * (nlls[0] - nlls[1])).squeeze(-1)
                for grad, part in ((grad_base, to_base), (grad_thought, to_thought), (grad_weight, to_weight)):
                    if grad is not None and part is not None:
                        grad[rows.index] = part.to(grad.dtype)
        grad_lm_head = None if grad_head is None else grad_head.to(lm_head.dtype)
        return grad_base, grad_thought, grad_weight, grad_lm_head, None, None, None, None


def _add_product_(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, summed in the precision of `into`."""
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into += product(left, right, into.dtype)
