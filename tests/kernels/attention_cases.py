"""Inputs for the tests of thought attention, and what their results are held against."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from quietstar_kernels import thought_attention
from quietstar_kernels.configurations import use_configuration

NAMES = ["q", "k_text", "v_text", "k_thought", "v_thought"]
RESULTS = ["out", "lse", *(f"gradient of {name}" for name in NAMES)]
KERNELS = {
    f"thought_attention.{name}": blocks
    for name, blocks in {
        "forward": ("BLOCK_M", "BLOCK_N", "BLOCK_OWN"),
        "step": ("BLOCK_M", "BLOCK_N", "BLOCK_OWN"),
        "backward_streams": ("BLOCK_M", "BLOCK_N", "BLOCK_OWN"),
        "backward_text": ("BLOCK_M", "BLOCK_N"),
    }.items()
}
LAYOUTS = ["contiguous", "heads first", "buffers"]


@dataclass
class Case:
    """Inputs of one call; `tensors` are q, k_text, v_text, k_thought, v_thought."""

    tensors: list[Tensor]
    anchor: Tensor
    text_start: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def run(
        self, backend: str, tensors: list[Tensor] | None = None, given: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        return thought_attention(
            *(tensors or self.tensors),
            self.anchor,
            text_start=self.text_start,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            backend=backend,
            results=given,
            return_lse=True,
        )

    def to(self, dtype: torch.dtype) -> Case:
        """The same with other tensors, leaves of that dtype."""
        tensors = [x.detach().to(dtype).requires_grad_() for x in self.tensors]
        return Case(tensors, self.anchor, self.text_start, self.window, self.softcap, self.scale)


def random_case(
    seed: int = 0,
    *,
    B: int = 2,
    P: int = 6,
    S: int = 3,
    T: int | None = None,
    Hkv: int = 2,
    G: int = 2,
    D: int = 4,
    L: int = 7,
    dtype: torch.dtype = torch.float64,
    anchor: str = "shared",
    start: str | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    spread: float = 1.0,
    layout: str = "contiguous",
) -> Case:
    """A case on the CPU whose tensors are leaves.

    Args:
        anchor: "shared" (random, so also repeated and not everywhere), "own" (differs from text to text), "one" (all
            streams at one position), "all" (P // L streams at every position).
        start: of the text in sight: None, "text" (one for each text) or "stream" (one for each stream); both also
            behind anchors.
        layout: "contiguous"; "heads first", as projections of [B, H, rows, D] are; "buffers", slices of larger tensors,
            with NaN around them, as those of a preallocated cache or of a fused projection are.
    """
    T = S if T is None else T
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
        return lay_out(values, layout).requires_grad_()

    tensors = [
        normal(B, P, S, Hkv * G, D),
        normal(B, L, Hkv, D),
        normal(B, L, Hkv, D),
        normal(B, P, T, Hkv, D),
        normal(B, P, T, Hkv, D),
    ]
    if anchor == "all":
        positions = torch.arange(L).repeat_interleave(P // L)
    elif anchor == "one":
        positions = torch.randint(0, L, (1,), generator=generator).expand(P)
    else:
        positions = torch.randint(0, L, (B, P) if anchor == "own" else (P,), generator=generator).sort(-1).values
    text_start = None
    if start is not None:
        shape = (B, P) if start == "stream" else (B,)
        text_start = torch.randint(0, L + 2, shape, generator=generator).int()
        text_start = text_start.sort(-1).values if start == "stream" else text_start
    return Case(tensors, positions.int(), text_start, window, softcap, scale)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the same values with other strides; the last dimension stays dense."""
    if layout == "heads first":
        return values.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "buffers":
        buffer = values.new_full([*(size + 2 for size in values.shape[:-1]), values.shape[-1]], float("nan"))
        view = buffer[tuple(slice(1, size + 1) for size in values.shape[:-1])]
        return view.copy_(values)
    return values


def results(case: Case, backend: str) -> list[Tensor]:
    """out, lse and the five gradients under upstream gradients that differ from element to element."""
    out, lse = case.run(backend)
    return [out, lse, *torch.autograd.grad([out, lse], case.tensors, upstream(out, lse))]


def upstream(*tensors: Tensor) -> list[Tensor]:
    """Gradients that differ from element to element."""
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(99)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64, device=device).to(x.dtype) for x in tensors]


