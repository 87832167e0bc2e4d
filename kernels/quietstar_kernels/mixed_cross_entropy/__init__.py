"""Next-token losses from hidden states without [N, V] logits: after the mixing head, and of one hidden state.

Quiet-STaR (arXiv 2403.09629), section 4.3 (the mixing head) and 4.4 (the losses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from quietstar_kernels.dispatch import (
    require_device,
    require_floating,
    require_integer,
    require_shape,
)
from quietstar_kernels.logits import LogitOptions, is_reference, make_options
from quietstar_kernels.mixed_cross_entropy.chunks import check_target
from quietstar_kernels.mixed_cross_entropy.op import head_loss
from quietstar_kernels.mixed_cross_entropy.reference import mixed_cross_entropy_reference

__all__ = ["linear_cross_entropy", "mixed_cross_entropy"]

INTERPOLATIONS = ("logits", "log_probs")


@overload
def mixed_cross_entropy(
    hidden_base: Tensor,
    hidden_thought: Tensor,
    weight: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: None = None,
    interpolation: str = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    banned: Sequence[int] = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def mixed_cross_entropy(
    hidden_base: Tensor,
    hidden_thought: Tensor,
    weight: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor,
    interpolation: str = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    banned: Sequence[int] = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def mixed_cross_entropy(
    hidden_base: Tensor,
    hidden_thought: Tensor,
    weight: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    interpolation: str = "logits",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: Sequence[int] = (),
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target under the mixture of the predictions with and without thought.

    logits(h) = softcap(logit_scale * h @ lm_head^T) / temperature, where softcap(z) = cap * tanh(z / cap), with the
    banned tokens at -inf; p(h) = softmax(logits(h)). With w = weight:

    - "logits": -log p((1 - w) hidden_base + w hidden_thought)[target]. lm_head is linear, so mixing the hidden states
      mixes the logits, and one product does. With a softcap it is the hidden states that are mixed, before the cap.
    - "log_probs": -(w log p(hidden_thought) + (1 - w) log p(hidden_base))[target], the paper's equation, not
      renormalised.

    Logits and losses are float32 (float64 where a floating input is float64). Every row may have its own upstream
    gradient; where those are known beforehand, as the weights of a weighted sum, give them as `row_weight`: the forward
    pass then makes all gradients, with three quarters of the arithmetic.

    Precision: on CUDA, inputs that share a 16-bit dtype are multiplied in it, and a mixed state is rounded to it. What
    that takes from the loss is put back: to first order, from the gradient, where a gradient of a hidden state or of
    the weight is wanted; elsewhere by a second product, of what rounding took. So a small weight's small change of the
    loss is right with and without gradients. Gradients have the error of one such rounding of the state and one of the
    logits' gradient. A CPU multiplies in float32 and rounds neither, like CUDA where the dtypes differ.

    Memory: the logits of one chunk of rows at a time. With gradients that is at most `logits.CHUNK_BYTES`, as far as
    one row fits, for logits in float32 and, on CUDA, their gradient in the inputs' 16 bits, with three chunks of states
    beside them; without, `logits.CACHE_BYTES` of float32, or `logits.ENOUGH_ROWS` rows where those are more. In
    bfloat16 on CUDA, 8,192 rows of Mistral-7B's head (V = 32002, E = 4096) are one chunk of 1,051 + 525 + 268 MB, and
    without gradients 1,024 rows are, 131 + 17 MB; of a vocabulary of 262,144 tokens 1,024 rows are a chunk with
    gradients too, 1,074 + 537 MB. The gradient of lm_head adds 524 MB of float32 sums and 262 MB for itself; for the
    backward pass the gradients of the hidden states are kept, [N, E] for each prediction.

    Args:
        hidden_base: [N, E] final hidden states without thought, any floating dtype.
        hidden_thought: [N, E] final hidden states after the thought, any floating dtype.
        weight: [N] weight of the thought; 1 - weight is the weight of the base.
        lm_head: [V, E] output embedding, any floating dtype.
        target: int64 or int32 [N] token ids.
        row_weight: [N] weight of each row's loss, without a gradient; None: one loss for each row.
        interpolation: what the weight mixes, "logits" or "log_probs" (see above).
        temperature: divisor of the logits, above 0.
        softcap: cap of the logits, above 0; None: no cap.
        logit_scale: factor of the logits before the cap.
        banned: token ids that are left out of the softmax; none may be a target.
        ignore_index: target of the rows that have loss 0 and gradient 0, whatever else they hold.
        backend: name of the backend: "auto", "triton", "torch" or "reference".

    Returns:
        Loss of each row [N], float32 (float64 where a floating input is float64), differentiable with respect to
        hidden_base, hidden_thought, weight and lm_head, once. With `row_weight`: (loss, nll), the scalar
        sum(row_weight * nll), which is differentiable instead, and the losses of the rows, which are not.

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, target or option that does not fit; the message names the argument. On CUDA a target that
            does not fit is found by the device, as PyTorch's own losses do it: an assertion, some time later.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, wanted {' or '.join(map(repr, INTERPOLATIONS))}")
    for name, tensor in {"hidden_base": hidden_base, "hidden_thought": hidden_thought, "weight": weight}.items():
        require_floating(name, tensor)
        require_device(name, tensor, hidden_base.device)
    sizes: dict[str, int] = {}
    require_shape("hidden_base", hidden_base, ("N", "E"), sizes)
    require_shape("hidden_thought", hidden_thought, ("N", "E"), sizes)
    require_shape("weight", weight, ("N",), sizes)
    _check_rest(hidden_base, lm_head, target, row_weight, sizes)
    options = make_options(temperature, softcap, logit_scale, banned, sizes["V"])
    return _loss(
        hidden_base, hidden_thought, weight, lm_head, target, row_weight, interpolation, options, ignore_index, backend
    )


@overload
def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: None = None,
    temperature: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    banned: Sequence[int] = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor,
    temperature: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    banned: Sequence[int] = ...,
    ignore_index: int = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: Sequence[int] = (),
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-likelihood of each target: -log softmax(logits(hidden))[target].

    Args:
        hidden: [N, E] final hidden states, any floating dtype.
        lm_head: [V, E] output embedding, any floating dtype.
        target: int64 or int32 [N] token ids.
        row_weight: [N] weight of each row's loss, without a gradient; None: one loss for each row.
        temperature: divisor of the logits, above 0.
        softcap: cap of the logits, above 0; None: no cap.
        logit_scale: factor of the logits before the cap.
        banned: token ids that are left out of the softmax; none may be a target.
        ignore_index: target of the rows that have loss 0 and gradient 0.
        backend: name of the backend: "auto", "triton", "torch" or "reference".

    Returns:
        Loss of each row [N], float32 (float64 where a floating input is float64), differentiable with respect to
        hidden and lm_head; with `row_weight`: (loss, nll).

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, target or option that does not fit; the message names the argument.
    """
    require_floating("hidden", hidden)
    sizes: dict[str, int] = {}
    require_shape("hidden", hidden, ("N", "E"), sizes)
    _check_rest(hidden, lm_head, target, row_weight, sizes)
    options = make_options(temperature, softcap, logit_scale, banned, sizes["V"])
    return _loss(hidden, None, None, lm_head, target, row_weight, "logits", options, ignore_index, backend)


