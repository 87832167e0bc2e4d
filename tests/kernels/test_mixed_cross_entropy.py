"""The losses: the fast backends against the reference, and the reference against three nested loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy
from quietstar_kernels import logits as shared
from quietstar_kernels.configurations import use_configuration
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.logits import CHUNK_BYTES, LogitOptions, empty_logits, rows_in_chunk
from quietstar_kernels.mixed_cross_entropy import launches, op, torch_backend
from tests.kernels.guard_band import SENTINEL, assert_intact, guarded
from tests.kernels.largest_tensor import LargestTensor
from tests.marks import slow

CPU_CHUNK = CHUNK_BYTES["cpu"] // 8  # logits in float64
FAST = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="CPU tensors"))]
BACKENDS = ["reference", *FAST]
INTERPOLATIONS = ["logits", "log_probs"]
WIDTH_BLOCKS = {"BLOCK_ROWS": 2, "BLOCK_WIDTH": 8, "num_warps": 4, "num_stages": 1}
LOSS_BLOCKS = {"BLOCK_ROWS": 2, "BLOCK_VOCABULARY": 16, "num_warps": 4, "num_stages": 1}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"softcap": 2.0},
    {"softcap": 1.5, "temperature": 1.7, "logit_scale": 0.8},
    {"banned": (0, 2)},
    {"banned": [1], "softcap": 3.0, "temperature": 3.0, "logit_scale": -1.2},
]


@pytest.fixture(autouse=True)
def _restore_chunk() -> Any:
    yield
    CHUNK_BYTES["cpu"] = 8 * CPU_CHUNK


@pytest.fixture
def _large_blocks() -> Any:
    """For tests of precision, which cross no borders of blocks: the interpreter's time is that of the blocks."""
    with (
        use_configuration("mixed_cross_entropy.mix", {**WIDTH_BLOCKS, "BLOCK_ROWS": 64, "BLOCK_WIDTH": 64}),
        use_configuration("mixed_cross_entropy.loss", {**LOSS_BLOCKS, "BLOCK_ROWS": 64, "BLOCK_VOCABULARY": 64}),
        use_configuration(
            "mixed_cross_entropy.loss_gradient", {**LOSS_BLOCKS, "BLOCK_ROWS": 64, "BLOCK_VOCABULARY": 64}
        ),
        use_configuration("mixed_cross_entropy.hidden_gradient", {**WIDTH_BLOCKS, "BLOCK_ROWS": 64, "BLOCK_WIDTH": 64}),
    ):
        yield


