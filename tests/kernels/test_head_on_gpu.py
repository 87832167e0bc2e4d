"""The losses and the sampler on a CUDA device, at the sizes that they are made for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy, sample_tokens
from quietstar_kernels.token_sampling import op as sampling

pytestmark = pytest.mark.gpu

INTERPOLATIONS = ["logits", "log_probs"]
BACKENDS = ["torch", "triton"]


@pytest.fixture
def no_wait() -> Iterator[None]:
    """Within the test, waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def random_inputs(
    N: int, E: int, V: int, dtype: torch.dtype, *, ignored: float = 0.1, low: int = 2
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden_base, hidden_thought, weight, lm_head] that need gradients, targets, row weights."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    states = [normal(N, E).to(dtype), normal(N, E).to(dtype), normal(N).sigmoid().to(dtype)]
    head = (normal(V, E) * 2 * E**-0.5).to(dtype)
    target = torch.randint(low, V, (N,), generator=generator, device="cuda")
    target[normal(N).abs() < ignored] = -100
    return [x.requires_grad_() for x in (*states, head)], target, normal(N) / N


def results(tensors: list[Tensor], target: Tensor, row_weight: Tensor, known: bool, **options: Any) -> list[Tensor]:
    """Losses and gradients, with the row weights as such or as upstream gradients."""
    if known:
        loss, nll = mixed_cross_entropy(*tensors, target, row_weight=row_weight, **options)
        return [nll, *torch.autograd.grad(loss, tensors)]
    nll = mixed_cross_entropy(*tensors, target, **options)
    return [nll.detach(), *torch.autograd.grad(nll, tensors, row_weight.to(nll.dtype))]


