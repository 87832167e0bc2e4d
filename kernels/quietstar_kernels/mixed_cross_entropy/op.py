"""The losses as PyTorch operators: fakes, autograd, and the arithmetic that a FLOP counter counts.

What they compute is in `chunks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quietstar_kernels.dispatch import compute_dtype, resolve_backend
from quietstar_kernels.logits import LogitOptions, operand_dtype
from quietstar_kernels.mixed_cross_entropy.chunks import Head, check_target, make_head, rows_that_count


def compute_head_loss(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    interpolation: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    banned: Sequence[int],
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_head: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass; see `quietstar_kernels.mixed_cross_entropy`. Without thought and weight: that of hidden_base.

    Args:
        needs_hidden: whether a gradient of a hidden state will be wanted.
        needs_weight: whether a gradient of weight will be wanted.
        needs_head: whether a gradient of lm_head will be wanted.

    Returns:
        loss: [N], or with row_weight [], their weighted sum.
        nll: [N] with row_weight, else empty.
        lse: [M, N] log-sum-exp of the logits of each prediction.
        to_hidden: [M, N, E] d nll / d state of each prediction; empty unless needed.
        to_weight: [N] d nll / d weight; empty unless needed.
        grad_head: [V, E] d loss / d lm_head divided by head_scale; empty unless needed and row_weight is given.
        head_scale: [] in the precision of the losses, 1 unless lm_head is float16, which has no room for gradients
            that nothing has scaled up yet; the backward pass does, in this precision.
    """
    backend = resolve_backend(backend, hidden_base)
    options = LogitOptions(temperature, softcap, logit_scale, tuple(banned))
    check_target(target, ignore_index, lm_head.shape[0], options.banned)
    kept = rows_that_count(target, ignore_index, backend)
    inputs = (hidden_base, hidden_thought, weight, lm_head, target)
    with torch.autocast(target.device.type, enabled=False):
        head = _head_of_rows(kept, *inputs, interpolation, options, ignore_index, backend)
        M, n, (V, E) = len(head.predictions), head.target.shape[0], lm_head.shape
        lse = torch.zeros(M, n, dtype=head.dtype, device=target.device)
        nll = torch.zeros_like(lse)
        to_hidden = (
            hidden_base.new_empty((M, n, E), dtype=_stored_dtype(hidden_base, hidden_thought)) if needs_hidden else None
        )
        to_weight = lse.new_empty(n) if needs_weight else None
        grad_head = row_scales = largest = None
        if needs_head and row_weight is not None:
            grad_head = lse.new_empty(V, E)
            row_scales, largest = head.scales((row_weight if kept is None else row_weight[kept]).to(head.dtype))
        head.run(
            lse,
            nll,
            row_scales=row_scales,
            grad_head=grad_head,
            to_hidden=to_hidden,
            to_weight=to_weight if M == 1 else None,
        )
        if M == 2 and to_weight is not None:
            torch.sub(nll[0], nll[1], out=to_weight)
        parts = zip(head.shares, nll, strict=True)
        total = torch.stack([part if share is None else head.zero_ignored(share) * part for share, part in parts]).sum(
            0
        )
        head_scale = lse.new_ones(())
        if grad_head is not None:
            if lm_head.dtype == torch.float16 and grad_head.numel():
                # so that float16's whole range is used: to 2^15, half of its largest number
                head_scale = (torch.linalg.vector_norm(grad_head, torch.inf) * 2.0**-15).clamp_min(
                    torch.finfo(head.dtype).tiny
                )
                grad_head /= head_scale
            if largest is not None:
                head_scale = head_scale * largest
            grad_head = grad_head.to(lm_head.dtype)
        total, lse = _spread(total, kept, target), _spread(lse, kept, target)
        nothing = lse.new_empty(0)
        if row_weight is None:
            loss, nll = total.clone(), nothing
        else:
            counted_weight = row_weight.to(lse.dtype).masked_fill(target == ignore_index, 0.0)
            loss, nll = (counted_weight * total).sum(), total.clone()
    return (
        loss,
        nll,
        lse,
        hidden_base.new_empty(0) if to_hidden is None else _spread(to_hidden, kept, target, dimension=1),
        lse.new_empty(0) if to_weight is None else _spread(to_weight, kept, target),
        lm_head.new_empty(0) if grad_head is None else grad_head,
        head_scale,
    )


