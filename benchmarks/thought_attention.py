"""Thought attention against everything that it can be built from: time, throughput, memory, and the targets.

    python benchmarks/thought_attention.py

Three kinds of work: `forward` (of training, so with what the backward pass needs), `backward`, and `steps`, the S
sampling steps of one token per stream over growing own keys, without gradient. Every text position is an anchor. Sides:

* `triton`, `torch`, `reference`: the backends of `quietstar_kernels.thought_attention`; the reference is the mask in
  eager PyTorch. The sampling steps of `triton` are one CUDA graph, as are those of `parts` and `sdpa`.
* `sdpa`: PyTorch's scaled_dot_product_attention under one dense mask, by each of its kernels that takes one. Its steps
  write no keys and concatenate nothing, which the released code does at every step.
* `flex`: FlexAttention, compiled, streams in position-major order (the order matters: step-major is four times the
  blocks), by block sizes of mask and tile; the time to build its mask is in the notes.
* `parts`: causal flash attention to the text, every (stream token, head) a head of its own, then flash attention of
  every stream to itself, merged by log-sum-exp. Its backward pass gives both kernels the merged result. The streams'
  keys lie apart from the text's, so that it copies none of them.

Useful work counts visible (query, key) pairs only: 4 D operations for each forward, 10 D backward. Least bytes are
those of inputs and outputs, once each. Sides are checked against the reference in float32, at the first and the last
text of the batch, before they are timed. Block sizes of `flex` and kernels of `sdpa` are compared at the first problem;
the others use the fastest of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bars import bar
from benchmarks.gpu_timing import (
    LARGEST_ERROR,
    KernelBenchmark,
    Measurement,
    NotTried,
    Session,
    Target,
    dtype_name,
    milliseconds,
    times_faster,
    worst_error,
)
from benchmarks.train_step import MEBIBYTE
from quietstar_kernels import thought_attention

SIDES = ("triton", "torch", "reference", "sdpa", "flex", "parts")
OURS = ("triton", "torch")
WORK = ("forward", "backward", "steps")
MODELS = {
    "mistral-7b": {"heads": 32, "kv_heads": 8, "head_size": 128, "batch": 8},
    "small": {"heads": 9, "kv_heads": 3, "head_size": 64, "batch": 8},  # SmolLM2-135M
    "tiny": {"heads": 4, "kv_heads": 2, "head_size": 32, "batch": 2},
}
LARGEST_MASK = 2**31  # bytes; four times the text is sixteen times the mask and the time
REFERENCE_SCORES = 2**27


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one problem; every one of the L text positions is an anchor, so that P = L."""

    model: str
    length: int
    stream_length: int
    batch: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def point(self) -> dict[str, Any]:
        return {"model": self.model, "L": self.length, "S": self.stream_length}

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of all heads."""
        L, S = self.length, self.stream_length
        return self.batch * self.heads * (S * L * (L + 1) // 2 + L * S * (S + 1) // 2)

    def flops(self, work: str) -> int:
        return (10 if work == "backward" else 4) * self.head_size * self.pairs

    def least_bytes(self, work: str, size: int) -> int:
        """Of inputs and outputs, once each; lse float32."""
        L, S = self.length, self.stream_length
        queries = self.batch * L * S * self.heads * self.head_size * size
        own = 2 * self.batch * L * S * self.kv_heads * self.head_size * size
        text = 2 * self.batch * L * self.kv_heads * self.head_size * size
        lse = 4 * self.batch * L * S * self.heads
        if work == "forward":
            return 2 * queries + own + text + lse
        if work == "backward":  # q, out and its gradient in, q's gradient out; keys and values in and out
            return 4 * queries + 2 * own + 2 * text + lse
        return 2 * queries + own * (S + 1) // 2 + S * text  # step t reads t + 1 of a stream's keys


class Problem:
    """The tensors of one shape. Keys and values lie as the model has them: `[text | stream 0 | stream 1 | ...]`."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        B, L, S, H, D = shape.batch, shape.length, shape.stream_length, shape.heads, shape.head_size
        self.q = torch.randn(B, L, S, H, D, dtype=dtype, device=device)
        self.keys, self.values = torch.randn(2, B, L + L * S, shape.kv_heads, D, dtype=dtype, device=device)
        self.grad_out = torch.randn(B, L, S, H, D, dtype=dtype, device=device)
        self.anchor = torch.arange(L, dtype=torch.int32)
        self.texts = sorted({0, B - 1})  # those that are checked

    def text_and_own(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Views of [B, L + L * S, Hkv, D]: text [B, L, Hkv, D] and streams [B, P, S, Hkv, D]."""
        L, S = self.shape.length, self.shape.stream_length
        return packed[:, :L], packed[:, L:].unflatten(1, (L, S))

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """`out` and the gradients of q, keys and values in float32, of the checked texts."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        inputs = [x[self.texts].to(dtype).requires_grad_() for x in (self.q, self.keys, self.values)]
        q, keys, values = inputs
        grad_out = self.grad_out[self.texts].to(dtype)
        shape = self.shape
        per_stream = len(self.texts) * shape.stream_length * shape.heads * (shape.length + shape.stream_length)
        out = torch.empty_like(q)
        for streams in torch.arange(shape.length).split(max(1, REFERENCE_SCORES // per_stream)):
            here = slice(int(streams[0]), int(streams[-1]) + 1)
            (k_text, k_own), (v_text, v_own) = self.text_and_own(keys), self.text_and_own(values)
            part = thought_attention(
                q[:, here], k_text, v_text, k_own[:, here], v_own[:, here], self.anchor[here], backend="reference"
            )
            part.backward(grad_out[:, here])
            out[:, here].copy_(part.detach())
        grads = {name: x.grad for name, x in zip(("q", "keys", "values"), inputs, strict=True)}
        return {"out": out, **{name: grad for name, grad in grads.items() if grad is not None}}


def sees(query: Tensor, key: Tensor, L: int, S: int) -> Tensor:
    """Whether flattened query p * S + s sees packed key L + p * S + t, or text key j < L; broadcasts."""
    own = key - L
    text = (key < L) & (key <= query // S)
    return text | ((key >= L) & (own // S == query // S) & (own % S <= query % S))


@dataclasses.dataclass
class Attention:
    """A side at work on a problem.

    Args:
        inputs: leaves that receive gradients.
        forward: the output in the side's own layout.
        streams: from that layout to [B, P, S, H, D]; linear, so that it moves gradients too.
        from_streams: the inverse.
        packed: from the gradients of `inputs` to those of q, keys and values by name.
        note: for the reader of the row.
    """

    inputs: list[Tensor]
    forward: Callable[[], Tensor]
    streams: Callable[[Tensor], Tensor]
    from_streams: Callable[[Tensor], Tensor]
    packed: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    note: str = ""


def leaf(x: Tensor) -> Tensor:
    """The same memory as a leaf of its own."""
    return x.detach().requires_grad_()


def same(x: Tensor) -> Tensor:
    return x


def five_tensors(problem: Problem, forward: Callable[..., Tensor], own_apart: bool = False) -> Attention:
    """A side that takes q and the keys and values of text and streams apart; `own_apart`: streams contiguous."""
    (k_text, k_own), (v_text, v_own) = problem.text_and_own(problem.keys), problem.text_and_own(problem.values)
    if own_apart:
        k_own, v_own = k_own.contiguous(), v_own.contiguous()
    inputs = [leaf(x) for x in (problem.q, k_text, v_text, k_own, v_own)]

    def packed(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        q, k_text, v_text, k_own, v_own = grads
        return {
            "q": q,
            "keys": torch.cat([k_text, k_own.flatten(1, 2)], dim=1),
            "values": torch.cat([v_text, v_own.flatten(1, 2)], dim=1),
        }

    return Attention(inputs, lambda: forward(*inputs), same, same, packed)


def three_tensors(problem: Problem, forward: Callable[[Tensor, Tensor, Tensor], Tensor], note: str) -> Attention:
    """A side that takes [B, H, P * S, D] queries and packed keys [B, Hkv, L + P * S, D], all strided views."""
    L, S = problem.shape.length, problem.shape.stream_length
    inputs = [leaf(x) for x in (problem.q, problem.keys, problem.values)]
    q, keys, values = inputs
    return Attention(
        inputs,
        lambda: forward(q.flatten(1, 2).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)),
        lambda raw: raw.transpose(1, 2).unflatten(1, (L, S)),
        lambda streams: streams.flatten(1, 2).transpose(1, 2),
        lambda grads: dict(zip(("q", "keys", "values"), grads, strict=True)),
        note,
    )


# ----------------------------------------------------------------------------------------------------------- backends


def backend_attention(problem: Problem, backend: str) -> Attention:
    def forward(q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor) -> Tensor:
        return thought_attention(q, k_text, v_text, k_own, v_own, problem.anchor, backend=backend)

    return five_tensors(problem, forward)


def backend_steps(problem: Problem, backend: str) -> Callable[[], list[Tensor]]:
    (k_text, k_own), (v_text, v_own) = problem.text_and_own(problem.keys), problem.text_and_own(problem.values)

    def steps() -> list[Tensor]:
        return [
            thought_attention(
                problem.q[:, :, t : t + 1],
                k_text,
                v_text,
                k_own[:, :, : t + 1],
                v_own[:, :, : t + 1],
                problem.anchor,
                backend=backend,
            )
            for t in range(problem.shape.stream_length)
        ]

    return steps


# --------------------------------------------------------------------------------------------------------- dense mask

SDPA_KERNELS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "default": None,
}


def dense_bias(visible: Callable[[Tensor, Tensor], Tensor], queries: int, keys: int, problem: Problem) -> Tensor:
    """[queries, keys], 0 where visible and -inf elsewhere: additive, which every kernel takes as it is."""
    device = problem.device
    seen = visible(torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :])
    return torch.zeros(queries, keys, dtype=problem.dtype, device=device).masked_fill_(~seen, float("-inf"))


def sdpa(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, kernel: str) -> Tensor:
    if kernel == "efficient":  # knows no grouped heads, so a model that has them repeats its keys
        groups = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    chosen = SDPA_KERNELS[kernel]
    with nullcontext() if chosen is None else sdpa_kernel(chosen):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, enable_gqa=q.shape[1] != keys.shape[1])


def limit_mask(problem: Problem, largest: int) -> int:
    """Bytes of the mask over all streams.

    Raises:
        NotTried: they are more than `largest`.
    """
    size = problem.shape.length * problem.shape.stream_length * problem.keys.shape[1] * problem.q.element_size()
    if size > largest:
        raise NotTried(f"its mask has {size / 2**30:.1f} GiB")
    return size


def sdpa_attention(problem: Problem, kernel: str, session: Session, largest_mask: int) -> Attention:
    L, S = problem.shape.length, problem.shape.stream_length
    queries, keys = L * S, problem.keys.shape[1]
    size = limit_mask(problem, largest_mask)

    def build() -> Tensor:
        return dense_bias(lambda query, key: sees(query, key, L, S), queries, keys, problem)

    bias, seconds = session.meter.built(build)
    note = f"mask of {size / MEBIBYTE:.4g} MiB, built in {1000 * seconds:.3g} ms"
    return three_tensors(problem, lambda q, k, v: sdpa(q, k, v, bias, kernel), note)


def sdpa_steps(problem: Problem, kernel: str, largest_mask: int) -> Callable[[], list[Tensor]]:
    """Keys in the order in which they are sampled, in a cache that is never copied."""
    limit_mask(problem, largest_mask)
    shape = problem.shape
    L, S = shape.length, shape.stream_length
    keys, values = (
        torch.cat([text, own.transpose(1, 2).flatten(1, 2)], dim=1).transpose(1, 2)
        for text, own in map(problem.text_and_own, (problem.keys, problem.values))
    )
    bias = dense_bias(
        lambda query, key: ((key < L) & (key <= query)) | ((key >= L) & ((key - L) % L == query)),
        L,
        L + L * S,
        problem,
    )

    def steps() -> list[Tensor]:
        outs = []
        for t in range(S):
            count = L + (t + 1) * L
            q = problem.q[:, :, t].transpose(1, 2)
            out = sdpa(q, keys[:, :, :count], values[:, :, :count], bias[:, :count], kernel)
            outs.append(out.transpose(1, 2).unsqueeze(2))
        return outs

    return steps


# ------------------------------------------------------------------------------------------------------ FlexAttention

FLEX_BLOCKS = {
    "default": None,
    "128x128": (128, 128),
    "128x64": (128, 64),
    "64x128": (64, 128),
    "64x64": (64, 64),
}


def flex_attention_side(problem: Problem, blocks: str, session: Session) -> Attention:
    """Mask blocks and tiles of the given rows x keys; "default": what FlexAttention does unasked."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = problem.shape
    L, S = shape.length, shape.stream_length
    queries, keys = L * S, problem.keys.shape[1]
    size = FLEX_BLOCKS[blocks] or (128, 128)
    compiled = session.meter.on_gpu

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key, L, S)

    def build() -> Any:
        return create_block_mask(
            visible,
            B=None,
            H=None,
            Q_LEN=queries,
            KV_LEN=keys,
            device=problem.device,
            BLOCK_SIZE=size,
            _compile=compiled,
        )

    attend = flex_attention
    if compiled:
        import torch._functorch.config
        import torch._inductor.config

        torch._dynamo.reset()
        torch._inductor.config.force_disable_caches = True  # their key leaves the tile sizes out
        torch._functorch.config.donated_buffer = False  # a backward pass is timed repeatedly on one graph
        attend = torch.compile(flex_attention, dynamic=False)
    mask, seconds = session.meter.built(build)
    note = f"mask built in {1000 * seconds:.3g} ms, block sparsity {mask.sparsity():.1f} %"

    def forward(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = attend(q, keys, values, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)
        assert isinstance(out, Tensor)
        return out

    side = three_tensors(problem, forward, note)
    if compiled:
        with flex_tiles(FLEX_BLOCKS[blocks]):
            side.forward()  # compiles both passes
    else:  # there to check the mask: on a CPU it has no backward pass
        for x in side.inputs:
            x.requires_grad_(False)
    return side


@contextmanager
def flex_tiles(blocks: tuple[int, int] | None) -> Iterator[None]:
    """Within the block, FlexAttention compiles with tiles of these rows x keys; None: as it likes.

    Its own options cannot say this: it refuses mask blocks that its own default tiles do not divide before it reads
    the option that asks for others.
    """
    if blocks is None:
        yield
        return
    from torch._inductor.choices import InductorChoices

    def narrowed(name: str, tile: Callable[[Any, int, int], Any]) -> Any:
        original = getattr(InductorChoices, name)

        def choose(self: InductorChoices, *arguments: Any, **named: Any) -> list[Any]:
            return [tile(original(self, *arguments, **named)[0], *blocks)]

        return mock.patch.object(InductorChoices, name, choose)

    forward = narrowed("get_flex_attention_fwd_configs", forward_tile)
    with forward, narrowed("get_flex_attention_bwd_configs", backward_tile):
        yield


def forward_tile(config: Any, rows: int, keys: int) -> Any:
    # a third stage of 128 x 128 tiles of 128 elements does not fit the shared memory of any chip
    stages = 2 if rows * keys > 128 * 64 else config.num_stages
    warps = 4 if rows <= 64 else 8
    return dataclasses.replace(config, block_m=rows, block_n=keys, num_stages=stages, num_warps=warps)


def backward_tile(config: Any, rows: int, keys: int) -> Any:
    """Within the kernel's rules: its four sizes divide the mask's blocks, N1 is a multiple of M1 and M2 one of N2."""
    fields = {field.name for field in dataclasses.fields(config)}
    warps = 4 if rows * keys <= 64 * 64 else config.num_warps
    if "block_m1" in fields:
        sizes = {"block_m1": min(64, rows), "block_n1": keys, "block_m2": rows, "block_n2": min(64, keys)}
    else:  # versions of torch with one pair of sizes: M1 = N2 = block_m, N1 = M2 = block_n
        sizes = {"block_m": 64, "block_n": min(rows, keys)}
    return dataclasses.replace(config, num_warps=warps, **sizes)


# -------------------------------------------------------------------------------------------------------------- parts


def flash(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """[B, H, N, D] attention: output, lse [B, H, N], and what its backward pass wants besides."""
    if q.is_cuda:
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, causal, False)
        return out, lse, tuple(rest)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, causal)
    return out, lse, ()


def flash_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, rest: tuple[Any, ...], causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, keys, values, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
        )
    else:
        transposed = lse.transpose(1, 2).contiguous().transpose(1, 2)  # the layout in which the CPU kernel writes it
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, keys, values, out, transposed, 0.0, causal
        )
    query_grad, key_grad, value_grad = grads
    return query_grad, key_grad, value_grad


def cudnn(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, keys, values, None, True, 0.0, causal, False)
    return out, lse.reshape(q.shape[:3]), ()


TEXT_KERNELS = {"flash": flash, "cudnn": cudnn}


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one: [..., D] outputs weighted by their [...] log-sum-exps."""
    total = torch.logaddexp(lse, other_lse)
    weight, other_weight = torch.exp(lse - total).unsqueeze(-1), torch.exp(other_lse - total).unsqueeze(-1)
    return (out.float() * weight + other.float() * other_weight).to(out.dtype), total


@cache
def merging(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    if not compiled:
        return merge
    torch._dynamo.config.recompile_limit = 64  # one for each shape; beyond the limit it would run uncompiled
    return torch.compile(merge, dynamic=False)


class Parts(torch.autograd.Function):
    """Attention to the text and to the own stream by flash attention, merged.

    The gradient of a merged softmax with respect to one part's queries, keys and values is that part's own backward
    pass when it is given the merged output and log-sum-exp, so nothing differentiates through the merge.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, kernel: str, join: Any
    ) -> Tensor:
        B, P, S, H, _ = q.shape
        text = text_views(q, k_text, v_text)
        own = own_views(q, k_own, v_own)
        out_text, lse_text, text_rest = TEXT_KERNELS[kernel](*text, True)
        out_own, lse_own, own_rest = (flash if q.is_cuda else TEXT_KERNELS[kernel])(*own, True)
        out, lse = join(
            out_text.transpose(1, 2).unflatten(2, (S, H)),
            lse_text.transpose(1, 2).unflatten(2, (S, H)),
            out_own.transpose(1, 2).unflatten(0, (B, P)),
            lse_own.transpose(1, 2).unflatten(0, (B, P)),
        )
        ctx.save_for_backward(q, k_text, v_text, k_own, v_own, out, lse)
        ctx.rest = text_rest, own_rest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k_text, v_text, k_own, v_own, out, lse = ctx.saved_tensors
        S = q.shape[2]
        text_rest, own_rest = ctx.rest

        def heads_of_text(x: Tensor) -> Tensor:
            return x.flatten(2, 3).transpose(1, 2)

        def heads_of_own(x: Tensor) -> Tensor:
            return x.flatten(0, 1).transpose(1, 2)

        (grad,) = grads
        grad_q, grad_k, grad_v = flash_backward(
            heads_of_text(grad),
            *text_views(q, k_text, v_text),
            heads_of_text(out),
            heads_of_text(lse),
            text_rest,
            True,
        )
        own_q, grad_k_own, grad_v_own = flash_backward(
            heads_of_own(grad), *own_views(q, k_own, v_own), heads_of_own(out), heads_of_own(lse), own_rest, True
        )
        total_q = grad_q.transpose(1, 2).reshape(q.shape) + own_q.transpose(1, 2).reshape(q.shape)

        def text_keys(x: Tensor) -> Tensor:
            """The sum over the S copies: [B, S * heads, L, D] -> [B, L, Hkv, D]."""
            copies = x.transpose(1, 2).unflatten(2, (S, -1))  # [B, L, S, heads, D]
            summed = copies.sum(2, dtype=torch.float32).unflatten(2, (k_text.shape[2], -1)).sum(3)
            return summed.to(x.dtype)

        def own_keys(x: Tensor) -> Tensor:
            keys = x.transpose(1, 2).unflatten(2, (k_own.shape[3], -1)).sum(3)
            return keys.reshape(k_own.shape)

        return (
            total_q,
            text_keys(grad_k),
            text_keys(grad_v),
            own_keys(grad_k_own),
            own_keys(grad_v_own),
            None,
            None,
        )


def text_views(q: Tensor, k_text: Tensor, v_text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S * H, P, D] queries, and the text's keys once for each stream token, so that nothing of q is copied."""
    groups, S = key_copies(q, k_text), q.shape[2]
    keys, values = k_text, v_text
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    if S > 1:
        keys, values = keys.repeat(1, 1, S, 1), values.repeat(1, 1, S, 1)
    return q.flatten(2, 3).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def own_views(q: Tensor, k_own: Tensor, v_own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every stream a batch entry of its own: [B * P, H, S, D]."""
    groups = key_copies(q, k_own)
    keys, values = (x.flatten(0, 1) for x in (k_own, v_own))
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    return q.flatten(0, 1).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def key_copies(q: Tensor, keys: Tensor) -> int:
    """How often a key head is repeated for the flash kernel: CUDA's knows grouped heads, the CPU's does not."""
    return 1 if q.is_cuda else q.shape[-2] // keys.shape[-2]


def parts_attention(problem: Problem, kernel: str, session: Session) -> Attention:
    join = merging(session.meter.on_gpu)

    def forward(*inputs: Tensor) -> Tensor:
        out: Tensor = Parts.apply(*inputs, kernel, join)
        return out

    return five_tensors(problem, forward, own_apart=True)


def parts_steps(problem: Problem, kernel: str, session: Session) -> Callable[[], list[Tensor]]:
    (k_text, k_own), (v_text, v_own) = problem.text_and_own(problem.keys), problem.text_and_own(problem.values)
    k_own, v_own = k_own.contiguous(), v_own.contiguous()
    join = merging(session.meter.on_gpu)

    def steps() -> list[Tensor]:
        outs = []
        for t in range(problem.shape.stream_length):
            q = problem.q[:, :, t : t + 1]
            B, P, _, H, _ = q.shape
            out_text, lse_text, _ = TEXT_KERNELS[kernel](*text_views(q, k_text, v_text), True)
            out_own, lse_own, _ = flash(*own_views(q, k_own[:, :, : t + 1], v_own[:, :, : t + 1]), False)
            out, _ = join(
                out_text.transpose(1, 2).unflatten(2, (1, H)),
                lse_text.transpose(1, 2).unflatten(2, (1, H)),
                out_own.transpose(1, 2).unflatten(0, (B, P)),
                lse_own.transpose(1, 2).unflatten(0, (B, P)),
            )
            outs.append(out)
        return outs

    return steps


# ---------------------------------------------------------------------------------------------------------- measuring


def variants(side: str, on_gpu: bool) -> list[str]:
    """Kernels or block sizes of a side; the names of its rows are `side` or `side, variant`."""
    if side == "sdpa":
        return ["efficient", "cudnn", "math"] if on_gpu else ["default"]
    if side == "flex":
        return list(FLEX_BLOCKS) if on_gpu else ["default"]
    if side == "parts":
        return ["flash", "cudnn"] if on_gpu else ["flash"]
    return [""]


def build(side: str, variant: str, problem: Problem, session: Session, largest_mask: int) -> Attention:
    if side == "sdpa":
        return sdpa_attention(problem, variant, session, largest_mask)
    if side == "flex":
        return flex_attention_side(problem, variant, session)
    if side == "parts":
        return parts_attention(problem, variant, session)
    return backend_attention(problem, side)


def build_steps(
    side: str, variant: str, problem: Problem, session: Session, largest_mask: int
) -> Callable[[], list[Tensor]]:
    if side == "sdpa":
        return sdpa_steps(problem, variant, largest_mask)
    if side == "parts":
        return parts_steps(problem, variant, session)
    return backend_steps(problem, side)


def measure_shape(session: Session, problem: Problem, options: argparse.Namespace, sweep: bool) -> None:
    """Every side's work on one problem.

    Args:
        sweep: compare the variants of a side; else take the fastest of those compared before.
    """
    shape, limit = problem.shape, LARGEST_ERROR[problem.dtype]
    size = problem.q.element_size()
    for side in options.sides:
        chosen = variants(side, session.meter.on_gpu)
        for work in ("forward", "steps"):
            if work not in options.work or (side == "flex" and work == "steps"):
                continue
            for variant in chosen if sweep else fastest(session, side, work, chosen):
                name = f"{side}, {variant}" if variant else side
                rows = {
                    kind: Measurement(shape.point, kind, name, shape.flops(kind), shape.least_bytes(kind, size))
                    for kind in WORK
                }
                if work == "steps":
                    measure_steps(session, problem, rows[work], (side, variant), options, limit)
                else:
                    backward = "backward" in options.work and (side, variant) != ("parts", "cudnn")
                    measure_passes(session, problem, rows, (side, variant), options, limit, backward)


def fastest(session: Session, side: str, work: str, names: Sequence[str]) -> Sequence[str]:
    """The one variant that has been fastest so far, or all where none has a time, or they cost no compilation."""
    found = session.find({}, work, side)
    return names if found is None or side == "parts" else [found.side.partition(", ")[2]]


def measure_passes(
    session: Session,
    problem: Problem,
    rows: dict[str, Measurement],
    who: tuple[str, str],
    options: argparse.Namespace,
    limit: float,
    with_backward: bool,
) -> None:
    side: Attention | None = None

    def forward() -> Callable[[], Tensor]:
        nonlocal side
        side = build(*who, problem, session, options.largest_mask)
        rows["forward"].note = side.note
        return side.forward

    def check_forward(raw: Any) -> float:
        assert side is not None
        return worst_error({"out": side.streams(raw)[problem.texts]}, {"out": problem.expected["out"]})

    session.measure(rows["forward"], forward, check_forward, limit)
    if not with_backward or side is None or rows["forward"].timing is None or not side.inputs[0].requires_grad:
        return

    def backward() -> Callable[[], tuple[Tensor, ...]]:
        assert side is not None
        inputs, out, grad = side.inputs, side.forward(), side.from_streams(problem.grad_out)
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def check_backward(grads: Any) -> float:
        assert side is not None
        found = side.packed([grad[problem.texts] for grad in grads])
        return worst_error(found, {name: problem.expected[name] for name in ("q", "keys", "values")})

    session.measure(rows["backward"], backward, check_backward, limit)


@torch.no_grad()
def measure_steps(
    session: Session,
    problem: Problem,
    row: Measurement,
    who: tuple[str, str],
    options: argparse.Namespace,
    limit: float,
) -> None:
    with torch.enable_grad():  # made here, where it is cached, with the gradients that other rows want
        expected = problem.expected["out"]

    def check(outs: Any) -> float:
        return worst_error({"out": torch.cat([out[problem.texts] for out in outs], dim=2)}, {"out": expected})

    graph = session.meter.on_gpu and who[0] not in ("torch", "reference")
    row.note = "one CUDA graph" if graph else ""
    session.measure(row, lambda: build_steps(*who, problem, session, options.largest_mask), check, limit, graph)


def targets(session: Session) -> list[Target]:
    """Of Mistral-7B's heads at B 8, L 256."""
    ours = "triton"
    wanted = []
    times = {
        "forward": {16: bar("forward"), 24: (0.47, 0.36)},
        "backward": {16: bar("backward"), 24: (2.1, 1.5)},
        "steps": {16: bar("16 sampling steps"), 24: (1.7, 1.25)},
    }
    labels = {"forward": "forward", "backward": "backward", "steps": "all sampling steps, one CUDA graph"}
    for work, by_length in times.items():
        for S, (must, stretch) in by_length.items():
            row = session.find(at(S), work, ours)
            wanted.append(Target(f"{labels[work]}, S {S}", must, stretch, False, milliseconds(row)))
    ratios = [
        ("FlexAttention, best blocks", "flex", "forward", *bar("forward against FlexAttention's best")),
        ("FlexAttention, best blocks", "flex", "backward", *bar("backward against FlexAttention's best")),
        ("dense-mask SDPA, best kernel", "sdpa", "forward", 20.0, 30.0),
        ("parts with LSE merge, best kernel", "parts", "forward", 1.3, 1.8),
    ]
    for label, side, work, must, stretch in ratios:
        for S in (16, 24):
            measured = times_faster(session.find(at(S), work, ours), session.find(at(S), work, side))
            wanted.append(Target(f"{work} against {label}, S {S}", must, stretch, True, measured))
    return wanted


def at(S: int) -> dict[str, Any]:
    return {"model": "mistral-7b", "L": 256, "S": S}


def shapes(options: argparse.Namespace, on_gpu: bool) -> Iterator[tuple[Shape, bool]]:
    """Every shape, and whether the variants of a side are compared there: at the first."""
    first = True
    for model in options.models or (["mistral-7b", "small"] if on_gpu else ["tiny"]):
        lengths = options.lengths or ([16] if options.quick else [256, 1024, 4096] if on_gpu else [64, 256])
        streams = options.stream_lengths or ([3] if options.quick else [16, 24] if on_gpu else [16])
        if model == "small" and not options.lengths and not options.stream_lengths:
            lengths, streams = lengths[:1], streams[:1]
        sizes = {**MODELS[model], **({"batch": options.batch} if options.batch else {})}
        for length in sorted(lengths):
            for stream_length in streams:
                yield Shape(model, length, stream_length, **sizes), first
                first = False


def parser() -> KernelBenchmark:
    p = KernelBenchmark(__file__, __doc__, SIDES)
    what = p.add_argument_group("problems")
    what.add_argument("--models", nargs="+", choices=list(MODELS), help="head shapes (default: of the device)")
    what.add_argument("--lengths", type=int, nargs="+", help="text lengths L (default: 256 1024 4096; CPU 64 256)")
    what.add_argument("--stream-lengths", type=int, nargs="+", help="stream lengths S (default: 16 24; CPU 16)")
    what.add_argument("--batch", type=int, help="texts B (default: 8; CPU 2)")
    what.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is done")
    what.add_argument("--largest-mask", type=int, default=LARGEST_MASK, help="bytes above which no dense mask is tried")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    on_gpu, dtype = options.on_gpu, options.dtype
    options.sides = options.sides or (list(SIDES) if on_gpu else ["torch", "reference", "sdpa", "parts"])
    session = benchmark.start(options, OURS)
    chosen = list(shapes(options, on_gpu))
    batches = ", ".join(
        f"{name}: {s.heads}:{s.kv_heads} heads of {s.head_size}, B {s.batch}"
        for name, s in {shape.model: shape for shape, _ in chosen}.items()
    )
    introduction = (
        f"{dtype_name(dtype)}; {batches}. Every text position is an anchor. What the sides and "
        "the columns are is said at the top of `benchmarks/thought_attention.py`."
    )
    with benchmark.kernel_results(session, options, "Thought attention", introduction, targets):
        for shape, sweep in chosen:
            problem = Problem(shape, dtype, session.meter.device)
            measure_shape(session, problem, options, sweep)
            del problem
            session.release()


if __name__ == "__main__":
    main()
