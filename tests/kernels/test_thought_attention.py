"""Thought attention: what every backend promises, and the reference against nested loops.

The Triton kernels' own tests are in test_thought_attention_triton.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar_kernels import thought_attention
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.launch import Launch
from quietstar_kernels.thought_attention.torch_backend import WORKSPACE_SCORES
from tests.kernels.attention_cases import (
    NAMES,
    Case,
    assert_close,
    assert_within_twice_the_error,
    plain_attention,
    random_case,
    results,
    upstream,
    use_blocks,
)
from tests.kernels.largest_tensor import LargestTensor
from tests.marks import slow

CPU_WORKSPACE = WORKSPACE_SCORES["cpu"]
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="CPU tensors")
TRITON = pytest.param("triton", marks=needs_interpreter)
BACKENDS = ["reference", "torch", TRITON]


@pytest.fixture(autouse=True)
def _restore_workspace() -> Any:
    yield
    WORKSPACE_SCORES["cpu"] = CPU_WORKSPACE


@pytest.fixture(autouse=True)
def _few_splits() -> Any:
    with use_blocks(splits=1):
        yield


def nested_loops(case: Case) -> Tensor:
    """One query at a time and in plain Python numbers: an independent reading of the definition."""
    q, k_text, v_text, k_thought, v_thought = (x.detach().tolist() for x in case.tensors)
    B, P, S, H, D = case.tensors[0].shape
    T, group = case.tensors[3].shape[2], H // case.tensors[1].shape[2]
    anchors = case.anchor.expand(B, P).tolist()
    out = torch.zeros(B, P, S, H, D, dtype=torch.float64)
    for b in range(B):
        for p in range(P):
            start = 0 if case.text_start is None else int(case.text_start.view(B, -1).expand(B, P)[b, p])
            position = anchors[b][p]
            oldest = 0 if case.window is None else position - case.window + 1
            for s in range(S):
                for h in range(H):
                    kv = h // group
                    pairs = [(k_text[b][j][kv], v_text[b][j][kv]) for j in range(max(start, oldest, 0), position + 1)]
                    pairs += [(k_thought[b][p][t][kv], v_thought[b][p][t][kv]) for t in range(s + T - S + 1)]
                    query = q[b][p][s][h]
                    scores = [sum(x * y for x, y in zip(query, key, strict=True)) / D**0.5 for key, _ in pairs]
                    if case.softcap is not None:
                        scores = [case.softcap * math.tanh(score / case.softcap) for score in scores]
                    weights = [math.exp(score) for score in scores]
                    for d in range(D):
                        total = sum(weight * value[d] for weight, (_, value) in zip(weights, pairs, strict=True))
                        out[b, p, s, h, d] = total / sum(weights)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchor": "own", "start": "text"},
        {"window": 2, "start": "text", "S": 2, "T": 5},
        {"softcap": 0.5, "window": 3},
        {"P": 9, "start": "stream", "window": 4},
        {"anchor": "all", "P": 14, "S": 1, "T": 4, "G": 3, "Hkv": 1},
    ],
    ids=["plain", "padded", "window", "softcap", "starts of streams", "sampling"],
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
    start=st.sampled_from([None, "text", "stream"]),
    window=st.one_of(st.none(), st.integers(1, 14)),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    scale=st.sampled_from([None, 0.3]),
    workspace=st.sampled_from([1, 60, 300, CPU_WORKSPACE]),
)
@example(0, 2, 5, 2, 0, 2, 2, 4, 1, "shared", None, None, None, None, 1)
@example(1, 3, 8, 3, 0, 1, 3, 5, 11, "own", "text", 1, 5.0, None, 100)
@example(2, 3, 9, 2, 1, 1, 2, 4, 12, "shared", "stream", None, None, None, 300)
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
    start: str | None,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    workspace: int,
) -> None:
    WORKSPACE_SCORES["cpu"] = workspace
    case = random_case(
        seed,
        B=B,
        P=P,
        S=S,
        T=S + earlier,
        Hkv=Hkv,
        G=G,
        D=D,
        L=L,
        anchor=anchor,
        start=start,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    assert_close(results(case, "torch"), results(case, "reference"), 1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])  # the interpreter would take minutes
@pytest.mark.parametrize("anchor", ["shared", "own"])
def test_gradcheck(backend: str, anchor: str) -> None:
    WORKSPACE_SCORES["cpu"] = 100
    start = "stream" if anchor == "own" else None
    case = random_case(5, B=2, P=2, S=2, T=3, Hkv=1, G=2, D=2, L=4, anchor=anchor, start=start, window=3)
    assert torch.autograd.gradcheck(lambda *tensors: case.run(backend, list(tensors)), case.tensors)


@pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("triton", marks=[needs_interpreter, pytest.mark.slow])]
)
def test_perturbing_a_hidden_key_changes_nothing_and_a_visible_one_something(backend: str) -> None:
    WORKSPACE_SCORES["cpu"] = 40  # several tiles, whose borders the keys cross
    L, S, window = 9, 3, 4
    case = random_case(7, B=1, P=2 * L, S=S, Hkv=1, G=1, L=L, anchor="all", window=window)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_of_one_text_are_as_texts_of_their_own(backend: str) -> None:
    """Streams that see their document alone: the results and gradients of each document's part of the tensors."""
    WORKSPACE_SCORES["cpu"] = 200  # tiles within a document and across borders
    borders = [0, 1, 8, 19]
    case = random_case(12, B=1, P=19, S=2, T=3, L=19, anchor="all", window=6, softcap=2.0)
    starts = torch.tensor([max(border for border in borders[:-1] if border <= anchor) for anchor in range(19)])
    case.text_start = starts[None]
    with use_blocks(splits=2):
        packed = results(case, backend)
    gradient = upstream(*case.run("reference"))
    for first, end in pairwise(borders):
        alone = Case([x[:, first:end].detach().requires_grad_() for x in case.tensors], torch.arange(end - first))
        alone.window, alone.softcap = case.window, case.softcap
        outputs = alone.run(backend)
        grads = torch.autograd.grad(outputs, alone.tensors, [x[:, first:end] for x in gradient])
        assert_close([x[:, first:end] for x in packed], [*outputs, *grads], 1e-11)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, of weights that the mask takes out
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_large_scores_do_not_overflow(backend: str, softcap: float | None) -> None:
    case = random_case(4, spread=40.0, dtype=torch.float32, B=1, P=12, L=12, softcap=softcap)
    got = results(case, backend)
    assert all(torch.isfinite(x).all() for x in got)
    torch.testing.assert_close(got[0], results(case, "reference")[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [slow(None), 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16), slow(torch.float32)])