def _loss(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    interpolation: str,
    options: LogitOptions,
    ignore_index: int,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    if is_reference(backend):
        check_target(target, ignore_index, lm_head.shape[0], options.banned)
        with torch.autocast(hidden_base.device.type, enabled=False):  # autocast would round the logits
            nll = mixed_cross_entropy_reference(
                hidden_base, hidden_thought, weight, lm_head, target, interpolation, options, ignore_index
            )
        if row_weight is None:
            return nll
        return (row_weight.to(nll.dtype).masked_fill(target == ignore_index, 0.0) * nll).sum(), nll.detach()

    def needs_gradient(*tensors: Tensor | None) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    loss, nll, *_ = head_loss(
        hidden_base,
        hidden_thought,
        weight,
        lm_head,
        target,
        row_weight,
        interpolation,
        options.temperature,
        options.softcap,
        options.logit_scale,
        options.banned,
        ignore_index,
        needs_gradient(hidden_base, hidden_thought),
        needs_gradient(weight),
        needs_gradient(lm_head),
        backend,
    )
    return loss if row_weight is None else (loss, nll)


def _check_rest(
    hidden: Tensor, lm_head: Tensor, target: Tensor, row_weight: Tensor | None, sizes: dict[str, int]
) -> None:
    require_floating("lm_head", lm_head)
    require_device("lm_head", lm_head, hidden.device)
    require_shape("lm_head", lm_head, ("V", "E"), sizes)
    require_integer("target", target)
    require_device("target", target, hidden.device)
    require_shape("target", target, ("N",), sizes)
    if row_weight is not None:
        require_floating("row_weight", row_weight)
        require_device("row_weight", row_weight, hidden.device)
        require_shape("row_weight", row_weight, ("N",), sizes)
        if row_weight.requires_grad:
            raise ValueError("row_weight: requires a gradient, which it does not get; pass row_weight.detach()")
