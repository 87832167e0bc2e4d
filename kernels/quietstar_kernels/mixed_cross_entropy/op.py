"""The losses as PyTorch operators: chunks of rows, products with lm_head, what comes between them, autograd.

A row's loss is a weighted sum of the losses of its predictions: "logits" has one prediction, of the mixed state;
"log_probs" has two, with shares w and 1 - w; `linear_cross_entropy` has one, of the only state. For a chunk of rows

    raw = states @ lm_head^T                         2NVE
    dlogits = d nll / d raw                          a softmax, less one at the target
    to_hidden = dlogits @ lm_head                    2NVE
    grad_head += dlogits^T @ (row_scale * states)    2NVE

dlogits is that of a loss of weight 1: bounded, so a 16-bit dtype holds it, and right for rows of weight 0. Weights join
afterwards, as factors of rows. With weights that are known beforehand all of it happens in the forward pass, 6NVE; else
the last line waits for the weights, and the backward pass makes the logits again, 8NVE.

Nothing here waits for the device when the tensors are on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from quietstar_kernels.configurations import Configuration, configuration
from quietstar_kernels.dispatch import compute_dtype, require_dtype, resolve_backend
from quietstar_kernels.launch import Launch
from quietstar_kernels.logits import (
    LogitOptions,
    add_product_,
    banned_ids,
    dense,
    empty_logits,
    operand_dtype,
    product,
    rows_in_chunk,
)
from quietstar_kernels.mixed_cross_entropy import torch_backend

Prediction = tuple[Tensor, Tensor | None, Tensor | None]
"""Hidden states [N, E] of the base, of the thought, and the weight [N] of the thought; the last two only if mixed."""

# ------------------------------------------------------------------------------------------------------------- launches


def case_of(tensor: Tensor) -> str:
    """What the configurations are keyed by, such as "32-bit"."""
    return f"{tensor.element_size() * 8}-bit"


def mix_launch(
    base: Tensor,
    thought: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    states: Tensor,
    scaled: Tensor | None,
    ignore_index: int,
    configuration: Configuration,
) -> Launch:
    """`torch_backend.mix_rows`; states and scaled are contiguous."""
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
        raw: [n, V] of `empty_logits`, banned tokens at -inf already; overwritten only as the gradient.
        gradient: [n, V] of `empty_logits`, or raw; its padding becomes zero.
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
    blocks = {name: size for name, size in configuration.items() if name.startswith("BLOCK_")}
    return Launch(
        kernel,
        (-(-rows // blocks["BLOCK_ROWS"]),),
        arguments,
        constants | blocks,
        configuration["num_warps"],
        configuration["num_stages"],
    )


# ----------------------------------------------------------------------------------------------------- chunks of rows


@dataclass(frozen=True)
class _Head:
    """What every chunk shares.

    Args:
        predictions: one or two for each row.
        matrix: lm_head [V, E] in the dtype of the products' operands.
        target: [N].
        options: from raw logits to logits.
        ignore_index: target of the ignored rows.
        dtype: of logits, losses and sums.
        backend: "torch" or "triton".
    """

    predictions: list[Prediction]
    matrix: Tensor
    target: Tensor
    options: LogitOptions
    ignore_index: int
    dtype: torch.dtype
    backend: str

    @property
    def shares(self) -> list[Tensor | None]:
        """The weight [N] of each prediction's loss; None is 1."""
        if len(self.predictions) == 1:
            return [None]
        weight = self.predictions[0][2]
        assert weight is not None
        return [weight.to(self.dtype), 1 - weight.to(self.dtype)]

    def states(self, prediction: Prediction) -> Prediction:
        """What to mix: with two predictions the weight is that of losses, not of states."""
        return prediction if len(self.predictions) == 1 else (prediction[0], None, None)

    def zero_ignored(self, rows: Tensor) -> Tensor:
        """[N] in the precision of the losses, zero where ignored, whatever was there."""
        return rows.to(self.dtype).masked_fill(self.target == self.ignore_index, 0.0).contiguous()

    def scales(self, row_weight: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Factors [N] of the rows of each prediction in lm_head's gradient, and a factor of that whole gradient.

        float16 has no room for weights such as 1 / N times a small state, so they are divided by the largest one.
        """
        scales = [self.zero_ignored(row_weight if share is None else row_weight * share) for share in self.shares]
        if self.matrix.dtype != torch.float16 or not len(row_weight):
            return scales, None
        largest = torch.stack(scales).abs().amax().clamp_min(torch.finfo(self.dtype).tiny)
        return [scale / largest for scale in scales], largest

    def run(
        self,
        lse: Tensor,
        nll: Tensor | None = None,
        *,
        row_scales: list[Tensor] | None = None,
        grad_head: Tensor | None = None,
        to_hidden: Tensor | None = None,
        to_weight: Tensor | None = None,
    ) -> None:
        """Fill what is given; M predictions.

        Args:
            lse: [M, N], written with `nll`, read without.
            nll: [M, N], written.
            row_scales: M factors [N] of the states in `grad_head`.
            grad_head: [V, E] in `dtype`, added to.
            to_hidden: [M, N, E], written: d nll / d state.
            to_weight: [N], written: d nll / d weight of the only, mixed prediction.
        """
        (N,), (V, E) = self.target.shape, self.matrix.shape
        device, operand = self.matrix.device, self.matrix.dtype
        needs_states_gradient = to_hidden is not None or to_weight is not None
        needs_gradient = needs_states_gradient or grad_head is not None
        size = rows_in_chunk(N, V, device, gradient=needs_gradient)
        logits = empty_logits(size, V, self.dtype, device)
        dlogits = logits if operand == self.dtype else empty_logits(size if needs_gradient else 0, V, operand, device)
        states = self.matrix.new_empty(size, E)
        scaled = None if grad_head is None else torch.empty_like(states)
        mixed = self.states(self.predictions[0])[1] is not None
        # the product may write the gradient where it is stored if nothing has to be done to it before it is rounded
        direct = to_hidden is not None and to_hidden.dtype == operand and not mixed
        to_states = torch.empty_like(states, dtype=self.dtype) if needs_states_gradient and not direct else None
        for first in range(0, N, size):
            rows = slice(first, min(first + size, N))
            n = rows.stop - first
            for index, prediction in enumerate(self.predictions):
                base, thought, weight = (None if x is None else x[rows] for x in self.states(prediction))
                assert base is not None
                nll_of_rows = None if nll is None else nll[index, rows]
                self._mix(
                    base,
                    thought,
                    weight,
                    self.target[rows],
                    None if row_scales is None else row_scales[index][rows],
                    states[:n],
                    None if scaled is None else scaled[:n],
                )
                raw = product(states[:n], self.matrix.T, self.dtype, out=logits[:n])
                gradient = dlogits[:n] if needs_gradient else None
                self._losses(raw, self.target[rows], lse[index, rows], nll_of_rows, gradient)
                if gradient is None:
                    continue
                if grad_head is not None and scaled is not None:
                    add_product_(grad_head, gradient.T, scaled[:n])
                stored = None if to_hidden is None else to_hidden[index, rows]
                if to_states is not None:
                    product(gradient, self.matrix, self.dtype, out=to_states[:n])
                    correct = mixed and operand != self.dtype
                    self._finish(
                        to_states[:n],
                        base if mixed else None,
                        thought,
                        weight,
                        states[:n],
                        self.target[rows],
                        stored,
                        nll_of_rows if correct else None,
                        None if to_weight is None else to_weight[rows],
                    )
                elif stored is not None:
                    torch.mm(gradient, self.matrix, out=stored)

    def _mix(
        self,
        base: Tensor,
        thought: Tensor | None,
        weight: Tensor | None,
        target: Tensor,
        row_scale: Tensor | None,
        states: Tensor,
        scaled: Tensor | None,
    ) -> None:
        arguments = (base, thought, weight, target, row_scale, states, scaled, self.ignore_index)
        if self.backend == "triton":
            mix_launch(*arguments, configuration("mixed_cross_entropy.mix", case_of(base), base.device)).run()
        else:
            torch_backend.mix_rows(*arguments)

    def _losses(self, raw: Tensor, target: Tensor, lse: Tensor, nll: Tensor | None, gradient: Tensor | None) -> None:
        arguments = (raw, target, lse, nll, gradient, self.options, self.ignore_index)
        if self.backend == "triton":
            self.options.ban_(raw)
            kernel = "mixed_cross_entropy.loss" if gradient is None else "mixed_cross_entropy.loss_gradient"
            loss_launch(*arguments, configuration(kernel, case_of(raw), raw.device)).run()
        else:
            torch_backend.row_losses(*arguments)

    def _finish(
        self,
        gradient: Tensor,
        base: Tensor | None,
        thought: Tensor | None,
        weight: Tensor | None,
        states: Tensor,
        target: Tensor,
        stored: Tensor | None,
        nll: Tensor | None,
        to_weight: Tensor | None,
    ) -> None:
        arguments = (gradient, base, thought, weight, states, target, stored, nll, to_weight, self.ignore_index)
        if self.backend == "triton":
            case = case_of(gradient)
            chosen = configuration("mixed_cross_entropy.hidden_gradient", case, gradient.device)
            hidden_gradient_launch(*arguments, chosen).run()
        else:
            torch_backend.finish_gradient(*arguments)


def _head(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    interpolation: str,
    options: LogitOptions,
    ignore_index: int,
    backend: str,
) -> _Head:
    floating = [x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None]
    dtype = compute_dtype(*floating)
    matrix = dense(lm_head.to(operand_dtype(lm_head, dtype, hidden_base, hidden_thought)))
    weight = None if weight is None else weight.contiguous()
    predictions: list[Prediction] = [(hidden_base, hidden_thought, weight)]
    if hidden_thought is not None and interpolation == "log_probs":
        predictions = [(hidden_thought, None, weight), (hidden_base, None, weight)]
    return _Head(predictions, matrix, target.contiguous(), options, ignore_index, dtype, backend)


def check_target(target: Tensor, ignore_index: int, vocabulary: int, banned: tuple[int, ...]) -> None:
    """Raise ValueError for a target outside of the vocabulary; on CUDA the device asserts, and nobody waits."""
    fits = (target >= 0) & (target < vocabulary)
    if banned and vocabulary:
        allowed = torch.ones(vocabulary, dtype=torch.bool, device=target.device)
        allowed.index_fill_(0, banned_ids(banned, target.device), False)
        fits &= allowed[target.clamp(0, vocabulary - 1).long()]
    fits |= target == ignore_index
    if target.is_cuda:
        torch._assert_async(fits.all(), "target: a token that is banned or not in the vocabulary")
    elif not bool(fits.all()):
        token = int(target[~fits][0])
        reason = "which is banned" if token in banned else f"wanted 0 <= id < V={vocabulary}"
        raise ValueError(f"target: got token {token}, {reason}; ignore_index={ignore_index} leaves a row out")


def _rows_that_count(target: Tensor, ignore_index: int, backend: str) -> Tensor | None:
    """Indices of the rows to compute where leaving out the others costs no wait: on a CPU; None: compute all."""
    if target.device.type != "cpu" or backend == "triton":
        return None
    counted = target != ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(-1)


# --------------------------------------------------------------------------------------------------------- operators


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass; see `quietstar_kernels.mixed_cross_entropy`. Without thought and weight: that of hidden_base.

    Args:
        needs_hidden: whether a gradient of a hidden state will be wanted.
        needs_weight: the same of weight.
        needs_head: the same of lm_head.

    Returns:
        loss: [N], or with row_weight [], their weighted sum.
        nll: [N] with row_weight, else empty.
        lse: [M, N] log-sum-exp of the logits of each prediction.
        to_hidden: [M, N, E] d nll / d state of each prediction; empty unless needed.
        to_weight: [N] d nll / d weight; empty unless needed.
        grad_head: [V, E] d loss / d lm_head; empty unless needed and row_weight is given.
    """
    backend = resolve_backend(backend, hidden_base)
    if backend == "triton":
        for name, tensor in (("hidden_thought", hidden_thought), ("lm_head", lm_head)):
            if tensor is not None:
                require_dtype(name, tensor, hidden_base.dtype)
    options = LogitOptions(temperature, softcap, logit_scale, tuple(banned))
    check_target(target, ignore_index, lm_head.shape[0], options.banned)
    kept = _rows_that_count(target, ignore_index, backend)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or kept is None else tensor[kept]

    base, kept_target = rows(hidden_base), rows(target)
    assert base is not None and kept_target is not None
    with torch.autocast(target.device.type, enabled=False):
        head = _head(
            base,
            rows(hidden_thought),
            rows(weight),
            lm_head,
            kept_target,
            interpolation,
            options,
            ignore_index,
            backend,
        )
        M, n, (V, E) = len(head.predictions), kept_target.shape[0], lm_head.shape
        lse = torch.zeros(M, n, dtype=head.dtype, device=target.device)
        nll = torch.zeros_like(lse)
        to_hidden = (
            base.new_empty((M, n, E), dtype=_stored_dtype(hidden_base, hidden_thought)) if needs_hidden else None
        )
        to_weight = lse.new_empty(n) if needs_weight else None
        grad_head = row_scales = largest = None
        if needs_head and row_weight is not None:
            grad_head = lse.new_zeros(V, E)
            kept_row_weight = rows(row_weight)
            assert kept_row_weight is not None
            row_scales, largest = head.scales(kept_row_weight.to(head.dtype))
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
        total = nll[0]
        if M == 2:
            total = sum(head.zero_ignored(share) * part for share, part in zip(head.shares, nll, strict=True))  # type: ignore[arg-type,assignment]  # two predictions have shares, and their sum is a tensor
        if grad_head is not None:
            if largest is not None:
                grad_head *= largest
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
        grad_loss: [N], or [] with row_weight.
        hidden_base, hidden_thought, lm_head, lse: for lm_head's gradient without row_weight, else None.
        to_hidden, to_weight, head_in_forward: what the forward pass returned.
        needs_base, needs_thought, needs_weight, needs_head: what is wanted.
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
        grad_head = head_in_forward * grad_loss.to(head_in_forward.dtype)
    elif needs_head:
        assert hidden_base is not None and lm_head is not None and lse is not None
        backend = resolve_backend(backend, hidden_base)
        kept = _rows_that_count(target, ignore_index, backend)

        def rows(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or kept is None else tensor[kept]

        base, kept_target = rows(hidden_base), rows(target)
        assert base is not None and kept_target is not None
        options = LogitOptions(temperature, softcap, logit_scale, tuple(banned))
        with torch.autocast(target.device.type, enabled=False):
            head = _head(
                base,
                rows(hidden_thought),
                rows(weight),
                lm_head,
                kept_target,
                interpolation,
                options,
                ignore_index,
                backend,
            )
            row_scales, largest = head.scales(upstream if kept is None else upstream[kept])
            sums = torch.zeros(lm_head.shape, dtype=head.dtype, device=lm_head.device)
            head.run(lse if kept is None else lse[:, kept], row_scales=row_scales, grad_head=sums)
            if largest is not None:
                sums *= largest
            grad_head = sums.to(lm_head.dtype)
    return grad_base, grad_thought, grad_weight, grad_head


def _stored_dtype(hidden_base: Tensor, hidden_thought: Tensor | None) -> torch.dtype:
    """The dtype that the hidden states' gradients are kept in."""
    if hidden_thought is None:
        return hidden_base.dtype
    return torch.promote_types(hidden_base.dtype, hidden_thought.dtype)


def _scaled_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """scale [N] * rows [N, E] in the dtype of `rows`, multiplied in that of `scale` without storing it."""
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
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    banned: Sequence[int],
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_head: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    _, nll, lse, to_hidden, to_weight, grad_head = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(nll, lse, to_hidden, to_weight, grad_head)
    again = (hidden_base, hidden_thought, lm_head, lse) if needs_head and row_weight is None else (None,) * 4
    ctx.save_for_backward(*again, weight, target, row_weight, to_hidden, to_weight, grad_head)
    ctx.options, ctx.backend = options, backend
    ctx.prepared = (needs_hidden, needs_hidden, needs_weight, needs_head)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden_base, hidden_thought)]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    if grad_loss is None or not any(needed):
        return (None,) * 16
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


@register_flop_formula(torch.ops.quietstar.head_loss)
def _(
    hidden_base: Any,
    hidden_thought: Any,
    weight: Any,
    lm_head: Any,
    target: Any,
    row_weight: Any,
    interpolation: str,
    *settings: Any,
    out_shape: Any = None,
) -> int:
    needs_hidden, needs_weight, needs_head, _ = settings[-4:]
    predictions = 2 if hidden_thought is not None and interpolation == "log_probs" else 1
    to_states = needs_hidden or (needs_weight and predictions == 1)
    return _flop(hidden_base, lm_head, predictions, 1 + to_states + (needs_head and row_weight is not None))


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