@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_error_is_within_twice_that_of_plain_pytorch(backend: str, dtype: torch.dtype, softcap: float | None) -> None:
    case = random_case(11, B=1, P=24, S=4, G=2, D=16, L=24, anchor="all", dtype=dtype, softcap=softcap)
    exact = case.to(torch.float64)
    with use_blocks(splits=2, BLOCK_M=32):
        out, lse = case.run(backend)
        grad_out = upstream(out)[0]
        got = [out, *torch.autograd.grad(out, case.tensors, grad_out)]
    plain_out = plain_attention(case)
    plain = [plain_out, *torch.autograd.grad(plain_out, case.tensors, grad_out)]
    exact_out = exact.run("reference")[0]
    wanted = [exact_out, *torch.autograd.grad(exact_out, exact.tensors, grad_out.double())]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_twice_the_error(got, plain, wanted, "of out and the gradients, tensor")


@pytest.mark.parametrize("S", [2, 8, 16])
def test_no_tensor_is_larger_than_an_input_or_the_workspace(S: int) -> None:
    """Linear in S at fixed L: the largest tensor is q itself; an [L, L * S] mask would be 4 (S = 2) times as large."""
    L = 32
    WORKSPACE_SCORES["cpu"] = 512
    case = random_case(0, B=1, P=L, S=S, T=S, Hkv=1, G=1, D=16, L=L, anchor="all", dtype=torch.float32)
    one_stream = S * (L + S)
    with LargestTensor() as largest:
        results(case, "torch")
    assert largest.elements <= max(case.tensors[0].numel(), 2 * 512, 2 * one_stream)  # backward: two workspaces
    assert largest.elements < L * L * S


def test_strides_along_the_head_size_give_the_same() -> None:
    case = random_case(6, P=7, S=2, T=3)
    wanted = results(case, "torch")
    scattered = [torch.stack([x, x], dim=-1).detach()[..., 0].requires_grad_() for x in case.tensors]
    assert not any(x.is_contiguous() for x in scattered)
    assert_close(results(Case(scattered, case.anchor), "torch"), wanted, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["heads first", "buffers"])
