"""Thought attention: the torch backend against the reference, and the reference against three nested loops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar_kernels import thought_attention
from quietstar_kernels.thought_attention.torch_backend import WORKSPACE_SCORES
from tests.kernels.largest_tensor import LargestTensor

CPU_WORKSPACE = WORKSPACE_SCORES["cpu"]
BACKENDS = ["reference", "torch"]


@pytest.fixture(autouse=True)
def _restore_workspace() -> Any:
    yield
    WORKSPACE_SCORES["cpu"] = CPU_WORKSPACE


@dataclass
class Case:
    """Inputs of one call; `tensors` are q, k_text, v_text, k_thought, v_thought."""

    tensors: list[Tensor]
    anchor: Tensor
    text_start: Tensor | None = None
    window: int | None = None

    def run(self, backend: str, tensors: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return thought_attention(
            *(tensors or self.tensors),
            self.anchor,
            text_start=self.text_start,
            window=self.window,
            backend=backend,
            return_lse=True,
        )


def random_case(
    seed: int = 0,
    *,
    B: int = 2,
    P: int = 6,
    S: int = 3,
    T: int = 3,
    Hkv: int = 2,
    G: int = 2,
    D: int = 4,
    L: int = 7,
    dtype: torch.dtype = torch.float64,
    anchor: str = "shared",
    padded: bool = False,
    window: int | None = None,
    spread: float = 1.0,
) -> Case:
    """anchor: "shared" (random, so also repeated and not everywhere), "own" (differs from text to text), "all"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype).requires_grad_()

    tensors = [
        normal(B, P, S, Hkv * G, D),
        normal(B, L, Hkv, D),
        normal(B, L, Hkv, D),
        normal(B, P, T, Hkv, D),
        normal(B, P, T, Hkv, D),
    ]
    if anchor == "all":
        positions = torch.arange(L).repeat_interleave(P // L)
    else:
        positions = torch.randint(0, L, (B, P) if anchor == "own" else (P,), generator=generator).sort(-1).values
    start = torch.randint(0, L + 2, (B,), generator=generator).int() if padded else None
    return Case(tensors, positions.int(), start, window)


def results(case: Case, backend: str) -> list[Tensor]:
    """out, lse and the five gradients under upstream gradients that differ from element to element."""
    out, lse = case.run(backend)
    generator = torch.Generator().manual_seed(99)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)
    return [out, lse, *torch.autograd.grad([out, lse], case.tensors, [grad_out, grad_lse])]