def compute_head_loss_backward(
    grad_loss: Tensor,
    hidden_base: Tensor | None,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    lse: Tensor | None,
    to_hidden: Tensor,
    to_weight: Tensor,
    head_in_forward: Tensor,
    head_scale: Tensor,
    interpolation: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    banned: Sequence[int],
    ignore_index: int,
    needs_base: bool,
    needs_thought: bool,
    needs_weight: bool,
    needs_head: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden_base, hidden_thought, weight and lm_head, each empty unless needed.

    Args:
        grad_loss: [N] upstream gradient of each row's loss, or [] of their sum with row_weight.
        hidden_base, hidden_thought, lm_head, lse: tensors for lm_head's gradient without row_weight, else None.
        to_hidden, to_weight, head_in_forward, head_scale: results of the forward pass.
        needs_base, needs_thought, needs_weight, needs_head: whether the gradient of each of the four is wanted.
    """
    dtype = grad_loss.dtype
    upstream = grad_loss if row_weight is None else grad_loss * row_weight.to(dtype)
    scale = upstream.to(dtype).masked_fill(target == ignore_index, 0.0)  # [N]
    to_base_scale, to_thought_scale = scale, scale
    if weight is not None:
        share = weight.to(dtype).masked_fill(target == ignore_index, 0.0)
        to_base_scale, to_thought_scale = scale * (1 - share), scale * share
    nothing = target.new_empty(0, dtype=dtype)
    grad_base, grad_thought, grad_weight, grad_head = (nothing.clone() for _ in range(4))
    if needs_base:
        grad_base = _scaled_rows(to_hidden[-1], to_base_scale)
    if needs_thought:
        grad_thought = _scaled_rows(to_hidden[0], to_thought_scale)
    if needs_weight and weight is not None:
        grad_weight = (scale * to_weight).to(weight.dtype)
    if needs_head and row_weight is not None:
        grad_head = _scaled_rows(head_in_forward, (grad_loss * head_scale).reshape(1))
    elif needs_head:
        assert hidden_base is not None and lm_head is not None and lse is not None
        backend = resolve_backend(backend, hidden_base)
        kept = rows_that_count(target, ignore_index, backend)
        options = LogitOptions(temperature, softcap, logit_scale, tuple(banned))
        inputs = (hidden_base, hidden_thought, weight, lm_head, target)
        with torch.autocast(target.device.type, enabled=False):
            head = _head_of_rows(kept, *inputs, interpolation, options, ignore_index, backend)
            row_scales, largest = head.scales(upstream if kept is None else upstream[kept])
            sums = torch.empty(lm_head.shape, dtype=head.dtype, device=lm_head.device)
            head.run(lse if kept is None else lse[:, kept], row_scales=row_scales, grad_head=sums)
            if largest is not None:
                sums *= largest
            grad_head = sums.to(lm_head.dtype)
    return grad_base, grad_thought, grad_weight, grad_head


def _head_of_rows(
    kept: Tensor | None,
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    *settings: Any,
) -> Head:
    """`make_head` of the kept rows; None: of all."""
    if kept is not None:
        hidden_base, target = hidden_base[kept], target[kept]
        hidden_thought, weight = (None if rows is None else rows[kept] for rows in (hidden_thought, weight))
    return make_head(hidden_base, hidden_thought, weight, lm_head, target, *settings)


def _stored_dtype(hidden_base: Tensor, hidden_thought: Tensor | None) -> torch.dtype:
    """The dtype that the hidden states' gradients are kept in."""
    if hidden_thought is None:
        return hidden_base.dtype
    return torch.promote_types(hidden_base.dtype, hidden_thought.dtype)


def _scaled_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """scale [N] or [1] * rows [N, E] in the dtype of `rows`, multiplied in that of `scale` without storing it."""
    return torch.mul(rows, scale.unsqueeze(-1), out=torch.empty_like(rows))


def _spread(rows: Tensor, kept: Tensor | None, target: Tensor, dimension: int = -1) -> Tensor:
    """The kept rows in their places among all N, zero elsewhere."""
    if kept is None:
        return rows
    shape = list(rows.shape)
    shape[dimension] = target.shape[0]
    return rows.new_zeros(shape).index_copy_(dimension, kept, rows)


head_loss = torch.library.custom_op("quietstar::head_loss", compute_head_loss, mutates_args=())
head_loss_backward = torch.library.custom_op(
    "quietstar::head_loss_backward", compute_head_loss_backward, mutates_args=()
)


@head_loss.register_fake
def _(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    interpolation: str,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_head, _ = settings[-4:]
    N, E = hidden_base.shape
    M = 2 if hidden_thought is not None and interpolation == "log_probs" else 1
    dtype = compute_dtype(*(x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None))
    rows = target.new_empty(N, dtype=dtype)
    nothing = target.new_empty(0, dtype=dtype)
    return (
        torch.empty_like(rows) if row_weight is None else target.new_empty((), dtype=dtype),
        nothing if row_weight is None else torch.empty_like(rows),
        target.new_empty((M, N), dtype=dtype),
        target.new_empty((M, N, E), dtype=_stored_dtype(hidden_base, hidden_thought))
        if needs_hidden
        else hidden_base.new_empty(0),
        torch.empty_like(rows) if needs_weight else torch.empty_like(nothing),
        lm_head.new_empty(lm_head.shape if needs_head and row_weight is not None else 0),
        target.new_empty((), dtype=dtype),
    )


@head_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    hidden_base: Tensor | None,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor | None,
    target: Tensor,
    row_weight: Tensor | None,
    lse: Tensor | None,
    to_hidden: Tensor,
    to_weight: Tensor,
    head_in_forward: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_base, needs_thought, needs_weight, needs_head, _ = settings[-5:]
    nothing = target.new_empty(0, dtype=grad_loss.dtype)
    grad_head = head_in_forward if row_weight is not None or lm_head is None else lm_head
    return (
        to_hidden.new_empty(to_hidden.shape[1:]) if needs_base else nothing.clone(),
        to_hidden.new_empty(to_hidden.shape[1:]) if needs_thought else nothing.clone(),
        weight.new_empty(weight.shape) if needs_weight and weight is not None else nothing.clone(),
        grad_head.new_empty(grad_head.shape) if needs_head else nothing.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_base, hidden_thought, weight, lm_head, target, row_weight, *settings = inputs
    *options, needs_hidden, needs_weight, needs_head, backend = settings
    _, nll, lse, to_hidden, to_weight, grad_head, head_scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nll, lse, to_hidden, to_weight, grad_head, head_scale)
    again = (hidden_base, hidden_thought, lm_head, lse) if needs_head and row_weight is None else (None,) * 4
    ctx.save_for_backward(*again, weight, target, row_weight, to_hidden, to_weight, grad_head, head_scale)
    ctx.options, ctx.backend = options, backend
    ctx.prepared = (needs_hidden, needs_hidden, needs_weight, needs_head)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden_base, hidden_thought)]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    if grad_loss is None or not any(needed):
        return (None,) * 16
    if torch.is_grad_enabled():  # otherwise the second gradient would be silently wrong
        raise RuntimeError("the cross entropies have first gradients only: call backward without create_graph=True")
    if any(need and not prepared for need, prepared in zip(needed, ctx.prepared, strict=True)):
        raise RuntimeError("quietstar::head_loss: a gradient is wanted that its `needs_` arguments left out")
    hidden_base, hidden_thought, lm_head, lse, weight, target, row_weight, *made = ctx.saved_tensors
    grads = head_loss_backward(
        grad_loss,
        hidden_base,
        hidden_thought,
        weight,
        lm_head,
        target,
        row_weight,
        lse,
        *made,
        *ctx.options,
        *needed,
        ctx.backend,
    )
    dtypes = [*ctx.dtypes, None, None]
    wanted: list[Tensor | None] = [
        (grad if dtype is None else grad.to(dtype)) if need else None
        for grad, dtype, need in zip(grads, dtypes, needed, strict=True)
    ]
    return (*wanted, *(None,) * 12)