def test_views_give_the_same(backend: str, layout: str) -> None:
    """Slices of buffers have NaN around them: what is outside of an input is not read."""
    plain, viewed = (random_case(6, P=7, S=2, T=3, layout=x) for x in ("contiguous", layout))
    assert not any(x.is_contiguous() for x in viewed.tensors)
    assert_close(results(viewed, backend), results(plain, backend), 1e-12)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_expanded_upstream_gradient(backend: str) -> None:
    """out.sum() hands the backward pass a gradient with stride 0."""
    case = random_case(8)
    got, wanted = (torch.autograd.grad(case.run(which)[0].sum(), case.tensors) for which in (backend, "reference"))
    assert_close(list(got), list(wanted), 1e-12)


GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding, window": {"start": "text", "window": 3},
    "softcap": {"softcap": 2.0, "G": 1},
    "documents": {"start": "stream", "anchor": "own"},
    "more keys than queries": {"S": 2, "T": 5},
    "one query": {"S": 1, "T": 4, "scale": 0.3},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("options", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_results_have_the_gradients_of_computed_ones(backend: str, options: dict[str, Any]) -> None:
    """They come as sampling makes them, one query of each stream at a time."""
    case = random_case(11, **options)
    q, k_text, v_text, k_thought, v_thought = (x.detach() for x in case.tensors)
    before = k_thought.shape[2] - q.shape[2]
    steps = [
        case.run("reference", [q[:, :, s : s + 1], k_text, v_text, *(x[:, :, :end] for x in (k_thought, v_thought))])
        for s, end in enumerate(range(before + 1, k_thought.shape[2] + 1))
    ]
    out, lse = case.run(backend, given=(torch.cat([x for x, _ in steps], 2), torch.cat([x for _, x in steps], 2)))
    found = [out, lse, *torch.autograd.grad([out, lse], case.tensors, upstream(out, lse))]
    assert_close(found, results(case, "reference"), 1e-5 if options.get("dtype") else 1e-11)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_given_results_are_not_computed_again(backend: str) -> None:
    case = random_case(12, P=3)
    wanted = [torch.randn_like(x) for x in case.run("reference")]
    found = case.run(backend, given=(wanted[0], wanted[1]))
    assert all(map(torch.equal, found, wanted))
    assert all(x.grad_fn is not None and x.data_ptr() == y.data_ptr() for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("index", "name"), [(0, r"results\[0\]"), (1, r"results\[1\]")])
def test_given_results_of_another_shape_are_refused(backend: str, index: int, name: str) -> None:
    case = random_case(12)
    given = list(case.run("reference"))
    given[index] = given[index][:, :, :-1]
    with pytest.raises(ValueError, match=f"{name}: got"):
        case.run(backend, given=(given[0], given[1]))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_checkpointing_change_nothing(backend: str, use_reentrant: bool) -> None:
    case = random_case(9, P=3, dtype=torch.float32)
    plain = case.run(backend)[0]
    wanted = torch.autograd.grad(plain.square().sum(), case.tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = checkpoint(lambda *x: case.run(backend, list(x))[0], *case.tensors, use_reentrant=use_reentrant)
    out.square().sum().backward()  # the reentrant kind does not know torch.autograd.grad
    assert_close([out, *(x.grad for x in case.tensors)], [plain, *wanted], 1e-6)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_backward_under_autocast_keeps_its_precision(backend: str) -> None:
    case = random_case(9, dtype=torch.float32)
    wanted = results(case, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(results(case, backend), wanted, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
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


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "run", lambda launch: pytest.fail("a kernel was launched"))


def bad(case: Case, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: x.detach() for name, x in zip(NAMES, case.tensors, strict=True)}
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
        (
            {"text_start": torch.zeros(2, 5, dtype=torch.int32)},
            ValueError,
            r"text_start: got shape \[2, 5\], wanted \[B=2, P=6\]",
        ),
        ({"text_start": torch.zeros(2, 6, 1, dtype=torch.int32)}, ValueError, r"text_start: .* wanted \[B=2, P=6\]"),
        (
            {"text_start": torch.tensor([[0, 0, 2, 2, 4, 4], [0, 1, 1, 1, 0, 0]])},
            ValueError,
            r"text_start: got a decreasing sequence, wanted positions in non-decreasing order along P",
        ),
        ({"text_start": torch.zeros(2)}, TypeError, r"text_start: got dtype torch.float32"),
        ({"q": torch.zeros(2, 6, 0, 4, 4)}, ValueError, r"q: got S=0 in shape \[2, 6, 0, 4, 4\], wanted at least 1"),
        ({"q": torch.zeros(2, 6, 3, 0, 4)}, ValueError, r"q: got H=0"),
        ({"window": 0}, ValueError, r"window: got 0, wanted at least 1"),
        ({"softcap": 0.0}, ValueError, r"softcap: got 0.0, wanted a number above 0, or None"),
        ({"softcap": -1.0}, ValueError, r"softcap: got -1.0, wanted"),
        ({"softcap": math.nan}, ValueError, r"softcap: got nan, wanted"),
        ({"k_text": torch.zeros(2, 7, 2, 4, device="meta")}, ValueError, r"k_text: got device meta, wanted cpu"),
        ({"v_thought": None}, TypeError, r"v_thought: got NoneType, wanted a floating point tensor"),
        ({"anchor": [0, 1, 2, 3, 4, 5]}, TypeError, r"anchor: got list, wanted an int32 or int64 tensor"),
        (
            {name: torch.zeros(2, 6, 3, 2, 0)[:, 0:6] for name in ("q", "k_thought", "v_thought")}
            | {name: torch.zeros(2, 7, 2, 0) for name in ("k_text", "v_text")},
            ValueError,
            r"q: got D=0",
        ),
    ],
)
@pytest.mark.usefixtures("no_launch")
def test_bad_arguments_are_named(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        thought_attention(**bad(random_case(), **changes), backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {name: torch.zeros(2, 6, 3, 2, 4, dtype=torch.float32)},
            TypeError,
            rf"{name}: got dtype torch.float32, wanted",
        )
        for name in ("k_thought", "v_thought")
    ]
    + [
        ({"v_text": torch.zeros(2, 7, 2, 4).bfloat16()}, TypeError, r"v_text: got dtype torch.bfloat16, wanted .*64"),
        ({"q": torch.zeros(2, 6, 3, 4, 4, dtype=torch.float8_e4m3fn)}, TypeError, r"got torch.float8_e4m3fn"),
    ]
    + [
        ({name: torch.zeros(*shape, 4, 2, dtype=torch.float64).mT}, ValueError, rf"{name}: got stride 2 along the last")
        for name, *shape in [
            ("q", 2, 6, 3),
            ("k_text", 2, 7),
            ("v_text", 2, 7),
            ("k_thought", 2, 6, 3),
            ("v_thought", 2, 6, 3),
        ]
    ],
)
@needs_interpreter
@pytest.mark.usefixtures("no_launch")
def test_what_triton_does_not_take_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        thought_attention(**bad(random_case(G=1), **changes), backend="triton")


