"""The losses' algorithm: chunks of rows, products with lm_head, and what comes between them.

A row's loss is a weighted sum of the losses of its predictions: "logits" has one prediction, of the mixed state;
"log_probs" has two, with shares w and 1 - w; `linear_cross_entropy` has one, of the only state. For a chunk of rows

    raw = states @ lm_head^T                         2NVE
    dlogits = d nll / d raw                          a softmax, less one at the target
    to_hidden = dlogits @ lm_head                    2NVE
    grad_head += dlogits^T @ (row_scale * states)    2NVE

dlogits is that of a loss of weight 1: bounded, so a 16-bit dtype holds it, and right for rows of weight 0. Weights join
afterwards, as factors of rows. With weights that are known beforehand all of it happens in the forward pass, 6NVE; else
the last line waits for the weights, and the backward pass makes the logits again, 8NVE.

A mixed state that is rounded to 16 bits loses more than a small weight changes. to_hidden puts that back into the loss,
to first order; where it is not wanted a second product does, of what rounding took: 4NVE for losses alone.

Nothing here waits for the device when the tensors are on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype
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
from quietstar_kernels.mixed_cross_entropy import launches, torch_backend

ROW_OPERATIONS: dict[str, ModuleType] = {"triton": launches, "torch": torch_backend}
"""What comes between the products: modules with `mix_rows`, `row_losses` and `finish_gradient`."""

Prediction = tuple[Tensor, Tensor | None, Tensor | None]
"""Hidden states [N, E] of the base, of the thought, and the weight [N] of the thought; the last two only if mixed."""


@dataclass(frozen=True)
class Head:
    """What every chunk shares.

    Args:
        predictions: the one or two predictions of each row.
        matrix: [V, E] lm_head, in the dtype of the products' operands.
        target: [N] target token ids.
        options: options that make logits of raw logits.
        ignore_index: target of the ignored rows.
        dtype: of logits, losses and sums.
        backend: a name of `ROW_OPERATIONS`.
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
            lse: [M, N] log-sum-exp of the logits; written with `nll`, read without.
            nll: [M, N] negative log-likelihoods, written.
            row_scales: [N] factors of the states in `grad_head`, for each of the M predictions.
            grad_head: [V, E] gradient of lm_head in `dtype`, written.
            to_hidden: [M, N, E] d nll / d state, written.
            to_weight: [N] d nll / d weight of the only, mixed prediction, written.
        """
        operations = ROW_OPERATIONS[self.backend]
        (N,), (V, E) = self.target.shape, self.matrix.shape
        device, operand = self.matrix.device, self.matrix.dtype
        needs_states_gradient = to_hidden is not None or to_weight is not None
        needs_gradient = needs_states_gradient or grad_head is not None
        size = rows_in_chunk(N, V, device, self.dtype, operand if needs_gradient else None)
        logits = empty_logits(size, V, self.dtype, device)
        dlogits = logits if operand == self.dtype else empty_logits(size if needs_gradient else 0, V, operand, device)
        states = self.matrix.new_empty(size, E)
        scaled = None if grad_head is None else torch.empty_like(states)
        mixed = self.states(self.predictions[0])[1] is not None
        rounds = mixed and operand != self.dtype  # only mixing makes a state that the operand cannot hold
        residual = torch.empty_like(states) if rounds and nll is not None and not needs_states_gradient else None
        # the product may write the gradient where it is stored if nothing has to be done to it before it is rounded
        direct = to_hidden is not None and to_hidden.dtype == operand and not mixed
        to_states = torch.empty_like(states, dtype=self.dtype) if needs_states_gradient and not direct else None
        if grad_head is not None and not N:
            grad_head.zero_()
        for first in range(0, N, size):
            rows = slice(first, min(first + size, N))
            n = rows.stop - first
            for index, prediction in enumerate(self.predictions):
                base, thought, weight = (None if x is None else x[rows] for x in self.states(prediction))
                assert base is not None
                nll_of_rows = None if nll is None else nll[index, rows]
                operations.mix_rows(
                    base,
                    thought,
                    weight,
                    self.target[rows],
                    None if row_scales is None else row_scales[index][rows],
                    states[:n],
                    None if scaled is None else scaled[:n],
                    self.ignore_index,
                    None if residual is None else residual[:n],
                )
                raw = product(states[:n], self.matrix.T, self.dtype, out=logits[:n])
                if residual is not None:
                    add_product_(raw, residual[:n], self.matrix.T)
                gradient = dlogits[:n] if needs_gradient else None
                operations.row_losses(
                    raw,
                    self.target[rows],
                    lse[index, rows],
                    nll_of_rows,
                    gradient,
                    self.options,
                    self.ignore_index,
                )
                if gradient is None:
                    continue
                if grad_head is not None and scaled is not None:
                    if first == index == 0:  # what is written needs neither zeros nor a second look
                        product(gradient.T, scaled[:n], self.dtype, out=grad_head)
                    else:
                        add_product_(grad_head, gradient.T, scaled[:n])
                stored = None if to_hidden is None else to_hidden[index, rows]
                if to_states is not None:
                    product(gradient, self.matrix, self.dtype, out=to_states[:n])
                    operations.finish_gradient(
                        to_states[:n],
                        base if mixed else None,
                        thought,
                        weight,
                        states[:n],
                        self.target[rows],
                        stored,
                        nll_of_rows if rounds else None,
                        None if to_weight is None else to_weight[rows],
                        self.ignore_index,
                    )
                elif stored is not None:
                    torch.mm(gradient, self.matrix, out=stored)


def make_head(
    hidden_base: Tensor,
    hidden_thought: Tensor | None,
    weight: Tensor | None,
    lm_head: Tensor,
    target: Tensor,
    interpolation: str,
    options: LogitOptions,
    ignore_index: int,
    backend: str,
) -> Head:
    floating = [x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None]
    dtype = compute_dtype(*floating)
    matrix = dense(lm_head.to(operand_dtype(lm_head, dtype, hidden_base, hidden_thought)))
    weight = None if weight is None else weight.contiguous()
    predictions: list[Prediction] = [(hidden_base, hidden_thought, weight)]
    if hidden_thought is not None and interpolation == "log_probs":
        predictions = [(hidden_thought, None, weight), (hidden_base, None, weight)]
    return Head(predictions, matrix, target.contiguous(), options, ignore_index, dtype, backend)


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


def rows_that_count(target: Tensor, ignore_index: int, backend: str) -> Tensor | None:
    """Indices of the rows to compute where leaving out the others costs no wait: on a CPU; None: compute all."""
    if target.device.type != "cpu" or backend != "torch":
        return None
    counted = target != ignore_index
    return None if bool(counted.all()) else counted.nonzero().squeeze(-1)