head_loss.register_autograd(_backward, setup_context=_setup_context)


def _flop(rows: Any, lm_head: Any, predictions: int, products: int) -> int:
    return 2 * int(rows[0]) * int(lm_head[0]) * int(lm_head[1]) * predictions * products


@register_flop_formula(torch.ops.quietstar.head_loss, get_raw=True)  # the dtypes decide too
def _(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    interpolation: str,
    *settings: Any,
    out_val: Any = None,
) -> int:
    needs_hidden, needs_weight, needs_head, _ = settings[-4:]
    mixed = hidden_thought is not None and interpolation == "logits"
    predictions = 2 if hidden_thought is not None and not mixed else 1
    to_states = needs_hidden or (needs_weight and predictions == 1)
    dtype = compute_dtype(*(x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None))
    rounds = mixed and operand_dtype(lm_head, dtype, hidden_base, hidden_thought) != dtype
    products = 1 + (to_states or rounds) + (needs_head and row_weight is not None)
    return _flop(hidden_base.shape, lm_head.shape, predictions, products)


@register_flop_formula(torch.ops.quietstar.head_loss_backward)
def _(
    grad_loss: Any,
    hidden_base: Any,
    hidden_thought: Any,
    weight: Any,
    lm_head: Any,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    if lm_head is None:
        return 0
    return _flop(hidden_base, lm_head, 2 if hidden_thought is not None and "log_probs" in settings else 1, 2)
