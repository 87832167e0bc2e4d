"""Thought attention's Triton kernels, interpreted: every shape, every byte they write, and torch around them.

What all backends promise alike is in test_thought_attention, what only a GPU can show in test_thought_attention_on_gpu.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from quietstar_kernels import thought_attention
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.thought_attention.op import (
    backward_streams_launch,
    backward_text_launch,
    forward_launch,
    padded_head_size,
    score_factors,
    streams_in_tile,
    thought_attention_backward_op,
    thought_attention_op,
)
from tests.kernels.attention_cases import (
    LAYOUTS,
    RESULTS,
    Case,
    assert_close,
    assert_same_bits,
    lay_out,
    random_case,
    results,
    upstream,
    use_blocks,
)

pytestmark = pytest.mark.skipif(not interpreting(), reason="CPU tensors want the interpreter")

SENTINEL = -12345.0
GUARD = 64


@pytest.fixture(autouse=True)
def _few_splits() -> Any:
    with use_blocks(splits=2):
        yield


BLOCK = st.sampled_from([16, 32])


problems = given(
    seed=st.integers(0, 2**16),
    B=st.integers(1, 2),
    P=st.integers(0, 7),
    S=st.integers(1, 5),
    earlier=st.sampled_from([0, 0, 1, 4]),
    heads=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4), (1, 7)]),
    D=st.one_of(st.integers(1, 40), st.just(80)),
    L=st.integers(1, 36),
    anchor=st.sampled_from(["shared", "own", "one"]),
    start=st.sampled_from([None, "text", "stream"]),
    window=st.one_of(st.none(), st.integers(1, 41)),
    softcap=st.sampled_from([None, 0.7, 20.0]),
    scale=st.sampled_from([None, 0.3]),
    layout=st.sampled_from(LAYOUTS),
    blocks=st.fixed_dictionaries({"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_OWN": BLOCK}),
    splits=st.sampled_from([1, 2, 3]),
)


@settings(max_examples=2)  # the interpreter is slow
@problems
# a stream of 42 rows, more than a block
@example(0, 1, 3, 6, 1, (1, 7), 5, 9, "own", "stream", 4, None, None, "buffers", {}, 2)
# the same number of anchors as keys, every border of a tile at a border of a window
@example(1, 1, 8, 4, 0, (1, 4), 33, 40, "shared", "text", 16, None, None, "heads first", {"BLOCK_M": 32}, 3)
# a sampling step, its streams' 20 keys more than a block
@example(2, 2, 8, 1, 19, (2, 3), 8, 17, "own", "stream", 5, 2.0, None, "buffers", {}, 1)
@example(3, 2, 7, 1, 0, (1, 1), 80, 33, "shared", None, None, None, None, "contiguous", {"BLOCK_N": 32}, 1)
# windows that mean no window
@example(4, 1, 4, 2, 0, (1, 2), 4, 20, "shared", None, 2**31 - 1, None, None, "contiguous", {}, 2)
@example(5, 1, 2, 2, 0, (1, 1), 4, 5, "shared", None, 2**40, None, None, "contiguous", {}, 1)
# scales that turn the order of the scores around, or make them all the same
@example(6, 1, 3, 2, 1, (1, 2), 4, 20, "own", "stream", 5, None, -0.4, "contiguous", {}, 1)
@example(7, 1, 3, 2, 1, (1, 2), 4, 20, "own", "text", 5, None, 0.0, "contiguous", {}, 1)
@example(8, 1, 3, 2, 1, (1, 2), 4, 20, "own", None, None, 2.0, -0.4, "contiguous", {}, 1)
# a tile of rows that is one block of several streams, or of one that fills it
@example(9, 1, 5, 2, 2, (2, 3), 6, 9, "own", "stream", 4, None, None, "buffers", {}, 1)
@example(10, 1, 3, 4, 3, (1, 4), 6, 9, "own", None, None, 0.7, None, "heads first", {"BLOCK_OWN": 32}, 1)
def test_equals_reference(
    seed: int,
    B: int,
    P: int,
    S: int,
    earlier: int,
    heads: tuple[int, int],
    D: int,
    L: int,
    anchor: str,
    start: str | None,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    layout: str,
    blocks: dict[str, int],
    splits: int,
) -> None:
    Hkv, G = heads
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
        layout=layout,
    )
    with use_blocks(splits=splits, **blocks):
        assert_close(results(case, "triton"), results(case, "reference"), 1e-11)


@pytest.mark.slow
@settings(max_examples=12)
@problems
def test_equals_reference_at_more_problems(**problem: Any) -> None:
    test_equals_reference.hypothesis.inner_test(**problem)


def test_many_thoughts_at_every_position() -> None:
    """A text's keys are read once for all thoughts at a position; the splits of its gradients have several blocks."""
    case = random_case(0, B=1, P=36, S=2, Hkv=1, G=2, D=4, L=18, anchor="all", window=17)
    with use_blocks(splits=3):
        assert_close(results(case, "triton"), results(case, "reference"), 1e-11)


