"""Thought attention's Triton kernels on a CUDA device, at the sizes that they are made for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar_kernels import thought_attention
from tests.kernels.attention_cases import (
    NAMES,
    Case,
    assert_same_bits,
    assert_within_twice_the_error,
    plain_attention,
    results,
    upstream,
)

pytestmark = pytest.mark.gpu


def cuda_case(
    *,
    B: int = 1,
    P: int | None = None,
    S: int = 16,
    H: int = 32,
    Hkv: int = 8,
    D: int = 128,
    L: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    padded: bool = False,
    documents: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Case:
    """P anchors spread evenly over the text, one at every position by default.

    With `documents` a text is made of documents of so many tokens, 7 fewer in each text than in the one before.
    """
    P = L if P is None else P
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(B, P, S, H, D), (B, L, Hkv, D), (B, L, Hkv, D), (B, P, S, Hkv, D), (B, P, S, Hkv, D)]
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    anchor = (torch.arange(P) * L // P).int()
    start = torch.arange(B, device="cuda").int() * 7 + 3 if padded else None
    if documents is not None:
        lengths = documents - 7 * torch.arange(B).int()[:, None]
        start = (anchor // lengths * lengths).cuda()  # [B, P]
    return Case(tensors, anchor, start, window, softcap)


def slice_streams(case: Case, streams: slice) -> Case:
    """The same streams' rows alone, as new leaves."""
    q, k_text, v_text, k_thought, v_thought = (x.detach() for x in case.tensors)
    tensors = [q[:, streams], k_text, v_text, k_thought[:, streams], v_thought[:, streams]]
    leaves = [x.clone().requires_grad_() for x in tensors]
    start = case.text_start
    if start is not None and start.dim() == 2:
        start = start[:, streams]
    return Case(leaves, case.anchor[streams], start, case.window, case.softcap)


def in_slices(
    case: Case, run: Callable[[Case], Tensor], grad_out: Tensor, streams: int, dtype: torch.dtype
) -> list[Tensor]:
    """out and the five gradients of `run` in `dtype`, which could not hold the scores of all streams at a time."""
    sums = [torch.zeros_like(x, dtype=torch.float64) for x in (case.tensors[0], *case.tensors)]
    for begin in range(0, case.tensors[0].shape[1], streams):
        chosen = slice(begin, begin + streams)
        part = slice_streams(case, chosen).to(dtype)
        out = run(part)
        grads = torch.autograd.grad(out, part.tensors, grad_out[:, chosen].to(dtype))
        for index, (total, result) in enumerate(zip(sums, [out.detach(), *grads], strict=True)):
            (total if index in (2, 3) else total[:, chosen]).add_(result)
    return sums


def assert_accurate(case: Case, streams: int) -> None:
    """out and gradients against float64, with plain PyTorch's error in the same precision as the measure."""
    out = case.run("triton")[0]
    (grad_out,) = upstream(out)
    got = [out, *torch.autograd.grad(out, case.tensors, grad_out)]
    plain = [x.to(out.dtype) for x in in_slices(case, plain_attention, grad_out, streams, out.dtype)]
    exact = in_slices(case, reference, grad_out, streams, torch.float64)
    assert_within_twice_the_error(got, plain, exact, "of out and the gradients, tensor")


def reference(case: Case) -> Tensor:
    return case.run("reference")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"L": 256, "S": 16, "B": 2},
        {"L": 256, "S": 24, "padded": True, "B": 2},
        {"L": 1024, "S": 16},
        {"L": 5000, "P": 96, "S": 16, "window": 4096, "padded": True, "B": 2},
        {"L": 256, "S": 24, "P": 130, "softcap": 50.0, "window": 60},
        {"L": 1024, "S": 16, "documents": 150, "B": 2},
        {"L": 256, "S": 24, "documents": 60, "window": 40, "B": 2},
    ],
    ids=lambda options: " ".join(f"{name} {value}" for name, value in options.items()),
)
def test_accurate_at_real_sizes(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_accurate(cuda_case(**options, dtype=dtype), streams=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [32, 40, 64, 80, 96, 128, 256])
def test_accurate_at_every_head_size(D: int, dtype: torch.dtype) -> None:
    assert_accurate(cuda_case(B=2, H=6, Hkv=2, D=D, L=150, S=7, window=100, dtype=dtype), streams=50)


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_accurate_in_every_group(group: int) -> None:
    assert_accurate(cuda_case(B=2, H=2 * group, Hkv=2, D=64, L=150, S=5), streams=50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{"S": 16, "B": 4}, {"S": 24, "L": 1024}, {"S": 3, "P": 700, "window": 100}])