def assert_close(actual: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for index, (got, want) in enumerate(zip(actual, wanted, strict=True)):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"tensor {index} of out, lse, gradients"


def nested_loops(case: Case) -> Tensor:
    """One query at a time and in plain Python numbers: an independent reading of the definition."""
    q, k_text, v_text, k_thought, v_thought = (x.detach().tolist() for x in case.tensors)
    B, P, S, H, D = case.tensors[0].shape
    T, group = case.tensors[3].shape[2], H // case.tensors[1].shape[2]
    anchors = case.anchor.expand(B, P).tolist()
    out = torch.zeros(B, P, S, H, D, dtype=torch.float64)
    for b in range(B):
        start = 0 if case.text_start is None else int(case.text_start[b])
        for p in range(P):
            position = anchors[b][p]
            oldest = 0 if case.window is None else position - case.window + 1
            for s in range(S):
                for h in range(H):
                    kv = h // group
                    pairs = [(k_text[b][j][kv], v_text[b][j][kv]) for j in range(max(start, oldest, 0), position + 1)]
                    pairs += [(k_thought[b][p][t][kv], v_thought[b][p][t][kv]) for t in range(s + T - S + 1)]
                    query = q[b][p][s][h]
                    weights = [
                        math.exp(sum(x * y for x, y in zip(query, key, strict=True)) / D**0.5) for key, _ in pairs
                    ]
                    for d in range(D):
                        total = sum(weight * value[d] for weight, (_, value) in zip(weights, pairs, strict=True))
                        out[b, p, s, h, d] = total / sum(weights)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "own", "padded": True},
        {"window": 2, "padded": True, "S": 2, "T": 5},
        {"anchor": "all", "P": 14, "S": 1, "T": 4, "G": 3, "Hkv": 1},
    ],
    ids=["plain", "padded", "window", "sampling"],
)
def test_agrees_with_nested_loops(backend: str, options: dict[str, Any]) -> None:
    case = random_case(3, **options)
    torch.testing.assert_close(case.run(backend)[0].detach(), nested_loops(case), rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    B=st.integers(1, 3),
    P=st.integers(1, 9),
    S=st.integers(1, 4),
    earlier=st.integers(0, 3),
    Hkv=st.integers(1, 3),
    G=st.integers(1, 3),
    D=st.sampled_from([1, 2, 5, 8]),
    L=st.integers(1, 13),
    anchor=st.sampled_from(["shared", "own"]),
    padded=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 14)),
    workspace=st.sampled_from([1, 60, 300, CPU_WORKSPACE]),
)
@example(0, 2, 5, 2, 0, 2, 2, 4, 1, "shared", False, None, 1)
@example(1, 3, 8, 3, 0, 1, 3, 5, 11, "own", True, 1, 100)
def test_torch_backend_equals_reference(
    seed: int,
    B: int,
    P: int,
    S: int,
    earlier: int,
    Hkv: int,
    G: int,
    D: int,
    L: int,
    anchor: str,
    padded: bool,
    window: int | None,
    workspace: int,
) -> None:
    WORKSPACE_SCORES["cpu"] = workspace
    case = random_case(
        seed, B=B, P=P, S=S, T=S + earlier, Hkv=Hkv, G=G, D=D, L=L, anchor=anchor, padded=padded, window=window
    )
    assert_close(results(case, "torch"), results(case, "reference"), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("anchor", ["shared", "own"])
def test_gradcheck(backend: str, anchor: str) -> None:
    WORKSPACE_SCORES["cpu"] = 100
    case = random_case(5, B=2, P=3, S=2, T=3, Hkv=1, G=2, D=2, L=4, anchor=anchor, padded=anchor == "own", window=3)
    assert torch.autograd.gradcheck(lambda *tensors: case.run(backend, list(tensors)), case.tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perturbing_a_hidden_key_changes_nothing_and_a_visible_one_something(backend: str) -> None:
    WORKSPACE_SCORES["cpu"] = 150  # several tiles, whose borders the keys cross
    L, S, window = 9, 3, 4
    case = random_case(7, B=1, P=2 * L, S=S, T=S, L=L, anchor="all", window=window)
    case.text_start = torch.tensor([2])
    case.tensors = [x.detach() for x in case.tensors]
    before = case.run(backend)[0]

    def changed(name: int, index: tuple[int, ...]) -> Tensor:
        tensors = [x.clone() for x in case.tensors]
        tensors[name][index] += 3.0
        return (case.run(backend, tensors)[0] != before).flatten(3).any(-1)[0]  # [P, S]

    positions = case.anchor
    for j in range(L):
        sees = (j >= 2) & (positions >= j) & (positions - j < window)
        for name in (1, 2):
            assert torch.equal(changed(name, (0, j)), sees.unsqueeze(-1).expand(-1, S)), f"text key {j}"
    for p in (0, 5, 17):
        for t in range(S):
            wanted = torch.zeros(2 * L, S, dtype=torch.bool)
            wanted[p, t:] = True
            for name in (3, 4):
                # stream 0 hangs in the padding: its first token sees one key, whose weight stays 1
                if (p, t) == (0, 0):
                    wanted[0, 0] = name == 4
                assert torch.equal(changed(name, (0, p, t)), wanted), f"own key {t} of stream {p}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_in_the_padding_attends_to_itself_only(backend: str) -> None:
    case = random_case(2, B=2, P=4, S=2, T=2, L=6)
    case.anchor = torch.tensor([0, 1, 1, 2])
    case.text_start = torch.tensor([3, 9])
    out, _ = case.run(backend)
    own_value = case.tensors[4].repeat_interleave(2, dim=3)  # [B, P, T, H, D]
    torch.testing.assert_close(out[:, :, 0], own_value[:, :, 0])
    assert all(torch.isfinite(x).all() for x in results(case, backend))


def test_large_scores_do_not_overflow() -> None:
    case = random_case(4, spread=40.0, dtype=torch.float32, P=12, L=12)
    got = results(case, "torch")
    assert all(torch.isfinite(x).all() for x in got)
    torch.testing.assert_close(got[0], results(case, "reference")[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_within_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    case = random_case(11, B=2, P=24, S=4, T=4, Hkv=2, G=2, D=16, L=24, anchor="all", dtype=dtype)
    exact = Case([x.detach().double().requires_grad_() for x in case.tensors], case.anchor)
    upstream = torch.randn(case.tensors[0].shape, generator=torch.Generator().manual_seed(99)).to(dtype)
    out, plain_out = case.run("torch")[0], plain_attention(case)
    got = [out, *torch.autograd.grad(out, case.tensors, upstream)]
    plain = [plain_out, *torch.autograd.grad(plain_out, case.tensors, upstream)]
    exact_out = exact.run("reference")[0]
    wanted = [exact_out, *torch.autograd.grad(exact_out, exact.tensors, upstream.double())]
    assert out.dtype == dtype and case.run("torch")[1].dtype == torch.float32
    for ours, theirs, truth in zip(got, plain, wanted, strict=True):
        budget = 2 * (theirs.double() - truth).abs().max() + torch.finfo(dtype).eps * 1e-2 * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= budget


def plain_attention(case: Case) -> Tensor:
    """What one would write with PyTorch in the inputs' own precision: keys side by side and a dense mask."""
    q, k_text, v_text, k_thought, v_thought = case.tensors
    B, P, S, H, D = q.shape
    L, T, Hkv = k_text.shape[1], k_thought.shape[2], k_text.shape[2]
    keys = torch.cat([k_text, k_thought.reshape(B, P * T, Hkv, D)], 1).repeat_interleave(H // Hkv, 2).transpose(1, 2)
    values = torch.cat([v_text, v_thought.reshape(B, P * T, Hkv, D)], 1).repeat_interleave(H // Hkv, 2).transpose(1, 2)
    queries = q.reshape(B, P * S, H, D).transpose(1, 2)
    stream = torch.arange(P).repeat_interleave(S).unsqueeze(-1)
    step = torch.arange(S).repeat(P).unsqueeze(-1)
    key = torch.arange(L + P * T)
    own = (key >= L) & ((key - L) // T == stream) & ((key - L) % T <= step + T - S)
    mask = ((key < L) & (key <= case.anchor[stream.squeeze(-1)].unsqueeze(-1))) | own
    scores = (queries @ keys.mT * D**-0.5).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(1, 2).reshape(B, P, S, H, D)


@pytest.mark.parametrize("S", [2, 8, 16])
def test_no_tensor_is_larger_than_an_input_or_the_workspace(S: int) -> None:
    """Linear in S at fixed L: the largest tensor is q itself; an [L, L * S] mask would be 4 (S = 2) times as large."""
    L = 64
    WORKSPACE_SCORES["cpu"] = 4096
    case = random_case(0, B=1, P=L, S=S, T=S, Hkv=1, G=1, D=16, L=L, anchor="all", dtype=torch.float32)
    one_stream = S * (L + S)
    with LargestTensor() as largest:
        results(case, "torch")
    assert largest.elements <= max(case.tensors[0].numel(), 2 * 4096, 2 * one_stream)  # backward: two workspaces
    assert largest.elements < L * L * S


def test_non_contiguous_inputs_give_the_same() -> None:
    case = random_case(6, P=7, S=2, T=3)
    wanted = results(case, "torch")
    scattered = [torch.stack([x, x], dim=-1).detach()[..., 0].requires_grad_() for x in case.tensors]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in scattered]
    assert not any(x.is_contiguous() for x in scattered)
    assert_close(results(Case(scattered, case.anchor), "torch"), wanted, 1e-12)
    torch.testing.assert_close(Case(swapped, case.anchor).run("torch")[0], wanted[0])


def test_expanded_upstream_gradient() -> None:
    """out.sum() hands the backward pass a gradient with stride 0."""
    case = random_case(8)
    grads = [torch.autograd.grad(case.run(backend)[0].sum(), case.tensors) for backend in BACKENDS]
    assert_close(list(grads[1]), list(grads[0]), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_checkpointing_change_nothing(backend: str) -> None:
    case = random_case(9, dtype=torch.float32)
    plain = case.run(backend)[0]
    wanted = torch.autograd.grad(plain.square().sum(), case.tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(lambda *x: case.run(backend, list(x))[0], *case.tensors, use_reentrant=False)
    grads = torch.autograd.grad(out.square().sum(), case.tensors)
    assert_close([out, *grads], [plain, *wanted], 1e-6)


def test_backward_under_autocast_keeps_its_precision() -> None:
    case = random_case(9, dtype=torch.float32)
    wanted = results(case, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(results(case, "torch"), wanted, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_follow_q(backend: str) -> None:
    case = random_case(10, dtype=torch.float32)
    case.tensors = [x.detach().to(torch.bfloat16 if i == 0 else torch.float32) for i, x in enumerate(case.tensors)]
    case.tensors = [x.requires_grad_() for x in case.tensors]
    out, lse, *grads = results(case, backend)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [x.dtype for x in case.tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["P", "B"])
def test_nothing_in_nothing_out(backend: str, empty: str) -> None:
    case = random_case(0, **{empty: 0})
    out, lse, *grads = results(case, backend)
    assert out.shape == case.tensors[0].shape and lse.shape == out.shape[:-1]
    assert all(not grad.any() for grad in grads)


def bad(case: Case, **changes: Any) -> dict[str, Any]:
    names = ["q", "k_text", "v_text", "k_thought", "v_thought"]
    arguments: dict[str, Any] = {name: x.detach() for name, x in zip(names, case.tensors, strict=True)}
    return {**arguments, "anchor": case.anchor, **changes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 6, 3, 16)}, ValueError, r"q: got shape \[2, 6, 3, 16\], wanted \[B, P, S, H, D\]"),
        ({"q": torch.zeros(2, 6, 3, 4, 4, dtype=torch.int64)}, TypeError, r"q: got dtype torch.int64"),
        (
            {"k_text": torch.zeros(3, 7, 2, 4)},
            ValueError,
            r"k_text: got shape \[3, 7, 2, 4\], wanted \[B=2, L, Hkv, D=4\]",
        ),
        ({"v_text": torch.zeros(2, 8, 2, 4)}, ValueError, r"v_text: .* wanted \[B=2, L=7, Hkv=2, D=4\]"),
        ({"k_thought": torch.zeros(2, 5, 3, 2, 4)}, ValueError, r"k_thought: .* wanted \[B=2, P=6, T, Hkv=2, D=4\]"),
        ({"v_thought": torch.zeros(2, 6, 4, 2, 4)}, ValueError, r"v_thought: .* wanted \[B=2, P=6, T=3, Hkv=2, D=4\]"),
        ({"q": torch.zeros(2, 6, 3, 3, 4)}, ValueError, r"k_text: got 2 key heads, wanted a divisor of q's 3"),
        (
            {"q": torch.zeros(2, 6, 4, 4, 4)},
            ValueError,
            r"k_thought: got T=3 keys in a stream, wanted at least q's S=4",
        ),
        ({"anchor": torch.tensor([0, 1, 2, 3, 4, 7])}, ValueError, r"anchor: got 7, wanted .* 0 <= anchor < L=7"),
        ({"anchor": torch.tensor([-1, 1, 2, 3, 4, 5])}, ValueError, r"anchor: got -1, wanted"),
        ({"anchor": torch.tensor([0, 2, 1, 3, 4, 5])}, ValueError, r"anchor: got a decreasing sequence"),
        ({"anchor": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 3]])}, ValueError, r"anchor: got a decreasing"),
        ({"anchor": torch.zeros(5, dtype=torch.int32)}, ValueError, r"anchor: got shape \[5\], wanted \[P=6\]"),
        ({"anchor": torch.zeros(3, 6, dtype=torch.int32)}, ValueError, r"anchor: .* wanted \[B=2, P=6\]"),
        ({"anchor": torch.zeros(6)}, TypeError, r"anchor: got dtype torch.float32, wanted int32 or int64"),
        ({"text_start": torch.zeros(3, dtype=torch.int32)}, ValueError, r"text_start: got shape \[3\], wanted \[B=2\]"),
        ({"text_start": torch.zeros(2)}, TypeError, r"text_start: got dtype torch.float32"),
        ({"window": 0}, ValueError, r"window: got 0, wanted at least 1"),
    ],
)
def test_bad_arguments_are_named(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        thought_attention(**bad(random_case(), **changes), backend=backend)


def test_backend_names() -> None:
    arguments = bad(random_case())
    assert torch.equal(thought_attention(**arguments), thought_attention(**arguments, backend="torch"))
    with pytest.raises(ValueError, match=r"backend: got 'cuda', wanted one of 'auto', 'triton', 'torch', 'reference'"):
        thought_attention(**arguments, backend="cuda")
    with pytest.raises(ValueError, match=r"backend: 'triton' is not built into this version; use 'auto' or 'torch'"):
        thought_attention(**arguments, backend="triton")
