"""The losses: the torch backend against the reference, and the reference against three nested loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy
from quietstar_kernels import logits as shared
from quietstar_kernels.logits import LOGITS_IN_CHUNK
from tests.kernels.largest_tensor import LargestTensor

CPU_CHUNK = LOGITS_IN_CHUNK["cpu"]
BACKENDS = ["reference", "torch"]
INTERPOLATIONS = ["logits", "log_probs"]
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
    LOGITS_IN_CHUNK["cpu"] = CPU_CHUNK


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


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    N=st.integers(0, 13),
    E=st.integers(1, 6),
    V=st.integers(4, 17),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    interpolation=st.sampled_from(INTERPOLATIONS),
    options=st.sampled_from(OPTIONS),
    chunk=st.sampled_from([1, 40, CPU_CHUNK]),
)
@example(0, 9, 3, 7, 0.0, "log_probs", OPTIONS[3], 20)
@example(0, 9, 3, 7, 0.4, "logits", OPTIONS[5], 20)
@example(0, 9, 3, 7, 0.4, "log_probs", OPTIONS[4], 20)  # once NaN: an ignored row took token 0, banned, as its target
def test_torch_backend_equals_reference(
    seed: int, N: int, E: int, V: int, ignored: float, interpolation: str, options: dict[str, Any], chunk: int
) -> None:
    LOGITS_IN_CHUNK["cpu"] = chunk
    tensors, target = random_inputs(seed, N, E, V, ignored=ignored, low=3)
    got = results(tensors, target, interpolation=interpolation, backend="torch", **options)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference", **options)
    assert_close(got, wanted, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_linear_is_mixed_with_weight_zero(backend: str, options: dict[str, Any]) -> None:
    LOGITS_IN_CHUNK["cpu"] = 30
    (base, thought, weight, head), target = random_inputs(2, 8, 4, 9, ignored=0.3, low=3)
    alone = linear_cross_entropy(base, head, target, backend=backend, **options)
    mixed = mixed_cross_entropy(base, thought, torch.zeros_like(weight), head, target, backend=backend, **options)
    got = [alone, *torch.autograd.grad(alone, [base, head], upstream_for(alone))]
    assert_close(got, [mixed, *torch.autograd.grad(mixed, [base, head], upstream_for(mixed))], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradcheck(backend: str, interpolation: str) -> None:
    LOGITS_IN_CHUNK["cpu"] = 14
    tensors, target = random_inputs(3, 5, 3, 7, ignored=0.3, low=1)
    options = {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.3, "banned": (0,)}

    def loss(*inputs: Tensor) -> Tensor:
        return mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, tensors)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_the_needed_gradients(interpolation: str, needed: tuple[int, ...]) -> None:
    tensors, target = random_inputs(4, 6, 3, 7)
    wanted = results(tensors, target, interpolation=interpolation, backend="reference")
    some = [x.detach().requires_grad_(index in needed) for index, x in enumerate(tensors)]
    loss = mixed_cross_entropy(*some, target, interpolation=interpolation, backend="torch")
    loss.backward(upstream_for(loss))
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
    loss, *grads = results([base, thought, weight, head], target, **options)
    assert loss[2] == 0 and loss[4] == 0 and bool((loss[[0, 1, 3, 5]] > 0).all())
    assert all(not grad[[2, 4]].any() for grad in grads[:3])
    kept = [0, 1, 3, 5]
    few = [x.detach()[kept].requires_grad_() for x in (base, thought, weight)]
    alone = mixed_cross_entropy(*few, head, target[kept], interpolation=interpolation, backend=backend)
    torch.testing.assert_close(alone, loss[kept])
    torch.testing.assert_close(torch.autograd.grad(alone, head, upstream_for(loss)[kept])[0], grads[3])


def test_int32_targets_and_expanded_upstream_gradient() -> None:
    tensors, target = random_inputs(6, 6, 3, 7)
    for interpolation in INTERPOLATIONS:
        both = []
        for backend in BACKENDS:
            loss = mixed_cross_entropy(*tensors, target.int(), interpolation=interpolation, backend=backend)
            both.append([loss, *torch.autograd.grad(loss.sum(), tensors)])
        assert_close(both[1], both[0], 1e-12)


@pytest.fixture(params=["widened", "low_precision"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply as a CPU does, or operands of low precision with float32 sums, as CUDA does."""
    if request.param == "low_precision":
        monkeypatch.setattr(shared, "product_dtype", lambda device, dtype: dtype)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_low_precision_error_is_within_twice_that_of_plain_pytorch(
    dtype: torch.dtype, interpolation: str, products: str
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

    loss = mixed_cross_entropy(*tensors, target, interpolation=interpolation, backend="torch")
    assert loss.dtype == torch.float32
    ours = [loss, *torch.autograd.grad(loss, tensors, upstream.float())]
    for got, theirs, wanted in zip(ours, plain, truth, strict=True):
        budget = 2 * (theirs.double() - wanted).abs().max() + torch.finfo(dtype).eps * 1e-2 * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= budget
    # rewards are differences of losses: the inputs are exact, so the loss may only have float32's error
    assert (loss.double() - truth_loss).abs().max() <= 1e-5 * truth_loss.abs().max()


@pytest.mark.parametrize("weight", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_reward_of_a_small_weight_is_not_rounding_noise(
    weight: float, dtype: torch.dtype, interpolation: str, products: str
) -> None:
    """The reward is a small difference of two losses; rounding the mixed state would be larger than it."""
    (base, thought, _, head), target = random_inputs(12, 128, 64, 100, dtype=dtype)
    head = head * 64**-0.5

    def reward(backend: str, *inputs: Tensor) -> Tensor:
        talk = mixed_cross_entropy(*inputs, target, interpolation=interpolation, backend=backend)
        return linear_cross_entropy(inputs[0], inputs[3], target, backend=backend) - talk

    inputs = [x.detach() for x in (base, thought, torch.full((128,), weight), head)]
    wanted = reward("reference", *(x.double() for x in inputs))
    error = reward("torch", *inputs).double() - wanted
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
    if backend == "torch":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = results(tensors, target, interpolation=interpolation, backend=backend)
        assert_close(inside, wanted, 1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_no_more_logits_than_a_chunk(interpolation: str) -> None:
    """[N, V] logits would be 500 * 64; the chunk is 512 and the other tensors are no larger than the inputs."""
    LOGITS_IN_CHUNK["cpu"] = 512
    tensors, target = random_inputs(9, 500, 4, 64, dtype=torch.float32, ignored=0.2)
    with LargestTensor() as largest:
        results(tensors, target, interpolation=interpolation, backend="torch", softcap=2.0)
    assert largest.elements <= max(512, 500 * 4)


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
    with pytest.raises(ValueError, match=r"backend: 'triton' is not built into this version"):
        linear_cross_entropy(hidden, head, target, backend="triton")
    with pytest.raises(ValueError, match=r"backend: got 'numpy', wanted one of"):
        mixed_cross_entropy(**arguments, backend="numpy")