def mean_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "temperature": 0.8, "banned": (0, 1), "logit_scale": 1.2}])
def test_error_is_within_twice_that_of_plain_pytorch(
    backend: str, interpolation: str, known: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    tensors, target, row_weight = random_inputs(700, 520, 3001, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = results(exact, target, row_weight, known, interpolation=interpolation, backend="reference", **options)
    got = results(tensors, target, row_weight, known, interpolation=interpolation, backend=backend, **options)

    base, thought, weight, head = tensors
    share, counted = weight.unsqueeze(-1), target != -100

    def log_probs(hidden: Tensor) -> Tensor:
        logits = hidden @ head.T * options.get("logit_scale", 1.0)
        if "softcap" in options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        logits = logits / options.get("temperature", 1.0)
        logits[:, list(options.get("banned", ()))] = float("-inf")
        return logits.log_softmax(-1).gather(-1, target.clamp_min(2).unsqueeze(-1)).squeeze(-1)

    if interpolation == "logits":
        plain_nll = -log_probs((1 - share) * base + share * thought)
    else:
        plain_nll = -((1 - weight) * log_probs(base) + weight * log_probs(thought))
    plain_nll = torch.where(counted, plain_nll, 0.0)
    plain = [plain_nll, *torch.autograd.grad(plain_nll, tensors, row_weight.to(plain_nll.dtype))]
    for index, (mine, theirs, wanted) in enumerate(zip(got, plain, truth, strict=True)):
        floor = torch.finfo(dtype).eps * 1e-2 * float(wanted.abs().max())
        assert mean_error(mine, wanted) <= 2 * mean_error(theirs, wanted) + floor, f"tensor {index}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [False, True])
def test_what_rounding_takes_from_a_mixed_state_is_put_back(backend: str, dtype: torch.dtype, gradient: bool) -> None:
    tensors, target, _ = random_inputs(700, 512, 3001, dtype)
    base, thought, weight, head = (x.detach() for x in tensors)
    truth = mixed_cross_entropy(*(x.double() for x in (base, thought, weight, head)), target, backend="reference")
    share = weight.float().unsqueeze(-1)
    state = ((1 - share) * base + share * thought).to(dtype)
    rounded = linear_cross_entropy(state, head, target, backend=backend)
    nll = mixed_cross_entropy(base, thought, weight.requires_grad_(gradient), head, target, backend=backend)
    assert mean_error(nll.detach(), truth) < mean_error(rounded, truth) / 20


@pytest.mark.parametrize("V", [32002, 151936])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32's gradient is written over its logits
def test_real_sizes_are_bit_equal_from_run_to_run_and_close_to_the_torch_backend(
    V: int, known: bool, dtype: torch.dtype
) -> None:
    tensors, target, row_weight = random_inputs(2300, 1024, V, dtype)
    first = results(tensors, target, row_weight, known, backend="triton")
    for _ in range(3):
        again = results(tensors, target, row_weight, known, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = results(tensors, target, row_weight, known, backend="torch")
    for mine, theirs in zip(first, other, strict=True):
        assert mean_error(mine, theirs.double()) <= 2**-8 * float(theirs.double().square().mean().sqrt())


def test_more_logits_than_an_int32_counts() -> None:
    """N V = 2.2e9: the last rows' losses are those of the same rows alone."""
    N, V = 70_016, 32002
    tensors, target, _ = random_inputs(N, 64, V, torch.bfloat16)
    hidden, head = tensors[0].detach(), tensors[3].detach()
    nll = linear_cross_entropy(hidden, head, target, backend="triton")
    alone = linear_cross_entropy(hidden[-256:], head, target[-256:], backend="triton")
    torch.testing.assert_close(nll[-256:], alone, rtol=1e-5, atol=1e-5)
    token, logprob = sample_tokens(hidden, head, seed=0, backend="triton")
    logits = hidden[-256:].float() @ head.float().T
    wanted = logits.log_softmax(-1).gather(-1, token[-256:, None])[:, 0]
    torch.testing.assert_close(logprob[-256:], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_nothing_waits_for_the_device(backend: str, interpolation: str, request: pytest.FixtureRequest) -> None:
    tensors, target, row_weight = random_inputs(300, 128, 1000, torch.bfloat16)
    options: dict[str, Any] = {"interpolation": interpolation, "backend": backend, "banned": (0, 1)}
    for known in (False, True):
        results(tensors, target, row_weight, known, **options)  # compiles, and copies the banned ids
    request.getfixturevalue("no_wait")
    for known in (False, True):
        results(tensors, target, row_weight, known, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_holds_losses_and_gradients(backend: str) -> None:
    tensors, target, row_weight = random_inputs(300, 128, 1000, torch.bfloat16)
    options: dict[str, Any] = {"backend": backend, "banned": (0, 1)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which still writes the inputs
    with torch.cuda.stream(side):
        results(tensors, target, row_weight, True, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(tensors, target, row_weight, True, **options)
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    for got, wanted in zip(captured, results(tensors, target, row_weight, True, **options), strict=True):
        assert torch.equal(got, wanted)


BAD_TARGET = """
import sys
import torch
from quietstar_kernels import linear_cross_entropy
hidden, head = torch.randn(4, 8, device="cuda"), torch.randn(9, 8, device="cuda")
target = torch.tensor([0, int(sys.argv[1]), 2, -100], device="cuda")
linear_cross_entropy(hidden, head, target, banned=(1,), backend=sys.argv[2])
torch.cuda.synchronize()
print("computed")
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("token", "fits"), [(8, True), (9, False), (-1, False), (1, False)])
def test_the_device_asserts_that_targets_fit(token: int, fits: bool, backend: str) -> None:
    """In a process of its own, for no CUDA call works after a device's assertion. Token 1 is banned."""
    process = subprocess.run(
        [sys.executable, "-c", BAD_TARGET, str(token), backend],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if fits:
        assert process.returncode == 0 and "computed" in process.stdout, process.stderr
    else:
        assert process.returncode != 0 and "device-side assert" in process.stderr
        assert "computed" not in process.stdout


def test_a_cuda_graph_holds_a_sampling_step() -> None:
    tensors, _, _ = random_inputs(300, 128, 1000, torch.bfloat16)
    hidden, head = tensors[0].detach(), tensors[3].detach()
    uniform = torch.rand(300, dtype=torch.float64, device="cuda")
    arguments = (hidden, head, uniform, 0.9, None, 1.0, [0, 1], "triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which still writes the inputs
    with torch.cuda.stream(side):
        sampling.sample(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampling.sample(*arguments)
    uniform.uniform_()
    graph.replay()
    for got, wanted in zip(captured, sampling.sample(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("V", [32002, 151936])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "temperature": 0.7, "banned": (0, 5)}])
def test_tokens_are_those_of_the_reference(V: int, greedy: bool, options: dict[str, Any]) -> None:
    tensors, _, _ = random_inputs(512, 256, V, torch.float32)
    hidden, head = tensors[0].detach(), tensors[3].detach()
    token, logprob = sample_tokens(hidden, head, seed=1, greedy=greedy, backend="triton", **options)
    wanted, wanted_logprob = sample_tokens(hidden, head, seed=1, greedy=greedy, backend="reference", **options)
    same = token == wanted
    assert int((~same).sum()) <= 2  # numbers within rounding of a border
    torch.testing.assert_close(logprob[same], wanted_logprob[same], rtol=1e-5, atol=2e-5)
    assert not torch.isin(token, torch.tensor(options.get("banned", ()), dtype=torch.int64, device="cuda")).any()


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square statistic over 200,000 draws from one row's distribution, which fills several blocks."""
    N, V = 200_000, 9000
    generator = torch.Generator("cuda").manual_seed(4)
    head = torch.randn(V, 8, generator=generator, device="cuda")
    hidden = torch.randn(1, 8, generator=generator, device="cuda") / 4
    token, _ = sample_tokens(hidden.expand(N, -1), head, seed=7, backend="triton")
    expected = (hidden @ head.T).double().softmax(-1)[0] * N
    counts = torch.bincount(token, minlength=V)
    common = expected > 5
    statistic = float(((counts[common] - expected[common]).square() / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert freedom > 4000 and statistic < freedom + 3.1 * (2 * freedom) ** 0.5  # the 0.999 quantile


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend: str) -> None:
    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cuda").requires_grad_()

    tensors = [normal(5, 3), normal(5, 3), normal(5), normal(7, 3)]
    target = torch.tensor([1, 6, -100, 3, 2], device="cuda")
    for interpolation in INTERPOLATIONS:

        def loss(*inputs: Tensor, interpolation: str = interpolation) -> Tensor:
            options: dict[str, Any] = {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.3, "banned": (0,)}
            return mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend, **options)

        assert torch.autograd.gradcheck(loss, tensors)
