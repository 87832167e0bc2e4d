"""Sampling: the right distribution, the same tokens from the same seed, and log-probabilities that belong to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quietstar_kernels import linear_cross_entropy, sample_tokens
from quietstar_kernels.configurations import use_configuration
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.logits import CHUNK_BYTES, LogitOptions
from quietstar_kernels.token_sampling import op, uniform_numbers
from quietstar_kernels.token_sampling.torch_backend import choose_tokens
from tests.kernels.guard_band import assert_intact, guarded
from tests.kernels.largest_tensor import LargestTensor

CPU_CHUNK = CHUNK_BYTES["cpu"] // 8  # logits in float64
FAST = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="CPU tensors"))]
BACKENDS = ["reference", *FAST]
BLOCKS = {"BLOCK_ROWS": 2, "BLOCK_VOCABULARY": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def _restore_chunk() -> Any:
    yield
    CHUNK_BYTES["cpu"] = 8 * CPU_CHUNK


def random_inputs(seed: int, N: int, E: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, E, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), torch.randn(V, E, generator=generator, dtype=torch.float64).to(dtype)


problems = given(
    inputs=st.integers(0, 2**16),
    seed=st.integers(-(2**80), 2**80),
    N=st.integers(0, 20),
    V=st.integers(3, 50),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    softcap=st.sampled_from([None, 2.0]),
    logit_scale=st.sampled_from([1.0, 1.6]),
    banned=st.sampled_from([(), (0,), (2, 0)]),
    greedy=st.booleans(),
    chunk=st.sampled_from([1, 100, CPU_CHUNK]),
)


@settings(max_examples=60)
@problems
def test_torch_backend_equals_reference_and_its_logprob_is_the_negative_loss(**problem: Any) -> None:
    assert_equals_reference("torch", **problem)


@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
@settings(max_examples=6)  # the interpreter is slow
@problems
def test_triton_backend_equals_reference_and_its_logprob_is_the_negative_loss(**problem: Any) -> None:
    assert_equals_reference("triton", **problem)


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
@settings(max_examples=20)
@problems
def test_triton_backend_equals_reference_at_more_problems(**problem: Any) -> None:
    assert_equals_reference("triton", **problem)


def assert_equals_reference(
    backend: str, inputs: int, seed: int, N: int, V: int, greedy: bool, chunk: int, **options: Any
) -> None:
    CHUNK_BYTES["cpu"] = 8 * chunk
    hidden, head = random_inputs(inputs, N, 4, V)
    wanted_token, wanted_logprob = sample_tokens(hidden, head, seed=seed, greedy=greedy, backend="reference", **options)
    token, logprob = sample_tokens(hidden, head, seed=seed, greedy=greedy, backend=backend, **options)
    assert torch.equal(token, wanted_token) and token.dtype == torch.int64 and token.shape == (N,)
    assert not torch.isin(token, torch.tensor(options["banned"], dtype=torch.int64)).any()
    torch.testing.assert_close(logprob, wanted_logprob, rtol=1e-12, atol=1e-12)
    loss = linear_cross_entropy(hidden, head, token, backend="reference", **options)
    torch.testing.assert_close(logprob, -loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "banned": (1, 5), "softcap": 1.5}])
def test_draws_follow_the_distribution(backend: str, options: dict[str, Any]) -> None:
    """Pearson's chi-square statistic over 40,000 draws from one row's distribution."""
    N, V = 40_000, 12
    hidden, head = random_inputs(2, 1, 3, V)
    # blocks of 4 tokens, so that a block is drawn too; of many rows, for the interpreter's time is that of the blocks
    with use_configuration("token_sampling.sample", {**BLOCKS, "BLOCK_ROWS": 4096, "BLOCK_VOCABULARY": 4}):
        token, _ = sample_tokens(hidden.expand(N, -1), head, seed=7, backend=backend, **options)
    allowed = [v for v in range(V) if v not in options.get("banned", ())]
    every = torch.tensor(allowed)
    expected = (-linear_cross_entropy(hidden.expand(len(allowed), -1), head, every, **options)).exp() * N
    counts = torch.bincount(token, minlength=V)
    assert counts.sum() == N and counts[every].sum() == N
    statistic = ((counts[every] - expected).square() / expected).sum()
    critical = {11: 31.264, 9: 27.877}[len(allowed) - 1]  # the 0.999 quantile for that many degrees of freedom
    assert expected.min() > 5 and statistic < critical


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reproducible_and_independent_of_the_chunk_size(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIETSTAR_BACKEND", backend)
    hidden, head = random_inputs(3, 40, 8, 50, dtype)
    first = sample_tokens(hidden, head, seed=11)
    assert first[1].dtype == torch.float32
    torch.manual_seed(5)  # the global generator plays no part
    state = torch.get_rng_state()
    for chunk in (500, 777, CPU_CHUNK):
        CHUNK_BYTES["cpu"] = 8 * chunk
        token, logprob = sample_tokens(hidden, head, seed=11)
        assert torch.equal(token, first[0])
        torch.testing.assert_close(logprob, first[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sample_tokens(hidden, head, seed=12)[0], first[0])
    assert torch.equal(sample_tokens(hidden, head, seed=11 - 2**63)[0], first[0])


@pytest.mark.parametrize("seeds", [[11], [3, 3], [0, 2**63 - 1, 7], [-5, 2**70], [4, 11 - 2**63, 4]])
def test_numbers_that_are_drawn_beforehand_are_those_of_the_seeds(
    seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thoughts are sampled in a loop that makes no generator: each was a host object that no CUDA graph can hold."""
    hidden, head = random_inputs(4, 12, 8, 50)
    numbers = uniform_numbers(hidden, seeds, 12)
    wanted = [torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds]
    assert torch.equal(numbers, torch.stack(wanted))
    drawn = [sample_tokens(hidden, head, seed=seed) for seed in seeds]
    parts = [sample_tokens(hidden, head, seed=seed, rows=(5, 40)) for seed in seeds]
    more = uniform_numbers(hidden, seeds, 40)
    monkeypatch.delattr(torch, "Generator")
    for row, (whole, part) in enumerate(zip(drawn, parts, strict=True)):
        for wanted_of, uniform in ((whole, numbers[row]), (part, more[row, 5:17])):
            found = sample_tokens(hidden, head, uniform=uniform)
            assert torch.equal(found[0], wanted_of[0]) and torch.equal(found[1], wanted_of[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "seed: got None, wanted an integer, or"),
        ({"uniform": torch.zeros(11, dtype=torch.float64)}, r"uniform: got shape \[11\], wanted \[N=12\]"),
        ({"uniform": torch.zeros(12, 1, dtype=torch.float64)}, r"uniform: got shape \[12, 1\]"),
        ({"uniform": torch.zeros(12)}, "uniform: got dtype torch.float32, wanted float64"),
        ({"uniform": torch.zeros(12, dtype=torch.float64), "seed": 3}, "uniform: got numbers and a seed or rows"),
        ({"uniform": torch.zeros(12, dtype=torch.float64), "rows": (0, 12)}, "uniform: got numbers and a seed or rows"),
        ({"uniform": torch.zeros(12, dtype=torch.int64)}, "uniform: got dtype torch.int64"),
        ({"uniform": torch.zeros(12, dtype=torch.float64, device="meta")}, "uniform: got device meta"),
    ],
)
def test_what_a_draw_needs(options: dict[str, Any], message: str) -> None:
    hidden, head = random_inputs(4, 12, 8, 50)
    with pytest.raises((TypeError, ValueError), match=message):
        sample_tokens(hidden, head, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_at_the_very_end_of_the_interval_draws_a_possible_token(backend: str) -> None:
    """Rounding in a cumulative sum must not let the last uniform number fall on tokens of probability 0, or past V."""
    nearly_one = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    uniform = torch.stack([nearly_one, torch.zeros_like(nearly_one)]).repeat(50)
    hidden, head = random_inputs(4, 100, 4, 40)
    options: dict[str, Any] = {"uniform": uniform, "banned": (0, 1, 38, 39), "temperature": 0.05, "backend": backend}
    token, logprob = sample_tokens(hidden, head, **options)
    assert int(token.min()) >= 2 and int(token.max()) < 38 and torch.isfinite(logprob).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_most_probable_allowed_token_without_a_gradient(backend: str) -> None:
    hidden, head = random_inputs(5, 20, 4, 9)
    hidden.requires_grad_()
    token, logprob = sample_tokens(hidden, head, seed=0, greedy=True, banned=(3,), backend=backend)
    logits = (hidden.detach() @ head.T).index_fill(-1, torch.tensor([3]), float("-inf"))
    assert torch.equal(token, logits.argmax(-1)) and not logprob.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    hidden, head = random_inputs(6, 60, 16, 40, torch.float32)
    plain = sample_tokens(hidden, head, seed=1, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sample_tokens(hidden, head, seed=1, backend=backend)
    assert torch.equal(inside[0], plain[0]) and torch.equal(inside[1], plain[1])


def test_no_more_logits_than_a_chunk() -> None:
    CHUNK_BYTES["cpu"] = 4 * 512
    hidden, head = random_inputs(7, 500, 4, 64, torch.float32)
    with LargestTensor() as largest:  # inside of the operator, which it would not look into
        op.compute_tokens(hidden, head, torch.rand(500, dtype=torch.float64), 1.0, 2.0, 1.0, [], "torch")
    assert largest.elements <= max(512, hidden.numel())  # [N, V] logits would be 32,000


@pytest.mark.parametrize("backend", FAST)
def test_opcheck_and_one_compiled_graph(backend: str) -> None:
    hidden, head = random_inputs(8, 6, 4, 20, torch.float32)
    uniform = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for numbers in (None, uniform):
        torch.library.opcheck(op.sample, (hidden, head, numbers, 0.7, 2.0, 1.1, [0, 1], backend))
    torch.library.opcheck(op.draw_uniform, (hidden, [5, 9], 7))

    def draw(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return sample_tokens(hidden, head, seed=3, temperature=0.7, banned=(1,), backend=backend)

    torch._dynamo.reset()
    token, logprob = torch.compile(draw, fullgraph=True, backend="aot_eager")(hidden, head)
    wanted_token, wanted_logprob = draw(hidden, head)
    assert torch.equal(token, wanted_token) and torch.equal(logprob, wanted_logprob)


@pytest.mark.parametrize("backend", FAST)
def test_log_sum_exp_and_any_strides(backend: str) -> None:
    hidden, head = random_inputs(9, 7, 5, 40)
    uniform = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = (0.7, None, 1.0, [], backend)
    token, logprob, lse = op.compute_tokens(hidden, head, uniform, *settings)
    logits = hidden @ head.T / 0.7
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logprob, logits.gather(-1, token[:, None])[:, 0] - lse, rtol=1e-12, atol=1e-12)
    strided = hidden.repeat_interleave(2, 1)[:, ::2], head.T.contiguous().T, torch.stack([uniform, uniform], 1)[:, 0]
    for got, wanted in zip(op.compute_tokens(*strided, *settings), (token, logprob, lse), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", FAST)
def test_low_precision_logprob_has_float32s_error(backend: str, head_dtype: torch.dtype, dtype: torch.dtype) -> None:
    hidden, head = random_inputs(10, 30, 16, 40, dtype)
    head = head.to(head_dtype)
    token, logprob = sample_tokens(hidden, head, seed=2, backend=backend)
    truth = (hidden.double() @ head.double().T).log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert logprob.dtype == torch.float32 and (logprob.double() - truth).abs().max() < 1e-5


@pytest.mark.skipif(not interpreting(), reason="CPU tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("greedy", [False, True])
def test_kernel_writes_its_outputs_and_nothing_else(dtype: torch.dtype, greedy: bool) -> None:
    N, V = 5, 37
    generator = torch.Generator().manual_seed(0)
    options = LogitOptions(temperature=0.8, softcap=3.0, logit_scale=-1.1, banned=(0, 36))
    raw, raw_buffer = guarded((N, V), dtype, columns=64)
    raw.copy_(torch.randn(N, V, generator=generator, dtype=torch.float64))
    uniform = None if greedy else torch.rand(N, generator=generator, dtype=torch.float64)
    wanted = [torch.empty(N, dtype=kind) for kind in (torch.int64, dtype, dtype)]
    choose_tokens(raw.clone(), uniform, *wanted, options)
    options.ban_(raw)
    before = raw_buffer.clone()
    got = [guarded((N,), kind) for kind in (torch.int64, dtype, dtype)]
    op.sample_launch(raw, uniform, *(view for view, _ in got), options, BLOCKS).run()
    assert torch.equal(raw_buffer, before)
    for (view, buffer), values in zip(got, wanted, strict=True):
        torch.testing.assert_close(view, values, rtol=1e-5, atol=1e-5)
        assert_intact(buffer, view)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which the interpreter computes with
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_finite_logits_gets_a_token_and_a_logprob_that_says_so(
    backend: str, value: float, greedy: bool
) -> None:
    """Whoever sampled it then sees NaN, instead of an index out of bounds or, on a GPU, a lost context."""
    hidden, head = random_inputs(0, 3, 4, 9)
    hidden[1, 2] = value
    token, logprob = sample_tokens(hidden, head, seed=0, greedy=greedy, backend=backend)
    assert ((token >= 0) & (token < 9)).all()
    assert logprob.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(5)}, ValueError, r"hidden: got shape \[5\], wanted \[N, E\]"),
        ({"hidden": torch.zeros(5, 3).long()}, TypeError, r"hidden: got dtype torch.int64"),
        ({"lm_head": torch.zeros(7, 4)}, ValueError, r"lm_head: got shape \[7, 4\], wanted \[V, E=3\]"),
        ({"lm_head": torch.zeros(0, 3)}, ValueError, r"lm_head: got shape with V=0"),
        ({"temperature": -1.0}, ValueError, r"temperature: got -1.0"),
        ({"banned": (-1,)}, ValueError, r"banned: got token -1"),
        ({"softcap": 0.0}, ValueError, r"softcap: got 0.0"),
    ],
)
def test_bad_arguments_are_named(backend: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": torch.zeros(5, 3), "lm_head": torch.zeros(7, 3), **changes}
    with pytest.raises(error, match=message):
        sample_tokens(**arguments, seed=0, backend=backend)


def test_backend_names() -> None:
    hidden, head = random_inputs(0, 2, 3, 7)
    with pytest.raises(ValueError, match=r"backend: got 'Torch', wanted one of"):
        sample_tokens(hidden, head, seed=0, backend="Torch")


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_part_of_the_rows_draws_what_the_whole_would(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, lm_head = torch.randn(7, 8, generator=generator), torch.randn(19, 8, generator=generator)
    whole, logprob = sample_tokens(hidden, lm_head, seed=5, backend=backend)
    token, part_logprob = sample_tokens(hidden[2:5], lm_head, seed=5, rows=(2, 7), backend=backend)
    assert torch.equal(token, whole[2:5])
    torch.testing.assert_close(part_logprob, logprob[2:5])
    assert not torch.equal(sample_tokens(hidden[2:5], lm_head, seed=5, backend=backend)[0], whole[2:5])
    for rows in ((-1, 7), (5, 7)):
        with pytest.raises(ValueError, match=r"rows: got .*, wanted \(first, total\) with 0 <= first and first \+ N=3"):
            sample_tokens(hidden[2:5], lm_head, seed=5, rows=rows, backend=backend)