def random_inputs(
    seed: int, N: int, E: int, V: int, *, ignored: float = 0.0, dtype: torch.dtype = torch.float64, low: int = 0
) -> tuple[list[Tensor], Tensor]:
    """[hidden_base, hidden_thought, weight, lm_head] and targets of at least `low`; weights also outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = [normal(N, E), normal(N, E), normal(N), normal(V, E)]
    target = torch.randint(low, V, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < ignored] = -100
    return tensors, target


def upstream_for(loss: Tensor) -> Tensor:
    """Gradients that differ from row to row, negative ones and a zero among them."""
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(98), dtype=torch.float64).to(loss.dtype)
    grad[1:2] = 0
    return grad


def results(tensors: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    loss = mixed_cross_entropy(*tensors, target, **options)
    return [loss, *torch.autograd.grad(loss, tensors, upstream_for(loss))]


def weighted_results(tensors: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    """The same with the upstream gradients as row weights: the gradients are made in the forward pass."""
    row_weight = upstream_for(target.to(tensors[0].dtype))
    loss, nll = mixed_cross_entropy(*tensors, target, row_weight=row_weight, **options)
    assert not nll.requires_grad
    torch.testing.assert_close(loss.detach(), (row_weight.to(nll.dtype) * nll).sum())
    return [nll, *torch.autograd.grad(loss, tensors)]


def assert_close(actual: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for index, (got, want) in enumerate(zip(actual, wanted, strict=True)):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"tensor {index} of loss, gradients"


def nested_loops(
    tensors: list[Tensor],
    target: Tensor,
    interpolation: str,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    banned: tuple[int, ...] = (),
) -> list[float]:
    """Both predictions in full, mixed afterwards: no use of the linearity of lm_head."""
    base, thought, weight, head = (x.detach().tolist() for x in tensors)
    losses = []
    for n, token in enumerate(target.tolist()):
        raw = []
        for hidden in (base[n], thought[n]):
            raw.append([sum(x * y for x, y in zip(hidden, row, strict=True)) for row in head])
        if interpolation == "logits":
            raw = [[(1 - weight[n]) * x + weight[n] * y for x, y in zip(*raw, strict=True)]]
        log_probs = []
        for logits in raw:
            logits = [logit_scale * z for z in logits]
            if softcap is not None:
                logits = [softcap * math.tanh(z / softcap) for z in logits]
            total = sum(math.exp(z / temperature) for v, z in enumerate(logits) if v not in banned)
            log_probs.append(logits[token] / temperature - math.log(total))
        mixed = log_probs[0] if len(log_probs) == 1 else (1 - weight[n]) * log_probs[0] + weight[n] * log_probs[1]
        losses.append(-mixed if token != -100 else 0.0)
    return losses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_nested_loops(backend: str, interpolation: str, options: dict[str, Any]) -> None:
    tensors, target = random_inputs(1, 5, 4, 9, low=3)
    got = mixed_cross_entropy(*tensors, target, interpolation=interpolation, backend=backend, **options)
    wanted = nested_loops(tensors, target, interpolation, **options)
    torch.testing.assert_close(got.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def problems(most_rows: int, chunks: list[int]) -> Any:
    return given(
        seed=st.integers(0, 2**16),
        N=st.integers(0, most_rows),
        E=st.integers(1, 19),
        V=st.integers(4, 40),
        ignored=st.sampled_from([0.0, 0.4, 1.0]),
        interpolation=st.sampled_from(INTERPOLATIONS),
        options=st.sampled_from(OPTIONS),
        chunk=st.sampled_from(chunks),
    )


@settings(max_examples=40)
@problems(13, [60, 150, CPU_CHUNK])
@example(seed=0, N=9, E=3, V=7, ignored=0.0, interpolation="log_probs", options=OPTIONS[3], chunk=20)
@example(seed=0, N=9, E=3, V=7, ignored=0.4, interpolation="logits", options=OPTIONS[5], chunk=20)
# once NaN: an ignored row took token 0, banned, as its target
@example(seed=0, N=9, E=3, V=7, ignored=0.4, interpolation="log_probs", options=OPTIONS[4], chunk=20)
def test_torch_backend_equals_reference(**problem: Any) -> None:
    assert_equals_reference("torch", **problem)


@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
@settings(max_examples=3)  # the interpreter is slow
@problems(9, [150, CPU_CHUNK])
@example(seed=0, N=9, E=17, V=33, ignored=0.4, interpolation="log_probs", options=OPTIONS[3], chunk=90)
@example(seed=0, N=9, E=17, V=33, ignored=0.0, interpolation="logits", options=OPTIONS[5], chunk=90)
@example(seed=0, N=0, E=3, V=7, ignored=0.0, interpolation="logits", options=OPTIONS[4], chunk=90)
def test_triton_backend_equals_reference(**problem: Any) -> None:
    assert_equals_reference("triton", **problem)


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
@settings(max_examples=14)
@problems(9, [150, CPU_CHUNK])
def test_triton_backend_equals_reference_at_more_problems(**problem: Any) -> None:
    assert_equals_reference("triton", **problem)


def assert_equals_reference(
    backend: str,
    seed: int,
    N: int,
    E: int,
    V: int,
    ignored: float,
    interpolation: str,
    options: dict[str, Any],
    chunk: int,
) -> None:
    CHUNK_BYTES["cpu"] = 8 * chunk
    tensors, target = random_inputs(seed, N, E, V, ignored=ignored, low=3)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference", **options)
    assert_close(results(tensors, target, interpolation=interpolation, backend=backend, **options), wanted, 1e-11)
    got = weighted_results(tensors, target, interpolation=interpolation, backend=backend, **options)
    assert_close(got, wanted, 1e-11)
    no_gradient = mixed_cross_entropy(
        *(x.detach() for x in tensors), target, interpolation=interpolation, backend=backend, **options
    )
    torch.testing.assert_close(no_gradient, wanted[0].detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("N", "ignored", "chunk"),
    [(0, 0.0, 90), (1, 0.0, 90), (1, 1.0, 90), (7, 0.0, 18), (7, 0.5, 18), (7, 1.0, 18), (8, 0.0, 9)],
    ids=["no row", "one", "an ignored one", "four chunks", "holes", "all ignored", "a chunk for each row"],
)
def test_nothing_that_was_in_memory_is_left_in_a_result(
    backend: str, interpolation: str, N: int, ignored: float, chunk: int
) -> None:
    """lm_head's gradient is written by the first product of all; without rows there is none."""
    CHUNK_BYTES["cpu"] = 8 * chunk
    tensors, target = random_inputs(21, N, 3, 9, ignored=ignored, low=3)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what torch.empty gives is NaN then
    try:
        assert torch.empty(3).isnan().all()
        assert_close(results(tensors, target, interpolation=interpolation, backend=backend), wanted, 1e-12)
        assert_close(weighted_results(tensors, target, interpolation=interpolation, backend=backend), wanted, 1e-12)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_row_weights_of_the_reference(interpolation: str) -> None:
    tensors, target = random_inputs(20, 7, 3, 9, ignored=0.3)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference")
    assert_close(weighted_results(tensors, target, interpolation=interpolation, backend="reference"), wanted, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_is_mixed_with_weight_zero(backend: str, options: dict[str, Any]) -> None:
    CHUNK_BYTES["cpu"] = 8 * 30
    (base, thought, weight, head), target = random_inputs(2, 8, 4, 9, ignored=0.3, low=3)
    alone = linear_cross_entropy(base, head, target, backend=backend, **options)
    mixed = mixed_cross_entropy(base, thought, torch.zeros_like(weight), head, target, backend=backend, **options)
    got = [alone, *torch.autograd.grad(alone, [base, head], upstream_for(alone))]
    assert_close(got, [mixed, *torch.autograd.grad(mixed, [base, head], upstream_for(mixed))], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradcheck(backend: str, interpolation: str) -> None:
    CHUNK_BYTES["cpu"] = 8 * 14
    N = 2 if backend == "triton" else 5  # the interpreter is slow
    tensors, target = random_inputs(3, N, 2, 7, ignored=0.3, low=1)
    options = {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.3, "banned": (0,)}

    def loss(*inputs: Tensor) -> Tensor:
        return mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, tensors, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_the_needed_gradients(backend: str, interpolation: str, weighted: bool, needed: tuple[int, ...]) -> None:
    tensors, target = random_inputs(4, 6, 3, 7)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference")
    some = [x.detach().requires_grad_(index in needed) for index, x in enumerate(tensors)]
    upstream = upstream_for(wanted[0])
    if weighted:
        loss, _ = mixed_cross_entropy(*some, target, row_weight=upstream, interpolation=interpolation, backend=backend)
        loss.backward()
    else:
        loss = mixed_cross_entropy(*some, target, interpolation=interpolation, backend=backend)
        loss.backward(upstream)
    for index, x in enumerate(some):
        if index in needed:
            assert x.grad is not None
            torch.testing.assert_close(x.grad, wanted[1 + index])
        else:
            assert x.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_ignored_rows_have_no_loss_and_no_gradient_whatever_they_hold(backend: str, interpolation: str) -> None:
    (base, thought, weight, head), target = random_inputs(5, 6, 3, 7)
    target[2], target[4] = 7, 7
    with torch.no_grad():
        base[2], thought[4] = float("nan"), float("inf")
    options: dict[str, Any] = {"ignore_index": 7, "interpolation": interpolation, "backend": backend}
    with torch.no_grad():
        weight[2] = float("nan")
    loss, *grads = results([base, thought, weight, head], target, **options)
    assert_close(weighted_results([base, thought, weight, head], target, **options), [loss, *grads], 1e-12)
    row_weight = upstream_for(loss)
    row_weight[2], row_weight[4] = float("nan"), float("inf")
    total, _ = mixed_cross_entropy(base, thought, weight, head, target, row_weight=row_weight, **options)
    assert_close(list(torch.autograd.grad(total, (base, thought, weight, head))), grads, 1e-12)
    counted = target != 7
    torch.testing.assert_close(total.detach(), (upstream_for(loss) * loss.detach())[counted].sum())
    assert loss[2] == 0 and loss[4] == 0 and bool((loss[[0, 1, 3, 5]] > 0).all())
    assert all(not grad[[2, 4]].any() for grad in grads[:3])
    kept = [0, 1, 3, 5]
    few = [x.detach()[kept].requires_grad_() for x in (base, thought, weight)]
    alone = mixed_cross_entropy(*few, head, target[kept], interpolation=interpolation, backend=backend)
    torch.testing.assert_close(alone, loss[kept])
    torch.testing.assert_close(torch.autograd.grad(alone, head, upstream_for(loss)[kept])[0], grads[3])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_that_cannot_be_counted_without_a_wait(
    interpolation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CUDA device the torch backend computes ignored rows too, and must not let out what they hold."""
    (base, thought, weight, head), target = random_inputs(30, 8, 5, 11, dtype=dtype, ignored=0.4, low=2)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    options: dict[str, Any] = {"interpolation": interpolation, "backend": "torch", "softcap": 3.0, "banned": (0,)}
    wanted = results([base, thought, weight, head], target, **options)
    with torch.no_grad():
        for tensor in (base, thought, weight):
            tensor[target == -100] = float("nan")
    monkeypatch.setattr(op, "rows_that_count", lambda *_: None)
    for make in (results, weighted_results):
        assert_close(
            make([base, thought, weight, head], target, **options), wanted, 1e-2 if dtype != torch.float64 else 1e-12
        )


def test_int32_targets_and_expanded_upstream_gradient() -> None:
    tensors, target = random_inputs(6, 6, 3, 7)
    for interpolation in INTERPOLATIONS:
        every = []
        for backend in ["reference", "torch", *(["triton"] if interpreting() else [])]:
            loss = mixed_cross_entropy(*tensors, target.int(), interpolation=interpolation, backend=backend)
            every.append([loss, *torch.autograd.grad(loss.sum(), tensors)])
        for got in every[1:]:
            assert_close(got, every[0], 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_any_strides(backend: str, interpolation: str) -> None:
    (base, thought, weight, head), target = random_inputs(21, 7, 5, 37, ignored=0.2)
    wanted = weighted_results([base, thought, weight, head], target, interpolation=interpolation, backend="reference")

    def spread(tensor: Tensor) -> Tensor:
        """The same values, with other elements between any two."""
        larger = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=torch.float64)
        view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor.detach()).requires_grad_()

    strided = [spread(base), thought.detach().T.contiguous().T.requires_grad_(), spread(weight), spread(head)]
    strided_target = torch.stack([target, target], 1)[:, 0]
    options: dict[str, Any] = {"interpolation": interpolation, "backend": backend}
    assert_close(results(strided, strided_target, **options), wanted, 1e-12)
    assert_close(weighted_results(strided, strided_target, **options), wanted, 1e-12)
    expanded = [strided[0], strided[1], torch.tensor([0.3], dtype=torch.float64).expand(7), head]
    row_weight = torch.tensor(0.5, dtype=torch.float64).expand(7)
    loss, _ = mixed_cross_entropy(*expanded, target, row_weight=row_weight, **options)
    same, _ = mixed_cross_entropy(*expanded, target, row_weight=row_weight, **{**options, "backend": "reference"})
    torch.testing.assert_close(loss, same)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_retained_graph_gives_the_same_gradients_twice(backend: str, weighted: bool) -> None:
    tensors, target = random_inputs(22, 6, 5, 20)
    row_weight = upstream_for(target.double()) if weighted else None
    out = mixed_cross_entropy(*tensors, target, row_weight=row_weight, backend=backend)
    loss = out[0] if weighted else out.sum()
    first = torch.autograd.grad(loss, tensors, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(loss, tensors, torch.tensor(3.0, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("weighted", "interpolation"),
    [
        (True, "logits"),
        slow(True, "log_probs"),
        (False, "log_probs"),
        slow(False, "linear"),
    ],
)
def test_opcheck(backend: str, weighted: bool, interpolation: str) -> None:
    (base, thought, weight, head), target = random_inputs(23, 5, 3, 9, ignored=0.3, low=2, dtype=torch.float32)
    mixed = interpolation != "linear"
    row_weight = upstream_for(target.float()) if weighted else None
    states = (base, thought, weight) if mixed else (base, None, None)
    settings = (interpolation if mixed else "logits", 0.7, 2.0, 1.1, [0, 1], -100)
    for needs in ((True, mixed, True), (False, False, False))[: 1 + (not mixed)]:
        inputs = (*states, head, target, row_weight)
        if not any(needs):
            inputs = tuple(None if x is None else x.detach() for x in inputs)
        torch.library.opcheck(op.head_loss, (*inputs, *settings, *needs, backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("weighted", [False, True])
def test_compiles_into_one_graph(backend: str, weighted: bool) -> None:
    tensors, target = random_inputs(24, 5, 3, 9, ignored=0.3, low=2, dtype=torch.float32)
    upstream = upstream_for(target.float())

    def losses(*inputs: Tensor) -> Tensor:
        options: dict[str, Any] = {"banned": (0, 1), "softcap": 3.0, "backend": backend}
        if weighted:
            loss, nll = mixed_cross_entropy(*inputs, target, row_weight=upstream, interpolation="log_probs", **options)
            return 2 * loss + nll.sum() + linear_cross_entropy(inputs[0], inputs[3], target, **options).sum()
        return (mixed_cross_entropy(*inputs, target, **options) * upstream).sum()

    wanted = [losses(*tensors), *torch.autograd.grad(losses(*tensors), tensors)]
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert_close([compiled(*tensors), *torch.autograd.grad(compiled(*tensors), tensors)], wanted, 1e-6)


@pytest.mark.parametrize(
    ("weighted", "interpolation", "products"),
    [(True, "logits", 3), (False, "logits", 4), (True, "log_probs", 6), (False, "log_probs", 8)],
)
def test_arithmetic(weighted: bool, interpolation: str, products: int) -> None:
    """6NVE with known row weights, 8NVE without, where each product with lm_head takes 2NVE; and what is registered."""
    tensors, target = random_inputs(25, 24, 10, 30)
    base, thought, weight, head = (x.detach() for x in tensors)
    row_weight = upstream_for(target.double()) if weighted else None
    settings = (interpolation, 1.0, None, 1.0, [], -100)
    CHUNK_BYTES["cpu"] = 8 * 300
    with FlopCounterMode(display=False) as counter:  # inside of the operators, which it would not look into
        loss, _, lse, *made = op.compute_head_loss(
            base, thought, weight, head, target, row_weight, *settings, True, True, True, "torch"
        )
        op.compute_head_loss_backward(
            torch.ones_like(loss),
            base,
            thought,
            weight,
            head,
            target,
            row_weight,
            lse,
            *made,
            *settings,
            *[True] * 4,
            "torch",
        )
    assert counter.get_total_flops() == products * 2 * 24 * 30 * 10
    with FlopCounterMode(display=False) as registered:
        out = mixed_cross_entropy(*tensors, target, row_weight=row_weight, interpolation=interpolation, backend="torch")
        (out[0] if weighted else out.sum()).backward()
    assert registered.get_total_flops() == counter.get_total_flops()


@pytest.mark.parametrize("needed", [(), (2,), (3,), (0, 1, 2, 3)])
def test_arithmetic_in_16_bits(needed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed loss takes 4NVE: its second product gives the gradient that corrects it, or adds what rounding took."""
    monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    tensors, target = random_inputs(25, 24, 10, 30, dtype=torch.bfloat16)
    some = [x.detach().requires_grad_(index in needed) for index, x in enumerate(tensors)]
    needs = (0 in needed, 2 in needed, 3 in needed)
    with FlopCounterMode(display=False) as counter:  # inside of the operator, which it would not look into
        op.compute_head_loss(
            *(x.detach() for x in some), target, None, "logits", 1.0, None, 1.0, [], -100, *needs, "torch"
        )
    with FlopCounterMode(display=False) as registered:
        mixed_cross_entropy(*some, target, backend="torch")
    assert registered.get_total_flops() == counter.get_total_flops() == 2 * 2 * 24 * 30 * 10


@pytest.mark.parametrize("backend", FAST)
def test_chunks_change_nothing(backend: str) -> None:
    tensors, target = random_inputs(26, 11, 5, 30, ignored=0.2)
    wanted = weighted_results(tensors, target, backend=backend)
    for chunk in (1, 100, 200):
        CHUNK_BYTES["cpu"] = 8 * chunk
        assert_close(weighted_results(tensors, target, backend=backend), wanted, 1e-13)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "device", "dtypes", "expected"),
    [
        (8192, 32000, "cuda", (torch.float32, torch.bfloat16), 8192),  # once 2048: lm_head was read four times
        (8192, 32002, "cuda", (torch.float32, torch.float16), 8192),
        (8448, 32002, "cuda", (torch.float32, torch.bfloat16), 4224),  # in equal parts, not 8320 and 128
        (8192, 32002, "cuda", (torch.float32, torch.float32), 8192),  # the gradient takes the logits' place
        (8192, 32002, "cuda", (torch.float64, torch.float64), 4096),
        (8192, 128256, "cuda", (torch.float32, torch.bfloat16), 2048),
        (8192, 151936, "cuda", (torch.float32, torch.bfloat16), 1664),
        (8192, 2**18, "cuda", (torch.float32, torch.bfloat16), 1024),
        (8192, 2**29, "cuda", (torch.float32, torch.bfloat16), 1),
        (100, 32002, "cuda", (torch.float32, torch.bfloat16), 100),
        (0, 0, "cuda", (torch.float32, torch.bfloat16), 1),
        (2048, 32002, "cuda", (torch.float32, None), 1024),  # once 256
        (8192, 151936, "cuda", (torch.float32, None), 1024),  # once 55: lm_head was read 149 times
        (8192, 2**20, "cuda", (torch.float32, None), 384),  # no more than CHUNK_BYTES
        (8192, 1000, "cuda", (torch.float32, None), 8192),  # 33 MB stay in the cache
        (8192, 32002, "cuda", (torch.float64, None), 1024),
        (8192, 2**20, "cpu", (torch.float32, None), 2),
        (8192, 2**20, "cpu", (torch.float64, torch.float64), 1),
        (8192, 32002, "xpu", (torch.float32, torch.bfloat16), 8192),  # a device without a bound of its own
    ],
)
def test_rows_in_chunk(
    rows: int, vocabulary: int, device: str, dtypes: tuple[torch.dtype, torch.dtype | None], expected: int
) -> None:
    size = rows_in_chunk(rows, vocabulary, torch.device(device), *dtypes)
    assert size == expected
    held = size * vocabulary * sum(kind.itemsize for kind in {*dtypes} - {None})
    assert size == 1 or held <= {"cpu": 8 * 2**20}.get(device, 1.5 * 2**30)


def test_rows_of_logits_begin_at_multiples_of_128_bytes() -> None:
    assert empty_logits(3, 32002, torch.float32, torch.device("cpu")).stride() == (32064, 1)


@pytest.fixture(params=["widened", "low_precision"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply as a CPU does, or operands of low precision with float32 sums, as CUDA does."""
    if request.param == "low_precision":
        monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    return str(request.param)


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_low_precision_error_is_within_twice_that_of_plain_pytorch(
    backend: str, dtype: torch.dtype, interpolation: str, products: str
) -> None:
    tensors, target = random_inputs(7, 64, 32, 50, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    upstream = torch.randn(64, generator=torch.Generator().manual_seed(98)).to(dtype)
    truth_loss = mixed_cross_entropy(*exact, target, interpolation=interpolation, backend="reference")
    truth = [truth_loss, *torch.autograd.grad(truth_loss, exact, upstream.double())]

    base, thought, weight, head = tensors
    share = weight.unsqueeze(-1)
    if interpolation == "logits":
        plain_log_probs = ((1 - share) * (base @ head.T) + share * (thought @ head.T)).log_softmax(-1)
    else:
        plain_log_probs = (1 - share) * (base @ head.T).log_softmax(-1) + share * (thought @ head.T).log_softmax(-1)
    plain_loss = -plain_log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    plain = [plain_loss, *torch.autograd.grad(plain_loss, tensors, upstream)]

    loss = mixed_cross_entropy(*tensors, target, interpolation=interpolation, backend=backend)
    assert loss.dtype == torch.float32
    known, _ = mixed_cross_entropy(*tensors, target, row_weight=upstream, interpolation=interpolation, backend=backend)
    ours = [loss, *torch.autograd.grad(loss, tensors, upstream.float())]
    ours_known = [loss, *torch.autograd.grad(known, tensors)]
    for got, theirs, wanted in zip(ours + ours_known, plain * 2, truth * 2, strict=True):
        budget = 2 * (theirs.double() - wanted).abs().max() + torch.finfo(dtype).eps * 1e-2 * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= budget
    # rewards are differences of losses: what rounding the mixed state takes is of second order
    assert (loss.double() - truth_loss).abs().max() <= 4e-5 * truth_loss.abs().max()


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    "dtypes",
    [  # hidden_base, hidden_thought, weight, lm_head
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float64),
    ],
)
def test_dtypes_may_differ(backend: str, interpolation: str, dtypes: tuple[torch.dtype, ...], products: str) -> None:
    """Such as states in 16 bits with an lm_head in float32: multiplied in float32, without a rounding of the inputs."""
    tensors, target = random_inputs(32, 20, 16, 30, ignored=0.2)
    mine = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(tensors, dtypes, strict=True)]
    exact = [x.detach().double().requires_grad_() for x in mine]
    truth = results(exact, target, interpolation=interpolation, backend="reference")
    row_weight = upstream_for(target.float())
    loss, nll = mixed_cross_entropy(*mine, target, row_weight=row_weight, interpolation=interpolation, backend=backend)
    known = [nll, *torch.autograd.grad(loss, mine)]
    for got in (results(mine, target, interpolation=interpolation, backend=backend), known):
        assert [x.dtype for x in got[1:]] == list(dtypes)
        for index, (have, wanted) in enumerate(zip(got, truth, strict=True)):
            tolerance = 1e-5 if index == 0 else max(1e-5, 2 * torch.finfo(have.dtype).eps)
            assert (have.double() - wanted).abs().max() <= tolerance * wanted.abs().max(), f"tensor {index}"


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_corrects_the_loss_of_a_rounded_state(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding takes from the loss is put back to first order; without a gradient, a second product does."""
    monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    tensors, target = random_inputs(28, 64, 32, 40, dtype=dtype)
    with torch.no_grad():
        tensors[2].uniform_(0.0, 1.0)
        tensors[3].mul_(32**-0.5)
    truth = mixed_cross_entropy(*(x.detach().double() for x in tensors), target, backend="reference")
    base, thought, weight, head = (x.detach() for x in tensors)
    share = weight.float().unsqueeze(-1)
    rounded = linear_cross_entropy(((1 - share) * base + share * thought).to(dtype), head, target, backend=backend)
    with torch.no_grad():
        without = mixed_cross_entropy(*tensors, target, backend=backend)
    corrected = mixed_cross_entropy(*tensors, target, backend=backend).detach()

    def error(loss: Tensor) -> float:
        return float((loss.double() - truth).square().mean().sqrt())

    assert max(error(corrected), error(without)) < error(rounded) / 50
    assert error(rounded) < torch.finfo(dtype).eps  # about one rounding of the state
    with_head = [x.detach() for x in tensors]
    with_head[3].requires_grad_()  # no gradient that could correct
    assert error(mixed_cross_entropy(*with_head, target, backend=backend).detach()) < error(rounded) / 50
    weight_only = [x.detach() for x in tensors]
    weight_only[2].requires_grad_()
    torch.testing.assert_close(
        mixed_cross_entropy(*weight_only, target, backend=backend).detach(), corrected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
def test_small_row_weights_keep_float16s_precision(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 steps by 6e-8 near zero: no room for a weight of 1e-7 times a state, though for the sum of 2048 such."""
    monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    (base, thought, weight, head), _ = random_inputs(29, 2048, 4, 5, dtype=torch.float16)
    states = [base.detach().abs_(), thought.detach().abs_(), weight.detach().sigmoid_()]  # so that no sum cancels
    target = torch.zeros(2048, dtype=torch.int64)
    row_weight = torch.full((2048,), 1e-7)
    loss, _ = mixed_cross_entropy(*states, head, target, row_weight=row_weight, backend=backend)
    got = torch.autograd.grad(loss, head)[0]
    exact = head.detach().double().requires_grad_()
    wide = [x.double() for x in states]
    wanted, _ = mixed_cross_entropy(*wide, exact, target, row_weight=row_weight, backend="reference")
    truth = torch.autograd.grad(wanted, exact)[0]
    assert (got.double() - truth).abs().max() < 1e-2 * truth.abs().max()


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("dtype", "weight", "upstream"),
    [
        (torch.float16, 1 / 64, 2.0**16),  # a GradScaler's first scale, which float16 cannot hold
        (torch.float16, 1e-7, 2.0**14),  # a scale that brings gradients back into float16's range
        (torch.float16, 1e5, 1e-6),  # gradients that only their upstream brings there
        (torch.bfloat16, 1 / 64, 1 / 3),  # three micro-batches; in bfloat16 a third is 0.2 % off, for all elements
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_upstream_gradient_multiplies_in_full_precision(
    backend: str, dtype: torch.dtype, weight: float, upstream: float, known: bool, products: str
) -> None:
    """Once inf, flushed to zero, or off in all elements alike: rounded to lm_head's dtype before and after."""
    (base, thought, share, head), target = random_inputs(31, 64, 16, 20, dtype=dtype, ignored=0.1)
    with torch.no_grad():
        head.mul_(0.25)
    row_weight = torch.full((64,), weight)

    def gradients(inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
        if known:
            loss, _ = mixed_cross_entropy(*inputs, target, row_weight=row_weight, backend=backend)
        else:
            loss = (mixed_cross_entropy(*inputs, target, backend=backend) * row_weight).sum()
        return torch.autograd.grad(loss * upstream, inputs)

    got = gradients([base, thought, share, head], backend)
    truth = gradients([x.detach().double().requires_grad_() for x in (base, thought, share, head)], "reference")
    for mine, wanted in zip(got, truth, strict=True):
        assert bool(mine.isfinite().all())
        spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the smallest numbers
        error = (mine.double() - wanted).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * wanted.abs().max() + spacing
    scale = (got[3].double() * truth[3]).sum() / truth[3].square().sum()
    assert abs(float(scale) - 1) < 1e-3


@pytest.mark.usefixtures("_large_blocks")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("weight", [1e-4, 1e-3, slow(1e-2), slow(1e-1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_reward_of_a_small_weight_is_not_rounding_noise(
    backend: str, gradient: bool, weight: float, dtype: torch.dtype, interpolation: str, products: str
) -> None:
    """The reward is a small difference of two losses; rounding the mixed state would be larger than it."""
    (base, thought, _, head), target = random_inputs(12, 128, 64, 100, dtype=dtype)
    head = head * 64**-0.5

    def reward(backend: str, *inputs: Tensor) -> Tensor:
        talk = mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend)
        return linear_cross_entropy(inputs[0], inputs[3], target, backend=backend) - talk

    inputs = [x.detach() for x in (base, thought, torch.full((128,), weight), head)]
    wanted = reward("reference", *(x.double() for x in inputs))
    inputs[2].requires_grad_(gradient)  # the loss of a training step, or of an evaluation
    error = reward(backend, *inputs).detach().double() - wanted
    assert float(error.std() / wanted.std()) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_autocast_and_checkpointing_change_nothing(backend: str, interpolation: str) -> None:
    tensors, target = random_inputs(8, 12, 8, 11, dtype=torch.float32)
    wanted = results(tensors, target, interpolation=interpolation, backend=backend)

    def loss_of(*inputs: Tensor) -> Tensor:
        return mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = checkpoint(loss_of, *tensors, use_reentrant=False)
    assert_close([loss, *torch.autograd.grad(loss, tensors, upstream_for(loss))], wanted, 1e-6)
    if backend != "reference":
        for make in (results, weighted_results):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = make(tensors, target, interpolation=interpolation, backend=backend)
            assert_close(inside, wanted, 1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_more_logits_than_a_chunk(interpolation: str, weighted: bool) -> None:
    """[N, V] logits would be 100 * 64; the chunk is 512, the rest no larger than two states, 2 * 100 * 4."""
    CHUNK_BYTES["cpu"] = 4 * 512
    tensors, target = random_inputs(9, 100, 4, 64, dtype=torch.float32, ignored=0.2)
    base, thought, weight, head = (x.detach() for x in tensors)
    row_weight = upstream_for(target.float()) if weighted else None
    settings = (interpolation, 1.0, 2.0, 1.0, [], -100)
    with LargestTensor() as largest:  # inside of the operators, which it would not look into
        loss, _, lse, *made = op.compute_head_loss(
            base, thought, weight, head, target, row_weight, *settings, True, True, True, "torch"
        )
        op.compute_head_loss_backward(
            torch.ones_like(loss),
            base,
            thought,
            weight,
            head,
            target,
            row_weight,
            lse,
            *made,
            *settings,
            *[True] * 4,
            "torch",
        )
    assert largest.elements <= 2 * 100 * 4


# ------------------------------------------------------------------------------------------------ kernels one by one


needs_interpreter = pytest.mark.skipif(not interpreting(), reason="CPU tensors")


def assert_wrote(got: list[Tensor], wanted: list[Tensor], buffers: list[Tensor], tolerance: float) -> None:
    for mine, theirs, buffer in zip(got, wanted, buffers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        assert_intact(buffer, mine)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
def test_mix_kernel_writes_its_outputs_and_nothing_else(dtype: torch.dtype, mixed: bool) -> None:
    (base, thought, weight, _), target = random_inputs(40, 5, 11, 7, ignored=0.4, dtype=dtype)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = tuple(
        None if x is None else x.detach() for x in ((base, thought, weight) if mixed else (base, None, None))
    )
    scale = torch.randn(5, dtype=result)
    (states, states_buffer), (scaled, scaled_buffer) = guarded((5, 11), dtype), guarded((5, 11), dtype)
    residual, residual_buffer = guarded((5, 11), dtype)
    launches.mix_launch(*inputs, target, scale, states, scaled, -100, residual, WIDTH_BLOCKS).run()
    wanted = [torch.empty(5, 11, dtype=dtype), torch.empty(5, 11, dtype=dtype)]
    lost = torch.empty(5, 11, dtype=dtype)
    torch_backend.mix_rows(*inputs, target, scale, *wanted, -100, lost)
    # the interpreter may fuse no multiplication and addition that torch fuses: one rounding of difference
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert_wrote([states, scaled], wanted, [states_buffer, scaled_buffer], tolerance)
    if mixed and result != dtype:
        whole = states.float() + residual.float(), wanted[0].float() + lost.float()  # whichever way a tie was rounded
        torch.testing.assert_close(*whole, rtol=tolerance**2, atol=tolerance**2)
        assert residual.any()
    else:
        assert not residual.any()
    assert_intact(residual_buffer, residual)


@needs_interpreter
@pytest.mark.parametrize("options", [OPTIONS[0], slow(OPTIONS[3]), OPTIONS[5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("gradient_dtype", [None, torch.bfloat16, torch.float16, "in place"])
def test_loss_kernel_writes_its_outputs_and_nothing_else(
    options: dict[str, Any], dtype: torch.dtype, known: bool, gradient_dtype: Any
) -> None:
    N, V = 5, 21
    generator = torch.Generator().manual_seed(41)
    target = torch.tensor([3, 20, -100, 7, 15])
    chosen = LogitOptions(**{**options, "banned": tuple(options.get("banned", ()))})
    raw, raw_buffer = guarded((N, V), dtype, columns=64)
    raw.copy_(torch.randn(N, V, generator=generator, dtype=torch.float64) * 3)
    chosen.ban_(raw)
    wanted_raw, before = raw.clone(), raw.clone()
    (lse, lse_buffer), (nll, nll_buffer) = guarded((N,), dtype), guarded((N,), dtype)
    wanted_lse, wanted_nll = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype)
    wanted_gradient = gradient = gradient_buffer = None
    if gradient_dtype == "in place":
        gradient, gradient_buffer, wanted_gradient = raw, raw_buffer, wanted_raw
    elif gradient_dtype is not None:
        gradient, gradient_buffer = guarded((N, V), gradient_dtype, columns=64)
        wanted_gradient = torch.empty(N, V, dtype=gradient_dtype)
    if known:
        torch_backend.row_losses(wanted_raw.clone(), target, lse, nll.clone(), None, chosen, -100)
        wanted_lse.copy_(lse)
    torch_backend.row_losses(
        wanted_raw, target, wanted_lse, None if known else wanted_nll, wanted_gradient, chosen, -100
    )
    launches.loss_launch(raw, target, lse, None if known else nll, gradient, chosen, -100, LOSS_BLOCKS).run()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert_wrote([lse], [wanted_lse], [lse_buffer], tolerance)
    if known:
        assert bool((nll == SENTINEL).all())
    else:
        assert_wrote([nll], [wanted_nll], [nll_buffer], tolerance)
    if gradient is None or gradient_buffer is None or wanted_gradient is None:
        assert torch.equal(raw, before)
        assert_intact(raw_buffer, raw)
    else:
        assert not gradient[2].any()
        tolerance = max(tolerance, 0.0 if gradient_dtype == "in place" else torch.finfo(gradient_dtype).eps)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=tolerance, atol=tolerance)
        assert_intact(gradient_buffer, gradient, padding=0.0)


@needs_interpreter
def test_loss_kernel_reads_the_targets_logit_before_its_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a race: loaded after the last reduction, a thread's store of the gradient over the logits could come first.

    The interpreter runs one thread, so that this is about the order of the loads: rows' before tiles'.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    dimensions: list[int] = []
    usual = InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, *rest: Any) -> Any:
        dimensions.append(pointers.data.ndim)
        return usual(self, pointers, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    raw = empty_logits(2, 21, torch.float32, torch.device("cpu")).fill_(0.5)
    lse, nll = torch.empty(2), torch.empty(2)
    launches.loss_launch(raw, torch.tensor([3, 20]), lse, nll, raw, LogitOptions(), -100, LOSS_BLOCKS).run()
    assert dimensions[:3] == [1, 1, 2] and set(dimensions[3:]) == {2}  # target, its logit; then tiles


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
def test_hidden_gradient_kernel_writes_its_outputs_and_nothing_else(dtype: torch.dtype, mixed: bool) -> None:
    N, E = 5, 11
    (base, thought, weight, _), target = random_inputs(42, N, E, 7, ignored=0.4, dtype=dtype)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = tuple(
        None if x is None else x.detach() for x in ((base, thought, weight) if mixed else (None, None, None))
    )
    gradient, states = torch.randn(N, E, dtype=result), torch.randn(N, E).to(dtype)
    before = torch.randn(N, dtype=result)
    made, wanted = [], []
    for shape, kind in (((N, E), dtype), ((N,), result), ((N,), result)):
        made.append(guarded(shape, kind))
        wanted.append(torch.empty(shape, dtype=kind))
    made[1][0].copy_(before)
    wanted[1].copy_(before)
    outputs = [view for view, _ in made] if mixed else [made[0][0], None, None]
    launches.hidden_gradient_launch(gradient, *inputs, states, target, *outputs, -100, WIDTH_BLOCKS).run()
    torch_backend.finish_gradient(
        gradient, *inputs, states, target, *(wanted if mixed else [wanted[0], None, None]), -100
    )
    count = 3 if mixed else 1
    assert_wrote([view for view, _ in made][:count], wanted[:count], [buffer for _, buffer in made][:count], 1e-5)


@needs_interpreter
def test_block_sizes_change_nothing() -> None:
    tensors, target = random_inputs(43, 7, 9, 70, ignored=0.2)
    wanted = weighted_results(tensors, target, backend="triton", softcap=3.0)
    with (
        use_configuration(
            "mixed_cross_entropy.loss_gradient", {**LOSS_BLOCKS, "BLOCK_ROWS": 1, "BLOCK_VOCABULARY": 128}
        ),
    ):
        assert_close(weighted_results(tensors, target, backend="triton", softcap=3.0), wanted, 1e-13)


def good(**changes: Any) -> dict[str, Any]:
    tensors, target = random_inputs(0, 5, 3, 7)
    names = ["hidden_base", "hidden_thought", "weight", "lm_head"]
    return {**dict(zip(names, tensors, strict=True)), "target": target, **changes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_base": torch.zeros(5)}, ValueError, r"hidden_base: got shape \[5\], wanted \[N, E\]"),
        ({"hidden_base": torch.zeros(5, 3).int()}, TypeError, r"hidden_base: got dtype torch.int32"),
        ({"hidden_thought": torch.zeros(4, 3)}, ValueError, r"hidden_thought: got shape \[4, 3\], wanted \[N=5, E=3\]"),
        ({"weight": torch.zeros(5, 1)}, ValueError, r"weight: got shape \[5, 1\], wanted \[N=5\]"),
        ({"lm_head": torch.zeros(3, 7)}, ValueError, r"lm_head: got shape \[3, 7\], wanted \[V, E=3\]"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target: got shape \[4\], wanted \[N=5\]"),
        ({"target": torch.zeros(5)}, TypeError, r"target: got dtype torch.float32"),
        ({"target": torch.tensor([0, 1, 2, 7, 3])}, ValueError, r"target: got token 7, wanted 0 <= id < V=7"),
        ({"target": torch.tensor([0, 1, -1, 4, 3])}, ValueError, r"target: got token -1, wanted"),
        (
            {"target": torch.tensor([0, 1, 2, 4, 3]), "banned": (4,)},
            ValueError,
            r"target: got token 4, which is banned",
        ),
        ({"banned": (7,)}, ValueError, r"banned: got token 7, wanted ids 0 <= id < V=7"),
        ({"banned": range(7)}, ValueError, r"banned: got all 7 tokens"),
        ({"temperature": 0.0}, ValueError, r"temperature: got 0.0, wanted a number above 0"),
        ({"temperature": float("nan")}, ValueError, r"temperature: got nan"),
        ({"softcap": -1.0}, ValueError, r"softcap: got -1.0"),
        ({"row_weight": torch.zeros(4)}, ValueError, r"row_weight: got shape \[4\], wanted \[N=5\]"),
        ({"row_weight": torch.zeros(5).long()}, TypeError, r"row_weight: got dtype torch.int64"),
        ({"row_weight": torch.zeros(5).requires_grad_()}, ValueError, r"row_weight: requires a gradient"),
        ({"interpolation": "probs"}, ValueError, r"interpolation: got 'probs', wanted 'logits' or 'log_probs'"),
    ],
)
def test_bad_arguments_are_named(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mixed_cross_entropy(**good(**changes), backend=backend)


def test_bad_arguments_of_the_linear_loss_are_named() -> None:
    arguments = good()
    hidden, head, target = arguments["hidden_base"], arguments["lm_head"], arguments["target"]
    with pytest.raises(ValueError, match=r"hidden: got shape \[5\], wanted \[N, E\]"):
        linear_cross_entropy(hidden[:, 0], head, target)
    with pytest.raises(ValueError, match=r"target: got token 9, wanted 0 <= id < V=7"):
        linear_cross_entropy(hidden, head, target + 9 - target)
    with pytest.raises(ValueError, match=r"backend: got 'numpy', wanted one of"):
        mixed_cross_entropy(**arguments, backend="numpy")
