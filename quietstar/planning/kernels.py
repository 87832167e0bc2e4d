"""Memory and work of the engine's kernels: in PyTorch on a CPU, in Triton on a GPU.

A CPU runs the kernels' own code on meta tensors. For Triton's kernels this file repeats their allocations and work: the
same chunks and tiles, without the values between two products that stay in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quietstar.planning.meta_tensors import Kernel, Ledger, Work
from quietstar_kernels.configurations import table
from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import empty_logits, rows_in_chunk
from quietstar_kernels.mixed_cross_entropy.op import compute_head_loss, compute_head_loss_backward
from quietstar_kernels.thought_attention import IMPLEMENTATIONS
from quietstar_kernels.thought_attention import op as attention_op
from quietstar_kernels.token_sampling.op import compute_tokens

LOGITS = "logits chunk"
SAVED_BY_LOSSES = "gradients that the losses keep"
SAMPLING_HEAD, LOSS_HEAD = "sampling head", "loss heads"

operators = torch.ops.quietstar
CUDA = torch.device("cuda")
ARCHITECTURE = "sm_90"
"""Architecture with the block sizes that decide into how many parts the gradients of the text are split; those of
others differ little."""


def cpu_kernels(ledger: Ledger) -> dict[Any, Kernel]:
    """Returns the kernels' own code; the memory that it allocates counts as logits."""
    return {
        operators.sample_tokens.default: _labelled(ledger, SAMPLING_HEAD, compute_tokens),
        operators.head_loss.default: _labelled(ledger, LOSS_HEAD, compute_head_loss),
        operators.head_loss_backward.default: _labelled(ledger, LOSS_HEAD, compute_head_loss_backward),
    }


def cuda_kernels(ledger: Ledger) -> dict[Any, Kernel]:
    """Returns functions that note the memory and work of Triton's kernels and of the products between them."""
    kernels = _TritonKernels(ledger)
    return {
        operators.sample_tokens.default: _labelled(ledger, SAMPLING_HEAD, kernels.sample_tokens),
        operators.head_loss.default: _labelled(ledger, LOSS_HEAD, kernels.head_loss),
        operators.head_loss_backward.default: _labelled(ledger, LOSS_HEAD, kernels.head_loss_backward),
        operators.thought_attention.default: kernels.attention,
        operators.thought_attention_backward.default: kernels.attention_backward,
    }


