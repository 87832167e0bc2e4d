"""What happens to a chunk of rows between the products with lm_head, in PyTorch.

`chunks` says how the chunks and the products go together; the Triton kernels do the same as the three functions here,
in one reading of each tensor. Ignored rows take part with a state of zero, whatever they hold, so that nothing waits to
know how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions


def mix_rows(
    base: Tensor,
    thought: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    states: Tensor,
    scaled: Tensor | None,
    ignore_index: int,
    residual: Tensor | None = None,
) -> None:
    """Write the states whose logits are wanted, (1 - weight) base + weight thought, or base: the products' operands.

    Args:
        base, thought: [n, E] hidden states without thought and after it.
        weight, target, row_scale: [n] mixing weight, target token id, and factor of `scaled` of each row.
        states: [n, E] wanted states, rounded; written.
        scaled: [n, E] row_scale * state, from the state before it is rounded; written.
        ignore_index: target of the rows that get a state of zero.
        residual: [n, E] state less `states`, what rounding took from it; written.
    """
    dtype = compute_dtype(states)
    state = base.to(dtype)
    if thought is not None and weight is not None:
        share = weight.to(dtype).unsqueeze(-1)
        state = (1 - share) * state + share * thought.to(dtype)
    state = state.masked_fill((target == ignore_index).unsqueeze(-1), 0.0)
    states.copy_(state)
    if scaled is not None and row_scale is not None:
        scaled.copy_(row_scale.unsqueeze(-1) * state)
    if residual is not None:
        residual.copy_(state - states.to(dtype))


def row_losses(
    raw: Tensor,
    target: Tensor,
    lse: Tensor,
    nll: Tensor | None,
    gradient: Tensor | None,
    options: LogitOptions,
    ignore_index: int,
) -> None:
    """From raw logits to losses and their gradient; ignored rows have zero of both.

    Args:
        raw: [n, V] raw logits, overwritten.
        target: [n] target token ids.
        lse: [n] log-sum-exp of the logits; written with `nll`, read without.
        nll: [n] negative log-likelihoods, written.
        gradient: [n, V] d nll / d raw, written; it is bounded, so that it may be rounded to any dtype. May be `raw`.
        options: options that make logits of raw logits.
        ignore_index: target of the ignored rows.
    """
    ignored = (target == ignore_index).unsqueeze(-1)
    token = target.long().unsqueeze(-1).masked_fill(ignored, 0)
    softcap_slope = options.transform_(raw)
    if nll is not None:
        at_target = raw.gather(-1, token)
        top = raw.amax(-1, keepdim=True)
        likelihood = raw.sub_(top).exp_()  # of each token relative to the most probable one
        total = likelihood.sum(-1, keepdim=True)
        lse.copy_((total.log() + top).squeeze(-1))
        # not lse - at_target, whose rounding is that of the larger lse
        nll.copy_((total.log() + (top - at_target)).masked_fill_(ignored, 0.0).squeeze(-1))
    else:
        likelihood = raw.sub_(lse.unsqueeze(-1)).exp_()
        total = torch.ones_like(lse).unsqueeze(-1)
    if gradient is None:
        return
    slope = torch.full_like(total, options.slope if softcap_slope is None else 1.0).masked_fill_(ignored, 0.0)
    to_raw = likelihood.mul_(slope / total).scatter_add_(-1, token, -slope)  # softmax - one_hot(target)
    if softcap_slope is not None:
        to_raw.mul_(softcap_slope)
    if gradient.data_ptr() != to_raw.data_ptr():
        gradient.copy_(to_raw)


def finish_gradient(
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
) -> None:
    """What the gradient of the states is good for before it is rounded.

    Args:
        gradient: [n, E] d nll / d state.
        base, thought: [n, E] hidden states without thought and after it, only for a mixed state.
        weight: [n] mixing weights, only for a mixed state.
        target: [n] target token ids.
        states: [n, E] rounded mixed states.
        stored: [n, E] rounded gradient, written.
        nll: [n] negative log-likelihoods, corrected to first order for what rounding the mixed state took from them.
        to_weight: [n] d nll / d weight, written.
        ignore_index: target of the ignored rows, which keep their nll and get a to_weight of zero.
    """
    if base is not None and thought is not None and weight is not None:
        ignored = target == ignore_index
        before, after = base.to(gradient.dtype), thought.to(gradient.dtype)
        if to_weight is not None:
            to_weight.copy_((gradient * (after - before)).sum(-1).masked_fill_(ignored, 0.0))
        if nll is not None:
            share = weight.to(gradient.dtype).unsqueeze(-1)
            lost = (1 - share) * before + share * after - states.to(gradient.dtype)
            nll.add_((gradient * lost).sum(-1).masked_fill_(ignored, 0.0))
    if stored is not None:
        stored.copy_(gradient)
