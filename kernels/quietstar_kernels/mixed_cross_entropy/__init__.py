"""Next-token losses from hidden states without [N, V] logits: after the mixing head, and of one hidden state.

Quiet-STaR (arXiv 2403.09629), section 4.3 (the mixing head) and 4.4 (the losses).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quietstar_kernels.dispatch import (
    require_device,
    require_floating,
    require_integer,
    require_shape,
    resolve_backend,
)
from quietstar_kernels.logits import LogitOptions, make_options
from quietstar_kernels.mixed_cross_entropy.reference import mixed_cross_entropy_reference
from quietstar_kernels.mixed_cross_entropy.torch_backend import mixed_cross_entropy_torch

__all__ = ["linear_cross_entropy", "mixed_cross_entropy"]

INTERPOLATIONS = ("logits", "log_probs")

Loss = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, str, LogitOptions, int], Tensor]


def mixed_cross_entropy(
    hidden_base: Tensor,
    hidden_thought: Tensor,
    weight: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    interpolation: str = "logits",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: Sequence[int] = (),
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of each target under the mixture of the predictions with and without thought.

    logits(h) = softcap(logit_scale * h @ lm_head^T) / temperature, where softcap(z) = cap * tanh(z / cap), with the
    banned tokens at -inf; p(h) = softmax(logits(h)). With w = weight:

    - "logits": -log p((1 - w) hidden_base + w hidden_thought)[target]. lm_head is linear, so mixing the hidden states
      mixes the logits, and one product does. With a softcap it is the hidden states that are mixed, before the cap.
    - "log_probs": -(w log p(hidden_thought) + (1 - w) log p(hidden_base))[target], the paper's equation, not
      renormalised.

    Logits and losses are float32 (float64 where a floating input is float64). The torch backend holds the logits of
    one chunk of rows at a time: at most `logits.LOGITS_IN_CHUNK` of them (8 MiB on a CPU, 256 MiB on CUDA), as far as
    one row fits; the backward pass recomputes them. Every row may have its own upstream gradient. On CUDA, inputs that
    share a low precision are multiplied in it, a mixed state in two parts whose logits are added: the loss keeps
    float32's accuracy, for a moment with twice the logits.

    Args:
        hidden_base: [N, E] final hidden states without thought, any floating dtype.
        hidden_thought: [N, E] final hidden states after the thought.
        weight: [N] the weight of the thought; 1 - weight is the weight of the base.
        lm_head: [V, E] output embedding.
        target: int64 or int32 [N] token ids.
        interpolation: "logits" or "log_probs".
        temperature: divides the logits, above 0.
        softcap: cap of the logits, above 0; None: no cap.
        logit_scale: multiplies the logits before the cap.
        banned: token ids that are left out of the softmax; none may be a target.
        ignore_index: rows with this target have loss 0 and gradient 0, and are not computed.
        backend: "auto", "torch" or "reference".

    Returns:
        Loss of each row [N], float32 (float64 where a floating input is float64), differentiable with respect to
        hidden_base, hidden_thought, weight and lm_head.

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, target or option that does not fit; the message names the argument.
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
    _check_head(hidden_base, lm_head, target, sizes)
    options = make_options(temperature, softcap, logit_scale, banned, sizes["V"])
    _check_target(target, ignore_index, sizes["V"], options.banned)
    with torch.autocast(hidden_base.device.type, enabled=False):  # autocast would round the logits
        return _backend(backend)(
            hidden_base, hidden_thought, weight, lm_head, target, interpolation, options, ignore_index
        )


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: Sequence[int] = (),
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of each target: -log softmax(logits(hidden))[target].

    Args:
        hidden: [N, E] final hidden states, any floating dtype.
        lm_head: [V, E] output embedding.
        target: int64 or int32 [N] token ids.
        temperature: see `mixed_cross_entropy`, like all that follow.
        softcap: cap of the logits.
        logit_scale: multiplies the logits before the cap.
        banned: token ids that are left out of the softmax.
        ignore_index: rows with this target have loss 0 and gradient 0, and are not computed.
        backend: "auto", "torch" or "reference".

    Returns:
        Loss of each row [N], float32 (float64 where a floating input is float64), differentiable with respect to
        hidden and lm_head.

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, target or option that does not fit; the message names the argument.
    """
    require_floating("hidden", hidden)
    sizes: dict[str, int] = {}
    require_shape("hidden", hidden, ("N", "E"), sizes)
    _check_head(hidden, lm_head, target, sizes)
    options = make_options(temperature, softcap, logit_scale, banned, sizes["V"])
    _check_target(target, ignore_index, sizes["V"], options.banned)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the logits
        return _backend(backend)(hidden, None, None, lm_head, target, "logits", options, ignore_index)


def _backend(backend: str) -> Loss:
    return mixed_cross_entropy_torch if resolve_backend(backend) == "torch" else mixed_cross_entropy_reference


def _check_head(hidden: Tensor, lm_head: Tensor, target: Tensor, sizes: dict[str, int]) -> None:
    require_floating("lm_head", lm_head)
    require_device("lm_head", lm_head, hidden.device)
    require_shape("lm_head", lm_head, ("V", "E"), sizes)
    require_integer("target", target)
    require_device("target", target, hidden.device)
    require_shape("target", target, ("N",), sizes)


def _check_target(target: Tensor, ignore_index: int, vocabulary: int, banned: tuple[int, ...]) -> None:
    wrong = (target < 0) | (target >= vocabulary)
    if banned:
        wrong |= torch.isin(target, torch.tensor(banned, device=target.device))
    wrong &= target != ignore_index
    if bool(wrong.any()):
        token = int(target[wrong][0])
        reason = "which is banned" if token in banned else f"wanted 0 <= id < V={vocabulary}"
        raise ValueError(f"target: got token {token}, {reason}; ignore_index={ignore_index} leaves a row out")