def test_padding_ends_within_a_block_that_later_streams_see_to_its_end() -> None:
    """For those rows no key of the block is in the future, and only the padding asks for a mask.

    From 18 on, keys come in blocks of 18 .. 33, and a tile begins with anchor 32: it needs a mask for a single key.
    """
    case = random_case(0, B=2, P=36, S=2, Hkv=1, G=1, D=4, L=36, anchor="all")
    case.text_start = torch.tensor([5, 18])
    with use_blocks(splits=3):
        assert_close(results(case, "triton"), results(case, "reference"), 1e-11)


def test_a_document_begins_behind_keys_that_an_earlier_stream_of_the_tile_sees_to_their_end() -> None:
    """The first stream of a tile, at 32, sees all keys of blocks that the others, from 33 on, see nothing of."""
    case = random_case(0, B=1, P=36, S=2, Hkv=1, G=1, D=4, L=36, anchor="all")
    case.text_start = torch.tensor([[0] * 33 + [33] * 3])
    assert_close(results(case, "triton"), results(case, "reference"), 1e-11)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_streams_in_tile(block: int) -> None:
    for P in (1, 2, 5, 1000):
        for rows_of_stream in range(1, 200):
            streams = streams_in_tile(P, rows_of_stream, block)
            assert 1 <= streams <= max(P, 1)
            rows = streams * rows_of_stream
            assert rows <= max(8 * rows_of_stream, block), "a tile's streams are read again for every block of keys"


@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("scale", [0.125, 1.0, 3.0, 0.0, -0.5])
def test_score_factors(scale: float, softcap: float | None) -> None:
    """Scores in base 2, with a factor above 0 outside: a product with it must neither reorder scores nor lose -inf."""
    inner, outer = score_factors(scale, softcap)
    raw = torch.linspace(-9, 9, 19, dtype=torch.float64)
    wanted = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
    got = raw * inner if softcap is None else torch.tanh(raw * inner)
    torch.testing.assert_close(got * outer, wanted / math.log(2), rtol=1e-14, atol=0)
    assert outer > 0


def test_padded_head_size() -> None:
    assert [padded_head_size(D) for D in (1, 32, 33, 64, 80, 96, 128, 256)] == [32, 32, 64, 64, 128, 128, 128, 256]