def test_no_bit_differs_between_calls(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A race, or a sum in another order, would show."""
    case = cuda_case(**options, dtype=dtype)
    first = results(case, "triton")
    for _ in range(4):
        assert_same_bits(results(case, "triton"), first)


def test_sampling_steps_in_a_cuda_graph() -> None:
    """All steps of a thought over a preallocated cache, captured once and replayed with other values."""
    S = 6
    case = cuda_case(B=2, S=S, L=128, padded=True)
    q, k_text, v_text, new_keys, new_values = (x.detach() for x in case.tensors)
    keys, values = torch.zeros_like(new_keys), torch.zeros_like(new_values)
    anchor = case.anchor.cuda()

    def think() -> list[Tensor]:
        outputs = []
        for step in range(S):
            keys[:, :, step], values[:, :, step] = new_keys[:, :, step], new_values[:, :, step]
            seen = slice(0, step + 1)
            outputs.append(
                thought_attention(
                    q[:, :, step : step + 1],
                    k_text,
                    v_text,
                    keys[:, :, seen],
                    values[:, :, seen],
                    anchor,
                    text_start=case.text_start,
                )
            )
        return outputs

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        think()  # compiles, and copies the anchors
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = think()
    for x in (q, k_text, v_text, new_keys, new_values):
        x.normal_()
    anchor.clamp_(max=60)  # the graph reads the tensor, not a copy of it
    case.anchor = anchor.cpu()
    graph.replay()
    replayed = torch.cat(captured, 2)
    assert torch.equal(replayed, torch.cat(think(), 2))
    whole = case.run("torch")[0]
    torch.testing.assert_close(replayed, whole, rtol=2e-2, atol=2e-2)


def test_a_warm_step_never_waits_for_the_device() -> None:
    case = cuda_case(B=2, S=4, L=64, padded=True)
    grads = upstream(*case.run("triton"))
    results(case, "triton")  # compiles, and copies the anchors
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case.run("triton"), case.tensors, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_the_results() -> None:
    """Forward: out and lse. Backward: the gradients, delta and float32 parts of the text's gradients."""
    case = cuda_case(B=4, S=16, L=512)
    grads = upstream(*case.run("triton"))
    torch.autograd.grad(case.run("triton"), case.tensors, grads)

    def peak(run: Callable[[], Any]) -> tuple[Any, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return result, torch.cuda.max_memory_allocated() - before

    def size(*tensors: Tensor) -> int:
        return sum(x.nbytes for x in tensors)

    slack = 2**20  # the allocator rounds up
    (out, lse), used = peak(lambda: case.run("triton"))
    assert used <= size(out, lse) + slack
    _, used = peak(lambda: torch.autograd.grad([out, lse], case.tensors, grads))
    text = size(*case.tensors[1:3])
    # 16 parts at most, of twice the bytes; then their sums, and these once more in the inputs' dtype and order
    assert used <= size(*case.tensors) + size(lse) + 16 * 2 * text + 4 * text + slack


def test_more_elements_than_32_bits_count() -> None:
    """Queries of 2^31 elements within a text and 2^32 in all: what is computed of the last streams is right.

    Only those have an upstream gradient, so that the text's gradients are theirs alone.
    """
    case = cuda_case(B=2, P=36_000, S=16, L=64)
    assert case.tensors[0][0].numel() > 2**31
    last = slice(36_000 - 3, 36_000)
    out, _ = case.run("triton")
    grad_out = torch.zeros_like(out)
    grad_out[:, last].normal_()
    grads = torch.autograd.grad(out, case.tensors, grad_out)
    part = slice_streams(case, last).to(torch.float64)
    exact = reference(part)
    wanted = torch.autograd.grad(exact, part.tensors, grad_out[:, last].double())
    got = [out[:, last], grads[0][:, last], grads[1], grads[2], grads[3][:, last], grads[4][:, last]]
    for name, ours, truth in zip(["out", *NAMES], got, [exact, *wanted], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: name + text)
    assert not any(grads[index][:, : last.start].any() for index in (0, 3, 4))


def test_a_text_of_more_elements_than_32_bits_count() -> None:
    L, window = 2_200_000, 200
    case = cuda_case(P=5, S=3, L=L, window=window)
    assert case.tensors[1].numel() > 2**31
    case.anchor = torch.tensor([3, L - 150, L - 9, L - 1, L - 1], dtype=torch.int32)
    out, _ = case.run("triton")
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.tensors, grad_out)
    # without the first stream, and with the end of the text only
    last, shift = slice(1, 5), L - 400
    part = slice_streams(case, last)
    part.tensors[1:3] = [x.detach()[:, shift:].clone().requires_grad_() for x in case.tensors[1:3]]
    part.anchor = part.anchor - shift
    part = part.to(torch.float64)
    exact = reference(part)
    wanted = torch.autograd.grad(exact, part.tensors, grad_out[:, last].double())
    got = [out[:, last], grads[0][:, last], grads[1][:, shift:], grads[2][:, shift:]]
    for ours, truth in zip(got, [exact, *wanted[:3]], strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-2, atol=2e-2)
    assert not any(grads[index][:, 4:shift].any() for index in (1, 2))


def test_inductor_compiles_it_into_one_graph() -> None:
    case = cuda_case(B=2, S=4, L=64, padded=True)

    @torch.compile(fullgraph=True)
    def compiled(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        doubled = [x * 2 for x in tensors]
        return thought_attention(*doubled, anchor, text_start=case.text_start, return_lse=True)

    anchor = case.anchor.cuda()
    outputs = compiled(*case.tensors)
    grads = torch.autograd.grad(outputs, case.tensors, upstream(*outputs))
    doubled = Case([(x.detach() * 2).requires_grad_() for x in case.tensors], case.anchor, case.text_start)
    eager = results(doubled, "triton")
    assert_same_bits([*outputs, *grads], [*eager[:2], *(2 * x for x in eager[2:])])


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = """if True:
        import torch
        from tests.kernels.test_thought_attention_on_gpu import cuda_case
        from tests.kernels.attention_cases import results
        for options in ({"S": 3, "H": 6, "D": 80, "window": 9, "padded": True}, {"S": 1}, {"dtype": torch.float32}):
            results(cuda_case(**{"B": 2, "H": 4, "Hkv": 2, "S": 5, "D": 64, "L": 37} | options), "triton")
        torch.cuda.synchronize()
    """
    repository = Path(__file__).parents[2]
    # one allocation for each tensor, so that memcheck sees the end of every one
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository / "kernels"), str(repository)])
    ran = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