def triton_attention(
    q: Tensor,
    *keys_values: Tensor,
    text_start: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    results: tuple[Tensor, Tensor] | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Runs `quietstar_kernels.thought_attention` as a GPU does; on meta tensors dispatch would take the CPU's code."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given: dict[str, Any] = {} if results is None else {"results": results}
    return IMPLEMENTATIONS["triton"](q, *keys_values, text_start, window, scale, softcap, **given)


def _labelled(ledger: Ledger, part: str, kernel: Kernel) -> Kernel:
    def run(*arguments: Any) -> Any:
        with ledger.labelled(LOGITS, part):
            results = kernel(*arguments)
        for result in results:
            ledger.relabel(result, SAVED_BY_LOSSES)
        return results

    return run


class _TritonKernels:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def sample_tokens(
        self, hidden: Tensor, lm_head: Tensor, uniform: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, V = hidden.shape[0], lm_head.shape[0]
        dtype = compute_dtype(hidden, lm_head)
        token = torch.empty(N, dtype=torch.int64).zero_()
        logprob, lse = (torch.empty(N, dtype=dtype) for _ in range(2))
        size = rows_in_chunk(N, V, CUDA, dtype)
        logits = empty_logits(size, V, dtype, hidden.device)
        for first in range(0, N, size):
            n = min(size, N - first)
            self._product(n, lm_head, read=hidden[:n], written=logits[:n])
            self._pass(logits[:n])
        return token, logprob, lse

    def head_loss(
        self,
        hidden_base: Tensor,
        hidden_thought: Tensor | None,
        weight: Tensor | None,
        lm_head: Tensor,
        target: Tensor,
        row_weight: Tensor | None,
        interpolation: str,
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight, needs_head, _ = settings[-4:]
        predictions = 2 if hidden_thought is not None and interpolation == "log_probs" else 1
        (N, E), V = hidden_base.shape, lm_head.shape[0]
        dtype = compute_dtype(*(x for x in (hidden_base, hidden_thought, weight, lm_head) if x is not None))
        lse, nll = (torch.empty(predictions, N, dtype=dtype) for _ in range(2))
        to_hidden = lm_head.new_empty((predictions, N, E) if needs_hidden else 0)
        to_weight = lse.new_empty(N if needs_weight else 0)
        sums = lse.new_empty((V, E) if needs_head and row_weight is not None else 0)
        self._chunks(hidden_base, hidden_thought, lm_head, dtype, predictions, to_hidden, to_weight, sums, True)
        grad_head = sums.to(lm_head.dtype)
        loss = lse.new_empty(N if row_weight is None else ())
        nothing = lse.new_empty(0)
        return loss, nothing if row_weight is None else nll[0].clone(), lse, to_hidden, to_weight, grad_head, nothing

    def head_loss_backward(
        self,
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
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        needs_base, needs_thought, needs_weight, needs_head, _ = settings[-5:]
        nothing = grad_loss.new_empty(0)
        grad_base = to_hidden[-1] * 2 if needs_base else nothing.clone()
        grad_thought = to_hidden[0] * 2 if needs_thought else nothing.clone()
        grad_weight = torch.empty_like(weight) if needs_weight and weight is not None else nothing.clone()
        if not needs_head:
            return grad_base, grad_thought, grad_weight, nothing.clone()
        if row_weight is not None:
            return grad_base, grad_thought, grad_weight, head_in_forward * 2
        assert hidden_base is not None and lm_head is not None
        predictions = 2 if hidden_thought is not None and interpolation == "log_probs" else 1
        sums = grad_loss.new_empty(lm_head.shape)
        self._chunks(hidden_base, hidden_thought, lm_head, grad_loss.dtype, predictions, nothing, nothing, sums, False)
        return grad_base, grad_thought, grad_weight, sums.to(lm_head.dtype)

    def _chunks(
        self,
        hidden_base: Tensor,
        hidden_thought: Tensor | None,
        lm_head: Tensor,
        dtype: torch.dtype,
        predictions: int,
        to_hidden: Tensor,
        to_weight: Tensor,
        grad_head: Tensor,
        losses: bool,
    ) -> None:
        """Notes the work of `quietstar_kernels.mixed_cross_entropy.chunks.Head.run`."""
        (N, E), V = hidden_base.shape, lm_head.shape[0]
        same = all(x is None or x.dtype == lm_head.dtype for x in (hidden_base, hidden_thought))
        operand = lm_head.dtype if same else dtype
        matrix = lm_head.to(operand)
        mixed = hidden_thought is not None and predictions == 1
        needs_states = bool(to_hidden.numel() or (to_weight.numel() and mixed))
        needs_gradient = needs_states or bool(grad_head.numel())
        size = rows_in_chunk(N, V, CUDA, dtype, operand if needs_gradient else None)
        logits = empty_logits(size, V, dtype, matrix.device)
        dlogits = logits
        if operand != dtype:
            dlogits = empty_logits(size if needs_gradient else 0, V, operand, matrix.device)
        states = matrix.new_empty(size, E)
        rounds = mixed and operand != dtype and losses and not needs_states
        others = [torch.empty_like(states) for _ in range(bool(grad_head.numel()) + rounds)]
        direct = to_hidden.dtype == operand and not mixed
        to_states = torch.empty_like(states, dtype=dtype) if needs_states and not direct else states
        for first in range(0, N, size):
            n = min(size, N - first)
            for _ in range(predictions):
                self._pass(states[:n], *(x[:n] for x in others))
                for _ in range(1 + rounds):
                    self._product(n, matrix, read=states[:n], written=logits[:n])
                self._pass(logits[:n], dlogits[:n])
                if grad_head.numel():
                    self._product(n, grad_head, read=dlogits[:n], written=grad_head, dtype=operand)
                if needs_states:
                    self._product(n, matrix, read=dlogits[:n], written=to_states[:n])

    def _product(
        self, rows: int, matrix: Tensor, *, read: Tensor, written: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        """Notes a product of `rows` rows with a matrix [V, E]."""
        moved = sum(x.numel() * x.element_size() for x in (matrix, read, written))
        self._ledger.compute(Work(2 * rows * matrix.numel(), moved, dtype or matrix.dtype))

    def _pass(self, *tensors: Tensor) -> None:
        """Notes a kernel that reads or writes tensors once."""
        moved = sum(x.numel() * x.element_size() for x in tensors)
        self._ledger.compute(Work(0, moved, tensors[0].dtype))

    def attention(
        self,
        q: Tensor,
        k_text: Tensor,
        v_text: Tensor,
        k_thought: Tensor,
        v_thought: Tensor,
        anchor: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:4], dtype=compute_dtype(q))
        self._attend(2, (q, k_text, v_text, k_thought, v_thought, out), anchor, window=rest[1])
        return out, lse

    def attention_backward(
        self,
        q: Tensor,
        k_text: Tensor,
        v_text: Tensor,
        k_thought: Tensor,
        v_thought: Tensor,
        anchor: Tensor,
        text_start: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        _delta = torch.empty_like(lse)
        gradients = [torch.empty(x.shape, dtype=q.dtype) for x in (q, k_text, v_text, k_thought, v_thought)]
        block_sizes = table()[ARCHITECTURE]["thought_attention.backward_text"][attention_op.case_of(q)]
        B, L, Hkv, D = k_text.shape
        parts = (attention_op.grad_text_parts(q, k_text, block_sizes), B, Hkv, L, D)
        grad_k, grad_v = (torch.empty(parts, dtype=lse.dtype) for _ in range(2))
        # 7 products: scores and the gradient of the weights in both kernels, then the gradients of q, k and v
        self._attend(7, (q, k_text, v_text, k_thought, v_thought, *gradients, grad_k, grad_v), anchor, rest[3])
        return tuple(gradients)

    def _attend(self, products: int, tensors: tuple[Tensor, ...], anchor: Tensor, window: int | None) -> None:
        """Notes the work of attention; only visible positions count."""
        q, k_thought = tensors[0], tensors[3]
        B, P, S, H, D = q.shape
        T = k_thought.shape[2]
        text = (anchor + 1 if window is None else (anchor + 1).clamp_max(window)).expand(B, P)
        visible = int(text.sum()) * S + B * P * sum(s + 1 + T - S for s in range(S))
        moved = sum(x.numel() * x.element_size() for x in tensors)
        self._ledger.compute(Work(2 * products * visible * H * D, moved, q.dtype))


KERNELS: Mapping[str, Any] = {"cpu": cpu_kernels, "cuda": cuda_kernels}