def assert_close(actual: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """The tensors are close, element by element; the results of a whole call are named where they are not."""
    names = RESULTS if len(wanted) == len(RESULTS) else [f"tensor {index}" for index in range(len(wanted))]
    for name, got, want in zip(names, actual, wanted, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape, name
        assert torch.isfinite(want).all(), name
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{name}: {(got - want).abs().max():.3g}"


def assert_same_bits(actual: list[Tensor], wanted: list[Tensor]) -> None:
    """The first of the results in the order of `RESULTS` are equal to the last bit."""
    assert len(actual) == len(wanted)
    for name, got, want in zip(RESULTS, actual, wanted, strict=False):
        assert torch.equal(got, want), name


def assert_within_twice_the_error(actual: list[Tensor], plain: list[Tensor], exact: list[Tensor], what: str) -> None:
    """The error against float64, its root mean square and its largest, is at most twice that of plain PyTorch.

    Of float32's largest errors, the chance meeting of many roundings, four times: they differ as much between two runs
    of plain PyTorch with other data. A hundredth of the dtype's epsilon is allowed besides, for results that plain
    PyTorch happens to get exactly.
    """
    statistics = {"root mean square": lambda x: x.square().mean().sqrt(), "largest": lambda x: x.abs().max()}
    for index, (ours, theirs, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        for name, statistic in statistics.items():
            error, budget = statistic(ours.double() - truth), statistic(theirs.double() - truth)
            factor = 4 if name == "largest" and theirs.dtype == torch.float32 else 2
            assert error <= factor * budget + torch.finfo(theirs.dtype).eps * 1e-2 * statistic(truth), (
                f"{what} {index}, {name} error: {error:.3g} against {budget:.3g} of plain PyTorch"
            )


def plain_attention(case: Case) -> Tensor:
    """What one would write with PyTorch in the inputs' own precision: keys side by side and a dense mask."""
    q, k_text, v_text, k_thought, v_thought = case.tensors
    device = q.device
    B, P, S, H, D = q.shape
    L, T, Hkv = k_text.shape[1], k_thought.shape[2], k_text.shape[2]
    keys = torch.cat([k_text, k_thought.reshape(B, P * T, Hkv, D)], 1).repeat_interleave(H // Hkv, 2).transpose(1, 2)
    values = torch.cat([v_text, v_thought.reshape(B, P * T, Hkv, D)], 1).repeat_interleave(H // Hkv, 2).transpose(1, 2)
    queries = q.reshape(B, P * S, H, D).transpose(1, 2)
    stream = torch.arange(P, device=device).repeat_interleave(S).unsqueeze(-1)
    step = torch.arange(S, device=device).repeat(P).unsqueeze(-1)
    key = torch.arange(L + P * T, device=device)
    own = (key >= L) & ((key - L) // T == stream) & ((key - L) % T <= step + T - S)
    anchor = case.anchor.to(device).expand(B, P).repeat_interleave(S, 1)[:, None, :, None]  # [B, 1, P * S, 1]
    text = (key < L) & (key <= anchor)
    if case.window is not None:
        text = text & (anchor - key < case.window)
    if case.text_start is not None:
        start = case.text_start.to(device).view(B, -1).expand(B, P).repeat_interleave(S, 1)
        text = text & (key >= start[:, None, :, None])
    scores = queries @ keys.mT * (D**-0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~(text | own), float("-inf"))
    return (scores.softmax(-1) @ values).transpose(1, 2).reshape(B, P, S, H, D)


@contextmanager
def use_blocks(*, splits: int = 2, **sizes: int) -> Iterator[None]:
    """Within the block, run all kernels with these blocks, of 16 where not named.

    Args:
        splits: most parts of the text's gradients; the interpreter takes as long for an empty part as for a full one.
        sizes: BLOCK_M, BLOCK_N and BLOCK_OWN.
    """
    with ExitStack() as stack:
        for kernel, blocks in KERNELS.items():
            chosen = {block: sizes.get(block, 16) for block in blocks} | {"num_warps": 4, "num_stages": 1}
            stack.enter_context(use_configuration(kernel, chosen))
        # by its name: the package's attribute `thought_attention` is the function
        operators = sys.modules["quietstar_kernels.thought_attention.op"]
        stack.enter_context(mock.patch.object(operators, "MOST_SPLITS", splits))
        yield