@needs_interpreter
@pytest.mark.usefixtures("no_launch")
def test_head_size_that_no_configuration_covers() -> None:
    arguments = bad(random_case(B=1, P=2, S=1, L=3, D=257))
    with pytest.raises(ValueError, match=r"q: got D=257, backend 'triton' wants 1 <= D <= 256; 'torch' takes any"):
        thought_attention(**arguments, backend="triton")
    thought_attention(**arguments, backend="torch")


@pytest.mark.usefixtures("no_launch")
def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = bad(random_case())
    assert torch.equal(thought_attention(**arguments), thought_attention(**arguments, backend="torch"))
    with pytest.raises(ValueError, match=r"backend: got 'cuda', wanted one of 'auto', 'triton', 'torch', 'reference'"):
        thought_attention(**arguments, backend="cuda")
    monkeypatch.setenv("QUIETSTAR_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"QUIETSTAR_BACKEND: got 'cuda', wanted one of 'auto', 'triton', 'torch'"):
        thought_attention(**arguments)
    thought_attention(**arguments, backend="torch")  # what the call names counts before the variable


@needs_interpreter
def test_environment_variable_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launched.append(launch))
    monkeypatch.setenv("QUIETSTAR_BACKEND", "triton")
    thought_attention(**bad(random_case()))
    assert [launch.kernel.__name__ for launch in launched] == ["forward_kernel"]


def test_triton_on_a_cpu_wants_the_interpreter() -> None:
    """In a process of its own: whether kernels are interpreted is settled at their first import."""
    program = """if True:
        import torch
        from quietstar_kernels import thought_attention
        x = torch.zeros(1, 1, 1, 1, 4)
        try:
            thought_attention(x, x[0], x[0], x, x, torch.tensor([0]), backend="triton")
        except ValueError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert ran.stdout.startswith("backend: 'triton' wants") and "TRITON_INTERPRET=1" in ran.stdout