@pytest.mark.parametrize(
    "options",
    [
        {"P": 7, "S": 3, "T": 5, "G": 3, "D": 5, "L": 19, "anchor": "own", "start": "stream", "window": 9},
        {"P": 18, "S": 1, "T": 3, "G": 2, "D": 33, "L": 17, "softcap": 3.0},
        {"P": 1, "S": 9, "G": 4, "D": 8, "L": 1, "Hkv": 1},
    ],
    ids=["training", "sampling", "one stream"],
)
def test_every_byte_of_the_outputs_and_none_beside_them_is_written(options: dict[str, Any]) -> None:
    """The outputs hold NaN before, and lie between guards; so do the inputs, whose guards are NaN or no position."""
    case = random_case(5, B=2, **{"Hkv": 2, **options}, layout="buffers")
    inputs = [x.detach() for x in case.tensors]
    q, k_text, _, k_thought, v_thought = inputs
    anchor = between_guards(case.anchor, 10**6)
    start = None if case.text_start is None else between_guards(case.text_start, 10**6)
    settings = (case.window, q.shape[-1] ** -0.5, case.softcap)
    configuration = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_OWN": 16, "num_warps": 4, "num_stages": 1}
    exact = results(case, "reference")

    checks: list[Callable[[], None]] = []

    def output(*shape: int) -> Tensor:
        view = between_guards(q.new_full(shape, math.nan), SENTINEL)
        buffer = view._base
        assert buffer is not None

        def check() -> None:
            assert not view.isnan().any(), "not written"
            assert (buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all(), "written beside"

        checks.append(check)
        return view

    out, lse = output(*q.shape), output(*q.shape[:-1])
    forward_launch(*inputs, anchor, start, out, lse, *settings, configuration).run()
    grad_out, grad_lse = (between_guards(x, math.nan) for x in upstream(out, lse))
    delta = output(*lse.shape)
    grads_of_streams = [output(*x.shape) for x in (q, k_thought, v_thought)]
    backward_streams_launch(
        *inputs, anchor, start, out, lse, grad_out, grad_lse, delta, *grads_of_streams, *settings, configuration
    ).run()
    B, L, Hkv, D = k_text.shape
    parts = [output(3, B, Hkv, L, D) for _ in range(2)]
    backward_text_launch(*inputs[:3], anchor, start, lse, delta, grad_out, *parts, *settings, configuration).run()
    for check in checks:
        check()
    grad_k_text, grad_v_text = (x.sum(0).transpose(1, 2) for x in parts)
    grad_q, grad_k_thought, grad_v_thought = grads_of_streams
    assert_close([out, lse, grad_q, grad_k_text, grad_v_text, grad_k_thought, grad_v_thought], exact, 1e-11)


def between_guards(values: Tensor, guard: float) -> Tensor:
    """A contiguous view of the same values in a buffer that holds `guard` before and after them."""
    buffer = torch.full((values.numel() + 2 * GUARD,), guard, dtype=values.dtype)
    return buffer[GUARD : GUARD + values.numel()].view(values.shape).copy_(values)


def test_sampling_steps_read_a_growing_slice_of_a_cache() -> None:
    """S steps of one token each over a preallocated cache are the training pass; what is not yet written is NaN."""
    S, Hkv, G, D = 5, 2, 2, 8
    case = random_case(8, B=2, P=5, S=S, Hkv=Hkv, G=G, D=D, L=18, start="stream", window=7)
    q, k_text, v_text, k_thought, v_thought = (x.detach() for x in case.tensors)
    keys, values = (torch.full((2, 5, S + 3, Hkv, D), math.nan, dtype=q.dtype) for _ in range(2))
    wanted = case.run("reference")[0].detach()
    for step in range(S):
        keys[:, :, step], values[:, :, step] = k_thought[:, :, step], v_thought[:, :, step]
        tensors = [q[:, :, step : step + 1], k_text, v_text, keys[:, :, : step + 1], values[:, :, : step + 1]]
        out = case.run("triton", tensors)[0]
        torch.testing.assert_close(out, wanted[:, :, step : step + 1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = random_case(3, P=9, S=2, G=1, D=8, L=20, dtype=dtype, window=13)
    assert_same_bits(results(case, "triton"), results(case, "triton"))


def test_batch_size_changes_no_bit_of_a_text() -> None:
    """A text's results depend on the text alone, but for the number of parts in which its gradients are summed."""
    case = random_case(3, B=2, P=5, S=2, G=1, D=8, L=20, dtype=torch.float32)
    out, lse = case.run("triton")
    alone_out, alone_lse = case.run("triton", [x[1:] for x in case.tensors])
    assert torch.equal(alone_out, out[1:]) and torch.equal(alone_lse, lse[1:])


@pytest.mark.parametrize("wanting", [[0], [1], [4], [0, 2]])
def test_only_some_inputs_want_a_gradient(wanting: list[int]) -> None:
    case = random_case(6, B=1, P=4, S=2, Hkv=1)
    expected = results(case, "reference")
    for index, tensor in enumerate(case.tensors):
        tensor.requires_grad_(index in wanting)
    out, lse = case.run("triton")
    grads = torch.autograd.grad([out, lse], [case.tensors[index] for index in wanting], upstream(out, lse))
    assert_close(list(grads), [expected[2 + index] for index in wanting], 1e-11)


def test_gradient_of_one_result_alone() -> None:
    case = random_case(6, B=1, P=4, S=2, Hkv=1)
    for which in (0, 1):
        got, wanted = (
            torch.autograd.grad(case.run(backend)[which].square().sum(), case.tensors, materialize_grads=True)
            for backend in ("triton", "reference")
        )
        assert_close(list(got), list(wanted), 1e-11)


@pytest.mark.parametrize("step", [False, True])
def test_operators_are_what_they_declare(step: bool) -> None:
    options = {"S": 1, "T": 3} if step else {"S": 2, "start": "stream", "window": 4, "softcap": 5.0}
    case = random_case(1, B=1, P=3, Hkv=1, G=2, D=4, L=5, dtype=torch.float32, **options)
    positions = (case.anchor, case.text_start)
    settings = (case.window, 0.5, case.softcap)
    torch.library.opcheck(thought_attention_op, (*case.tensors, *positions, *settings))
    inputs = [x.detach() for x in case.tensors]
    out, lse = thought_attention_op(*inputs, *positions, *settings)
    gradients = upstream(out, lse)
    torch.library.opcheck(thought_attention_backward_op, (*inputs, *positions, out, lse, *gradients, *settings))


def test_compiles_into_one_graph_whatever_the_sizes() -> None:
    """Sizes become symbols: texts, streams and batches of other lengths compile nothing new."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(*tensors: Tensor, anchor: Tensor, text_start: Tensor | None) -> tuple[Tensor, Tensor]:
        doubled = [x * 2 for x in tensors]
        return thought_attention(*doubled, anchor, text_start=text_start, window=6, backend="triton", return_lse=True)

    for seed, (P, S, L) in enumerate([(3, 2, 7), (5, 3, 9), (4, 4, 12)]):
        case = random_case(seed, B=2, P=P, S=S, Hkv=1, L=L, start="text", window=6)
        outputs = compiled(*case.tensors, anchor=case.anchor, text_start=case.text_start)
        got = [*outputs, *torch.autograd.grad(outputs, case.tensors, upstream(*outputs))]
        doubled = [x.detach() * 2 for x in case.tensors]
        eager = results(Case([x.requires_grad_() for x in doubled], case.anchor, case.text_start, 6), "triton")
        assert_close(got, [*eager[:2], *(2 * x for x in eager[2:])], 1e-12)
    assert counter.frame_count <= 2, "one graph of the first sizes, one of any sizes"

    # there anchors are not checked: those outside the text count as its first and its last position
    inside, outside = ([0, 3, 11, 11], [-5, 3, 12, 300])
    wanted, got = (
        compiled(*case.tensors, anchor=torch.tensor(anchor).int(), text_start=case.text_start)
        for anchor in (inside, outside)
    )
    assert_same_bits([*got], [*wanted])


def test_under_autocast_float32_stays_float32() -> None:
    case = random_case(9, B=1, P=4, S=2, dtype=torch.float32)
    wanted = results(case, "triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(case, "triton")
    assert_same_bits(got, wanted)


def test_names_of_results_match() -> None:
    assert len(results(random_case(B=1, P=1, S=1, L=1), "reference")) == len(RESULTS)


def test_layouts_are_what_they_say() -> None:
    values = torch.randn(2, 3, 4, 5, 6)
    for layout in LAYOUTS:
        view = lay_out(values, layout)
        assert torch.equal(view, values) and view.stride(-1) == 1
        assert view.is_contiguous() == (layout == "contiguous")


DTYPES_UNDER_AUTOCAST = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


def test_autocast_takes_mixed_dtypes_as_pytorch_does() -> None:
    """Under autocast rotary embedding leaves float32 queries and keys beside bfloat16 values."""
    case = random_case(3, P=4, D=8, dtype=torch.float32)
    mixed = [x.detach().to(dtype) for x, dtype in zip(case.tensors, DTYPES_UNDER_AUTOCAST, strict=True)]
    with pytest.raises(TypeError, match=r"v_text: got dtype torch\.bfloat16, wanted torch\.float32"):
        case.run("triton", mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = case.run("triton", mixed)
    rounded = [x.bfloat16() for x in mixed]
    assert out.dtype == torch.float32 and torch.equal(out, case.run("triton", rounded)[0].float())
